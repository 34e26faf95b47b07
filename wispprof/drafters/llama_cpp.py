"""A GGUF draft through llama-cpp-python (the ``llamacpp`` extra): what most edge devices really run.

Features and draws are taken from the raw logits in numpy, exactly as for torch drafts, so a draft costs
here what it costs in split serving and agrees with the target as often as it would there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wispprof.artifacts import ModelRecord
from wispprof.errors import EngineError, ModelError, ModelMissing
from wispprof.types import Drafter, DraftToken, Sampling

__all__ = ["LlamaCppDrafter"]


class LlamaCppDrafter(Drafter):
    """A llama.cpp model as a :class:`~wispprof.types.Drafter`. Not thread-safe.

    ``max_context``: tokens of its KV cache. ``threads`` None leaves the choice to llama.cpp;
    ``gpu_layers`` -1 puts all of them on the GPU of a build that has one.

    Raises :class:`ModelMissing` without the file, :class:`ModelError` without the extra or where
    llama.cpp cannot load it.
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
            raise ModelMissing(f"There is no model file {path}.", "Name a .gguf file.")
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
            raise ModelError(f"llama.cpp cannot load {path}: {err}.", "Fetch it again.") from err
        self._lib = llama_cpp
        self.max_context = int(self._llm.n_ctx())
        self.vocabulary = int(self._llm.n_vocab())
        self.info = ModelRecord(
            id=path.name,
            dtype="gguf",
            parameters=int(llama_cpp.llama_model_n_params(self._llm.model)),
            family=str(self._llm.metadata.get("general.architecture", "")),
            config_hash=_hash(self._llm.metadata),
            max_context=self.max_context,
            vocab_size=self.vocabulary,
        )
        self._tokens: list[int] = []
        self._sampling = Sampling()

    @property
    def length(self) -> int:
        """Tokens held, committed and drafted."""
        return len(self._tokens)

    def open(self, tokens: Sequence[int], sampling: Sampling) -> None:
        """Start anew from committed tokens (at least one). KV of a shared prefix stays."""
        new = [int(t) for t in tokens]
        if not new:
            raise EngineError("A draft sequence begins with at least one token.")
        self._check(len(new))
        shared = 0
        for old, fresh in zip(self._tokens[: self._llm.n_tokens], new, strict=False):
            if old != fresh:
                break
            shared += 1
        self._tokens, self._sampling = new, sampling
        self._llm.n_tokens = shared

    def draft(self) -> DraftToken:
        """Propose the next token and append it: one call over all tokens without KV."""
        from wispprof.drafters.torch_drafter import features_numpy
        from wispprof.sampling.sampler import sample_tokens_numpy

        self._check(len(self._tokens) + 1)
        logits = self.forward()
        token = sample_tokens_numpy(logits, len(self._tokens), self._sampling)
        features = features_numpy(logits)
        self._tokens.append(token)
        return DraftToken(token, features)

    def rollback(self, length: int) -> None:
        """Keep the first ``length`` tokens (at least one)."""
        if not 1 <= length <= len(self._tokens):
            raise EngineError(f"Cannot roll {len(self._tokens)} draft tokens back to {length}.")
        del self._tokens[length:]
        # ``eval`` drops what the cache holds beyond ``n_tokens`` before it goes on.
        self._llm.n_tokens = min(self._llm.n_tokens, length)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append committed tokens; they are read together with the next draft."""
        self._check(len(self._tokens) + len(tokens))
        self._tokens.extend(int(t) for t in tokens)

    def prefill(self) -> None:
        """Read all tokens but the last now."""
        waiting = self._tokens[self._llm.n_tokens : -1]
        if waiting:
            self._eval(waiting)

    def forward(self) -> np.ndarray:
        """The bare step: logits (V,) float32 after the last token, copied; nothing appended."""
        self._llm.n_tokens = min(self._llm.n_tokens, len(self._tokens) - 1)
        self._eval(self._tokens[self._llm.n_tokens :])
        pointer = self._lib.llama_get_logits_ith(self._llm.ctx, -1)
        return np.array(np.ctypeslib.as_array(pointer, shape=(self.vocabulary,)), dtype=np.float32)

    def _eval(self, tokens: Sequence[int]) -> None:
        try:
            self._llm.eval(tokens)
        except RuntimeError as err:
            raise EngineError(f"llama.cpp failed: {err}.", "Lower the context.") from err

    def _check(self, length: int) -> None:
        if length > self.max_context:
            raise EngineError(
                f"A draft sequence of {length} tokens exceeds the draft's context of {self.max_context}.",
                "Stop drafting for this session, or give the draft a longer context.",
            )


def _hash(metadata: dict[str, str]) -> str:
    """Identity of what was converted and how: the file's own metadata, not its tensors."""
    text = json.dumps(metadata, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
