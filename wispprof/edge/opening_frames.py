"""The opening of a session as frames."""

from __future__ import annotations

import msgspec

from wispprof import protocol
from wispprof.errors import SettingsError

PART_TOKENS = 1 << 16
"""Most tokens in one frame of an opening: 5 bytes each at most, so less than a third of a frame."""


def opening_frames(number: int, opening: protocol.Open) -> list[bytes]:
    """The frames that open session ``number``, several for a long one. Raises :class:`SettingsError` if a
    value does not fit into a frame."""
    tokens = opening.tokens
    cut = (len(tokens) - 1) // PART_TOKENS * PART_TOKENS
    starts = range(0, cut, PART_TOKENS)
    parts = [protocol.OpenPart(number, tokens[start : start + PART_TOKENS]) for start in starts]
    try:
        last = msgspec.structs.replace(opening, session=number, tokens=tokens[cut:])
        return [*map(protocol.encode, parts), protocol.encode(last)]
    except (OverflowError, TypeError, ValueError) as err:
        raise SettingsError(f"The request does not fit into a frame: {err}.", "Correct its numbers.") from err
