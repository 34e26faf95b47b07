"""One versioned JSON document: what estimators, predictors and plans are stored in.

On disk::

    {"format": "wispprof/estimator", "schema": 1, "hash": "blake2b:…",
     "inputs": {"profile": "blake2b:…"}, "provenance": {…}, "payload": {…}}

The hash covers the payload alone, so the same result made twice has the same hash.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wispprof.artifacts import files
from wispprof.artifacts.manifest import Provenance
from wispprof.errors import ArtifactDamaged, ArtifactTooNew

__all__ = ["BAD_PAYLOAD", "SCHEMA", "Document", "read_document", "write_document"]

SCHEMA = 1
_PREFIX = "wispprof/"

BAD_PAYLOAD = (KeyError, IndexError, TypeError, ValueError, OverflowError, AttributeError)
"""What taking a payload apart raises where it is not what this version writes. Readers turn it into
:class:`~wispprof.errors.ArtifactDamaged`."""


@dataclass(frozen=True)
class Document:
    """What was read: ``payload`` as written, its ``hash``, the ``inputs`` it was made from."""

    kind: str
    payload: dict[str, Any]
    hash: str
    inputs: dict[str, str] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=Provenance)


def write_document(
    path: Path,
    kind: str,
    payload: Mapping[str, Any],
    inputs: Mapping[str, str] | None = None,
    provenance: Provenance | None = None,
) -> str:
    """Write a document atomically and return its content hash.

    ``kind`` is one word (``estimator``, ``predictor``, ``plan``); ``inputs`` maps a name to the hash
    of what this was made from. Numpy numbers and arrays become plain lists. Raises ValueError for
    NaN or infinities in the payload.
    """
    # Through JSON first: integer keys become strings, and are then sorted as the reader sorts them.
    plain = json.loads(json.dumps(payload, allow_nan=False, default=files.plain))
    digest = files.content_hash(files.canonical_json(plain))
    document = {
        "format": _PREFIX + kind,
        "schema": SCHEMA,
        "hash": digest,
        "inputs": dict(inputs or {}),
        "provenance": (provenance or Provenance.now()).as_dict(),
        "payload": plain,
    }
    text = json.dumps(document, indent=1, ensure_ascii=False)
    files.write_atomic(Path(path), (text + "\n").encode())
    return digest


def read_document(path: Path, kind: str) -> Document:
    """Read a document of ``kind``.

    Raises :class:`ArtifactMissing`, :class:`ArtifactTooNew` for a later schema, and
    :class:`ArtifactDamaged` for anything else that is not what was written.
    """
    path = Path(path)
    data = files.read_bytes(path, kind)
    document = files.parse_json(data, f"{kind} {path}")
    if not isinstance(document, dict) or not str(document.get("format")).startswith(_PREFIX):
        raise ArtifactDamaged(f"{path} is not a file of wispprof.", f"Name a {kind} file.")
    found = str(document["format"]).removeprefix(_PREFIX)
    if found != kind:
        raise ArtifactDamaged(f"{path} holds a {found}, not a {kind}.", f"Name a {kind} file.")
    check_schema(path, kind, document.get("schema"), SCHEMA)
    payload, inputs = document.get("payload"), document.get("inputs")
    if not isinstance(payload, dict) or not isinstance(inputs, dict):
        raise ArtifactDamaged(
            f"{kind} {path} has no payload or no inputs.", "Restore it or make it anew."
        )
    try:
        digest = files.content_hash(files.canonical_json(payload))
    except ValueError as err:  # 1e999 is JSON, and infinite
        raise ArtifactDamaged(f"{kind} {path}: {err}.", "Restore it or make it anew.") from None
    if digest != document.get("hash"):
        raise ArtifactDamaged(
            f"{kind} {path} was changed after it was written: its content hash is {digest}, "
            f"the file says {document.get('hash')}.",
            "Restore it or make it anew.",
        )
    provenance = Provenance.from_dict(document.get("provenance"))
    named = {str(name): str(value) for name, value in inputs.items()}
    return Document(kind, payload, digest, named, provenance)


def check_schema(path: Path, what: str, found: object, known: int) -> None:
    """Refuse a schema this version does not know."""
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise ArtifactDamaged(f"{what} {path} states no schema version.", "Make it anew.")
    if found > known:
        raise ArtifactTooNew(
            f"{what} {path} has schema {found}; this version reads up to {known}.",
            "Upgrade wispprof, or make the file anew with this version.",
        )
