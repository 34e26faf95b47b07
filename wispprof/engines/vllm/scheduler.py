"""vLLM's scheduler with steps decided outside: exactly the granted tokens of exactly the granted requests.

Blocks, prefix cache, rollback of rejected drafts and aborts stay vLLM's. Requests that are not granted keep
their blocks and wait; none is ever preempted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from wispprof.engines.vllm.grant import Grant


class GrantScheduler(Scheduler):  # type: ignore[misc]
    """Schedules :attr:`grants`, once. The caller has checked :meth:`blocks_needed` against
    :attr:`blocks_free`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.grants: Sequence[Grant] = ()

    # --- blocks ----------------------------------------------------------------------------------

    @property
    def blocks_free(self) -> int:
        """Blocks that hold nothing, or only a prefix that no request uses."""
        free: int = self.kv_cache_manager.block_pool.get_num_free_blocks()
        return free

    @property
    def blocks_total(self) -> int:
        """All blocks but the null block."""
        return int(self.kv_cache_manager.block_pool.num_gpu_blocks) - 1

    def blocks_held(self, request: Any) -> list[list[int]]:
        """Block ids of a request, by KV group; 0 is the null block."""
        groups = self.kv_cache_manager.coordinator.single_type_managers
        return [[b.block_id for b in g.req_to_blocks.get(request.request_id, ())] for g in groups]

    def slots_held(self, request: Any) -> int:
        """Tokens that the blocks of a request span, those outside a sliding window included."""
        groups = self.kv_cache_manager.coordinator.single_type_managers
        return int(min(len(g.req_to_blocks.get(request.request_id, ())) * g.block_size for g in groups))

    def blocks_needed(self, request: Any, length: int) -> int:
        """Blocks to allocate, without any prefix hit, until the request can cache ``length`` tokens."""
        needed = 0
        for group in self.kv_cache_manager.coordinator.single_type_managers:
            held = len(group.req_to_blocks.get(request.request_id, ()))
            needed += max(0, -(-length // int(group.block_size)) - held)
        return needed

    def tokens_hashed(self, request: Any) -> int:
        """Leading tokens whose blocks the prefix cache may share, so that they must not be overwritten."""
        groups = self.kv_cache_manager.coordinator.single_type_managers
        return int(max(g.num_cached_block.get(request.request_id, 0) * g.block_size for g in groups))

    # --- requests --------------------------------------------------------------------------------

    def set_tokens(self, request: Any, tokens: list[int], same: int) -> None:
        """Replace a request's tokens, all as its prompt; the first ``same`` of them are unchanged."""
        request.prompt_token_ids = tokens
        request.num_prompt_tokens = len(tokens)
        request._output_token_ids.clear()
        request._all_token_ids[:] = tokens
        del request.block_hashes[same // self.hash_block_size :]
        request.update_block_hashes()

    def truncate_output(self, request: Any, tokens: int) -> None:
        """Keep the first ``tokens`` tokens of a request, not fewer than its prompt."""
        outputs = tokens - request.num_prompt_tokens
        del request._output_token_ids[outputs:]
        del request._all_token_ids[tokens:]
        del request.block_hashes[tokens // self.hash_block_size :]

    def adopt_prefix(self, request: Any) -> None:
        """Hold the blocks of the longest cached prefix of a waiting request, and start it there."""
        manager = self.kv_cache_manager
        manager.new_step_starts()
        blocks, hit, *_ = manager.get_computed_blocks(request)
        if hit:
            manager.allocate_slots(request, 0, num_new_computed_tokens=hit, new_computed_blocks=blocks)
        self._start(request, hit)

    def hold(self, request: Any, length: int) -> bool:
        """Give a waiting request blocks for ``length`` tokens, as if computed; false if they do not fit."""
        if self.blocks_needed(request, length) > self.blocks_free:
            return False
        if length:
            self.kv_cache_manager.new_step_starts()
            self.kv_cache_manager.allocate_slots(request, length)
        self._start(request, length)
        return True

    def _start(self, request: Request, computed: int) -> None:
        self.waiting.remove_requests([request])
        self.running.append(request)
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = computed

    # --- a step ----------------------------------------------------------------------------------

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        grants, self.grants = self.grants, ()
        self.current_step += 1
        manager = self.kv_cache_manager
        manager.new_step_starts()
        counts: dict[str, int] = {}
        drafts: dict[str, list[int]] = {}
        new_blocks: dict[str, Any] = {}
        known: list[Request] = []
        announced: list[Request] = []
        for request, new, proposed, announce in grants:
            name = request.request_id
            hits: dict[str, Any] = {}
            end = request.num_computed_tokens + new
            if request.status == RequestStatus.WAITING:
                blocks, hit, *_ = manager.get_computed_blocks(request)
                if 0 < hit < end:
                    hits = {"num_new_computed_tokens": hit, "new_computed_blocks": blocks}
                    new -= hit
            count = new + len(proposed)
            allocated = manager.allocate_slots(request, count, **hits)
            if allocated is None:
                raise RuntimeError(f"no KV blocks for {count} tokens of {name}")
            if request.status == RequestStatus.WAITING:
                self._start(request, hits.get("num_new_computed_tokens", 0))
            if announce:
                announced.append(request)
                if request.num_computed_tokens or name in self.prev_step_scheduled_req_ids:
                    # The workers forget what they knew of it first.
                    self.finished_req_ids.add(name)
            else:
                known.append(request)
                new_blocks[name] = allocated
            counts[name] = count
            if proposed:
                drafts[name] = proposed
        out = SchedulerOutput.make_empty()
        out.scheduled_new_reqs = [
            NewRequestData.from_request(one, manager.get_blocks(one.request_id).get_block_ids())
            for one in announced
        ]
        out.scheduled_cached_reqs = self._make_cached_request_data(known, [], counts, drafts, new_blocks)
        self.prev_step_scheduled_req_ids.clear()
        self.prev_step_scheduled_req_ids.update(counts)
        out.num_scheduled_tokens = counts
        out.total_num_scheduled_tokens = sum(counts.values())
        out.scheduled_spec_decode_tokens = drafts
        out.finished_req_ids = self.finished_req_ids
        out.new_block_ids_to_zero = self._get_new_block_ids_to_zero()
        self._update_after_schedule(out)
        return out

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        # Sessions end when the caller closes them, not by a token or a length.
        request.append_output_token_ids(new_token_ids)
        return new_token_ids, False
