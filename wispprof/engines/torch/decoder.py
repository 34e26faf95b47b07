"""One forward pass over packed tokens, in two equal implementations.

:class:`TransformersDecoder` runs the model's own forward with the KV store's attention.
:class:`FusedDecoder` runs the same arithmetic for the pre-norm block that Llama, Qwen2, Qwen3 and Mistral
share: q/k/v and gate/up fused into one product each, no module wrappers, which on small models cost as much
as the arithmetic. It shares the weights of the transformers model.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wispprof.engines.model_config import CLASSES
from wispprof.engines.tensor_parallel import Ranks
from wispprof.engines.torch.kv_store import Attend
from wispprof.engines.torch.packed_linear import PackedLinear, rows_to_pack
from wispprof.errors import ModelUnsupported

ATTENTION = "wispprof"


class Decoder(Protocol):
    """Packed tokens in, final hidden states out; ``attend`` knows the sessions."""

    scale: float

    def reserve(self, length: int) -> None:
        """Prepare for positions below ``length``."""

    def forward(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """``ids``, ``positions`` (T,) int64 → hidden states after the final norm, (T, hidden)."""

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, hidden) → (n, V)."""


def decoder_for(model: Any, ranks: Ranks | None = None) -> Decoder:
    """A fused decoder if it supports the model, else the model's own forward.

    ``ranks``: ``model`` holds one rank's shard, which only the fused decoder can compute with.
    """
    if FusedDecoder.supports(model):
        return FusedDecoder(model, ranks)
    if ranks is not None:
        raise ModelUnsupported(
            f"{type(model).__name__} cannot be served over several ranks.",
            "Serve it on one device.",
        )
    return TransformersDecoder(model)


def _install_attention(model: Any) -> None:
    """Register the ``wispprof`` attention implementation and make ``model`` use it.

    Called with a ``wispprof_attend`` argument, which transformers passes through the model's forward, it
    hands packed queries, keys and values to the KV store. Called without, as by ``model.generate``, it is
    transformers' ``sdpa``. So one loaded model serves the engine and stays an ordinary transformers model.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, _attention_forward)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)


def _attention_forward(
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
            "Attention with capped logits or sinks is not supported.",
            "Use a Llama-, Qwen- or Mistral-family model.",
        )
    packed = (x[0].transpose(0, 1) for x in (query, key, value))
    out = attend(module.layer_idx, *packed)
    return out.view(1, query.shape[2], query.shape[1], query.shape[3]), None


class TransformersDecoder:
    """The model's own forward: tokens packed as one row with explicit positions, no cache object."""

    def __init__(self, model: Any) -> None:
        _install_attention(model)
        self._model = model
        attention = model.model.layers[0].self_attn
        self.scale = float(attention.scaling)
        weight = model.get_input_embeddings().weight
        # transformers passes a four-dimensional mask through untouched, so it builds none.
        self._no_mask = torch.zeros((1, 1, 1, 1), dtype=weight.dtype, device=weight.device)

    def reserve(self, length: int) -> None:
        """Nothing to do: the model computes its rotary angles itself."""

    def forward(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        out = self._model.model(
            input_ids=ids[None],
            position_ids=positions[None],
            attention_mask=self._no_mask,
            use_cache=False,
            wispprof_attend=attend,
        )
        hidden: Tensor = out.last_hidden_state[0]
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        out: Tensor = self._model.lm_head(hidden)
        return out


class _Block(NamedTuple):
    norm1: Tensor
    norm2: Tensor
    qkv: PackedLinear
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: PackedLinear
    gate_up: PackedLinear
    down: PackedLinear


class FusedDecoder:
    """The decoder block of Llama, Qwen2, Qwen3 and Mistral with fused products.

    With ``ranks`` the weights are one rank's shard: its heads, its part of the MLP and of the vocabulary.
    Two all-reduces per layer join the shards; hidden states and logits are complete on every rank.
    """

    def __init__(self, model: Any, ranks: Ranks | None = None) -> None:
        config = model.config
        self._ranks = ranks
        shards = ranks.size if ranks else 1
        self._embed: Tensor = model.model.embed_tokens.weight
        pack = rows_to_pack(model)
        self._head = PackedLinear(model.lm_head.weight, model.lm_head.bias, pack)
        self._norm: Tensor = model.model.norm.weight
        self._rotary = model.model.rotary_emb
        self._eps = float(config.rms_norm_eps)
        self._eps_tensor = torch.tensor(self._eps)
        self._on_cpu = self._embed.device.type == "cpu" and self._embed.dtype == torch.float32
        attention = model.model.layers[0].self_attn
        self.scale = float(attention.scaling)
        self._dim = int(attention.head_dim)
        self._heads = config.num_attention_heads // shards
        self._kv_heads = config.num_key_value_heads // shards
        self._vocab = config.vocab_size
        with torch.no_grad():
            self._blocks = [_block(layer, pack) for layer in model.model.layers]
        self._table = self._rotary_table(min(2048, config.max_position_embeddings))
        self._max = config.max_position_embeddings

    @staticmethod
    def supports(model: Any) -> bool:
        """Whether the model is of a class known to have this block, unquantized, with SiLU."""
        config = model.config
        return (
            type(model).__name__ in CLASSES
            and config.hidden_act == "silu"
            and getattr(config, "quantization_config", None) is None
            and all(type(m) is nn.Linear for m in _linears(model.model.layers[0]))
        )

    def _rotary_table(self, length: int) -> Tensor:
        """cos and signed sin of positions 0 … length-1: (length, 2, 1, d).

        The first half of sin is negated: ``rotate_half(x) * sin`` becomes ``swapped_halves(x) * signed``.
        """
        cos, sin = self._rotary(self._embed[:1], torch.arange(length, device=self._embed.device)[None])
        sin = torch.cat((-sin[..., : self._dim // 2], sin[..., self._dim // 2 :]), -1)
        return torch.stack((cos[0], sin[0]), 1)[:, :, None]

    def reserve(self, length: int) -> None:
        """Extend the rotary table to positions below ``length``."""
        have = len(self._table)
        if length > have:
            self._table = self._rotary_table(min(max(length, 2 * have), max(self._max, length)))

    def forward(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        heads, kv_heads, dim = self._heads, self._kv_heads, self._dim
        rotated, half = heads + kv_heads, dim // 2
        tokens = ids.shape[0]
        add = _add if self._ranks is None else self._add_ranks
        angles = self._table.index_select(0, positions)
        cos, sin = angles[:, 0], angles[:, 1]
        x = self._embed.index_select(0, ids)
        for number, b in enumerate(self._blocks):
            h = self._normed(x, b.norm1)
            qkv = b.qkv(h).view(tokens, rotated + kv_heads, dim)
            if b.q_norm is not None and b.k_norm is not None:
                q = self._normed(qkv[:, :heads], b.q_norm)
                k = self._normed(qkv[:, heads:rotated], b.k_norm)
                qk = torch.cat((q, k), 1)
            else:
                qk = qkv[:, :rotated]
            qk = torch.addcmul(qk * cos, torch.roll(qk, half, -1), sin)
            a = attend(number, qk[:, :heads], qk[:, heads:], qkv[:, rotated:])
            x = add(b.out, x, a)
            h = self._normed(x, b.norm2)
            gate, up = b.gate_up(h).chunk(2, -1)
            x = add(b.down, x, F.silu(gate).mul_(up))
        return self._normed(x, self._norm)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm over the last dimension. In float32 on a CPU torch's own takes twice as many operators."""
        width = x.shape[-1]
        if not self._on_cpu:
            return torch.rms_norm(x, (width,), weight, self._eps)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.addcmul(self._eps_tensor, norm, norm, value=1 / width).rsqrt_()
        return (x * scale).mul_(weight)

    def _add_ranks(self, product: PackedLinear, residual: Tensor, x: Tensor) -> Tensor:
        assert self._ranks is not None
        return residual + self._ranks.all_reduce(product(x))

    def logits(self, hidden: Tensor) -> Tensor:
        logits = self._head(hidden)
        return self._ranks.all_gather_columns(logits, self._vocab) if self._ranks else logits


def _add(product: PackedLinear, residual: Tensor, x: Tensor) -> Tensor:
    return product.add_to(residual, x)


def _linears(layer: Any) -> list[nn.Module]:
    a, m = layer.self_attn, layer.mlp
    return [a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj]


def _block(layer: Any, pack: int) -> _Block:
    a, m = layer.self_attn, layer.mlp
    return _Block(
        norm1=layer.input_layernorm.weight,
        norm2=layer.post_attention_layernorm.weight,
        qkv=PackedLinear(*_fuse(a.q_proj, a.k_proj, a.v_proj), pack),
        q_norm=a.q_norm.weight if hasattr(a, "q_norm") else None,
        k_norm=a.k_norm.weight if hasattr(a, "k_norm") else None,
        out=PackedLinear(a.o_proj.weight, a.o_proj.bias, pack),
        gate_up=PackedLinear(*_fuse(m.gate_proj, m.up_proj), pack),
        down=PackedLinear(m.down_proj.weight, m.down_proj.bias, pack),
    )


def _fuse(*layers: Any) -> tuple[Tensor, Tensor | None]:
    """One weight and bias for several layers of one input; the layers' own become views of them."""
    weight = _fuse_parameters([layer.weight for layer in layers])
    biases = [layer.bias for layer in layers]
    return weight, None if biases[0] is None else _fuse_parameters(biases)


def _fuse_parameters(parts: list[Tensor]) -> Tensor:
    first = parts[0]
    storage = first.untyped_storage()
    together = all(p.untyped_storage().data_ptr() == storage.data_ptr() for p in parts)
    rows = sum(len(p) for p in parts)
    if together and storage.nbytes() == rows * first[0].numel() * first.itemsize:
        # An earlier decoder of the same model fused them.
        shape, stride = (rows, *first.shape[1:]), first.stride()
        return torch.as_strided(first.detach(), shape, stride, 0)
    fused = torch.cat([p.detach() for p in parts])
    start = 0
    for part in parts:
        part.data = fused[start : start + len(part)]
        start += len(part)
    return fused
