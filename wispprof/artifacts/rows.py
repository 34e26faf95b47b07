"""What a profile and an acceptance trace are made of. How they lie on disk is ``store``'s business.

A profile is a list of keyed rows and one manifest. Every row keeps its raw samples; aggregation is
done late, by whoever reads.

Rows of a profile as lines of JSON. Each line carries a checksum, so a fault has a line number.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from wispprof.artifacts import files
from wispprof.errors import ArtifactDamaged
from wispprof.types import BatchShape, DraftFeatures, Sampling, VerifyItem

__all__ = [
    "EDGE_KINDS",
    "LINK_KINDS",
    "STEP_KINDS",
    "AcceptanceTrace",
    "EdgeRow",
    "LinkRow",
    "Row",
    "StepRow",
    "TracePath",
    "decode_row",
    "encode_row",
]


@dataclass(frozen=True, slots=True)
class StepRow:
    """Times of one batch shape on the verifier engine.

    ``kind``: ``verify`` (pending tokens and drafts), ``prefill`` (prompt chunks alone), ``mixed``
    (both), ``sentinel`` (the shape repeated through the sweep to show drift).
    ``flags`` mark rows that a reader should distrust: ``drift``, ``noisy``, ``throttled``.
    ``padded_tokens``: tokens the step really computed (graph bucket), 0 where it is not padded.
    ``source``: ``measured``, or ``published`` with ``citation``.
    ``blocks``: of each visit of the sweep to this shape, in turn, its place in the order of measurement
    and how many of ``samples_ms`` it gave; empty for a single visit. ``set_aside_ms``: samples taken
    beside a sentinel that was off, where enough others remained to do without them; ``set_aside_blocks``:
    their visits.
    """

    key: str
    kind: str
    shape: BatchShape
    samples_ms: tuple[float, ...]
    flags: tuple[str, ...] = ()
    padded_tokens: int = 0
    order: int = 0
    source: str = "measured"
    citation: str = ""
    blocks: tuple[tuple[int, int], ...] = ()
    set_aside_ms: tuple[float, ...] = ()
    set_aside_blocks: tuple[tuple[int, int], ...] = ()

    @property
    def median_ms(self) -> float:
        return statistics.median(self.samples_ms)


@dataclass(frozen=True, slots=True)
class EdgeRow:
    """One measurement on an edge device.

    ``kind``: ``draft_step`` (one token over ``context`` cached, features included), ``catch_up`` (the same
    where ``tokens`` must be read first, as after a round of which everything was accepted), ``round``
    (``tokens`` drafted one after the other by a device that did nothing for ``rested_ms`` before; the rest
    is not in the samples), ``forward`` (the bare forward of a step), ``prefill`` (``tokens`` at once over
    ``context``), ``controller`` (deciding once), ``burst`` and ``sustained`` (a drafted token within a short
    and a long window), ``energy`` (``energy_j`` per drafted token; ``None`` where there is no sensor).
    ``blocks``, ``set_aside_ms`` and ``set_aside_blocks`` as in :class:`StepRow`.
    """

    key: str
    kind: str
    context: int
    samples_ms: tuple[float, ...]
    tokens: int = 1
    energy_j: float | None = None
    temperature_c: float | None = None
    flags: tuple[str, ...] = ()
    order: int = 0
    source: str = "measured"
    citation: str = ""
    blocks: tuple[tuple[int, int], ...] = ()
    set_aside_ms: tuple[float, ...] = ()
    set_aside_blocks: tuple[tuple[int, int], ...] = ()
    rested_ms: float = 0.0

    @property
    def median_ms(self) -> float:
        return statistics.median(self.samples_ms)


@dataclass(frozen=True, slots=True)
class LinkRow:
    """Transfers between an edge and a server, in the wire's own frames.

    ``kind``: ``rtt`` (a small frame there and back), ``uplink`` and ``downlink`` (``payload_bytes`` one
    way, a small frame back; the samples hold the whole exchange).
    """

    key: str
    kind: str
    payload_bytes: int
    samples_ms: tuple[float, ...]
    flags: tuple[str, ...] = ()
    order: int = 0
    source: str = "measured"
    citation: str = ""

    @property
    def median_ms(self) -> float:
        return statistics.median(self.samples_ms)


@dataclass(frozen=True, slots=True)
class TracePath:
    """One held-out prompt, the target's own path from it, and the draft's view at every position.

    With ``n = len(prompt)`` and ``m = len(path)``: row ``i`` of ``drafts`` (m, K) holds what the draft
    proposes for positions ``n + i … n + i + K - 1`` given the prompt and ``path[:i]``; ``features``
    (m, K, 4) are those of :class:`~wispprof.types.DraftFeatures`; ``accepted`` (m,) is the length of
    the proposal's prefix that equals the path (proposals past the end of the path are not counted,
    so rows with ``i + K > m`` are censored).
    """

    prompt: tuple[int, ...]
    path: tuple[int, ...]
    drafts: np.ndarray
    features: np.ndarray
    accepted: np.ndarray

    @property
    def depth(self) -> int:
        """K: how many tokens were drafted at each position."""
        return int(self.drafts.shape[1])

    def features_at(self, position: int, depth: int) -> DraftFeatures:
        return DraftFeatures(*(float(v) for v in self.features[position, depth]))

    def scored_rows(self) -> int:
        """Number of leading rows whose ``accepted`` is not censored by the end of the path."""
        return max(0, len(self.path) - self.depth)


@dataclass(frozen=True)
class AcceptanceTrace:
    """Paths of one draft-target pair under one sampling setting.

    Its three uses: it trains rejection predictors, drives the simulator, and lets a replay edge propose
    what the real draft would. Hashes identify the tokenizer and models it was taken with.
    """

    target: str
    draft: str
    tokenizer_hash: str
    sampling: Sampling
    paths: tuple[TracePath, ...]
    meta: dict[str, object] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        return self.paths[0].depth

    def cum_acceptance_by_position(self) -> np.ndarray:
        """Share of proposals whose first j+1 tokens were all accepted, (K,), uncensored rows only."""
        counts = np.concatenate([p.accepted[: p.scored_rows()] for p in self.paths])
        return np.array([(counts > j).mean() if len(counts) else np.nan for j in range(self.depth)])


Row = StepRow | EdgeRow | LinkRow

STEP_KINDS = ("verify", "prefill", "mixed", "sentinel")
EDGE_KINDS = (
    "draft_step",
    "catch_up",
    "round",
    "forward",
    "prefill",
    "controller",
    "burst",
    "sustained",
    "energy",
    "sentinel",
)
LINK_KINDS = ("rtt", "uplink", "downlink")

_MOST_ITEMS = 1 << 16


def encode_row(row: Row) -> bytes:
    """One row as one line, newline included. Raises ValueError for NaN and infinities."""
    body: dict[str, Any] = {"key": row.key, "kind": row.kind}
    if isinstance(row, StepRow):
        body["items"] = _runs(row.shape)
        if row.padded_tokens:
            body["padded"] = row.padded_tokens
    elif isinstance(row, EdgeRow):
        body["context"], body["tokens"] = row.context, row.tokens
        if row.energy_j is not None:
            body["energy_j"] = row.energy_j
        if row.temperature_c is not None:
            body["temperature_c"] = row.temperature_c
        if row.rested_ms:
            body["rested_ms"] = row.rested_ms
    else:
        body["bytes"] = row.payload_bytes
    body["ms"] = row.samples_ms
    body["order"] = row.order
    if not isinstance(row, LinkRow):
        if row.blocks:
            body["blocks"] = row.blocks
        if row.set_aside_ms:
            body["set_aside_ms"] = row.set_aside_ms
        if row.set_aside_blocks:
            body["set_aside_blocks"] = row.set_aside_blocks
    if row.flags:
        body["flags"] = row.flags
    if row.source != "measured":
        body["source"], body["citation"] = row.source, row.citation
    return seal_line(body)


def seal_line(body: dict[str, Any]) -> bytes:
    """A JSON object as one line that ends in its own checksum."""
    text = json.dumps(
        body, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=files.plain
    )
    return seal_text(text)


def seal_text(text: str) -> bytes:
    """The text of a JSON object, with its checksum put before the closing brace, as one line."""
    return f'{text[:-1]},"sum":"{_sum(text)}"}}\n'.encode()


def open_line(line: bytes, where: str) -> dict[str, Any]:
    """The object of a sealed line; raises :class:`ArtifactDamaged` naming ``where`` and the fault."""
    text = line.rstrip(b"\r\n")
    body, mark, rest = text.rpartition(b',"sum":"')
    if not mark or len(rest) != 10 or not text.endswith(b'"}'):
        files.parse_json(text, where)  # names the column where the line is torn
        raise _damaged(where, "the line has no checksum")
    try:
        content = (body + b"}").decode()
    except UnicodeDecodeError:
        raise _damaged(where, "the line is not UTF-8 text") from None
    if _sum(content).encode() != rest[:8]:
        raise _damaged(where, "the line was changed after it was written (checksum differs)")
    value = files.parse_json(content.encode(), where)
    if not isinstance(value, dict):
        raise _damaged(where, "the line is not a JSON object")
    return value


def decode_row(line: bytes, profile: str, where: str) -> Row:
    """One line of a ``server``, ``edge`` or ``link`` profile; errors name ``where`` and the fault."""
    body = open_line(line, where)
    try:
        common: dict[str, Any] = {
            "key": _text(body["key"]),
            "samples_ms": _samples(body["ms"]),
            "flags": tuple(_text(flag) for flag in body.get("flags", ())),
            "order": _count(body["order"]),
            "source": _text(body.get("source", "measured")),
            "citation": _text(body.get("citation", "")),
        }
        kind = _text(body["kind"])
        if common["source"] not in ("measured", "published", "imported"):
            raise ValueError(f"unknown source {common['source']!r}")
        if common["source"] != "measured" and not common["citation"]:
            raise ValueError(f"a {common['source']} row needs its citation")
        if profile != "link":
            aside = body.get("set_aside_ms")
            common["set_aside_ms"] = () if aside is None else _samples(aside, "set_aside_ms")
            for blocks, samples in (("blocks", "samples_ms"), ("set_aside_blocks", "set_aside_ms")):
                common[blocks] = _visits(body.get(blocks), len(common[samples]), blocks)
        if profile == "server":
            _known(kind, STEP_KINDS)
            return StepRow(
                kind=kind,
                shape=_shape(body["items"]),
                padded_tokens=_count(body.get("padded", 0)),
                **common,
            )
        if profile == "edge":
            _known(kind, EDGE_KINDS)
            return EdgeRow(
                kind=kind,
                context=_count(body["context"]),
                tokens=_count(body["tokens"]),
                energy_j=_optional(body.get("energy_j")),
                temperature_c=_optional(body.get("temperature_c")),
                rested_ms=_number(body.get("rested_ms", 0.0)),
                **common,
            )
        _known(kind, LINK_KINDS)
        return LinkRow(kind=kind, payload_bytes=_count(body["bytes"]), **common)
    except KeyError as err:
        raise _damaged(where, f"the row has no {err.args[0]!r}") from None
    except (ValueError, TypeError, OverflowError) as err:
        raise _damaged(where, str(err)) from None


def _sum(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def _damaged(where: str, err: str) -> ArtifactDamaged:
    return ArtifactDamaged(f"{where}: {err}.", "Restore the file or measure it anew.")


def _runs(shape: BatchShape) -> list[list[int]]:
    """Items as ``[count, new, cached, prefill]``, equal neighbours together; order is kept."""
    runs: list[list[int]] = []
    for item in shape.items:
        entry = [item.new, item.cached, int(item.prefill)]
        if runs and runs[-1][1:] == entry:
            runs[-1][0] += 1
        else:
            runs.append([1, *entry])
    return runs


def _shape(runs: object) -> BatchShape:
    if not isinstance(runs, list):
        raise ValueError("'items' is not a list")
    items: list[VerifyItem] = []
    for run in runs:
        if not isinstance(run, list) or len(run) != 4:
            raise ValueError("an entry of 'items' is not [count, new, cached, prefill]")
        count, new, cached, prefill = (_count(value) for value in run)
        if not 0 < count <= _MOST_ITEMS - len(items) or new < 1 or prefill > 1:
            raise ValueError(f"impossible entry of 'items': {run}")
        items += [VerifyItem(new, cached, bool(prefill))] * count
    if not items:
        raise ValueError("the shape has no items")
    return BatchShape(tuple(items))


def _samples(values: object, name: str = "ms") -> tuple[float, ...]:
    if not isinstance(values, list) or not values:
        raise ValueError(f"{name!r} holds no samples")
    return tuple(_number(value) for value in values)


def _visits(values: object, samples: int, name: str) -> tuple[tuple[int, int], ...]:
    if values is None:
        return ()
    if not isinstance(values, list) or not all(isinstance(v, list) and len(v) == 2 for v in values):
        raise ValueError(f"an entry of {name!r} is not [order, samples]")
    blocks = tuple((_count(order), _count(count)) for order, count in values)
    counts = [count for _, count in blocks]
    if sum(counts) != samples or 0 in counts:
        raise ValueError(f"{name!r} gives {sum(counts)} samples, the row holds {samples}")
    return blocks


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is not a number")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{value!r} is not a finite number >= 0")
    return float(value)


def _optional(value: object) -> float | None:
    return None if value is None else _number(value)


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is not a whole number >= 0")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a string")
    return value


def _known(kind: str, kinds: Sequence[str]) -> None:
    if kind not in kinds:
        raise ValueError(f"unknown kind {kind!r}")
