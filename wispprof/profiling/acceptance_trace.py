"""Acceptance traces: the target's paths from held-out prompts, and the draft's proposals at every position.

The verifier engine of this machine or of a running server generates the path, so it is what a server would
commit. The proposals come from :mod:`~wispprof.profiling.draft_rollout`. Both use the position noise of
split serving, so a draft that is accepted here is accepted there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wispprof.artifacts import AcceptanceTrace, TracePath, bundled_model
from wispprof.artifacts.manifest import command_line
from wispprof.artifacts.trace import quantized
from wispprof.engines.served_model import read_generation_config, stop_tokens
from wispprof.errors import ModelError, ProfileError, ProtocolError, ServerBusy
from wispprof.hardware import fingerprint
from wispprof.profiling.link_profiler import ServerClient
from wispprof.profiling.profile_run import load_pair_model
from wispprof.profiling.prompts import ChosenPrompts, choose_prompts
from wispprof.profiling.traced_drafter import TracedDrafter, as_traced, load_traced_draft
from wispprof.sampling.candidates import ranks_of
from wispprof.settings.profiler_settings import TraceEngineSettings, TraceSettings
from wispprof.settings.shared_settings import ServerAccess
from wispprof.types import Progress, Sampling, StepInput

if TYPE_CHECKING:
    from wispprof.backends import Engine
    from wispprof.edge.connection import ConnectionFactory
    from wispprof.engines import EngineOptions
    from wispprof.engines.loading import LoadedModel

CANDIDATES = 16
"""Candidates of each position whose probabilities a trace keeps."""
_STEP_TOKENS = 2048
_BLOCK = 256
"""KV tokens that a session may take beyond its own: the rest of its last block."""


def trace_pair(
    settings: TraceSettings,
    progress: Progress | None = None,
    engine: TraceEngineSettings = TraceEngineSettings(),
) -> AcceptanceTrace:
    """Load the pair, choose prompts, collect the trace."""
    if engine.engine != "torch":
        return trace_on_engine(engine, settings, progress)
    check_tokenizers(settings)
    target = load_pair_model(settings.target, "target", settings.dtype, settings.device)
    return collect_trace(target, load_traced_draft(settings, target.tokenizer), settings, progress)


def check_tokenizers(settings: TraceSettings) -> None:
    """Compare the tokenizers of the pair before its weights are loaded, which takes far longer.

    Raises :class:`ModelError` if they differ. Other drafts than models are compared when they are loaded.
    """
    from wispprof.engines.model_folder import find_model
    from wispprof.engines.tokenizers import read_tokenizer, tokenizer_hash

    if settings.draft.endswith(".gguf") or settings.drafter not in ("model", "both"):
        return
    names = (settings.target or bundled_model("target"), settings.draft or bundled_model("draft"))
    target, draft = (read_tokenizer(find_model(name)) for name in names)
    if target is not None and draft is not None and tokenizer_hash(target) != tokenizer_hash(draft):
        raise _other_tokenizer(*(Path(name).name for name in names))


def collect_trace(
    target: LoadedModel,
    draft: LoadedModel | TracedDrafter,
    settings: TraceSettings,
    progress: Progress | None = None,
    *,
    prompts: Sequence[Sequence[int]] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> AcceptanceTrace:
    """The acceptance trace of a loaded pair. ``prompts``: token ids that replace those of the settings.

    Raises :class:`ModelError` if the two do not share a tokenizer.
    """
    draft = as_traced(draft)
    _check_pair(target.info.id, target.info.tokenizer_hash, target.info.vocab_size, draft)
    chosen = _chosen(prompts, settings, target.tokenizer, target.info.max_context)
    trace = _assemble(
        draft, chosen, lambda batch: target_paths(target, batch, settings), settings, progress, clock
    )
    target_facts = {"dtype": target.info.dtype, "target_weights": target.info.weights_hash}
    return replace(trace, target=target.info.id, meta={**trace.meta, **target_facts})


def trace_on_engine(
    choice: TraceEngineSettings,
    settings: TraceSettings,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> AcceptanceTrace:
    """As :func:`trace_pair`, with any engine by its name. Raises what loading it raises."""
    from wispprof.engines import load_engine

    if choice.engine in ("torch", "vllm"):
        check_tokenizers(settings)
    loaded = load_engine(choice.engine, _engine_options(choice, settings))
    try:
        model = loaded.model
        draft = load_traced_draft(settings, loaded.tokenizer)
        _check_pair(model.id, model.tokenizer, model.vocab_size, draft)
        tokenizer = draft.tokenizer if loaded.tokenizer is None else loaded.tokenizer
        trace = _assemble(
            draft,
            choose_prompts(settings, tokenizer, model.max_context),
            lambda batch: decoded_paths(loaded.engine, batch, settings, model.stop_tokens),
            settings,
            progress,
            clock,
        )
    finally:
        loaded.engine.shutdown()
    facts = {"engine": choice.engine, "identity": model.identity}
    return replace(trace, target=model.id, meta={**trace.meta, **facts})


def _engine_options(choice: TraceEngineSettings, settings: TraceSettings) -> EngineOptions:
    """An engine that holds one batch of paths and no more: the draft may share its device."""
    from wispprof.engines import EngineOptions

    target = settings.target or bundled_model("target")
    context = settings.prompt_tokens + settings.path_tokens
    if choice.engine == "vllm":
        from wispprof.engines.vllm.target import max_context_of

        context = min(context, max_context_of(target) - 1)
    return EngineOptions(
        target,
        settings.dtype,
        settings.device,
        kv_tokens=settings.batch * (context + _BLOCK),
        max_sessions=settings.batch,
        max_context=context,
        max_items=settings.batch,
        max_tokens=max(_STEP_TOKENS, settings.prompt_tokens),
        max_drafts=1,
        prefix_cache=False,
        arguments=choice.vllm_args,
        untested=choice.vllm_untested,
    )


def trace_remote(
    server: RemoteTarget,
    settings: TraceSettings,
    progress: Progress | None = None,
    *,
    draft: LoadedModel | TracedDrafter | None = None,
    prompts: Sequence[Sequence[int]] | None = None,
    connect: ConnectionFactory | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> AcceptanceTrace:
    """The acceptance trace of a draft and the target of a running server.

    Raises :class:`ModelError` if draft and server do not share a tokenizer, and the errors of
    :class:`RemoteTarget`.
    """
    draft = as_traced(draft) if draft is not None else load_traced_draft(settings)
    welcome = server.greet(connect)
    _check_pair(welcome.target, welcome.tokenizer, draft.vocab_size, draft)
    own = getattr(draft.tokenizer, "eos_token_id", None)
    ends = welcome.stop_tokens or ([] if own is None else [own])
    trace = _assemble(
        draft,
        _chosen(prompts, settings, draft.tokenizer, welcome.max_context),
        lambda batch: server.paths(batch, settings.sampling, settings.path_tokens, ends, connect),
        settings,
        progress,
        clock,
    )
    return replace(trace, target=welcome.target, meta={**trace.meta, "server": server.server})


def _chosen(
    prompts: Sequence[Sequence[int]] | None, settings: TraceSettings, tokenizer: Any, context: int
) -> ChosenPrompts:
    """``prompts`` as they were given, or those of the settings."""
    if prompts is None:
        return choose_prompts(settings, tokenizer, context)
    return ChosenPrompts([list(prompt) for prompt in prompts])


def _assemble(
    draft: TracedDrafter,
    chosen: ChosenPrompts,
    paths_of: Callable[[Sequence[Sequence[int]]], list[list[int]]],
    settings: TraceSettings,
    progress: Progress | None,
    clock: Callable[[], float],
) -> AcceptanceTrace:
    """Per batch: the target's paths, then the draft's proposals along them."""
    begin = clock()
    report = progress or (lambda done, whole, status: None)
    prompts = chosen.ids
    total, generated = 2 * len(prompts), 0
    traced: list[TracePath] = []
    for start in range(0, len(prompts), settings.batch):
        batch = prompts[start : start + settings.batch]
        report(len(traced) + generated, total, "the target's own path")
        paths = paths_of(batch)
        generated += len(batch)
        for prompt, path in zip(batch, paths, strict=True):
            report(len(traced) + generated, total, "the draft's proposals at every position")
            text = [*prompt, *path]
            drafts, features = draft.run(text, len(prompt), settings.depth, settings.sampling)
            accepted = accepted_lengths(drafts, path)
            found = draft.candidates(text, len(prompt), settings.sampling, CANDIDATES)
            ranks = None if found is None else ranks_of(path, found[0])
            probs = None if found is None else quantized(found[1])
            traced.append(TracePath(tuple(prompt), tuple(path), drafts, features, accepted, ranks, probs))
    report(total, total, "done")
    return AcceptanceTrace(
        target="",
        draft=draft.id,
        tokenizer_hash=draft.tokenizer_hash,
        sampling=settings.sampling,
        paths=tuple(traced),
        meta={
            "prompts": settings.prompts.name if settings.prompts else "held-out sources",
            **chosen.facts,
            "chat_model": bool(getattr(draft.tokenizer, "chat_template", None)),
            "draft_weights": draft.weights_hash,
            "command": command_line(),
            "hardware": fingerprint().hash,
            "seconds": round(clock() - begin, 2),
        },
    )


def target_paths(
    target: LoadedModel, prompts: Sequence[Sequence[int]], settings: TraceSettings
) -> list[list[int]]:
    """What the target generates from each prompt: ``path_tokens`` tokens, or up to one of its stop tokens.

    All prompts are sessions of one engine, decoded together.
    """
    from wispprof.engines.torch.engine import TorchEngine

    length = settings.path_tokens
    for prompt in prompts:
        if len(prompt) + length > target.info.max_context:
            raise ProfileError(
                f"A prompt of {len(prompt)} tokens and a path of {length} exceed the target's context of "
                f"{target.info.max_context}.",
                "Give fewer --prompt-tokens or --path-tokens.",
            )
    engine = TorchEngine(
        target, kv_tokens=sum(len(prompt) + length for prompt in prompts), max_sessions=len(prompts)
    )
    ends: tuple[int, ...] = ()
    if target.folder is not None:  # random weights have no end
        ends = stop_tokens(read_generation_config(target.folder), target.model.config, target.tokenizer)
    return decoded_paths(engine, prompts, settings, ends)


def decoded_paths(
    engine: Engine, prompts: Sequence[Sequence[int]], settings: TraceSettings, ends: Sequence[int]
) -> list[list[int]]:
    """The path of each prompt, from sessions of ``engine`` that decode together."""
    length = settings.path_tokens
    names = [str(number) for number in range(len(prompts))]
    for name, prompt in zip(names, prompts, strict=True):
        engine.open(name, settings.sampling, prompt)
    paths = dict(zip(names, _first_tokens(engine, names, prompts), strict=True))
    unfinished = names
    while unfinished := [n for n in unfinished if len(paths[n]) < length and paths[n][-1] not in ends]:
        for outcome in engine.step([StepInput(name, paths[name][-1:]) for name in unfinished]):
            paths[outcome.session].extend(outcome.tokens)
    for name in names:
        engine.close(name)
    return [paths[name] for name in names]


def _first_tokens(engine: Engine, names: Sequence[str], prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Prefill in steps of a bounded number of tokens."""
    first: list[list[int]] = []
    step: list[StepInput] = []
    for name, prompt in zip(names, prompts, strict=True):
        if step and sum(len(f.tokens) for f in step) + len(prompt) > _STEP_TOKENS:
            first += [list(o.tokens) for o in engine.step(step)]
            step = []
        step.append(StepInput(name, list(prompt)))
    return first + [list(o.tokens) for o in engine.step(step)]


@dataclass(frozen=True)
class RemoteTarget:
    """The target of a running server. ``timeout_s``: longest wait for a frame.

    Methods raise :class:`ServerUnreachable`, :class:`HandshakeRefused`, :class:`ServerBusy` and
    :class:`ProtocolError`.
    """

    server: str
    access: ServerAccess = field(default_factory=ServerAccess)
    timeout_s: float = 60.0

    def greet(self, connect: ConnectionFactory | None = None) -> Any:
        """The server's welcome: target, tokenizer hash, context."""

        async def greet() -> Any:
            async with self._client(connect) as client:
                return client.welcome

        return asyncio.run(greet())

    def paths(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        path_tokens: int,
        ends: Sequence[int] = (),
        connect: ConnectionFactory | None = None,
    ) -> list[list[int]]:
        """What the target generates from each prompt, all at once, in sessions without drafts."""

        async def generate() -> list[list[int]]:
            async with self._client(connect) as client:
                for number, prompt in enumerate(prompts):
                    await client.send(_open_frame(number, prompt, sampling, path_tokens, ends))
                return await _collect_paths(client, prompts)

        return asyncio.run(generate())

    def _client(self, connect: ConnectionFactory | None) -> AbstractAsyncContextManager[ServerClient]:
        return ServerClient.open(self.server, self.access, "trace", self.timeout_s, connect)


def _open_frame(
    number: int, prompt: Sequence[int], sampling: Sampling, path_tokens: int, ends: Sequence[int]
) -> Any:
    from wispprof import protocol

    return protocol.Open(
        number,
        list(prompt),
        path_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
        stop=list(ends),
        undrafted=True,
    )


async def _collect_paths(client: ServerClient, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    from wispprof import protocol

    paths: list[list[int]] = [[] for _ in prompts]
    unfinished = set(range(len(prompts)))
    while unfinished:
        frame = await client.receive()
        if isinstance(frame, protocol.Problem):
            if frame.code == "busy":
                raise ServerBusy(f"The server accepts no more sessions: {frame.message}", frame.retry_ms)
            raise ProtocolError(f"The server refused a session: {frame.message}", "")
        if not isinstance(frame, protocol.Commit) or frame.session not in unfinished:
            continue
        path = paths[frame.session]
        path.extend(frame.tokens)
        if frame.committed_len != len(prompts[frame.session]) + len(path):
            raise ProtocolError("Commits of the server are not contiguous.", "Run the trace again.")
        if frame.finished:
            unfinished.discard(frame.session)
    return paths


def accepted_lengths(drafts: np.ndarray, path: Sequence[int]) -> np.ndarray:
    """Length of each row's prefix that equals the path from that row on, (m,) int32."""
    m, depth = drafts.shape
    padded = np.concatenate((np.asarray(path, dtype=np.int64), np.full(depth, -1)))
    truth = np.lib.stride_tricks.sliding_window_view(padded, depth)[:m]
    return np.asarray((drafts == truth).cumprod(axis=1).sum(axis=1), dtype=np.int32)


def _check_pair(target: str, tokenizer_hash: str, vocabulary: int, draft: TracedDrafter) -> None:
    if tokenizer_hash != draft.tokenizer_hash or (not tokenizer_hash and vocabulary != draft.vocab_size):
        raise _other_tokenizer(target, draft.id)


def _other_tokenizer(target: str, draft: str) -> ModelError:
    return ModelError(
        f"{target} and {draft} do not share a tokenizer, so their token ids differ in meaning.",
        "Use a draft of the same model family.",
    )
