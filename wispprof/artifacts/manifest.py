"""Who made an artifact: the command, the moment, the versions.

The manifest of a profile: what was measured, on what, with what, when, and the hash of the rows.
"""

from __future__ import annotations

import datetime as dt
import functools
import importlib.metadata
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from wispprof.errors import ArtifactDamaged

__all__ = [
    "PROFILE_SCHEMA",
    "Manifest",
    "ModelRecord",
    "Provenance",
    "command_line",
    "library_versions",
    "utc_now",
]

_SECRET = re.compile(r"--?([\w-]*key|[\w-]*-?api-key[\w-]*|token|[\w-]*-token|[\w-]*secret[\w-]*)$")
_LIBRARIES = ("wispprof", "torch", "transformers", "numpy", "scikit-learn", "lightgbm")


def utc_now() -> str:
    """The moment as ISO 8601 in UTC, to the second."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")


def command_line() -> str:
    """The running command as one would type it, without the folder of the program.

    Keys are left out: artifacts are made to be passed on.
    """
    program = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
    return shlex.join([program, *_without_secrets(sys.argv[1:])])


def _without_secrets(words: Sequence[str]) -> list[str]:
    """Values of options that are called ``…key…``, ``…token`` or ``…secret…`` become ``***``."""
    shown: list[str] = []
    hide_next = False
    for word in words:
        name, given, _ = word.partition("=")
        secret = bool(_SECRET.match(name))
        if hide_next and not word.startswith("--"):
            shown.append("***")
        elif secret and given:
            shown.append(f"{name}=***")
        else:
            shown.append(word)
        hide_next = secret and not given
    return shown


def library_versions() -> dict[str, str]:
    """Installed versions of what a measurement depends on, read without importing any of it."""
    return dict(_versions())


@functools.cache
def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "wispprof" not in versions:  # a checkout that was never installed
        import wispprof

        versions["wispprof"] = wispprof.__version__
    return versions


@dataclass(frozen=True)
class Provenance:
    """``command`` as typed, ``created`` as ISO 8601 UTC, ``versions`` by library."""

    command: str = ""
    created: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def now(cls) -> Provenance:
        return cls(command_line(), utc_now(), library_versions())

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: object) -> Provenance:
        """Read leniently: provenance informs people, nothing is decided by it."""
        if not isinstance(data, dict):
            return cls()
        versions = data.get("versions")
        known = versions if isinstance(versions, dict) else {}
        return cls(
            str(data.get("command", "")),
            str(data.get("created", "")),
            {str(name): str(value) for name, value in known.items()},
        )


PROFILE_SCHEMA = 1
PROFILE_KINDS = ("server", "edge", "link")


@dataclass(frozen=True)
class ModelRecord:
    """Which model was measured. ``parameters`` counts weights; ``config_hash`` its architecture.

    ``kv_bytes_per_token``: what one cached token takes. Empty or 0 where unknown. The names are those
    of the identity that a loaded model states, so ``ModelRecord(**info.as_dict())`` takes it over.
    """

    id: str
    dtype: str = ""
    parameters: int = 0
    family: str = ""
    config_hash: str = ""
    weights_hash: str = ""
    tokenizer_hash: str = ""
    max_context: int = 0
    vocab_size: int = 0
    layers: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    kv_bytes_per_token: int = 0


@dataclass(frozen=True)
class Manifest:
    """Provenance of a profile's rows.

    ``engine``: settings of what was measured (attention backend, KV tokens, threads, …).
    ``hardware``: :meth:`wispprof.hardware.Fingerprint.as_dict`. ``measure``: settings of the sweep.
    ``summary``: what the sweep found out besides rows (drift, ratios of the physics check, …).
    ``rows`` and ``rows_hash`` are filled in by ``save_profile``.
    """

    kind: str
    model: ModelRecord
    command: str = ""
    seed: int = 0
    engine: dict[str, Any] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)
    measure: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    started: str = ""
    ended: str = ""
    source: str = "measured"
    citation: str = ""
    rows: int = 0
    rows_hash: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str) -> Manifest:
        """Check names and types; raises :class:`ArtifactDamaged` naming ``where`` and the fault.

        Unknown names are ignored: a later minor version may add some.
        """
        known = {entry.name for entry in fields(cls)}
        values = {name: value for name, value in data.items() if name in known}
        kind = values.get("kind")
        if kind not in PROFILE_KINDS:
            raise _damaged(where, f"unknown kind of profile {kind!r}")
        model = values.get("model")
        if not isinstance(model, dict) or not isinstance(model.get("id"), str):
            raise _damaged(where, "'model' has no id")
        names = {entry.name for entry in fields(ModelRecord)}
        values["model"] = ModelRecord(**{k: v for k, v in model.items() if k in names})
        for name in ("engine", "hardware", "measure", "summary", "versions"):
            if not isinstance(values.get(name, {}), dict):
                raise _damaged(where, f"'{name}' is not an object")
        for name in ("rows", "seed"):
            if type(values.get(name, 0)) is not int:
                raise _damaged(where, f"'{name}' is not a whole number")
        for name in ("command", "started", "ended", "source", "citation", "rows_hash"):
            if not isinstance(values.get(name, ""), str):
                raise _damaged(where, f"'{name}' is not a string")
        return cls(**values)


def _damaged(where: str, err: str) -> ArtifactDamaged:
    return ArtifactDamaged(f"{where}: {err}.", "Restore the file or measure it anew.")
