"""Simulated edges that draft trees: lossless, as the replay says, and chains where trees do not pay."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tree_replay import replayed_rounds

from wispprof.artifacts.rows import AcceptanceTrace, EdgeRow, TracePath
from wispprof.policies.controllers import ConfidenceAcceptance
from wispprof.policies.interface import TreeShape
from wispprof.policies.linear_cost import LinearCost
from wispprof.settings.edge_settings import BEST_GUESS, ENUMERATION, LIKELIEST, WAIT, OutcomeDrafting
from wispprof.settings.fleet_settings import SimulationSettings
from wispprof.settings.shared_settings import LinkModel
from wispprof.simulation.arrivals import ClosedFleet, Lengths
from wispprof.simulation.devices import DeviceProfile
from wispprof.simulation.event_loop import Simulation, simulate
from wispprof.simulation.metrics import Report
from wispprof.simulation.scenario import SYSTEMS, Scenario, ServerModel, System
from wispprof.simulation.scenario_inputs import scenarios_of
from wispprof.simulation.simulated_output import SimulatedOutput
from wispprof.simulation.synthetic_acceptance import SyntheticAcceptance
from wispprof.simulation.trace_replay import TraceAcceptance
from wispprof.types import Sampling, Slo

GPU = DeviceProfile("gpu", draft_ms=4.0, node_ms=0.02)
TREES = SYSTEMS["wispprof-trees"]
SHAPE = TreeShape(16, 4, 8, 8)
ROUNDS = TREES.replace(
    batching="fcfs",
    controller="specedge",
    controller_options=dict(zip(("nodes", "depth", "width", "beams"), SHAPE, strict=True)),
)


def rounds(ahead: OutcomeDrafting) -> System:
    return ROUNDS.replace(drafting=replace(ROUNDS.drafting, ahead=ahead))


def scenario(
    system: System, device: DeviceProfile = GPU, sessions: int = 2, rtt_ms: float = 20.0
) -> Scenario:
    return Scenario(
        system,
        ServerModel(LinearCost(fixed_ms=20.0, row_ms=0.05), spread=0.0),
        ClosedFleet(sessions, Lengths(50, 60), ramp_ms=100.0),
        SyntheticAcceptance(0.7),
        devices=((device, 1.0),),
        links=((LinkModel(rtt_ms), 1.0),),
        slos=((Slo(1.0), 1.0),),
        seconds=3.0,
        warmup_s=0.0,
    )


def run(system: System, device: DeviceProfile = GPU, **more: float) -> Report:
    return simulate(scenario(system, device, **more))  # type: ignore[arg-type]


@pytest.mark.parametrize("system", [TREES, ROUNDS, rounds(WAIT)])
def test_every_token_is_the_targets_own(system: System) -> None:
    simulation = Simulation(scenario(system))
    simulation.run()
    simulation.server.check_integrity()
    assert simulation.counters.accepted > 0
    ended = 0
    for record in simulation.records:
        ended += record.done
        if record.done:
            assert record.tokens == record.output_tokens
    assert ended >= 2
    for edge in simulation._live.values():
        assert list(edge.committed[50:]) == list(edge.output.path[: len(edge.committed) - 50])


def test_rounds_accept_what_the_replay_says() -> None:
    source = SyntheticAcceptance(0.7)
    outputs = [source.output((0, device, 0), 50, 60) for device in range(2)]
    replayed = replayed_rounds(outputs, SHAPE)
    system = rounds(WAIT)
    simulation = Simulation(replace(scenario(system), load=ClosedFleet(2, Lengths(50, 60), 1e9, 100.0)))
    simulation.run()
    # The first token comes from the prefill, so rounds begin one later.
    assert simulation.counters.rounds == pytest.approx(replayed.rounds, abs=3)
    assert replayed.nodes == 16
    assert replayed.forwards >= 4
    assert replayed.accepted == pytest.approx(replayed.expected, rel=0.25)


def test_a_tree_needs_a_rank_that_is_the_targets() -> None:
    """Control: if the target's token is no candidate, nothing is accepted."""
    output = SyntheticAcceptance(0.7).output((0, 0, 0), 50, 60)
    nowhere = replace(output, ranks=[99] * 60) if hasattr(output, "__dataclass_fields__") else output
    assert isinstance(nowhere, SimulatedOutput)
    assert replayed_rounds([nowhere], SHAPE).accepted == 0
    assert (
        replayed_rounds([output], SHAPE).accepted > replayed_rounds([output], TreeShape(4, 4, 1, 1)).accepted
    )
    with pytest.raises(ValueError, match="candidates"):
        replayed_rounds([replace(output, candidates=())], SHAPE)


def test_outputs_for_chains_are_what_they_were() -> None:
    output = SyntheticAcceptance(0.7).output((0, 0, 0), 50, 200)
    right = [proposal.token == token for proposal, token in zip(output.proposals, output.path, strict=True)]
    assert [rank == 0 for rank in output.ranks] == right


@pytest.mark.parametrize("device", [replace(GPU, node_ms=None), replace(GPU, node_ms=4.0)])
def test_devices_whose_nodes_are_dear_draft_chains(device: DeviceProfile) -> None:
    chains = TREES.replace(trees=False)
    assert run(TREES, device).throughput == run(chains, device).throughput


def test_trees_win_where_rows_are_cheap() -> None:
    assert run(TREES).throughput > 1.1 * run(SYSTEMS["wispprof"]).throughput


@pytest.mark.parametrize("rtt_ms", [5.0, 60.0])
def test_drafting_ahead_never_costs(rtt_ms: float) -> None:
    waits = run(rounds(WAIT), rtt_ms=rtt_ms).throughput
    for ahead in (BEST_GUESS, ENUMERATION, LIKELIEST):
        assert run(rounds(ahead), rtt_ms=rtt_ms).throughput >= 0.99 * waits
    likeliest = run(ROUNDS, rtt_ms=rtt_ms)
    assert likeliest.counters.proactive_hits > 0.4 * likeliest.counters.proactive
    if rtt_ms > 50.0:
        assert likeliest.throughput > 1.05 * waits


def trace_of(ranks: np.ndarray, probs: np.ndarray) -> AcceptanceTrace:
    count = len(ranks)
    path = TracePath(
        (1,),
        tuple(range(count)),
        np.zeros((count, 2), np.int32),
        np.ones((count, 2, 4), np.float32) * 0.5,
        np.zeros(count, np.int32),
        ranks,
        probs,
    )
    return AcceptanceTrace("t", "d", "", Sampling(1.0), (path,))


def test_candidates_of_a_trace_are_calibrated_by_rank() -> None:
    """The draft's own probabilities say little; the ranks' frequencies count."""
    rng = np.random.default_rng(0)
    ranks = rng.choice(4, 4000, p=[0.6, 0.2, 0.1, 0.1]).astype(np.int32)
    probs = np.full((4000, 3), 0.3, np.float32)
    output = TraceAcceptance(trace_of(ranks, probs), ConfidenceAcceptance()).output((0,), 5, 100)
    assert output.candidates[0] == pytest.approx([0.6, 0.2, 0.1], abs=0.03)
    plain = replace(trace_of(ranks, probs).paths[0], target_ranks=None, candidate_probs=None)
    chains = TraceAcceptance(replace(trace_of(ranks, probs), paths=(plain,)), ConfidenceAcceptance())
    assert not chains.output((0,), 5, 100).candidates


def test_a_profile_gives_the_dearest_node() -> None:
    """A choice must not count on less than was measured."""
    steps = EdgeRow("s", "draft_step", 100, (4.0,))
    nodes = [EdgeRow(f"n{n}", "nodes", 100, (ms,), tokens=n) for n, ms in ((1, 5.0), (4, 5.6), (16, 11.0))]
    assert DeviceProfile.from_rows("gpu", [steps, *nodes]).node_ms == pytest.approx(0.4)
    assert DeviceProfile.from_rows("gpu", [steps]).node_ms is None
    assert DeviceProfile("gpu", draft_ms=4.0, node_ms=0.4).forward_ms(0, 6) == pytest.approx(6.0)


def test_a_system_of_trees_that_drafts_chains_says_why() -> None:
    both = SimulationSettings(systems=("wispprof-trees", "specedge-trees", "wispprof"))
    scenarios, notes = scenarios_of(both)
    why = "drafts chains: no edge profile times several nodes a forward"
    assert [note for note in notes if "chains" in note] == [f"wispprof-trees {why}", f"specedge-trees {why}"]
    assert [scenario.system.label for scenario in scenarios] == list(both.systems)
