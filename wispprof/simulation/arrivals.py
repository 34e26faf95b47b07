"""Arrival processes and request lengths: closed fleets, Poisson, bursts, replayed request traces.

All draws come from the caller's generator: one seed gives one load under every policy (common random
numbers).
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from random import Random
from typing import NamedTuple, Protocol

from wispprof.errors import ArtifactDamaged, ArtifactMissing
from wispprof.settings.fleet_settings import LoadSettings


class Request(NamedTuple):
    """One generation: arrival time, prompt tokens, and tokens to generate."""

    time_ms: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Lengths:
    """Prompt and output lengths: log-normal about a median, ``*_sigma`` in log units (0: constant).

    Draws are clipped to ``max_tokens`` each, at least 1 prompt token and 2 output tokens (a token speed
    needs two).
    """

    prompt: int = LoadSettings.prompt
    output: int = LoadSettings.output
    prompt_sigma: float = 0.0
    output_sigma: float = 0.0
    max_tokens: int = 32768

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


@dataclass(frozen=True, slots=True)
class Poisson:
    """Independent arrivals at ``per_s`` requests a second."""

    per_s: float
    lengths: Lengths = Lengths()

    def requests(self, rng: Random, horizon_ms: float) -> Iterator[Request]:
        time_ms = 0.0
        while self.per_s > 0:
            time_ms += rng.expovariate(self.per_s) * 1000.0
            if time_ms >= horizon_ms:
                return
            yield Request(time_ms, *self.lengths.draw(rng))


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
        time_ms = 0.0
        while top > 0:
            time_ms += rng.expovariate(top) * 1000.0
            if time_ms >= horizon_ms:
                return
            keep, lengths = rng.random(), self.lengths.draw(rng)
            if keep * top < self.rate(time_ms):
                yield Request(time_ms, *lengths)


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
            yield Request(
                time_ms,
                max(1, min(self.max_prompt, request.prompt_tokens)),
                max(2, min(self.max_output, request.output_tokens)),
            )


def read_requests(path: str | Path) -> tuple[Request, ...]:
    """Read a request trace: Azure's CSV (``TIMESTAMP,ContextTokens,GeneratedTokens``) or Mooncake's JSONL
    (``{"timestamp": ms, "input_length": …, "output_length": …}``). The first line tells which.

    Times start at 0. Raises :class:`ArtifactMissing`, or :class:`ArtifactDamaged` naming the line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as err:
        raise ArtifactMissing(f"There is no request trace at {path}.", "Check the path.") from err
    except UnicodeDecodeError as err:
        raise ArtifactDamaged(f"{path} is not a text file.", "Give a CSV or JSONL trace.") from err
    lines = text.splitlines()
    reader = _mooncake if lines and lines[0].lstrip().startswith("{") else _azure
    rows = sorted(reader(path, lines))
    if not rows:
        raise ArtifactDamaged(f"{path} holds no requests.", "Give a trace with at least one row.")
    start = rows[0].time_ms
    return tuple(Request(r.time_ms - start, r.prompt_tokens, r.output_tokens) for r in rows)


def _azure(path: Path, lines: list[str]) -> Iterator[Request]:
    reader = csv.reader(lines)
    header = [name.strip() for name in next(reader, [])]
    wanted = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    try:
        columns = [header.index(name) for name in wanted]
    except ValueError as err:
        raise ArtifactDamaged(
            f"{path} line 1: expected the columns {', '.join(wanted)}.",
            "Give a trace in Azure's CSV format or Mooncake's JSONL format.",
        ) from err
    for number, row in enumerate(reader, start=2):
        if not row:
            continue
        try:
            when = datetime.fromisoformat(row[columns[0]].strip()[:26])
            yield _checked(when.timestamp() * 1000.0, int(row[columns[1]]), int(row[columns[2]]))
        except (ValueError, IndexError) as err:
            raise _damaged(path, number, err) from err


def _mooncake(path: Path, lines: list[str]) -> Iterator[Request]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            yield _checked(float(row["timestamp"]), int(row["input_length"]), int(row["output_length"]))
        except (ValueError, KeyError, TypeError) as err:
            raise _damaged(path, number, err) from err


def _checked(time_ms: float, prompt: int, output: int) -> Request:
    if not math.isfinite(time_ms) or prompt < 0 or output < 0:
        raise ValueError("negative or non-finite value")
    return Request(time_ms, prompt, output)


def _damaged(path: Path, number: int, err: Exception) -> ArtifactDamaged:
    return ArtifactDamaged(f"{path} line {number}: {err!r}.", "Repair or remove that line.")
