"""Which configs the engine computes exactly: others are refused, each with its reason."""

from __future__ import annotations

import math
from typing import Any

from wispprof.errors import ModelError, ModelUnsupported

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
CLASSES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM")

_MAX_CONTEXT = 1 << 24
_UNKNOWN_CONTEXT = 1 << 15
"""Longest context of a draft whose config names none."""
_ROPE_TYPES = ("default", "linear", "yarn", "llama3")
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "is_causal": (True,),
    "use_bidirectional_attention": (False,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "clip_qkv": (),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "residual_multiplier": (1,),
    "embedding_multiplier": (1,),
    "attention_multiplier": (),
    "partial_rotary_factor": (1,),
    "no_rope_layers": ([],),
    "alibi": (False,),
    "parallel_attn": (False,),
    "use_qk_norm": (False,),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "quantization_config": (),
}
"""Fields that change what a model computes and that these families lack: values that change nothing."""


def check_config(config: Any, name: str) -> int:
    """The longest context to serve. Raises :class:`ModelUnsupported` for a model that cannot be served as its
    config says, or cannot be rolled back by length, and :class:`ModelError` for a value that cannot be."""
    _check_family(config, name)
    _check_numbers(config, name)
    for field, neutral in _NEUTRAL.items():
        value = getattr(config, field, None)
        if value is not None and value not in neutral:
            raise ModelUnsupported(
                f"{name} has {field} = {_short(value)} in its config.json, which is not supported.",
                _family_hint(),
            )
    architectures = getattr(config, "architectures", None)
    if architectures and not set(architectures) & set(CLASSES):
        raise ModelUnsupported(
            f"{name} is a {_short(', '.join(map(str, architectures)))}, not a causal language model of a "
            "supported class.",
            f"Use a model of one of these classes: {', '.join(CLASSES)}.",
        )
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        raise ModelUnsupported(
            f"{name} brings its own modelling code (auto_map), which is not run.",
            "If the stock class computes the same, remove auto_map from its config.json.",
        )
    max_context = int(config.max_position_embeddings)
    _check_window(config, name, max_context)
    _check_rope(config, name)
    return max_context


def check_draft_config(config: Any, name: str) -> int:
    """The longest context of a draft of any family. Raises :class:`ModelUnsupported` for what is no causal
    language model, or runs code of its own."""
    if getattr(config, "is_encoder_decoder", False):
        raise ModelUnsupported(f"{name} is an encoder-decoder model.", "Use a decoder-only draft.")
    if getattr(config, "quantization_config", None) is not None:
        raise ModelUnsupported(
            f"{name} has quantized weights, which drafts on torch do not support.",
            "Use a copy in float32, bfloat16 or float16, or a GGUF of it.",
        )
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(longest, int) or isinstance(longest, bool) or longest <= 0:
        return _UNKNOWN_CONTEXT
    return min(longest, _MAX_CONTEXT)


def _family_hint() -> str:
    return f"Use a decoder-only model of one of these families: {', '.join(FAMILIES)}."


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _check_family(config: Any, name: str) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise ModelUnsupported(f"{name} is an encoder-decoder model.", _family_hint())
    family = config.model_type
    kinds = set(getattr(config, "layer_types", None) or ())
    recurrent = kinds - {"full_attention", "sliding_attention", "chunked_attention"}
    if recurrent or any(w in family for w in ("mamba", "rwkv", "jamba", "recurrent", "bamba")):
        named = ", ".join(sorted(recurrent)) or family
        raise ModelUnsupported(
            f"{name} keeps recurrent state ({named}), which cannot be rolled back by length.", _family_hint()
        )
    if family not in FAMILIES:
        raise ModelUnsupported(f"The model family {family!r} of {name} is not supported.", _family_hint())


def _check_numbers(config: Any, name: str) -> None:
    def refuse(field: str, value: Any, needs: str) -> ModelError:
        return ModelError(f"{name} has {field} = {_short(value)} in its config.json; it must be {needs}.")

    for field in _SIZES:
        value = getattr(config, field, None)
        if value is None and field in ("num_key_value_heads", "head_dim"):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise refuse(field, value, "a positive integer")
    if config.max_position_embeddings > _MAX_CONTEXT:
        raise refuse("max_position_embeddings", config.max_position_embeddings, f"at most {_MAX_CONTEXT:,}")
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % kv_heads:
        raise refuse("num_key_value_heads", kv_heads, f"a divisor of the {heads} attention heads")
    head_dim = getattr(config, "head_dim", None)
    if head_dim is None and config.hidden_size % heads:
        raise refuse("hidden_size", config.hidden_size, f"a multiple of the {heads} attention heads")
    if (head_dim or config.hidden_size // heads) % 2:
        raise refuse("head_dim", head_dim or config.hidden_size // heads, "even")
    from transformers.activations import ACT2FN

    if config.hidden_act not in ACT2FN:
        raise refuse("hidden_act", config.hidden_act, "an activation that transformers knows")
    eps = config.rms_norm_eps
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < 1:
        raise refuse("rms_norm_eps", eps, "between 0 and 1")


def _check_window(config: Any, name: str, max_context: int) -> None:
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if config.model_type.startswith("qwen") and not getattr(config, "use_sliding_window", False):
        window = None
    windowed = kinds & {"sliding_attention", "chunked_attention"} or window is not None
    if windowed and (not window or window < max_context):
        raise ModelUnsupported(
            f"{name} has a sliding window of {window} tokens, shorter than its context of {max_context}.",
            "Use a model with full attention, or lower max_position_embeddings in its config.json "
            "to the window.",
        )


def _check_rope(config: Any, name: str) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise ModelUnsupported(
            f"{name} uses {kind} rotary scaling, whose frequencies depend on the longest sequence "
            "in the batch.",
            f"Set rope_type to {', '.join(_ROPE_TYPES[:-1])} or {_ROPE_TYPES[-1]} in its config.json.",
        )
    if kind not in _ROPE_TYPES:
        raise ModelUnsupported(
            f"{name} uses {_short(kind)} rotary scaling, which is not supported.",
            f"Supported are: {', '.join(_ROPE_TYPES)}.",
        )
    if rope.get("partial_rotary_factor", 1) not in (None, 1):
        raise ModelUnsupported(f"{name} rotates only a part of each head (partial_rotary_factor).")
    for field in ("rope_theta", "factor"):
        value = rope.get(field, 1.0)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value <= 0:
            raise ModelError(
                f"{name} has {field} = {_short(value)} in its config.json; it must be a positive number."
            )
