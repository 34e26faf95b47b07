"""Configs that the engine cannot honour are refused before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from wispprof.engines.loading import load_model
from wispprof.engines.model_shapes import PRESETS
from wispprof.errors import ModelError, ModelUnsupported

ROPE = {"rope_type": "default", "rope_theta": 1e4}

UNSUPPORTED = [
    ({"is_causal": False}, "is_causal = False"),
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ({"residual_multiplier": 0.22}, "residual_multiplier"),
    ({"clip_qkv": 8.0}, "clip_qkv"),
    ({"num_local_experts": 8}, "num_local_experts"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantization_config"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    ({"auto_map": {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}}, "auto_map"),
    ({"rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0}}, "dynamic rotary"),
]

IMPOSSIBLE: list[tuple[str, Any]] = [
    *(("max_position_embeddings", value) for value in (-5, 0, 1.5, "many", True, 10**12)),
    *(("num_hidden_layers", value) for value in (0, -1, "2")),
    *(("vocab_size", value) for value in (0, -96)),
    ("hidden_size", 0),
    ("intermediate_size", -80),
    ("num_attention_heads", 0),
    ("num_key_value_heads", 4),
    ("num_key_value_heads", 0),
    ("head_dim", 7),
    ("head_dim", -8),
    ("rms_norm_eps", 0.0),
    ("rms_norm_eps", -1e-6),
    ("rope_parameters", {**ROPE, "rope_theta": -1.0}),
    ("rope_parameters", {**ROPE, "rope_theta": "large"}),
    ("rope_parameters", {**ROPE, "rope_type": "linear", "factor": -2.0}),
    ("rope_parameters", {**ROPE, "rope_type": "of my own", "factor": 2.0}),
    ("hidden_act", "no-such-thing"),
]


def write(folder: Path, **change: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**PRESETS["tiny-llama"], **change}))
    return folder


@pytest.mark.parametrize(("change", "message"), UNSUPPORTED)
def test_what_the_engine_does_not_compute_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelUnsupported, match=message):
        load_model(write(tmp_path, **change))


@pytest.mark.parametrize(("field", "value"), IMPOSSIBLE)
def test_values_that_cannot_be_are_one_clear_line(field: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(write(tmp_path, **{field: value}))
    assert "safetensors: " not in str(caught.value)
    assert "it holds no *.safetensors" not in str(caught.value), "the config passed"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"is_causal": True},
        {"attn_logit_softcapping": None, "partial_rotary_factor": 1.0},
        {"num_experts": 1, "architectures": ["LlamaForCausalLM"]},
        {"auto_map": {"AutoTokenizer": "own.Tokenizer"}},
        {"rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 4.0}},
    ],
)
def test_values_that_change_nothing_pass(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no \*\.safetensors"):
        load_model(write(tmp_path, **change))
