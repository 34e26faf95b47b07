"""Export a plan for other tools.

*csv*: the draft-length table, one row per cell, columns as the fields of ``DraftRow``.

*vllm*: JSON for vLLM's ``--speculative-config`` (dynamic speculative decoding):
``num_speculative_tokens`` and ``num_speculative_tokens_per_batch_size``, a list of inclusive
``[from, to, k]`` over concurrent sessions. ``method`` and ``model`` are the user's to add. Released
versions know no context: the schedule is that of one, see :func:`export`.
Source: vLLM docs, features/speculative_decoding/dynamic_speculative_decoding.

*vllm-context*: the same for all contexts of the plan, as lists of
``[from, to, context from, context to, k]``. For builds of vLLM with pull request 48944 (open in September
2026); others refuse it.

*sglang*: JSON for SGLang's ``--speculative-dspark-sps-table-path``: ``sample_batch_tokens`` (rising),
``sample_steps_per_sec`` (falling) and ``max_batch_tokens``: steps per second by the number of tokens
in a verify step of one context; SGLang's table has no other axis. Source: SGLang, ``SpsCostTable`` of its
DSpark planner.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from dataclasses import asdict, fields

from wispprof.artifacts.plan import DraftRow, Plan
from wispprof.errors import PlanError, suggestion

FORMATS = ("csv", "vllm", "vllm-context", "sglang")
_MAX_LENGTH = 2**31 - 1
"""End of the last range of contexts."""


def export(
    plan: Plan,
    form: str,
    device: str | None = None,
    rtt_ms: float = 0.0,
    tokens_per_s: float | None = None,
    mode: str = "round",
    context: int | None = None,
) -> str:
    """The plan as text. Formats without these dimensions get the rows of ``device``, ``rtt_ms``,
    ``tokens_per_s``, ``mode`` and ``context``. Raises :class:`PlanError` on an unknown format."""
    if form == "csv":
        return _csv(plan)
    if form not in FORMATS:
        raise PlanError(f"Unknown export format {form!r}.", suggestion(form, FORMATS))
    device = device or plan.devices[0]
    if device not in plan.devices:
        raise PlanError(f"The plan has no device {device!r}.", f"It has {', '.join(plan.devices)}.")
    speed = tokens_per_s if tokens_per_s is not None else plan.slo_classes[0]
    if form == "vllm-context":
        tables = [_levels(plan.at_context(c), device, rtt_ms, speed, mode) for c in plan.contexts]
        return _vllm_contexts(plan.contexts, tables)
    one = plan.at_context(plan.nearest_context(context))
    rows = _levels(one, device, rtt_ms, speed, mode)
    return _vllm(rows) if form == "vllm" else _sglang(one, rows)


def _levels(
    plan: Plan, device: str, rtt_ms: float, tokens_per_s: float, mode: str
) -> list[tuple[int, DraftRow]]:
    """Sessions and row of each load level of a plan of one context, rising."""
    levels = sorted({b.load_level: b.sessions for b in plan.batch}.items())
    return [(n, plan.draft_row(device, rtt_ms, level, tokens_per_s, mode)) for level, n in levels]


def _csv(plan: Plan) -> str:
    names = [f.name for f in fields(DraftRow)]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in plan.draft:
        values = asdict(row)
        for name in [name for name in names if name.endswith("by_k")]:
            values[name] = " ".join(f"{v:.4g}" for v in values[name])
        writer.writerow(values)
    return text.getvalue()


def _ranges(rows: list[tuple[int, DraftRow]]) -> list[list[int]]:
    """``[from, to, k]``: each level reaches up to the next one's sessions; equal neighbours are joined."""
    ranges: list[list[int]] = []
    for place, (sessions, row) in enumerate(rows):
        begin = 1 if place == 0 else sessions
        end = rows[place + 1][0] - 1 if place + 1 < len(rows) else max(2 * sessions, 1024)
        if end < begin:
            continue
        if ranges and ranges[-1][2] == row.k:
            ranges[-1][1] = end
        else:
            ranges.append([begin, end, row.k])
    return ranges


def _vllm(rows: list[tuple[int, DraftRow]]) -> str:
    return _vllm_config(_ranges(rows))


def _vllm_contexts(contexts: tuple[int, ...], tables: list[list[tuple[int, DraftRow]]]) -> str:
    """A context reaches from and to where its neighbour is as near by ratio."""
    bounds = [0, *(math.isqrt(a * b) for a, b in itertools.pairwise(contexts)), _MAX_LENGTH]
    ranges = [
        [begin, end, low + bool(low), high, k]
        for (low, high), rows in zip(itertools.pairwise(bounds), tables, strict=True)
        for begin, end, k in _ranges(rows)
    ]
    return _vllm_config(ranges)


def _vllm_config(ranges: list[list[int]]) -> str:
    most = max((entry[-1] for entry in ranges), default=0)
    config = {"num_speculative_tokens": max(1, most), "num_speculative_tokens_per_batch_size": ranges}
    return json.dumps(config, indent=1) + "\n"


def _sglang(plan: Plan, rows: list[tuple[int, DraftRow]]) -> str:
    """Steps per second at the token counts for which the plan priced a step."""
    points: dict[int, float] = {}
    for sessions, row in rows:
        tokens = max(1, round(sessions * (1 + row.k))) if row.mode == "round" else sessions
        points[tokens] = max(points.get(tokens, 0.0), 1000.0 / row.step_ms)
    samples = sorted(points.items())
    falling: list[tuple[int, float]] = []
    for tokens, rate in samples:
        if not falling or rate < falling[-1][1]:
            falling.append((tokens, rate))
    budget = max([b.token_budget for b in plan.batch] + [falling[-1][0]])
    table = {
        "sample_batch_tokens": [t for t, _ in falling],
        "sample_steps_per_sec": [round(r, 4) for _, r in falling],
        "max_batch_tokens": budget,
    }
    return json.dumps(table, indent=1) + "\n"
