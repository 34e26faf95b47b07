"""The llama.cpp drafter against the torch drafter, over a stand-in for the library.

The stand-in keeps llama-cpp-python's contract (``n_tokens``, ``eval`` that drops what lies beyond it,
logits of the last token through a pointer) and computes with a tiny torch model.
"""

from __future__ import annotations

import ctypes
import sys
import types

import pytest
import torch

from wispprof.drafters.llama_cpp import LlamaCppDrafter
from wispprof.drafters.torch_drafter import TorchDrafter
from wispprof.engines.loading import random_model
from wispprof.errors import EngineError, ModelError, ModelMissing
from wispprof.profiling import drafter_runner, edge_profiler
from wispprof.settings import profiler_settings
from wispprof.types import Sampling

WARM = Sampling(0.8, 20, 0.9, seed=5)


@pytest.fixture(scope="module")
def tiny():
    return random_model("tiny-llama", seed=1)


@pytest.fixture
def library(tiny, monkeypatch):
    class Llama:
        model = "model"
        metadata = {"general.architecture": "llama"}

        def __init__(self, model_path, n_ctx, logits_all, **more):
            assert not logits_all
            if "broken" in model_path:
                raise ValueError("bad magic")
            self.held, self.n_tokens, self.evaluated, self.context = [], 0, 0, n_ctx
            self.ctx = self

        def n_ctx(self):
            return min(self.context, tiny.info.max_context)

        def n_vocab(self):
            return tiny.info.vocab_size

        def eval(self, tokens):
            self.held = self.held[: self.n_tokens] + list(tokens)
            self.n_tokens = len(self.held)
            self.evaluated += len(tokens)
            with torch.inference_mode():
                row = tiny.model(torch.tensor([self.held])).logits[0, -1]
            self.row = (ctypes.c_float * len(row))(*row.tolist())

    module = types.ModuleType("llama_cpp")
    module.Llama = Llama
    module.llama_model_n_params = lambda model: 1234
    module.llama_get_logits_ith = lambda ctx, i: ctypes.cast(ctx.row, ctypes.POINTER(ctypes.c_float))
    monkeypatch.setitem(sys.modules, "llama_cpp", module)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "draft.gguf"
    path.write_bytes(b"GGUF")
    return path


@pytest.mark.parametrize("sampling", [Sampling(), WARM], ids=["greedy", "sampled"])
def test_it_drafts_what_torch_drafts(library, file, tiny, sampling):
    one, other = LlamaCppDrafter(file), TorchDrafter(tiny)
    for drafter in (one, other):
        drafter.open([5, 6, 7, 8], sampling)
    for move in ("dddd", "r5dd", "e9dd", "r4e3dd", "pd"):
        for drafter in (one, other):
            for letter in move:
                if letter == "p":
                    drafter.prefill()
                if letter == "e":
                    drafter.extend([11, 12])
                if letter == "r":
                    drafter.rollback(5)
        for _ in range(move.count("d")):
            mine, theirs = one.draft(), other.draft()
            assert mine.token == theirs.token
            assert mine.features == pytest.approx(theirs.features, rel=1e-3, abs=1e-3)
        assert one.length == other.length


def test_a_step_reads_only_what_is_new(library, file):
    drafter = LlamaCppDrafter(file)
    drafter.open(list(range(2, 42)), Sampling())
    drafter.prefill()
    before = drafter._llm.evaluated
    drafter.draft()
    drafter.draft()
    assert drafter._llm.evaluated - before == 2
    drafter.rollback(40)
    drafter.draft()
    assert drafter._llm.evaluated - before == 3


def test_faults_say_what_to_do(library, file, tmp_path, monkeypatch):
    with pytest.raises(ModelMissing, match="gguf"):
        LlamaCppDrafter(tmp_path / "nothing.gguf")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"")
    with pytest.raises(ModelError, match="bad magic"):
        LlamaCppDrafter(broken)
    drafter = LlamaCppDrafter(file, max_context=8)
    with pytest.raises(EngineError, match="context of 8"):
        drafter.open(list(range(9)), Sampling())
    with pytest.raises(EngineError, match="at least one"):
        drafter.open([], Sampling())
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(ModelError, match="llamacpp"):
        LlamaCppDrafter(file)


def test_profile_edge_measures_a_gguf_draft(library, file, monkeypatch):
    ticks = iter(range(1 << 30))
    axes = edge_profiler.EdgeAxes((16, 32), (16,), 16, burst_s=0.05, sustained_s=0.0)
    monkeypatch.setitem(drafter_runner.EDGE_GRIDS, "quick", axes)
    sweep = edge_profiler.SweepSettings(warmup=1, min_samples=6, max_samples=6, sentinel_every=50)
    chosen = profiler_settings.EdgeProfilerSettings(draft=str(file), sweep=sweep)
    profile = edge_profiler.profile_edge(chosen, clock=lambda: next(ticks) * 0.004)
    assert profile.manifest.engine["backend"] == "llama.cpp"
    assert profile.manifest.model.id == "draft.gguf"
    assert profile.draft_ms(20) == pytest.approx(4.0)
