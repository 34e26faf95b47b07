"""What a check is told and what it says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from wispprof.errors import WispprofError

__all__ = ["Check", "DoctorContext", "Finding", "examine"]

Status = Literal["ok", "warn", "fail", "skip"]


@dataclass(frozen=True)
class Finding:
    """``what`` was looked at, how it stands, what was ``found``, and the ``hint`` where there is need.

    ``warn``: it works, and something will be worse than it could be. ``fail``: a command will fail.
    ``skip``: there was nothing to look at.
    """

    what: str
    status: Status
    found: str
    hint: str = ""


@dataclass(frozen=True)
class DoctorContext:
    """Where and how the tool is going to be used. ``None`` means: not asked for.

    ``target`` and ``draft``: model folders or hub ids. ``run``: a folder of artifacts.
    ``server``: address of a running server. ``environ``: the process's environment.
    """

    target: str = ""
    draft: str = ""
    host: str = "127.0.0.1"
    port: int = 8200
    api_key_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    server: str = ""
    key: str = ""
    ca_file: Path | None = None
    out: Path = Path("out")
    run: Path | None = None
    environ: Mapping[str, str] = field(default_factory=dict)


Check = Callable[[DoctorContext], Finding]


_ACRONYMS = {"api": "API", "tls": "TLS"}


def examine(situation: DoctorContext, checks: Sequence[Check]) -> Iterator[Finding]:
    """Run the checks in order. What a check raises on purpose is a finding with the same fix.

    A check that breaks by itself is a finding too: it hides neither itself nor the others.
    """
    for check in checks:
        what = " ".join(_ACRONYMS.get(word, word) for word in check.__name__.split("_"))
        try:
            yield check(situation)
        except WispprofError as err:
            message = str(err).removesuffix(err.hint).rstrip() if err.hint else str(err)
            yield Finding(what, "fail", message, err.hint)
        except Exception as err:
            yield Finding(
                what,
                "fail",
                f"The check itself broke: {type(err).__name__}: {err}.",
                "Report this line as a defect; the other checks stand.",
            )
