"""Input and result of a check, and the loop that runs the checks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from wispprof.errors import WispprofError
from wispprof.settings.draft_settings import LlamaSettings
from wispprof.settings.fields import Settings, setting
from wispprof.settings.server_settings import ServerSettings
from wispprof.settings.shared_settings import ServerAccess, engine_setting, vllm_args_setting

Status = Literal["ok", "warn", "fail", "skip"]


@dataclass(frozen=True)
class Finding:
    """Result of a check: a ``message``, and for problems a ``hint`` that says what to do.

    ``warn``: commands work, but results or speed may suffer. ``fail``: a command will fail.
    ``skip``: the check does not apply. ``check``: its name, which :func:`examine` sets.
    """

    status: Status
    message: str
    hint: str = ""
    check: str = ""


@dataclass(frozen=True)
class DoctorContext(Settings):
    """Intended use of the installation. ``None`` and empty strings: not specified."""

    access: ServerAccess = field(default_factory=ServerAccess)
    llama: LlamaSettings = field(default_factory=LlamaSettings)
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    engine: str = engine_setting()
    vllm_args: dict[str, Any] = vllm_args_setting()
    target: str = setting("", "Target model; default: the bundled one.")
    draft: str = setting("", "Draft model or .gguf file; default: the bundled one.")
    host: str = setting(ServerSettings.host, "Address a server would listen on.")
    port: int = setting(ServerSettings.port, "Port a server would listen on.", minimum=0, maximum=65535)
    api_key_file: Path | None = setting(None, "API keys of that server.")
    tls_cert: Path | None = setting(None, "Certificate chain (PEM).")
    tls_key: Path | None = setting(None, "Private key (PEM).")
    server: str = setting("", "Running server to connect to, HOST:PORT.")
    out: Path = setting(Path("out"), "Folder that results would go to.")
    run: Path | None = setting(None, "Folder of artifacts to check.")


Check = Callable[[DoctorContext], Finding]


def require(context: DoctorContext, *checks: Check) -> None:
    """Raise :class:`WispprofError` for the first check that fails: cheap checks of a command's options."""
    for finding in examine(context, checks):
        if finding.status == "fail":
            raise WispprofError(finding.message, finding.hint)


_ACRONYMS = {"api": "API", "tls": "TLS"}


def examine(context: DoctorContext, checks: Sequence[Check]) -> Iterator[Finding]:
    """Run the checks in order. An exception is reported as a failed check; later checks still run."""
    for check in checks:
        name = " ".join(_ACRONYMS.get(word, word) for word in check.__name__.split("_"))
        try:
            finding = check(context)
        except WispprofError as err:
            message = str(err).removesuffix(err.hint).rstrip() if err.hint else str(err)
            finding = Finding("fail", message, err.hint)
        except Exception as err:
            message = f"The check raised {type(err).__name__}: {err}."
            finding = Finding("fail", message, "Please report this message as a defect.")
        yield replace(finding, check=name)
