"""Labelled draft tokens from acceptance traces, split by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wispprof.artifacts.rows import TracePath
from wispprof.errors import FitError
from wispprof.fitting.batch_totals import FloatArray

MINIMUM_PROMPTS = 4
MINIMUM_REJECTIONS = 20


@dataclass(frozen=True)
class TokenRows:
    """Draft tokens up to and including the first rejected one of each proposal.

    ``features`` (n, 4) as :class:`~wispprof.types.DraftFeatures`; ``depth`` (n,) counted from 0;
    ``accepted`` (n,) bool: all tokens before it were accepted, was it too? ``prompt`` (n,) its path.
    """

    features: FloatArray
    depth: np.ndarray
    accepted: np.ndarray
    prompt: np.ndarray

    def __len__(self) -> int:
        return len(self.depth)

    def take(self, mask: np.ndarray) -> TokenRows:
        """The rows under a mask."""
        return TokenRows(
            self.features[mask], self.depth[mask], self.accepted[mask], self.prompt[mask]
        )

    def joined(self, other: TokenRows) -> TokenRows:
        """Rows of two disjoint sets of paths, their prompts numbered on."""
        first = int(self.prompt.max()) + 1
        return TokenRows(
            np.concatenate([self.features, other.features]),
            np.concatenate([self.depth, other.depth]),
            np.concatenate([self.accepted, other.accepted]),
            np.concatenate([self.prompt, other.prompt + first]),
        )


def token_rows(paths: Sequence[TracePath]) -> TokenRows:
    """Label every draft token whose predecessors in the proposal were all accepted.

    Proposals that run past the end of their path are left out: their outcome is unknown.
    Raises :class:`FitError` for features that are not finite.
    """
    features, depths, labels, prompts = [], [], [], []
    for number, path in enumerate(paths):
        rows, width = path.scored_rows(), path.depth
        if rows == 0:
            continue
        lengths = np.asarray(path.accepted[:rows])[:, None]
        depth = np.broadcast_to(np.arange(width), (rows, width))
        reached = depth <= lengths
        features.append(np.asarray(path.features[:rows], dtype=np.float64)[reached])
        depths.append(depth[reached])
        labels.append((depth < lengths)[reached])
        prompts.append(np.full(int(reached.sum()), number))
    if not features:
        raise FitError(
            "The acceptance trace has no proposal whose outcome is known.",
            "Take a trace with paths longer than its draft depth.",
        )
    table = np.concatenate(features)
    if not np.isfinite(table).all():
        raise FitError("The acceptance trace has features that are not finite.", "Take it anew.")
    return TokenRows(table, np.concatenate(depths), np.concatenate(labels), np.concatenate(prompts))


def split_prompts(
    paths: Sequence[TracePath], shares: Sequence[float] = (0.6, 0.2, 0.2), seed: int = 0
) -> list[list[TracePath]]:
    """Divide paths by prompt into parts of about these shares; equal prompts stay together."""
    by_prompt: dict[tuple[int, ...], list[TracePath]] = {}
    for path in paths:
        by_prompt.setdefault(path.prompt, []).append(path)
    if len(by_prompt) < MINIMUM_PROMPTS:
        raise FitError(
            f"{len(by_prompt)} distinct prompts are too few to hold some out; "
            f"{MINIMUM_PROMPTS} are needed.",
            "Take a trace over more prompts.",
        )
    groups = list(by_prompt.values())
    order = np.random.default_rng(seed).permutation(len(groups))
    cuts = np.round(np.cumsum(shares) / sum(shares) * len(groups)).astype(int)
    parts: list[list[TracePath]] = []
    start = 0
    for index, cut in enumerate(cuts):
        # Every part gets at least one prompt, however few there are.
        stop = max(int(cut), start + 1)
        stop = min(stop, len(groups) - (len(cuts) - 1 - index))
        parts.append([path for g in order[start:stop] for path in groups[g]])
        start = stop
    return parts


def check_classes(rows: TokenRows) -> None:
    """Refuse rows with too few rejected or too few accepted tokens."""
    rejected = int((~rows.accepted).sum())
    kept = len(rows) - rejected
    if min(rejected, kept) < MINIMUM_REJECTIONS:
        raise FitError(
            f"{rejected} rejected and {kept} accepted draft tokens are too few of one kind to learn "
            f"from; {MINIMUM_REJECTIONS} of each are needed.",
            "Take a longer trace.",
        )
    if bool((np.ptp(rows.features, axis=0) == 0).all()):
        raise FitError("No feature of the draft tokens varies.", "Take the trace anew.")
