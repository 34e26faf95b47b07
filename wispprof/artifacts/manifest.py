"""Provenance of an artifact (command, time, versions), and the manifest of a profile."""

from __future__ import annotations

import datetime as dt
import functools
import importlib.metadata
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from wispprof.artifacts.files import Meta
from wispprof.types import ModelInfo

_SECRET = re.compile(r"--?([\w-]*key|[\w-]*-?api-key[\w-]*|token|[\w-]*-token|[\w-]*secret[\w-]*)$")
_LIBRARIES = ("wispprof", "torch", "transformers", "numpy", "scikit-learn", "lightgbm")


def utc_now() -> str:
    """The moment as ISO 8601 in UTC, to the second."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")


def command_line() -> str:
    """The running command as typed, without the program's folder and without keys."""
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
    """Installed versions of the libraries that a measurement depends on, read without importing them."""
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

    @classmethod
    def from_dict(cls, data: object) -> Provenance:
        """Read leniently: provenance informs people, and nothing depends on it."""
        if not isinstance(data, dict):
            return cls()
        versions = data.get("versions")
        known = versions if isinstance(versions, dict) else {}
        return cls(
            str(data.get("command", "")),
            str(data.get("created", "")),
            {str(name): str(value) for name, value in known.items()},
        )


PROFILE_SCHEMA = 2
ProfileKind = Annotated[str, Meta(pattern="^(server|edge|link)$")]


@dataclass(frozen=True)
class Manifest:
    """What was measured, on what, with what and when, and the hash of the rows.

    ``engine``: settings of what was measured (attention backend, KV tokens, threads, …).
    ``hardware``: the machine's fingerprint. ``measure``: settings of the sweep. ``summary``: results of
    the sweep besides rows (drift, ratios of the physics check, …). ``save_profile`` fills in ``rows`` and
    ``rows_hash``.
    """

    kind: ProfileKind
    model: ModelInfo
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


def origin_shares(manifest: Manifest) -> str:
    """``9 % measured, 77 % interpolated, 14 % formula``: the shares of a modelled step's time; else empty."""
    origins = manifest.summary.get("origins", {})
    return ", ".join(f"{share:.0%}".replace("%", " %") + f" {name}" for name, share in origins.items())
