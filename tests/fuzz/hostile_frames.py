"""Frames of the wire made by a seeded generator: plausible, out of bounds, malformed."""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec

from wispprof import protocol

EDGE_FRAMES = (
    protocol.Open,
    protocol.OpenPart,
    protocol.Draft,
    protocol.Close,
    protocol.Ping,
    protocol.Hello,
)
SERVER_FRAMES = (protocol.Commit, protocol.Commit, protocol.Problem, protocol.Pong, protocol.Welcome)

_INTS = (0, 0, 1, 2, 3, 4, 5, 8, 16, 64, 255, 256, -1, (1 << 31) - 1, 1 << 31, (1 << 63) - 1, (1 << 64) - 1)
_REALS = (0.0, 1.0, 0.5, 8.0, -1.0, 1e-300, 1e308, float("nan"), float("inf"), -float("inf"))
_TOKENS = (0, 1, 2, 3, 4, 5, 200, 255, 256, -1, (1 << 31) - 1, 1 << 40)
_TEXTS = ("", "stop", "length", "busy", "internal", "frame", "model", "hash", "\x00", "x" * 400)
_SESSIONS = (0, 0, 0, 1, 2, -1, 1 << 31, (1 << 63) - 1)
_FLOATS = ("tokens_per_s", "temperature", "top_p", "min_p", "draft_ms", "slack_ms", "queue_ms", "verify_ms")


def hostile_frames(dice: random.Random, kinds: Sequence[type[msgspec.Struct]], most: int) -> list[bytes]:
    """Up to ``most`` frames of these kinds."""
    return [hostile_frame(dice, dice.choice(kinds)) for _ in range(dice.randrange(most + 1))]


def hostile_frame(dice: random.Random, kind: type[msgspec.Struct]) -> bytes:
    """A frame: in half of the cases with plausible fields alone; else one field, the length of the array or a
    few bytes are wrong."""
    array = [kind.__struct_config__.tag, *(_plausible(dice, name) for name in kind.__struct_fields__)]
    how = dice.randrange(8)
    if how == 0:
        array[dice.randrange(len(array))] = _anything(dice)
    elif how == 1:
        del array[dice.randrange(len(array)) :]
    elif how == 2:
        array += [_anything(dice)] * dice.randrange(1, 4)
    data = msgspec.msgpack.encode(array)
    place = dice.randrange(len(data) + 1)
    if how == 3:
        data = data[:place] + dice.randbytes(dice.randrange(1, 9)) + data[place + 1 :]
    elif how == 4:
        data = data[:place]
    elif how == 5 and dice.randrange(8) == 0:
        data = dice.randbytes(dice.randrange(64))
    return data


def _plausible(dice: random.Random, name: str) -> object:
    if name == "session":
        return dice.choice(_SESSIONS)
    if name in ("tokens", "stop", "stop_tokens"):
        return [dice.choice(_TOKENS) for _ in range(dice.randrange(12))]
    if name in _FLOATS:
        return dice.choice(_REALS)
    if name == "protocol":
        return dice.choice([protocol.PROTOCOL_VERSION] * 7 + [0])
    if name == "parents":  # often of a tree, though rarely of as many nodes as there are tokens
        return bytes(dice.randrange(node + 1) for node in range(dice.choice((0, 0, 1, 2, 3, 4, 8))))
    if name in ("stream", "undrafted", "trees"):
        return dice.random() < 0.5
    if name in ("acceptance_prob", "payload"):
        return dice.randbytes(dice.randrange(12))
    if name in ("ttft_ms", "logprobs"):
        return dice.choice((None, None, 1, 1000, -1))
    if name in (
        "finished",
        "code",
        "message",
        "target",
        "tokenizer",
        "identity",
        "plan",
        "chat_template",
        "key",
        "edge",
    ):
        return dice.choice(_TEXTS)
    return dice.choice(_INTS) if dice.randrange(3) == 0 else dice.randrange(12)


def _anything(dice: random.Random) -> object:
    return dice.choice(
        (
            dice.choice(_INTS),
            dice.choice(_REALS),
            [dice.choice(_TOKENS) for _ in range(dice.randrange(90))],
            dice.randbytes(dice.randrange(300)),
            dice.choice(_TEXTS),
            None,
            True,
            {},
            [[[]]],
            {"a": [1]},
        )
    )
