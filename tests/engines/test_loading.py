"""Loading: identity, refusals in one clear line, random shapes without download."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from wispprof.artifacts import bundled_path
from wispprof.engines import loading
from wispprof.engines.loading import load_model, random_model
from wispprof.engines.model_shapes import PRESETS
from wispprof.engines.tokenizers import load_tokenizer, tokenizer_hash
from wispprof.engines.torch.decoder import FusedDecoder, TransformersDecoder, decoder_for
from wispprof.errors import ModelError, ModelMissing, ModelUnsupported


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    random_model("tiny-qwen3", seed=2, device="cpu").model.save_pretrained(place)
    return place


def test_a_folder_loads_with_its_identity(folder: Path) -> None:
    loaded = load_model(folder, device="cpu")
    info = loaded.info
    assert (info.family, info.layers, info.kv_heads, info.head_dim) == ("qwen3", 2, 2, 8)
    assert info.kv_bytes_per_token == 2 * 2 * 2 * 8 * 4
    assert info.max_context == 256
    assert info.tokenizer_hash == ""
    assert info == load_model(str(folder), device="cpu").info
    half = load_model(folder, "bfloat16", device="cpu").info
    assert half.kv_bytes_per_token == info.kv_bytes_per_token // 2
    assert half.weights_hash == info.weights_hash
    assert half.config_hash == info.config_hash
    assert json.loads(json.dumps(asdict(info)))["id"] == folder.name


def test_weights_hash_tells_weights_apart(folder: Path, tmp_path: Path) -> None:
    random_model("tiny-qwen3", seed=3, device="cpu").model.save_pretrained(tmp_path)
    assert load_model(folder).info.weights_hash != load_model(tmp_path).info.weights_hash


def test_a_loaded_model_stays_an_ordinary_transformers_model(folder: Path) -> None:
    loaded = load_model(folder, device="cpu")
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        whole = loaded.model(ids).logits
        FusedDecoder(loaded.model)
        past = loaded.model(ids[:, :7], use_cache=True).past_key_values
        rest = loaded.model(ids[:, 7:], past_key_values=past).logits
    torch.testing.assert_close(rest, whole[:, 7:], atol=1e-4, rtol=1e-4)


def test_both_decoders_agree() -> None:
    for name in ("tiny-llama", "tiny-qwen2", "tiny-qwen3", "tiny-mistral"):
        model = random_model(name, seed=1, device="cpu").model
        assert isinstance(decoder_for(model), FusedDecoder)

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return (q * (1 + layer) + k.sum() + v.mean()).flatten(1)

        ids, positions = torch.tensor([5, 6, 7]), torch.tensor([0, 9, 4])
        with torch.inference_mode():
            a = FusedDecoder(model).forward(ids, positions, attend)
            b = TransformersDecoder(model).forward(ids, positions, attend)
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def no_network(*_: object, **__: object) -> None:
    raise AssertionError("a missing folder must not be looked for on the network")


@pytest.mark.parametrize("place", ["nowhere", "./nowhere/at/all", "/nowhere", "models/nothing-here"])
def test_a_missing_folder_is_said_at_once(
    place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", no_network)
    with pytest.raises(ModelMissing) as caught:
        load_model(place)
    assert caught.value.hint
    assert "\n" not in str(caught.value)


def test_a_folder_without_config_or_weights(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ModelMissing, match=r"config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ModelError, match="cannot be read"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match="cannot be read"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "mamba"}, "recurrent"),
        ({"model_type": "t5"}, "encoder-decoder"),
        ({"model_type": "gpt2"}, "family"),
        ({"model_type": "mistral", "sliding_window": 64}, "sliding window"),
        ({"model_type": "no-such-thing"}, "does not support"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rotary"),
    ],
)
def test_what_cannot_be_served_is_refused(change: dict[str, object], reason: str, tmp_path: Path) -> None:
    config = {**PRESETS["tiny-llama"], **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelUnsupported, match=reason) as caught:
        load_model(tmp_path)
    assert caught.value.hint


def test_random_models_repeat_and_presets_have_their_sizes() -> None:
    a, b = (random_model("tiny-llama", seed=5, device="cpu").model for _ in range(2))
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert p.equal(q)
    with pytest.raises(ModelMissing, match="shape"):
        random_model("no-such-shape")
    with pytest.raises(ModelError, match="dtype"):
        random_model("tiny-llama", dtype="int3")
    custom = random_model({**PRESETS["tiny-llama"], "num_hidden_layers": 3, "name": "mine"}, device="cpu")
    assert (custom.info.layers, custom.info.id) == (3, "mine")
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"qwen3-8b": 8.19, "qwen3-14b": 14.8, "qwen3-32b": 32.8, "llama-3.1-70b": 70.6}
    for name, billions in sizes.items():
        fields = dict(PRESETS[name])
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.01)


def test_tokenizer_hash_sees_the_vocabulary() -> None:
    class Tokenizer:
        def __init__(self, vocab: dict[str, int]) -> None:
            self._vocab = vocab
            self.all_special_ids = [0]

        def get_vocab(self) -> dict[str, int]:
            return self._vocab

    base = tokenizer_hash(Tokenizer({"a": 0, "b": 1}))
    assert base == tokenizer_hash(Tokenizer({"b": 1, "a": 0}))
    assert base != tokenizer_hash(Tokenizer({"a": 1, "b": 0}))


def test_auto_takes_an_apple_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert loading.choose_device("auto").type == "mps"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert loading.choose_device("auto").type == "cpu"
    with pytest.raises(ModelError, match="no Apple GPU"):
        loading.choose_device("mps")


def test_long_texts_are_tokenized_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = load_tokenizer(str(bundled_path("models/reference-pair/target")))
    tokenizer.model_max_length = 8
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        assert len(tokenizer("x = 1\n" * 40)["input_ids"]) > 8
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert "sequence length" not in caplog.text
