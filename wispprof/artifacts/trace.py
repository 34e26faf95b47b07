"""Acceptance traces on disk: a header line, then one sealed line per path. Exact round trip.

Features are float32 and written with the fewest digits that give the same float32 back.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from wispprof.artifacts import files
from wispprof.artifacts.document import check_schema
from wispprof.artifacts.rows import AcceptanceTrace, TracePath, open_line, seal_line, seal_text
from wispprof.errors import ArtifactDamaged
from wispprof.types import Sampling

__all__ = ["TRACE_SCHEMA", "load_trace", "save_trace", "trace_hash"]

TRACE_SCHEMA = 1
FORMAT = "wispprof/trace"
FEATURES = 4


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
    """Read and check a trace.

    Raises :class:`ArtifactMissing`, :class:`ArtifactTooNew`, or :class:`ArtifactDamaged` naming line
    and fault.
    """
    path = Path(path)
    data = files.read_bytes(path, "acceptance trace", "Make one with: wispprof trace.")
    lines = data.splitlines(keepends=True)
    if not lines or not lines[0].startswith(b'{"format":"wispprof/trace"'):
        raise ArtifactDamaged(f"{path} is not an acceptance trace.", "Name a trace file.")
    header = open_line(lines[0], f"{path} line 1")
    check_schema(path, "trace", header.get("schema"), TRACE_SCHEMA)
    paths: list[TracePath] = []
    for number, line in enumerate(lines[1:], start=2):
        where = f"{path} line {number}"
        if not line.endswith(b"\n"):
            raise _damaged(where, "the line is torn (it has no end)")
        paths.append(_path(open_line(line, where), where))
    if len(paths) != header.get("paths"):
        raise _damaged(
            f"{path} line {len(lines)}",
            f"the file ends here with {len(paths)} paths, its header says {header.get('paths')}",
        )
    if files.content_hash(b"".join(lines[1:])) != header.get("hash"):
        raise _damaged(
            str(path), "every line is whole, but they are not the lines that were written"
        )
    try:
        return AcceptanceTrace(
            target=str(header["target"]),
            draft=str(header["draft"]),
            tokenizer_hash=str(header["tokenizer_hash"]),
            sampling=Sampling(**header["sampling"]),
            paths=tuple(paths),
            meta=dict(header["meta"]),
        )
    except (KeyError, TypeError, ValueError) as err:
        raise _damaged(f"{path} line 1", f"bad header: {err!r}") from None


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
    text = json.dumps(head, separators=(",", ":"))
    return seal_text(f'{text[:-1]},"features":[{numbers}]}}')


def _path(body: dict[str, Any], where: str) -> TracePath:
    try:
        path = tuple(_token(t) for t in body["path"])
        m, depth = len(path), int(body["depth"])
        drafts = np.array(body["drafts"], dtype=np.int32).reshape(m, depth)
        features = np.array(body["features"], dtype=np.float32).reshape(m, depth, FEATURES)
        accepted = np.array(body["accepted"], dtype=np.int32).reshape(m)
        if not np.isfinite(features).all():
            raise ValueError("'features' are not finite")
        if m and (accepted.min() < 0 or accepted.max() > depth):
            raise ValueError("'accepted' is outside 0 … depth")
        prompt = tuple(_token(t) for t in body["prompt"])
    except KeyError as err:
        raise _damaged(where, f"the path has no {err.args[0]!r}") from None
    except (ValueError, TypeError, OverflowError) as err:
        raise _damaged(where, str(err)) from None
    return TracePath(prompt, path, drafts, features, accepted)


def _token(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{value!r} is not a token id")
    return value


def _damaged(where: str, err: str) -> ArtifactDamaged:
    return ArtifactDamaged(f"{where}: {err}.", "Restore the file or take the trace anew.")
