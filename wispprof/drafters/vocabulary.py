"""Compare a draft's vocabulary with the target's tokenizer, token by token text.

Token ids mean something only within one vocabulary. A draft whose ids mean other texts is never used as
if they were the same: its tokens are hidden one by one where few differ, and it drafts text
(:mod:`~wispprof.drafters.text_bridge`) where most do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_SAME_SHARE = 0.98


@dataclass(frozen=True)
class VocabularyMatch:
    """``hidden``: bool (V,) of the draft's ids that mean another text, ``None`` if all agree.

    ``same``: whether the ids can be used as they are, apart from the hidden ones. ``summary``: one line
    for the user.
    """

    same: bool
    hidden: np.ndarray | None
    summary: str


def match_vocabulary(draft_texts: Sequence[str], tokenizer: Any) -> VocabularyMatch:
    """Compare the texts of a draft's ids with those of the target's ``tokenizer`` (Hugging Face)."""
    target = {int(number): str(text) for text, number in tokenizer.get_vocab().items()}
    draft, size = len(draft_texts), max(target, default=-1) + 1
    hidden = np.zeros(draft, dtype=bool)
    differing = []
    for number, text in enumerate(draft_texts):
        wanted = target.get(number)
        if wanted is None:
            hidden[number] = True
        elif wanted != text and not _same_bytes(text, number, tokenizer):
            hidden[number] = True
            differing.append(number)
    common = min(draft, size)
    same = common > 0 and len(differing) <= (1.0 - _SAME_SHARE) * common
    if not same:
        example = ""
        if differing:
            number = differing[len(differing) // 2]
            example = f", such as {number}: {draft_texts[number]!r}, not {target[number]!r}"
        summary = f"{len(differing):,} of {common:,} token ids mean another text{example}"
        return VocabularyMatch(False, hidden, summary)
    parts = [f"{common - len(differing):,} of {common:,} token ids agree"]
    if draft > size:
        parts.append(f"{draft - size:,} ids beyond the target's are not used")
    if draft < size:
        parts.append(f"the draft lacks the target's last {size - draft:,}")
    return VocabularyMatch(True, hidden if hidden.any() else None, "; ".join(parts))


def _same_bytes(text: str, number: int, tokenizer: Any) -> bool:
    """Converters write some special tokens as plain text, so the decoded text decides."""
    return bool(text) and text == tokenizer.decode([number], skip_special_tokens=False)
