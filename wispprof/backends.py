"""Base classes of engines and drafters: what a backend implements and may leave to a default."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

from wispprof.errors import EngineError, OutOfKvMemory
from wispprof.token_tree import TokenTree
from wispprof.types import DraftFeatures, DraftToken, Sampling, StepInput, VerifyResult

T = TypeVar("T")


class Drafter(ABC):
    """Proposes tokens one at a time: a model, an n-gram lookup, a replayed trace.

    A drafter holds one sequence and is called from one thread. ``max_context``: maximum tokens it can hold.
    """

    max_context: int = sys.maxsize

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens held, committed and drafted."""

    @property
    def can_draft(self) -> bool:
        """Whether there is anything to propose after the tokens held."""
        return True

    @abstractmethod
    def open(self, tokens: Sequence[int], sampling: Sampling) -> None:
        """Drop everything and start a sequence from these committed tokens."""

    @abstractmethod
    def draft(self) -> DraftToken:
        """Propose the token at position ``length`` and append it to the sequence."""

    @abstractmethod
    def rollback(self, length: int) -> None:
        """Keep the first ``length`` tokens. ``length`` must not exceed the current one."""

    @abstractmethod
    def extend(self, tokens: Sequence[int]) -> None:
        """Append committed tokens that this drafter did not propose."""

    def prefill(self) -> None:  # noqa: B027
        """Read the tokens held now rather than with the next :meth:`draft`. Does nothing by default."""


class DraftCandidate(NamedTuple):
    """A token that a draft model would propose at a position, one of several in falling order of *logits / T
    + the position's noise*. ``prob``: its probability under the request's sampling; greedy, at temperature 1.
    """

    token: int
    prob: float


class Continuations(NamedTuple):
    """A draft model's first candidates after a node of a tree, best first, and the features of its logits."""

    candidates: list[DraftCandidate]
    features: DraftFeatures


class TreeDrafter(Drafter):
    """A drafter that proposes tokens after several nodes of a tree in one forward.

    A tree hangs at the tokens held. Its nodes get KV as they are expanded, beside the sequence.
    :meth:`extend` with a path of expanded nodes keeps their KV, and that of the subtree after it, which
    :meth:`TokenTree.below <wispprof.token_tree.TokenTree.below>` describes. :meth:`draft`, :meth:`rollback`
    and :meth:`open` forget the tree. A node is known by the tokens it spells, not by its number.
    """

    @abstractmethod
    def expand(self, tree: TokenTree, nodes: Sequence[int], width: int) -> list[Continuations]:
        """The first ``width`` candidates after each of ``nodes``, in one forward.

        :data:`~wispprof.token_tree.ROOT` is the sequence held itself. The parent of a node was expanded
        before, or is the root. The first candidate is what :meth:`draft` would propose there; fewer than
        ``width`` if the vocabulary has no more.
        """


@dataclass(frozen=True, slots=True)
class EngineCapabilities:
    """What an engine can do.

    ``families``: model types (``config.model_type``) it serves. ``trees``: verifies draft trees besides
    chains. ``graphs``: runs steps as captured graphs, so times follow padded sizes. ``fork``: supports
    :meth:`Engine.fork`. ``max_drafts``: of one input. ``max_context``: tokens a session may cache.
    ``greedy_only``: refuses a temperature and log-probabilities. ``dtype``: what it computes in, with
    quantisation if there is any; empty if unknown.
    """

    families: tuple[str, ...] | Literal["any"]
    max_context: int
    max_drafts: int
    max_sessions: int
    trees: bool = False
    graphs: bool = False
    fork: bool = False
    greedy_only: bool = False
    dtype: str = ""


class IntegrityReport(NamedTuple):
    """Cached KV against a fresh prefill: relative error by session, and the largest one allowed."""

    errors: dict[str, float]
    tolerance: float


class OpenSessions(dict[str, T]):
    """What an engine holds of each open session, by name; raises :class:`EngineError` for any other."""

    def __missing__(self, session: str) -> T:
        raise EngineError(f"There is no session {session!r}.", "Open it first.")

    def take(self, session: str) -> T:
        """Remove a session; returns what was held of it."""
        held = self[session]
        del self[session]
        return held


class Engine(ABC):
    """Caches the KV of many sessions and decides their next tokens, one batch at a time.

    All calls come from one thread. The caller chooses session names and never uses one twice. Every method
    raises :class:`~wispprof.errors.EngineError` for a session that is not open.

    How a call fails:

    - :class:`~wispprof.errors.InputRefused`: one input of a step is at fault, and the error names its
      session. Every session is as it was. The caller ends that session and repeats the step without it.
    - :class:`~wispprof.errors.OutOfKvMemory`: no capacity now. Every session is as it was.
    - any other :class:`~wispprof.errors.EngineError`: the call is refused. Every session is as it was.
    - any other exception: the engine is lost. It must not be used again.
    """

    @property
    @abstractmethod
    def capabilities(self) -> EngineCapabilities:
        """Constant over the engine's life."""

    @property
    @abstractmethod
    def sessions(self) -> Sequence[str]:
        """Names of all open sessions."""

    @property
    @abstractmethod
    def kv_tokens(self) -> int:
        """Tokens that can be cached in all."""

    @property
    @abstractmethod
    def kv_free(self) -> int:
        """Tokens that can still be cached, by any sessions."""

    @abstractmethod
    def open(self, session: str, sampling: Sampling, tokens: Sequence[int] = (), owner: str = "") -> None:
        """Start a session with nothing cached.

        ``tokens``: what the session begins with, for engines that must know the prompt. Opening computes
        nothing: the caller passes the same tokens to :meth:`step`, in as many inputs as it likes.
        ``owner``: an engine that shares the KV of equal prefixes by itself shares it within one owner only.
        Raises :class:`EngineError` if the name is taken, :class:`OutOfKvMemory` if all sessions are.
        """

    @abstractmethod
    def step(self, inputs: Sequence[StepInput]) -> list[VerifyResult]:
        """Run one forward pass over all inputs; results come in their order.

        A session may appear once. Draft trees need :attr:`EngineCapabilities.trees`. Raises
        :class:`InputRefused` for an input that is invalid or whose logits are not finite where a token must
        be decided, and :class:`OutOfKvMemory` if the inputs need more than :attr:`kv_free`. Nothing has
        changed then.
        """

    @abstractmethod
    def rollback(self, session: str, length: int) -> None:
        """Keep the first ``length`` cached tokens; raises :class:`EngineError` if fewer are cached."""

    @abstractmethod
    def close(self, session: str) -> None:
        """End a session and free what it caches."""

    @abstractmethod
    def cached(self, session: str) -> int:
        """Number of tokens the session caches."""

    @abstractmethod
    def check_integrity(self, session: str | None = None) -> IntegrityReport:
        """Check the bookkeeping, and the cache of one session or of all against its tokens.

        Costs a forward pass over the tokens checked. Raises :class:`EngineError` if they do not agree.
        """

    def fork(self, session: str, child: str, length: int, sampling: Sampling) -> None:
        """Open ``child`` with the first ``length`` cached tokens of ``session``, without a prefill.

        Raises :class:`EngineError` if ``length`` exceeds what is cached or the engine cannot fork, and
        :class:`OutOfKvMemory` if ``length`` exceeds :attr:`kv_free`.
        """
        raise EngineError(
            f"{type(self).__name__} cannot fork sessions.", "Open a session and feed its tokens."
        )

    def check_can_open(self, session: str) -> None:
        """Raise as :meth:`open` does if the name is taken or all sessions are."""
        opened, most = self.sessions, self.capabilities.max_sessions
        if session in opened:
            raise EngineError(f"Session {session!r} is already open.")
        if len(opened) >= most:
            raise OutOfKvMemory(
                f"All {most} sessions of the engine are taken.",
                "Close some, or start with more --max-sessions.",
            )

    def audit(self, expected: Mapping[str, int]) -> None:
        """Raise :class:`EngineError` unless exactly these sessions are open and cache so many tokens."""
        if leaked := set(self.sessions) - set(expected):
            raise EngineError(f"The engine holds {len(leaked)} unknown sessions: {sorted(leaked)}.")
        for name, cached in expected.items():
            if (held := self.cached(name)) != cached:
                raise EngineError(f"The engine caches {held} tokens of {name}, expected {cached}.")
        if (used := self.kv_tokens - self.kv_free) != sum(expected.values()):
            raise EngineError(
                f"The engine uses {used} KV tokens; its sessions cache {sum(expected.values())}."
            )

    def metrics_text(self) -> bytes:
        """Metrics of the backend itself, in Prometheus' text format. None by default."""
        return b""

    def warm_up(self, every_size: bool = False) -> None:  # noqa: B027
        """Pay for lazy initialization before the first real step, for ``every_size`` of a decode step rather
        than for a few. Does nothing by default."""

    def shutdown(self) -> None:  # noqa: B027
        """Release processes and devices. The engine is not used afterwards. Does nothing by default."""
