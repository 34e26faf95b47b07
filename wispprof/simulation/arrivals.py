"""Arrival processes and request lengths: closed fleets, Poisson, bursts, replayed requests.

All draws come from the caller's generator: one seed gives one load under every policy (common random
numbers).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import NamedTuple, Protocol

from wispprof.settings.fleet_settings import LoadSettings


class Request(NamedTuple):
    """One generation: arrival time, prompt tokens, and tokens to generate.

    ``client``: index into the scenario's clients, -1 to deal device, link and SLO from its mixes. ``reused``:
    leading prompt tokens whose KV the server still holds. ``blocks``: ids of the prompt's blocks of
    :data:`BLOCK_TOKENS` tokens; equal ids, equal text.
    """

    time_ms: float
    prompt_tokens: int
    output_tokens: int
    client: int = -1
    reused: int = 0
    blocks: tuple[int, ...] = ()


BLOCK_TOKENS = 512
"""Prompt tokens of a block in Mooncake's traces, whose ``hash_ids`` are :attr:`Request.blocks`."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Prompt and output lengths: log-normal about a median, ``*_sigma`` in log units (0: constant).

    Draws are clipped to ``max_tokens`` each, at least 1 prompt token and 2 output tokens (a token speed
    needs two). ``reused``: share of each prompt whose KV the server still holds, such as earlier turns.
    """

    prompt: int = LoadSettings.prompt
    output: int = LoadSettings.output
    prompt_sigma: float = 0.0
    output_sigma: float = 0.0
    max_tokens: int = 32768
    reused: float = 0.0

    def request(self, rng: Random, time_ms: float, client: int = -1) -> Request:
        """A request of drawn lengths."""
        prompt, output = self.draw(rng)
        return Request(time_ms, prompt, output, client, int(self.reused * prompt))

    def draw(self, rng: Random) -> tuple[int, int]:
        # Always two draws: a change of one sigma must not shift the other's numbers.
        zp, zo = rng.gauss(0.0, 1.0), rng.gauss(0.0, 1.0)
        prompt = round(self.prompt * math.exp(self.prompt_sigma * zp))
        output = round(self.output * math.exp(self.output_sigma * zo))
        return max(1, min(self.max_tokens, prompt)), max(2, min(self.max_tokens, output))


@dataclass(frozen=True, slots=True)
class ClosedFleet:
    """``devices`` devices with one session each at a time; after its end the device thinks, then asks again.

    ``think_ms`` is the mean of an exponential pause (0: none). First requests are spread evenly at random
    over ``ramp_ms``, so that a fleet does not start in step.
    """

    devices: int
    lengths: Lengths = Lengths()
    think_ms: float = 0.0
    ramp_ms: float = 10_000.0

    def __post_init__(self) -> None:
        if self.devices < 0:
            raise ValueError(f"devices must not be negative, got {self.devices}.")


class OpenLoad(Protocol):
    """An open-loop load: arrivals do not depend on service; each request is a device of its own."""

    def requests(self, rng: Random, horizon_ms: float) -> Iterator[Request]:
        """Requests before ``horizon_ms``, in order of time."""


def _poisson_times(rng: Random, per_s: float, horizon_ms: float) -> Iterator[float]:
    time_ms = 0.0
    while per_s > 0 and (time_ms := time_ms + rng.expovariate(per_s) * 1000.0) < horizon_ms:
        yield time_ms


@dataclass(frozen=True, slots=True)
class Poisson:
    """Independent arrivals at ``per_s`` requests a second."""

    per_s: float
    lengths: Lengths = Lengths()

    def requests(self, rng: Random, horizon_ms: float) -> Iterator[Request]:
        for time_ms in _poisson_times(rng, self.per_s, horizon_ms):
            yield self.lengths.request(rng, time_ms)


@dataclass(frozen=True, slots=True)
class Bursts:
    """Poisson arrivals whose rate alternates: ``base_per_s``, and ``burst_per_s`` during bursts.

    A burst of ``burst_s`` seconds begins every ``every_s`` seconds, the first after ``every_s - burst_s``.
    Drawn by thinning, so the base arrivals are the same whatever the burst rate.
    """

    base_per_s: float
    burst_per_s: float
    every_s: float = 60.0
    burst_s: float = 10.0
    lengths: Lengths = Lengths()

    def __post_init__(self) -> None:
        if not 0 < self.burst_s <= self.every_s:
            raise ValueError("Bursts need 0 < burst_s <= every_s.")

    def rate(self, time_ms: float) -> float:
        """Requests a second at a time."""
        phase = (time_ms / 1000.0) % self.every_s
        return self.burst_per_s if phase >= self.every_s - self.burst_s else self.base_per_s

    def requests(self, rng: Random, horizon_ms: float) -> Iterator[Request]:
        top = max(self.base_per_s, self.burst_per_s)
        for time_ms in _poisson_times(rng, top, horizon_ms):
            keep, request = rng.random(), self.lengths.request(rng, time_ms)
            if keep * top < self.rate(time_ms):
                yield request


@dataclass(frozen=True, slots=True)
class Replay:
    """A recorded list of requests, its time axis divided by ``speed`` (2: twice the load).

    ``max_prompt`` and ``max_output`` clip lengths to what the served model can hold.
    """

    recorded: tuple[Request, ...]
    speed: float = 1.0
    max_prompt: int = 32768
    max_output: int = 4096

    def requests(self, rng: Random, horizon_ms: float) -> Iterator[Request]:
        for request in self.recorded:
            time_ms = request.time_ms / self.speed
            if time_ms >= horizon_ms:
                return
            yield request._replace(
                time_ms=time_ms,
                prompt_tokens=max(1, min(self.max_prompt, request.prompt_tokens)),
                output_tokens=max(2, min(self.max_output, request.output_tokens)),
            )
