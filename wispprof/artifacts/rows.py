"""Rows of profiles and paths of acceptance traces, and rows as lines of JSON.

A profile is a list of keyed rows and one manifest. Every row keeps its raw samples; readers aggregate.
Each line ends in a checksum, so damage has a line number.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import statistics
from dataclasses import MISSING, dataclass, field, fields
from typing import Annotated, Any

import numpy as np

from wispprof.artifacts import files
from wispprof.artifacts.files import Meta
from wispprof.errors import ArtifactDamaged
from wispprof.types import BatchShape, DraftFeatures, Sampling, VerifyItem

STEP_KINDS = ("verify", "prefill", "mixed", "sentinel")
EDGE_KINDS = (
    "draft_step",
    "catch_up",
    "round",
    "forward",
    "nodes",
    "prefill",
    "controller",
    "burst",
    "sustained",
    "energy",
    "sentinel",
)
LINK_KINDS = ("rtt", "uplink", "downlink")

Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
NonNegative = Annotated[float, Meta(ge=0)]
Samples = Annotated[tuple[NonNegative, ...], Meta(min_length=1)]
Blocks = tuple[tuple[Count, Positive], ...]
MODELLED = "modelled from measured operators"
Source = Annotated[str, Meta(pattern=f"^(measured|published|imported|{MODELLED})$")]
Origins = Annotated[tuple[NonNegative, ...], Meta(max_length=3)]
StepKind = Annotated[str, Meta(pattern=f"^({'|'.join(STEP_KINDS)})$")]
EdgeKind = Annotated[str, Meta(pattern=f"^({'|'.join(EDGE_KINDS)})$")]
LinkKind = Annotated[str, Meta(pattern=f"^({'|'.join(LINK_KINDS)})$")]

MAX_ITEMS = 1 << 16
Repeats = Annotated[int, Meta(ge=1, le=MAX_ITEMS)]
Flag = Annotated[int, Meta(ge=0, le=1)]
Runs = Annotated[list[tuple[Repeats, Positive, Count, Flag]], Meta(min_length=1)]


class _Timed:
    __slots__ = ()
    samples_ms: Samples

    @property
    def median_ms(self) -> float:
        return statistics.median(self.samples_ms)


@dataclass(frozen=True, slots=True)
class StepRow(_Timed):
    """Times of one batch shape on the verifier engine.

    ``kind``: ``verify`` (pending tokens and drafts), ``prefill`` (prompt chunks alone), ``mixed`` (both),
    ``sentinel`` (the reference workload, repeated through the sweep to show drift).
    ``flags`` mark rows to distrust: ``drift``, ``noisy``, ``throttled``. ``padded_tokens``: tokens that
    the step computed (graph bucket), 0 if it is not padded. ``source``: ``measured``, or ``published``,
    ``imported`` or ``modelled from measured operators`` with a ``citation``. ``origins`` of a modelled time:
    its shares from operators that were measured so, interpolated between measurements, and from formulas.
    ``blocks``: of each measurement block, its place in the order of measurement and its number of
    ``samples_ms``; empty for a single block. ``set_aside_ms``: samples taken while the sentinel was off,
    if enough others remained; ``set_aside_blocks``: their blocks.
    """

    key: str
    kind: StepKind
    shape: BatchShape
    samples_ms: Samples
    flags: tuple[str, ...] = ()
    padded_tokens: Count = 0
    order: Count = 0
    source: Source = "measured"
    citation: str = ""
    blocks: Blocks = ()
    set_aside_ms: tuple[NonNegative, ...] = ()
    set_aside_blocks: Blocks = ()
    origins: Origins = ()


@dataclass(frozen=True, slots=True)
class EdgeRow(_Timed):
    """One measurement on an edge device.

    ``kind``: ``draft_step`` (one token over ``context`` cached, features included), ``catch_up`` (the same
    after ``tokens`` were read first, as after a fully accepted round), ``round`` (``tokens`` drafted one by
    one by a device that was idle for ``rested_ms`` before; the rest is not in the samples), ``forward``
    (the bare forward pass of a step), ``nodes`` (``tokens`` nodes of a draft tree in one forward, and the
    candidates after each; none for a drafter of chains), ``prefill`` (``tokens`` at once over ``context``),
    ``controller`` (one decision), ``burst`` and ``sustained`` (a drafted token within a short and a long
    window), ``energy`` (``energy_j`` per drafted token; ``None`` without a sensor).
    ``blocks``, ``set_aside_ms`` and ``set_aside_blocks`` as in :class:`StepRow`.
    """

    key: str
    kind: EdgeKind
    context: Count
    samples_ms: Samples
    tokens: Count = 1
    energy_j: NonNegative | None = None
    temperature_c: NonNegative | None = None
    flags: tuple[str, ...] = ()
    order: Count = 0
    source: Source = "measured"
    citation: str = ""
    blocks: Blocks = ()
    set_aside_ms: tuple[NonNegative, ...] = ()
    set_aside_blocks: Blocks = ()
    rested_ms: NonNegative = 0.0


@dataclass(frozen=True, slots=True)
class LinkRow(_Timed):
    """Transfers between an edge and a server, in frames of the wire protocol.

    ``kind``: ``rtt`` (a small frame there and back), ``uplink`` and ``downlink`` (``payload_bytes`` one
    way, a small frame back; samples are of the whole exchange).
    """

    key: str
    kind: LinkKind
    payload_bytes: Count
    samples_ms: Samples
    flags: tuple[str, ...] = ()
    order: Count = 0
    source: Source = "measured"
    citation: str = ""


@dataclass(frozen=True, slots=True)
class TracePath:
    """One held-out prompt, the target's own path from it, and the draft's proposal at every position.

    With ``n = len(prompt)`` and ``m = len(path)``: row ``i`` of ``drafts`` (m, K) holds what the draft
    proposes for positions ``n + i … n + i + K - 1`` given the prompt and ``path[:i]``; ``features``
    (m, K, 4) are those of :class:`~wispprof.types.DraftFeatures`; ``accepted`` (m,) is the length of
    the proposal's prefix that equals the path (proposals past the end of the path are not counted,
    so rows with ``i + K > m`` are censored).

    For draft trees, if the draft is a model on PyTorch: ``candidate_probs`` (m, W) are the draft's
    probabilities of its first W candidates at each position, ranked by the position's noise;
    ``target_ranks`` (m,) is the rank of the path's token among them, W if it is not one of them. A node of a
    tree is accepted if its parent is and its rank is the target's.
    """

    prompt: tuple[int, ...]
    path: tuple[int, ...]
    drafts: np.ndarray
    features: np.ndarray
    accepted: np.ndarray
    target_ranks: np.ndarray | None = None
    candidate_probs: np.ndarray | None = None

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

    It trains rejection predictors, drives the simulator, and feeds the replay drafter.
    ``tokenizer_hash`` identifies the tokenizer it was taken with.
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
ROW_TYPES: dict[str, type[Row]] = {"server": StepRow, "edge": EdgeRow, "link": LinkRow}


def encode_row(row: Row) -> bytes:
    """One row as one line, newline included, without defaults. Raises ValueError for NaN and infinities."""
    body: dict[str, Any] = {}
    for each in fields(row):
        value = getattr(row, each.name)
        if each.name == "shape":
            body["items"] = _runs(value)
        elif each.default is MISSING or value != each.default:
            body[each.name] = value
    return seal_line(body)


def seal_line(body: dict[str, Any]) -> bytes:
    """A JSON object as one line that ends in its own checksum."""
    text = json.dumps(body, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=files.plain)
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
        raise damaged(where, "the line has no checksum")
    try:
        content = (body + b"}").decode()
    except UnicodeDecodeError:
        raise damaged(where, "the line is not UTF-8 text") from None
    if _sum(content).encode() != rest[:8]:
        raise damaged(where, "the line was changed after it was written (checksum differs)")
    value = files.parse_json(content.encode(), where)
    if not isinstance(value, dict):
        raise damaged(where, "the line is not a JSON object")
    return value


def decode_row(line: bytes, profile: str, where: str) -> Row:
    """One line of a ``server``, ``edge`` or ``link`` profile; errors name ``where`` and the fault."""
    body = open_line(line, where)
    if profile == "server":
        runs = files.convert(body.pop("items", None), Runs, f"{where}: items", REMEDY)
        body["shape"] = _shape(runs, where)
    row: Row = files.convert(body, ROW_TYPES[profile], where, REMEDY)
    if row.source != "measured" and not row.citation:
        raise damaged(where, f"a row of source {row.source!r} needs a citation")
    if not isinstance(row, LinkRow):
        for name, samples in (("blocks", row.samples_ms), ("set_aside_blocks", row.set_aside_ms)):
            blocks: Blocks = getattr(row, name)
            count = sum(count for _, count in blocks)
            if blocks and count != len(samples):
                raise damaged(where, f"{name!r} gives {count} samples, the row holds {len(samples)}")
    return row


REMEDY = "Restore the file or measure it anew."


def damaged(where: str, err: str) -> ArtifactDamaged:
    """A fault in a line of a profile or trace."""
    return ArtifactDamaged(f"{where}: {err}.", REMEDY)


def _sum(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def _runs(shape: BatchShape) -> list[list[int]]:
    """Items as ``[count, new, cached, prefill]``, equal neighbours together; order is kept."""
    return [
        [len(list(same)), item.new, item.cached, int(item.prefill)]
        for item, same in itertools.groupby(shape.items)
    ]


def _shape(runs: list[tuple[int, int, int, int]], where: str) -> BatchShape:
    if sum(count for count, *_ in runs) > MAX_ITEMS:
        raise damaged(where, f"'items' holds more than {MAX_ITEMS} items")
    items = [VerifyItem(new, cached, bool(prefill)) for _, new, cached, prefill in runs]
    counts = [count for count, *_ in runs]
    return BatchShape(tuple(i for item, n in zip(items, counts, strict=True) for i in (item,) * n))
