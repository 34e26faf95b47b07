"""A GGUF draft on the edge: which file, which device, whose tokenizer."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest
from fake_libllama import FakeLibllama
from fake_pair import LETTERS, edge, text_of

from wispprof.artifacts import bundled_path
from wispprof.drafters import GgufDraft
from wispprof.drafters.vocabulary import VocabularyMatch
from wispprof.edge import websocket_connections
from wispprof.edge.draft_device import DraftDevice
from wispprof.edge.edge_runtime import EdgeRuntime, Prompt, _load
from wispprof.engines.loading import load_model
from wispprof.errors import ModelError, ModelMissing
from wispprof.server.process import running_server
from wispprof.settings.edge_settings import EdgeSettings
from wispprof.settings.server_settings import ServerSettings
from wispprof.testing.fake_engine import FakeDrafter, FakeEngine, FakeTarget
from wispprof.types import Sampling

TARGET = "models/reference-pair/target"


class LlamaCpp(FakeDrafter):
    """Stands where llama.cpp's drafter does; notes the models it drafts with."""

    models: list[Any] = []

    def __init__(self, model: Any, hidden: Any = None) -> None:
        super().__init__(FakeTarget(), 0.8)
        self.models.append(model)


@pytest.fixture
def llamacpp(monkeypatch: pytest.MonkeyPatch) -> type[LlamaCpp]:
    monkeypatch.setattr(LlamaCpp, "models", [])
    monkeypatch.setattr("wispprof.drafters.llama_cpp.LlamaCppDrafter", LlamaCpp)
    return LlamaCpp


async def test_requests_share_one_model(llamacpp: type[LlamaCpp]) -> None:
    engine = FakeEngine(step_ms=lambda shape: 5.0)  # or an answer may end before a draft is there
    settings = ServerSettings(admit="all")
    loaded = GgufDraft(object(), LETTERS, VocabularyMatch(True, None, ""))  # type: ignore[arg-type]
    device = DraftDevice("model", "fixed", {"k": 3}, loaded=loaded)
    assert llamacpp.models == [loaded.model]  # ready before anybody asks
    async with (
        running_server(settings, engine=engine, model=engine.served) as running,
        edge(websocket_connections(running.split_url)) as client,
    ):
        runtime = EdgeRuntime(EdgeSettings(), LETTERS, device, client)

        async def one() -> str:
            reply = runtime.reply(Prompt(tuple(LETTERS.encode("abc")), 16, Sampling()))
            text = "".join([piece async for piece in reply.text()])
            assert reply.stats.drafted > 0
            return text

        assert await one() == text_of("abc", 16)
        assert len(llamacpp.models) == 1
        assert await asyncio.gather(one(), one()) == [text_of("abc", 16)] * 2
    device.close()
    assert set(map(id, llamacpp.models)) == {id(loaded.model)}


def test_the_tokenizer_is_the_one_named_or_the_one_beside_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = bundled_path(TARGET)
    target = load_model(str(folder), device="cpu")
    texts = target.tokenizer.convert_ids_to_tokens(range(target.info.vocab_size))
    library = FakeLibllama(target, [*texts, "[PAD]"])
    monkeypatch.setattr("wispprof.drafters.gguf_model.load_libllama", lambda path: library)
    file = tmp_path / "draft.gguf"
    file.write_bytes(b"GGUF")
    named = EdgeSettings(draft=str(file), tokenizer=str(folder))
    loaded, _, digest = _load(named, str(file))
    assert loaded.match.same
    assert "1 ids beyond the target's" in loaded.note
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path)
    assert _load(EdgeSettings(draft=str(file)), str(file))[2] == digest
    library.texts = [f"x{text}" for text in texts]
    foreign = _load(named, str(file))[0]
    assert not foreign.match.same
    assert "mean another text" in foreign.note


def test_no_tokenizer_and_no_file_are_told_with_their_fix(tmp_path: Path) -> None:
    file = tmp_path / "draft.gguf"
    with pytest.raises(ModelError, match="no tokenizer") as err:
        _load(EdgeSettings(draft=str(file)), str(file))
    assert "--tokenizer" in err.value.hint
    folder = str(bundled_path(TARGET))
    with pytest.raises(ModelMissing, match=r"draft\.gguf"):
        _load(EdgeSettings(draft=str(file), tokenizer=folder), str(file))
