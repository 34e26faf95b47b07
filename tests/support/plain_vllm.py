"""vLLM as it comes, to compare with."""

from __future__ import annotations

from wispprof.artifacts import bundled_model


def plain_vllm(prompts: list[list[int]], length: int, target: str = "", **arguments) -> list[list[int]]:
    """Greedy text of vLLM as it comes: no scheduler, sampler or speculation of ours."""
    from vllm import LLM, SamplingParams

    given = {
        "enforce_eager": True,
        "max_model_len": 2048,
        "kv_cache_memory_bytes": 1 << 28,
        "dtype": "float32",
        **arguments,
    }
    model = LLM(target or bundled_model("target"), skip_tokenizer_init=True, disable_log_stats=True, **given)
    greedy = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
    answers = model.generate([{"prompt_token_ids": p} for p in prompts], greedy, use_tqdm=False)
    texts = [list(answer.outputs[0].token_ids) for answer in answers]
    model.llm_engine.engine_core.shutdown()
    return texts
