"""Incremental detokenization and stop strings."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wispprof.openai_api.tokenizer import IncrementalDetokenizer, StopStringFilter


class Bytes:
    """A byte tokenizer, in which many characters take several tokens."""

    def decode(self, tokens: list[int], **_: object) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")


class Spaces:
    """A tokenizer that drops the space before the first word, as some do."""

    def decode(self, tokens: list[int], **_: object) -> str:
        return "".join(f" w{token}" for token in tokens).lstrip()


@given(st.text(max_size=40), st.integers(0, 1000))
def test_bytes_in_any_grouping_give_the_text(text: str, seed: int) -> None:
    data = list(text.encode())
    rng = random.Random(seed)
    stream = IncrementalDetokenizer(Bytes(), list(b"prompt "))
    pieces = []
    while data:
        count = rng.randrange(1, 4)
        pieces.append(stream.push(data[:count]))
        del data[:count]
    pieces.append(stream.finish())
    assert "".join(pieces) == text
    # What is shown is never taken back, so no piece but the last may hold half a character.
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


def test_a_space_before_the_first_word_is_kept() -> None:
    stream = IncrementalDetokenizer(Spaces(), [1, 2])
    assert stream.push([3]) + stream.push([4, 5]) + stream.finish() == " w3 w4 w5"


def test_an_unfinished_character_comes_at_the_end() -> None:
    stream = IncrementalDetokenizer(Bytes())
    assert stream.push([0xE2]) == ""
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize(
    ("pieces", "stops", "shown", "hit"),
    [
        (["hello wo", "rld"], ["world"], "hello ", "world"),
        (["hello wo", "man"], ["world"], "hello woman", ""),
        (["a", "b", "c"], ["bcd"], "abc", ""),
        (["one END two"], ["two", "END"], "one ", "END"),
        (["aaab"], ["aab"], "a", "aab"),
        (["text"], [], "text", ""),
    ],
)
def test_stop_strings(pieces: list[str], stops: list[str], shown: str, hit: str) -> None:
    scanner = StopStringFilter(stops)
    out = "".join(scanner.push(piece) for piece in pieces) + scanner.finish()
    assert out == shown
    assert scanner.hit == hit
    assert scanner.push("more") == ("" if hit else "more")


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_strings_in_any_grouping(text: str, stops: list[str]) -> None:
    places = [text.find(stop) for stop in stops if stop in text]
    expected = text[: min(places)] if places else text
    scanner = StopStringFilter(stops)
    out = "".join(scanner.push(letter) for letter in text) + scanner.finish()
    # Letter by letter the stop string that ends first wins; it may begin after another that is longer.
    assert out == expected or (scanner.hit and text.startswith(out + scanner.hit))
