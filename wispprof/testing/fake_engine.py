"""A fake model pair without weights: the target's next token is a hash of its prefix and sampling settings.

The engine keeps the whole contract of :class:`~wispprof.backends.Engine`: it caches by length, runs out of
memory, rolls back, and decides each token from exactly the tokens it was fed. A lost rollback or a crossed
session therefore changes its text.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from wispprof.backends import Drafter, Engine, EngineCapabilities, IntegrityReport, OpenSessions
from wispprof.errors import EngineError, InputRefused, OutOfKvMemory
from wispprof.token_tree import ROOT
from wispprof.types import (
    BatchShape,
    DraftFeatures,
    DraftToken,
    GenerationDefaults,
    Sampling,
    ServedModel,
    StepInput,
    TokenLogprob,
    VerifyResult,
)

_GREEDY = Sampling()
_MASK = (1 << 64) - 1


def _mix(state: int, value: int) -> int:
    """One round of splitmix64 over a running state."""
    z = (state + value * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


@dataclass(frozen=True, slots=True)
class FakeTarget:
    """A language model of ``vocab`` tokens whose next token is a hash of all before it.

    >>> FakeTarget().generate([1, 2, 3], 4) == FakeTarget().generate([1, 2, 3], 4)
    True
    """

    vocab: int = 256

    def start(self, sampling: Sampling) -> int:
        """Hash state of the empty prefix. Greedy sampling ignores the seed, as argmax does."""
        if sampling.temperature == 0:
            return 1
        state = 2
        for value in (sampling.seed, sampling.temperature, sampling.top_k, sampling.top_p):
            state = _mix(state, hash(value) & _MASK)
        return _mix(state, hash(sampling.min_p) & _MASK) if sampling.min_p else state

    def feed(self, state: int, token: int) -> int:
        return _mix(state, token + 1)

    def next(self, state: int) -> int:
        return (state >> 11) % self.vocab

    def choose(self, state: int, position: int, sampling: Sampling) -> int:
        """The token at ``position``: the likeliest one that may stand there. Raises :class:`ValueError` if
        none may."""
        token = self.next(state)
        if position >= sampling.min_length:
            return token
        for rank in range(self.vocab):
            if (allowed := (token + rank) % self.vocab) not in sampling.stop_tokens:
                return allowed
        raise ValueError("Every token of the vocabulary is a stop token.")

    def logprob(self, state: int, token: int, count: int) -> TokenLogprob:
        """Each token is half as likely as the id before it; :meth:`next` has probability 1/2."""
        best = self.next(state)
        rank = (token - best) % self.vocab
        top = tuple(((best + r) % self.vocab, -(r + 1) * math.log(2.0)) for r in range(count))
        return TokenLogprob(-(rank + 1) * math.log(2.0), top)

    def generate(self, prompt: Sequence[int], count: int, sampling: Sampling = _GREEDY) -> list[int]:
        """The ``count`` tokens that this target writes after ``prompt``."""
        state = self.start(sampling)
        for token in prompt:
            state = self.feed(state, token)
        out: list[int] = []
        while len(out) < count:
            out.append(self.choose(state, len(prompt) + len(out), sampling))
            state = self.feed(state, out[-1])
        return out


@dataclass(slots=True)
class _Cache:
    """Tokens of one session and the hash state after each of them."""

    sampling: Sampling
    tokens: list[int] = field(default_factory=list)
    states: list[int] = field(default_factory=list)


class FakeEngine(Engine):
    """A verifier engine of :class:`FakeTarget`.

    ``step_ms(shape)``: how long a step takes, by default no time; ``sleep`` (seconds) spends it.
    ``stop_tokens``, ``chat_template`` and ``defaults`` are the model's own. ``trees``: verifies draft trees.

    >>> engine = FakeEngine()
    >>> engine.open("a", Sampling())
    >>> [draft] = engine.target.generate([1, 2, 3], 1)
    >>> engine.step([StepInput("a", [1, 2, 3, draft], drafts=1)])[0].accepted
    1
    """

    def __init__(
        self,
        vocab: int = 256,
        *,
        max_context: int = 4096,
        kv_tokens: int = 1 << 20,
        step_ms: Callable[[BatchShape], float] | None = None,
        sleep: Callable[[float], None] = time.sleep,
        stop_tokens: tuple[int, ...] = (),
        chat_template: str = "",
        defaults: GenerationDefaults | None = None,
        trees: bool = False,
    ) -> None:
        self.target = FakeTarget(vocab)
        self._trees = trees
        self._stop_tokens = stop_tokens
        self._chat_template = chat_template
        self._defaults = defaults or GenerationDefaults()
        self._max_context = max_context
        self._kv_tokens = kv_tokens
        self._step_ms = step_ms
        self._sleep = sleep
        self._caches: OpenSessions[_Cache] = OpenSessions()
        self._used = 0
        self.steps = 0

    @property
    def max_context(self) -> int:
        return self._max_context

    @property
    def capabilities(self) -> EngineCapabilities:
        return EngineCapabilities(
            "any",
            max_context=self._max_context,
            max_drafts=self._max_context - 1,
            max_sessions=1 << 20,
            trees=self._trees,
            fork=True,
        )

    @property
    def kv_tokens(self) -> int:
        return self._kv_tokens

    @property
    def kv_free(self) -> int:
        return self._kv_tokens - self._used

    @property
    def served(self) -> ServedModel:
        """The model as edges see it."""
        return ServedModel(
            f"hash-{self.target.vocab}",
            "hash",
            self.target.vocab,
            self._max_context,
            stop_tokens=self._stop_tokens,
            chat_template=self._chat_template,
            defaults=self._defaults,
        )

    @property
    def sessions(self) -> tuple[str, ...]:
        return tuple(self._caches)

    def open(self, session: str, sampling: Sampling, tokens: Sequence[int] = (), owner: str = "") -> None:
        if session in self._caches:
            raise EngineError(f"Session {session!r} is already open.")
        self._caches[session] = _Cache(sampling)

    def fork(self, session: str, child: str, length: int, sampling: Sampling) -> None:
        parent = self._caches[session]
        if length > len(parent.tokens):
            raise EngineError(f"{session} caches {len(parent.tokens)} tokens, not {length}.")
        if length > self.kv_free:
            raise OutOfKvMemory(f"{length} tokens to fork, {self.kv_free} free.")
        self.open(child, sampling)
        self._append(self._caches[child], parent.tokens[:length])

    def step(self, inputs: Sequence[StepInput]) -> list[VerifyResult]:
        self._check_inputs(inputs)
        shape = BatchShape.of(
            (len(i.tokens), len(self._caches[i.session].tokens), not i.needs_logits) for i in inputs
        )
        if shape.new_tokens > self.kv_free:
            raise OutOfKvMemory(f"{shape.new_tokens} new tokens, {self.kv_free} free.")
        results = [self._verify(given) for given in inputs]
        self.steps += 1
        if self._step_ms is not None:
            self._sleep(self._step_ms(shape) / 1000.0)
        return results

    def _check_inputs(self, inputs: Sequence[StepInput]) -> None:
        seen: set[str] = set()
        for given in inputs:
            name, new = given.session, len(given.tokens)
            if name not in self._caches:
                raise InputRefused(name, f"No session {name!r} is open.")
            if name in seen:
                raise InputRefused(name, f"Session {name!r} may appear in a step only once.")
            if not 0 <= given.drafts < new or (given.drafts and not given.needs_logits):
                raise InputRefused(name, f"Session {name!r}: {new} tokens with {given.drafts} drafts.")
            if given.parents and not self._trees:
                raise InputRefused(name, f"{name}: this engine verifies chains of drafts, not trees.")
            early = all(ROOT <= parent < node for node, parent in enumerate(given.parents))
            if len(given.parents) not in (0, given.drafts) or not early:
                raise InputRefused(name, f"{name}: {list(given.parents)} are no parents of a tree.")
            if len(self._caches[name].tokens) + new > self._max_context:
                raise InputRefused(name, f"{name} would exceed {self._max_context} tokens.")
            if not all(0 <= token < self.target.vocab for token in given.tokens):
                raise InputRefused(name, f"{name}: a token lies outside the vocabulary.")
            sampling, length = self._caches[name].sampling, len(self._caches[name].tokens) + new
            masked = given.needs_logits and length - given.drafts < sampling.min_length
            if masked and not set(range(self.target.vocab)) - set(sampling.stop_tokens):
                raise InputRefused(name, f"{name}: every token of the vocabulary is a stop token.")
            seen.add(name)

    def _verify(self, given: StepInput) -> VerifyResult:
        cache = self._caches[given.session]
        tokens = list(given.tokens)
        first_draft = len(tokens) - given.drafts
        self._append(cache, tokens[:first_draft])
        if not given.needs_logits:
            return VerifyResult(given.session, 0, ())
        out: list[int] = []
        logprobs: list[TokenLogprob] = []
        child: dict[tuple[int, int], int] = {}
        parents = given.parents or range(ROOT, given.drafts - 1)
        for number, step in enumerate(zip(parents, tokens[first_draft:], strict=True)):
            child.setdefault(step, number)
        node: int | None = ROOT
        while node is not None:
            state, sampling = cache.states[-1], cache.sampling
            out.append(self.target.choose(state, len(cache.tokens), sampling))
            if sampling.logprobs is not None:
                logprobs.append(self.target.logprob(state, out[-1], sampling.logprobs))
            if (node := child.get((node, out[-1]))) is not None:
                self._append(cache, out[-1:])
        return VerifyResult(given.session, len(out) - 1, tuple(out), tuple(logprobs))

    def _append(self, cache: _Cache, tokens: Sequence[int]) -> None:
        state = cache.states[-1] if cache.states else self.target.start(cache.sampling)
        for token in tokens:
            state = self.target.feed(state, token)
            cache.states.append(state)
        cache.tokens.extend(tokens)
        self._used += len(tokens)

    def rollback(self, session: str, length: int) -> None:
        cache = self._caches[session]
        if not 0 <= length <= len(cache.tokens):
            raise EngineError(f"{session} caches {len(cache.tokens)} tokens, not {length}.")
        self._used -= len(cache.tokens) - length
        del cache.tokens[length:]
        del cache.states[length:]

    def close(self, session: str) -> None:
        self._used -= len(self._caches.take(session).tokens)

    def cached(self, session: str) -> int:
        return len(self._caches[session].tokens)

    def check_integrity(self, session: str | None = None) -> IntegrityReport:
        if self._used != sum(len(c.tokens) for c in self._caches.values()):
            raise EngineError("The count of used tokens differs from what the sessions cache.")
        for name, cache in self._caches.items():
            if session not in (None, name):
                continue
            state = self.target.start(cache.sampling)
            for token in cache.tokens:
                state = self.target.feed(state, token)
            if cache.states and cache.states[-1] != state:
                raise EngineError(f"The cache of {name} differs from its tokens.")
        return IntegrityReport(dict.fromkeys(self._caches if session is None else [session], 0.0), 0.0)


class FakeDrafter(Drafter):
    """Proposes the target's next token with a given ``accuracy``; a hash with ``salt`` decides when it errs.

    >>> drafter = FakeDrafter(FakeTarget(), accuracy=1.0)
    >>> drafter.open([1, 2, 3], Sampling())
    >>> [drafter.draft().token] == FakeTarget().generate([1, 2, 3], 1)
    True
    """

    def __init__(self, target: FakeTarget, accuracy: float = 0.7, salt: int = 0) -> None:
        self._target = target
        self._accuracy = accuracy
        self._salt = salt
        self._sampling = _GREEDY
        self._tokens: list[int] = []
        self._states: list[int] = []

    @property
    def length(self) -> int:
        return len(self._tokens)

    def open(self, tokens: Sequence[int], sampling: Sampling) -> None:
        self._sampling = sampling
        self._tokens, self._states = [], [self._target.start(sampling)]
        self.extend(tokens)

    def draft(self) -> DraftToken:
        state = self._states[-1]
        correct = self._target.choose(state, len(self._tokens), self._sampling)
        draw = (_mix(state, self._salt) >> 16) % 10_000 / 10_000.0
        token = correct if draw < self._accuracy else (correct + 1) % self._target.vocab
        self.extend([token])
        # Correct tokens get a higher confidence, so that rejection predictors can learn from it.
        confidence = min(0.99, max(0.01, 1.0 - draw))
        return DraftToken(token, DraftFeatures(confidence, 1.0 - confidence, 4.0 * confidence, 1.0))

    def rollback(self, length: int) -> None:
        if length > len(self._tokens):
            raise ValueError(f"cannot roll back {len(self._tokens)} tokens to {length}")
        del self._tokens[length:]
        del self._states[length + 1 :]

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self._tokens.append(token)
            self._states.append(self._target.feed(self._states[-1], token))
