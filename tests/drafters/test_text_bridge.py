"""Drafts by way of the text: two tokenizers that cut the same text differently."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wispprof.drafters.model_drafter import ModelDrafter
from wispprof.drafters.text_bridge import TextBridge
from wispprof.drafters.token_text import TokenText
from wispprof.types import DraftFeatures, DraftToken, Sampling

STORY = "the cat sat on the mat. a dog ran to the cat, and the cat ran away from the mat"
WORDS = sorted(set(re.findall(r"\s?\w+|[^\w\s]", STORY)))
SURE = DraftFeatures(0.9, 0.2, 3.0, 2.0)


class WordTokenizer:
    """The target's: whole words with the space before them, else letters. Ids 0 … 255 are bytes."""

    eos_token_id = 999
    added_tokens_decoder = {999: "<end>"}

    def __init__(self) -> None:
        self.vocab = {f"<0x{b:02X}>": b for b in range(256)}
        self.vocab |= {word.replace(" ", "▁"): 256 + n for n, word in enumerate(WORDS)}

    def get_vocab(self) -> dict[str, int]:
        return self.vocab

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        ids: list[int] = []
        for word in re.findall(r"\s?\w+|[^\w\s]|\s", text):
            known = self.vocab.get(word.replace(" ", "▁"))
            ids += [known] if known is not None else list(word.encode())
        return {"input_ids": ids}


class LetterModel(ModelDrafter):
    """The draft: one token per letter, 0 begins a text; knows one story, or gets it wrong at ``wrong``."""

    def __init__(self, story: str, wrong: str = "") -> None:
        super().__init__(4096)
        self._cached = 0
        self.story, self.wrong = story.encode(), wrong.encode()

    def piece(self, token: int) -> bytes:
        return bytes([token]) if token else b""

    def encode(self, text: bytes, *, start: bool = False) -> list[int]:
        return [0] * start + list(text)

    def is_end(self, token: int) -> bool:
        return token == 1

    def draft(self) -> DraftToken:
        held = bytes(self._tokens[1:])
        if not self.story.startswith(held):
            token = ord("?")
        elif len(held) == len(self.story):
            token = 1
        else:
            token = self.story[len(held)]
            if self.wrong and self.story[: len(held)].endswith(self.wrong):
                token = ord("x")
        self._tokens.append(token)
        return DraftToken(token, SURE)


def bridge(story: str = STORY, wrong: str = "") -> tuple[TextBridge, LetterModel, WordTokenizer]:
    model, tokenizer = LetterModel(story, wrong), WordTokenizer()
    return TextBridge(model, model, TokenText(tokenizer)), model, tokenizer


def test_words_are_proposed_once_they_are_certain() -> None:
    drafter, model, tokenizer = bridge()
    path = tokenizer(STORY)["input_ids"]
    drafter.open(path[:2], Sampling(0.8))
    drafted = []
    while drafter.can_draft and len(drafted) < 200:
        drafted.append(drafter.draft().token)
    assert drafted == [*path[2:], 999]  # the end of the answer is the target's own end token
    assert model.length == len(STORY) + 1


def test_a_token_that_begins_a_word_is_proposed_at_once() -> None:
    class WordModel(LetterModel):
        """Writes whole words, each with the space before it."""

        def piece(self, token: int) -> bytes:
            return super().piece(token) if token < 256 else WORDS[token - 256].encode()

        def draft(self) -> DraftToken:
            written = b"".join(map(self.piece, self._tokens))
            word = re.match(r"\s?\w+|[^\w\s]", self.story[len(written) :].decode())
            assert word is not None
            self._tokens.append(256 + WORDS.index(word[0]))
            return DraftToken(self._tokens[-1], SURE)

    model, tokenizer = WordModel(STORY), WordTokenizer()
    drafter = TextBridge(model, model, TokenText(tokenizer))
    path = tokenizer(STORY)["input_ids"]
    drafter.open(path[:2], Sampling())
    read = model.length
    assert drafter.can_draft
    assert drafter.draft().token == path[2]
    assert model.length <= read + 1  # one draft step for the first proposal


def test_a_wrong_letter_costs_one_rejection_and_its_neighbours_stand() -> None:
    drafter, _, tokenizer = bridge(wrong="a dog r")
    path = tokenizer(STORY)["input_ids"]
    drafter.open(path[:1], Sampling())
    held, rounds = 1, 0
    while held < len(path):
        proposed = []
        while len(proposed) < 3 and drafter.can_draft:
            proposed.append(drafter.draft().token)
        right = 0
        while right < len(proposed) and held + right < len(path) and proposed[right] == path[held + right]:
            right += 1
        drafter.rollback(held + right)
        drafter.extend(path[held + right : held + right + 1])
        held, rounds = held + right + 1, rounds + 1
    assert rounds <= len(path) / 3 + 2


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_both_sides_hold_the_same_text_after_any_history(seed: int) -> None:
    rng = random.Random(seed)
    drafter, model, tokenizer = bridge(wrong="ca")
    path = tokenizer(STORY)["input_ids"]
    drafter.open(path[:2], Sampling())
    held = list(path[:2])
    for _ in range(30):
        action = rng.random()
        if action < 0.6:
            if drafter.can_draft:
                held.append(drafter.draft().token)
        elif action < 0.8:
            cut = rng.randrange(1, len(held) + 1)
            drafter.rollback(cut)
            del held[cut:]
        else:
            more = [rng.choice([*path, 0xC3, 0xA9]) for _ in range(rng.randrange(1, 4))]
            drafter.extend(more)
            held += more
        assert drafter.length == len(held)
        drafter.prefill()
        text = TokenText(tokenizer).bytes_of(held)
        assert bytes(model.tokens[1:]).startswith(text)


def test_the_bundled_tokenizer_s_bytes_are_exact() -> None:
    from wispprof.artifacts import bundled_path
    from wispprof.engines.tokenizers import load_tokenizer

    text = TokenText(load_tokenizer(str(bundled_path("models/reference-pair/target"))))
    for sample in ("def f(x):\n    return x + 1\n", "naïve 中文 🙂 end", " leading  spaces"):
        tokens = text.encode(sample.encode())
        assert tokens is not None
        assert text.bytes_of(tokens) == sample.encode()
    assert text.encode("é".encode()[:1]) is None


def test_a_prompt_without_text_cannot_be_bridged() -> None:
    from wispprof.errors import EngineError

    drafter, model, _ = bridge()
    model.encode = lambda text, start=False: []  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="no text"):
        drafter.open([999], Sampling())
