"""``wispprof generate``, ``chat``, ``edge`` and ``link``: everything that runs on the device."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from wispprof.cli import common

if TYPE_CHECKING:
    from wispprof.edge.edge_runtime import EdgeRuntime, Prompt
    from wispprof.settings.edge_settings import EdgeSettings

Server = Annotated[
    str, typer.Option(help="Address of the server (default: start one here on the bundled pair).")
]
Key = Annotated[str, typer.Option(help="API key of the server.", show_default=False)]
Draft = Annotated[
    str, typer.Option(help="Draft model: folder, hub id or .gguf file (default: bundled).")
]
Tokenizer = Annotated[
    str, typer.Option(help="The target's tokenizer: folder or hub id (default: beside the draft).")
]
DrafterKind = Annotated[
    str, typer.Option(help="What drafts: model, lookup, both (lookup first) or none.")
]
ControllerName = Annotated[
    str, typer.Option(help="Speculation controller: fixed, sled, wisp or wispprof.")
]
K = Annotated[
    int | None, typer.Option("--k", min=0, help="Draft length of fixed, longest of the others.")
]
Threshold = Annotated[float | None, typer.Option(help="Threshold of sled and wisp.")]
Predictor = Annotated[Path | None, typer.Option(help="Rejection predictor, from `wispprof fit`.")]
PlanFile = Annotated[Path | None, typer.Option("--plan", help="Plan that wispprof obeys.")]
PlanDevice = Annotated[str, typer.Option(help="Which device of the plan this is.")]
Mode = Annotated[str, typer.Option(help="round or stream (default: what the server runs).")]
Lead = Annotated[int, typer.Option(min=0, help="Most drafts held beyond the committed text.")]
Proactive = Annotated[
    int, typer.Option(min=0, help="Drafts beyond a round that is being verified; 0 waits instead.")
]
Speed = Annotated[float, typer.Option("--slo", min=0.01, help="Token speed asked for, tokens/s.")]
Fallback = Annotated[
    str, typer.Option(help="With no server: none (an error), or draft (draft alone, marked).")
]
GiveUp = Annotated[float, typer.Option(min=0.0, help="Seconds without a server before giving up.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 is greedy.")]
TopP = Annotated[float, typer.Option("--top-p", min=0.0, max=1.0, help="Nucleus; 1 switches off.")]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="0 switches off.")]
Seed = Annotated[int, typer.Option(min=0, help="Same seed, same text.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Most tokens to generate.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the tool."""
    app.command("generate", rich_help_panel="Run")(generate)
    app.command("chat", rich_help_panel="Run")(chat)
    app.command("edge", rich_help_panel="Run")(edge)
    app.command("link", rich_help_panel="Run")(link)


def _edge_settings(
    server: Server = "",
    key: Key = "",
    ca_file: common.CaFile = None,
    draft: Draft = "",
    tokenizer: Tokenizer = "",
    drafter: DrafterKind = "model",
    controller: ControllerName = "wispprof",
    k: K = None,
    threshold: Threshold = None,
    predictor: Predictor = None,
    plan: PlanFile = None,
    plan_device: PlanDevice = "",
    mode: Mode = "",
    draft_ahead: Lead = 24,
    proactive: Proactive = 8,
    slo: Speed = 2.0,
    fallback: Fallback = "none",
    give_up: GiveUp = 10.0,
) -> EdgeSettings:
    """What every command that drafts can be told, and the settings it makes."""
    from wispprof.settings.edge_settings import EdgeSettings

    options: dict[str, Any] = {}
    if k is not None:
        options["k" if controller == "fixed" else "k_max"] = k
    if threshold is not None:
        options["threshold"] = threshold
    return EdgeSettings(
        server=server,
        key=key,
        ca_file=ca_file,
        draft=draft,
        tokenizer=tokenizer,
        drafter=drafter,
        controller=controller,
        options=options,
        predictor=predictor,
        plan=plan,
        plan_device=plan_device,
        mode=mode,
        draft_ahead=draft_ahead,
        proactive=proactive,
        tokens_per_s=slo,
        fallback=fallback,
        give_up_ms=give_up * 1000.0,
    )


def _drafts(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of :func:`_edge_settings`; it is called with the settings they make.

    Typer reads a command's options off its signature, so that is what is put together here: arguments
    first, then the shared options, then the command's own, which also replace shared ones of their name.
    """
    common_ones = signature(_edge_settings).parameters
    own = {name: p for name, p in signature(command).parameters.items() if name != "settings"}
    arguments = [p for p in own.values() if p.default is Parameter.empty]
    shared = [p for name, p in common_ones.items() if name not in own]
    options = [p for p in own.values() if p.default is not Parameter.empty]

    @wraps(command)
    def run(**given: Any) -> None:
        settings = _edge_settings(**{name: given.pop(name) for name in common_ones})
        command(settings=settings, **given)

    known = {"EdgeSettings": object}  # a name for type checkers only
    hints = get_type_hints(_edge_settings, localns=known, include_extras=True)
    hints |= get_type_hints(command, localns=known, include_extras=True)
    order = [p.replace(annotation=hints[p.name]) for p in (*arguments, *shared, *options)]
    run.__signature__ = Signature(order)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in order}
    return run


@_drafts
def generate(
    settings: EdgeSettings,
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 0,
    max_tokens: MaxTokens = 128,
    stop: Annotated[list[str] | None, typer.Option(help="Stop string; may be repeated.")] = None,
    as_json: common.JsonFlag = False,
) -> None:
    """Generate text: this device drafts, the server verifies.

    Streams, then prints one line of statistics.
    """
    import asyncio

    from wispprof.edge.edge_runtime import Prompt, open_edge
    from wispprof.types import Sampling

    sampling = Sampling(temperature, top_k, top_p, seed)

    async def main() -> None:
        async with open_edge(settings) as runtime:
            ask = Prompt(runtime.tokenizer.encode(prompt), max_tokens, sampling, tuple(stop or ()))
            document = await _answer(runtime, ask, show=not as_json)
            if as_json:
                common.emit_json({"prompt": prompt, **document})

    asyncio.run(main())


@_drafts
def chat(
    settings: EdgeSettings,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    seed: Seed = 0,
    max_tokens: MaxTokens = 256,
    system: Annotated[str, typer.Option(help="System message.")] = "",
) -> None:
    """Talk to the target. Type a message and Enter; an empty line or Ctrl-D ends."""
    import asyncio

    from wispprof.edge.edge_runtime import Prompt, open_edge
    from wispprof.types import Sampling

    async def main() -> None:
        async with open_edge(settings) as runtime:
            if not runtime.tokenizer.has_chat_template:
                common.note(
                    "This model has no chat template: it continues the conversation as text."
                )
            messages = [{"role": "system", "content": system}] if system else []
            turn = 0
            while said := await asyncio.to_thread(_ask):
                messages.append({"role": "user", "content": said})
                sampling = Sampling(temperature, top_k, top_p, seed + turn)
                ask = Prompt(runtime.tokenizer.chat(messages), max_tokens, sampling)
                document = await _answer(runtime, ask, show=True)
                messages.append({"role": "assistant", "content": str(document["text"])})
                turn += 1

    asyncio.run(main())


@_drafts
def edge(
    settings: EdgeSettings,
    host: Annotated[str, typer.Option(help="Loopback address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8300,
    give_up: GiveUp = 30.0,
    max_tokens: MaxTokens = 256,
) -> None:
    """Serve an OpenAI-compatible API on this device.

    It answers /v1/chat/completions, /v1/completions and /v1/models.
    """
    import asyncio

    from wispprof.edge.local_api import serve_edge

    def announce(runtime: EdgeRuntime, where: str) -> None:
        common.note(f"{runtime.model} answers at {where}/v1 (Ctrl-C ends)")

    asyncio.run(serve_edge(replace(settings, max_tokens=max_tokens), host, port, announce))


def link(
    target: Annotated[str, typer.Argument(help="HOST:PORT of the server behind the link.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8250,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    rtt: Annotated[float, typer.Option(min=0.0, help="Round trip, ms.")] = 30.0,
    jitter: Annotated[float, typer.Option(min=0.0, help="Mean added delay each way, ms.")] = 0.0,
    loss: Annotated[float, typer.Option(min=0.0, max=0.9, help="Share of packets lost.")] = 0.0,
    up: Annotated[float, typer.Option(min=0.0, help="Uplink, Mbit/s; 0 is unlimited.")] = 0.0,
    down: Annotated[float, typer.Option(min=0.0, help="Downlink, Mbit/s; 0 is unlimited.")] = 0.0,
    stall_every: Annotated[float, typer.Option(min=0.0, help="A stall every so many s.")] = 0.0,
    stall: Annotated[float, typer.Option(min=0.0, help="Length of a stall, s.")] = 0.0,
    cut_every: Annotated[float, typer.Option(min=0.0, help="Break connections after s.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of jitter and loss.")] = 0,
) -> None:
    """Emulate a link: a proxy with delay, jitter, bandwidth, loss, stalls and cuts before a server."""
    import asyncio

    from wispprof.simulation.devices import LinkModel
    from wispprof.testing.link_emulator import LinkProxy, LinkSettings

    far_host, _, far_port = target.rpartition(":")
    if not far_host or not far_port.isdigit():
        raise common.fail(f"{target!r} is no HOST:PORT.", "Example: 127.0.0.1:8200", common.USAGE)
    try:
        settings = LinkSettings(
            LinkModel(rtt, jitter, loss, up, down),
            stall_every * 1000.0,
            stall * 1000.0,
            cut_every * 1000.0,
            seed,
        )
    except ValueError as err:
        raise common.fail(f"{err}.", "Correct the options.", common.USAGE) from err

    async def main() -> None:
        async with LinkProxy(host, port, far_host, int(far_port), settings) as proxy:
            common.note(f"{host}:{proxy.port} leads to {target} over {rtt:g} ms (Ctrl-C ends)")
            await asyncio.Event().wait()

    asyncio.run(main())


# --- shared ---------------------------------------------------------------------------------------


async def _answer(runtime: EdgeRuntime, ask: Prompt, show: bool) -> dict[str, Any]:
    """Generate one answer, shown as it comes where asked; its document."""
    reply = runtime.reply(ask)
    pieces: list[str] = []
    marked = False
    async for piece in reply.text():
        pieces.append(piece)
        if show:
            if not reply.verified and not marked:
                common.warn("no server: the draft model goes on alone, unverified")
                marked = True
            sys.stdout.write(piece)
            sys.stdout.flush()
    if show:
        sys.stdout.write("\n")
        sys.stdout.flush()
        common.console().print(reply.stats.line(), style="dim", markup=False, soft_wrap=True)
    return {
        "text": "".join(pieces),
        "tokens": reply.tokens,
        "finished": reply.finished,
        "verified": reply.verified,
        "model": runtime.model,
        "stats": reply.stats.summary(),
    }


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
