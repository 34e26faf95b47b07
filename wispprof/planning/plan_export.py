"""Export a plan for other tools.

*csv*: the draft-length table, one row per cell, columns as the fields of ``DraftRow``.

*vllm*: JSON for vLLM's ``--speculative-config`` (dynamic speculative decoding):
``num_speculative_tokens`` and ``num_speculative_tokens_per_batch_size``, a list of inclusive
``[from, to, k]`` over concurrent sessions. ``method`` and ``model`` are the user's to add.
Source: vLLM docs, features/speculative_decoding/dynamic_speculative_decoding.

*sglang*: JSON for SGLang's ``--speculative-dspark-sps-table-path``: ``sample_batch_tokens`` (rising),
``sample_steps_per_sec`` (falling) and ``max_batch_tokens``: steps per second by the number of tokens
in a verify step. Source: SGLang, ``SpsCostTable`` of its DSpark planner.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, fields

from wispprof.artifacts.plan import DraftRow, Plan
from wispprof.errors import PlanError, suggestion

FORMATS = ("csv", "vllm", "sglang")


def export(
    plan: Plan,
    form: str,
    device: str | None = None,
    rtt_ms: float = 0.0,
    tokens_per_s: float | None = None,
    mode: str = "round",
) -> str:
    """The plan as text. Formats without these dimensions get the rows of ``device``, ``rtt_ms``,
    ``tokens_per_s`` and ``mode``. Raises :class:`PlanError` on an unknown format."""
    if form == "csv":
        return _csv(plan)
    if form not in FORMATS:
        raise PlanError(f"Unknown export format {form!r}.", suggestion(form, FORMATS))
    device = device or plan.devices[0]
    if device not in plan.devices:
        raise PlanError(f"The plan has no device {device!r}.", f"It has {', '.join(plan.devices)}.")
    speed = tokens_per_s if tokens_per_s is not None else plan.slo_classes[0]
    levels = sorted({b.load_level: b.sessions for b in plan.batch}.items())
    rows = [(n, plan.draft_row(device, rtt_ms, level, speed, mode)) for level, n in levels]
    return _vllm(rows) if form == "vllm" else _sglang(plan, rows)


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


def _vllm(rows: list[tuple[int, DraftRow]]) -> str:
    """Each level reaches up to the next one's sessions; equal neighbours are joined."""
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
    most = max((k for _, _, k in ranges), default=0)
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
