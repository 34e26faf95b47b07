"""The inputs of one step: their sizes, their tokens packed into one row, and which drafts are accepted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from wispprof.engines.torch.draft_tree import NO_TREES, Trees
from wispprof.errors import InputRefused
from wispprof.types import BatchShape, StepInput, VerifyItem


def token_arrays(inputs: Sequence[StepInput], vocab_size: int) -> list[np.ndarray]:
    """The tokens of each input as int64. Raises :class:`InputRefused` for one outside the vocabulary."""
    arrays = []
    for one in inputs:
        try:
            arrays.append(np.asarray(one.tokens))
        except ValueError:  # nested
            arrays.append(np.empty(0))
    if all(array.dtype.kind == "i" for array in arrays):
        together = np.concatenate(arrays)
        if together.min() >= 0 and together.max() < vocab_size:
            return arrays
    for one in inputs:
        if not all(isinstance(t, int | np.integer) and 0 <= t < vocab_size for t in one.tokens):
            raise InputRefused(
                one.session,
                f"Session {one.session!r}: a token id lies outside the vocabulary of {vocab_size}.",
                "Tokenize with the target's tokenizer.",
            )
    return [np.array([int(t) for t in one.tokens], dtype=np.int64) for one in inputs]


class StepSizes(NamedTuple):
    """Three arrays (n,) over a step's inputs: tokens cached before it, tokens it adds, rows of logits."""

    cached: np.ndarray
    new: np.ndarray
    logit_rows: np.ndarray

    @classmethod
    def of(cls, inputs: Sequence[StepInput], cached: Sequence[int], max_context: int) -> StepSizes:
        """Raises :class:`InputRefused` for an invalid input."""
        if len({one.session for one in inputs}) != len(inputs):
            names = [one.session for one in inputs]
            twice = next(name for name in names if names.count(name) > 1)
            raise InputRefused(twice, f"Session {twice!r} takes part in a step more than once.")
        for one, held in zip(inputs, cached, strict=True):
            new = len(one.tokens)
            if not new or not 0 <= one.drafts < new:
                raise InputRefused(
                    one.session,
                    f"Session {one.session!r}: {new} tokens with {one.drafts} drafts; an input needs at "
                    "least one token that is not a draft.",
                )
            if one.drafts and not one.needs_logits:
                raise InputRefused(
                    one.session, f"Session {one.session!r}: an input with drafts needs logits."
                )
            if held + new > max_context:
                raise InputRefused(
                    one.session,
                    f"Session {one.session!r} would cache {held + new} tokens; the context ends at "
                    f"{max_context}.",
                    "Feed fewer drafts, or finish the session.",
                )
        count = len(inputs)
        return cls(
            np.fromiter(cached, np.int64, count),
            np.fromiter((len(one.tokens) for one in inputs), np.int64, count),
            np.fromiter((one.drafts + 1 if one.needs_logits else 0 for one in inputs), np.int64, count),
        )

    def shape(self) -> BatchShape:
        columns = zip(self.new.tolist(), self.cached.tolist(), self.logit_rows.tolist(), strict=True)
        return BatchShape(tuple(VerifyItem(new, cached, not rows) for new, cached, rows in columns))


class VerifyBatch(NamedTuple):
    """Inputs packed one after another in ``order`` (n,).

    ``ids`` and ``positions`` (tokens,): of every packed token; nodes of a tree stand at their depth.
    ``logit_tokens`` (rows,): packed tokens whose logits are needed, the last drafts + 1 of an input.
    ``starts`` and ``ends`` (n,): first and last + 1 row of each packed input. ``trees``: by number of their
    input.
    """

    order: np.ndarray
    ids: np.ndarray
    positions: np.ndarray
    logit_tokens: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    trees: Trees

    @classmethod
    def pack(
        cls, tokens: Sequence[np.ndarray], sizes: StepSizes, order: np.ndarray, trees: Trees = NO_TREES
    ) -> VerifyBatch:
        new, rows = sizes.new[order], sizes.logit_rows[order]
        ids = np.concatenate([tokens[i] for i in order.tolist()])
        token_ends, row_ends = np.cumsum(new), np.cumsum(rows)
        positions = np.arange(len(ids)) + np.repeat(sizes.cached[order] - (token_ends - new), new)
        logit_tokens = np.arange(int(row_ends[-1])) + np.repeat(token_ends - row_ends, rows)
        packed = cls(order, ids, positions, logit_tokens, row_ends - rows, row_ends, trees)
        for number, tree in trees.items():
            nodes = packed.drafts(number)
            positions[nodes] = positions[nodes.start - 1] + tree.depths
        return packed

    def first_rows(self) -> np.ndarray:
        """First row of each input (n,), in the order of the inputs."""
        first = np.empty(len(self.order), dtype=np.int64)
        first[self.order] = self.starts
        return first

    def drafts(self, number: int) -> slice:
        """Packed places of the drafts of an input that needs logits."""
        place = int(np.flatnonzero(self.order == number)[0])
        return slice(*(self.logit_tokens[[self.starts[place], self.ends[place] - 1]] + 1).tolist())

    def last_tokens(self, inputs: np.ndarray, sizes: StepSizes) -> np.ndarray:
        """Packed place of the last token of each of these input numbers."""
        ends = np.empty(len(self.order), dtype=np.int64)
        ends[self.order] = np.cumsum(sizes.new[self.order])
        return np.asarray(ends[inputs] - 1)

    def accepted(self, chosen: np.ndarray) -> np.ndarray:
        """Number of leading drafts of each chain (n,) that equal the target's tokens ``chosen`` (rows,).

        Row r holds the target's token after packed token ``logit_tokens[r]``; the draft in question is the
        packed token behind that one. The last row of an input has no draft: every count ends there.
        """
        accepted = np.zeros(len(self.order), dtype=np.int64)
        if not len(chosen):
            return accepted
        with_rows = np.flatnonzero(self.ends > self.starts)
        starts, ends = self.starts[with_rows], self.ends[with_rows]
        differs = chosen != self.ids[np.minimum(self.logit_tokens + 1, len(self.ids) - 1)]
        differs[ends - 1] = True
        index = np.where(differs, np.arange(len(chosen)), len(chosen))
        accepted[self.order[with_rows]] = np.minimum.reduceat(index, starts) - starts
        return accepted
