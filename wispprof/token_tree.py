"""A tree of draft tokens that continue one text. Pure.

A chain is a tree without branches. Siblings compete for one position: at most one of them is accepted, so
their acceptance probabilities add up to 1 at most. Nodes are numbered as they come, a parent before its
children. :data:`ROOT` stands for the text itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

ROOT = -1
MAX_NODES = 64
"""Most nodes that a step verifies of one session."""
HELD_NODES = 1024
"""Most nodes that an edge holds: those of a round, those that they displaced, and those drafted ahead."""


class TokenTree:
    """At most ``limit`` draft tokens. Read only, all by node: ``tokens``; ``parents``; ``acceptance_probs``,
    P(accepted | its parent was); ``cum_acceptance``, P(it and all its ancestors accepted); ``depths``, 1
    for the children of the root.
    """

    __slots__ = ("_child", "acceptance_probs", "cum_acceptance", "depths", "limit", "parents", "tokens")

    def __init__(self, limit: int = MAX_NODES) -> None:
        if not 0 <= limit <= HELD_NODES:
            raise ValueError(f"A tree holds at most {HELD_NODES} nodes, got a limit of {limit}.")
        self.limit = limit
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.acceptance_probs: list[float] = []
        self.cum_acceptance: list[float] = []
        self.depths: list[int] = []
        self._child: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def full(self) -> bool:
        return len(self.tokens) >= self.limit

    @property
    def is_chain(self) -> bool:
        """Whether no node has a sibling, and every node follows the one before it."""
        return all(parent == node - 1 for node, parent in enumerate(self.parents))

    def add(self, parent: int, token: int, acceptance_prob: float) -> int | None:
        """The child ``token`` of a node, a new one or the one that is there; ``None`` if the tree is full."""
        if not ROOT <= parent < len(self.tokens):
            raise ValueError(f"Node {parent} is not one of {len(self.tokens)}.")
        known = self._child.get((parent, token))
        if known is not None:
            return known
        node = len(self.tokens)
        if node >= self.limit:
            return None
        at_root = parent == ROOT
        prob = min(1.0, max(0.0, acceptance_prob))
        self._child[parent, token] = node
        self.tokens.append(token)
        self.parents.append(parent)
        self.acceptance_probs.append(prob)
        self.cum_acceptance.append(prob if at_root else prob * self.cum_acceptance[parent])
        self.depths.append(1 if at_root else 1 + self.depths[parent])
        return node

    def child(self, parent: int, token: int) -> int | None:
        """The child ``token`` of a node, if there is one."""
        return self._child.get((parent, token))

    def walk(self, tokens: Sequence[int], start: int = ROOT) -> list[int]:
        """The nodes that spell the beginning of ``tokens`` after ``start``, as far as there are any."""
        path: list[int] = []
        for token in tokens:
            child = self._child.get((start, token))
            if child is None:
                break
            path.append(start := child)
        return path

    def path(self, node: int) -> list[int]:
        """Nodes from a child of the root to ``node``, both included."""
        path: list[int] = []
        while node != ROOT:
            path.append(node)
            node = self.parents[node]
        return path[::-1]

    def spelled(self, node: int) -> list[int]:
        """Tokens from the root to ``node``."""
        return [self.tokens[one] for one in self.path(node)]

    def descendants(self, node: int) -> list[int]:
        """All nodes that follow ``node``, a parent before its children."""
        found, inside = [], {node}
        for child in range(node + 1, len(self.parents)):
            if self.parents[child] in inside:
                inside.add(child)
                found.append(child)
        return found

    def below(self, node: int) -> TokenTree:
        """The subtree that follows ``node``, as a tree of its own: its :meth:`descendants`, numbered from 0.
        ``acceptance_probs`` stay."""
        kept, moved = TokenTree(self.limit), {node: ROOT}
        for child in self.descendants(node):
            added = kept.add(moved[self.parents[child]], self.tokens[child], self.acceptance_probs[child])
            assert added is not None
            moved[child] = added
        return kept

    def shared(self, other: TokenTree) -> int:
        """Number of nodes that both trees spell."""
        place = {ROOT: ROOT}
        for node, step in enumerate(zip(other.parents, other.tokens, strict=True)):
            above = place.get(step[0])
            known = None if above is None else self._child.get((above, step[1]))
            if known is not None:
                place[node] = known
        return len(place) - 1

    def best_first(self) -> list[int]:
        """All nodes in falling order of cumulative acceptance, a parent before its children: any leading
        part is a tree, the one with the most expected accepted tokens for its size."""
        return sorted(range(len(self.tokens)), key=self.cum_acceptance.__getitem__, reverse=True)

    def part(self, nodes: Sequence[int]) -> tuple[list[int], list[int]]:
        """(tokens, parents) of some nodes that form a tree, each after its parent, renumbered from 0."""
        number = {ROOT: ROOT} | {node: index for index, node in enumerate(nodes)}
        return [self.tokens[node] for node in nodes], [number[self.parents[node]] for node in nodes]

    def children(self, parent: int) -> Iterator[int]:
        """Children of a node, in the order in which they came."""
        return (node for node, above in enumerate(self.parents) if above == parent)
