"""Training text for the reference pair: the Python standard library's own sources.

The text is whatever the running interpreter ships, so a reader can rebuild the pair without
downloading anything. Files are split whole into training and held-out parts by a hash of their
relative path, so the split does not depend on the order of the file system, and no held-out file
shares a line with training except by the authors' own copying.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, EOS = "<|bos|>", "<|eos|>"
HELD_OUT_PERCENT = 4
MAX_FILE_BYTES = 400_000
"""Longer files are generated tables, which teach a model to repeat itself."""

MAX_DIGIT_SHARE = 0.18
"""Share of digits and backslashes above which a file counts as data rather than as source."""

SKIPPED_FOLDERS = ("site-packages", "encodings", "pydoc_data")
"""Third-party packages, code-page tables and generated topic text."""


@dataclass(frozen=True)
class SourceFile:
    """One source file: ``name`` relative to the library root, ``text`` decoded as UTF-8."""

    name: str
    text: str


def is_held_out(name: str) -> bool:
    """Whether the file belongs to the held-out part; a function of its name alone."""
    digest = hashlib.blake2b(name.encode(), digest_size=4).digest()
    return int.from_bytes(digest) % 100 < HELD_OUT_PERCENT


def _is_table(text: str) -> bool:
    marks = sum(map(text.count, "0123456789\\"))
    return marks > MAX_DIGIT_SHARE * len(text)


def collect(root: Path | None = None) -> tuple[list[SourceFile], list[SourceFile]]:
    """Return (training, held-out) files below ``root`` (default: this interpreter's library).

    Left out: third-party packages, files that are not UTF-8, near-empty files, exact duplicates
    and tables of data.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    train: list[SourceFile] = []
    held_out: list[SourceFile] = []
    seen: set[bytes] = set()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if any(part in SKIPPED_FOLDERS for part in path.relative_to(root).parts[:-1]):
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
        (held_out if is_held_out(name) else train).append(SourceFile(name, text))
    return train, held_out


def train_tokenizer(files: list[SourceFile], vocab_size: int = 4096) -> Tokenizer:
    """Byte-level BPE over the training files; id 0 is BOS, id 1 is EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f.text for f in files), trainer, length=len(files))
    return tokenizer


def encode(tokenizer: Tokenizer, files: list[SourceFile]) -> list[list[int]]:
    """Token ids of each file, BOS first and EOS last."""
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    return [[bos, *e.ids, eos] for e in tokenizer.encode_batch([f.text for f in files])]
