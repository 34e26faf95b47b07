"""A target that answers with a given text, so that a page can be shown what no model writes.

Tokens are bytes; of one text, words.
"""

from __future__ import annotations

import re
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
EXPLANATION = """\
A small model on your device proposes the next few words, and the large model on the server reads them \
all at once. It keeps the longest prefix that it would have written itself, and adds one word of its own. \
So the text is exactly the large model’s, but it arrives several words at a time.

In Python, one round is short:

```python
drafts = draft_model.propose(text, k=4)
accepted, own = target.verify(text, drafts)
text += drafts[:accepted] + [own]
```

Where the small model is often right, most words come from your device."""
SCRIPTS = {
    "explain": EXPLANATION,
    "hostile": HOSTILE,
    "short": "The quick brown fox jumps over the lazy dog.",
    "long": "".join(f"{n} bottles of beer on the wall. " for n in range(100))[:2000],
}


WORDS = sorted({word.encode() for word in re.findall(r"\s*\w+|\s*\W", EXPLANATION)})
TOKENS = {
    name: [256 + WORDS.index(word.encode()) for word in re.findall(r"\s*\w+|\s*\W", script)]
    if name == "explain"
    else list(script.encode())
    for name, script in SCRIPTS.items()
}
VOCAB = 256 + len(WORDS)
_NAMES = list(SCRIPTS)
_LONGEST = 1 << 20


class ScriptedTarget(FakeTarget):
    """After ``NAME»`` it writes :data:`SCRIPTS` ``[NAME]``, then the end.

    Its state while it writes is a number below 0: of the script and of the tokens written. Before that it is
    the line so far, a token in each 16 bits.
    """

    def __init__(self) -> None:
        super().__init__(VOCAB)

    def start(self, sampling: Sampling) -> int:
        return 1

    def feed(self, state: int, token: int) -> int:
        if state < 0:
            if token == self.next(state):
                return state - 1
            state = 1
        if token == ord("\n"):
            return 1
        line = state << 16 | token
        cue = CUE.encode()
        if line & 0xFFFFFFFF == cue[0] << 16 | cue[1]:
            digits = state.to_bytes(state.bit_length() // 8 + 1, "big")[2:-2:2]
            name = digits.decode("utf-8", "replace")
            if name in _NAMES:
                return -_LONGEST * _NAMES.index(name) - 1
        return line

    def next(self, state: int) -> int:
        if state > 0:
            return END
        script, written = divmod(-state - 1, _LONGEST)
        tokens = TOKENS[_NAMES[script]]
        return tokens[written] if written < len(tokens) else END


class ScriptedEngine(FakeEngine):
    """An engine of it whose steps take ``step_ms``."""

    def __init__(self, step_ms: float) -> None:
        super().__init__(VOCAB, step_ms=lambda shape: step_ms)
        self.target = ScriptedTarget()


class ScriptedDevice(DraftDevice):
    """A device whose draft model is right four times in five."""

    def _make(self) -> Drafter:
        return FakeDrafter(ScriptedTarget(), 0.8)


class ScriptedTokenizer(ByteTokenizer):
    """Bytes, of which one ends an answer, and the words of one text."""

    eos_token_id = END

    def get_vocab(self) -> dict[str, int]:
        return super().get_vocab() | {word.decode(): 256 + at for at, word in enumerate(WORDS)}

    def decode(self, tokens: Sequence[int], **options: Any) -> str:
        data = b"".join(
            WORDS[token - 256] if token > 255 else bytes([token]) for token in tokens if token != END
        )
        return data.decode("utf-8", "replace")
