"""A GGUF draft on the edge: which file, which device, whose tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from fake_pair import LETTERS, edge, text_of

from wispprof.artifacts import bundled_path
from wispprof.drafters import GgufDraft
from wispprof.edge import websocket_connections
from wispprof.edge.draft_device import DraftDevice
from wispprof.edge.edge_runtime import EdgeRuntime, Prompt, _load
from wispprof.errors import ModelError, ModelMissing
from wispprof.server.process import running_server
from wispprof.settings.edge_settings import EdgeSettings
from wispprof.settings.server_settings import ServerSettings
from wispprof.testing.fake_engine import FakeDrafter, FakeEngine, FakeTarget
from wispprof.types import Sampling

TARGET = "models/reference-pair/target"


class LlamaCpp(FakeDrafter):
    """Stands where llama.cpp's drafter does; notes what it was asked to load."""

    asked: list[tuple[Path, int]] = []

    def __init__(self, path: Path, *, gpu_layers: int) -> None:
        super().__init__(FakeTarget(), 0.8)
        self.asked.append((path, gpu_layers))


@pytest.fixture
def llamacpp(monkeypatch: pytest.MonkeyPatch) -> type[LlamaCpp]:
    monkeypatch.setattr(LlamaCpp, "asked", [])
    monkeypatch.setattr("wispprof.drafters.llama_cpp.LlamaCppDrafter", LlamaCpp)
    return LlamaCpp


async def test_a_gguf_draft_drafts_and_requests_reuse_it(llamacpp: type[LlamaCpp]) -> None:
    engine = FakeEngine()
    settings = ServerSettings(admit="all")
    device = DraftDevice("model", "fixed", {"k": 3}, loaded=GgufDraft(Path("some.gguf"), "auto"))
    assert llamacpp.asked == [(Path("some.gguf"), -1)]  # loaded before anybody asks
    async with (
        running_server(settings, engine=engine, model=engine.served) as running,
        edge(websocket_connections(running.split_url)) as client,
    ):
        runtime = EdgeRuntime(EdgeSettings(), LETTERS, device, client)
        for _ in range(2):
            reply = runtime.reply(Prompt(tuple(LETTERS.encode("abc")), 16, Sampling()))
            assert "".join([piece async for piece in reply.text()]) == text_of("abc", 16)
            assert reply.stats.drafted > 0
    device.close()
    assert len(llamacpp.asked) == 1


def test_the_processor_gets_no_layers_on_a_gpu(llamacpp: type[LlamaCpp]) -> None:
    DraftDevice("model", "fixed", loaded=GgufDraft(Path("some.gguf"), "cpu")).close()
    assert llamacpp.asked == [(Path("some.gguf"), 0)]


def test_the_tokenizer_is_the_one_named_or_the_one_beside_the_file(tmp_path: Path) -> None:
    folder = bundled_path(TARGET)
    file = tmp_path / "draft.gguf"
    named = EdgeSettings(draft=str(file), tokenizer=str(folder))
    loaded, _, digest = _load(named, str(file))
    assert loaded == GgufDraft(file, "auto")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path)
    assert _load(EdgeSettings(draft=str(file)), str(file))[2] == digest


def test_no_tokenizer_and_no_file_are_told_with_their_fix(tmp_path: Path) -> None:
    file = tmp_path / "draft.gguf"
    with pytest.raises(ModelError, match="no tokenizer") as err:
        _load(EdgeSettings(draft=str(file)), str(file))
    assert "--tokenizer" in err.value.hint
    with pytest.raises(ModelMissing, match=r"draft\.gguf"):
        DraftDevice("model", "fixed", loaded=GgufDraft(file, "auto"))
