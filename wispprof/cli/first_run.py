"""What ``wispprof`` alone offers on a terminal: first things to try, each shown as the command it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import typer

Ask = Callable[[str, str], str]
"""(question, default) → answer."""


@dataclass(frozen=True, slots=True)
class Offer:
    """One line of the menu. ``commands`` asks what it must know; it returns argument lists, run in order."""

    line: str
    commands: Callable[[Ask], list[list[str]]]


def _measure(ask: Ask) -> list[list[str]]:
    target = ask("Target model: folder or hub id (empty: the bundled one)", "")
    draft = ask("Draft model: folder, hub id or .gguf file (empty: the bundled one)", "")
    server = ["profile-server", "--grid", "quick", "--out", "out/mine/server"]
    edge = ["profile-edge", "--grid", "quick", "--out", "out/mine/edge"]
    return [
        [*server, *(("--model", target) if target else ())],
        [*edge, *(("--draft", draft) if draft else ())],
    ]


def _connect(ask: Ask) -> list[list[str]]:
    address = ask("Server (host:port, or wss://host:port)", "127.0.0.1:8200")
    draft = ask("Draft model: folder, hub id or .gguf file (empty: the bundled one)", "")
    return [["chat", "--server", address, *(("--draft", draft) if draft else ())]]


OFFERS = (
    Offer(
        "Demo: measure, plan and serve a small pair on this machine (1 min)", lambda _: [["demo", "--quick"]]
    ),
    Offer("Doctor: check this installation", lambda _: [["doctor"]]),
    Offer("Measure this machine: step times of a target, drafting times of a draft", _measure),
    Offer("Connect to a server and chat", _connect),
    Offer("List all commands", lambda _: [["--help"]]),
)


def choose(ask: Ask) -> list[list[str]]:
    """Show the menu and return the commands of the chosen line; none if the answer is empty."""
    typer.echo("wispprof: measure, plan and run split speculative LLM serving.\n")
    for number, offer in enumerate(OFFERS, 1):
        typer.echo(f"  {number}  {offer.line}")
    while answer := ask(f"\nWhat would you like to do? 1–{len(OFFERS)}, empty to leave", "").strip():
        if answer.isdecimal() and 1 <= int(answer) <= len(OFFERS):
            return OFFERS[int(answer) - 1].commands(ask)
        typer.echo(f"There is no {answer!r}.")
    return []
