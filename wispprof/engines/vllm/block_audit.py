"""Whether vLLM's blocks are those of the sessions, no more and no fewer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from wispprof.errors import EngineError

if TYPE_CHECKING:
    from wispprof.engines.vllm.scheduler import GrantScheduler


def check_blocks(scheduler: GrantScheduler, requests: Sequence[Any]) -> None:
    """Raise :class:`EngineError` unless exactly these requests hold all blocks that are taken.

    A request may hold blocks beyond what it has computed, and requests may share blocks.
    """
    used: set[int] = set()
    for request in requests:
        groups = scheduler.blocks_held(request)
        slots = scheduler.slots_held(request)
        if slots < request.num_computed_tokens:
            raise EngineError(
                f"vLLM's request {request.request_id} has computed {request.num_computed_tokens} tokens; its "
                f"blocks hold {slots}."
            )
        used.update(block for group in groups for block in group if block)
    taken = scheduler.blocks_total - scheduler.blocks_free
    if taken != len(used):
        raise EngineError(f"{taken} KV blocks are taken; the sessions hold {len(used)}.")
    if len(scheduler.requests) != len(requests):
        raise EngineError(f"vLLM holds {len(scheduler.requests)} requests for {len(requests)} sessions.")
