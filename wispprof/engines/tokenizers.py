"""Tokenizers of models, read without their weights and without torch."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wispprof.errors import ModelError


def load_tokenizer(where: str) -> Any:
    """The tokenizer of a folder or hub id. Raises :class:`ModelError` without one."""
    from transformers import AutoTokenizer

    tokenizer = None
    folder = Path(where).expanduser()
    if folder.is_dir():
        tokenizer = read_tokenizer(folder)
    else:
        # Of a hub id only the tokenizer's own files are fetched.
        with contextlib.suppress(OSError, ValueError), quiet_transformers():
            tokenizer = without_length_warning(AutoTokenizer.from_pretrained(where))
    if tokenizer is None:
        raise ModelError(
            f"There is no tokenizer at {where}.",
            "Give --tokenizer, a folder or hub id that has the target's.",
        )
    return tokenizer


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model's folder; ``None`` if there is none. Raises :class:`ModelError`."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    if not any((folder / n).is_file() for n in names):
        return None
    from transformers import AutoTokenizer

    try:
        return without_length_warning(AutoTokenizer.from_pretrained(folder, local_files_only=True))
    except Exception as err:
        raise ModelError(
            f"The tokenizer in {folder} cannot be read: {str(err).splitlines()[0]}",
            "Download tokenizer.json and tokenizer_config.json again.",
        ) from err


def without_length_warning(tokenizer: Any) -> Any:
    """Keep transformers from printing that a text is long: servers and edges check lengths themselves."""
    warned = getattr(tokenizer, "deprecation_warnings", None)
    if isinstance(warned, dict):
        warned["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def tokenizer_hash(tokenizer: Any) -> str:
    """A hash of the vocabulary, token by token, whatever the file format.

    Which tokens are special does not count: a base draft and an instruct target may differ in that.
    """
    digest = hashlib.sha256()
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{number}:{token}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and advice, which would clutter a command's output."""
    from transformers.utils import logging as library_logging

    logging: Any = library_logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
