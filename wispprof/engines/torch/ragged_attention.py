"""Attention of small inputs in C, each at its own length; compiled on first use.

torch's attention pads the inputs of a step to the longest context and to the most drafts.
``ragged_attention.c`` does not, and multiplies small matrices faster. A C compiler (``$CC`` or ``cc``) builds
it for this processor in about a second, into the user's cache folder. Without a compiler, and for dtypes and
head sizes that it does not support, the store attends with torch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from wispprof.engines.torch.draft_tree import DraftTree

SOURCE = Path(__file__).with_suffix(".c")
HEAD_DIM_STEP = 64
"""Head sizes must be multiples of this."""
_FLAGS = ("-O3", "-march=native", "-fPIC", "-shared", "-fopenmp")
_COMPILE_S = 60.0

_log = logging.getLogger(__name__)


class _Strides(ctypes.Structure):
    _fields_ = (("token", ctypes.c_int64), ("head", ctypes.c_int64))


@functools.cache
def kernel() -> Any:
    """The compiled function, or ``None`` if it cannot be built; ``WISPPROF_NATIVE=0`` forbids it."""
    compiler = shutil.which(os.environ.get("CC", "") or "cc")
    if os.environ.get("WISPPROF_NATIVE") == "0" or compiler is None or os.name != "posix":
        return None
    try:
        function = ctypes.CDLL(str(_library(compiler))).wispprof_attend
    except (OSError, subprocess.SubprocessError, AttributeError) as err:
        _log.info("Attention in C could not be built; torch's is used: %s", err)
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    packed = (pointer, _Strides)
    inputs = (size, *(pointer,) * 7)
    function.argtypes = (*packed * 3, pointer, size, size, size, ctypes.c_float, *inputs, size, ctypes.c_int)
    function.restype = ctypes.c_int
    return function


def supports(dtype: torch.dtype, device: torch.device, head_dim: int) -> bool:
    """Whether the kernel can attend for such a store, here."""
    return bool(
        device.type == "cpu"
        and dtype == torch.float32
        and head_dim % HEAD_DIM_STEP == 0
        and kernel() is not None
    )


def _library(compiler: str) -> Path:
    """The shared library, built if this source, compiler and processor have none yet."""
    version = _run([compiler, "--version"])
    identity = b"\n".join((SOURCE.read_bytes(), version, " ".join(_FLAGS).encode(), _processor()))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wispprof"
    library = folder / f"ragged_attention-{hashlib.sha256(identity).hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Built beside it and renamed: another process sees all of it or nothing.
        with tempfile.TemporaryDirectory(dir=folder) as building:
            built = Path(building) / library.name
            _run([compiler, *_FLAGS, "-o", str(built), str(SOURCE), "-lm"])
            built.replace(library)
    return library


def _run(command: list[str]) -> bytes:
    return subprocess.run(command, capture_output=True, check=True, timeout=_COMPILE_S).stdout


def _processor() -> bytes:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.processor().encode()
    names = (b"model name", b"flags", b"Features")
    return b"\n".join(sorted({line for line in lines if line.startswith(names)}))


class RaggedInputs(NamedTuple):
    """Inputs attended by the kernel: packed tokens up to ``stop``.

    ``columns`` (4, n): first packed token, new tokens, cached tokens and capacity of each input's row.
    ``rows`` (2 · layers, n): addresses of each input's keys, then values, of each layer. ``sees`` (n,):
    address of each tree's visibility in ``trees``, 0 for a chain. ``longest``: most tokens of an input.
    """

    stop: int
    columns: np.ndarray
    rows: np.ndarray
    sees: np.ndarray
    trees: Sequence[np.ndarray]
    longest: int
    scale: float

    @classmethod
    def of(
        cls,
        new: np.ndarray,
        cached: np.ndarray,
        capacity: np.ndarray,
        rows: np.ndarray,
        trees: dict[int, DraftTree],
        scale: float,
    ) -> Self:
        """Inputs packed one after another from token 0 on; ``trees``: by number of the input."""
        sees = np.zeros(len(new), np.int64)
        visible = [_visible(tree, int(new[number])) for number, tree in trees.items()]
        for number, seen in zip(trees, visible, strict=True):
            sees[number] = seen.ctypes.data
        columns = np.stack((np.cumsum(new) - new, new, cached, capacity)).astype(np.int64)
        return cls(
            int(new.sum()),
            columns,
            np.ascontiguousarray(rows, np.int64),
            sees,
            visible,
            int((new + cached).max()),
            scale,
        )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As :data:`~wispprof.engines.torch.kv_store.Attend`, for the tokens of these inputs.

        Raises :class:`MemoryError`.
        """
        tokens, heads, dim = q.shape
        q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
        out = q.new_empty((tokens, heads * dim))
        packed: list[Any] = []
        for x in (q, k, v):
            packed += (x.data_ptr(), _Strides(x.stride(0), x.stride(1)))
        failed = kernel()(
            *packed,
            out.data_ptr(),
            heads,
            k.shape[1],
            dim,
            self.scale,
            len(self.sees),
            *(column.ctypes.data for column in self.columns),
            self.rows[2 * layer].ctypes.data,
            self.rows[2 * layer + 1].ctypes.data,
            self.sees.ctypes.data,
            self.longest,
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"No memory for the scores of {self.longest} tokens.")
        return out


def _visible(tree: DraftTree, new: int) -> np.ndarray:
    """(new, new) bytes: which of an input's new tokens each of them sees; the last ones are the nodes."""
    seen = np.tri(new, dtype=np.uint8)
    root = new - len(tree.parents)
    nodes, others = tree.hidden()
    seen[root + np.asarray(nodes), root + np.asarray(others)] = 0
    return seen
