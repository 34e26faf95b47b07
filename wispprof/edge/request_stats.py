"""Statistics of an edge: of one request, and of all requests for Prometheus."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from wispprof.edge.client import EdgeClient
from wispprof.sessions.draft_buffer import CommitEffect
from wispprof.types import Slo, TokenChunk


@dataclass(slots=True)
class RequestStats:
    """Statistics of one request. Times are ms since the request began.

    ``rounds``: commits after the first token. ``drafted``: tokens drafted; at the end each of them is one of
    ``accepted`` (verified and kept), ``matched`` (committed before it was verified), ``dropped`` (ended in no
    committed token, the rejected ones included) and ``draft_only``. ``wasted_ms``: edge time spent on drafts
    after the first rejected one; ``dropped_ms``: on all that were dropped.
    ``offered_by_position[j]``: verified rounds with drafts j+1 deep; ``accepted_by_position[j]``:
    those in which the first j+1 were accepted. ``proactive_hits`` of ``proactive_guesses``: how often a
    guess at the target's own token was right. ``draft_only``: tokens that no server confirmed.
    ``energy_j``: the request's share (:class:`~wispprof.edge.energy_shares.EnergyShares`); ``None`` without
    a sensor.
    ``trees``: frames of drafts with branches. ``plan_row``: the plan's row that was obeyed last.

    What kept the device from drafting (:attr:`draft_note` says it in words): ``late``: draft steps that a
    commit overtook. ``foreign``: drafts outside the target's vocabulary, which are not sent.
    ``no_proposal``: steps without a draft. ``declined``: rounds and bursts for which the controller chose
    k = 0. ``prefill_ms``: the draft model's, ``None`` until it ends.
    ``catch_up``: committed tokens that the draft model read without drafting, in ``catch_up_ms``.
    ``draft_fault``: why drafting stopped.
    """

    drafting: bool = False
    begun_ms: float = 0.0
    first_ms: float | None = None
    last_ms: float | None = None
    tokens: int = 0
    draft_only: int = 0
    rounds: int = 0
    drafted: int = 0
    sent: int = 0
    trees: int = 0
    plan_row: str = ""
    verified_drafts: int = 0
    accepted: int = 0
    matched: int = 0
    draft_ms: float = 0.0
    wasted_ms: float = 0.0
    dropped: int = 0
    dropped_ms: float = 0.0
    proactive_guesses: int = 0
    proactive_hits: int = 0
    queue_ms: float = 0.0
    verify_ms: float = 0.0
    rtt_ms: float = 0.0
    up_bytes: int = 0
    down_bytes: int = 0
    reopened: int = 0
    late: int = 0
    foreign: int = 0
    no_proposal: int = 0
    declined: int = 0
    prefill_ms: float | None = None
    catch_up: int = 0
    catch_up_ms: float = 0.0
    draft_fault: str = ""
    finished: str = ""
    energy_j: float | None = None
    first_tokens: int = 0
    offered_by_position: list[int] = field(default_factory=list)
    accepted_by_position: list[int] = field(default_factory=list)

    def commit(self, effect: CommitEffect, now_ms: float, drafted: int) -> None:
        """Note a commit that arrived at ``now_ms`` for which ``drafted`` proposals were verified."""
        at = now_ms - self.begun_ms
        if self.first_ms is None:
            self.first_ms = at
            self.first_tokens = len(effect.tokens)
            self.matched += effect.hits
        else:
            self.rounds += 1
            self.verified_drafts += drafted
            self.accepted += effect.accepted
            self.matched += effect.hits - effect.accepted
            self._by_position(effect.depth or drafted, effect.accepted)
        self.last_ms = at
        self.tokens += len(effect.tokens)
        self.wasted_ms += effect.wasted_ms
        self.proactive_guesses += effect.proactive
        self.proactive_hits += effect.proactive_hit

    def caught_up(self, tokens: int, read_ms: float) -> None:
        """Note that the draft model read committed tokens instead of drafting."""
        self.catch_up += tokens
        self.catch_up_ms += read_ms

    def _by_position(self, drafted: int, accepted: int) -> None:
        missing = drafted - len(self.offered_by_position)
        if missing > 0:
            self.offered_by_position += [0] * missing
            self.accepted_by_position += [0] * missing
        for place in range(drafted):
            self.offered_by_position[place] += 1
            self.accepted_by_position[place] += place < accepted

    @property
    def ttft_ms(self) -> float | None:
        return self.first_ms

    @property
    def tpot_ms(self) -> float | None:
        """Mean ms per token after the first commit; ``None`` with nothing after it."""
        later = self.tokens - self.first_tokens
        if later <= 0 or self.first_ms is None or self.last_ms is None:
            return None
        return (self.last_ms - self.first_ms) / later

    @property
    def tokens_per_s(self) -> float:
        """Committed tokens over the whole request, its first token's wait included."""
        return self.tokens * 1000.0 / self.last_ms if self.last_ms else 0.0

    @property
    def accepted_per_round(self) -> float:
        return self.accepted / self.rounds if self.rounds else 0.0

    @property
    def energy_j_per_token(self) -> float | None:
        """Joules of the device per token; ``None`` without a sensor or a token."""
        made = self.tokens + self.draft_only
        return None if self.energy_j is None or not made else self.energy_j / made

    def speculative_decoding(self) -> dict[str, Any] | None:
        """Acceptance in the form of vLLM's per-request metrics; ``None`` if no draft was verified.

        Steps are those that verified drafts. ``acceptance_histogram[j]``: steps that accepted exactly j.
        """
        if not self.offered_by_position:
            return None
        steps = self.offered_by_position[0]
        at_least = [steps, *self.accepted_by_position, 0]
        return {
            "mean_acceptance_length": 1.0 + self.accepted / steps,
            "draft_acceptance_rate": self.accepted / self.verified_drafts,
            "acceptance_histogram": [a - b for a, b in pairwise(at_least)],
            "num_spec_steps": steps,
            "num_accepted_draft_tokens": self.accepted,
            "num_draft_tokens": self.verified_drafts,
            "num_spec_tokens": len(self.offered_by_position),
        }

    def met_slo(self, slo: Slo) -> bool:
        """Whether TTFT and mean TPOT were within the SLO."""
        if self.first_ms is None or (slo.ttft_ms is not None and self.first_ms > slo.ttft_ms):
            return False
        tpot_ms = self.tpot_ms
        return tpot_ms is None or tpot_ms <= slo.tpot_ms

    @property
    def draft_obstacle(self) -> str:
        """What mainly kept the device from drafting: ``fault``, ``vocabulary``, ``late``, ``rejected``,
        ``controller`` (k = 0) or ``no_proposal``; ``off`` in server-only serving, "" if drafts were
        accepted or none was needed."""
        if not self.drafting:
            return "off"
        if self.draft_fault:
            return "fault"
        if self.accepted or not self.rounds:
            return ""
        if self.foreign:
            return "vocabulary"
        if self.verified_drafts:
            return "rejected"
        if self.late or self.sent or self.prefill_ms is None:
            return "late"
        if self.declined:
            return "controller"
        return "no_proposal" if self.no_proposal else ""

    @property
    def _unused(self) -> str:
        """What became of the drafts that were not accepted, if those are most of them."""
        if 2 * self.accepted >= self.drafted:
            return ""
        fates = {"were committed before they were verified": self.matched}
        left = self.dropped
        for fate, count in (
            ("were rejected", self.verified_drafts - self.accepted),
            ("were overtaken by a commit", self.late),
            ("were outside the target's vocabulary", self.foreign),
        ):
            fates[fate] = min(count, left)
            left -= fates[fate]
        fates["followed a rejected draft or the last token"] = left
        ranked = sorted(fates.items(), key=lambda one: -one[1])
        told = [f"{n} {fate if n > 1 else fate.replace('were', 'was', 1)}" for fate, n in ranked if n > 0]
        return f"{self.accepted} of {self.drafted} drafts were accepted; {', '.join(told)}." if told else ""

    @property
    def draft_note(self) -> str:
        """:attr:`draft_obstacle` in words; without one, whether the controller mostly chose k = 0, or what
        became of the drafts if most were not accepted."""
        commit_ms = (self.tpot_ms or 0.0) * (self.tokens - self.first_tokens) / max(1, self.rounds)
        late = f"No draft was in time: a commit took {commit_ms:.0f} ms, a round trip {self.rtt_ms:.0f} ms, "
        if self.prefill_ms is None:
            late += "and the draft model was still reading the prompt."
        elif not self.drafted:
            late += f"the draft model's prefill {self.prefill_ms:.0f} ms, and no draft step ended."
        else:
            step_ms = self.draft_ms / self.drafted
            late += f"a draft step {step_ms:.0f} ms, the draft model's prefill {self.prefill_ms:.0f} ms."
        by = f" by plan row {self.plan_row}" if self.plan_row else ""
        mostly = f"The speculation controller or its plan mostly chose k = 0 ({self.declined} times{by})."
        return {
            "": mostly if 2 * self.declined > self.rounds else self._unused,
            "off": "Server-only: drafting was off, by the request or because this device has no draft model.",
            "fault": f"Drafting stopped: {self.draft_fault}",
            "vocabulary": f"{self.foreign} drafts were outside the target's vocabulary.",
            "rejected": f"The target rejected all {self.verified_drafts} drafts.",
            "late": late,
            "controller": f"The speculation controller or its plan chose k = 0 ({self.declined} times{by}).",
            "no_proposal": "The drafter had nothing to propose.",
        }[self.draft_obstacle]

    def summary(self) -> dict[str, object]:
        """Everything, with the derived figures; JSON-ready."""
        rounds = max(1, self.rounds)
        return {
            **{k: v for k, v in asdict(self).items() if k not in ("begun_ms", "first_tokens")},
            "tokens_per_s": self.tokens_per_s,
            "ttft_ms": self.ttft_ms,
            "tpot_ms": self.tpot_ms,
            "accepted_per_round": self.accepted_per_round,
            "queue_ms_per_round": self.queue_ms / rounds,
            "verify_ms_per_round": self.verify_ms / rounds,
            "energy_j_per_token": self.energy_j_per_token,
            "draft_note": self.draft_note,
        }

    def line(self) -> str:
        """One line for a terminal."""
        parts = [f"{self.tokens} tokens"]
        if self.first_ms is not None:
            parts.append(f"{self.tokens_per_s:.1f} tokens/s")
            then = f", then {1000.0 / self.tpot_ms:.1f} tokens/s" if self.tpot_ms else ""
            parts.append(f"first after {self.first_ms:.0f} ms{then}")
        if self.rounds and self.drafted:
            parts.append(f"accepted {self.accepted_per_round:.2f} per round ({self.rounds} rounds)")
            share = self.wasted_ms / self.draft_ms if self.draft_ms else 0.0
            parts.append(
                f"wasted drafting {self.wasted_ms:.{0 if self.wasted_ms >= 10 else 2}f} ms ({share:.0%})"
            )
        if self.proactive_guesses:
            parts.append(f"guessed ahead {self.proactive_hits}/{self.proactive_guesses}")
        if self.energy_j_per_token is not None:
            parts.append(f"{self.energy_j_per_token:.2g} J/token")
        parts.append(f"round trip {self.rtt_ms:.1f} ms")
        if self.reopened:
            parts.append(f"reopened {self.reopened}x")
        if self.draft_only:
            parts.append(f"{self.draft_only} tokens UNVERIFIED (draft alone)")
        if self.draft_note and self.draft_obstacle != "off":
            parts.append(self.draft_note)
        return " · ".join(parts)


class _Counted(Protocol):
    """A generation whose statistics are counted when it ends."""

    stats: RequestStats
    finished: str


_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_SUMS: dict[str, tuple[str, Callable[[RequestStats], float]]] = {
    "tokens": ("Committed tokens.", lambda s: s.tokens),
    "unverified_tokens": ("Tokens of the draft model alone.", lambda s: s.draft_only),
    "drafted_tokens": ("Tokens drafted.", lambda s: s.drafted),
    "accepted_tokens": ("Drafts verified and accepted.", lambda s: s.accepted),
    "matched_drafts": ("Drafts committed before they were verified.", lambda s: s.matched),
    "dropped_drafts": ("Drafts that ended in no committed token.", lambda s: s.dropped),
    "late_drafts": ("Draft steps that a commit overtook.", lambda s: s.late),
    "declined_rounds": ("Rounds and bursts with k = 0.", lambda s: s.declined),
    "foreign_drafts": ("Drafts outside the target's vocabulary.", lambda s: s.foreign),
    "draft_faults": ("Requests in which the draft model failed.", lambda s: bool(s.draft_fault)),
    "draft_seconds": ("Time spent drafting.", lambda s: s.draft_ms / 1000.0),
    "wasted_draft_seconds": ("Of it, after a first rejection.", lambda s: s.wasted_ms / 1000.0),
    "energy_joules": ("Energy of the device while requests ran.", lambda s: s.energy_j or 0.0),
    "proactive_guesses": ("Guesses at the target's own token.", lambda s: s.proactive_guesses),
    "proactive_hits": ("Guesses that were right.", lambda s: s.proactive_hits),
}
_LINK: dict[str, tuple[str, Callable[[EdgeClient], float]]] = {
    "rtt_seconds": ("Smoothed round trip.", lambda c: c.rtt.mean_ms / 1000.0),
    "link_up": ("1 while connected.", lambda c: c.up),
    "reconnects": ("Links restored.", lambda c: c.reconnects),
    "target_changes": ("Reconnects that found another target.", lambda c: c.target_changes),
    "bad_frames": ("Invalid frames of the server.", lambda c: c.bad_frames),
    "sent_bytes": ("Bytes sent over links.", lambda c: c.traffic.up_bytes),
    "received_bytes": ("Bytes received over links.", lambda c: c.traffic.down_bytes),
}


class EdgeMetrics:
    """Prometheus metrics of one edge, in a registry of their own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"wispprof_edge_{name}", text, labels, registry=registry)

        def seconds(name: str, text: str) -> Histogram:
            return Histogram(f"wispprof_edge_{name}_seconds", text, buckets=_SECONDS, registry=registry)

        self._requests = counter("requests", "Finished requests.", "finished")
        self._obstacles = counter("undrafted_requests", "Requests without accepted drafts.", "reason")
        self._sums = [(counter(name, text), value) for name, (text, value) in _SUMS.items()]
        # By vLLM's names, which `vllm bench serve` reads before and after a run.
        vllm = "vllm:spec_decode_num"
        self._vllm = [
            Counter(f"{vllm}_drafts", "Rounds with drafts.", registry=registry),
            Counter(f"{vllm}_draft_tokens", "Drafts verified.", registry=registry),
            Counter(f"{vllm}_accepted_tokens", "Drafts accepted.", registry=registry),
        ]
        self._vllm_by_position = Counter(
            f"{vllm}_accepted_tokens_per_pos", "Drafts accepted.", ["position"], registry=registry
        )
        self._ttft = seconds("ttft", "First token.")
        self._tpot = seconds("tpot", "Mean time per later token.")
        self._link = [
            (Gauge(f"wispprof_edge_{name}", text, registry=registry), value)
            for name, (text, value) in _LINK.items()
        ]

    async def watch(self, reply: _Counted, stream: AsyncGenerator[TokenChunk]) -> AsyncGenerator[TokenChunk]:
        """The tokens of ``stream``; ``reply`` is counted when it ends, however it ends."""
        try:
            async with aclosing(stream):
                async for chunk in stream:
                    yield chunk
        finally:
            self._count(reply.stats, reply.finished or "aborted")

    def _count(self, stats: RequestStats, finished: str) -> None:
        self._requests.labels(finished).inc()
        if obstacle := stats.draft_obstacle:
            self._obstacles.labels(obstacle).inc()
        for total, value in self._sums:
            total.inc(value(stats))
        rounds = stats.offered_by_position[0] if stats.offered_by_position else 0
        for total, count in zip(self._vllm, (rounds, stats.verified_drafts, stats.accepted), strict=True):
            total.inc(count)
        for position, count in enumerate(stats.accepted_by_position):
            self._vllm_by_position.labels(str(position)).inc(count)
        for histogram, ms in ((self._ttft, stats.ttft_ms), (self._tpot, stats.tpot_ms)):
            if ms is not None:
                histogram.observe(ms / 1000.0)

    def link(self, client: EdgeClient) -> None:
        """Bring the link's gauges up to date."""
        for gauge, value in self._link:
            gauge.set(value(client))

    def text(self) -> bytes:
        """What /metrics answers."""
        return generate_latest(self.registry)
