"""A target that answers with a given text, byte by byte, so that a page can be shown what no model writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from wispprof.backends import Drafter
from wispprof.edge.draft_device import DraftDevice
from wispprof.openai_api.tokenizer import ByteTokenizer
from wispprof.testing.fake_engine import FakeDrafter, FakeEngine, FakeTarget
from wispprof.types import Sampling

CUE = "»"
END = 0
"""Byte that ends an answer."""

HOSTILE = (
    "<script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">\n"
    "مرحبا بالعالم — שלום עולם — mixed (123) back\n"
    "👩‍👩‍👧‍👦 🏳️‍🌈 é ﷽ 日本語 \u202eevil\u202c\n"
    "```python\ndef f(x):\n\treturn '</pre><b>' + x  # ```\n```\nand `code` & entities &lt;b&gt;\n"
)
SCRIPTS = {
    "hostile": HOSTILE,
    "short": "The quick brown fox jumps over the lazy dog.",
    "long": "".join(f"{n} bottles of beer on the wall. " for n in range(100))[:2000],
}


class ScriptedTarget(FakeTarget):
    """After ``NAME»`` it writes :data:`SCRIPTS` ``[NAME]``, then the end. Its state is the text so far, the
    digits of a number."""

    def start(self, sampling: Sampling) -> int:
        return 1

    def feed(self, state: int, token: int) -> int:
        return state << 8 | token

    def next(self, state: int) -> int:
        text = state.to_bytes(state.bit_length() // 8 + 1, "big")[1:]
        before, _, written = text.rpartition(CUE.encode())
        script = SCRIPTS.get(before.rpartition(b"\n")[2].decode("utf-8", "replace"), "").encode()
        return script[len(written)] if len(written) < len(script) else END


class ScriptedEngine(FakeEngine):
    """An engine of it whose steps take ``step_ms``."""

    def __init__(self, step_ms: float) -> None:
        super().__init__(step_ms=lambda shape: step_ms)
        self.target = ScriptedTarget()


class ScriptedDevice(DraftDevice):
    """A device whose draft model is right four times in five."""

    def _make(self) -> Drafter:
        return FakeDrafter(ScriptedTarget(), 0.8)


class BytesWithEnd(ByteTokenizer):
    """Bytes, of which one ends an answer."""

    eos_token_id = END

    def decode(self, tokens: Sequence[int], **options: Any) -> str:
        return super().decode([token for token in tokens if token != END])
