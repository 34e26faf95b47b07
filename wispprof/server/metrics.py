"""Prometheus metrics of a server, named ``wispprof:…`` with vLLM's suffixes where it has the quantity.

Seconds in metric names and values, milliseconds in arguments.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from wispprof.artifacts.plan import BatchRow
from wispprof.fitting.drift import DriftStatus
from wispprof.server.device_kinds import OTHER, DeviceKinds
from wispprof.sessions.pending_drafts import DraftCounters
from wispprof.sessions.session_state import CommitResult
from wispprof.types import Slo

_STEP = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
_LATENCY = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_GAP = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0)
_ACCEPTED = tuple(float(n) for n in (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32))

MAX_SLO_CLASSES = 64
"""Most SLO classes that are counted by name; further ones are ``other``."""


def counts_towards_slo(slo: Slo) -> bool:
    """Whether there is anything to meet or to miss."""
    return not slo.best_effort or slo.ttft_ms is not None


def slo_class(slo: Slo) -> str:
    """Label of an SLO: its token speed, ``8`` or ``2.5``; without one ``ttft`` if only the first token has a
    deadline, else ``none``."""
    if slo.best_effort:
        return "none" if slo.ttft_ms is None else "ttft"
    return f"{slo.tokens_per_s:g}"


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step of ``items`` sessions, ``prefill_items`` of which fed prompts. ``row``: the plan's row that
    limited it."""

    at_ms: float
    items: int
    new_tokens: int
    prefill_tokens: int
    predicted_ms: float
    bound_ms: float
    actual_ms: float
    committed: int
    reason: str
    row: str = ""
    prefill_items: int = 0

    @property
    def own_tokens(self) -> int:
        """Tokens that decoding sessions fed besides their drafts, one each."""
        return self.items - self.prefill_items

    @property
    def draft_tokens(self) -> int:
        return self.new_tokens - self.prefill_tokens - self.own_tokens


class Metrics:
    """Metrics of one server in a registry of their own, and its last ``keep_steps`` steps."""

    def __init__(self, keep_steps: int = 8192) -> None:
        self.registry = CollectorRegistry()
        self.steps_seen = 0
        self.steps: deque[StepRecord] = deque(maxlen=keep_steps)
        self.sessions_met_slo = 0
        self.sessions_ended = 0
        self.attainment: dict[str, list[int]] = {}
        self._classes: set[str] = set()
        self.drafts = DraftCounters()
        self.kinds = DeviceKinds()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"wispprof:{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"wispprof:{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"wispprof:{name}", text, labels, buckets=buckets, registry=self.registry)

        self.running = gauge("num_requests_running", "Sessions that hold KV.")
        self.waiting = gauge("num_requests_waiting", "Sessions waiting for memory or their prefill.")
        self.kv_usage = gauge("kv_cache_usage_perc", "Share of KV cache tokens in use, 0 to 1.")
        self.prefix_cache = gauge("prefix_cache_tokens", "KV cache tokens of ended sessions.")
        self.load = gauge("load_level", "Load level sent to the edges, 0 to 4.")
        self.drift = gauge("step_time_drift_ratio", "Median of actual / predicted step time.")
        self.re_profile = gauge("re_profile", "1 once step times have drifted from the fitted estimator.")
        self.wrong_cells = gauge(
            "re_profile_cell_ratio", "Actual / fitted step time of drifted shapes.", "cell"
        )
        self.bound_scale = gauge(
            "step_time_bound_scale", "Current correction of the bound; NaN while unknown."
        )
        self.bound_coverage = gauge(
            "step_time_bound_coverage",
            "Share of the last steps under their corrected bound; NaN while unknown.",
        )
        for unknown in (self.drift, self.bound_scale, self.bound_coverage):
            unknown.set(math.nan)
        self.failed_steps = counter("failed_steps", "Engine steps that raised.")
        self.policy_errors = counter(
            "policy_errors", "Steps planned without the policy because it raised.", "kind"
        )
        self.open_sessions = gauge("sessions", "Open sessions.", "slo_class", "kind")
        self.slack = gauge("slo_slack_seconds", "Least time left until a token is due.", "slo_class")
        self.connections = gauge("connections", "Open edge connections.")
        self.dropped_connections = counter(
            "connections_dropped", "Connections closed by a limit, by reason.", "reason"
        )
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens prefilled.")
        self.reused_tokens = counter("prefix_cache_hits", "Prompt tokens whose KV was reused.")
        self.generation_tokens = counter("generation_tokens", "Tokens committed.")
        self.success = counter("request_success", "Sessions that ended.", "finished_reason")
        self.refused = counter("requests_refused", "Requests refused, by code.", "code")
        self.step_predicted = histogram(
            "step_time_predicted_seconds", "Predicted median time of each step.", _STEP
        )
        self.step_actual = histogram("step_time_seconds", "Measured time of each step.", _STEP)
        self.step_over = counter("step_time_over_bound", "Steps that took longer than their bound.")
        self.row_steps = counter(
            "batch_row_steps", "Steps limited by this row of the plan.", "slo_class", "load_level"
        )
        self.step_items = histogram("step_items", "Sessions per step.", _ACCEPTED)
        self.ttft = histogram("time_to_first_token_seconds", "Request to first token.", _LATENCY)
        self.gap = histogram("inter_token_latency_seconds", "Time between commits, per token.", _GAP)
        self.queue = histogram("request_queue_time_seconds", "Ready until step start.", _GAP)
        self.e2e = histogram("e2e_request_latency_seconds", "Request to last token.", _LATENCY)
        self.drafted = counter("spec_decode_num_draft_tokens", "Draft tokens received.")
        self.verified = counter("spec_decode_num_verified_tokens", "Draft tokens verified.")
        self.accepted = counter("spec_decode_num_accepted_tokens", "Draft tokens accepted.")
        self.matched = counter("draft_tokens_matched", "Draft tokens committed before they were verified.")
        self.wasted = counter("draft_tokens_wasted", "Draft tokens contradicted or rolled back.")
        self.cut_drafts = counter("draft_tokens_cut", "Draft tokens the policy left out of a step.")
        self.dropped = counter("draft_tokens_dropped", "Draft tokens refused on arrival.", "reason")
        self.bad_frames = counter("bad_frames", "Frames refused, by code.", "code")
        self.violations = counter("slo_violations", "Sessions that missed their SLO.", "slo_class")
        self.attained = counter("slo_attained", "Sessions that met their SLO.", "slo_class")
        self.preempted = counter("num_preemptions", "Sessions whose KV was evicted.", "reason")
        self.accept_length = histogram(
            "spec_decode_accepted_per_step", "Accepted drafts per verified round.", _ACCEPTED
        )

    def step(self, record: StepRecord, row: BatchRow | None = None) -> None:
        """A step ended; ``row``: the plan's row that limited it."""
        self.steps.append(record)
        self.steps_seen += 1
        if row is not None:
            self.row_steps.labels(f"{row.tokens_per_s:g}", str(row.load_level)).inc()
        self.step_predicted.observe(record.predicted_ms / 1000.0)
        self.step_actual.observe(record.actual_ms / 1000.0)
        self.step_items.observe(record.items)
        self.prompt_tokens.inc(record.prefill_tokens)
        self.generation_tokens.inc(record.committed)
        if record.actual_ms > record.bound_ms > 0:
            self.step_over.inc()

    def steps_since(self, number: int) -> tuple[int, list[StepRecord]]:
        """(number of the first, records) of the retained steps from ``number`` on, counted from 0."""
        first = max(0, number, self.steps_seen - len(self.steps))
        held = self.steps_seen - first
        return first, list(self.steps)[-held:] if held > 0 else []

    def drifted(self, status: DriftStatus | None) -> None:
        """The drift monitor's status; ``None`` without a fitted estimator."""
        if status is None:
            return
        self.re_profile.set(status.re_profile)
        self.bound_scale.set(status.bound_scale)
        self.bound_coverage.set(status.coverage)
        for cell, ratio in status.cells:
            self.wrong_cells.labels(str(cell)).set(ratio)

    def opened(self, slo: Slo) -> None:
        """A session opens. Both counters of its SLO class exist from now on: a rate needs a first value."""
        if counts_towards_slo(slo):
            label = self._counted_class(slo)
            self.attained.labels(label)
            self.violations.labels(label)

    def _counted_class(self, slo: Slo) -> str:
        """The label of an SLO in counters, which stay: clients choose it, so there is a limit."""
        label = slo_class(slo)
        if len(self._classes) < MAX_SLO_CLASSES:
            self._classes.add(label)
        return label if label in self._classes else OTHER

    def commit(self, commit: CommitResult, since_ms: float) -> None:
        """A commit ``since_ms`` after the request (first token) or the session's last commit."""
        self.queue.observe(commit.queue_ms / 1000.0)
        if commit.first:
            self.ttft.observe(since_ms / 1000.0)
        else:
            self.gap.observe(since_ms / 1000.0 / max(1, len(commit.tokens)))
        if commit.drafted:
            self.verified.inc(commit.drafted)
            self.accept_length.observe(commit.accepted)

    def ended(
        self, slo: Slo, counters: DraftCounters, reason: str, met_slo: bool | None, e2e_ms: float
    ) -> None:
        """A session ended. ``met_slo``: ``None`` if it does not count towards attainment; neither does one
        without an SLO."""
        self.success.labels(reason).inc()
        self.drafted.inc(counters.drafted)
        self.accepted.inc(counters.accepted)
        self.matched.inc(counters.matched)
        self.wasted.inc(counters.wasted)
        self.cut_drafts.inc(counters.cut_drafts)
        for cause, count in counters.dropped.items():
            self.dropped.labels(cause).inc(count)
        self.drafts.add(counters)
        self.e2e.observe(max(0.0, e2e_ms) / 1000.0)
        if met_slo is None or not counts_towards_slo(slo):
            return
        label = self._counted_class(slo)
        self.attainment.setdefault(label, [0, 0])[not met_slo] += 1
        self.sessions_ended += 1
        self.sessions_met_slo += met_slo
        (self.attained if met_slo else self.violations).labels(label).inc()

    def text(self) -> bytes:
        """The text that ``/metrics`` returns."""
        return generate_latest(self.registry)
