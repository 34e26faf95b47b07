"""Settings of fitting and of the planner."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

from wispprof.errors import PlanError, SettingsError
from wispprof.settings.fields import Settings, setting

OBJECTIVES = ("goodput", "cost", "energy")

Mix = tuple[tuple[float, float], ...]
"""SLO classes (tokens/s) with their shares of the sessions, any positive weights."""


def class_mix(text: str) -> Mix:
    """``4=0.7,8=0.3`` as classes with their shares; raises :class:`PlanError`."""
    try:
        pairs = [entry.split("=") for entry in text.split(",")]
        return tuple((float(speed), float(share)) for speed, share in pairs)
    except ValueError:
        raise PlanError(f"{text!r} is not a class mix.", "For example: --mix 4=0.7,8=0.3.") from None


def device_price(entry: str) -> tuple[str, float]:
    """``[NAME=]DOLLARS`` an hour as (name, price); raises :class:`PlanError`."""
    name, _, value = entry.rpartition("=")
    try:
        return name, float(value)
    except ValueError:
        raise PlanError(
            f"{entry!r} is not a price.", "For example: --edge-price 0.35, or laptop=0.35."
        ) from None


@dataclass(frozen=True)
class FitSettings(Settings):
    """Inputs of estimator and predictor, which kinds to fit, and how to score them."""

    server: tuple[Path, ...] = setting((), "Server profile (.jsonl); repeatable.")
    trace: tuple[Path, ...] = setting((), "Acceptance trace; repeatable.")
    out: Path = setting(Path("fit"), "Folder for artifacts and model cards.")
    estimator: str = setting("auto", "wisp-linear, staircase, forest, wispprof, or auto: by held-out error.")
    predictor: str = setting("auto", "threshold, margin-logistic, wisp-mlp, lightgbm, or auto: by log loss.")
    coverage: float = setting(0.95, "Coverage of the upper bound.", minimum=0.5, maximum=0.999)
    evaluate: bool = setting(
        False,
        "Also score all estimators on held-out blocks of shapes, with plots, and replay rounds "
        "under every predictor (minutes).",
    )
    splits: int = setting(20, "Random splits that test the bound's coverage.", minimum=1)
    update: Path | None = setting(None, "Step log of a server; recalibrates the estimator in --out on it.")
    seed: int = setting(0, "Seed of every split.")

    def check_together(self) -> None:
        if self.update is not None and (self.server or self.trace or self.evaluate):
            raise SettingsError("--update goes with --out alone.")


@dataclass(frozen=True, slots=True)
class PlanSettings(Settings):
    """The grid of a plan, the limits of server and step, and what a plan optimises.

    ``objective``: see :mod:`wispprof.planning.objective`. A session is billed its share of the server's busy
    time. ``edge_prices`` are (device, dollars an hour of drafting), with ``""`` for every device that has no
    price of its own. ``mixes`` are planned beside each class alone; the default: all classes, equal shares.
    """

    rtts_ms: tuple[float, ...] = setting(
        (5.0, 20.0, 50.0, 100.0), "Round trip; repeatable.", unit="ms", minimum=0, option="rtt"
    )
    slos: tuple[float, ...] = setting(
        (2.0, 4.0, 6.0, 8.0), "SLO: token speed; repeatable.", unit="tokens/s", minimum=0.01, option="slo"
    )
    k_max: int = setting(12, "Maximum draft length considered.", unit="tokens", minimum=1, maximum=32)
    contexts: tuple[int, ...] = setting(
        (512,),
        "Cached tokens per session; repeatable: each gets tables of its own.",
        unit="tokens",
        minimum=1,
        option="context",
    )
    max_sessions: int = setting(256, "Maximum concurrent sessions.", minimum=1, option="sessions")
    kv_tokens: int = setting(0, "Size of the server's KV cache; 0 is unlimited.", unit="tokens", minimum=0)
    max_step_tokens: int = setting(2048, "Maximum new tokens in a step.", unit="tokens", minimum=1)
    max_prefill_chunk: int = setting(512, "Maximum prompt tokens in a step.", unit="tokens", minimum=1)
    violations: float = setting(0.05, "Share of sessions that may miss their SLO.", minimum=0, maximum=0.99)
    min_gain: float = setting(
        1.02,
        "Speedup that drafting must reach; below it the plan says k = 0, which saves the edge's energy.",
        minimum=1,
    )
    objective: str = setting(
        "goodput",
        "goodput, cost, energy (least within --energy-slack of the best speed), or a mix: "
        "goodput=0.7,cost=0.3.",
    )
    energy_slack: float = setting(
        0.05, "Share of speed that the objective energy may give up.", minimum=0, maximum=1
    )
    server_price: float = setting(0.0, "Price of the server.", unit="dollars/hour", minimum=0)
    edge_prices: tuple[tuple[str, float], ...] = setting(
        (),
        "Price of drafting in dollars/hour: DOLLARS, or NAME=DOLLARS for one device; repeatable.",
        unit="dollars/hour",
        option="edge-price",
        parse=device_price,
    )
    mixes: tuple[Mix, ...] = setting(
        (),
        "Class mix for capacity: SLO=SHARE,SLO=SHARE; repeatable; default: equal shares.",
        option="mix",
        parse=class_mix,
    )

    def check_together(self) -> None:
        if not self.rtts_ms:
            raise PlanError("A plan needs a round trip.", "Give --rtt.")
        if not self.slos:
            raise PlanError("A plan needs an SLO class.", "Give --slo.")
        if not self.contexts:
            raise PlanError("A plan needs a context.", "Give --context.")
        for mix in self.mixes:
            if not mix or min(min(pair) for pair in mix) <= 0:
                raise PlanError(
                    f"A class mix needs speeds and shares above 0, got {mix}.",
                    "For example: --mix 4=0.7,8=0.3.",
                )
        for device, price in self.edge_prices:
            if not price >= 0:
                raise PlanError(
                    f"A price must not be negative, got {price:g} for {device or 'all devices'}.",
                    "Correct --edge-price.",
                )
        if "cost" in self.weights and not self.server_price > 0:
            raise PlanError(
                "The objective cost needs the price of the server.",
                "Give --server-price in dollars an hour (and --edge-price, if drafting costs you).",
            )

    @property
    def weights(self) -> dict[str, float]:
        """The objective as weights that sum to one."""
        return weights_of(self.objective)

    def edge_price(self, device: str) -> float:
        """Dollars an hour of drafting on a device, by its name or its machine's."""
        prices = dict(self.edge_prices)
        return prices.get(device, prices.get(device.partition(":")[0], prices.get("", 0.0)))

    @property
    def mixes_or_equal(self) -> tuple[Mix, ...]:
        """The mixes wanted, or all classes in equal shares."""
        if self.mixes or len(self.slos) < 2:
            return self.mixes
        return (tuple((speed, 1.0) for speed in self.slos),)

    @property
    def context(self) -> int:
        """The context that look-ups assume if they name none: the lower middle one."""
        return statistics.median_low(self.contexts)

    @property
    def kv_sessions(self) -> int:
        """Sessions of :attr:`context` whose caches fit at once."""
        if not self.kv_tokens:
            return self.max_sessions
        return max(1, min(self.max_sessions, self.kv_tokens // max(1, self.context)))


def weights_of(objective: str) -> dict[str, float]:
    """``goodput``, or ``goodput=0.7,energy=0.3``, as weights that sum to one.

    Raises :class:`PlanError` on what is neither.
    """
    try:
        pairs = [entry.partition("=") for entry in objective.split(",")]
        weights = {name.strip(): float(value) if found else 1.0 for name, found, value in pairs}
    except ValueError:
        weights = {}
    # Beside others, a bare name has no weight.
    bare = len(weights) > 1 and any(not found for _, found, _ in pairs)
    total = sum(weights.values())
    valid = not bare and 0 < total < float("inf") and min(weights.values()) >= 0
    if not valid or len(weights) < len(pairs) or not set(weights) <= set(OBJECTIVES):
        raise PlanError(
            f"There is no objective {objective!r}.",
            f"Choose {', '.join(OBJECTIVES)}, or a mix such as goodput=0.7,energy=0.3.",
        )
    return {name: weight / total for name, weight in weights.items() if weight > 0}


@dataclass(frozen=True, slots=True)
class FleetSettings(Settings):
    """How thoroughly a fleet is simulated."""

    estimate: bool = setting(False, "Rank by the closed model alone, in seconds; nothing is simulated.")
    probe_sessions: int = setting(600, "Sessions that a probe of the search counts, about.", minimum=100)
    check_sessions: int = setting(
        4000, "Sessions that the check of the whole fleet counts, about.", minimum=100
    )
    sampled: int = setting(2, "Servers that a probe simulates.", minimum=1)
    confirming: int = setting(8, "Servers that are simulated where a probe met the SLO.", minimum=1)
    warmup_s: float = setting(
        40.0, "Time at the beginning that is not counted.", unit="s", minimum=0, option="warmup"
    )
    verified: int = setting(2, "Options, from the cheapest on, whose whole fleet is simulated.", minimum=0)
    dearest: float = setting(
        2.0, "Give an option up once it costs more than this times the cheapest.", minimum=1
    )
    optimism: float = setting(
        1.0, "Simulate options that are estimated to cost up to this times the second best.", minimum=0.1
    )

    def seconds_for(self, per_s: float, sessions: int) -> float:
        """Simulated time in which about so many sessions arrive after the warm-up: 1 to 60 minutes."""
        return self.warmup_s + min(3600.0, max(60.0, sessions / max(per_s, 1e-9)))
