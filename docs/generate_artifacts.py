"""Write docs/artifacts.md from the records: ``python docs/generate_artifacts.py``.

The project's own writers make the example lines, the records give the fields, and a test compares the page
with the output of this script.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import tempfile
import textwrap
import typing
from pathlib import Path
from typing import Any

import numpy as np

from wispprof.artifacts import Document, LinkRow, StepRow, save_trace, write_document
from wispprof.artifacts.document import SCHEMA
from wispprof.artifacts.fleet_answer import FleetAnswer
from wispprof.artifacts.manifest import PROFILE_SCHEMA, Manifest, Provenance
from wispprof.artifacts.plan import Plan
from wispprof.artifacts.rows import AcceptanceTrace, EdgeRow, TracePath, encode_row
from wispprof.artifacts.trace import TRACE_SCHEMA
from wispprof.artifacts.workload import SeenTraffic
from wispprof.types import BatchShape, ModelInfo, Sampling

PAGE = Path(__file__).with_name("artifacts.md")

HEAD = f"""# Artifacts on disk

Made by `python docs/generate_artifacts.py` from the records in `wispprof/artifacts/`. Schemas: profile
{PROFILE_SCHEMA}, trace {TRACE_SCHEMA}, documents {SCHEMA}.

All files share these rules:

- **Text.** JSON in UTF-8, without NaN and infinities. Nothing is pickled.
- **Atomic.** A file is written beside its place, flushed to the disk and renamed.
- **Versioned.** A file of another schema is refused: a later one with "Upgrade wispprof", an earlier one with
  the command that makes it anew. Readers ignore unknown names, so a schema may gain fields.
- **Hashed.** `blake2b:` and 32 hex digits (16 bytes) over the content: a document's payload (keys sorted, no
  spaces), a profile's rows as written, a trace's paths. Provenance is not hashed: the same result made twice
  has the same hash. A hash names inputs and guards against accidents; it is not a signature.
- **Sealed lines.** Rows and paths end with `sum`, a checksum of the line, so damage has a line number.
- **Strict.** A reader returns a file's content or raises `ArtifactMissing`, `ArtifactDamaged`,
  `ArtifactTooNew` or `ArtifactTooOld`. Each message says what to do. `tests/robustness` mutates every kind of
  file to check this.

Provenance holds the command that made a file, the time, and library versions. Values of options that carry
keys are written as `***`.
"""

ESTIMATOR = """An estimator's payload holds its step-time model (`kind` and `step_model`), the box of shapes
that was measured (`domain`), the bound's factors with their coverage, and the report of its held-out
evaluation. A predictor's payload holds its kind, its scorer and its calibration. If its traces record the
draft's candidates, `candidates` holds the model of those after the first.
"""

ARRAYS = {
    ("TracePath", "drafts"): "int (m, K)",
    ("TracePath", "features"): "float (m, K, 4)",
    ("TracePath", "accepted"): "int (m,)",
    ("TracePath", "target_ranks"): "int (m,) or none",
    ("TracePath", "candidate_probs"): "float (m, W) or none",
}
BOUNDS = {
    "NonNegative": "float ≥ 0",
    "Positive": "int ≥ 1",
    "Count": "int ≥ 0",
    "Samples": "tuple[float ≥ 0, ...], not empty",
    "Blocks": "tuple[tuple[int ≥ 0, int ≥ 1], ...]",
    "Source": "str",
    "StepKind": "str",
    "EdgeKind": "str",
    "LinkKind": "str",
    "ProfileKind": "str",
}


def render() -> str:
    """The page as Markdown."""
    step = StepRow("v0001", "verify", BatchShape.of([(5, 128), (5, 128), (1, 640)]), (8.25, 8.5))
    link = LinkRow("rtt-32", "rtt", 32, (5.25, 5.5))
    parts = [
        HEAD,
        "## Profile: `NAME.jsonl` and `NAME.manifest.json`\n",
        "One row a line; defaults are left out. The shape is stored as `items`: runs of equal items, "
        "`[count, new, cached, prefill]`.\n",
        _code(encode_row(step).decode() + encode_row(link).decode()),
        _table(StepRow),
        _table(EdgeRow),
        _table(LinkRow),
        "The manifest is one JSON object of these, with `format` `wispprof/profile` and `schema`.\n",
        _table(Manifest),
        _table(ModelInfo),
        "## Acceptance trace: `NAME.jsonl`\n",
        "A header line, then one sealed line per path; arrays lie flat, row by row.\n",
        _code(_trace_lines()),
        _table(AcceptanceTrace),
        _table(TracePath),
        "## Documents: estimator, predictor, plan, bench, answer, fleet, workload\n",
        "One JSON object; only `payload` depends on the kind.\n",
        _code(_document()),
        _table(Document),
        _table(Provenance),
        ESTIMATOR,
        "### Payload of a plan\n",
        _table(Plan),
        *(_table(kind) for kind in _rows_of(Plan)),
        "### Payload of a fleet's answer\n",
        _table(FleetAnswer),
        *(_table(kind) for kind in _rows_of(FleetAnswer)),
        "### Payload of a workload\n",
        _table(SeenTraffic),
        *(_table(kind) for kind in _rows_of(SeenTraffic)),
    ]
    return "\n".join(parts).rstrip() + "\n"


def _rows_of(kind: Any) -> list[Any]:
    """The records in the tuples of a record, in order."""
    found = typing.get_type_hints(kind).values()
    inner = [argument for hint in found for argument in typing.get_args(hint)]
    return [each for each in inner if dataclasses.is_dataclass(each)]


def _table(kind: Any) -> str:
    """A record: its docstring, then its fields."""
    text = " ".join(inspect.getdoc(kind).split())  # type: ignore[union-attr]
    text = re.sub(r":(\w+):`~?([^`]+)`", _reference, text).replace("``", "`")
    rows = [
        f"| `{field.name}` | {_type(kind, field)} | {_default(field)} |" for field in dataclasses.fields(kind)
    ]
    said = textwrap.fill(f"**{kind.__name__}.** {text}", 118, break_on_hyphens=False)
    lines = [
        said,
        "",
        "| field | type | default |",
        "|---|---|---|",
        *rows,
    ]
    return "\n".join([*lines, ""])


def _reference(match: re.Match[str]) -> str:
    """A role of the docstring as code: a method with its class, anything else by its name."""
    parts = match[2].split(".")
    return f"`{'.'.join(parts[-2:] if match[1] == 'meth' else parts[-1:])}`"


def _type(kind: Any, field: Any) -> str:
    plain = ARRAYS.get((kind.__name__, field.name), str(field.type))
    plain = re.sub(r"\b[A-Z]\w+", lambda name: BOUNDS.get(name[0], name[0]), plain)
    return plain.replace("|", "or").replace("Any", "any")


def _default(field: Any) -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{json.dumps(field.default)}`"
    return "empty" if field.default_factory is not dataclasses.MISSING else ""


def _code(text: str) -> str:
    return f"```json\n{text.rstrip()}\n```\n"


def _trace_lines() -> str:
    path = TracePath(
        prompt=(17, 4),
        path=(9, 31),
        drafts=np.array([[9], [30]], dtype=np.int32),
        features=np.array([[[0.75, 0.5, 1.5, 2.0]], [[0.5, 1.25, 0.25, 2.0]]], dtype=np.float32),
        accepted=np.array([1, 0], dtype=np.int32),
        target_ranks=np.array([0, 2], dtype=np.int32),
        candidate_probs=np.array([[0.75, 0.125], [0.5, 0.25]], dtype=np.float32),
    )
    trace = AcceptanceTrace("target", "draft", "5fc2c47ba1d9cbcb", Sampling(), (path,))
    with tempfile.TemporaryDirectory() as folder:
        save_trace(trace, Path(folder, "trace.jsonl"))
        return Path(folder, "trace.jsonl").read_text()


def _document() -> str:
    made = Provenance("wispprof fit …", "2026-01-01T00:00:00+00:00", {"wispprof": "…"})
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "estimator.json")
        write_document(file, "estimator", {"kind": "…"}, {"profile": "blake2b:…"}, made)
        return file.read_text()


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
