"""The draft tree of a plan's cell, where it beats the best chain by the same arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from wispprof.artifacts.plan import DraftRow
from wispprof.planning.draft_table import SpeedCurve
from wispprof.planning.session_speed import LoadedStepTimes
from wispprof.policies.tree_shapes import best_shape, best_stream_shape
from wispprof.simulation.devices import DeviceProfile


def with_tree(
    row: DraftRow,
    rates: Sequence[float],
    device: DeviceProfile,
    cell: SpeedCurve,
    times: LoadedStepTimes,
) -> DraftRow:
    """The row with a tree if it is faster, else as it is.

    ``rates``: P(the target takes the draft's candidate of rank r); none without ranks in the trace. A device
    whose nodes were not timed drafts chains, as does a cell in which drafts do not pay, or in which a row of
    the server costs more than the likeliest sibling wins.
    """
    if not row.k or len(rates) < 2 or device.node_ms is None:
        return row
    speed, draft_ms = cell.mean[row.k], cell.draft_ms

    def forward_ms(nodes: int) -> float:
        return device.forward_ms(times.cached, nodes)

    if row.mode == "stream":
        # The cost of a row: what the server would commit elsewhere in its time.
        row_tokens = speed.server_tokens_per_ms * cell.row_ms[row.k]
        if row_tokens >= rates[1]:
            return row
        shape = best_stream_shape(rates, forward_ms, row.rtt_ms + speed.step_ms, draft_ms=draft_ms)
    else:
        items = max(1.0, speed.items)
        waiting = max(1.0, (row.round_ms - row.k * draft_ms - row.rtt_ms) / max(speed.step_ms, 1e-6))
        shape = best_shape(
            rates,
            forward_ms,
            row.rtt_ms + cell.resume_ms,
            lambda rows: waiting * times.p50_ms(items, rows),
            draft_ms=draft_ms,
        ).shape
    if shape is None or shape.beams == 1:
        return row
    return replace(row, nodes=shape.nodes, depth=shape.depth, width=shape.width, beams=shape.beams)
