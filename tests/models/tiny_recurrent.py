"""Tiny random models that keep recurrent state, as GGUF files with the tokenizer of another file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter

WIDTH, LAYERS, STATE, KERNEL, RANK, HEADS = 64, 2, 8, 3, 4, 4


def write_tiny(source: Path, out: Path, architecture: str) -> Path:
    """``architecture``: ``mamba`` (recurrent), or ``lfm2`` (a convolution layer and an attention layer)."""
    reader = GGUFReader(source)
    writer = GGUFWriter(out, architecture)
    for name, field in reader.fields.items():
        if name.startswith("tokenizer."):
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    vocabulary = len(reader.fields["tokenizer.ggml.tokens"].contents())
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    random = np.random.default_rng(5)

    def tensor(name: str, *shape: int, scale: float = 0.3) -> None:
        writer.add_tensor(name, (scale * random.standard_normal(shape)).astype(np.float32))

    def ones(name: str, *shape: int, value: float = 1.0) -> None:
        writer.add_tensor(name, np.full(shape, value, dtype=np.float32))

    tensor("token_embd.weight", vocabulary, WIDTH, scale=1.0)
    {"mamba": _mamba, "lfm2": _lfm2}[architecture](writer, tensor, ones)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _mamba(writer, tensor, ones) -> None:  # type: ignore[no-untyped-def]
    inner = 2 * WIDTH
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_ssm_conv_kernel(KERNEL + 1)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(STATE)
    writer.add_ssm_time_step_rank(RANK)
    ones("output_norm.weight", WIDTH)
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        ones(f"{block}.attn_norm.weight", WIDTH)
        tensor(f"{block}.ssm_in.weight", 2 * inner, WIDTH)
        tensor(f"{block}.ssm_conv1d.weight", inner, KERNEL + 1)
        tensor(f"{block}.ssm_conv1d.bias", inner)
        tensor(f"{block}.ssm_x.weight", RANK + 2 * STATE, inner)
        tensor(f"{block}.ssm_dt.weight", inner, RANK)
        tensor(f"{block}.ssm_dt.bias", inner)
        ones(f"{block}.ssm_a", inner, STATE, value=-0.5)
        ones(f"{block}.ssm_d", inner)
        tensor(f"{block}.ssm_out.weight", WIDTH, inner)


def _lfm2(writer, tensor, ones) -> None:  # type: ignore[no-untyped-def]
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv([0, HEADS])
    writer.add_rope_freq_base(10_000.0)
    writer.add_shortconv_l_cache(KERNEL)
    ones("token_embd_norm.weight", WIDTH)
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        ones(f"{block}.attn_norm.weight", WIDTH)
        ones(f"{block}.ffn_norm.weight", WIDTH)
        tensor(f"{block}.ffn_gate.weight", 2 * WIDTH, WIDTH)
        tensor(f"{block}.ffn_up.weight", 2 * WIDTH, WIDTH)
        tensor(f"{block}.ffn_down.weight", WIDTH, 2 * WIDTH)
        if layer == 0:
            tensor(f"{block}.shortconv.conv.weight", WIDTH, KERNEL)
            tensor(f"{block}.shortconv.in_proj.weight", 3 * WIDTH, WIDTH)
            tensor(f"{block}.shortconv.out_proj.weight", WIDTH, WIDTH)
        else:
            for part in ("q", "k"):
                ones(f"{block}.attn_{part}_norm.weight", WIDTH // HEADS)
            for part in ("q", "k", "v", "output"):
                tensor(f"{block}.attn_{part}.weight", WIDTH, WIDTH)
