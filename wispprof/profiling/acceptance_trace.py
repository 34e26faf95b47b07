"""Acceptance traces: the target's own path from held-out prompts, and the draft's view of every position.

The path is what the verifier engine emits, in batches, so it is what a server would commit. The draft's
continuations come from :mod:`~wispprof.profiling.draft_rollout`. Both draw with the position noise that
split serving uses, so "accepted" here means accepted there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from wispprof.artifacts import AcceptanceTrace, TracePath, bundled_path
from wispprof.artifacts.manifest import command_line
from wispprof.errors import ModelError, ProfileError
from wispprof.hardware import fingerprint
from wispprof.profiling.prompts import held_out_prompts, load_prompts
from wispprof.profiling.sweep import Progress
from wispprof.settings.profiler_settings import TraceSettings
from wispprof.types import StepInput

if TYPE_CHECKING:
    from wispprof.edge.connection import ConnectionFactory
    from wispprof.engines.loading import LoadedModel
    from wispprof.engines.torch.engine import TorchEngine
    from wispprof.profiling.draft_rollout import DraftRollout
    from wispprof.profiling.remote_target import RemoteTarget

__all__ = [
    "accepted_lengths",
    "collect_trace",
    "target_paths",
    "trace_pair",
    "trace_remote",
]

BUNDLED_TARGET = "models/reference-pair/target"
BUNDLED_DRAFT = "models/reference-pair/draft"
_STEP_TOKENS = 2048


def trace_pair(settings: TraceSettings, progress: Progress | None = None) -> AcceptanceTrace:
    """Load the pair, choose prompts, take the trace."""
    from wispprof.engines.loading import load_model

    target_name = settings.target or str(bundled_path(BUNDLED_TARGET))
    draft_name = settings.draft or str(bundled_path(BUNDLED_DRAFT))
    target = load_model(target_name, settings.dtype, settings.device)
    draft = load_model(draft_name, settings.dtype, settings.device)
    return collect_trace(target, draft, settings, progress)


def collect_trace(
    target: LoadedModel,
    draft: LoadedModel,
    settings: TraceSettings,
    progress: Progress | None = None,
    *,
    prompts: Sequence[Sequence[int]] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> AcceptanceTrace:
    """The acceptance trace of a loaded pair. ``prompts``: token ids to use instead of the settings'.

    Raises :class:`ModelError` where the two do not share a tokenizer.
    """
    _check_pair(target.info.id, target.info.tokenizer_hash, target.info.vocab_size, draft)
    if prompts is None:
        prompts = _prompts(settings, target.tokenizer, target.info.max_context)
    trace = _assemble(
        draft,
        prompts,
        lambda batch: target_paths(target, batch, settings),
        settings,
        progress,
        clock,
    )
    known = {"dtype": target.info.dtype, "target_weights": target.info.weights_hash}
    return replace(trace, target=target.info.id, meta={**trace.meta, **known})


def trace_remote(
    server: RemoteTarget,
    settings: TraceSettings,
    progress: Progress | None = None,
    *,
    draft: LoadedModel | None = None,
    prompts: Sequence[Sequence[int]] | None = None,
    connect: ConnectionFactory | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> AcceptanceTrace:
    """The same with a target that only a server holds: its paths come over the wire.

    Raises :class:`ModelError` where draft and server do not share a tokenizer, and what
    :class:`~wispprof.profiling.remote_target.RemoteTarget` raises.
    """
    from wispprof.engines.loading import load_model

    if draft is None:
        name = settings.draft or str(bundled_path(BUNDLED_DRAFT))
        draft = load_model(name, settings.dtype, settings.device)
    welcome = server.greet(connect)
    _check_pair(welcome.target, welcome.tokenizer, draft.info.vocab_size, draft)
    if prompts is None:
        prompts = _prompts(settings, draft.tokenizer, welcome.max_context)
    end = getattr(draft.tokenizer, "eos_token_id", None)
    trace = _assemble(
        draft,
        prompts,
        lambda batch: server.paths(batch, settings.sampling, settings.path_tokens, end, connect),
        settings,
        progress,
        clock,
    )
    return replace(trace, target=welcome.target, meta={**trace.meta, "server": server.server})


def _assemble(
    draft: LoadedModel,
    prompts: Sequence[Sequence[int]],
    paths_of: Callable[[Sequence[Sequence[int]]], list[list[int]]],
    settings: TraceSettings,
    progress: Progress | None,
    clock: Callable[[], float],
) -> AcceptanceTrace:
    """Batch by batch: the target's paths, then the draft's view of them."""
    from wispprof.profiling.draft_rollout import DraftRollout

    begin = clock()
    report = progress or (lambda done, whole, status: None)
    total, generated = 2 * len(prompts), 0
    rollout = DraftRollout(draft)
    found: list[TracePath] = []
    for batch in _batches(prompts, settings.batch):
        report(len(found) + generated, total, "the target's own path")
        paths = paths_of(batch)
        generated += len(batch)
        for prompt, path in zip(batch, paths, strict=True):
            report(len(found) + generated, total, "the draft's view of every position")
            found.append(_seen_by_draft(rollout, prompt, path, settings))
    report(total, total, "done")
    return AcceptanceTrace(
        target="",
        draft=draft.info.id,
        tokenizer_hash=draft.info.tokenizer_hash,
        sampling=settings.sampling,
        paths=tuple(found),
        meta={
            "prompts": settings.prompts.name if settings.prompts else "held-out sources",
            "draft_weights": draft.info.weights_hash,
            "command": command_line(),
            "hardware": fingerprint().hash,
            "seconds": round(clock() - begin, 2),
        },
    )


def target_paths(
    target: LoadedModel, prompts: Sequence[Sequence[int]], settings: TraceSettings
) -> list[list[int]]:
    """What the target generates from each prompt: up to ``path_tokens`` tokens, or to its end token.

    All prompts are sessions of one engine, decoded together.
    """
    from wispprof.engines.torch.engine import TorchEngine

    room = settings.path_tokens
    for prompt in prompts:
        if len(prompt) + room > target.info.max_context:
            raise ProfileError(
                f"A prompt of {len(prompt)} tokens and a path of {room} exceed the target's context of "
                f"{target.info.max_context}.",
                "Give fewer --prompt-tokens or --path-tokens.",
            )
    engine = TorchEngine(
        target,
        kv_tokens=sum(len(prompt) + room for prompt in prompts),
        max_sessions=len(prompts),
    )
    end = getattr(target.tokenizer, "eos_token_id", None)
    names = [str(number) for number in range(len(prompts))]
    for name in names:
        engine.open(name, settings.sampling)
    paths = dict(zip(names, _first_tokens(engine, names, prompts), strict=True))
    live = names
    while live := [n for n in live if len(paths[n]) < room and paths[n][-1] != end]:
        for outcome in engine.step([StepInput(name, paths[name][-1:]) for name in live]):
            paths[outcome.session].extend(outcome.tokens)
    return [paths[name] for name in names]


def _first_tokens(
    engine: TorchEngine, names: Sequence[str], prompts: Sequence[Sequence[int]]
) -> list[list[int]]:
    """Prefill in steps of a bounded number of tokens."""
    first: list[list[int]] = []
    step: list[StepInput] = []
    for name, prompt in zip(names, prompts, strict=True):
        if step and sum(len(f.tokens) for f in step) + len(prompt) > _STEP_TOKENS:
            first += [list(o.tokens) for o in engine.step(step)]
            step = []
        step.append(StepInput(name, list(prompt)))
    return first + [list(o.tokens) for o in engine.step(step)]


def _seen_by_draft(
    rollout: DraftRollout, prompt: Sequence[int], path: Sequence[int], settings: TraceSettings
) -> TracePath:
    drafts, features = rollout.run([*prompt, *path], len(prompt), settings.depth, settings.sampling)
    accepted = accepted_lengths(drafts, path)
    return TracePath(tuple(prompt), tuple(path), drafts, features, accepted)


def accepted_lengths(drafts: np.ndarray, path: Sequence[int]) -> np.ndarray:
    """Length of each row's prefix that equals the path from that row on, (m,) int32."""
    m, depth = drafts.shape
    padded = np.concatenate((np.asarray(path, dtype=np.int64), np.full(depth, -1)))
    truth = np.lib.stride_tricks.sliding_window_view(padded, depth)[:m]
    return np.asarray((drafts == truth).cumprod(axis=1).sum(axis=1), dtype=np.int32)


def _prompts(settings: TraceSettings, tokenizer: Any, context: int) -> list[list[int]]:
    size = min(settings.prompt_tokens, context - settings.path_tokens)
    asked = (tokenizer, settings.count, size, settings.seed)
    if settings.prompts is None:
        return held_out_prompts(*asked)
    return load_prompts(settings.prompts, *asked)


def _batches(prompts: Sequence[Sequence[int]], size: int) -> Iterator[Sequence[Sequence[int]]]:
    for start in range(0, len(prompts), size):
        yield prompts[start : start + size]


def _check_pair(target: str, tokenizer_hash: str, vocabulary: int, draft: LoadedModel) -> None:
    own = draft.info
    if tokenizer_hash != own.tokenizer_hash or (
        not tokenizer_hash and vocabulary != own.vocab_size
    ):
        raise ModelError(
            f"{target} and {own.id} do not share a tokenizer, so none of the draft's tokens means what "
            "the target's do.",
            "Use a draft of the same model family.",
        )
