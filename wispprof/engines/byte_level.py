"""The characters in which byte-level tokenizers write bytes."""

from __future__ import annotations


def _byte_of_char() -> dict[str, int]:
    """GPT-2's ``bytes_to_unicode``, inverted: printable bytes stand for themselves, the others for characters
    from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + place): byte for place, byte in enumerate(others)
    }


BYTE_OF_CHAR = _byte_of_char()
