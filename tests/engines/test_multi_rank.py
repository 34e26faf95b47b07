"""Tensor parallel: two processes that share a target decide what one process decides."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rank_processes import KV_TOKENS, PROMPTS, drive, drive_ranks, step_alone
from torch.distributed import TCPStore

from wispprof.engines.loading import load_model, random_model
from wispprof.engines.model_shapes import PRESETS
from wispprof.engines.tensor_parallel import Ranks, join, load_shard
from wispprof.engines.torch.engine import TorchEngine
from wispprof.engines.torch.multi_rank_engine import MultiRankEngine, follow
from wispprof.errors import EngineError, ModelError, ModelUnsupported

# Biases on every layer and a vocabulary that does not split evenly; norms per head and a head of its own.
MODELS = {
    "biased-llama": {
        **PRESETS["tiny-llama"],
        "vocab_size": 97,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "untied-qwen3": {**PRESETS["tiny-qwen3"], "tie_word_embeddings": False},
}


def run_ranks(folder: Path) -> None:
    """Two processes in the environment that torchrun gives its ranks (the store of it is this process's)."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("forkserver")
    # Imported once for both: that takes longer than all they do.
    context.set_forkserver_preload(
        ["wispprof.engines.tensor_parallel", "transformers.models.llama.modeling_llama"]
    )
    ranks = [
        context.Process(target=drive_ranks, args=(folder, environment(rank, store.port))) for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(100)
    assert [rank.exitcode for rank in ranks] == [0, 0]


def environment(rank: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


@pytest.fixture(scope="module")
def driven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        model = random_model(config, seed=4, device="cpu").model
        noise = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith("bias"):
                    parameter.normal_(0, 0.3, generator=noise)
        model.save_pretrained(folder / name)
    run_ranks(folder)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_decide_what_one_process_decides(driven: Path, name: str) -> None:
    loaded = load_model(driven / name, device="cpu")
    engine = TorchEngine(loaded, kv_tokens=KV_TOKENS)
    expected = drive(engine)
    found, follower = (json.loads((driven / name / f"rank{r}.json").read_text()) for r in (0, 1))
    assert len(found["texts"]) == PROMPTS
    logprobs = expected.pop("logprobs")
    assert len(logprobs) > 100
    assert found["logprobs"] == pytest.approx(logprobs, abs=1e-4)
    assert {key: found[key] for key in expected} == expected
    assert expected["accepted"] > 0
    assert expected["errors"] == ["InputRefused"] * 4
    # Nothing is left behind on either rank, and neither holds the whole model.
    assert found["kv_free"] == follower["kv_free"] == KV_TOKENS
    assert follower["sessions"] == []
    for rank in (found, follower):
        assert rank["parameters"] == loaded.info.parameters
        assert rank["held"] < 0.8 * loaded.info.parameters
    # Negative control: a rank's share alone does not decide the same.
    assert step_alone(engine) not in (found["alone"], follower["alone"])


# --- without processes ----------------------------------------------------------------------------


def pretend(rank: int, size: int) -> Ranks:
    return Ranks(rank, size, torch.device("cpu"), None)


def test_what_does_not_split_is_refused(tmp_path: Path) -> None:
    loaded = random_model("tiny-llama", device="cpu")
    loaded.model.save_pretrained(tmp_path)
    with pytest.raises(ModelUnsupported, match="2 KV heads cannot be split over 3 ranks"):
        load_model(tmp_path, ranks=pretend(0, 3))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        load_model(tmp_path, ranks=pretend(0, 2))


def test_shares_of_all_ranks_make_the_whole(tmp_path: Path) -> None:
    loaded = random_model(MODELS["biased-llama"], seed=2, device="cpu")
    loaded.model.save_pretrained(tmp_path)
    whole = dict(loaded.model.named_parameters(remove_duplicate=False))
    config = loaded.model.config
    shares = [load_shard(tmp_path, config, torch.float32, pretend(r, 2))[0] for r in range(2)]
    parts = [dict(model.named_parameters(remove_duplicate=False)) for model in shares]
    split = 0
    for name, parameter in whole.items():
        if name not in parts[1]:  # a row-wise layer's bias belongs to rank 0 alone
            assert torch.equal(parts[0][name], parameter)
        elif parts[0][name].shape == parameter.shape:
            assert torch.equal(parts[1][name], parameter)
        else:
            dim = next(d for d, n in enumerate(parameter.shape) if parts[0][name].shape[d] != n)
            assert torch.equal(torch.cat([p[name] for p in parts], dim), parameter), name
            split += 1
    assert split == 2 * 12 + 1  # per layer 7 weights and 5 column-wise biases; the output head


def test_ranks_are_started_by_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(EngineError, match="torchrun"):
        join(2)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(EngineError, match="--tensor-parallel 4"):
        join(2)


class FakeRanks:
    """Commands within one process: what rank 0 broadcasts is stored for the other rank to receive."""

    def __init__(self) -> None:
        self.rank = 1
        self.sent: list[bytes] = []
        self.left = False

    def broadcast(self, command: bytes) -> None:
        self.sent.append(command)

    def recv(self) -> bytes:
        return self.sent.pop(0)

    def all_reduce_min(self, number: int) -> int:
        return number

    def leave(self) -> None:
        self.left = True


def engines() -> tuple[TorchEngine, TorchEngine]:
    loaded = random_model("tiny-llama", seed=1, device="cpu")
    first, second = (TorchEngine(loaded, kv_tokens=500) for _ in range(2))
    return first, second


def test_what_needs_no_collective_travels_with_the_next_step() -> None:
    ranks: Any = FakeRanks()
    mine, other = engines()
    rank0 = MultiRankEngine(mine, ranks)
    rank0.open("a")
    rank0.open("b")
    rank0.close("b")
    assert ranks.sent == []
    from wispprof.types import StepInput

    rank0.step([StepInput("a", [1, 2, 3], 2)])
    rank0.shutdown()
    assert len(ranks.sent) == 2
    follow(other, ranks)
    assert other.sessions == mine.sessions == ["a"]
    assert other.tokens("a") == mine.tokens("a")


def test_a_rank_with_other_sessions_stops_everything() -> None:
    ranks: Any = FakeRanks()
    mine, other = engines()
    other.open("stray")
    MultiRankEngine(mine, ranks).check_integrity()
    with pytest.raises(EngineError, match="Rank 1 holds 1 sessions"):
        follow(other, ranks)


def test_a_failure_of_one_rank_ends_its_service() -> None:
    from wispprof.types import StepInput

    ranks: Any = FakeRanks()
    mine, _ = engines()
    ended: list[int] = []
    rank0 = MultiRankEngine(mine, ranks, on_broken=lambda: ended.append(1))
    rank0.open("a")

    def dies(*_: object) -> None:
        raise RuntimeError("connection closed by peer")

    mine._decoder = SimpleNamespace(forward=dies)  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="closed"):
        rank0.step([StepInput("a", [1])])
    assert (ranks.left, ended) == (True, [1])
    assert "closed by peer" in rank0.broken
    with pytest.raises(EngineError, match="has stopped"):
        rank0.step([StepInput("a", [1])])
    rank0.close("a")
    rank0.shutdown()
