"""A step's feeds packed into one row of tokens, and which of their drafts the target's choices accept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from wispprof.types import StepInput

__all__ = ["VerifyBatch"]


class VerifyBatch(NamedTuple):
    """Feeds packed item after item, in the store's ``order`` (n,).

    ``ids`` and ``positions`` (tokens,): of every packed token. ``picked`` (rows,): places of the tokens
    after which the target's own token is decided: of an emitting item its last drafts + 1. ``starts`` and
    ``ends`` (n,): where each packed item's rows begin and end among those.
    """

    order: np.ndarray
    ids: np.ndarray
    positions: np.ndarray
    picked: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(
        cls,
        feeds: Sequence[StepInput],
        cached: np.ndarray,
        new: np.ndarray,
        rows: np.ndarray,
        order: np.ndarray,
    ) -> VerifyBatch:
        """``cached``, ``new`` and ``rows`` (n,): tokens held, fed and emitting (drafts + 1, or 0) by feed."""
        new, rows = new[order], rows[order]
        ids = np.concatenate([np.asarray(feeds[i].tokens, dtype=np.int64) for i in order.tolist()])
        token_ends, row_ends = np.cumsum(new), np.cumsum(rows)
        positions = np.arange(len(ids)) + np.repeat(cached[order] - (token_ends - new), new)
        picked = np.arange(int(row_ends[-1])) + np.repeat(token_ends - row_ends, rows)
        return cls(order, ids, positions, picked, row_ends - rows, row_ends)

    def first(self) -> np.ndarray:
        """Where each feed's rows begin (n,), in the order of feeds."""
        first = np.empty(len(self.order), dtype=np.int64)
        first[self.order] = self.starts
        return first

    def accepted(self, chosen: np.ndarray) -> np.ndarray:
        """Leading drafts of each feed (n,), in the order of feeds, that equal the target's choices (rows,).

        Row r of an item chooses what should follow packed token ``picked[r]``; the draft that does follow
        is the next packed token. The last row has no draft to agree with: there every count ends.
        """
        accepted = np.zeros(len(self.order), dtype=np.int64)
        if not len(chosen):
            return accepted
        emitting = np.flatnonzero(self.ends > self.starts)
        starts, ends = self.starts[emitting], self.ends[emitting]
        differs = chosen != self.ids[np.minimum(self.picked + 1, len(self.ids) - 1)]
        differs[ends - 1] = True
        index = np.where(differs, np.arange(len(chosen)), len(chosen))
        accepted[self.order[emitting]] = np.minimum.reduceat(index, starts) - starts
        return accepted
