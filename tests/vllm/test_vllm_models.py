"""Families beyond the own engine's, and several ranks: split text equals plain vLLM's."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from conftest import vllm_options
from decoding import decode, half_right
from plain_vllm import plain_vllm
from tiny_checkpoints import TINY, quantize, write_checkpoint
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from wispprof.engines import load_engine
from wispprof.engines.vllm.target import provenance
from wispprof.errors import EngineError
from wispprof.profiling.acceptance_trace import trace_pair
from wispprof.settings.profiler_settings import TraceEngineSettings, TraceSettings
from wispprof.types import Sampling

LENGTH = 40


@pytest.mark.parametrize("family", [*TINY, "llama int8"])
def test_split_text_is_plain_vllm_s(family: str, tmp_path: Path) -> None:
    family, *quantized = family.split()
    folder = write_checkpoint(family, tmp_path)
    if quantized:
        quantize(folder)
    dice = random.Random(2)
    prompts = [[dice.randrange(2, 500) for _ in range(dice.choice((3, 60, 200)))] for _ in range(8)]
    wanted = plain_vllm(prompts, LENGTH, folder, max_model_len=512)
    assert len({tuple(text) for text in wanted}) == len(prompts)
    # Without a worker process, which takes as long to start as all the rest.
    arguments = {"max_model_len": 512, "distributed_executor_backend": "uni"}
    options = vllm_options(folder, arguments=arguments, max_drafts=8)
    engine = load_engine("vllm", options).engine
    drafts = half_right(wanted, 8, 512)
    found = decode(engine, prompts, LENGTH, drafts=drafts, chunk=33, members=lambda n: dice.random() < 0.6)
    assert found == wanted
    assert provenance(engine.core)["quantization"] == ("compressed-tensors" if quantized else "none")
    engine.open("checked", Sampling(), prompts[0])
    engine.close("checked")
    engine.audit({})
    engine.shutdown()


@pytest.mark.parametrize("family", ["jamba", "qwen3_next"])
def test_recurrent_state_is_refused_in_one_line(family: str, tmp_path: Path) -> None:
    """Before weights are looked for: there are none."""
    config = AutoConfig.for_model(family, num_hidden_layers=4, hidden_size=64, vocab_size=512).to_dict()
    config["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]]
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    with pytest.raises(EngineError, match="keeps recurrent state") as refused:
        load_engine("vllm", vllm_options(str(tmp_path), arguments={"load_format": "dummy"}))
    assert "\n" not in str(refused.value)


def test_a_trace_on_vllm_is_the_own_engine_s() -> None:
    settings = TraceSettings(
        count=3, batch=2, prompt_tokens=60, path_tokens=20, depth=2, dtype="float32", sampling=Sampling(0.8)
    )
    found = trace_pair(settings, engine=TraceEngineSettings("vllm", {"enforce_eager": True}))
    assert [path.path for path in found.paths] == [path.path for path in trace_pair(settings).paths]


def test_two_ranks_equal_one(own, prompts) -> None:
    few = prompts[:6]
    wanted = decode(own, few, 24, lambda n: Sampling(0.8, top_p=0.9, seed=n))
    options = vllm_options(arguments={"tensor_parallel_size": 2, "distributed_executor_backend": "mp"})
    engine = load_engine("vllm", options).engine
    try:
        found = decode(
            engine, few, 24, lambda n: Sampling(0.8, top_p=0.9, seed=n), half_right(wanted, 8, 4096), chunk=50
        )
        assert found == wanted
        engine.open("checked", Sampling(), few[0])
        engine.check_integrity()
    finally:
        engine.shutdown()
