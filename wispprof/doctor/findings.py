"""Input and result of a check, and the loop that runs the checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from wispprof.errors import WispprofError

Status = Literal["ok", "warn", "fail", "skip"]


@dataclass(frozen=True)
class Finding:
    """Result of ``check``: a ``message``, and for problems a ``hint`` that says what to do.

    ``warn``: commands work, but results or speed may suffer. ``fail``: a command will fail.
    ``skip``: the check does not apply.
    """

    check: str
    status: Status
    message: str
    hint: str = ""


@dataclass(frozen=True)
class DoctorContext:
    """Intended use of the installation. ``None`` and empty strings: not specified.

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


def examine(context: DoctorContext, checks: Sequence[Check]) -> Iterator[Finding]:
    """Run the checks in order. An exception is reported as a failed check; later checks still run."""
    for check in checks:
        name = " ".join(_ACRONYMS.get(word, word) for word in check.__name__.split("_"))
        try:
            yield check(context)
        except WispprofError as err:
            message = str(err).removesuffix(err.hint).rstrip() if err.hint else str(err)
            yield Finding(name, "fail", message, err.hint)
        except Exception as err:
            yield Finding(
                name,
                "fail",
                f"The check raised {type(err).__name__}: {err}.",
                "Please report this message as a defect.",
            )
