"""Weights on disk: do they fit the model, are they finite, and what identifies them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from wispprof.engines.model_folder import INCOMPLETE
from wispprof.errors import ModelError, ModelUnsupported

_HASH_CHUNK = 1 << 20
_MAX_FULLY_HASHED = 256 << 20
_SAMPLES, _SAMPLE_BYTES = 8, 4096
_MAX_HEADER = 100 << 20
_DTYPES = ("F64", "F32", "F16", "BF16")
_BUFFERS = re.compile(r"rotary_emb\.inv_freq$|(^|\.)position_ids$|\.masked_bias$")
"""Tensors that old checkpoints carry and no model reads."""

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class TensorHeader(NamedTuple):
    """Where a tensor lies: ``start`` and ``stop`` are byte offsets in ``file``."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_headers(files: Iterable[Path]) -> dict[str, TensorHeader]:
    """Name and place of every tensor. Raises :class:`ModelError` for a file that is torn."""
    tensors: dict[str, TensorHeader] = {}
    for file in files:
        for name, header in _file_header(file).items():
            if name in tensors:
                both = f"{tensors[name].file.name} and in {file.name}"
                raise ModelError(
                    f"The model in {file.parent} cannot be read: {name} is in {both}.", INCOMPLETE
                )
            tensors[name] = header
    return tensors


def _file_header(file: Path) -> dict[str, TensorHeader]:
    try:
        total = file.stat().st_size
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if not 2 <= size <= min(_MAX_HEADER, total - 8):
                raise ValueError("it is torn")
            header = json.loads(stream.read(size))
        found = {
            str(name): TensorHeader(
                file,
                str(one["dtype"]),
                tuple(int(n) for n in one["shape"]),
                *(8 + size + int(offset) for offset in one["data_offsets"]),
            )
            for name, one in header.items()
            if name != "__metadata__"
        }
        if any(not 8 + size <= one.start <= one.stop <= total for one in found.values()):
            raise ValueError("it is torn")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        reason = err if type(err) is ValueError else type(err).__name__
        raise ModelError(
            f"The model in {file.parent} cannot be read: {file.name}: {reason}.", INCOMPLETE
        ) from err
    return found


def check_tensors(
    name: str, tensors: Mapping[str, TensorHeader], expected: Mapping[str, tuple[int, ...]], tied: bool
) -> None:
    """Compare what the files hold with what the model needs, name by name and shape by shape.

    ``expected``: shapes by name. ``tied``: the output head is the embedding. Raises :class:`ModelError`.
    """
    needed = {n: shape for n, shape in expected.items() if not (tied and n == _HEAD)}
    missing = sorted(set(needed) - set(tensors))
    more = sorted(n for n in set(tensors) - set(expected) if not _BUFFERS.search(n))
    problems = []
    if missing:
        problems.append(f"the model needs {_list(missing)}, which its files lack")
    if more:
        problems.append(f"its files hold {_list(more)}, which the model does not have")
    shapes = [
        f"{n} {tensors[n].shape} instead of {shape}"
        for n, shape in expected.items()
        if n in tensors and tensors[n].shape != tuple(shape)
    ]
    if shapes:
        problems.append(f"shapes differ: {_list(shapes)}")
    if problems:
        raise ModelError(
            f"The weights of {name} do not fit its config: {'; '.join(problems)}.",
            "Check config.json (model_type, sizes, tie_word_embeddings) and that the download is complete.",
        )
    packed = sorted({tensors[n].dtype for n in needed} - set(_DTYPES))
    if packed:
        raise ModelUnsupported(
            f"{name} stores weights as {', '.join(packed)}.", "Use a copy in float32, bfloat16 or float16."
        )
    if tied and _HEAD in tensors and _bytes(tensors[_HEAD]) != _bytes(tensors[_EMBEDDING]):
        raise ModelError(
            f"{name} ties the output head to the embedding, but its files hold a different {_HEAD}.",
            "Set tie_word_embeddings to false in its config.json to use it.",
        )


def _list(names: list[str]) -> str:
    more = len(names) - 4
    return ", ".join(names[:4]) + (f" and {more} more" if more > 0 else "")


def _bytes(tensor: TensorHeader) -> bytes:
    digest = hashlib.sha256()
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.start)
        _update(digest, stream, tensor.stop - tensor.start)
    return digest.digest()


def _update(digest: Any, stream: BinaryIO, size: int) -> None:
    while size > 0 and (block := stream.read(min(size, _HASH_CHUNK))):
        digest.update(block)
        size -= len(block)


def check_finite(name: str, parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raise :class:`ModelError` if a loaded weight is NaN or infinite. Reads every weight once."""
    with torch.no_grad():
        extremes = [
            (key, torch.stack(torch.aminmax(p.detach())).float()) for key, p in parameters if p.numel()
        ]
    bad = [key for key, pair in extremes if not bool(torch.isfinite(pair).all())]
    if bad:
        raise ModelError(
            f"Weights of {name} are not finite: {_list(bad)}.",
            "Download them again; if they overflow float16, use --dtype bfloat16 or float32.",
        )


def weights_digest(files: Iterable[Path], full: bool = False) -> str:
    """Identity of weight files by name, size and content.

    Up to 256 MiB in all, or with ``full``, all bytes count. Of larger models every header counts, and eight
    blocks of 4 KiB spread over each tensor: a fine-tune changes all of them, and it takes no minutes.
    """
    digest = hashlib.sha256()
    paths = sorted(files)
    whole = full or sum(path.stat().st_size for path in paths) <= _MAX_FULLY_HASHED
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}\n".encode())
        with path.open("rb") as stream:
            if whole:
                _update(digest, stream, size)
                continue
            tensors = _file_header(path)
            _update(digest, stream, min(one.start for one in tensors.values()) if tensors else size)
            for one in tensors.values():
                for i in range(_SAMPLES):
                    space = max(0, one.stop - one.start - _SAMPLE_BYTES)
                    stream.seek(one.start + space * i // (_SAMPLES - 1))
                    digest.update(stream.read(min(_SAMPLE_BYTES, one.stop - one.start)))
    return digest.hexdigest()[:16]
