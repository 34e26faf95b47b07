"""One versioned JSON document: the format of estimators, predictors and plans.

On disk::

    {"format": "wispprof/estimator", "schema": 2, "hash": "blake2b:…",
     "inputs": {"profile": "blake2b:…"}, "provenance": {…}, "payload": {…}}

The hash covers the payload alone, so the same result made twice has the same hash.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self, TypeVar, get_origin, get_type_hints

import numpy as np

from wispprof.artifacts import files
from wispprof.artifacts.manifest import Provenance
from wispprof.errors import ArtifactDamaged, ArtifactTooNew, ArtifactTooOld, FitError, PluginError

SCHEMA = 2
_PREFIX = "wispprof/"

Fitted = TypeVar("Fitted")
_BAD_PAYLOAD = (KeyError, IndexError, TypeError, ValueError, OverflowError, AttributeError)


@dataclass(frozen=True)
class Document:
    """A document: ``payload`` as written, its ``hash``, and the hashes of the ``inputs`` it was made from."""

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
        "provenance": asdict(provenance or Provenance.now()),
        "payload": plain,
    }
    text = json.dumps(document, indent=1, ensure_ascii=False)
    files.write_atomic(Path(path), (text + "\n").encode())
    return digest


_MADE_BY = {"estimator": "fit", "predictor": "fit", "plan": "plan"}
"""The command that writes a document, by its kind."""


def read_document(path: Path, kind: str) -> Document:
    """Read a document of ``kind``.

    Raises :class:`ArtifactMissing`, :class:`ArtifactTooNew` for a later schema, :class:`ArtifactTooOld`
    for an earlier one, and :class:`ArtifactDamaged` for anything else that was not written so.
    """
    path = Path(path)
    where = f"{kind} {path}"
    maker = _MADE_BY.get(kind)
    hint = f"Check the path, or make it with `wispprof {maker}`." if maker else "Check the path."
    value = files.parse_json(files.read_bytes(path, kind, hint), where)
    if not isinstance(value, dict) or not str(value.get("format")).startswith(_PREFIX):
        raise ArtifactDamaged(f"{path} is not a file of wispprof.", f"Name a {kind} file.")
    found = str(value["format"]).removeprefix(_PREFIX)
    if found != kind:
        raise ArtifactDamaged(f"{path} holds a {found}, not a {kind}.", f"Name a {kind} file.")
    check_schema(path, kind, value.get("schema"), SCHEMA)
    provenance = Provenance.from_dict(value.pop("provenance", None))
    read: Document = files.convert({**value, "kind": kind}, Document, where)
    try:
        digest = files.content_hash(files.canonical_json(read.payload))
    except ValueError as err:  # 1e999 is JSON, and infinite
        raise ArtifactDamaged(f"{where}: {err}.", "Restore it or make it anew.") from None
    if digest != read.hash:
        raise ArtifactDamaged(
            f"{where} was changed after it was written: its content hash is {digest}, "
            f"the file says {read.hash}.",
            "Restore it or make it anew.",
        )
    return replace(read, provenance=provenance)


COMMANDS = {
    "estimator": "wispprof fit",
    "predictor": "wispprof fit",
    "plan": "wispprof plan",
    "bench": "wispprof bench",
    "trace": "wispprof trace",
    "profile": "wispprof profile-server or profile-edge",
}


def check_schema(path: Path, what: str, found: object, known: int) -> None:
    """Refuse a schema that this version does not read."""
    command = COMMANDS.get(what, "the command that wrote it")
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise ArtifactDamaged(f"{what} {path} states no schema version.", f"Make it anew with {command}.")
    if found > known:
        raise ArtifactTooNew(
            f"{what} {path} has schema {found}; this version reads schema {known}.",
            "Upgrade wispprof, or make the file anew with this version.",
        )
    if found < known:
        raise ArtifactTooOld(
            f"{what} {path} has schema {found}; this version reads schema {known}.",
            f"Make it anew with {command}.",
        )


def load_fitted(path: Path, what: str, build: Callable[[str, dict[str, Any]], Fitted]) -> Fitted:
    """What ``build`` makes of the kind and payload of an estimator or predictor on disk.

    Raises the artifact errors, and :class:`ArtifactDamaged` for a payload that ``build`` refuses.
    """
    payload = read_document(path, what).payload
    try:
        kind = str(payload["kind"])
        if ":" in kind:  # a file must not name a module to import
            raise FitError(
                f"{what.capitalize()}s of kind {kind!r} are not loaded.", "Install an entry point."
            )
        return build(kind, payload)
    except (*_BAD_PAYLOAD, FitError, PluginError) as err:
        raise ArtifactDamaged(
            f"{path} is not a complete {what} ({err}).", "Fit it anew with `wispprof fit`."
        ) from err


def from_plain(value: object, kind: Any) -> Any:
    """JSON as a value of type ``kind``, which may hold arrays and models. Raises ValueError."""
    import msgspec

    return msgspec.convert(value, kind, dec_hook=_array_or_model)


def _array_or_model(kind: Any, value: Any) -> Any:
    if get_origin(kind) is np.ndarray:
        (dtype,) = kind.__args__[1].__args__
        return np.array(value, dtype)
    return kind.from_payload(value)


class LearnedState:
    """Base of fitted models: class annotations that end in ``_`` name what is stored and read back."""

    def payload(self) -> dict[str, Any]:
        """Everything needed to predict, as JSON."""
        import msgspec

        learned = {name.rstrip("_"): getattr(self, name) for name in _learned(type(self))}
        plain: dict[str, Any] = msgspec.to_builtins(learned, enc_hook=_plain)
        return plain

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> Self:
        """A fitted model from its payload. Raises ValueError for values that do not belong together."""
        model = cls()
        for name, kind in _learned(cls).items():
            key = name.rstrip("_")
            try:
                setattr(model, name, from_plain(payload[key], kind))
            except ValueError as err:
                raise ValueError(f"{key}: {err}") from err
        model.finish()
        return model

    def finish(self) -> None:
        """Check what was learned or read, and derive what predictions need. Does nothing by default."""


def _learned(model: type) -> dict[str, Any]:
    hints = get_type_hints(model, include_extras=True)
    return {name: kind for name, kind in hints.items() if name.endswith("_")}


def _plain(value: object) -> object:
    return value.payload() if isinstance(value, LearnedState) else files.plain(value)
