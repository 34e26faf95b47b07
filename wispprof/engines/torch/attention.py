"""How the engine's attention gets into a transformers model: its public attention interface.

The implementation ``wispprof`` is registered once. Called with a ``wispprof_attend`` argument (the
engine passes it through the model's forward) it hands packed queries, keys and values to the engine's
KV store; called without, as by ``model.generate``, it is transformers' own ``sdpa`` with its own mask.
So one loaded model serves the engine and stays an ordinary transformers model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wispprof.errors import ModelUnsupported

__all__ = ["IMPLEMENTATION", "Attend", "grouped_attention", "install", "visible"]

IMPLEMENTATION = "wispprof"

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q (T, heads, d), k (T, kv_heads, d), v (T, kv_heads, d)) → (T, heads · d). Writes k and v to
the store, then attends; T are the packed tokens of the step."""


def install(model: Any) -> None:
    """Make ``model`` use the ``wispprof`` attention implementation."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(IMPLEMENTATION, _forward)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    model.set_attn_implementation(IMPLEMENTATION)


def _forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    attend: Attend | None = kwargs.pop("wispprof_attend", None)
    if attend is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ModelUnsupported(
            "This model's attention caps its logits or has sinks.",
            "Use a Llama-, Qwen- or Mistral-family model.",
        )
    tokens = query.shape[2]
    out = attend(
        module.layer_idx,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
    )
    return out.view(1, tokens, query.shape[1], query.shape[3]), None


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of a padded group of items, without repeating KV heads.

    ``q`` (B, N, heads, d), ``k`` and ``v`` (B, kv_heads, L, d), possibly strided; ``mask`` additive
    (B or 1, 1, N·g, L) with the g query heads of a KV head innermost, or ``None`` where all is visible.
    Returns (B, N, heads · d). The query heads that share a KV head are rows of one matrix: keys and
    values are read once for all of them, and a step of few rows becomes a product of more.
    """
    batch, new, heads, dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    if new == 1:
        folded = q.reshape(batch, kv_heads, group, dim)
    else:
        folded = q.view(batch, new, kv_heads, group, dim).transpose(1, 2)
        folded = folded.reshape(batch, kv_heads, new * group, dim)
    out = F.scaled_dot_product_attention(folded, k, v, attn_mask=mask, scale=scale)
    if new == 1:
        return out.reshape(batch, 1, heads * dim)
    out = out.view(batch, kv_heads, new, group, dim).transpose(1, 2)
    return out.reshape(batch, new, heads * dim)


def visible(limits: Tensor, length: int, group: int, dtype: torch.dtype) -> Tensor:
    """Additive mask (B, 1, N·group, length): position l is seen where ``l <= limits`` (B, N)."""
    seen = torch.arange(length, device=limits.device) <= limits[:, :, None]
    mask = torch.zeros(seen.shape, dtype=dtype, device=limits.device)
    mask.masked_fill_(~seen, -torch.inf)
    batch, new, _ = mask.shape
    if group > 1:
        mask = mask[:, :, None].expand(batch, new, group, length)
    return mask.reshape(batch, 1, new * group, length)
