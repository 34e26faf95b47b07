"""``wispprof doctor``: check this installation and say what to do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from wispprof.cli import console
from wispprof.cli.options import JsonFlag, with_settings
from wispprof.settings.server_settings import ServerSettings
from wispprof.settings.shared_settings import ServerAccess

_SERVER = ServerSettings()
_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}


def register(app: typer.Typer) -> None:
    """Add ``doctor`` to the commands."""
    app.command("doctor")(doctor)


@with_settings
def doctor(
    access: ServerAccess,
    target: Annotated[str, typer.Option(help="Target model; default: the bundled one.")] = "",
    draft: Annotated[str, typer.Option(help="Draft model; default: the bundled one.")] = "",
    host: Annotated[str, typer.Option(help="Address a server would listen on.")] = _SERVER.host,
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="Port a server would listen on.")
    ] = _SERVER.port,
    api_key_file: Annotated[Path | None, typer.Option(help="API keys of that server.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain (PEM).")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Private key (PEM).")] = None,
    server: Annotated[str, typer.Option(help="Running server to connect to, HOST:PORT.")] = "",
    out: Annotated[Path, typer.Option(help="Folder that results would go to.")] = Path("out"),
    run: Annotated[Path | None, typer.Option(help="Folder of artifacts to check.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Check installation, models, ports, keys and files.

    Each finding says what to do. Exit code 1 if a check fails.
    """
    from rich.text import Text

    from wispprof.doctor import CHECKS, DoctorContext, Finding, examine

    context = DoctorContext(
        target=target,
        draft=draft,
        host=host,
        port=port,
        api_key_file=api_key_file,
        tls_cert=tls_cert,
        tls_key=tls_key,
        server=server,
        key=access.key,
        ca_file=access.ca_file,
        out=out,
        run=run,
        environ=os.environ,
    )
    findings: list[Finding] = []
    with console.tracker("doctor", total=len(CHECKS)) as report:
        for finding in examine(context, CHECKS):
            findings.append(finding)
            report(len(findings), status=finding.check)
    table = console.table("", "|check|finding")
    for finding in findings:
        text = Text(finding.message)
        if finding.hint:
            text.append(f"\n{finding.hint}", style="green")
        style = _STYLES[finding.status]
        table.add_row(Text(finding.status, style=style), finding.check, text)
    failed = [f.check for f in findings if f.status == "fail"]
    console.result({"ok": not failed, "findings": findings}, table, as_json)
    if failed:
        raise typer.Exit(console.FAULT)
