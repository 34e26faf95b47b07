"""Settings of an edge: what drafts, how far it drafts, and how it connects."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wispprof.errors import SettingsError
from wispprof.settings.draft_settings import LlamaSettings
from wispprof.settings.fields import Settings, setting
from wispprof.settings.shared_settings import (
    ServerAccess,
    device_setting,
    dtype_setting,
    engine_setting,
    vllm_args_setting,
    vllm_untested_setting,
)
from wispprof.settings.sources import named_value
from wispprof.types import Slo


@dataclass(frozen=True, slots=True)
class ClientSettings(Settings):
    """How an edge connects and reconnects.

    The server checks ``tokenizer`` (a hash) and ``target`` at hello; empty accepts what it has.
    ``offline_ok``: an unreachable server is an error at the first request, not at the start.
    """

    access: ServerAccess = field(default_factory=ServerAccess)
    tokenizer: str = ""
    offline_ok: bool = False
    target: str = setting(
        "", "Name of the target that the server must serve; empty accepts any.", option="target-id"
    )
    name: str = setting("", "Name of this device in the server's logs.")
    hello_ms: float = setting(5000.0, "Time to wait for the answer to hello.", unit="ms", minimum=1)
    backoff_ms: float = setting(
        100.0, "First pause between attempts to reconnect; it doubles.", unit="ms", minimum=1
    )
    backoff_max_ms: float = setting(
        1000.0, "Longest pause between attempts to reconnect.", unit="ms", minimum=1
    )
    backoff_jitter: float = setting(
        0.5, "Random share by which a pause is longer or shorter.", minimum=0, maximum=1
    )
    give_up_ms: float = setting(
        30_000.0,
        "Time without a server after which requests fail. The edge keeps trying, and serves again when the "
        "server is back.",
        unit="ms",
        minimum=0,
    )
    ping_ms: float = setting(2000.0, "Interval of round-trip measurements.", unit="ms", minimum=1)
    dead_ms: float = setting(
        10_000.0,
        "Time without data, although an answer is due, after which the connection counts as lost.",
        unit="ms",
        minimum=1,
    )
    rtt_guess_ms: float = setting(
        30.0, "Round trip assumed until the first measurement.", unit="ms", minimum=0
    )


@dataclass(frozen=True, slots=True)
class OutcomeDrafting:
    """What a device prepares of a draft tree while a round is out: at most ``outcomes`` outcomes (0: it
    waits), trees of at most ``width`` children a node after each, expanded to ``depth`` tokens from the
    outcome's on."""

    outcomes: int = 1 << 20
    width: int = 16
    depth: int = 16


WAIT = OutcomeDrafting(0)
BEST_GUESS = OutcomeDrafting(1)
ENUMERATION = OutcomeDrafting(8, 1)
LIKELIEST = OutcomeDrafting()


@dataclass(frozen=True, slots=True)
class DraftingSettings(Settings):
    """How far an edge drafts. ``stream`` overrides the server's mode; ``None`` follows it. ``ahead``: what it
    prepares of draft trees; ``None``: nothing without ``proactive`` drafts, else the likeliest outcomes."""

    stream: bool | None = None
    ahead: OutcomeDrafting | None = None
    draft_ahead: int = setting(
        24, "Maximum draft tokens an edge may keep ahead of the committed text.", minimum=0
    )
    proactive: int = setting(
        8,
        "Draft tokens beyond a round that is being verified (synchronous drafting); 0 waits.",
        minimum=0,
    )
    tree_nodes: int | None = setting(
        None,
        "Maximum nodes of a draft tree, if the server and the draft model support trees; 0 drafts chains. "
        "Default: what the plan or the controller chooses.",
        minimum=0,
        maximum=64,
    )
    tree_depth: int | None = setting(
        None, "Maximum depth of a draft tree; default: what the controller chooses.", minimum=1
    )
    tree_width: int | None = setting(
        None,
        "Maximum children of a node of a draft tree; 1 is a chain. Default: what the controller chooses, "
        "else 4.",
        minimum=1,
    )
    tree_beams: int | None = setting(
        None,
        "Maximum nodes of a draft tree that one forward of the draft model continues; default: what the "
        "controller chooses, else 4.",
        minimum=1,
    )
    frame_share: float = setting(
        0.25,
        "Largest share of the round trip that drafting one frame may take (asynchronous drafting).",
        minimum=0,
    )
    frame_max: int = setting(8, "Maximum draft tokens in a frame (asynchronous drafting).", minimum=1)
    draft_timeout_ms: float = setting(
        30_000.0,
        "Longest wait for a draft step; after it the request continues without drafts.",
        unit="ms",
        minimum=1,
    )
    carry: bool = setting(
        False, "Count a round's time budget from when its predecessor was due, not from its commit."
    )


@dataclass(frozen=True, slots=True)
class EdgeSettings(Settings):
    """Everything an edge command can be told.

    An empty ``server`` starts one in this process on the bundled target. ``plan_device`` names the rows of
    ``plan`` that the ``wispprof`` controller obeys; ``profile`` lets it choose draft trees without one.
    ``fallback="draft"`` goes on with the draft model alone
    if no server can be reached.
    """

    client: ClientSettings = field(default_factory=ClientSettings)
    drafting: DraftingSettings = field(default_factory=DraftingSettings)
    llama: LlamaSettings = field(default_factory=LlamaSettings)
    server: str = setting("", "Address of the server; default: start one here on the bundled pair.")
    draft: str = setting(
        "",
        "Draft model: folder, hub id, FILE.gguf, xllamacpp:FILE.gguf or llama-server:URL; default: the "
        "bundled one.",
    )
    tokenizer: str = setting("", "The target's tokenizer: folder or hub id; default: beside the draft model.")
    drafter: str = setting(
        "model", "What drafts: model, lookup, both (lookup first), none or one of your own."
    )
    lookup_memory: int = setting(
        1 << 16,
        "Earlier prompts and answers that n-gram lookup searches, kept in memory only; 0 keeps none.",
        unit="tokens",
        minimum=0,
    )
    dtype: str = dtype_setting()
    device: str = device_setting()
    engine: str = engine_setting()
    vllm_args: dict[str, Any] = vllm_args_setting()
    vllm_untested: bool = vllm_untested_setting()
    controller: str = setting(
        "wispprof", "Speculation controller: fixed, sled, specedge, wisp, wispprof or one of your own."
    )
    k: int | None = setting(
        None, "Draft length of the fixed controller, maximum draft length of others.", minimum=0
    )
    threshold: float | None = setting(None, "Threshold of the controllers sled and wisp.")
    options: dict[str, Any] = setting(
        {},
        "Other option of the controller, as NAME=VALUE; repeatable.",
        option="controller-option",
        parse=named_value,
    )
    predictor: Path | None = setting(None, "Rejection predictor made by `wispprof fit`.")
    plan: Path | None = setting(None, "Plan that the controller wispprof obeys.")
    plan_device: str = setting("", "Name of this device in the plan.")
    profile: Path | None = setting(
        None, "Profile of this device, made by `wispprof profile-edge`: says what a draft tree's nodes cost."
    )
    mode: str = setting(
        "",
        "round (synchronous drafting) or stream (asynchronous); default: what the server runs.",
        choices=("", "round", "stream"),
    )
    tokens_per_s: float | None = setting(
        None,
        "SLO: token speed that the server must guarantee; default: no guarantee, and no refusal.",
        unit="tokens/s",
        minimum=0.01,
        option="slo",
    )
    ttft_ms: float | None = setting(
        None, "SLO: time to the first token.", unit="ms", minimum=0.01, option="ttft"
    )
    fallback: str = setting(
        "none",
        "Without a server: none fails, draft goes on with the draft model alone (marked unverified).",
        choices=("none", "draft"),
    )
    max_tokens: int = setting(
        256, "Maximum tokens to generate if a request names no number.", unit="tokens", minimum=1
    )

    def check_together(self) -> None:
        if self.server and self.engine != "torch":
            raise SettingsError(
                "--engine is of the server that is started here; --server names a running one.",
                "Omit one of them.",
            )

    @property
    def slo(self) -> Slo:
        return Slo.of(self.tokens_per_s, self.ttft_ms)

    @property
    def controller_options(self) -> dict[str, Any]:
        """``options`` with ``k`` and ``threshold`` under the controller's own names."""
        found = dict(self.options)
        if self.k is not None:
            found["k" if self.controller == "fixed" else "k_max"] = self.k
        if self.threshold is not None:
            found["threshold"] = self.threshold
        return found


@dataclass(frozen=True, slots=True)
class LocalApiSettings(Settings):
    """Where an edge serves its OpenAI-compatible API."""

    host: str = setting("127.0.0.1", "Loopback address to listen on.")
    port: int = setting(8300, "Port to listen on; 0 takes a free one.", minimum=0, maximum=65535)
    allowed_hosts: tuple[str, ...] = setting(
        (),
        "Host name that clients may use for this API beside the loopback names; repeatable.",
        option="allowed-host",
    )
