"""Acceptance traces on disk: a header line, then one sealed line per path. Exact round trip.

Features are float32 and written with the fewest digits that give the same float32 back. Probabilities of
candidates are written as integers, in steps of :data:`PROB_STEP`; earlier traces have none.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from wispprof.artifacts import files
from wispprof.artifacts.document import check_schema
from wispprof.artifacts.rows import (
    REMEDY,
    AcceptanceTrace,
    Count,
    TracePath,
    damaged,
    open_line,
    seal_line,
    seal_text,
)
from wispprof.errors import ArtifactDamaged
from wispprof.types import Sampling

TRACE_SCHEMA = 1
FORMAT = "wispprof/trace"
FEATURES = 4
PROB_STEP = 1e-4


def trace_hash(trace: AcceptanceTrace) -> str:
    """Content hash of the paths: the name other artifacts know this trace by."""
    return files.content_hash(_body(trace))


def save_trace(trace: AcceptanceTrace, path: Path) -> str:
    """Write atomically; returns the content hash of the paths. All paths have the same depth."""
    body = _body(trace)
    digest = files.content_hash(body)
    header = {
        "format": FORMAT,
        "schema": TRACE_SCHEMA,
        "target": trace.target,
        "draft": trace.draft,
        "tokenizer_hash": trace.tokenizer_hash,
        "sampling": asdict(trace.sampling),
        "paths": len(trace.paths),
        "hash": digest,
        "meta": trace.meta,
    }
    files.write_atomic(Path(path), seal_line(header) + body)
    return digest


def load_trace(path: Path) -> AcceptanceTrace:
    """Read and check a trace. Raises the artifact errors; :class:`ArtifactDamaged` names line and fault."""
    path = Path(path)
    data = files.read_bytes(path, "acceptance trace", "Make one with: wispprof trace.")
    lines = data.splitlines(keepends=True)
    if not lines or not lines[0].startswith(b'{"format":"wispprof/trace"'):
        raise ArtifactDamaged(f"{path} is not an acceptance trace.", "Name a trace file.")
    opened = open_line(lines[0], f"{path} line 1")
    check_schema(path, "trace", opened.get("schema"), TRACE_SCHEMA)
    header: _Header = files.convert(opened, _Header, f"{path} line 1", REMEDY)
    paths: list[TracePath] = []
    for number, line in enumerate(lines[1:], start=2):
        where = f"{path} line {number}"
        if not line.endswith(b"\n"):
            raise damaged(where, "the line is torn (it has no end)")
        paths.append(_path(open_line(line, where), where))
    if len(paths) != header.paths:
        raise damaged(
            f"{path} line {len(lines)}",
            f"the file ends here with {len(paths)} paths, its header says {header.paths}",
        )
    if files.content_hash(b"".join(lines[1:])) != header.hash:
        raise damaged(str(path), "every line is whole, but they are not the lines that were written")
    pair = (header.target, header.draft, header.tokenizer_hash)
    return AcceptanceTrace(*pair, header.sampling, tuple(paths), header.meta)


@dataclass(frozen=True)
class _Header:
    target: str
    draft: str
    tokenizer_hash: str
    sampling: Sampling
    paths: int
    hash: str
    meta: dict[str, Any]


@dataclass(frozen=True)
class _PathLine:
    """Arrays lie flat, row by row."""

    prompt: tuple[int, ...]
    path: tuple[int, ...]
    depth: Count
    accepted: list[Count]
    drafts: list[int]
    features: list[float]
    target_ranks: list[Count] = field(default_factory=list)
    candidate_probs: list[Count] = field(default_factory=list)


def _body(trace: AcceptanceTrace) -> bytes:
    return b"".join(_line(path) for path in trace.paths)


def _line(path: TracePath) -> bytes:
    m, depth = path.drafts.shape
    if path.features.shape != (m, depth, FEATURES) or path.accepted.shape != (m,):
        raise ValueError("a trace path needs drafts (m, K), features (m, K, 4) and accepted (m,)")
    features = np.ascontiguousarray(path.features, dtype=np.float32)
    if not np.isfinite(features).all():
        raise ValueError("a trace path has features that are not finite")
    # str() of a float32 is its shortest exact form; numpy does it for the whole array at once.
    numbers = ",".join(features.reshape(-1).astype(str).tolist())
    head = {
        "prompt": [int(t) for t in path.prompt],
        "path": [int(t) for t in path.path],
        "depth": depth,
        "accepted": path.accepted.tolist(),
        "drafts": path.drafts.reshape(-1).tolist(),
    }
    if path.target_ranks is not None and path.candidate_probs is not None:
        if path.target_ranks.shape != (m,) or path.candidate_probs.shape[:1] != (m,):
            raise ValueError("a trace path needs target_ranks (m,) and candidate_probs (m, W)")
        head["target_ranks"] = path.target_ranks.tolist()
        probs = path.candidate_probs.reshape(-1).astype(np.float64)
        head["candidate_probs"] = np.rint(probs / PROB_STEP).astype(int).tolist()
    text = json.dumps(head, separators=(",", ":"))
    return seal_text(f'{text[:-1]},"features":[{numbers}]}}')


def _path(body: dict[str, Any], where: str) -> TracePath:
    line: _PathLine = files.convert(body, _PathLine, where, REMEDY)
    m, depth = len(line.path), line.depth
    try:
        drafts = np.array(line.drafts, dtype=np.int32).reshape(m, depth)
        with np.errstate(over="ignore"):  # infinity is refused below
            features = np.array(line.features, dtype=np.float32).reshape(m, depth, FEATURES)
        accepted = np.array(line.accepted, dtype=np.int32).reshape(m)
    except (ValueError, OverflowError) as err:
        raise damaged(where, str(err)) from None
    if not np.isfinite(features).all():
        raise damaged(where, "'features' are not finite")
    if m and accepted.max() > depth:
        raise damaged(where, "'accepted' is outside 0 … depth")
    ranks, probs = _candidates(line, where)
    return TracePath(line.prompt, line.path, drafts, features, accepted, ranks, probs)


def quantized(probs: np.ndarray) -> np.ndarray:
    """Probabilities as a trace file keeps them, float32."""
    return np.asarray(np.rint(probs.astype(np.float64) / PROB_STEP) * PROB_STEP, dtype=np.float32)


def _candidates(line: _PathLine, where: str) -> tuple[np.ndarray | None, np.ndarray | None]:
    if not line.target_ranks and not line.candidate_probs:
        return None, None
    m = len(line.path)
    ranks = np.array(line.target_ranks, dtype=np.int32)
    try:
        whole = np.array(line.candidate_probs, dtype=np.int64).reshape(m, -1)
    except (ValueError, OverflowError) as err:
        raise damaged(where, str(err)) from None
    if len(ranks) != m or not whole.size or whole.max() * PROB_STEP > 1 + PROB_STEP / 2:
        raise damaged(where, "'target_ranks' and 'candidate_probs' do not fit the path")
    if ranks.max() > whole.shape[1]:
        raise damaged(where, "'target_ranks' is outside 0 … W")
    return ranks, quantized(whole * PROB_STEP)
