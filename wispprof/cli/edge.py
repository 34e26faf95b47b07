"""``wispprof generate``, ``chat``, ``edge`` and ``link``: what runs on the device."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wispprof.cli import console
from wispprof.cli.options import JsonFlag, with_settings
from wispprof.settings.edge_settings import EdgeSettings, LocalApiSettings
from wispprof.settings.shared_settings import LinkSettings, SamplingSettings

if TYPE_CHECKING:
    from rich.table import Table

    from wispprof.edge.edge_runtime import EdgeRuntime, Prompt


@with_settings
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    settings: EdgeSettings = EdgeSettings(max_tokens=128),
    sampling: SamplingSettings = SamplingSettings(),
    stop: Annotated[list[str] | None, typer.Option(help="Stop string; repeatable.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Generate text: this device drafts, the server verifies.

    Streams, then prints one line of statistics.
    """
    import asyncio

    from wispprof.edge.edge_runtime import Prompt, open_edge

    async def main() -> None:
        async with open_edge(settings) as runtime:
            tokens = runtime.tokenizer.encode(prompt)
            request = Prompt(tokens, settings.max_tokens, sampling.sampling(), tuple(stop or ()))
            document = await _answer(runtime, request, show=not as_json)
            if as_json:
                console.emit_json({"prompt": prompt, **document})

    asyncio.run(main())


@with_settings
def chat(
    settings: EdgeSettings,
    sampling: SamplingSettings = SamplingSettings(temperature=0.7, top_p=0.95),
    system: Annotated[str, typer.Option(help="System message.")] = "",
) -> None:
    """Chat with the target; an empty line or Ctrl-D ends."""
    import asyncio

    from wispprof.edge.edge_runtime import Prompt, open_edge

    async def main() -> None:
        async with open_edge(settings) as runtime:
            if not runtime.tokenizer.has_chat_template:
                console.note("This model has no chat template: it continues the conversation as text.")
            messages = [{"role": "system", "content": system}] if system else []
            turn = 0
            while text := await asyncio.to_thread(_read_line):
                messages.append({"role": "user", "content": text})
                tokens = runtime.tokenizer.chat(messages)
                request = Prompt(tokens, settings.max_tokens, sampling.sampling(turn))
                document = await _answer(runtime, request, show=True)
                messages.append({"role": "assistant", "content": str(document["text"])})
                turn += 1

    asyncio.run(main())


@with_settings
def edge(settings: EdgeSettings, api: LocalApiSettings) -> None:
    """Serve an OpenAI-compatible API on this device, and a page to chat on.

    It answers /v1/chat/completions, /v1/completions and /v1/models; the page is at /.
    """
    import asyncio

    from wispprof.doctor.findings import DoctorContext, require
    from wispprof.doctor.serving_checks import port

    require(DoctorContext(host=api.host, port=api.port), port)
    from wispprof.edge.local_api import serve_edge

    def announce(runtime: EdgeRuntime, url: str) -> None:
        console.console().print(_resolved(runtime))
        console.note(f"{runtime.model} answers at {url}/v1; playground: {url} (Ctrl-C ends)")

    asyncio.run(serve_edge(settings, api.host, api.port, announce, api.allowed_hosts))


def _resolved(runtime: EdgeRuntime) -> Table:
    """What this edge obeys."""
    settings = runtime.settings
    mode = settings.mode or "the server's"
    plan = f"{settings.plan}, rows of {runtime.plan_device}" if settings.plan else "none"
    if settings.plan and settings.controller != "wispprof":
        plan = f"not used by the controller {settings.controller}"
    rows: dict[str, Any] = {
        "server": settings.server or "started here",
        "target": runtime.model,
        "name": settings.client.name or "none",
        "drafter": settings.drafter,
        "draft": settings.draft or "bundled",
        "controller": f"{settings.controller} (mode: {mode})",
        "plan": plan,
        "predictor": settings.predictor or "none: the draft's own confidence",
    }
    return console.table("wispprof edge", "setting|value", rows.items())


@with_settings
def link(
    target: Annotated[str, typer.Argument(help="HOST:PORT of the server behind the link.")],
    settings: LinkSettings,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8250,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
) -> None:
    """Emulate a link: a proxy with delay, jitter, loss and stalls."""
    import asyncio

    from wispprof.testing.link_emulator import LinkProxy

    far_host, _, far_port = target.rpartition(":")
    if not far_host or not far_port.isdigit():
        raise console.fail(f"Expected HOST:PORT, got {target!r}.", "Example: 127.0.0.1:8200", console.USAGE)

    async def main() -> None:
        async with LinkProxy(host, port, far_host, int(far_port), settings) as proxy:
            console.note(f"{host}:{proxy.port} leads to {target}: {link_in_words(settings)} (Ctrl-C ends)")
            await asyncio.Event().wait()

    asyncio.run(main())


def link_in_words(settings: LinkSettings) -> str:
    """What an emulated link does to frames."""
    link = settings.link
    said = [f"round trip {link.rtt_ms:g} ms"]
    if link.jitter_ms:
        said.append(f"jitter {link.jitter_ms:g} ms each way on average")
    if link.loss:
        said.append(f"{100 * link.loss:g} % of frames {link.retransmission_ms:g} ms late")
    if link.up_mbps or link.down_mbps:
        up, down = (f"{mbps:g}" if mbps else "unlimited" for mbps in (link.up_mbps, link.down_mbps))
        said.append(f"Mbit/s up {up}, down {down}")
    if settings.stall_ms:
        said.append(f"{settings.stall_ms:g} ms of silence every {settings.stall_every_ms:g} ms")
    if settings.cut_every_ms:
        said.append(f"cut every {settings.cut_every_ms:g} ms")
    return ", ".join(said)


async def _answer(runtime: EdgeRuntime, request: Prompt, show: bool) -> dict[str, Any]:
    """Generate one answer, streamed to stdout if ``show``; the answer as a document."""
    reply = runtime.reply(request)
    pieces: list[str] = []
    warned = False
    async for piece in reply.text():
        pieces.append(piece)
        if show:
            if not reply.verified and not warned:
                console.warn("no server: the draft model continues alone, unverified")
                warned = True
            sys.stdout.write(piece)
            sys.stdout.flush()
    if show:
        sys.stdout.write("\n")
        sys.stdout.flush()
        console.console().print(reply.stats.line(), style="dim", markup=False, soft_wrap=True)
    return {
        "text": "".join(pieces),
        "tokens": reply.tokens,
        "finished": reply.finished,
        "verified": reply.verified,
        "model": runtime.model,
        "stats": reply.stats.summary(),
    }


def _read_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
