"""Recorded requests: public traces, and result files of load generators.

| format | recognised by | source (repositories are GitHub's) |
|---|---|---|
| Azure 2023, 2024 (CSV) | ``TIMESTAMP,ContextTokens,GeneratedTokens`` | Azure/AzurePublicDataset |
| BurstGPT (CSV) | ``Timestamp,…,Request tokens,Response tokens`` | HPMLL/BurstGPT |
| Mooncake (JSONL) | ``timestamp``, ``input_length``, ``output_length``, ``hash_ids`` | kvcache-ai/Mooncake |
| vLLM (JSON) | ``start_times``, ``input_lens``, ``output_lens`` | ``bench serve --save-detailed`` |
| GuideLLM (JSON) | ``benchmarks`` with ``requests`` | ``guidellm benchmark --output-path`` |
| aiperf (JSONL) | ``metadata`` and ``metrics`` | ``profile_export.jsonl`` |
| wispprof (JSONL) | ``arrival_s``, ``prefix`` | ``serve --request-log`` |

Only times, lengths and block ids are read, never texts.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from wispprof.errors import ArtifactDamaged, ArtifactMissing
from wispprof.simulation.arrivals import Request

IMPLAUSIBLE_PER_S = 100.0
"""Above this rate, fractional timestamps are taken for seconds."""
AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
BURSTGPT = ("Timestamp", "Request tokens", "Response tokens")
WISPPROF = "wispprof"
_DAMAGE = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError, csv.Error)

Numbered = Iterator[tuple[int, Request]]


def read_requests(path: str | Path) -> tuple[Request, ...]:
    """Read a trace of requests in any format of this module; its content tells which.

    Times start at 0. Raises :class:`ArtifactMissing`, or :class:`ArtifactDamaged` naming the line.
    """
    return read_trace(path)[1]


def read_trace(path: str | Path) -> tuple[str, tuple[Request, ...], float]:
    """(format, requests from time 0 on, unix time of the first in s or NaN if the format does not say)."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as err:
        raise ArtifactMissing(f"There is no request trace at {path}.", "Check the path.") from err
    except UnicodeDecodeError as err:
        raise ArtifactDamaged(f"{path} is not a text file.", "Give a CSV, JSON or JSONL trace.") from err
    name, reader = _reader(path, text)
    rows: list[Request] = []
    number = 0
    try:
        for number, request in reader(text):  # noqa: B007
            if not math.isfinite(request.time_ms) or min(request[1:3]) < 0:
                raise ValueError("negative or non-finite value")
            rows.append(request)
    except _Line as err:
        raise ArtifactDamaged(
            f"{path} line {err.number}: {err.cause!r}.", "Repair or remove that line."
        ) from err
    except _DAMAGE as err:
        raise ArtifactDamaged(f"{path} line {number}: {err!r}.", "Repair or remove that line.") from err
    if not rows:
        raise ArtifactDamaged(f"{path} holds no requests.", "Give a trace with at least one request.")
    rows.sort(key=lambda request: request.time_ms)
    begun_ms = rows[0].time_ms
    per_s = 1000.0 * len(rows) / max(1.0, rows[-1].time_ms - begun_ms)
    if name == "mooncake" and per_s > IMPLAUSIBLE_PER_S and any(r.time_ms % 1.0 for r in rows):
        raise ArtifactDamaged(
            f"{path} holds {per_s:,.0f} requests/s if its timestamps are milliseconds.",
            "Multiply timestamps in seconds by 1,000; round milliseconds to whole numbers.",
        )
    dated = begun_ms / 1000.0 if name in ("azure", "guidellm", "aiperf", WISPPROF) else math.nan
    return name, tuple(r._replace(time_ms=r.time_ms - begun_ms) for r in rows), dated


class _Line(Exception):
    """What is wrong with a line, by its number."""

    def __init__(self, number: int, cause: Exception) -> None:
        super().__init__(str(cause))
        self.number = number
        self.cause = cause


def _reader(path: Path, text: str) -> tuple[str, Callable[[str], Numbered]]:
    first = next(iter(text.splitlines()), "")
    if first.lstrip().startswith("{"):
        try:
            head = json.loads(first)
        except ValueError:
            head = {}
        except RecursionError as err:
            raise ArtifactDamaged(f"{path} line 1: {err!r}.", "Repair or remove that line.") from err
        if "metrics" in head and "metadata" in head:
            return "aiperf", _lines(_aiperf)
        if "arrival_s" in head and "prefix" in head:
            return WISPPROF, _lines(_wispprof)
        if "timestamp" in head:
            return "mooncake", _lines(_mooncake)
        return _document(path, text)
    names = [name.strip() for name in next(csv.reader([first]), [])]
    if set(AZURE) <= set(names):
        return "azure", _table(names, _azure)
    if set(BURSTGPT) <= set(names):
        return "burstgpt", _table(names, _burstgpt)
    raise ArtifactDamaged(
        f"{path} line 1: expected the columns {', '.join(AZURE)}, those of BurstGPT, or JSON.",
        "Give a trace of Azure, BurstGPT or Mooncake, a request log of `wispprof serve`, or a result file of "
        "vLLM, GuideLLM or aiperf.",
    )


def _document(path: Path, text: str) -> tuple[str, Callable[[str], Numbered]]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise ArtifactDamaged(f"{path} line 1: {err}.", "Repair the file.") from err
    if isinstance(document, dict) and "benchmarks" in document:
        return "guidellm", lambda _: _guidellm(document)
    if isinstance(document, dict) and {"input_lens", "total_input_tokens"} & document.keys():
        if not document.get("start_times"):
            raise ArtifactDamaged(
                f"{path} holds no start_times.", "Run `vllm bench serve` with --save-detailed."
            )
        return "vllm", lambda _: _vllm(document)
    raise ArtifactDamaged(
        f"{path} is no result file of vLLM or GuideLLM.", "See docs/fleet.md for the formats that are read."
    )


def _lines(parse: Callable[[dict[str, Any]], Request | None]) -> Callable[[str], Numbered]:
    def read(text: str) -> Numbered:
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                try:
                    request = parse(json.loads(line))
                    _check(request)
                except _DAMAGE as err:
                    raise _Line(number, err) from err
                if request is not None:
                    yield number, request

    return read


def _table(names: list[str], parse: Callable[[dict[str, str]], Request]) -> Callable[[str], Numbered]:
    def read(text: str) -> Numbered:
        for number, line in enumerate(text.splitlines()[1:], start=2):
            if line.strip():
                try:
                    request = parse(dict(zip(names, next(csv.reader([line])), strict=False)))
                    _check(request)
                except _DAMAGE as err:
                    raise _Line(number, err) from err
                yield number, request

    return read


def _check(request: Request | None) -> None:
    if request is not None and (not math.isfinite(request.time_ms) or min(request[1:3]) < 0):
        raise ValueError("negative or non-finite value")


def _azure(row: dict[str, str]) -> Request:
    when, prompt, output = (row[name] for name in AZURE)
    time = datetime.fromisoformat(when.strip())
    # The trace of 2023 states no time zone, that of 2024 does: all times are UTC.
    return Request(time.replace(tzinfo=time.tzinfo or UTC).timestamp() * 1000.0, int(prompt), int(output))


def _burstgpt(row: dict[str, str]) -> Request:
    when, prompt, output = (float(row[name]) for name in BURSTGPT)
    return Request(when * 1000.0, int(prompt), int(output))


def _mooncake(row: dict[str, Any]) -> Request:
    blocks = tuple(map(int, row.get("hash_ids", ())))
    return Request(
        float(row["timestamp"]), int(row["input_length"]), int(row["output_length"]), blocks=blocks
    )


def _wispprof(row: dict[str, Any]) -> Request | None:
    if row.get("resumed") or not row["output"]:
        return None
    blocks = tuple(map(int, row["prefix"]))
    return Request(float(row["arrival_s"]) * 1000.0, int(row["prompt"]), int(row["output"]), blocks=blocks)


class SeenClient(NamedTuple):
    """What a request log says of a request besides :class:`Request`. ``tokens_per_s``: its SLO, 0 for none.
    ``rtt_ms``: NaN if it was never seen. ``drafted``, ``accepted``: rounds by depth, from 1 on."""

    tokens_per_s: float
    rtt_ms: float
    drafted: tuple[int, ...]
    accepted: tuple[int, ...]


def read_clients(path: Path) -> list[SeenClient]:
    """Every line of a request log; raises :class:`ArtifactDamaged` naming the line."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if line.strip():
            try:
                row = json.loads(line)
                drafted, accepted = (tuple(map(int, row[name])) for name in ("drafted", "accepted"))
                speed, rtt_ms = float(row.get("tokens_per_s", 0.0)), float(row.get("rtt_ms", math.nan))
                if (
                    min(0, *drafted, *accepted) < 0
                    or not 0 <= speed < math.inf
                    or rtt_ms < 0
                    or rtt_ms == math.inf
                ):
                    raise ValueError("negative or non-finite value")
                found.append(SeenClient(speed, rtt_ms, drafted, accepted))
            except _DAMAGE as err:
                raise ArtifactDamaged(
                    f"{path} line {number}: {err!r}.", "Repair or remove that line."
                ) from err
    return found


def _aiperf(row: dict[str, Any]) -> Request | None:
    metadata, metrics = row["metadata"], row["metrics"]
    left_out = metadata.get("benchmark_phase") == "warmup" or metadata.get("was_cancelled")
    if row.get("error") or left_out:
        return None
    prompt, output = (metrics[f"{side}_sequence_length"]["value"] for side in ("input", "output"))
    return Request(metadata["request_start_ns"] / 1e6, int(prompt), int(output))


def _vllm(document: dict[str, Any]) -> Numbered:
    columns = (document[name] for name in ("start_times", "input_lens", "output_lens"))
    for number, (start_s, prompt, output) in enumerate(zip(*columns, strict=True), start=1):
        if output:  # a failed request has none
            yield number, Request(float(start_s) * 1000.0, int(prompt), int(output))


def _guidellm(document: dict[str, Any]) -> Numbered:
    """Successful requests of all benchmarks in the file. Versions before 0.4 name the start otherwise."""
    number = 0
    for benchmark in document["benchmarks"]:
        for row in benchmark["requests"]["successful"]:
            number += 1
            start_s = row["request_start_time"] if "request_start_time" in row else row["start_time"]
            prompt, output = int(row["prompt_tokens"]), int(row["output_tokens"])
            yield number, Request(float(start_s) * 1000.0, prompt, output)
