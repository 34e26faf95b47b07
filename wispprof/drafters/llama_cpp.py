"""A GGUF draft model through llama-cpp-python (the ``llamacpp`` extra).

Features and tokens are computed from the raw logits in numpy, as for torch drafts on a CPU.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wispprof.drafters.model_drafter import ModelDrafter
from wispprof.errors import EngineError, ModelError, ModelMissing
from wispprof.types import DraftToken, ModelInfo


class LlamaCppDrafter(ModelDrafter):
    """A llama.cpp model.

    ``max_context``: tokens of its KV cache. ``threads``: llama.cpp's choice by default. ``gpu_layers``:
    layers on the GPU, -1 for all; ignored by a build without GPU support. Raises :class:`ModelMissing`
    without the file, :class:`ModelError` without the extra or if llama.cpp cannot load the file.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_context: int = 4096,
        threads: int | None = None,
        gpu_layers: int = -1,
    ) -> None:
        if not path.is_file():
            raise ModelMissing(f"There is no model file {path}.", "Give a .gguf file.")
        try:
            import llama_cpp
        except ImportError:
            raise ModelError(
                f"{path.name} needs llama-cpp-python.",
                "Install it with: pip install 'wispprof[llamacpp]'.",
            ) from None
        try:
            self._llm: Any = llama_cpp.Llama(
                model_path=str(path),
                n_ctx=max_context,
                n_threads=threads,
                n_gpu_layers=gpu_layers,
                logits_all=False,
                verbose=False,
            )
        except (ValueError, RuntimeError, OSError) as err:
            raise ModelError(f"llama.cpp cannot load {path}: {err}.", "Download it again.") from err
        self._lib = llama_cpp
        super().__init__(int(self._llm.n_ctx()))
        self.vocab_size = int(self._llm.n_vocab())
        self.info = ModelInfo(
            id=path.name,
            dtype="gguf",
            parameters=int(llama_cpp.llama_model_n_params(self._llm.model)),
            family=str(self._llm.metadata.get("general.architecture", "")),
            config_hash=_hash(self._llm.metadata),
            max_context=self.max_context,
            vocab_size=self.vocab_size,
        )

    # llama-cpp-python counts the tokens with KV itself; ``eval`` overwrites what lies beyond.
    @property
    def _cached(self) -> int:
        return int(self._llm.n_tokens)

    @_cached.setter
    def _cached(self, tokens: int) -> None:
        self._llm.n_tokens = tokens

    def draft(self) -> DraftToken:
        """Propose the next token and append it: one call over all tokens without KV."""
        self._check(len(self._tokens) + 1)
        return self._propose(self.forward())

    def prefill(self) -> None:
        if unread := self._tokens[self._cached : -1]:
            self._eval(unread)

    def forward(self) -> np.ndarray:
        """One step without features and sampling: a copy of the logits (V,) float32."""
        self._cached = min(self._cached, len(self._tokens) - 1)
        self._eval(self._tokens[self._cached :])
        pointer = self._lib.llama_get_logits_ith(self._llm.ctx, -1)
        return np.array(np.ctypeslib.as_array(pointer, shape=(self.vocab_size,)), dtype=np.float32)

    def _eval(self, tokens: Sequence[int]) -> None:
        try:
            self._llm.eval(tokens)
        except RuntimeError as err:
            raise EngineError(f"llama.cpp failed: {err}.", "Lower the context.") from err


def _hash(metadata: dict[str, str]) -> str:
    """Hash of the file's metadata, which identify model and conversion; the tensors are left out."""
    text = json.dumps(metadata, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
