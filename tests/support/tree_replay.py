"""Rounds of draft trees along recorded or drawn outputs, without times: what a shape is expected to have
accepted, and what is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from wispprof.policies.interface import TreeShape
from wispprof.sessions.edge_tree import EdgeTree
from wispprof.sessions.tree_growth import round_nodes
from wispprof.simulation.simulated_output import SimulatedOutput
from wispprof.token_tree import ROOT


class ReplayedRounds(NamedTuple):
    """Means over ``rounds``: drafts ``expected`` to be accepted and ``accepted``, nodes sent and forwards."""

    rounds: int
    expected: float
    accepted: float
    nodes: float
    forwards: float


def replayed_rounds(outputs: Iterable[SimulatedOutput], shape: TreeShape) -> ReplayedRounds:
    """Rounds of trees grown best-first, one after the other to the end of each output.

    A round of ``a`` accepted drafts moves on by ``a + 1`` tokens. Raises ``ValueError`` for outputs that do
    not know the draft's candidates.
    """
    rounds = accepted = nodes = forwards = 0
    expected = 0.0
    for output in outputs:
        if not output.candidates:
            raise ValueError("The outputs do not know the draft's candidates.")
        place, last = 0, len(output.path) - 1
        while place < last:
            edge, at = EdgeTree(), output.prompt_tokens + place
            while wanted := edge.next_nodes(shape):
                found = output.expand(edge.tree, wanted, len(output.candidates[0]), at)
                edge.grow(list(zip(wanted, found, strict=True)), shape)
                forwards += 1
            sent = set(round_nodes(edge.tree, shape))
            node: int | None = ROOT
            taken = 0
            while place + taken < last:
                node = edge.tree.child(ROOT if node is None else node, output.path[place + taken])
                if node not in sent:
                    break
                taken += 1
            rounds, accepted, nodes = rounds + 1, accepted + taken, nodes + len(sent)
            expected += sum(edge.tree.cum_acceptance[one] for one in sent)
            place += taken + 1
    count = max(1, rounds)
    return ReplayedRounds(rounds, expected / count, accepted / count, nodes / count, forwards / count)
