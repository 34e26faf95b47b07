"""Published setups: the parameter files that ship with the package, read and turned into scenarios."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from wispprof.errors import ArtifactMissing
from wispprof.settings.shared_settings import LinkModel
from wispprof.simulation.arrivals import ClosedFleet, Lengths
from wispprof.simulation.devices import DeviceProfile
from wispprof.simulation.scenario import Scenario, ServerModel
from wispprof.simulation.step_costs import LinearCost
from wispprof.simulation.synthetic_acceptance import SyntheticAcceptance
from wispprof.simulation.systems import system
from wispprof.types import Slo

__all__ = ["linear_server", "merged", "read_setup", "wisp_scenario"]

Table = Mapping[str, Any]


def read_setup(name: str) -> dict[str, Any]:
    """A parameter file by name (``wisp``, ``specedge``)."""
    place = files("wispprof.simulation") / "published" / f"{name}.toml"
    if not place.is_file():
        raise ArtifactMissing(f"There is no published setup named {name!r}.")
    return tomllib.loads(place.read_text(encoding="utf-8"))


def merged(base: Table, over: Table) -> dict[str, Any]:
    """``base`` with the entries of ``over`` in their place."""
    return {**base, **over}


def linear_server(table: Table, **changes: Any) -> ServerModel:
    """A server from a ``[server]`` table: linear cost and limits."""
    cost_keys = ("fixed_ms", "row_ms", "kv_ms", "pair_ms", "item_ms", "floor_rows", "bound_ratio")
    cost = {key: value for key, value in table.items() if key in cost_keys}
    rest = {key: value for key, value in table.items() if key not in cost_keys}
    cost.update({key: changes.pop(key) for key in list(changes) if key in cost_keys})
    return ServerModel(LinearCost(**cost), **{**rest, **changes})


def wisp_scenario(setup: Table, kind: str, slo: float, assumption: Table) -> Scenario:
    """One cell of WISP's capacity table: a kind of system (``wisp``, ``server-only``, ``sled``) at ``slo``
    tokens/s, under an assumption's system and its overrides of policy, server and workload."""
    edge, run = setup["edge"], setup["run"]
    server = merged(setup["server"], assumption.get("server", {}))
    server |= assumption.get("server_of", {}).get(kind, {})
    workload = merged(setup["workload"], assumption.get("workload", {}))
    policy = merged(setup["policy"].get(kind, {}), assumption.get("policy", {}).get(kind, {}))
    answer_s = workload["output"] / slo
    return Scenario(
        system(assumption["systems"][kind]).replace_with(**policy),
        linear_server(server),
        # All at once, their prompts would decide: each size is judged on a fleet that is under way.
        ClosedFleet(run["start"], Lengths(**workload), ramp_ms=answer_s * 1000.0),
        SyntheticAcceptance(**setup["acceptance"]),
        devices=(
            (
                DeviceProfile.from_speed(
                    "edge", edge["draft_tokens_per_s"], controller_ms=edge["controller_ms"]
                ),
                1.0,
            ),
        ),
        links=((LinkModel(edge["rtt_ms"], edge["jitter_ms"]), 1.0),),
        slos=((Slo(slo, setup["ttft_tokens"] * 1000.0 / slo), 1.0),),
        seconds=answer_s + max(answer_s, run["least_s"]),
        warmup_s=answer_s,
        seed=run["seed"],
    )
