"""Checks of numbers on the wire: what a server sends, and what a request asks the edge to send.

A faulty or hostile server costs a request or its connection, no more.
"""

from __future__ import annotations

import math

from wispprof import protocol
from wispprof.errors import ProtocolError, RequestRefused, RuntimeFault, ServerBusy, SettingsError
from wispprof.types import GenerationRequest, TokenLogprob

MAX_RETRY_MS = 60_000.0
"""Longest pause that a server may ask for."""

MAX_POSITION = 1 << 31
MAX_DRAFTED = 1 << 16
_MAX_TIME_MS = 1e9
_MAX_LOAD_LEVEL = 4
_FINISHED = frozenset(("", "stop", "length", "context"))
HINT = "Use a wispprof server of the same version."


def retry_ms(problem: protocol.Problem) -> float:
    """The pause that a problem asks for, within 0 … :data:`MAX_RETRY_MS`."""
    pause_ms = problem.retry_ms
    return min(max(pause_ms, 0.0), MAX_RETRY_MS) if math.isfinite(pause_ms) else 0.0


def nearest_tokens_per_s(problem: protocol.Problem) -> float:
    """The speed that a problem offers; 0 if it offers none."""
    speed = problem.tokens_per_s
    return speed if 0.0 < speed < math.inf else 0.0


def refusal(problem: protocol.Problem) -> RuntimeFault:
    """The error with which a refused request ends."""
    code, message, pause_ms = problem.code, problem.message[:500], retry_ms(problem)
    if code in ("busy", "draining", "slo") or (code == "limit" and pause_ms):
        nearest = nearest_tokens_per_s(problem)
        return ServerBusy(message, pause_ms, code=code, nearest_tokens_per_s=nearest)
    message = f"The server refused this request: {message}"
    return RequestRefused(message, code) if code in ("limit", "frame") else RuntimeFault(message)


def load_level(level: int) -> int:
    """The nearest load level that exists."""
    return min(max(level, 0), _MAX_LOAD_LEVEL)


def check_commit(commit: protocol.Commit, end: int, vocab_size: int) -> None:
    """Raise :class:`ProtocolError` on a commit that no correct server sends.

    ``end``: position past the last token of the generation. ``vocab_size``: 0 if unknown.
    """
    tokens = commit.tokens
    times = (commit.queue_ms, commit.verify_ms)
    if not len(tokens) <= commit.committed_len <= end:
        reason = f"{len(tokens)} tokens end at position {commit.committed_len} of at most {end}"
    elif tokens and not (min(tokens) >= 0 and max(tokens) < (vocab_size or MAX_POSITION)):
        reason = f"a token is outside the vocabulary of {vocab_size or MAX_POSITION}"
    elif not (0 <= commit.accepted <= commit.drafted <= MAX_DRAFTED and commit.accepted <= len(tokens)):
        reason = f"{commit.accepted} of {commit.drafted} drafts accepted with {len(tokens)} tokens"
    elif not all(0 <= ms <= _MAX_TIME_MS for ms in times):
        reason = f"times of {times[0]} and {times[1]} ms"
    elif commit.finished not in _FINISHED:
        reason = f"unknown end {commit.finished[:20]!r}"
    elif commit.logprobs and len(commit.logprobs) != len(tokens):
        reason = f"{len(commit.logprobs)} log-probabilities for {len(tokens)} tokens"
    elif not all(_valid(entry, vocab_size or MAX_POSITION) for entry in commit.logprobs):
        reason = "invalid log-probabilities"
    else:
        return
    raise ProtocolError(f"Invalid commit frame: {reason}.", HINT)


def _valid(entry: TokenLogprob, vocab_size: int) -> bool:
    in_vocabulary = all(0 <= token < vocab_size for token, _ in entry.top)
    return in_vocabulary and not any(map(math.isnan, (entry.logprob, *(value for _, value in entry.top))))


def check_request(request: GenerationRequest) -> None:
    """Raise :class:`SettingsError` if a number is beyond what a frame can hold."""
    for name, numbers in (
        ("A prompt token", request.tokens),
        ("A stop token", request.stop_tokens),
        ("max_new", (request.max_new,)),
    ):
        if numbers and not 0 <= min(numbers) <= max(numbers) < MAX_POSITION:
            raise SettingsError(f"{name} is out of bounds.", f"Use 0 to {MAX_POSITION - 1}.")
