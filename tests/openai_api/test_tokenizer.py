"""Incremental detokenization, stop strings, and the bytes of single tokens."""

from __future__ import annotations

import random
import string
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from wispprof.artifacts import bundled_path
from wispprof.openai_api import ApiError, ChatTokenizer
from wispprof.openai_api.detokenizer import IncrementalDetokenizer
from wispprof.openai_api.stop_strings import StopStringFilter, StopStrings
from wispprof.openai_api.tokenizer import ByteTokenizer

REPLACEMENT = "\ufffd"


def bytes_decode(tokens: list[int]) -> str:
    """A byte tokenizer, in which many characters take several tokens."""
    return bytes(tokens).decode("utf-8", errors="replace")


def spaces_decode(tokens: list[int]) -> str:
    """A tokenizer that drops the space before the first word, as some do."""
    return "".join(f" w{token}" for token in tokens).lstrip()


@given(st.text(max_size=40), st.integers(0, 1000))
def test_bytes_in_any_grouping_give_the_text(text: str, seed: int) -> None:
    data = list(text.encode())
    rng = random.Random(seed)
    stream = IncrementalDetokenizer(bytes_decode, list(b"prompt "))
    pieces = []
    while data:
        count = rng.randrange(1, 4)
        pieces.append(stream.push(data[:count]))
        del data[:count]
    assert "".join(pieces) == text.rstrip(REPLACEMENT)
    # What is shown is never taken back, so no piece may hold half a character.
    assert not any(REPLACEMENT in piece for piece in pieces) or REPLACEMENT in text


@given(st.binary(max_size=60), st.binary(max_size=8))
def test_any_bytes_come_out_as_far_as_they_are_characters(data: bytes, prompt: bytes) -> None:
    stream = IncrementalDetokenizer(bytes_decode, list(prompt))
    out = stream.push(list(data)) + stream.push(list(b"ok"))
    assert out.endswith("ok")
    if not prompt:
        assert out == (data + b"ok").decode("utf-8", "replace")


def test_a_space_before_the_first_word_is_kept() -> None:
    stream = IncrementalDetokenizer(spaces_decode, [1, 2])
    words = list(range(3, 40))
    assert stream.push(words) == "".join(f" w{word}" for word in words)


def test_a_text_cut_within_a_character_ends_before_it() -> None:
    stream = IncrementalDetokenizer(bytes_decode)
    assert stream.push(list("ab\N{GRINNING FACE}".encode())[:-1]) == "ab"


def test_unfinished_bytes_are_held_for_a_bounded_number_of_tokens() -> None:
    longest = 0

    def decode(tokens: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return bytes_decode(tokens)

    stream = IncrementalDetokenizer(decode)
    assert len(stream.push([0x80] * 1000)) >= 900
    assert longest < 100


def byte_fallback() -> ChatTokenizer:
    """Words with a leading space mark and bytes as tokens, as SentencePiece models have."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocab |= {f"\u2581{letter}": 256 + n for n, letter in enumerate(string.ascii_lowercase)}
    model = Tokenizer(models.BPE(vocab, [], byte_fallback=True, fuse_unk=True))
    parts = [
        decoders.Replace("\u2581", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1),
    ]
    model.decoder = decoders.Sequence(parts)

    class Wrapped:
        eos_token_id = None
        chat_template = None
        is_fast = True
        added_tokens_decoder: dict[int, Any] = {}
        backend_tokenizer = model

        def get_vocab(self) -> dict[str, int]:
            return vocab

    return ChatTokenizer(Wrapped())


def test_byte_fallback_of_many_emojis_in_a_row() -> None:
    tokenizer = byte_fallback()
    text = "\N{GRINNING FACE}\N{PARTY POPPER}é" * 9
    stream = tokenizer.detokenizer([256, 257])
    assert stream.push([258, *text.encode(), 259]) == f" c{text} d"
    assert tokenizer.token_bytes(0xF0) == b"\xf0"
    assert tokenizer.token_bytes(256) == b" a"


def bundled() -> ChatTokenizer:
    from transformers import AutoTokenizer

    return ChatTokenizer(AutoTokenizer.from_pretrained(str(bundled_path("models/reference-pair/target"))))


def test_the_bytes_of_tokens_join_to_the_text() -> None:
    tokenizer = bundled()
    text = "def f(x):\n    return 'é \N{GRINNING FACE} 中文'\n"
    tokens = tokenizer.encode(text)
    assert b"".join(map(tokenizer.token_bytes, tokens)) == text.encode()
    assert tokenizer.token_bytes(1) == b"<|eos|>"
    assert tokenizer.special_texts == {0: "<|bos|>", 1: "<|eos|>"}


@pytest.mark.parametrize(
    ("pieces", "stops", "shown", "hit"),
    [
        (["hello wo", "rld"], ["world"], "hello ", "world"),
        (["hello wo", "man"], ["world"], "hello woman", ""),
        (["a", "b", "c"], ["bcd"], "abc", ""),
        (["one END two"], ["two", "END"], "one ", "END"),
        (["aaab"], ["aab"], "a", "aab"),
        (["text"], ["no"], "text", ""),
        (["xabcd"], ["abcd", "bc"], "xa", "bc"),
        (["xabc"], ["bc", "abc"], "xa", "bc"),
        (["xabc"], ["abc", "bc"], "x", "abc"),
    ],
)
def test_stop_strings(pieces: list[str], stops: list[str], shown: str, hit: str) -> None:
    scanner = StopStringFilter(StopStrings(stops))
    out = "".join(scanner.push(piece) for piece in pieces) + scanner.finish()
    assert out == shown
    assert scanner.hit == hit
    assert scanner.push("more") == ("" if hit else "more")


def first_complete(text: str, stops: list[str]) -> tuple[int, int, int]:
    """(end, number, start) of the stop string that is complete first; of several the one listed first."""
    found = [
        (text.find(stop) + len(stop), n, text.find(stop)) for n, stop in enumerate(stops) if stop in text
    ]
    return min(found, default=(len(text), 0, len(text)))


@given(
    st.text("ab", max_size=24),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4),
    st.lists(st.integers(0, 24), max_size=4),
    st.booleans(),
)
def test_stop_strings_in_any_grouping(text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    end, _, start = first_complete(text, stops)
    scanner = StopStringFilter(StopStrings(stops), include=include)
    out, held = "", ""
    for begin, stop in pairwise([0, *sorted(cuts), len(text)]):
        out += scanner.push(text[begin:stop])
        held = text[len(out) : stop]
        if not scanner.hit:
            # No more is held back than may begin a stop string.
            assert not held or any(one.startswith(held) for one in stops)
    out += scanner.finish()
    assert out == text[: end if include else start]


def test_a_stop_string_across_a_special_token() -> None:
    scanner = StopStringFilter(StopStrings(["b<end>"]))
    assert scanner.push("ab") == "a"
    assert scanner.push("<end>", visible=False) == ""
    assert scanner.hit
    other = StopStringFilter(StopStrings(["b<end>!"]))
    shown = other.push("ab") + other.push("<end>", visible=False) + other.push("c")
    assert shown == "abc"


def test_stop_strings_cost_a_constant_number_of_steps_a_character() -> None:
    class Counted(StopStrings):
        calls = 0

        def step(self, state: int, char: str) -> int:
            Counted.calls += 1
            return super().step(state, char)

    stops = Counted(["a" * 255 + chr(ord("b") + n) for n in range(16)])
    assert len(stops.next) < 16 * 256
    Counted.calls = 0
    scanner = StopStringFilter(stops)
    for _ in range(100):
        scanner.push("a" * 100)
    assert Counted.calls == 10_000


TEMPLATE = """{% for m in messages %}[{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}]{{ m.content }}{%
for c in m.tool_calls or [] %}<{{ c.function.name }} {{ c.function.arguments.x }}>{% endfor %}{%
if m.role == 'bad' %}{{ raise_exception('no bad role') }}{% endif %}{% endfor %}{%
if tools %}T{{ tools | length }}{% endif %}{{ mood or '' }}{%
if add_generation_prompt %}[assistant]{% endif %}"""


class TemplatedBytes(ByteTokenizer):
    """Renders chat templates as transformers does."""

    def apply_chat_template(self, messages: list[Any], **options: Any) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        assert options.pop("tokenize") is False
        rendered, _ = render_jinja_template([messages], **options)
        return str(rendered[0])


def test_the_targets_template_is_used_with_all_of_a_tool_turn() -> None:
    tokenizer = ChatTokenizer(TemplatedBytes(), stop_tokens=(), chat_template=TEMPLATE)
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "hi", "name": "Ann"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "1", "function": {"name": "add", "arguments": {"x": 3}}}],
        },
        {"role": "tool", "content": "4", "tool_call_id": "1"},
    ]
    expected = "[user Ann]hi[assistant]<add 3>[tool]4"
    assert tokenizer.decode(tokenizer.chat(messages)) == expected + "[assistant]"
    tools = [{"type": "function", "function": {"name": "add"}}]
    shown = tokenizer.chat(messages, tools=tools, add_generation_prompt=False, variables={"mood": ":)"})
    assert tokenizer.decode(shown) == expected + "T1:)"
    with pytest.raises(ApiError, match="no bad role") as err:
        tokenizer.chat([{"role": "bad", "content": "x"}])
    assert (err.value.status, err.value.param) == (400, "messages")
    with pytest.raises(ApiError, match="no variable"):
        tokenizer.chat(messages, variables={"tokenize": False})
