"""A GGUF draft model through llama.cpp.

Features and tokens are computed from the raw logits in numpy, as for torch drafts on a CPU.
"""

from __future__ import annotations

import numpy as np

from wispprof.drafters.gguf_model import GgufModel, GgufSequence
from wispprof.drafters.model_drafter import ModelDrafter
from wispprof.errors import EngineError
from wispprof.types import DraftToken, ModelInfo


class LlamaCppDrafter(ModelDrafter):
    """One sequence of a :class:`GgufModel`; drafters of the same model share its weights.

    ``hidden``: ids that are never proposed, because the target has no such token (see
    :mod:`~wispprof.drafters.vocabulary`). Raises :class:`ModelUnsupported` as :class:`GgufSequence` does.
    """

    def __init__(self, model: GgufModel, hidden: np.ndarray | None = None) -> None:
        super().__init__(model.max_context)
        self.model = model
        self.vocab_size = model.vocab_size
        self.info: ModelInfo = model.info
        self._hidden = hidden
        self._sequence = GgufSequence(model)
        self._cached = 0

    def draft(self) -> DraftToken:
        """Propose the next token and append it: one call over all tokens without KV."""
        self._check(len(self._tokens) + 1)
        return self._propose(self.forward(), self._hidden)

    def prefill(self) -> None:
        if self._cached < len(self._tokens) - 1:
            self._read(len(self._tokens) - 1)

    def forward(self) -> np.ndarray:
        """One step without features and sampling: the logits (V,) float32, valid until the next one."""
        self._cached = min(self._cached, len(self._tokens) - 1)
        self._read(len(self._tokens))
        return self._sequence.logits()

    def close(self) -> None:
        """Free the KV cache."""
        self._sequence.close()

    def _read(self, length: int) -> None:
        """Compute the KV of the first ``length`` tokens, as far as it is missing."""
        self._cached = self._sequence.keep(self._cached)
        try:
            self._sequence.decode(self._tokens[self._cached : length], self._cached)
        except EngineError:
            self._cached = 0  # how far it got is unknown
            raise
        self._cached = length
