"""The draft side of a trace: what a drafter proposes at every position of a known text.

A torch draft answers for all positions at once (:mod:`~wispprof.profiling.draft_rollout`). Every other
drafter is asked position by position. Where its proposal is the text's next token, its later proposals
are also those of the next position, so each accepted token saves a whole row.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from wispprof.backends import Drafter
from wispprof.profiling.profile_run import load_pair_model
from wispprof.settings.profiler_settings import TraceSettings
from wispprof.types import DraftFeatures, DraftToken, Sampling

if TYPE_CHECKING:
    from wispprof.engines.loading import LoadedModel

_NO_PROPOSAL = DraftToken(-1, DraftFeatures(0.0, 0.0, 0.0, 0.0))


class TracedDrafter(Protocol):
    """A drafter that a trace is taken of. ``tokenizer``: the one whose ids it proposes."""

    id: str
    tokenizer: Any
    tokenizer_hash: str
    weights_hash: str
    vocab_size: int

    def drafter(self) -> Drafter:
        """The drafter, to be timed."""

    def run(
        self, tokens: Sequence[int], first: int, depth: int, sampling: Sampling
    ) -> tuple[np.ndarray, np.ndarray]:
        """Drafts (m, depth) int32 and features (m, depth, 4) float32 for ``m = len(tokens) - first``.

        Row ``i`` continues ``tokens[: first + i]``.
        """

    def candidates(
        self, tokens: Sequence[int], first: int, sampling: Sampling, width: int
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Candidates (m, width) by the noise of each position, and their probabilities, if known."""


class _TorchTraced:
    def __init__(self, loaded: LoadedModel) -> None:
        from wispprof.profiling.draft_rollout import DraftRollout

        info = loaded.info
        self.id, self.vocab_size, self.tokenizer = info.id, info.vocab_size, loaded.tokenizer
        self.tokenizer_hash, self.weights_hash = info.tokenizer_hash, info.weights_hash
        rollout = DraftRollout(loaded)
        self.run, self.candidates = rollout.run, rollout.candidates
        self._loaded = loaded

    def drafter(self) -> Drafter:
        from wispprof.drafters.torch_drafter import TorchDrafter

        return TorchDrafter(self._loaded)


class SequentialTraced:
    """Any :class:`~wispprof.backends.Drafter`, one position after the other.

    Where it has nothing to propose, the row goes on with token -1, which no target accepts.
    """

    def __init__(self, drafter: Drafter, name: str, tokenizer: Any, tokenizer_hash: str) -> None:
        self._drafter = drafter
        self.id, self.tokenizer, self.tokenizer_hash = name, tokenizer, tokenizer_hash
        self.weights_hash = ""
        self.vocab_size = len(tokenizer.get_vocab()) if tokenizer is not None else 0

    def drafter(self) -> Drafter:
        return self._drafter

    def candidates(
        self, tokens: Sequence[int], first: int, sampling: Sampling, width: int
    ) -> tuple[np.ndarray, np.ndarray] | None:
        return None  # a drafter names one token at a time

    def run(
        self, tokens: Sequence[int], first: int, depth: int, sampling: Sampling
    ) -> tuple[np.ndarray, np.ndarray]:
        rows, drafter = len(tokens) - first, self._drafter
        drafts = np.full((rows, depth), -1, dtype=np.int32)
        features = np.zeros((rows, depth, 4), dtype=np.float32)
        drafter.open(tokens[:first], sampling)
        drafter.prefill()
        known: list[DraftToken] = []
        for row in range(rows):
            while len(known) < depth and (not known or known[-1].token >= 0):
                known.append(drafter.draft() if drafter.can_draft else _NO_PROPOSAL)
            for place, (token, values) in enumerate(known):
                drafts[row, place], features[row, place] = token, values
            truth = tokens[first + row]
            if known[0].token == truth:
                del known[0]
            else:
                known = []
                drafter.rollback(first + row)
                drafter.extend([truth])
        return drafts, features


def as_traced(draft: LoadedModel | TracedDrafter) -> TracedDrafter:
    """A loaded torch model, or what can be traced already."""
    from wispprof.engines.loading import LoadedModel

    if not isinstance(draft, LoadedModel):
        return draft
    if draft.servable:
        return _TorchTraced(draft)
    from wispprof.drafters.torch_drafter import AnyFamilyDrafter

    info = draft.info
    return SequentialTraced(AnyFamilyDrafter(draft), info.id, draft.tokenizer, info.tokenizer_hash)


def load_traced_draft(settings: TraceSettings, tokenizer: Any = None) -> TracedDrafter:
    """The draft that the settings name. ``tokenizer``: the target's, if the target is loaded here.

    Raises the errors of loading; :class:`ModelError` if there is no tokenizer for a ``.gguf`` draft.
    """
    from wispprof.drafters import draft_folder, is_llama, load_llama, make_drafter, needs_model

    llama = is_llama(settings.draft)
    if not llama and settings.drafter == "model":
        return as_traced(load_pair_model(settings.draft, "draft", settings.dtype, settings.device))
    from wispprof.engines.tokenizers import load_tokenizer, tokenizer_hash

    if tokenizer is None or settings.tokenizer:
        where = settings.tokenizer or settings.target
        where = where or (draft_folder(settings.draft) if llama else settings.draft)
        tokenizer = load_tokenizer(where)
    model: Any = None
    if needs_model(settings.drafter):
        if llama:
            model = load_llama(settings.draft, settings.llama, settings.device, tokenizer)
        else:
            model = load_pair_model(settings.draft, "draft", settings.dtype, settings.device)
    drafter = make_drafter(settings.drafter, model)
    name = Path(settings.draft).name if needs_model(settings.drafter) else settings.drafter
    if settings.drafter == "both":
        name = f"lookup + {name}"
    return SequentialTraced(drafter, name, tokenizer, tokenizer_hash(tokenizer))
