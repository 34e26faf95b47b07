"""Draft trees within a step: positions, who sees whom, and the path that the target accepts.

The nodes of a tree follow the input's other tokens in the KV cache, in the order given. A node's position
is that of the last committed token plus its depth, so siblings share a position, and its noise. A node
attends to everything before the tree and to its own ancestors. SpecInfer's tree attention (arXiv 2305.09781)
with a bit for each ancestor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from wispprof.errors import InputRefused
from wispprof.token_tree import MAX_NODES  # A node's ancestors fit into one integer.
from wispprof.types import StepInput


class DraftTree(NamedTuple):
    """A tree of n nodes. ``depths`` (n,): 1 for the children of the root. ``ancestors`` (n,) int64: bit j
    of node i is set if node j is i itself or an ancestor of i."""

    parents: tuple[int, ...]
    depths: np.ndarray
    ancestors: np.ndarray

    @classmethod
    def of(cls, parents: Sequence[int]) -> DraftTree:
        """``parents[i]`` < i: the node that node i follows, -1 for the root."""
        depths: list[int] = []
        ancestors: list[int] = []
        for node, parent in enumerate(parents):
            depths.append(1 + (depths[parent] if parent >= 0 else 0))
            ancestors.append(1 << node | (ancestors[parent] if parent >= 0 else 0))
        bits = np.array(ancestors, dtype=np.uint64).view(np.int64)
        return cls(tuple(parents), np.array(depths, dtype=np.int64), bits)

    def hidden(self) -> tuple[np.ndarray, np.ndarray]:
        """Pairs (i, j), j < i: node i does not see node j, although j stands before it in the cache."""
        nodes = np.arange(len(self.parents))
        unrelated = self.ancestors[:, None] >> nodes & 1 == 0
        seers, others = np.nonzero(unrelated & (nodes < nodes[:, None]))
        return seers, others

    def accepted_path(self, tokens: Sequence[int], chosen: Sequence[int]) -> list[int]:
        """Nodes that the target agrees with, from a child of the root downwards.

        ``tokens`` (n,): the drafts. ``chosen`` (n + 1,): the target's token after the root, then after each
        node. Of equal siblings the first is taken.
        """
        child: dict[tuple[int, int], int] = {}
        for node, step in enumerate(zip(self.parents, tokens, strict=True)):
            child.setdefault(step, node)
        path: list[int] = []
        node = -1
        while (following := child.get((node, chosen[node + 1]))) is not None:
            path.append(node := following)
        return path


def draft_trees(inputs: Sequence[StepInput]) -> dict[int, DraftTree]:
    """The trees of a step by the number of their input; a tree without branches is left out as a chain.

    Raises :class:`InputRefused` for parents that do not describe a tree of the input's drafts.
    """
    trees = {}
    for number, one in enumerate(inputs):
        if not len(one.parents):
            continue
        parents = [int(parent) for parent in one.parents]
        if len(parents) != one.drafts or len(parents) > MAX_NODES:
            raise InputRefused(
                one.session,
                f"Session {one.session!r}: {len(parents)} parents for {one.drafts} drafts; a tree needs one "
                f"for each of at most {MAX_NODES}.",
            )
        if not all(-1 <= parent < node for node, parent in enumerate(parents)):
            raise InputRefused(
                one.session,
                f"Session {one.session!r}: the parent of a draft must be -1 or the number of an earlier "
                f"draft, got {parents}.",
            )
        if parents != list(range(-1, len(parents) - 1)):
            trees[number] = DraftTree.of(parents)
    return trees


Trees = Mapping[int, DraftTree]
"""The trees of a step, by the number of their input."""

NO_TREES: Trees = {}
