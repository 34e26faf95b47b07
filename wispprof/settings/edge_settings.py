"""Frozen settings of an edge: how it connects, and how far it drafts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wispprof.errors import WispprofError
from wispprof.sessions.draft_scheduler import DraftingSettings
from wispprof.types import Slo

__all__ = ["ClientSettings", "DraftingSettings", "EdgeSettings"]


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """How an edge connects.

    ``tokenizer`` and ``target`` are checked by the server at hello (empty accepts what it has).
    Reconnecting waits ``backoff_ms``, doubled up to ``backoff_max_ms``, each time multiplied by a random
    factor in ``1 ± backoff_jitter``; a connection that stays away for ``give_up_ms`` is an error.
    ``ping_ms``: interval of link measurements; a link that delivered nothing for ``dead_ms`` although
    something was asked counts as lost. ``offline_ok``: entering without a server is no error yet.
    ``rtt_guess_ms`` stands in until the first measurement.
    """

    tokenizer: str = ""
    target: str = ""
    key: str = ""
    name: str = ""
    hello_ms: float = 5000.0
    backoff_ms: float = 100.0
    backoff_max_ms: float = 2000.0
    backoff_jitter: float = 0.5
    give_up_ms: float = 30_000.0
    ping_ms: float = 2000.0
    dead_ms: float = 10_000.0
    rtt_guess_ms: float = 30.0
    offline_ok: bool = False


@dataclass(frozen=True, slots=True)
class EdgeSettings:
    """Everything an edge command can be told.

    ``server``: where to connect; empty starts one in this process on the bundled target. ``draft``:
    folder or hub id of the draft model, or a ``.gguf`` file; empty for the bundled one. ``tokenizer``: folder
    or hub id of the target's tokenizer, empty where the draft model's folder has it. ``drafter``: see
    :data:`~wispprof.edge.draft_device.DRAFTERS`. ``mode``: ``round``, ``stream``, or empty for what
    the server runs. ``plan``: file whose rows the ``wispprof`` controller obeys, as ``plan_device``.
    ``fallback``: ``none``, or ``draft`` to go on with the draft alone where no server can be reached.
    """

    server: str = ""
    key: str = ""
    ca_file: Path | None = None
    draft: str = ""
    tokenizer: str = ""
    drafter: str = "model"
    dtype: str = "float32"
    device: str = "auto"
    controller: str = "wispprof"
    options: dict[str, Any] = field(default_factory=dict)
    predictor: Path | None = None
    plan: Path | None = None
    plan_device: str = ""
    mode: str = ""
    draft_ahead: int = 24
    proactive: int = 8
    tokens_per_s: float = 2.0
    ttft_ms: float | None = None
    fallback: str = "none"
    give_up_ms: float = 30_000.0
    max_tokens: int = 256

    def __post_init__(self) -> None:
        if self.mode not in ("", "round", "stream"):
            raise WispprofError(f"There is no mode {self.mode!r}.", "Choose round or stream.")
        if self.fallback not in ("none", "draft"):
            raise WispprofError(f"There is no fallback {self.fallback!r}.", "Choose none or draft.")

    @property
    def slo(self) -> Slo:
        return Slo(self.tokens_per_s, self.ttft_ms)
