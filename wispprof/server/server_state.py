"""What a server is doing now: the data of its page, and gauges that are computed when they are read.

Nothing is computed unless somebody asks. Times are ms. Columns are lists of equal length, so that two hundred
sessions take few bytes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from wispprof import __version__
from wispprof.server.device_kinds import OTHER, draft_counts, named_kinds
from wispprof.server.metrics import StepRecord, slo_class
from wispprof.server.session import ServerSession
from wispprof.sessions.pending_drafts import DraftCounters

if TYPE_CHECKING:
    from wispprof.server.verification_server import VerificationServer

MAX_STEPS = 200
"""Most steps in one answer. Of more, every n-th is sent."""

MAX_SESSIONS = 200
"""Most sessions in one answer: those with the least slack."""


def server_state(server: VerificationServer, since: int = 0) -> bytes:
    """JSON; docs/serve.md explains the fields. ``since``: the first step that the reader does not have."""
    manager, metrics, times = server.manager, server.metrics, server.step_times
    now_ms = server.now_ms()
    sessions = list(manager.sessions)
    slacks = [_slack_ms(session, now_ms) for session in sessions]
    drift = times.drift
    body: dict[str, Any] = {
        "version": __version__,
        "run": server.run_id,
        "now_ms": round(now_ms, 1),
        "state": server.state,
        "target": server.model.id,
        "policy": server.policy.name,
        "asynchronous": server.policy.stream,
        "estimator": "learning" if times.learning else "fitted",
        "refused": {
            sample.labels["code"]: int(sample.value)
            for sample in next(iter(metrics.refused.collect())).samples
            if sample.name.endswith("_total")
        },
        "plan": bool(server.plan),
        "plan_row": server.batch_row.cell if server.batch_row is not None else "",
        "load_level": manager.load_level,
        "waiting": manager.waiting,
        "kv": {
            "total": manager.kv_total,
            "free": server.kv_free,
            "prefix": int(next(iter(metrics.prefix_cache.collect())).samples[0].value),
        },
        "drift": {
            "ratio": round(times.ratio, 4),
            "re_profile": drift is not None and drift.re_profile,
            "reason": drift.reason if drift is not None else "",
            "bound_scale": round(drift.bound_scale, 4) if drift is not None else None,
            "bound_coverage": round(drift.coverage, 4) if drift is not None else None,
        },
        "steps": _steps(metrics.steps_seen, *metrics.steps_since(since)),
        "classes": _classes(server, sessions, slacks),
        "kinds": metrics.kinds.table(sessions, now_ms),
        "drafts": _drafts(metrics.drafts, sessions),
        "sessions": {"all": len(sessions), **_session_columns(sessions, slacks)},
    }
    return msgspec.json.encode(body)


def update_gauges(server: VerificationServer) -> None:
    """Bring the gauges of open sessions and of slack up to date."""
    metrics, now_ms = server.metrics, server.now_ms()
    sessions = list(server.manager.sessions)
    counts: dict[tuple[str, str], int] = defaultdict(int)
    least: dict[str, float] = {}
    kinds = named_kinds(sessions)
    for session in sessions:
        label = slo_class(session.state.slo)
        kind = session.listener.kind
        counts[label, kind if kind in kinds else OTHER] += 1
        slack_ms = _slack_ms(session, now_ms)
        if slack_ms is not None:
            least[label] = min(least.get(label, math.inf), slack_ms)
    metrics.open_sessions.clear()
    metrics.slack.clear()
    for labels, count in counts.items():
        metrics.open_sessions.labels(*labels).set(count)
    for label, slack_ms in least.items():
        metrics.slack.labels(label).set(slack_ms / 1000.0)


def _slack_ms(session: ServerSession, now_ms: float) -> float | None:
    """Time left until the session's next token is due; ``None`` without an SLO or a deadline."""
    tracker = session.state.slo_tracker
    if tracker.slo.best_effort and tracker.slo.ttft_ms is None:
        return None
    slack_ms = tracker.deadline_ms - now_ms
    return slack_ms if math.isfinite(slack_ms) else None


def _steps(seen: int, first: int, records: Sequence[StepRecord]) -> dict[str, Any]:
    every = -(-len(records) // MAX_STEPS) or 1
    # The newest step is always among them.
    skip = (len(records) - 1) % every if records else 0
    kept = records[skip::every]
    return {
        "first": first,
        "next": seen,
        "every": every,
        "number": list(range(first + skip, first + len(records), every)),
        "at_ms": [round(one.at_ms, 1) for one in kept],
        "predicted_ms": [round(one.predicted_ms, 2) for one in kept],
        "bound_ms": [round(one.bound_ms, 2) for one in kept],
        "actual_ms": [round(one.actual_ms, 2) for one in kept],
        "prefill_tokens": [one.prefill_tokens for one in kept],
        "draft_tokens": [one.draft_tokens for one in kept],
        "own_tokens": [one.own_tokens for one in kept],
        "committed": [one.committed for one in kept],
    }


def _classes(
    server: VerificationServer, sessions: Sequence[ServerSession], slacks: Sequence[float | None]
) -> list[dict[str, Any]]:
    """Each SLO class: open sessions, the least slack, ended sessions that met and missed it."""
    found: dict[str, dict[str, Any]] = {}

    def entry(label: str) -> dict[str, Any]:
        empty = {"class": label, "open": 0, "slack_ms": None, "met": 0, "missed": 0, "unreachable": 0}
        return found.setdefault(label, empty)

    now_ms = server.now_ms()
    for session, slack_ms in zip(sessions, slacks, strict=True):
        mine = entry(slo_class(session.state.slo))
        mine["open"] += 1
        if slack_ms is not None:
            if mine["slack_ms"] is None or slack_ms < mine["slack_ms"]:
                mine["slack_ms"] = round(slack_ms)
            state = session.state
            unreachable_ms = state.slo_tracker.slo_unreachable_from_ms(state.tokens_left, state.floor_ms)
            mine["unreachable"] += now_ms >= unreachable_ms
    for label, (met, missed) in server.metrics.attainment.items():
        entry(label).update(met=met, missed=missed)
    unpaced = ("ttft", "none", OTHER)
    last = math.inf
    return sorted(found.values(), key=lambda one: last if one["class"] in unpaced else float(one["class"]))


def _drafts(ended: DraftCounters, sessions: Sequence[ServerSession]) -> dict[str, Any]:
    """What became of all drafts since the start."""
    total = DraftCounters()
    total.add(ended)
    for session in sessions:
        total.add(session.state.counters)
    return draft_counts(total)


def _session_columns(
    sessions: Sequence[ServerSession], slacks: Sequence[float | None]
) -> dict[str, list[Any]]:
    """The sessions with the least slack."""
    order = sorted(
        range(len(sessions)), key=lambda i: math.inf if (slack_ms := slacks[i]) is None else slack_ms
    )[:MAX_SESSIONS]
    shown = [sessions[i] for i in order]
    states = [one.state for one in shown]
    return {
        "session": [one.name for one in shown],
        "kind": [one.listener.kind for one in shown],
        "class": [slo_class(state.slo) for state in states],
        "slack_ms": [None if (slack_ms := slacks[i]) is None else round(slack_ms) for i in order],
        "generated": [state.generated for state in states],
        "context": [state.committed_len for state in states],
        "pending": [len(state.pending_drafts) for state in states],
        "drafted": [state.counters.drafted for state in states],
        "accepted": [state.counters.accepted for state in states],
        "state": [_phase(one) for one in shown],
    }


def _phase(session: ServerSession) -> str:
    if not session.opened:
        return "opening"
    return "prefill" if session.state.prompt_left else "decode"
