"""The edge's playground: a page at ``/``, and a stream that tells how each token came (docs/playground.md).

The page talks to this edge only. The key of a remote server stays in the edge's settings.
"""

from __future__ import annotations

import asyncio
import functools
import json
import math
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse

from wispprof import __version__
from wispprof.edge.edge_runtime import EdgeRuntime, Reply
from wispprof.edge.round_record import RoundRecord, RoundWatch, TokenOrigin, likeliest
from wispprof.errors import WispprofError
from wispprof.hardware import EnergyMeter
from wispprof.openai_api import ApiError, ChatTokenizer
from wispprof.openai_api.choice_stream import ChoiceStream
from wispprof.openai_api.prepared_request import PreparedRequest, prepare
from wispprof.openai_api.request_fields import CHAT
from wispprof.openai_api.response_body import HEARTBEAT, Choice, usage
from wispprof.openai_api.text_backend import TextBackend
from wispprof.openai_api.text_generation import TextPiece
from wispprof.pages import add_page
from wispprof.types import TokenLogprob

TICK_S = 0.1
"""How often the stream looks for drafts and link changes while no token comes."""

_QUIET_TICKS = 100
_CONTEXT_TOKENS = 16


class DraftingSwitch(msgspec.Struct, forbid_unknown_fields=True):
    """Body of ``POST /playground/drafting``: whether answer ``id`` is to be drafted from now on."""

    id: str
    drafting: bool


@dataclass(eq=False)
class WatchedAnswer:
    """An answer while it is written: its reply, and the rounds whose tokens were not sent yet."""

    reply: Reply
    rounds: deque[RoundRecord] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.reply.watch = RoundWatch(self.rounds.append)

    def switch(self, on: bool) -> None:
        """Draft from now on, or let the server write alone."""
        self.reply.drafting = on
        if self.reply.generation is not None:
            self.reply.generation.set_drafting(on)


def add_playground(app: FastAPI, runtime: EdgeRuntime, backend: TextBackend) -> None:
    """Mount the page, ``/playground/status``, ``/playground/chat`` and ``/playground/drafting``."""
    answers: dict[str, WatchedAnswer] = {}
    add_page(app, "playground")

    @app.get("/playground/status", include_in_schema=False)
    async def status() -> dict[str, Any]:
        return {**runtime.status, **_description(runtime)}

    @app.post("/playground/chat", include_in_schema=False)
    async def chat(request: Request, drafting: bool = True) -> Response:
        data = await request.body()
        work = functools.partial(prepare, data, CHAT, backend)
        prepared = await asyncio.get_running_loop().run_in_executor(None, work)
        if prepared.body.n != 1:
            raise ApiError("The playground writes one answer at a time.", param="n")
        [choice] = prepared.choices(backend, "")
        reply = choice.text.generation
        assert isinstance(reply, Reply)
        answer = WatchedAnswer(reply)
        answer.switch(drafting)
        events = _events(runtime, prepared, choice, answer, answers)
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)

    @app.post("/playground/drafting", include_in_schema=False)
    async def switch(request: Request) -> dict[str, Any]:
        try:
            wanted = msgspec.json.decode(await request.body(), type=DraftingSwitch)
        except msgspec.DecodeError as err:
            raise ApiError(f"Expected an id and whether to draft: {err}.") from err
        answer = answers.get(wanted.id)
        if answer is None:
            raise ApiError("This answer is complete, or unknown.", 404, param="id")
        answer.switch(wanted.drafting)
        return {"id": wanted.id, "drafting": wanted.drafting}


def _description(runtime: EdgeRuntime) -> dict[str, Any]:
    """What does not change while an edge runs. No key is in it."""
    settings, device = runtime.settings, runtime.device
    return {
        "version": __version__,
        "server": settings.server or "in this process",
        "drafter": device.kind,
        "draft": settings.draft or "the bundled draft model",
        "controller": settings.controller,
        "asynchronous": runtime.stream,
        "max_context": runtime.max_context,
        "max_tokens": settings.max_tokens,
        "energy_sensor": device.energy.sensor,
        "energy": device.energy.sensor != EnergyMeter.sensor,
    }


async def _events(
    runtime: EdgeRuntime,
    prepared: PreparedRequest,
    choice: Choice,
    answer: WatchedAnswer,
    answers: dict[str, WatchedAnswer],
) -> AsyncIterator[str]:
    """The stream of one answer; see docs/playground.md."""
    stream, number = ChoiceStream([choice]), prepared.response.id
    view = _View(runtime, prepared.tokenizer, answer)
    answers[number] = answer
    quiet = 0
    try:
        yield _event("start", {"id": number, "model": runtime.model, "prompt_tokens": len(choice.prompt)})
        while True:
            try:
                found = await stream.next(TICK_S)
            except TimeoutError:
                quiet += 1
                made = view.changes() or (HEARTBEAT if quiet % _QUIET_TICKS == 0 else "")
                if made:
                    yield made
                continue
            if found is None:
                break
            if found.piece is not None:
                yield view.round(found.piece)
        yield _event(
            "end",
            {
                "finish_reason": choice.finish_reason,
                "verified": answer.reply.verified,
                "usage": usage([choice]),
                "stats": answer.reply.stats.summary(),
            },
        )
    except WispprofError as err:
        yield _event("error", ApiError.of(err).body()["error"])
    finally:
        del answers[number]
        await asyncio.shield(stream.close())


class _View:
    """What the page was told of an answer."""

    def __init__(self, runtime: EdgeRuntime, tokenizer: ChatTokenizer, answer: WatchedAnswer) -> None:
        self._runtime = runtime
        self._tokenizer = tokenizer
        self._answer = answer
        self._pending = ""
        self._link = "ok"

    def round(self, piece: TextPiece) -> str:
        """The event of a commit; text alone, if a stop string held it back."""
        if not piece.tokens:
            return _event("text", {"text": piece.text})
        record = self._answer.rounds.popleft()
        rows = zip(piece.texts, record.origins, piece.logprobs, strict=False)
        self._pending = self._pending_text()
        return _event(
            "round",
            {
                **{name: _rounded(getattr(record, name)) for name in _TIMES},
                "drafted": record.drafted,
                "accepted": record.accepted,
                "drafting": record.drafting,
                "tokens": [self._token(*row) for row in rows],
                "pending": self._pending,
            },
        )

    def _token(self, text: str, origin: TokenOrigin, logprob: TokenLogprob | None) -> dict[str, Any]:
        made: dict[str, Any] = {"text": text, "origin": origin.kind}
        if origin.acceptance_prob is not None:
            made["acceptance_prob"] = round(origin.acceptance_prob, 4)
        if origin.draft is not None:
            made["draft"] = self._shown(origin.draft)
        if origin.alternatives:
            made["alternatives"] = [
                [self._shown(token), round(prob, 4)] for token, prob in origin.alternatives
            ]
        if logprob is not None:
            made["prob"] = round(math.exp(min(0.0, logprob.logprob)), 6)
            made["top"] = [
                [self._shown(token), round(math.exp(min(0.0, value)), 6)] for token, value in logprob.top
            ]
        return made

    def _shown(self, token: int) -> str:
        return self._tokenizer.token_bytes(token).decode("utf-8", "replace")

    def changes(self) -> str:
        """An event if the pending drafts or the link changed since the last one."""
        made, pending = "", self._pending_text()
        link = self._runtime.status["status"]
        if link != self._link:
            self._link = link
            made = _event("link", {"status": link})
        if pending != self._pending:
            self._pending = pending
            made += _event("pending", {"text": pending})
        return made

    def _pending_text(self) -> str:
        """Text of the drafts beyond the committed tokens; of a tree, the likeliest."""
        generation = self._answer.reply.generation
        if generation is None:
            return ""
        drafts = likeliest(generation.buffer)
        before = generation.buffer.committed[-_CONTEXT_TOKENS:]
        return self._tokenizer.detokenizer(before).push(drafts) if drafts else ""


_TIMES = ("at_ms", "round_ms", "draft_ms", "rtt_ms", "queue_ms", "verify_ms")


def _rounded(ms: float) -> float:
    return round(ms, 2)


def _event(name: str, body: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(body)}\n\n"
