"""Prompts that the reference pair has never seen, or a user's own."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from wispprof.errors import ArtifactDamaged, ArtifactMissing, ModelError, ProfileError

__all__ = ["held_out_prompts", "load_prompts"]

_CHARACTERS = 16
"""Characters encoded per wanted token: more than any tokenizer packs into one on average."""


def held_out_prompts(tokenizer: Any, count: int, tokens: int, seed: int = 0) -> list[list[int]]:
    """Beginnings of held-out standard-library files, and cuts at their line starts, as token ids.

    Each has between half of ``tokens`` and all of them, so that paths begin at different positions.
    """
    from wispprof.profiling.held_out_corpus import collect

    texts = [file.text for file in collect()[1]]
    return _cuts(tokenizer, texts, count, tokens, seed)


def load_prompts(
    path: Path, tokenizer: Any, count: int, tokens: int, seed: int = 0
) -> list[list[int]]:
    """A user's prompts: ``.jsonl`` whose lines hold ``prompt`` or ``text`` (taken whole, up to
    ``tokens``), or any text file (cut at line starts). At most ``count`` of them.

    Raises :class:`ArtifactMissing`, :class:`ArtifactDamaged` naming the line, :class:`ProfileError`
    where nothing is left.
    """
    try:
        text = path.read_text("utf-8")
    except OSError as err:
        raise ArtifactMissing(f"Cannot read prompts {path}: {err.strerror}.", "") from None
    except UnicodeDecodeError:
        raise ArtifactDamaged(f"{path} is not UTF-8 text.", "Give text or JSON lines.") from None
    if path.suffix != ".jsonl":
        return _cuts(tokenizer, [text], count, tokens, seed)
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            ids = _encode(tokenizer, _prompt_of(line, f"{path} line {number}"))[:tokens]
            if ids:
                found.append(ids)
    if not found:
        raise ProfileError(f"{path} holds no prompts.", 'Write lines such as {"prompt": "…"}.')
    random.Random(seed).shuffle(found)
    return found[:count]


def _prompt_of(line: str, where: str) -> str:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as err:
        raise ArtifactDamaged(f"{where}: {err.msg}.", "Write one JSON object a line.") from None
    value = entry.get("prompt", entry.get("text")) if isinstance(entry, dict) else entry
    if not isinstance(value, str):
        raise ArtifactDamaged(f"{where} has no prompt.", 'Write lines such as {"prompt": "…"}.')
    return value


def _cuts(
    tokenizer: Any, texts: Sequence[str], count: int, tokens: int, seed: int
) -> list[list[int]]:
    generator = random.Random(seed)
    found: list[list[int]] = []
    for text in _in_turn(texts, generator, count):
        wanted = generator.randint(max(2, tokens // 2), max(2, tokens))
        ids = _encode(tokenizer, text[: _CHARACTERS * wanted])[:wanted]
        if len(ids) >= max(2, tokens // 2):
            found.append(ids)
        if len(found) == count:
            return found
    if not found:
        raise ProfileError(
            f"No text is long enough for prompts of {tokens} tokens.",
            "Give shorter --prompt-tokens.",
        )
    return found


def _in_turn(texts: Sequence[str], generator: random.Random, count: int) -> Iterator[str]:
    """Each text from its beginning, in random order; then from random line starts, several rounds."""
    order = list(texts)
    generator.shuffle(order)
    yield from order
    for _ in range(4 * count):
        text = generator.choice(order)
        line = text.find("\n", generator.randrange(max(1, len(text)))) + 1
        if line:
            yield text[line:]


def _encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids, begun with BOS where the tokenizer has one (models are trained that way)."""
    if tokenizer is None:
        raise ModelError(
            "The model has no tokenizer, so it cannot be given text.", "Name a model that has one."
        )
    ids = [int(t) for t in tokenizer(text, add_special_tokens=False)["input_ids"]]
    bos = tokenizer.bos_token_id
    return ids if bos is None else [int(bos), *ids]
