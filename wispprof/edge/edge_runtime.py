"""A ready edge: models loaded, server found (or started in this process), link up."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from wispprof.artifacts import bundled_path
from wispprof.drafters import draft_folder, is_llama, load_llama, needs_model
from wispprof.drafters.ngram import LookupMemory
from wispprof.edge.client import EdgeClient
from wispprof.edge.connection import ConnectionFactory, ssl_context, websocket_connections
from wispprof.edge.draft_device import DraftDevice
from wispprof.edge.generation import Generation
from wispprof.edge.request_stats import RequestStats
from wispprof.edge.round_record import RoundWatch
from wispprof.engines.tokenizers import load_tokenizer, tokenizer_hash
from wispprof.errors import SettingsError
from wispprof.hardware import energy_meter
from wispprof.openai_api import ChatTokenizer, TextGeneration, TextOptions
from wispprof.openai_api.stop_strings import StopStrings
from wispprof.policies.registry import TREE_CONTROLLERS
from wispprof.settings.edge_settings import EdgeSettings
from wispprof.types import GenerationRequest, RejectionPredictor, Sampling, ServedModel, Slo, TokenChunk

if TYPE_CHECKING:
    from wispprof.artifacts.plan import Plan

log = logging.getLogger("wispprof.edge")

BUNDLED_DRAFT = "models/reference-pair/draft"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request in tokens. ``stops``: strings that end it early. ``stop_tokens`` and ``slo``: the
    target's and the settings' if not given."""

    tokens: tuple[int, ...]
    max_new: int
    sampling: Sampling
    stops: tuple[str, ...] = ()
    slo: Slo | None = None
    stop_tokens: tuple[int, ...] | None = None


class Reply:
    """One answer while it is generated: iterate over its text, then read the rest.

    ``finished``: ``stop`` (a stop token or string), ``length`` or ``context``. ``verified`` turns
    false if the draft model had to go on alone. Set before it begins: ``watch`` reports the rounds;
    ``drafting`` false leaves the device out. A :class:`~wispprof.openai_api.TokenGeneration`.
    """

    cached_tokens = None

    def __init__(self, runtime: EdgeRuntime, prompt: Prompt) -> None:
        self._runtime = runtime
        self._prompt = prompt
        stop_tokens = prompt.stop_tokens
        self._stop_tokens = runtime.tokenizer.stop_tokens if stop_tokens is None else stop_tokens
        self.stats = RequestStats()
        self.tokens: list[int] = []
        self.finished = ""
        self.verified = True
        self.watch: RoundWatch | None = None
        self.drafting = True
        self.generation: Generation | None = None

    async def text(self) -> AsyncGenerator[str]:
        """Pieces of the answer as they are committed."""
        prompt = self._prompt
        stops = StopStrings(prompt.stops) if prompt.stops else None
        options = TextOptions(self._stop_tokens, stop_strings=stops)
        text = TextGeneration(self, self._runtime.tokenizer, prompt.tokens, options)
        async with aclosing(text.pieces()) as pieces:
            async for piece in pieces:
                if piece.text:
                    yield piece.text

    def statistics(self) -> dict[str, Any]:
        """What the local API adds to a response."""
        return {"wispprof": {"verified": self.verified, **self.stats.summary()}}

    def speculative_decoding(self) -> dict[str, Any] | None:
        """Acceptance of this request's drafts, as vLLM reports it."""
        return self.stats.speculative_decoding()

    async def stream(self) -> AsyncGenerator[TokenChunk]:
        """Tokens as they are committed, a final stop token included."""
        runtime, prompt = self._runtime, self._prompt
        request = GenerationRequest(
            tokens=prompt.tokens,
            max_new=prompt.max_new,
            sampling=prompt.sampling,
            slo=prompt.slo or runtime.settings.slo,
            stop_tokens=self._stop_tokens,
        )
        device = runtime.device
        device.stream = runtime.stream
        with device.lend(prompt.tokens) as (worker, controller), device.energy.share() as energy:
            generation = Generation(
                runtime.client,
                request,
                worker,
                controller,
                runtime.drafting,
                fallback=runtime.settings.fallback == "draft",
                watch=self.watch,
            )
            self.generation = generation
            generation.set_drafting(self.drafting)
            self.stats = generation.stats
            async with aclosing(generation.stream()) as source:
                async for chunk in source:
                    self.verified = self.verified and chunk.verified
                    self.tokens.extend(chunk.tokens)
                    yield chunk
            self.finished = generation.stats.finished
        if self.verified:
            device.remember([*prompt.tokens, *self.tokens])
        self.stats.energy_j = energy.energy_j


class EdgeRuntime:
    """Tokenizer, device and client together; made by :func:`open_edge`. ``plan_device``: the device of the
    plan whose rows are obeyed."""

    def __init__(
        self,
        settings: EdgeSettings,
        tokenizer: Any,
        device: DraftDevice,
        client: EdgeClient,
        plan_device: str = "",
    ) -> None:
        self.settings = settings
        self.plan_device = plan_device
        self._local_tokenizer = self._tokenizer = ChatTokenizer(tokenizer)
        self._target: ServedModel | None = None
        self.device = device
        self.client = client
        stream = {"": None, "round": False, "stream": True}[settings.mode]
        self.drafting = replace(settings.drafting, stream=stream)

    @property
    def target(self) -> ServedModel | None:
        """The target that answers, as the server described it last; ``None`` if it never did."""
        return self.client.target

    @property
    def tokenizer(self) -> ChatTokenizer:
        """With the target's stop tokens and chat template, whatever those of the draft are. Without a server
        so far, the draft's."""
        target = self.target
        if target is not None and target != self._target:
            self._target = target
            self._tokenizer = self._local_tokenizer.for_target(target)
        return self._tokenizer

    @property
    def model(self) -> str:
        """Name of the target that answers."""
        return (self.target.id if self.target is not None else "") or "target"

    @property
    def max_context(self) -> int:
        return self.target.max_context if self.target is not None else 1 << 20

    @property
    def stream(self) -> bool:
        """Whether drafting is asynchronous now: by the settings, else the server's mode."""
        chosen, welcome = self.drafting.stream, self.client.welcome
        return chosen if chosen is not None else bool(welcome and welcome.stream)

    @property
    def status(self) -> dict[str, Any]:
        """What /health and /ready say of the link. ``status``: ``ok``, ``reconnecting`` (requests wait),
        or ``unavailable`` (they fail at once, or are answered by the draft model alone)."""
        client = self.client
        serves = client.up and not client.draining
        status = "ok" if serves else "reconnecting" if client.up or client.fault is None else "unavailable"
        error = "" if client.up or client.fault is None else str(client.fault)
        return {
            "status": status,
            "ready": serves or self.settings.fallback == "draft",
            "link": client.up,
            "rtt_ms": client.rtt.mean_ms,
            "target": self.model,
            "error": error,
        }

    def reply(self, prompt: Prompt) -> Reply:
        return Reply(self, prompt)


@asynccontextmanager
async def open_edge(settings: EdgeSettings) -> AsyncIterator[EdgeRuntime]:
    """Load what drafts, find or start the server, connect.

    >>> async with open_edge(EdgeSettings.of(server="gpu-box:8200")) as edge:  # doctest: +SKIP
    ...     reply = edge.reply(Prompt(edge.tokenizer.encode("def read_config(path):"), 64, Sampling()))
    ...     async for piece in reply.text():
    ...         print(piece, end="", flush=True)
    ...     print(reply.stats.summary())

    Raises what loading raises, :class:`HandshakeRefused`, and :class:`ServerUnreachable` (the latter
    only at the first request where ``fallback`` is ``draft``).
    """
    async with AsyncExitStack() as stack:
        planned = _plan(settings)
        folder = settings.draft or str(bundled_path(BUNDLED_DRAFT))
        loaded, tokenizer, digest = _load(settings, folder)
        connect, stream = await _server(settings, stack)
        options = settings.controller_options
        if settings.drafter != "none":
            if settings.controller == "wispprof" and planned is not None:
                options.update(_plan_rows(settings, planned, stream))
            if settings.controller in TREE_CONTROLLERS:
                options = _node_cost(settings) | options
        meter = energy_meter(str(loaded.device) if loaded is not None else "cpu")
        device = DraftDevice(
            settings.drafter,
            settings.controller,
            options,
            _predictor(settings),
            loaded,
            meter,
            settings.drafting.draft_timeout_ms,
            LookupMemory(settings.lookup_memory) if settings.drafter in ("lookup", "both") else None,
        )
        stack.callback(device.close)
        client = EdgeClient(
            connect,
            replace(settings.client, tokenizer=digest, offline_ok=settings.fallback == "draft"),
        )
        await stack.enter_async_context(client)
        runtime = EdgeRuntime(settings, tokenizer, device, client, planned[1] if planned else "")
        yield runtime


def _load(settings: EdgeSettings, folder: str) -> tuple[Any, Any, str]:
    """(draft model or ``None``, tokenizer, its hash)."""
    from wispprof.engines.loading import load_model

    loaded: Any = None
    where = settings.tokenizer
    plugin = settings.drafter not in ("lookup", "none")
    wanted = needs_model(settings.drafter) or (plugin and bool(settings.draft))
    llama = wanted and is_llama(folder)
    if llama:
        where = where or draft_folder(folder)
    elif wanted:
        loaded = load_model(folder, dtype=settings.dtype, device=settings.device, draft=True)
    tokenizer = loaded.tokenizer if loaded is not None and not where else load_tokenizer(where or folder)
    if llama:
        loaded = load_llama(folder, settings.llama, settings.device, tokenizer)
        if loaded.note:
            log.warning("%s: %s", folder, loaded.note)
    return loaded, tokenizer, tokenizer_hash(tokenizer)


async def _server(settings: EdgeSettings, stack: AsyncExitStack) -> tuple[ConnectionFactory, bool | None]:
    """How to reach the server, and its mode where it is known before hello."""
    if settings.server:
        trusted = ssl_context(settings.client.access.ca_file)
        return websocket_connections(settings.server, ssl=trusted), None
    from wispprof.server.process import running_server
    from wispprof.settings.server_settings import ServerSettings

    stream = settings.mode != "round"
    server = ServerSettings(
        target_id="reference-pair",
        policy="wispprof" if stream else "wisp",
        device=settings.device,
        engine=settings.engine,
        in_process=True,  # for one user's requests, another process only takes time to start
        vllm_args=settings.vllm_args,
        vllm_untested=settings.vllm_untested,
        dtype=settings.dtype,
        admit="all",
    )
    running = await stack.enter_async_context(running_server(server))
    return websocket_connections(running.split_url), stream


def _predictor(settings: EdgeSettings) -> RejectionPredictor | None:
    if settings.predictor is None:
        return None
    from wispprof.fitting import load_predictor

    return load_predictor(settings.predictor)


def _plan(settings: EdgeSettings) -> tuple[Plan, str] | None:
    """The plan and the device whose rows this edge obeys; raises :class:`PlanError` without such a device."""
    if settings.plan is None:
        return None
    from wispprof.artifacts.plan import load_plan

    plan = load_plan(settings.plan)
    return plan, plan.device_for(settings.plan_device)


def _plan_rows(settings: EdgeSettings, planned: tuple[Plan, str], stream: bool | None) -> dict[str, Any]:
    from wispprof.policies.stopping import PlannedRows

    mode = settings.mode or ("round" if stream is False else "stream")
    return {"rows": PlannedRows(*planned, mode)}


def _node_cost(settings: EdgeSettings) -> dict[str, Any]:
    """What each further node of a draft tree costs, by the device's profile."""
    if settings.profile is None:
        # A plan may name trees all the same.
        return {"node_ms": math.inf} if settings.plan is not None else {}
    from wispprof.simulation.devices import device_of

    return {"node_ms": device_of(str(settings.profile)).node_ms}


def generate(prompt: str, settings: EdgeSettings | None = None, sampling: Sampling | None = None) -> str:
    """Return the target's continuation of ``prompt``, drafted here and verified by the server. Blocks.

    Loads the draft, connects, and closes both again; use :func:`open_edge` for more than one request.
    Raises what :func:`open_edge` raises.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        raise SettingsError(
            "generate() blocks, and an event loop runs here.", "Use `async with open_edge(…)`."
        )

    async def main() -> str:
        async with open_edge(settings or EdgeSettings()) as runtime:
            tokens = runtime.tokenizer.encode(prompt)
            most = runtime.settings.max_tokens
            reply = runtime.reply(Prompt(tokens, most, sampling or Sampling()))
            return "".join([piece async for piece in reply.text()])

    return asyncio.run(main())
