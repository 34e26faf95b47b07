"""Acceptance traces: the batched way equals the slow, obvious way."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from wispprof import protocol
from wispprof.artifacts import load_trace, save_trace, trace_hash
from wispprof.drafters.ngram import LookupDrafter
from wispprof.drafters.torch_drafter import TorchDrafter
from wispprof.engines.loading import random_model
from wispprof.engines.torch.engine import TorchEngine
from wispprof.errors import ArtifactDamaged, EngineError, ModelError, ProfileError
from wispprof.profiling.acceptance_trace import (
    RemoteTarget,
    accepted_lengths,
    collect_trace,
    target_paths,
    trace_on_engine,
    trace_pair,
    trace_remote,
)
from wispprof.profiling.draft_rollout import DraftRollout
from wispprof.profiling.prompts import held_out_prompts, load_prompts, read_prompts
from wispprof.profiling.traced_drafter import SequentialTraced, load_traced_draft
from wispprof.sampling.candidates import noise_ranked, ranks_of
from wispprof.sampling.sampler import filtered_probs, sample_tokens
from wispprof.settings.profiler_settings import TraceEngineSettings, TraceSettings
from wispprof.types import Sampling, StepInput

WARM = Sampling(0.8, 20, 0.9, seed=5)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def target():
    return random_model("tiny-llama", seed=1)


@pytest.fixture(scope="module")
def draft():
    return random_model("tiny-qwen3", seed=2)


def text(count, seed=0):
    generator = random.Random(seed)
    return [generator.randrange(2, 96) for _ in range(count)]


def one_by_one(loaded, tokens, first, depth, sampling):
    """Ask the drafter anew at every position."""
    drafter = TorchDrafter(loaded)
    drafts, features = [], []
    for length in range(first, len(tokens)):
        drafter.open(tokens[:length], sampling)
        row = [drafter.draft() for _ in range(depth)]
        drafts.append([d.token for d in row])
        features.append([list(d.features) for d in row])
    return np.array(drafts), np.array(features, dtype=np.float32)


@pytest.mark.parametrize("sampling", [Sampling(), WARM], ids=["greedy", "sampled"])
def test_position_by_position_equals_all_at_once(target, sampling):
    drafter = TorchDrafter(target)
    drafter.open(text(6), sampling)
    path = [drafter.draft().token for _ in range(14)]
    path[5] = (path[5] + 1) % 96  # accepted at first, rejected here, accepted again
    tokens = [*text(6), *path]
    traced = SequentialTraced(TorchDrafter(target), "draft", None, "")
    drafts, features = traced.run(tokens, 6, 4, sampling)
    wanted, wanted_features = DraftRollout(target).run(tokens, 6, 4, sampling)
    assert (drafts == wanted).all()
    np.testing.assert_allclose(features, wanted_features, rtol=1e-3, atol=1e-4)


def test_a_drafter_without_proposals_is_traced_as_never_accepted():
    traced = SequentialTraced(LookupDrafter(), "lookup", None, "")
    tokens = [1, 2, 3, 4, 9, 1, 2, 3, 4, 8]
    drafts, _ = traced.run(tokens, 3, 2, Sampling())
    assert drafts.tolist() == [[-1, -1], [-1, -1], [-1, -1], [-1, -1], [3, 4], [4, 9], [9, 1]]
    assert accepted_lengths(drafts, tokens[3:]).tolist() == [0, 0, 0, 0, 2, 1, 0]


@pytest.mark.parametrize("sampling", [Sampling(), WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("shape", ["tiny-llama", "tiny-qwen3", "tiny-mistral"])
def test_the_rollout_equals_the_drafter_at_every_position(shape, sampling):
    loaded = random_model(shape, seed=3)
    tokens, first, depth = text(40), 9, 5
    drafts, features = DraftRollout(loaded).run(tokens, first, depth, sampling)
    slow_drafts, slow_features = one_by_one(loaded, tokens, first, depth, sampling)
    assert np.array_equal(drafts, slow_drafts)
    np.testing.assert_allclose(features, slow_features, rtol=1e-3, atol=1e-3)
    # Negative control: the same positions of a text that differs early look different.
    other = [tokens[0] ^ 1, *tokens[1:]]
    assert not np.allclose(DraftRollout(loaded).run(other, first, depth, sampling)[1], features)


def test_the_rollout_in_blocks_and_chunks_is_the_same(draft, monkeypatch):
    tokens = text(60)
    whole = DraftRollout(draft).run(tokens, 7, 3, WARM)
    monkeypatch.setattr("wispprof.profiling.draft_rollout._CHUNK", 16)
    pieces = DraftRollout(draft)
    pieces._rows = 11
    again = pieces.run(tokens, 7, 3, WARM)
    assert np.array_equal(whole[0], again[0])
    np.testing.assert_allclose(whole[1], again[1], rtol=1e-4, atol=1e-4)
    with pytest.raises(EngineError, match="context"):
        pieces.run(text(255), 7, 3, WARM)
    with pytest.raises(EngineError, match="at least one"):
        pieces.run(text(5), 5, 3, WARM)


@pytest.mark.parametrize("sampling", [Sampling(), WARM], ids=["greedy", "sampled"])
def test_paths_are_what_a_lone_session_would_get(target, sampling):
    prompts = [text(n, n) for n in (5, 17, 40)]
    settings = TraceSettings(sampling=sampling, path_tokens=12)
    for prompt, path in zip(prompts, target_paths(target, prompts, settings), strict=True):
        engine = TorchEngine(target, kv_tokens=200, max_sessions=1)
        engine.open("a", sampling)
        own = list(engine.step([StepInput("a", prompt)])[0].tokens)
        while len(own) < 12:
            own += engine.step([StepInput("a", own[-1:])])[0].tokens
        assert path == own


@pytest.mark.parametrize("sampling", [Sampling(), WARM], ids=["greedy", "sampled"])
def test_accepted_is_what_the_engine_would_accept(target, draft, sampling, tmp_path):
    """The trace's word against a verify step, at every uncensored position."""
    settings = TraceSettings(sampling=sampling, path_tokens=14, depth=4, batch=2)
    prompts = [text(6, 1), text(20, 2), text(9, 3)]
    seen = []
    trace = collect_trace(target, draft, settings, lambda *update: seen.append(update[:2]), prompts=prompts)
    assert seen[-1] == (6, 6)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    for path in trace.paths:
        tokens = [*path.prompt, *path.path]
        engine = TorchEngine(target, kv_tokens=4096, max_sessions=2)
        for row in range(path.scored_rows()):
            engine.open("a", sampling)
            context = tokens[: len(path.prompt) + row]
            drafts = path.drafts[row].tolist()
            [outcome] = engine.step([StepInput("a", [*context, *drafts], drafts=len(drafts))])
            assert outcome.accepted == path.accepted[row]
            engine.close("a")
    save_trace(trace, tmp_path / "t.jsonl")
    assert trace_hash(load_trace(tmp_path / "t.jsonl")) == trace_hash(trace)


class EngineServer:
    """A server's end of a connection, with a real engine behind it and no network before it."""

    def __init__(self, loaded, tokenizer=""):
        self.loaded, self.tokenizer, self.frames, self.opened = loaded, tokenizer, [], []

    async def send(self, data):
        frame = protocol.decode_edge(data)
        if isinstance(frame, protocol.Hello):
            self.frames.append(protocol.Welcome(1, "far", self.tokenizer, 256, 8, True))
            return
        assert frame.undrafted
        self.opened.append(frame)
        sampling = Sampling(frame.temperature, frame.top_k, frame.top_p, frame.seed)
        settings = TraceSettings(sampling=sampling, path_tokens=frame.max_new)
        [path] = target_paths(self.loaded, [frame.tokens], settings)
        start = len(frame.tokens)
        for done in range(0, len(path), 5):
            piece = path[done : done + 5]
            finished = "length" if done + 5 >= len(path) else ""
            committed_len = start + done + len(piece)
            self.frames.append(
                protocol.Commit(frame.session, 0, committed_len, piece, 0, 0, 0, 0, finished=finished)
            )

    async def receive(self):
        return protocol.encode(self.frames.pop(0))

    async def close(self):
        pass


@pytest.mark.parametrize("sampling", [Sampling(), WARM], ids=["greedy", "sampled"])
def test_a_remote_target_gives_the_same_trace_as_a_local_one(target, draft, sampling):
    settings = TraceSettings(sampling=sampling, path_tokens=14, depth=3, batch=2)
    prompts = [text(6, 1), text(20, 2), text(9, 3)]
    local = collect_trace(target, draft, settings, prompts=prompts)

    async def connect():
        return EngineServer(target)

    far = RemoteTarget("ws://x")
    remote = trace_remote(far, settings, draft=draft, prompts=prompts, connect=connect)
    assert trace_hash(remote) == trace_hash(local)
    assert remote.target == "far"

    async def stranger():
        return EngineServer(target, tokenizer="other")

    with pytest.raises(ModelError, match="share a tokenizer"):
        trace_remote(far, settings, draft=draft, prompts=prompts, connect=stranger)


def test_a_model_always_accepts_itself(target):
    settings = TraceSettings(sampling=WARM, path_tokens=12, depth=3)
    trace = collect_trace(target, target, settings, prompts=[text(8)])
    assert trace.cum_acceptance_by_position().tolist() == [1.0, 1.0, 1.0]


def test_accepted_lengths_count_the_matching_prefix_only():
    drafts = np.array([[5, 6, 7], [6, 0, 8], [0, 8, 9], [8, 9, 1]])
    assert accepted_lengths(drafts, [5, 6, 7, 8]).tolist() == [3, 1, 0, 1]


def test_pairs_and_lengths_that_cannot_work_say_so(target, draft):
    stranger = SimpleNamespace(id="x", tokenizer_hash="other", vocab_size=9)
    with pytest.raises(ModelError, match="share a tokenizer"):
        collect_trace(target, stranger, TraceSettings(), prompts=[text(5)])
    with pytest.raises(ProfileError, match="context"):
        collect_trace(target, draft, TraceSettings(path_tokens=250), prompts=[text(50)])


# --- prompts --------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of characters, which begins served prompts with 7."""

    bos_token_id = 0

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [7] * add_special_tokens + [ord(c) for c in text]}


def test_held_out_prompts_are_held_out_and_repeatable(monkeypatch):
    from wispprof.profiling import prompts as prompt_sources

    files = [prompt_sources.SourceFile(f"f{i}.py", f"line of file {i}\n" * 40) for i in range(3)]
    trained = [prompt_sources.SourceFile("t.py", "trained on this\n" * 40)]
    monkeypatch.setattr(prompt_sources, "collect_sources", lambda root=None: (trained, files))
    prompts = held_out_prompts(Letters(), 12, 50, seed=4)
    assert len(prompts) == 12
    assert all(25 <= len(p) <= 50 and p[0] == 0 for p in prompts)
    whole = "".join(f.text for f in files)
    assert all("".join(map(chr, p[1:])) in whole for p in prompts)
    assert prompts == held_out_prompts(Letters(), 12, 50, seed=4)
    assert prompts != held_out_prompts(Letters(), 12, 50, seed=5)


def test_conversations_go_through_the_chat_template(tmp_path):
    class Chat(Letters):
        chat_template = "any"

        def apply_chat_template(self, messages, **how):
            assert how == {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
            if messages[0]["role"] == "system":
                raise ValueError("no system messages")
            return [ord(letter) for m in messages for letter in f"<{m['role'][0]}{m['content']}>"] + [7]

    def line(*messages):
        return json.dumps({"messages": [{"role": r, "content": c} for r, c in messages]}) + "\n"

    chats = tmp_path / "chats.jsonl"
    chats.write_text(line(("user", "hi"), ("assistant", "cut")) + line(("user", "x" * 90)) + line())
    found = read_prompts(chats, Chat(), 9, 40)
    [ids] = found.ids
    assert (found.cut, found.left_out) == (0, 1)
    assert "".join(map(chr, ids)) == "<uhi>\x07"
    with pytest.raises(ProfileError, match="longer than 4 tokens"):
        load_prompts(chats, Chat(), 9, 4)
    with pytest.raises(ModelError, match="no chat template"):
        load_prompts(chats, Letters(), 9, 40)
    chats.write_text(line(("system", "hi")))
    with pytest.raises(ArtifactDamaged, match=r"line 1: .*no system messages"):
        load_prompts(chats, Chat(), 9, 40)
    chats.write_text('{"messages": ["hi"]}')
    with pytest.raises(ArtifactDamaged, match="line 1: messages"):
        load_prompts(chats, Chat(), 9, 40)


def test_other_tokenizers_are_refused_before_weights_are_loaded(monkeypatch):
    from wispprof.engines import loading, model_folder, tokenizers

    def load_model(*_):
        raise AssertionError("loaded")

    monkeypatch.setattr(loading, "load_model", load_model)
    monkeypatch.setattr(model_folder, "find_model", lambda name: name)
    monkeypatch.setattr(tokenizers, "read_tokenizer", lambda folder: folder)
    monkeypatch.setattr(tokenizers, "tokenizer_hash", lambda tokenizer: tokenizer)
    with pytest.raises(ModelError, match="a and b do not share a tokenizer"):
        trace_pair(TraceSettings(target="x/a", draft="y/b"))


def test_any_engine_generates_the_same_paths():
    settings = TraceSettings(count=3, batch=2, prompt_tokens=24, path_tokens=12, depth=2)
    wanted = trace_pair(settings)
    found = trace_on_engine(TraceEngineSettings(), settings)
    assert [path.path for path in found.paths] == [path.path for path in wanted.paths]
    assert (found.target, found.meta["engine"]) == (wanted.target, "torch")


def test_prompts_of_a_user(tmp_path):
    lines = tmp_path / "p.jsonl"
    lines.write_text('{"prompt": "abc"}\n\n{"text": "defghi"}\n"jk"\n')
    found = read_prompts(lines, Letters(), 9, 4)
    assert sorted(map(len, found.ids)) == [3, 4, 4]
    assert (found.cut, found.left_out) == (1, 0)
    assert {prompt[0] for prompt in found.ids} == {7}  # as in serving, whatever the model was trained with
    lines.write_text('{"prompt": "abc"}\n{"prompt": 4}\n')
    with pytest.raises(ArtifactDamaged, match="line 2"):
        load_prompts(lines, Letters(), 9, 4)
    lines.write_text(json.dumps("x")[:-1])
    with pytest.raises(ArtifactDamaged, match="line 1"):
        load_prompts(lines, Letters(), 9, 4)
    lines.write_text("")
    with pytest.raises(ProfileError, match="no prompts"):
        load_prompts(lines, Letters(), 9, 4)
    plain = tmp_path / "p.txt"
    plain.write_text("some line\n" * 30)
    assert len(load_prompts(plain, Letters(), 3, 20)) == 3
    plain.write_text("short")
    with pytest.raises(ProfileError, match="long enough"):
        load_prompts(plain, Letters(), 3, 20)
    with pytest.raises(ModelError, match="tokenizer"):
        load_prompts(plain, None, 3, 20)


@pytest.mark.parametrize("sampling", [Sampling(), WARM, Sampling(1.0, seed=3)])
def test_candidates_begin_with_the_drafted_token(draft, sampling):
    ids = text(60)
    rollout = DraftRollout(draft)
    rollout._rows = 16  # several blocks
    drafts, _ = rollout.run(ids, 20, 2, sampling)
    candidates, probs = rollout.candidates(ids, 20, sampling, 8)
    assert candidates.shape == probs.shape == (40, 8)
    assert (candidates[:, 0] == drafts[:, 0]).all()
    assert all(len(set(row)) == 8 for row in candidates.tolist())


@pytest.mark.parametrize("sampling", [WARM, Sampling(1.0, seed=3)])
def test_candidates_are_what_the_noise_chooses_one_after_another(sampling):
    """Each candidate is what would be drawn if the ones before it could not be."""
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(1)) * 3
    positions = np.arange(100, 120)
    probs = filtered_probs(logits, sampling)
    ids, found = noise_ranked(logits, positions, sampling, 4)
    torch.testing.assert_close(found, probs.gather(1, ids))
    # The filters are the same for every candidate, so only the temperature remains.
    left = torch.where(probs > 0, logits, -torch.inf)
    plain = Sampling(sampling.temperature, seed=sampling.seed)
    for rank in range(4):
        possible = left.isfinite().any(1)
        chosen = sample_tokens(left[possible], positions[possible], [plain] * int(possible.sum()))
        assert (chosen == ids[possible, rank]).all()
        left = left.scatter(1, ids[:, rank : rank + 1], -torch.inf)


def test_a_trace_keeps_the_ranks_of_the_path(target, tmp_path):
    """The target as its own draft is always right: rank 0 everywhere."""
    settings = TraceSettings(count=2, path_tokens=12, depth=2, sampling=WARM)
    prompts = [text(9), text(14, 1)]
    same = collect_trace(target, target, settings, prompts=prompts)
    assert all((path.target_ranks == 0).all() for path in same.paths)
    assert all(path.candidate_probs.shape == (12, 16) for path in same.paths)
    save_trace(same, tmp_path / "t.jsonl")
    back = load_trace(tmp_path / "t.jsonl")
    assert all(
        (a.candidate_probs == b.candidate_probs).all() for a, b in zip(same.paths, back.paths, strict=True)
    )
    assert ranks_of([4, 7], np.array([[3, 4], [5, 6]])).tolist() == [1, 2]


def test_a_draft_beside_a_remote_target_takes_the_tokenizer_of_model(monkeypatch):
    loaded, tokenizer = [], SimpleNamespace(get_vocab=lambda: {"a": 0})

    def load(where):
        loaded.append(where)
        return tokenizer

    monkeypatch.setattr("wispprof.engines.tokenizers.load_tokenizer", load)
    monkeypatch.setattr("wispprof.engines.tokenizers.tokenizer_hash", lambda tokenizer: "hash")
    for settings, where in (
        (TraceSettings(target="/target", draft="/draft", drafter="lookup"), "/target"),
        (TraceSettings(target="/target", tokenizer="/t", draft="/draft", drafter="lookup"), "/t"),
        (TraceSettings(draft="/draft", drafter="lookup"), "/draft"),
    ):
        assert load_traced_draft(settings).tokenizer is tokenizer
        assert loaded.pop() == where
