"""What a server tells of its target, from files that real repositories hold."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wispprof.engines.served_model import (
    chat_template,
    describe_model,
    generation_defaults,
    model_identity,
    read_generation_config,
    stop_tokens,
)
from wispprof.engines.tokenizers import tokenizer_hash
from wispprof.errors import ModelError
from wispprof.types import GenerationDefaults, ServedModel

LLAMA = {
    "bos_token_id": 128000,
    "do_sample": True,
    "eos_token_id": [128001, 128008, 128009],
    "temperature": 0.6,
    "top_p": 0.9,
}


def config(**fields: Any) -> SimpleNamespace:
    return SimpleNamespace(
        **{
            "vocab_size": 128256,
            "eos_token_id": 128001,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
            **fields,
        }
    )


def tokenizer(**fields: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"eos_token_id": 128009, "chat_template": "{{ messages }}", **fields})


def describe(folder: Path | None, **more: Any) -> ServedModel:
    facts: dict[str, Any] = {"weights": "w", "dtype": "bfloat16", "vocabulary": "v", "max_context": 4096}
    return describe_model("llama", folder, config(), tokenizer(), **{**facts, **more})


def test_an_edge_learns_all_that_decides_a_text(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(LLAMA))
    model = describe(tmp_path)
    assert (model.id, model.tokenizer, model.vocab_size, model.max_context) == ("llama", "v", 128256, 4096)
    assert model.stop_tokens == (128001, 128008, 128009)
    assert model.chat_template == "{{ messages }}"
    assert model.defaults == GenerationDefaults(0.6, 0, 0.9)
    assert describe(None).defaults == GenerationDefaults()
    # An answer ends at the same tokens whatever the sampling defaults are.
    plain = describe(tmp_path, generation_config="openai")
    assert (plain.defaults, plain.stop_tokens) == (GenerationDefaults(), model.stop_tokens)


def test_identity_is_what_decides_the_text() -> None:
    base = describe(None).identity
    assert base == describe(None, max_context=17, vocabulary="other").identity
    assert (
        len(
            {
                base,
                describe(None, weights="x").identity,
                describe(None, dtype="float32").identity,
                model_identity(
                    config(rope_parameters={"rope_type": "linear", "factor": 2.0}), "w", "bfloat16"
                ),
                model_identity(config(num_key_value_heads=4), "w", "bfloat16"),
            }
        )
        == 5
    )


def test_identity_knows_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    before = describe(None).identity
    monkeypatch.setattr("wispprof.engines.served_model.NOISE_VERSION", 2)
    assert describe(None).identity != before


@pytest.mark.parametrize(
    ("generation", "own", "of_tokenizer", "expected"),
    [
        ({"eos_token_id": [5, 6]}, 7, 8, (5, 6, 8)),
        ({"eos_token_id": 5}, 7, 5, (5,)),
        ({"eos_token_id": 0}, 7, None, (0,)),
        ({}, [7, 9], None, (7, 9)),
        ({}, 7, None, (7,)),
        ({"eos_token_id": None}, None, None, ()),
        ({"eos_token_id": [5, -1, 10**9, "6", True]}, 7, None, (5,)),
    ],
)
def test_stop_tokens(generation: dict[str, Any], own: Any, of_tokenizer: Any, expected: object) -> None:
    found = stop_tokens(generation, config(eos_token_id=own), tokenizer(eos_token_id=of_tokenizer))
    assert found == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [("a", "a"), (None, ""), ({"default": "a", "tool_use": "b"}, "a"), ({"tool_use": "b"}, "")],
)
def test_chat_template(template: Any, expected: str) -> None:
    assert chat_template(tokenizer(chat_template=template)) == expected
    assert chat_template(None) == ""


def test_defaults_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.0, "top_k": 20, "min_p": 0.05}')
    assert generation_defaults(str(tmp_path), LLAMA) == GenerationDefaults(0.0, 20, 1.0, 0.05)
    assert generation_defaults("auto", {"top_k": -1, "top_p": None}) == GenerationDefaults()
    with pytest.raises(ModelError, match="auto, openai or a folder"):
        generation_defaults(str(tmp_path / "nowhere"), LLAMA)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1},
        {"temperature": "hot"},
        {"temperature": 1e400},
        {"top_p": 0},
        {"top_p": 1.5},
        {"min_p": 2},
        {"top_k": 1e400},
        {"top_k": True},
    ],
)
def test_defaults_that_cannot_be_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="--generation-config openai"):
        generation_defaults("auto", values)
    assert generation_defaults("openai", values) == GenerationDefaults()


@pytest.mark.parametrize("text", ["{", "[]", "3", "\udcff"])
def test_a_damaged_generation_config_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelError, match=r"generation_config\.json cannot be read"):
        read_generation_config(tmp_path)


def test_what_is_not_applied_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        generation_defaults("auto", {"repetition_penalty": 1.0})
        assert not caplog.records
        generation_defaults("auto", {"repetition_penalty": 1.05, "temperature": 0.7})
    assert "repetition_penalty" in caplog.text


class Vocabulary:
    """A tokenizer as far as its hash needs one."""

    def __init__(self, tokens: dict[str, int], special: list[int]) -> None:
        self.tokens, self.all_special_ids, self.eos_token_id = tokens, special, special[0]

    def get_vocab(self) -> dict[str, int]:
        return self.tokens


def test_vocabularies_are_compared_token_by_token() -> None:
    words = {"a": 0, "b": 1, "<|end|>": 2, "<|im_end|>": 3}
    base = tokenizer_hash(Vocabulary(words, [2]))
    assert tokenizer_hash(Vocabulary(dict(reversed(words.items())), [3, 2])) == base
    for other in ({**words, "b": 0, "a": 1}, {**words, "c": 4}, {"a": 0, "b": 1, "<|end|>": 2}):
        assert tokenizer_hash(Vocabulary(other, [2])) != base
