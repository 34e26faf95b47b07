"""What a step decided: the target's tokens, their log-probabilities, and inputs without finite values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from wispprof.engines.torch.verify_batch import StepSizes, VerifyBatch
from wispprof.errors import InputRefused
from wispprof.sampling.sampler import token_logprobs
from wispprof.types import Sampling, StepInput, TokenLogprob


class Spoiled(NamedTuple):
    """Tokens ``start:stop`` of a session, counted as input ``number`` of the step, are not to be kept.

    ``refused``: the input needs a token there, or caches them.
    """

    number: int
    start: int
    stop: int
    refused: bool


def without_spoiled_drafts(inputs: Sequence[StepInput], spoiled: Sequence[Spoiled]) -> list[StepInput]:
    """The inputs to repeat a step with, none if nothing was refused.

    Masked attention to a draft that is not finite spoils the tokens before it too, so a refused input is
    tried again without its drafts. Raises :class:`InputRefused` for one that has none.
    """
    again = list(inputs)
    for number in [one.number for one in spoiled if one.refused]:
        name, tokens, drafts, *_ = inputs[number]
        if not drafts:
            raise InputRefused(
                name,
                f"The target's logits of session {name!r} are not finite.",
                "Check the target's weights, or serve it with another --dtype.",
            )
        again[number] = StepInput(name, tokens[: len(tokens) - drafts])
    return again if any(one.refused for one in spoiled) else []


class StepDecision(NamedTuple):
    """``logits`` (rows, V) and the target's tokens ``chosen`` (rows,), negative where they are not finite.

    ``accepted`` and ``first``: accepted drafts and first row of each input. ``paths``: accepted nodes of
    each tree, by number of its input.
    """

    logits: Tensor
    chosen: np.ndarray
    accepted: list[int]
    first: list[int]
    paths: dict[int, list[int]]

    @classmethod
    def of(cls, batch: VerifyBatch, logits: Tensor, chosen: np.ndarray) -> StepDecision:
        accepted, first = batch.accepted(chosen).tolist(), batch.first_rows().tolist()
        paths = {}
        for i, tree in batch.trees.items():
            tokens = batch.ids[batch.drafts(i)].tolist()
            after = chosen[first[i] : first[i] + len(tokens) + 1].tolist()
            paths[i] = tree.accepted_path(tokens, after)
            accepted[i] = len(paths[i])
        return cls(logits, chosen, accepted, first, paths)

    def rows(self, number: int) -> Sequence[int]:
        """Rows of the tokens that were decided for an input that needs logits."""
        first = self.first[number]
        if (path := self.paths.get(number)) is not None:
            return [first, *(first + 1 + node for node in path)]
        return range(first, first + self.accepted[number] + 1)

    def spoiled(self, batch: VerifyBatch, sizes: StepSizes, hidden: Tensor) -> list[Spoiled]:
        """Inputs with values that are not finite.

        An input that needs no logits must have a finite last hidden state, which depends on all before it.
        So what is cached is always finite.
        """
        found = []
        if not sizes.logit_rows.all():
            numbers = np.flatnonzero(sizes.logit_rows == 0)
            last = hidden.new_tensor(batch.last_tokens(numbers, sizes)).long()
            largest = hidden.index_select(0, last).abs().amax(-1).float().cpu().numpy()
            for i in numbers[~np.isfinite(largest)].tolist():
                start = int(sizes.cached[i])
                found.append(Spoiled(i, start, start + int(sizes.new[i]), True))
        if len(self.chosen) and self.chosen.min() < 0:
            for i in np.flatnonzero(sizes.logit_rows).tolist():
                count = int(sizes.logit_rows[i])
                rows = self.chosen[self.first[i] : self.first[i] + count]
                if rows.min() < 0:
                    start, stop = int(sizes.cached[i]), int(sizes.cached[i] + sizes.new[i])
                    refused = bool(self.chosen[self.rows(i)].min() < 0)
                    if not refused:  # of a wrong draft or behind it, which is dropped anyway
                        start = stop - count + 1 + self.accepted[i]
                    found.append(Spoiled(i, start, stop, refused))
        return found

    def logprobs(
        self, samplings: Sequence[Sampling], logit_rows: np.ndarray
    ) -> dict[int, tuple[TokenLogprob, ...]]:
        """Log-probabilities of what each input decided, for those whose sampling asks."""
        asked = {
            i: self.rows(i)
            for i, sampling in enumerate(samplings)
            if sampling.logprobs is not None and logit_rows[i]
        }
        if not asked:
            return {}
        rows = [row for places in asked.values() for row in places]
        counts = [samplings[i].logprobs or 0 for i, places in asked.items() for _ in places]
        found = iter(token_logprobs(self.logits[rows], self.chosen[rows].tolist(), counts))
        return {i: tuple(next(found) for _ in places) for i, places in asked.items()}
