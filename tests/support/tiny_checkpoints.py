"""Folders with tiny models of random weights, of families that the project's own engine does not serve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_COMMON = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}

TINY: dict[str, dict[str, Any]] = {
    # Every second layer sees 32 tokens.
    "gemma3_text": {
        "head_dim": 32,
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "query_pre_attn_scalar": 32,
    },
    "qwen3_moe": {
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "decoder_sparse_step": 1,
    },
    "olmo2": {"head_dim": 32, "hidden_size": 128},
    "llama": {"head_dim": 32, "hidden_size": 128},
    "phi3": {"hidden_size": 128, "rope_scaling": None},
}


def write_checkpoint(family: str, folder: Path) -> str:
    """Save a model of ``family``; its path."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **{**_COMMON, **TINY[family]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    path = folder / family
    model.save_pretrained(path)
    return str(path)


def quantize(checkpoint: str) -> None:
    """Rewrite a checkpoint with int8 weights per channel and int8 activations per token
    (``compressed-tensors``), which vLLM's CPU build computes in int8.

    Activations have a zero point: on a CPU with AMX, vLLM takes those without one in bfloat16 only.
    """
    path = Path(checkpoint)
    tensors = load_file(path / "model.safetensors")
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        scale = tensors[name].abs().amax(1, keepdim=True) / 127
        tensors[name] = (tensors[name] / scale).round().to(torch.int8)
        tensors[f"{name}_scale"] = scale
    save_file(tensors, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    kind = {"num_bits": 8, "type": "int", "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**kind, "strategy": "channel", "dynamic": False},
                "input_activations": {**kind, "symmetric": False, "strategy": "token", "dynamic": True},
            }
        },
    }
    (path / "config.json").write_text(json.dumps(config))
