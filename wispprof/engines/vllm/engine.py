"""The engine contract over vLLM: its forward pass, KV blocks, prefix cache, ranks and quantisation.

A session is a vLLM request that never ends by itself. Each step grants exactly the tokens fed
(:mod:`~wispprof.engines.vllm.scheduler`); the noise sampler decides rows on every rank
(:mod:`~wispprof.engines.vllm.worker`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from wispprof.backends import Engine, EngineCapabilities, IntegrityReport, OpenSessions
from wispprof.engines.vllm.block_audit import check_blocks
from wispprof.engines.vllm.grant import Grant
from wispprof.engines.vllm.request import PENDING, RequestMaker, VllmSession, out_of_blocks, request_maker
from wispprof.engines.vllm.target import arithmetic
from wispprof.engines.vllm.vllm_metrics import VllmMetrics
from wispprof.engines.warm_up import FEW_ROWS, SESSIONS, warm_up
from wispprof.errors import EngineError, EngineLost, InputRefused, OutOfKvMemory
from wispprof.sampling.sampler import UNDECIDED, bounded
from wispprof.types import ModelInfo, Sampling, StepInput, TokenLogprob, VerifyResult

if TYPE_CHECKING:
    from wispprof.engines.vllm.scheduler import GrantScheduler

_WARM_ROWS = 128
"""A number of rows takes five or six of the 1,024 kernels that oneDNN keeps."""


class VllmEngine(Engine):
    """Over an ``EngineCore`` that :func:`~wispprof.engines.vllm.build.build_core` made.

    ``max_items`` and ``max_tokens``: inputs and tokens of one step. ``max_drafts``: of one input.
    """

    def __init__(self, core: Any, *, info: ModelInfo, max_sessions: int, max_drafts: int) -> None:
        config = core.vllm_config
        self._core = core
        self._scheduler: GrantScheduler = core.scheduler
        self._sessions: OpenSessions[VllmSession] = OpenSessions()
        self._lost = ""
        self.info = info
        self._names = 0
        self.max_sessions = max_sessions
        self.max_drafts = max_drafts
        self.max_items = int(config.scheduler_config.max_num_seqs)
        self.max_tokens = int(config.scheduler_config.max_num_batched_tokens)
        # One position stays for the token that is decided after the last cached one.
        self.max_context = int(config.model_config.max_model_len) - 1
        self.vocab_size = info.vocab_size
        groups = core.scheduler.kv_cache_manager.coordinator.single_type_managers
        self.block_tokens = int(groups[0].block_size)
        self._kv_groups = len(groups)
        self._full_attention = {type(group).__name__ for group in groups} == {"FullAttentionManager"}
        self._prefixes = self._full_attention and bool(config.cache_config.enable_prefix_caching)
        self._make_request: RequestMaker = request_maker(core)
        self._metrics = VllmMetrics(core) if core.log_stats else None
        core.collective_rpc("wispprof_install")

    # --- capacity ----------------------------------------------------------------------------------

    @property
    def capabilities(self) -> EngineCapabilities:
        return EngineCapabilities(
            "any",
            max_context=self.max_context,
            max_drafts=self.max_drafts,
            max_sessions=self.max_sessions,
            graphs=not self._core.vllm_config.model_config.enforce_eager,
            fork=self._prefixes,
            dtype=arithmetic(self._core.vllm_config),
        )

    @property
    def sessions(self) -> list[str]:
        return list(self._sessions)

    @property
    def kv_tokens(self) -> int:
        return self._scheduler.blocks_total * self.block_tokens // self._kv_groups

    @property
    def kv_free(self) -> int:
        """Tokens that free blocks hold. A step may need more: it takes whole blocks."""
        return self._scheduler.blocks_free * self.block_tokens // self._kv_groups

    @property
    def core(self) -> Any:
        """vLLM's ``EngineCore``."""
        return self._core

    # --- sessions ----------------------------------------------------------------------------------

    def open(
        self, session: str, sampling: Sampling | None = None, tokens: Sequence[int] = (), owner: str = ""
    ) -> None:
        self.check_can_open(session)
        settings = bounded(sampling or Sampling(), self.vocab_size)
        self._sessions[session] = self._new_session(list(tokens), settings, owner)

    def open_computed(self, session: str, tokens: Sequence[int]) -> None:
        """Open a session that holds the blocks of ``tokens`` without computing them, to time steps with.

        Raises :class:`OutOfKvMemory` if the blocks do not fit.
        """
        self.check_can_open(session)
        held = self._new_session([*tokens, PENDING], Sampling(), reuse=False)
        if not self._scheduler.hold(held.request, len(tokens)):
            self._core.abort_requests([held.request.request_id])
            raise out_of_blocks(len(tokens), self.kv_free)
        held.cached = len(tokens)
        self._sessions[session] = held

    def close(self, session: str) -> None:
        closed = self._sessions.take(session)
        self._core.abort_requests([closed.request.request_id])

    def rollback(self, session: str, length: int) -> None:
        held = self._sessions[session]
        request = held.request
        if not 0 <= length <= held.cached:
            raise EngineError(
                f"Session {session!r} caches {held.cached} tokens; it cannot be rolled back to {length}."
            )
        if length == held.cached:
            return
        shared = self._scheduler.tokens_hashed(request) > length
        if length == 0 or shared or not self._full_attention:
            # Blocks go back; what the prefix cache still holds of them is found again.
            self._core.abort_requests([request.request_id])
            known = list(request._all_token_ids)
            tokens = known if length == 0 else [*known[:length], PENDING]
            again = self._new_session(tokens, held.sampling, request.cache_salt)
            again.cached = length
            if length:
                self._scheduler.adopt_prefix(again.request)
            self._sessions[session] = again
            return
        held.cached = length
        request.num_computed_tokens = min(request.num_computed_tokens, length)
        if length + 1 < request.num_tokens and length + 1 >= request.num_prompt_tokens:
            self._scheduler.truncate_output(request, length + 1)

    def fork(self, session: str, child: str, length: int, sampling: Sampling | None = None) -> None:
        """As :meth:`Engine.fork`. The child shares whole blocks and computes the rest in its first step."""
        source = self._sessions[session]
        if not self._prefixes:
            super().fork(session, child, length, sampling or source.sampling)
        if not 0 <= length <= source.cached:
            raise EngineError(
                f"Session {session!r} caches {source.cached} tokens; it cannot be forked at {length}."
            )
        self.check_can_open(child)
        tokens = [*source.request._all_token_ids[:length], PENDING]
        settings = bounded(sampling or source.sampling, self.vocab_size)
        forked = self._new_session(tokens, settings, source.request.cache_salt)
        forked.cached = length
        self._scheduler.adopt_prefix(forked.request)
        missing = length - forked.request.num_computed_tokens
        if missing > self.kv_free:
            self._core.abort_requests([forked.request.request_id])
            raise out_of_blocks(missing, self.kv_free)
        self._sessions[child] = forked

    def cached(self, session: str) -> int:
        return self._sessions[session].cached

    # --- a step ------------------------------------------------------------------------------------

    def step(self, inputs: Sequence[StepInput]) -> list[VerifyResult]:
        if not inputs:
            return []
        if self._lost:
            raise EngineLost(self._lost)
        if len(inputs) > self.max_items:
            raise EngineError(f"A step holds at most {self.max_items} inputs, got {len(inputs)}.")
        sessions = [self._checked(one) for one in inputs]
        if len({id(one) for one in sessions}) < len(inputs):
            twice = next(one.session for i, one in enumerate(inputs) if sessions.index(sessions[i]) < i)
            raise InputRefused(twice, f"Session {twice!r} appears twice in one step.")
        needed = sum(
            self._scheduler.blocks_needed(held.request, held.cached + len(one.tokens))
            for one, held in zip(inputs, sessions, strict=True)
        )
        if needed > self._scheduler.blocks_free:
            raise OutOfKvMemory(
                f"{needed} KV blocks are needed; {self._scheduler.blocks_free} are free.",
                "Close sessions, feed fewer tokens, or start with more --kv-tokens.",
            )
        self._catch_up(inputs, sessions)
        grants = [self._grant(one, held) for one, held in zip(inputs, sessions, strict=True)]
        before = [held.request.num_computed_tokens for held in sessions]
        decided = self._run(grants)
        if spoiled := [i for i, s in zip(inputs, sessions, strict=True) if _undecided(i, s, decided)]:
            self._undo(sessions, before)
            name = spoiled[0].session
            raise InputRefused(
                name,
                f"The target's logits of session {name!r} are not finite.",
                "Check the target's weights, or serve it with another --dtype.",
            )
        logprobs = self._logprobs(inputs, sessions)
        results = []
        for one, held in zip(inputs, sessions, strict=True):
            name = held.request.request_id
            tokens = decided.get(name, ())
            held.cached = held.request.num_computed_tokens
            held.announced = True
            rows = tuple(logprobs.get(name, ())[: len(tokens)])
            results.append(VerifyResult(one.session, max(0, len(tokens) - 1), tokens, rows))
        return results

    def _checked(self, one: StepInput) -> VllmSession:
        """The session of an input that vLLM can compute."""
        held = self._sessions.get(one.session)
        if held is None:
            raise InputRefused(one.session, f"There is no session {one.session!r}.", "Open it first.")
        fed = len(one.tokens)
        err = ""
        if fed <= one.drafts or one.drafts < 0:
            err = f"{fed} tokens cannot end with {one.drafts} drafts"
        elif one.drafts and not one.needs_logits:
            err = "drafts need logits"
        elif one.parents:
            err = "vLLM verifies chains of drafts, not trees"
        elif one.drafts > self.max_drafts:
            err = f"{one.drafts} drafts exceed the maximum of {self.max_drafts}"
        elif held.cached + fed > self.max_context:
            err = f"{held.cached} cached and {fed} new tokens exceed the context of {self.max_context}"
        elif min(one.tokens) < 0 or max(one.tokens) >= self.vocab_size:
            err = f"a token id lies outside the vocabulary of {self.vocab_size}"
        if err:
            raise InputRefused(one.session, f"Session {one.session!r}: {err}.")
        return held

    def _catch_up(self, inputs: Sequence[StepInput], sessions: Sequence[VllmSession]) -> None:
        """Compute what sessions count as cached but vLLM has not, if it does not fit into the same step."""
        missing = [held.cached - held.request.num_computed_tokens for held in sessions]
        fed = sum(len(one.tokens) for one in inputs)
        if fed > self.max_tokens:
            raise EngineError(f"A step holds at most {self.max_tokens} new tokens, got {fed}.")
        if fed + sum(missing) <= self.max_tokens:
            return
        for held, left in zip(sessions, missing, strict=True):
            while left:
                new = min(left, self.max_tokens)
                self._run([Grant(held.request, new, [], not held.announced)])
                held.announced = True
                left = held.cached - held.request.num_computed_tokens

    def _grant(self, one: StepInput, held: VllmSession) -> Grant:
        request, cached = held.request, held.cached
        plain = len(one.tokens) - one.drafts
        end = cached + plain
        known: list[int] = request._all_token_ids
        fed = [int(token) for token in one.tokens]
        fits = end == len(known) if one.needs_logits else end < len(known)
        if not fits or known[cached:end] != fed[:plain]:
            tokens = [*known[:cached], *fed[:plain]]
            if not one.needs_logits:
                tokens.append(PENDING)
            self._scheduler.set_tokens(request, tokens, cached)
            held.announced = False
        return Grant(request, end - request.num_computed_tokens, fed[plain:], not held.announced)

    def _undo(self, sessions: Sequence[VllmSession], computed: Sequence[int]) -> None:
        """Take a step back: what it cached stays in its blocks and is computed again."""
        for held, length in zip(sessions, computed, strict=True):
            request = held.request
            tokens = [*request._all_token_ids[: held.cached], PENDING]
            self._scheduler.set_tokens(request, tokens, held.cached)
            request.num_computed_tokens = length
            held.announced = False

    def _run(self, grants: list[Grant]) -> dict[str, tuple[int, ...]]:
        """One step of vLLM: what it decided, by request."""
        self._scheduler.grants = grants
        try:
            outputs = self._execute()
        except Exception as err:
            self._lost = f"vLLM failed in a step: {type(err).__name__}: {err}"
            raise EngineLost(self._lost, "Load the engine again and prefill its sessions.") from err
        if self._metrics is not None:
            self._metrics.record(outputs)
        return {
            one.request_id: tuple(one.new_token_ids) for output in outputs.values() for one in output.outputs
        }

    def _execute(self) -> dict[int, Any]:
        """As ``EngineCore.step``, which sends the workers their second call when the first has ended."""
        executor = self._core.model_executor
        scheduled = self._scheduler.schedule()
        forward = executor.execute_model(scheduled, non_block=True)
        sampling = executor.sample_tokens(None, non_block=True)
        # Without sampling, or if the forward pass failed, there is nothing in ``sampling``.
        output = forward.result() or sampling.result()
        found: dict[int, Any] = self._scheduler.update_from_output(scheduled, output)
        return found

    def _logprobs(
        self, inputs: Sequence[StepInput], sessions: Sequence[VllmSession]
    ) -> dict[str, list[TokenLogprob]]:
        asked = (
            s.sampling.logprobs is not None and i.needs_logits for i, s in zip(inputs, sessions, strict=True)
        )
        if not any(asked):
            return {}
        told = self._core.collective_rpc("wispprof_logprobs")[0]
        return {name: [TokenLogprob(own, tuple(top)) for own, top in rows] for name, rows in told.items()}

    # --- checks ------------------------------------------------------------------------------------

    def check_integrity(self, session: str | None = None) -> IntegrityReport:
        """As :meth:`Engine.check_integrity`. A session is left out if its copy does not fit beside it."""
        errors: dict[str, float] = {}
        allowed = 0.0
        for name in list(self._sessions) if session is None else [session]:
            held = self._sessions[name]
            computed = held.request.num_computed_tokens
            if not computed:
                errors[name] = 0.0
                continue
            if -(-computed // self.block_tokens) * self._kv_groups > self._scheduler.blocks_free:
                continue
            errors[name], allowed = self._compare_with_prefill(held, computed)
        bad = {name: error for name, error in errors.items() if not error <= allowed}
        if bad:
            raise EngineError(
                f"Cached KV differs from a fresh prefill in {len(bad)} sessions: {bad} "
                f"(tolerance {allowed}).",
                "Close these sessions and report a defect.",
            )
        return IntegrityReport(errors, allowed)

    def _compare_with_prefill(self, held: VllmSession, computed: int) -> tuple[float, float]:
        """Prefill a copy without the prefix cache, compute the last token of both, and compare them."""
        scheduler, tokens = self._scheduler, [*held.request._all_token_ids[:computed], PENDING]
        copy = self._new_session(tokens, Sampling(), reuse=False)
        try:
            while (left := computed - 1 - copy.request.num_computed_tokens) > 0:
                self._run([Grant(copy.request, min(left, self.max_tokens), [], not copy.announced)])
                copy.announced = True
            scheduler.set_tokens(held.request, tokens, computed)
            held.announced = False
            held.request.num_computed_tokens = computed - 1
            self._core.collective_rpc("wispprof_keep_logits", args=(True,))
            for one in (held, copy):
                self._run([Grant(one.request, 1, [], not one.announced)])
            pair = [(r.request_id, scheduler.blocks_held(r)) for r in (held.request, copy.request)]
            ranks = self._core.collective_rpc("wispprof_compare", args=(*pair, computed))
        finally:
            self._core.collective_rpc("wispprof_keep_logits", args=(False,))
            self._core.abort_requests([copy.request.request_id])
        return max(error for error, _ in ranks), max(allowed for _, allowed in ranks)

    def audit(self, expected: Mapping[str, int]) -> None:
        """As :meth:`Engine.audit`; memory is counted in blocks, so a session may hold up to the blocks of
        its tokens, drafts and next token, and sessions may share blocks."""
        if leaked := set(self._sessions) - set(expected):
            raise EngineError(f"The engine holds {len(leaked)} unknown sessions: {sorted(leaked)}.")
        for name, cached in expected.items():
            if (held := self._sessions[name]).cached != cached:
                raise EngineError(f"The engine caches {held.cached} tokens of {name}, expected {cached}.")
        check_blocks(self._scheduler, [one.request for one in self._sessions.values()])

    def warm_up(self, every_size: bool = False) -> None:
        on_cpu = self._core.vllm_config.device_config.device_type == "cpu"
        longest = min(self.max_drafts + 1, self.max_tokens // SESSIONS)
        rows = range(1, _WARM_ROWS + 1) if every_size and on_cpu else FEW_ROWS
        warm_up(self, rows, longest, most=self.max_items)

    def metrics_text(self) -> bytes:
        return b"" if self._metrics is None else self._metrics.text()

    def shutdown(self) -> None:
        self._core.shutdown()

    # --- helpers -----------------------------------------------------------------------------------

    def _new_session(
        self, tokens: list[int], sampling: Sampling, owner: str | None = None, *, reuse: bool = True
    ) -> VllmSession:
        self._names += 1
        request = self._make_request(f"w{self._names}", tokens, sampling, owner)
        request.skip_reading_prefix_cache = not (reuse and self._prefixes)
        self._scheduler.add_request(request)
        return VllmSession(request, sampling)


def _undecided(one: StepInput, held: VllmSession, decided: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the logits of an input were not finite, so that no token could be decided."""
    tokens = decided.get(held.request.request_id, ())
    return one.needs_logits and (not tokens or tokens[0] == UNDECIDED)
