"""Published headline tables beside the simulator's results.

Each paper has one parameter file with its sources. Assumptions that may explain a difference have names and
columns of their own.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from typing import Any

from wispprof.errors import ArtifactMissing
from wispprof.policies.linear_cost import LinearCost
from wispprof.settings.edge_settings import BEST_GUESS, WAIT, DraftingSettings, OutcomeDrafting
from wispprof.settings.shared_settings import LinkModel
from wispprof.simulation.arrivals import ClosedFleet, Lengths
from wispprof.simulation.capacity_search import capacity, run_all
from wispprof.simulation.configspec import ConfigChoice, DraftOption, Verifier
from wispprof.simulation.devices import DeviceProfile
from wispprof.simulation.metrics import Report
from wispprof.simulation.scenario import Scenario, ServerModel, System, system
from wispprof.simulation.server_models import server_of
from wispprof.simulation.synthetic_acceptance import SyntheticAcceptance
from wispprof.types import Slo

Progress = Callable[[int, str], None]
Table = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """One published figure and the simulated ones, by assumption (NaN where it does not apply)."""

    name: str
    published: float
    simulated: Mapping[str, float]

    def within(self, share: float) -> tuple[str, ...]:
        """Assumptions under which the simulated figure is within ``share`` of the published one."""
        return tuple(
            name
            for name, value in self.simulated.items()
            if not math.isnan(value) and abs(value / self.published - 1.0) <= share
        )

    def nearest(self) -> tuple[str, float] | None:
        """The assumption that comes nearest, and its share of the published figure; ``None`` with none."""
        shares = {n: v / self.published for n, v in self.simulated.items() if not math.isnan(v)}
        return min(shares.items(), key=lambda item: abs(item[1] - 1.0)) if shares else None


@dataclass(frozen=True)
class ReproducedTable:
    """A paper's table. ``assumptions``: name to explanation, in column order; the first is the fair one."""

    title: str
    citation: str
    within: float
    assumptions: Mapping[str, str]
    figures: tuple[Figure, ...]

    def verdict(self, figure: Figure) -> str:
        """One line: met by the first (fair) setup, by other named assumptions, or by how far it is missed."""
        good = figure.within(self.within)
        fair = next(iter(self.assumptions))
        if fair in good:
            return f"met: {fair}"
        if good:
            return f"met under: {', '.join(good)}"
        nearest = figure.nearest()
        if nearest is None:
            return "not simulated"
        return f"not met; nearest: {nearest[0]}, {nearest[1] - 1.0:+.0%}"


def read_setup(name: str) -> dict[str, Any]:
    """A parameter file by name (``wisp``, ``specedge``)."""
    place = files("wispprof.simulation") / "published" / f"{name}.toml"
    if not place.is_file():
        raise ArtifactMissing(f"There is no published setup named {name!r}.")
    setup = tomllib.loads(place.read_text(encoding="utf-8"))
    tables = setup.get("tables", {})
    for found in list(setup["assumption"]):
        if found["name"] in tables.get("of", ()):
            server = found.get("server", {}) | {"profile": tables["profile"]}
            again = {"name": f"{found['name']}: {tables['name']}", "why": f"{tables['why']}: {found['why']}"}
            changed = tables.get("change", {}).get(found["name"], {})
            setup["assumption"].append({**found, **again, "server": server, **changed})
    return setup


def linear_server(table: Table, **changes: Any) -> ServerModel:
    """A server from a ``[server]`` table: linear cost and limits. With ``profile`` a shipped GPU profile
    replaces the cost, not the limits."""
    values = {**table, **changes}
    cost = {f.name: values.pop(f.name) for f in fields(LinearCost) if f.name in values}
    profile = values.pop("profile", "")
    return ServerModel(server_of(profile)[0].estimator if profile else LinearCost(**cost), **values)


def wisp_scenario(setup: Table, kind: str, slo: float, assumption: Table) -> Scenario:
    """One cell of WISP's capacity table: a kind of system (``wisp``, ``server-only``, ``sled``) at ``slo``
    tokens/s, under an assumption's system and its overrides of policy, server and workload."""
    edge, run = setup["edge"], setup["run"]
    server = setup["server"] | assumption.get("server", {})
    server |= assumption.get("server_of", {}).get(kind, {})
    workload = setup["workload"] | assumption.get("workload", {})
    policy = setup["policy"].get(kind, {}) | assumption.get("policy", {}).get(kind, {})
    answer_s = workload["output"] / slo
    speed, controller_ms = edge["draft_tokens_per_s"], edge["controller_ms"]
    device = DeviceProfile.from_speed("edge", speed, controller_ms=controller_ms)
    return Scenario(
        system(assumption["systems"][kind]).replace(**policy),
        linear_server(server),
        # Requests are spread over the warm-up: started at once, their prompts would dominate.
        ClosedFleet(run["start"], Lengths(**workload), ramp_ms=answer_s * 1000.0),
        SyntheticAcceptance(**setup["acceptance"]),
        devices=((device, 1.0),),
        links=((LinkModel(edge["rtt_ms"], edge["jitter_ms"]), 1.0),),
        slos=((Slo(slo, setup["ttft_tokens"] * 1000.0 / slo), 1.0),),
        seconds=answer_s + max(answer_s, run["least_s"]),
        warmup_s=answer_s,
        seed=run["seed"],
    )


def reproduce_wisp(
    executor: Executor | None = None,
    progress: Progress | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> ReproducedTable:
    """WISP's capacity (devices, and ratios of them) and goodput ratios at the outer SLO classes.

    ``overrides`` replace entries of ``[run]``.
    """
    setup = read_setup("wisp")
    run = setup["run"] = {**setup["run"], **(overrides or {})}
    names = [a["name"] for a in setup["assumption"]]
    cells = [
        (assumption, slo, kind)
        for assumption in setup["assumption"]
        for kind in assumption["systems"]
        for slo in setup["slos"]
    ]
    jobs = [(wisp_scenario(setup, kind, slo, a), run) for a, slo, kind in cells]
    # One search is one job; its probes run one after the other.
    searched = map(_search, jobs) if executor is None else executor.map(_search, jobs)
    found: dict[tuple[str, float, str], int] = {}
    for (assumption, slo, kind), devices in zip(cells, searched, strict=True):
        found[assumption["name"], slo, kind] = devices
        if progress is not None:
            progress(len(found), f"of {len(cells)}: {kind}, {assumption['name']}, {devices} devices")

    def ratios(slo: float, rival: str) -> dict[str, float]:
        return {n: _ratio(found, names[: names.index(n) + 1], slo, rival) for n in names}

    figures: list[Figure] = []
    kinds, rivals = setup["systems"], setup["systems"][1:]
    for slo in setup["slos"]:
        published, title = setup["published"]["capacity"][f"{slo:g}"], f"capacity at {slo:g} tok/s"
        for kind in kinds:
            simulated = {n: found.get((n, slo, kind), math.nan) for n in names}
            figures.append(Figure(f"{title}, {kind}", published[kind], simulated))
        for rival in rivals:
            share = published["wisp"] / published[rival]
            figures.append(Figure(f"{title}, wisp / {rival}", share, ratios(slo, rival)))
    # The published goodput counts each device at its SLO's speed, so its ratios are those of capacities.
    goodput, top = setup["published"]["goodput"], max(setup["slos"])
    for rival in rivals:
        share = goodput["wisp"] / goodput[rival]
        figures.append(Figure(f"goodput at {top:g} tok/s, wisp / {rival}", share, ratios(top, rival)))
    return _comparison(setup, tuple(figures))


def _search(job: tuple[Scenario, Mapping[str, Any]]) -> int:
    """One cell: the most devices that meet their SLO."""
    scenario, run = job
    limits = {key: run[key] for key in ("violations", "start", "most")}
    return capacity(scenario, **limits, tolerance=0.03).devices


def _ratio(found: Mapping[tuple[str, float, str], int], names: list[str], slo: float, rival: str) -> float:
    """wisp over ``rival`` under the last of ``names``; what that assumption leaves as it was comes from
    the one before it."""
    mine, other = (
        next(found[n, slo, kind] for n in reversed(names) if (n, slo, kind) in found)
        for kind in ("wisp", rival)
    )
    return mine / other if other else math.nan


def reproduce_specedge(executor: Executor | None = None, progress: Progress | None = None) -> ReproducedTable:
    """SpecEdge's cost efficiency, server throughput and inter-token latency against server-only."""
    setup = read_setup("specedge")
    scenarios: list[Scenario] = []
    for assumption in setup["assumption"]:
        scenarios += [_server_only(setup, assumption), _specedge(setup, assumption)]
    reports = run_all(scenarios, executor, progress)
    values: dict[str, dict[str, float]] = {key: {} for key in setup["published"]}
    for index, assumption in enumerate(setup["assumption"]):
        alone, edges = reports[2 * index], reports[2 * index + 1]
        name = assumption["name"]
        values["server_throughput"][name] = edges.throughput / alone.throughput
        values["inter_token_latency"][name] = edges.tpot_ms[0] / alone.tpot_ms[0]
        values["cost_efficiency"][name] = _per_dollar(setup, edges, True) / _per_dollar(setup, alone, False)
    labels = {
        "cost_efficiency": "cost efficiency, SpecEdge / server-only",
        "server_throughput": "server throughput, SpecEdge / server-only",
        "inter_token_latency": "inter-token latency, SpecEdge / server-only",
    }
    figures = tuple(Figure(labels[key], setup["published"][key], values[key]) for key in setup["published"])
    return _comparison(setup, figures)


def _server_only(setup: Mapping[str, Any], assumption: Mapping[str, Any]) -> Scenario:
    """Drafting on the server: each step first drafts k tokens there. No link, no edge time."""
    step_ms = assumption.get("server_step_ms", setup["draft"]["server_step_ms"])
    k, tree = setup["draft"]["k"], assumption.get("tree")
    table = setup["server"] | assumption.get("server", {})
    drafting_ms = (tree["depth"] if tree else k) * step_ms
    if "profile" in table:  # its steps have no fixed part of their own to add to
        server = linear_server(table, overhead_ms=table["overhead_ms"] + drafting_ms)
    else:
        server = linear_server(table, fixed_ms=table["fixed_ms"] + drafting_ms)
    rounds = system("fcfs").replace(label="server-only", controller_options={"k": k})
    if tree:
        rounds = _with_trees(rounds, tree, WAIT)
    return _specedge_base(setup, assumption, rounds, setup["workload"]["batch"], server)


def _specedge(setup: Mapping[str, Any], assumption: Mapping[str, Any]) -> Scenario:
    draft, workload = setup["draft"], setup["workload"]
    ahead = assumption.get("proactive", draft["k"] + 1)
    pipeline = system("specedge").replace(
        controller_options={"k": draft["k"]}, drafting=DraftingSettings(proactive=ahead)
    )
    if tree := assumption.get("tree"):
        # The best guess, as deep as the public settings say.
        guess = replace(BEST_GUESS, width=tree["width"], depth=assumption.get("proactive", tree["proactive"]))
        pipeline = _with_trees(pipeline, tree, guess if guess.depth else WAIT)
    base = _specedge_base(
        setup,
        assumption,
        pipeline,
        workload["batch"] * workload["edges_per_batch"],
        linear_server(setup["server"] | assumption.get("server", {})),
    )
    return replace(
        base,
        devices=((DeviceProfile("RTX 4090", draft_ms=draft["edge_step_ms"], node_ms=0.0), 1.0),),
        links=((LinkModel(setup["link"]["rtt_ms"]), 1.0),),
    )


def _with_trees(chosen: System, tree: Mapping[str, Any], ahead: OutcomeDrafting) -> System:
    """The system with SpecEdge's trees: ``nodes``, ``depth``, ``width`` and ``beams``."""
    shape = {name: tree[name] for name in ("nodes", "depth", "width", "beams")}
    held = DraftingSettings(proactive=0, draft_ahead=tree["nodes"], ahead=ahead)
    return chosen.replace(controller="specedge", controller_options=shape, trees=True, drafting=held)


def _specedge_base(
    setup: Mapping[str, Any], assumption: Mapping[str, Any], chosen: System, sequences: int, server: Any
) -> Scenario:
    workload, run = setup["workload"], setup["run"]
    lengths = Lengths(workload["prompt"], workload["output"], output_sigma=workload["output_sigma"])
    return Scenario(
        chosen,
        server,
        ClosedFleet(sequences, lengths),
        SyntheticAcceptance(**(setup["acceptance"] | assumption.get("acceptance", {}))),
        devices=((DeviceProfile("none", draft_ms=0.0, node_ms=0.0), 1.0),),
        links=((LinkModel(0.0), 1.0),),
        slos=((Slo(1.0), 1.0),),
        **run,
    )


def _per_dollar(setup: Mapping[str, Any], report: Report, edges: bool) -> float:
    """Tokens per dollar: server price over time, edge price over busy time."""
    prices, c = setup["prices"], report.counters
    hours = report.seconds / 3600.0
    cost = prices["server"] * hours
    if edges:
        cost += prices["edge"] * c.drafting_ms / 3.6e6
    return float(report.throughput * report.seconds / cost)


def _comparison(setup: Mapping[str, Any], figures: tuple[Figure, ...]) -> ReproducedTable:
    assumptions = {a["name"]: a["why"] for a in setup["assumption"]}
    return ReproducedTable(setup["title"], setup["citation"], setup["within"], assumptions, figures)


def reproduce_configspec(
    executor: Executor | None = None, progress: Progress | None = None
) -> ReproducedTable:
    """ConfigSpec's choices for Llama-3.1-70B: chosen and scored by its formulas. Nothing is simulated.

    The choice itself counts: a K or a draft model other than the published one shows as its own figure. Its
    constant verification time stands beside what a shipped profile makes of it under load.
    """
    setup = read_setup("configspec")
    verify_s = {a["name"]: _verify_s(setup, a) for a in setup["assumption"]}
    constant, at = setup["verify_s"], setup["shown_k"]
    shown = {name: t[at] if isinstance(t, dict) else t for name, t in verify_s.items()}
    figures = [Figure(f"T_verify at K = {at}, s", constant, shown)]
    for done, row in enumerate(setup["published"], start=1):
        options = [
            DraftOption(
                name,
                acceptance={int(k): a for k, a in setup["drafts"][name]["acceptance"].items()},
                **figures_of,
            )
            for name, figures_of in setup["devices"][row["device"]].items()
        ]
        choices = {
            a["name"]: Verifier(
                verify_s[a["name"]], setup["dollars_per_token"], a.get("bill_bonus", False)
            ).best(options, row["objective"], a.get("lengths", setup["lengths"]))
            for a in setup["assumption"]
        }
        where = f"{row['device']}, best {row['objective']}"
        wanted = {f"{row['draft']} chosen (1: yes)": 1.0, "length K": row["k"], "tokens/s": row["goodput"]}
        wanted |= {"1,000 tokens/$": row["cost"], "J/token": row.get("energy", math.nan)}
        given = {name: _choice_figures(choice, row["draft"]) for name, choice in choices.items()}
        figures += [
            Figure(f"{where}: {label}", value, {n: g[place] for n, g in given.items()})
            for place, (label, value) in enumerate(wanted.items())
            if not math.isnan(value)
        ]
        if progress is not None:
            progress(done, where)
    return _comparison(setup, tuple(figures))


def _verify_s(setup: Mapping[str, Any], assumption: Mapping[str, Any]) -> float | dict[int, float]:
    """Verification time of a round: the paper's constant, or by K the step of a shipped profile with so many
    sessions, after half a step until it begins."""
    sessions = assumption.get("sessions")
    if sessions is None:
        return float(setup["verify_s"])
    estimator = server_of(setup["profile"])[0].estimator
    cached = [setup["cached"]] * sessions
    return {
        k: 1.5 * estimator.start().add_all([1 + k] * sessions, cached).p50_ms / 1000.0
        for k in setup["lengths"]
    }


def _choice_figures(choice: ConfigChoice, draft: str) -> tuple[float, float, float, float, float]:
    """Whether ``draft`` was chosen, K, tokens/s, thousand tokens/$, J/token."""
    goodput, cost, energy = choice.scores
    return float(choice.option.name == draft), float(choice.k), goodput, cost / 1000.0, energy


PAPERS: Mapping[str, Callable[[Executor | None, Progress | None], ReproducedTable]] = {
    "wisp": reproduce_wisp,
    "specedge": reproduce_specedge,
    "configspec": reproduce_configspec,
}
"""Papers by the name that the command takes."""
