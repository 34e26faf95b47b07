"""Prompts of acceptance traces: held out from the training of the reference pair, or a user's own.

The reference pair is trained on the Python standard library of the running interpreter, so anyone can
rebuild it without a download. Whole files are held out, by a hash of their relative path.
"""

from __future__ import annotations

import hashlib
import random
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wispprof.errors import ArtifactDamaged, ArtifactMissing, ModelError, ProfileError

if TYPE_CHECKING:
    from wispprof.settings.profiler_settings import TraceSettings

HELD_OUT_PERCENT = 4
MAX_FILE_BYTES = 400_000
"""Longer files are generated tables, which teach a model to repeat itself."""
MAX_DIGIT_SHARE = 0.18
"""Share of digits and backslashes above which a file is data rather than source."""
SKIPPED_FOLDERS = ("site-packages", "encodings", "pydoc_data")
"""Third-party packages, code-page tables and generated topic text."""

_CHARACTERS_PER_TOKEN = 16
"""Characters to encode per wanted token: more than the average of any tokenizer."""
_EXAMPLE_HINT = 'Write lines such as {"prompt": "…"} or {"messages": [{"role": "user", "content": "…"}]}.'


@dataclass(frozen=True)
class SourceFile:
    """One source file: ``name`` relative to the library root, ``text`` decoded as UTF-8."""

    name: str
    text: str


def is_held_out(name: str) -> bool:
    """Whether the file is held out; depends on its name alone."""
    digest = hashlib.blake2b(name.encode(), digest_size=4).digest()
    return int.from_bytes(digest) % 100 < HELD_OUT_PERCENT


def collect_sources(root: Path | None = None) -> tuple[list[SourceFile], list[SourceFile]]:
    """(training, held-out) files below ``root``; default: this interpreter's standard library.

    Skips third-party packages, files that are not UTF-8, near-empty files, exact duplicates and tables of
    data.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    train: list[SourceFile] = []
    held_out: list[SourceFile] = []
    seen: set[bytes] = set()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if any(part in SKIPPED_FOLDERS for part in relative.parts[:-1]):
            continue
        if not 200 <= path.stat().st_size <= MAX_FILE_BYTES:
            continue
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        digest = hashlib.blake2b(text.encode()).digest()
        if digest in seen or _is_table(text):
            continue
        seen.add(digest)
        name = relative.as_posix()
        (held_out if is_held_out(name) else train).append(SourceFile(name, text))
    return train, held_out


def _is_table(text: str) -> bool:
    return sum(map(text.count, "0123456789\\")) > MAX_DIGIT_SHARE * len(text)


def held_out_prompts(tokenizer: Any, count: int, tokens: int, seed: int = 0) -> list[list[int]]:
    """Token ids of excerpts of held-out files, from their beginning or from a random line.

    Each has between half of ``tokens`` and all of them, so that paths begin at different positions.
    """
    texts = [file.text for file in collect_sources()[1]]
    return _excerpts(tokenizer, texts, count, tokens, seed)


@dataclass(frozen=True)
class ChosenPrompts:
    """``ids``: token ids of each prompt. ``cut``: how many of them are only the beginning of a longer one.
    ``left_out``: conversations that were too long."""

    ids: list[list[int]]
    cut: int = 0
    left_out: int = 0

    @property
    def facts(self) -> dict[str, int]:
        """For the trace's ``meta``."""
        return {"cut_prompts": self.cut, "left_out_prompts": self.left_out}


def choose_prompts(settings: TraceSettings, tokenizer: Any, context: int) -> ChosenPrompts:
    """The prompts of a trace whose target has this ``context``."""
    size = min(settings.prompt_tokens, context - settings.path_tokens)
    if settings.prompts is None:
        return ChosenPrompts(held_out_prompts(tokenizer, settings.count, size, settings.seed))
    return read_prompts(settings.prompts, tokenizer, settings.count, size, settings.seed)


def prompt_warning(meta: Mapping[str, object], tokens: int) -> str:
    """What a trace's ``meta`` says of prompts that were not traced as they are served; "" if all were."""
    said = []
    if cut := meta.get("cut_prompts"):
        said.append(f"{cut} prompts were cut to {tokens} tokens")
    if left_out := meta.get("left_out_prompts"):
        said.append(f"{left_out} longer conversations were left out")
    if not said:
        return ""
    return f"{' and '.join(said)}, so answers differ from those that are served. Give more --prompt-tokens."


def load_prompts(path: Path, tokenizer: Any, count: int, tokens: int, seed: int = 0) -> list[list[int]]:
    """Token ids of a user's prompts, see :func:`read_prompts`."""
    return read_prompts(path, tokenizer, count, tokens, seed).ids


def read_prompts(path: Path, tokenizer: Any, count: int, tokens: int, seed: int = 0) -> ChosenPrompts:
    """A user's prompts, ``count`` at most.

    A ``.jsonl`` file has a ``prompt`` or ``text`` per line, cut to ``tokens``, or a conversation
    (``messages``), which goes through the model's chat template and is left out if it is longer. Of any
    other text file excerpts are taken. Raises :class:`ArtifactMissing`, :class:`ArtifactDamaged` with the
    line, :class:`ProfileError` if there is no prompt, and :class:`ModelError` for messages without a
    template.
    """
    try:
        text = path.read_text("utf-8")
    except OSError as err:
        raise ArtifactMissing(f"Cannot read prompts {path}: {err.strerror}.", "") from None
    except UnicodeDecodeError:
        raise ArtifactDamaged(f"{path} is not UTF-8 text.", "Give text or JSON lines.") from None
    if path.suffix != ".jsonl":
        return ChosenPrompts(_excerpts(tokenizer, [text], count, tokens, seed))
    prompts: list[tuple[list[int], bool]] = []
    too_long = 0
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        prompt = _parse_prompt(line, f"{path} line {number}")
        if isinstance(prompt, str):
            whole = _encode_as_served(tokenizer, prompt)
            ids = whole[:tokens]
        else:
            whole = ids = _encode_chat(tokenizer, prompt, f"{path} line {number}")
            too_long += len(ids) > tokens
        if 0 < len(ids) <= tokens:
            prompts.append((ids, len(ids) < len(whole)))
    if not prompts and too_long:
        raise ProfileError(
            f"All conversations of {path} are longer than {tokens} tokens.", "Give more --prompt-tokens."
        )
    if not prompts:
        raise ProfileError(f"{path} contains no prompts.", _EXAMPLE_HINT)
    random.Random(seed).shuffle(prompts)
    chosen = prompts[:count]
    return ChosenPrompts([ids for ids, _ in chosen], sum(cut for _, cut in chosen), too_long)


def _parse_prompt(line: str, where: str) -> str | list[dict[str, Any]]:
    """The text of a line, or its messages up to what the model has to answer."""
    import msgspec

    try:
        entry = msgspec.json.decode(line, type=str | dict[str, Any])
    except msgspec.ValidationError:
        raise ArtifactDamaged(f"{where} has no prompt.", _EXAMPLE_HINT) from None
    except msgspec.DecodeError as err:
        raise ArtifactDamaged(f"{where}: {err}.", "Write one JSON object a line.") from None
    if isinstance(entry, dict) and "messages" in entry:
        try:
            messages: list[dict[str, Any]] = msgspec.convert(entry["messages"], list[dict[str, Any]])
        except msgspec.ValidationError as err:
            raise ArtifactDamaged(f"{where}: messages: {err}.", _EXAMPLE_HINT) from None
        while messages and messages[-1].get("role") == "assistant":
            messages.pop()  # data sets hold the answer, too
        return messages
    prompt = entry if isinstance(entry, str) else entry.get("prompt", entry.get("text"))
    if not isinstance(prompt, str):
        raise ArtifactDamaged(f"{where} has no prompt.", _EXAMPLE_HINT)
    return prompt


def _excerpts(tokenizer: Any, texts: Sequence[str], count: int, tokens: int, seed: int) -> list[list[int]]:
    generator = random.Random(seed)
    prompts: list[list[int]] = []
    for text in _starts(texts, generator, count):
        length = generator.randint(max(2, tokens // 2), max(2, tokens))
        ids = _encode(tokenizer, text[: _CHARACTERS_PER_TOKEN * length])[:length]
        if len(ids) >= max(2, tokens // 2):
            prompts.append(ids)
        if len(prompts) == count:
            return prompts
    if not prompts:
        raise ProfileError(
            f"No text is long enough for prompts of {tokens} tokens.", "Give shorter --prompt-tokens."
        )
    return prompts


def _starts(texts: Sequence[str], generator: random.Random, count: int) -> Iterator[str]:
    """Each text from its beginning, in random order; then texts from random line starts."""
    order = list(texts)
    generator.shuffle(order)
    yield from order
    for _ in range(4 * count):
        text = generator.choice(order)
        line = text.find("\n", generator.randrange(max(1, len(text)))) + 1
        if line:
            yield text[line:]


def _encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids, with BOS first if the tokenizer has one (models are trained that way)."""
    if tokenizer is None:
        raise ModelError("The model has no tokenizer, so it takes no text.", "Name a model with one.")
    ids = [int(t) for t in tokenizer(text, add_special_tokens=False)["input_ids"]]
    bos = tokenizer.bos_token_id
    return ids if bos is None else [int(bos), *ids]


def _encode_as_served(tokenizer: Any, text: str) -> list[int]:
    """Token ids as servers and edges make them of a prompt: with the tokenizer's own special tokens."""
    if tokenizer is None:
        return _encode(tokenizer, text)
    return [int(token) for token in tokenizer(text)["input_ids"]]


def _encode_chat(tokenizer: Any, messages: list[dict[str, Any]], where: str) -> list[int]:
    """Token ids of a conversation as serving makes them, up to where the answer begins."""
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            "The model has no chat template, so it takes no messages.", 'Give {"prompt": "…"} lines.'
        )
    if not messages:
        return []
    try:
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except Exception as err:  # templates are programs of the model's maker and raise whatever they like
        raise ArtifactDamaged(
            f"{where}: the model's chat template refuses this: {err}.", "Correct the line."
        ) from None
    return [int(token) for token in ids]
