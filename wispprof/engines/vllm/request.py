"""A session as a vLLM request that never ends by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from wispprof.engines.vllm.worker import SAMPLING
from wispprof.errors import OutOfKvMemory
from wispprof.types import Sampling

PENDING = 0
"""Stands for a token that is not known yet, so that vLLM sees more prompt to come and decides nothing."""


@dataclass(slots=True)
class VllmSession:
    """``cached``: tokens the session caches, as the caller counts them. vLLM's request may have computed
    fewer (the part of a shared block): it computes the rest with the next step. ``announced``: the workers
    know the request as it is."""

    request: Any
    sampling: Sampling
    cached: int = 0
    announced: bool = False


def out_of_blocks(tokens: int, free: int) -> OutOfKvMemory:
    return OutOfKvMemory(
        f"{tokens} tokens do not fit: {free} are free.",
        "Close sessions, feed fewer tokens, or start with more --kv-tokens.",
    )


RequestMaker = Callable[[str, list[int], Sampling, str | None], Any]


def request_maker(core: Any) -> RequestMaker:
    """A function of id, tokens, sampling and owner to a vLLM request that never ends by itself."""
    from vllm import SamplingParams
    from vllm.v1.request import Request

    length = core.vllm_config.model_config.max_model_len
    hasher = core.request_block_hasher

    def make(name: str, tokens: list[int], sampling: Sampling, owner: str | None) -> Any:
        # vLLM's own seed stays unset: its generators are not used.
        params = SamplingParams(
            temperature=0.0,
            max_tokens=length,
            ignore_eos=True,
            detokenize=False,
            extra_args={SAMPLING: asdict(sampling)},
        )
        # The salt is part of a block's hash: requests of different owners never share blocks.
        return Request(name, tokens or [PENDING], params, None, cache_salt=owner or None, block_hasher=hasher)

    return make
