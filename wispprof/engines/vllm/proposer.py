"""The drafter that vLLM is given: it never drafts, because drafts come from edges."""

from __future__ import annotations

from typing import Any


class NoDrafts:
    """A ``custom_class`` proposer of vLLM that proposes nothing."""

    def __init__(self, vllm_config: Any) -> None:
        pass

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """There is no model to load."""

    def propose(self, sampled_token_ids: list[Any], *args: Any, **kwargs: Any) -> list[list[int]]:
        return [[] for _ in sampled_token_ids]
