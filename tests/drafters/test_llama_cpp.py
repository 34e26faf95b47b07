"""The llama.cpp drafter against the torch drafter, over a stand-in for the library."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from fake_libllama import FakeLibllama

from wispprof.drafters import GgufDraft, make_drafter
from wispprof.drafters.core_budget import CoreBudget
from wispprof.drafters.gguf_model import GgufModel
from wispprof.drafters.libllama import load_libllama
from wispprof.drafters.llama_cpp import LlamaCppDrafter
from wispprof.drafters.torch_drafter import TorchDrafter
from wispprof.drafters.vocabulary import VocabularyMatch, match_vocabulary
from wispprof.engines.loading import random_model
from wispprof.errors import EngineError, ModelError, ModelMissing, ModelUnsupported
from wispprof.profiling import drafter_runner, edge_profiler
from wispprof.settings import profiler_settings
from wispprof.settings.draft_settings import LlamaSettings
from wispprof.types import Sampling

WARM = Sampling(0.8, 20, 0.9, seed=5)


@pytest.fixture(scope="module")
def tiny():
    return random_model("tiny-llama", seed=1)


@pytest.fixture
def library(tiny):
    return FakeLibllama(tiny)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "draft.gguf"
    path.write_bytes(b"GGUF")
    return path


@pytest.fixture
def model(file, library):
    return GgufModel(file, library=library)


@pytest.mark.parametrize("forgets", [True, False], ids=["cuts", "snapshots"])
@pytest.mark.parametrize("sampling", [Sampling(), WARM], ids=["greedy", "sampled"])
def test_it_drafts_what_torch_drafts(file, tiny, sampling, forgets):
    library = FakeLibllama(tiny, forgets=forgets, saves_states=True)
    model = GgufModel(file, library=library)
    one, other = LlamaCppDrafter(model), TorchDrafter(tiny)
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


def test_a_step_reads_only_what_is_new(model, library):
    drafter = LlamaCppDrafter(model)
    drafter.open(list(range(2, 42)), Sampling())
    drafter.prefill()
    library.batches.clear()
    drafter.draft()
    drafter.draft()
    drafter.rollback(40)
    drafter.draft()
    drafter.forward()
    assert library.batches == [1, 1, 1, 1]


def test_a_saved_state_spares_reading_the_text_again(file, tiny):
    library = FakeLibllama(tiny, forgets=False, saves_states=True)
    drafter = LlamaCppDrafter(GgufModel(file, library=library))
    drafter.open(list(range(2, 42)), Sampling())
    drafter.prefill()
    library.batches.clear()
    for _ in range(4):
        drafter.draft()
    drafter.rollback(42)
    drafter.extend([9])
    drafter.draft()
    assert library.batches == [1, 1, 1, 1, 1]


def test_long_texts_are_read_in_bounded_batches(file, library):
    drafter = LlamaCppDrafter(GgufModel(file, device="cpu", library=library))
    library.batches.clear()
    drafter.open([3] * 200, Sampling())
    drafter.prefill()
    assert library.batches == [128, 71]


def test_drafters_share_the_weights_and_keep_apart(model, library):
    draft = GgufDraft(model, None, VocabularyMatch(True, None, ""))
    one, other = make_drafter("model", draft), make_drafter("model", draft)
    one.open([5, 6, 7], Sampling())
    alone = [one.draft().token for _ in range(4)]
    one.open([5, 6, 7], Sampling())
    other.open([9, 9], Sampling())
    mixed = []
    for _ in range(4):
        mixed.append(one.draft().token)
        other.draft()
    assert mixed == alone
    assert library.loaded_files == 1


def test_native_memory_goes_with_the_objects(file, tiny):
    library = FakeLibllama(tiny)
    drafters = [LlamaCppDrafter(model) for model in [GgufModel(file, library=library)] for _ in range(3)]
    assert library.open_contexts == 3
    drafters.pop()
    gc.collect()
    assert library.open_contexts == 2
    drafters.clear()
    gc.collect()
    assert library.open_contexts == library.loaded_files == 0


def test_hidden_tokens_are_never_proposed(model):
    plain = LlamaCppDrafter(model)
    plain.open([5, 6, 7], WARM)
    token = plain.draft().token
    hidden = np.zeros(model.vocab_size, dtype=bool)
    hidden[token] = True
    masked = LlamaCppDrafter(model, hidden)
    masked.open([5, 6, 7], WARM)
    assert masked.draft().token != token


def test_a_failed_call_leaves_a_drafter_that_reads_everything_again(model, library):
    drafter = LlamaCppDrafter(model)
    drafter.open([5, 6, 7], Sampling())
    token = drafter.draft().token
    drafter.rollback(3)
    library.fails = True
    with pytest.raises(EngineError, match="context is full"):
        drafter.draft()
    library.fails = False
    assert drafter.draft().token == token


def test_faults_say_what_to_do(model, library, file, tiny, tmp_path):
    with pytest.raises(ModelMissing, match="gguf"):
        GgufModel(tmp_path / "nothing.gguf", library=library)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"")
    with pytest.raises(ModelError, match="bad magic"):
        GgufModel(broken, library=library)
    short = LlamaCppDrafter(GgufModel(file, LlamaSettings(draft_context=16), library=library))
    with pytest.raises(EngineError, match="context of 16"):
        short.open(list(range(17)), Sampling())
    with pytest.raises(EngineError, match="at least one"):
        short.open([], Sampling())
    with pytest.raises(ModelUnsupported, match="recurrent state, which this llama"):
        LlamaCppDrafter(GgufModel(file, library=FakeLibllama(tiny, forgets=False)))
    with pytest.raises(ModelMissing, match=r"libllama\.so"):
        load_libllama(tmp_path / "libllama.so")
    other = tmp_path / "other.so"
    other.write_bytes(b"no library")
    with pytest.raises(ModelError, match="Cannot load") as err:
        load_libllama(other)
    assert "--llama-lib" in err.value.hint


def test_options_reach_the_library(file, library):
    settings = LlamaSettings(threads=3, batch_threads=2, gpu_layers=7)
    LlamaCppDrafter(GgufModel(file, settings, library=library))
    assert library.threads == [(3, 2)]
    assert library.gpu_layers == 7
    assert GgufModel(file, settings, "cpu", library=library).gpu_layers == 0
    assert GgufModel(file, library=library).gpu_layers == 999


def test_threads_leave_busy_cores_alone():
    now, busy = [0.0], [0.0]
    budget = CoreBudget(cores=8, limit=4, busy=lambda: busy[0], load=lambda: 0.0, clock=lambda: now[0])
    seen = [budget.threads]
    for others, own in ((0.0, 4.0), (5.0, 4.0), (7.9, 1.0), (1.0, 0.0)):
        now[0] += 2.0
        busy[0] += 2.0 * others + own
        budget.ran(own / 4, 4)
        seen.append(budget.threads)
    assert seen == [4, 4, 3, 1, 4]
    assert CoreBudget(cores=8, limit=4, busy=lambda: 0.0, load=lambda: 6.6).threads == 1
    assert CoreBudget(6, cores=2, load=lambda: 9.0).threads == 6  # the user's choice stands


class Tokenizer:
    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def get_vocab(self) -> dict[str, int]:
        return {text: number for number, text in enumerate(self.texts)}

    def decode(self, ids: list[int], **_: object) -> str:
        return self.texts[ids[0]].replace("Ġ", " ")


def test_vocabularies_are_compared_text_by_text():
    texts = [f"t{i}" for i in range(100)]
    target = Tokenizer(texts)
    same = match_vocabulary(texts, target)
    assert same.same
    assert same.hidden is None
    padded = match_vocabulary([*texts, "[PAD100]", "[PAD101]"], target)
    assert padded.same
    assert np.flatnonzero(padded.hidden).tolist() == [100, 101]
    smaller = match_vocabulary(texts[:90], target)
    assert smaller.same
    assert "lacks the target's last 10" in smaller.summary
    renamed = match_vocabulary(["<end>", *texts[1:]], target)
    assert renamed.same
    assert np.flatnonzero(renamed.hidden).tolist() == [0]
    spelled = match_vocabulary([" x", *texts[1:]], Tokenizer(["Ġx", *texts[1:]]))
    assert spelled.hidden is None
    foreign = match_vocabulary(texts[::-1], target)
    assert not foreign.same
    assert "mean another text" in foreign.summary


def test_profile_edge_measures_a_gguf_draft(library, file, monkeypatch):
    ticks = iter(range(1 << 30))
    axes = edge_profiler.EdgeAxes((16, 32), (16,), 16, burst_s=0.05, sustained_s=0.0)
    monkeypatch.setitem(drafter_runner.EDGE_GRIDS, "quick", axes)
    monkeypatch.setattr("wispprof.drafters.gguf_model.load_libllama", lambda path: library)
    sweep = edge_profiler.SweepSettings(warmup=1, min_samples=6, max_samples=6, sentinel_every=50)
    chosen = profiler_settings.EdgeProfilerSettings(draft=str(file), sweep=sweep)
    profile = edge_profiler.profile_edge(chosen, clock=lambda: next(ticks) * 0.004)
    assert profile.manifest.engine["backend"] == "llama.cpp"
    assert profile.manifest.model.id == "draft.gguf"
    assert profile.draft_ms(20) == pytest.approx(4.0)
