"""Edge devices (time and power of a draft step) and their links (delay, jitter, bandwidth, loss).

A link is one ordered byte stream each way, as a WebSocket over TCP. A lost packet delays its frame and
all frames behind it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any

from wispprof.artifacts import bundled_path
from wispprof.artifacts.profile import rested_share, resume_ms
from wispprof.artifacts.rows import EdgeRow
from wispprof.errors import ArtifactMissing, ProfileError, WispprofError, suggestion
from wispprof.settings.shared_settings import LinkModel


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """Speed and power of one kind of device with one draft model.

    ``draft_ms``: one draft step over an empty context; ``draft_ms_per_ktoken``: added per 1,000 cached
    tokens.
    ``controller_ms``: the decision after each token. ``prefill_ms_per_token``: prefill of the draft model.
    ``draft_w`` and ``idle_w``: power while drafting and while waiting. ``resume_ms``: what an idle time
    adds to the next draft step. ``steps_ms``: draft steps as they followed each other, instead of
    ``draft_ms``, because a drafter that goes by way of the text does the work of several steps in one.
    ``server_slowdown``: factor on draft steps while the server computes, of a device on its machine.
    ``node_ms``: each further node of a draft tree in one forward; ``None``: it drafts chains only.
    """

    name: str = "device"
    draft_ms: float = 16.0
    draft_ms_per_ktoken: float = 0.0
    controller_ms: float = 0.0
    prefill_ms_per_token: float = 0.0
    draft_w: float = 0.0
    idle_w: float = 0.0
    resume_ms: float = 0.0
    steps_ms: tuple[float, ...] = ()
    server_slowdown: float = 1.0
    node_ms: float | None = None

    def step_ms(self, context: int) -> float:
        """One draft token over ``context`` tokens, the controller's decision included."""
        steps = self.steps_ms
        draft_ms = steps[context % len(steps)] if steps else self.draft_ms
        return draft_ms + self.draft_ms_per_ktoken * context / 1000.0 + self.controller_ms

    def forward_ms(self, context: int, nodes: int) -> float:
        """One forward over ``nodes`` nodes of a draft tree, the controller's decision included."""
        return self.step_ms(context) + (self.node_ms or 0.0) * (nodes - 1)

    def resuming_ms(self, rested_ms: float) -> float:
        """What a draft step takes longer if the device was idle for ``rested_ms`` before it."""
        return self.resume_ms * rested_share(rested_ms)

    @classmethod
    def from_speed(cls, name: str, tokens_per_s: float, **more: Any) -> DeviceProfile:
        """From a drafting speed alone."""
        return cls(name, draft_ms=1000.0 / tokens_per_s, **more)

    @classmethod
    def from_rows(cls, name: str, rows: Iterable[EdgeRow]) -> DeviceProfile:
        """From the rows of an edge profile: a least-squares line of draft steps over context, else medians.

        Raises :class:`ProfileError` without draft steps.
        """
        kinds: dict[str, list[EdgeRow]] = {}
        rows = list(rows)
        for row in rows:
            kinds.setdefault(row.kind, []).append(row)
        steps = kinds.get("draft_step") or kinds.get("sustained") or kinds.get("burst")
        if not steps:
            raise ProfileError(
                f"Edge profile {name} holds no draft steps.", "Run `wispprof profile-edge` again."
            )
        base, slope = _line([(r.context, r.median_ms / max(1, r.tokens)) for r in steps])
        control = kinds.get("controller", [])
        added = [resume_ms(rows, r.context) for r in kinds.get("round", [])]
        prefill = [r.median_ms / r.tokens for r in kinds.get("prefill", []) if r.tokens > 0]
        energies = [
            r.energy_j / (r.median_ms / 1000.0)
            for r in [*kinds.get("energy", []), *steps]
            if r.energy_j is not None and r.median_ms > 0
        ]
        return cls(
            name,
            draft_ms=base,
            draft_ms_per_ktoken=slope * 1000.0,
            controller_ms=statistics.median(r.median_ms for r in control) if control else 0.0,
            prefill_ms_per_token=statistics.median(prefill) if prefill else 0.0,
            draft_w=statistics.median(energies) if energies else 0.0,
            resume_ms=statistics.median(added) if added else 0.0,
            node_ms=_node_ms(kinds.get("nodes", [])),
        )


def _node_ms(rows: list[EdgeRow]) -> float | None:
    """Time of one more node in a forward: the dearest that was measured, so that no choice counts on less."""
    points = sorted((row.tokens, row.median_ms) for row in rows)
    if len(points) < 2:
        return None
    first, first_ms = points[0]
    return max(0.0, max((ms - first_ms) / (nodes - first) for nodes, ms in points[1:]))


def _line(points: list[tuple[int, float]]) -> tuple[float, float]:
    """Intercept and slope, neither below zero."""
    mean_x = statistics.fmean(x for x, _ in points)
    mean_y = statistics.fmean(y for _, y in points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = max(0.0, sum((x - mean_x) * (y - mean_y) for x, y in points) / spread) if spread else 0.0
    base = mean_y - slope * mean_x
    return (base, slope) if base > 0 else (mean_y, 0.0)


DRAFT_BYTES = 78
"""A draft frame without its tokens: msgpack fields, WebSocket, TCP and IP headers."""
COMMIT_BYTES = 92
"""A commit frame without its tokens, likewise."""
OPEN_BYTES = 110
"""An opening frame without its prompt, likewise."""
TOKEN_BYTES = 4
"""A token id in msgpack (3 bytes up to 65,535, 5 beyond). A draft has an acceptance byte more."""


DEVICES: Mapping[str, DeviceProfile] = MappingProxyType(
    {
        device.name: device
        for device in (
            DeviceProfile("fast", draft_ms=4.0, prefill_ms_per_token=0.05),
            DeviceProfile("medium", draft_ms=16.0, prefill_ms_per_token=0.2),
            DeviceProfile("slow", draft_ms=60.0, prefill_ms_per_token=1.0),
        )
    }
)
"""Presets for use without a profile: drafting at 250, 62 and 17 tokens/s."""


def device_of(text: str) -> DeviceProfile:
    """A device by name: a preset of :data:`DEVICES`, the ms of a draft step (``16``), or an edge profile
    (a file, or a shipped one such as ``rpi-5``).

    Raises :class:`WispprofError` for anything else, and what reading a profile raises.
    """
    if text in DEVICES:
        return DEVICES[text]
    try:
        draft_ms = float(text)
    except ValueError:
        pass
    else:
        if not draft_ms > 0:
            raise WispprofError(f"A draft step must take more than 0 ms, got {text}.", "Give its time in ms.")
        return DeviceProfile(f"{draft_ms:g}ms", draft_ms=draft_ms)
    path = Path(text)
    if not path.exists():
        try:
            path = bundled_path(f"profiles/{text}.jsonl")
        except (ArtifactMissing, ValueError) as err:
            raise WispprofError(
                f"There is no device {text!r}.",
                suggestion(
                    text,
                    DEVICES,
                    ", a number of ms, or an edge profile: its file, or a shipped one such as rpi-5",
                ),
            ) from err
    from wispprof.artifacts import load_profile

    rows = [row for row in load_profile(path).rows if isinstance(row, EdgeRow)]
    return DeviceProfile.from_rows(path.stem, rows)


class Link:
    """One device's link. ``up(now_ms, size)``: when a frame of ``size`` bytes that the edge sends now arrives
    at the server; ``down(now_ms, size)``: the other way."""

    __slots__ = ("down", "profile", "up")

    def __init__(self, profile: LinkModel, rng: Random) -> None:
        self.profile = profile
        self.up = _Direction(profile, profile.up_mbps, rng).arrival
        self.down = _Direction(profile, profile.down_mbps, rng).arrival


class _Direction:
    """One way of a link: frames arrive in the order in which they were sent."""

    __slots__ = ("_delay_ms", "_last_ms", "_mbps", "_profile", "_rng", "_steady")

    def __init__(self, profile: LinkModel, mbps: float, rng: Random) -> None:
        self._profile = profile
        self._mbps = mbps
        self._rng = rng
        self._delay_ms = profile.rtt_ms / 2.0
        self._steady = not (profile.jitter_ms > 0 or profile.loss > 0)
        self._last_ms = 0.0

    def arrival(self, now_ms: float, size: int) -> float:
        time_ms = now_ms + self._delay_ms
        if self._mbps > 0:
            time_ms += size * 8.0 / (self._mbps * 1000.0)
        if not self._steady:
            profile, rng = self._profile, self._rng
            if profile.jitter_ms > 0:
                time_ms += rng.expovariate(1.0 / profile.jitter_ms)
            if profile.loss > 0:
                while rng.random() < profile.loss:
                    time_ms += profile.retransmission_ms
        if time_ms < self._last_ms:
            return self._last_ms
        self._last_ms = time_ms
        return time_ms
