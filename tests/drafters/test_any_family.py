"""Drafts of families that the engine does not serve: the model's own tokens, whatever was rolled back."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from wispprof.drafters import make_drafter
from wispprof.drafters.torch_drafter import AnyFamilyDrafter, TorchDrafter, features_and_token
from wispprof.engines.croppable_cache import check_croppable
from wispprof.engines.loading import LoadedModel, load_model
from wispprof.errors import EngineError, ModelError, ModelUnsupported
from wispprof.sampling.sampler import sample_tokens
from wispprof.types import Sampling

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, **WINDOW},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8, **WINDOW},
    "olmo2": {"num_key_value_heads": 2},
    "phi3": {"num_key_value_heads": 2},
    "gpt_neox": {},
    "gpt2": {"n_inner": 48},
    "bloom": {},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8, "use_sliding_window": True, **WINDOW},
}


def made(folder: Path, family: str, **more: Any) -> Path:
    config = AutoConfig.for_model(family, **{**SMALL, **FAMILIES.get(family, {}), **more})
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / family)
    return folder / family


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = made(tmp_path_factory.mktemp("families"), request.param)
    return load_model(folder, device="cpu", draft=True)


@torch.inference_mode()
def plain(loaded: LoadedModel, text: list[int], sampling: Sampling) -> int:
    """The token after ``text`` by one forward without a cache."""
    row = loaded.model(torch.tensor([text]), use_cache=False).logits[0, -1:]
    return int(sample_tokens(row, [len(text)], [sampling])[0])


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9, top_p=0.95, seed=4)], ids=["greedy", "drawn"])
def test_drafts_equal_plain_forwards_after_any_rollback(loaded: LoadedModel, sampling: Sampling) -> None:
    rng = random.Random(2)
    text = [rng.randrange(3, 96) for _ in range(14)]
    drafter = make_drafter("model", loaded)
    assert isinstance(drafter, AnyFamilyDrafter)
    drafter.open(text, sampling)
    drafter.prefill()
    for _ in range(12):
        for _ in range(rng.randrange(1, 5)):
            wanted = plain(loaded, text, sampling)
            assert drafter.draft().token == wanted
            text.append(wanted)
        kept = len(text) - rng.randrange(4)
        correction = rng.randrange(3, 96)
        drafter.rollback(kept)
        drafter.extend([correction])
        text = [*text[:kept], correction]
    drafter.open([*text[:6], 9], sampling)  # another request that begins alike
    assert drafter.draft().token == plain(loaded, [*text[:6], 9], sampling)


def test_a_wrong_cache_is_noticed(loaded: LoadedModel) -> None:
    """Negative control: the check of the families above would see a rollback that forgets nothing."""
    text = list(range(3, 20))
    one, other = AnyFamilyDrafter(loaded), AnyFamilyDrafter(loaded)
    one.open(text, Sampling())
    other.open([*text[:8], 90, *text[9:]], Sampling())
    one.draft()
    other.draft()
    pairs = zip(one.cached_kv(), other.cached_kv(), strict=True)
    assert max(float((a - b).abs().max()) for a, b in pairs) > 1e-3


def test_families_that_the_engine_serves_draft_by_its_own_forward(tmp_path: Path) -> None:
    folder = made(tmp_path, "llama", num_key_value_heads=2)
    assert isinstance(make_drafter("model", load_model(folder, device="cpu", draft=True)), TorchDrafter)


def test_such_a_model_is_no_target(tmp_path: Path) -> None:
    with pytest.raises(ModelUnsupported, match="gpt_neox"):
        load_model(made(tmp_path, "gpt_neox"), device="cpu")


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_recurrent_state_is_refused(tmp_path: Path, family: str) -> None:
    sizes = {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1} if family == "mamba2" else {}
    folder = made(tmp_path, family, **sizes)
    with pytest.raises(ModelUnsupported, match="recurrent state"):
        load_model(folder, device="cpu", draft=True)


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = made(tmp_path, "gpt_neox")
    file = folder / "model.safetensors"
    kept = {k: v for k, v in load_file(file).items() if "layers.1.mlp" not in k}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="missing"):
        load_model(folder, device="cpu", draft=True)


def test_a_model_that_ignores_its_cache_is_refused(tmp_path: Path) -> None:
    loaded = load_model(made(tmp_path, "gpt_neox"), device="cpu", draft=True)
    forward = loaded.model.forward

    def forgetful(input_ids: torch.Tensor, past_key_values: Any = None, **more: Any) -> Any:
        return forward(input_ids, use_cache=False)

    loaded.model.forward = forgetful
    with pytest.raises(ModelUnsupported, match="after a rollback"):
        check_croppable(loaded.model, "forgetful")


def test_the_context_limits_a_draft(tmp_path: Path) -> None:
    loaded = load_model(made(tmp_path, "gpt2", max_position_embeddings=16), device="cpu", draft=True)
    drafter = AnyFamilyDrafter(loaded)
    drafter.open([5] * 15, Sampling())
    drafter.draft()
    with pytest.raises(EngineError, match="context of 16"):
        drafter.draft()


def test_an_accelerators_step_draws_the_same(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of CUDA and MPS devices, run on the CPU."""
    sampling = Sampling(0.8, seed=3)
    one, other = AnyFamilyDrafter(loaded), AnyFamilyDrafter(loaded)
    monkeypatch.setattr(other, "_on_cpu", False)
    for drafter in (one, other):
        drafter.open([4, 5, 6], sampling)
    for _ in range(4):
        ours, theirs = one.draft(), other.draft()
        assert ours.token == theirs.token
        assert ours.features == pytest.approx(theirs.features, rel=1e-3, abs=1e-4)


def test_an_accelerators_step_mixes_no_devices() -> None:
    """On the meta device, which has no data: an operation that mixes two devices raises."""
    logits = torch.empty((1, 300_000), dtype=torch.bfloat16, device="meta")
    drawn = torch.empty((1,), dtype=torch.int64, device="meta")
    both = features_and_token(logits, drawn)
    assert (both.device.type, both.dtype, both.shape) == ("meta", torch.float32, (5,))
    with pytest.raises(RuntimeError):  # what the check above would notice
        features_and_token(logits, torch.zeros(1))
