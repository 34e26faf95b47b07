"""Import the output of ``llama-bench -o json`` or ``-o jsonl`` as an edge profile.

llama-bench measures the speed of ``n_prompt`` tokens at once and of ``n_gen`` tokens one by one, over
``n_depth`` cached ones. Its generation excludes sampling, so these draft steps have no features and are
slightly optimistic. Their source is ``imported``. A profile is of one setting: of a matrix such as
``-t 4,8`` one column is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import msgspec

from wispprof.artifacts import EdgeProfile, EdgeRow, Manifest, make_profile, save_profile
from wispprof.artifacts.files import read_bytes
from wispprof.artifacts.manifest import command_line, library_versions
from wispprof.errors import ArtifactDamaged, ProfileError
from wispprof.profiling.profile_run import check_output
from wispprof.settings.profiler_settings import Output
from wispprof.types import ModelInfo

_PER_TEST = (
    *("n_prompt", "n_gen", "n_depth", "test_time"),
    *("avg_ns", "stddev_ns", "avg_ts", "stddev_ts", "samples_ns", "samples_ts"),
)
"""Fields that differ between tests of one setting; all others are settings."""
_SPEEDS = (1e-6, 1e9)
"""Tokens/s that a test may report."""
_ENGINE_FACTS = ("n_threads", "n_gpu_layers", "backends", "flash_attn", "type_k", "type_v")


class _BenchTest(msgspec.Struct):
    """One test of llama-bench: the fields that are read. Speeds are tokens/s."""

    n_prompt: int
    n_gen: int
    n_depth: int = 0
    samples_ts: list[float] = []
    avg_ts: float | None = None
    build_commit: str = "unknown"
    model_filename: str = ""
    model_type: str = ""
    model_n_params: int = 0
    cpu_info: str = ""
    gpu_info: str = ""
    test_time: str = ""
    n_threads: object = None
    n_gpu_layers: object = None
    backends: object = None
    flash_attn: object = None
    type_k: object = None
    type_v: object = None

    @property
    def speeds(self) -> list[float]:
        return self.samples_ts or [cast(float, self.avg_ts)]

    @property
    def citation(self) -> str:
        return f"llama-bench, llama.cpp build {self.build_commit}"


def import_results(file: Path, output: Output, where: Mapping[str, Any] | None = None) -> EdgeProfile:
    """Read the results of one model under one setting and write an edge profile.

    ``where``: values of llama-bench's fields that tests must have, such as ``{"n_threads": 4}``. Raises
    :class:`ArtifactDamaged` if the file is not llama-bench's JSON, :class:`ProfileError` if it contains
    several models or settings, or no generation test.
    """
    tests = _one_setting(_read_tests(file), where or {}, str(file))
    check_output(output)
    profile = make_profile(_manifest(tests), _rows(tests, str(file)))
    if output.path is not None:
        save_profile(profile, output.path)
    return cast(EdgeProfile, profile)


def _read_tests(file: Path) -> list[tuple[_BenchTest, dict[str, Any]]]:
    """Each test, with the settings it ran under."""
    data = read_bytes(file, "llama-bench results", "Make it with: llama-bench -o json > FILE.")
    lines = data.lstrip().startswith(b"{")
    try:
        entries: list[msgspec.Raw] = (
            msgspec.json.Decoder(msgspec.Raw).decode_lines(data)
            if lines
            else msgspec.json.decode(data, type=list[msgspec.Raw])
        )
    except msgspec.ValidationError:
        raise ArtifactDamaged(f"{file} is not a list of llama-bench tests.", "Use -o json.") from None
    except msgspec.DecodeError as err:
        raise ArtifactDamaged(f"{file} is not JSON: {err}.", "Use -o json.") from None
    tests = []
    for number, entry in enumerate(entries, start=1):
        try:
            test = msgspec.json.decode(entry, type=_BenchTest)
            if not test.samples_ts and test.avg_ts is None:
                raise msgspec.ValidationError("Object missing required field `samples_ts`")
            facts: dict[str, Any] = msgspec.json.decode(entry)
        except (msgspec.DecodeError, UnicodeDecodeError) as err:
            raise ArtifactDamaged(
                f"{file}, test {number}: {err}.", "Make the file again with: llama-bench -o json."
            ) from None
        tests.append((test, {name: value for name, value in facts.items() if name not in _PER_TEST}))
    return tests


def _one_setting(
    tests: Sequence[tuple[_BenchTest, dict[str, Any]]], where: Mapping[str, Any], file: str
) -> list[_BenchTest]:
    """The tests that ran ``where``; raises :class:`ProfileError` unless all ran under one setting."""
    wanted = {name: str(value) for name, value in where.items()}
    chosen = [pair for pair in tests if all(str(pair[1].get(n)) == value for n, value in wanted.items())]
    if tests and not chosen:
        asked = ", ".join(f"{name}={value}" for name, value in wanted.items())
        raise ProfileError(f"{file} contains no test with {asked}.", "Correct --where.")
    names = dict.fromkeys(name for _, facts in chosen for name in facts)
    values = {name: sorted({str(facts.get(name)) for _, facts in chosen}) for name in names}
    several = {name: found for name, found in values.items() if len(found) > 1}
    if "model_filename" in several:
        models = ", ".join(several["model_filename"])
        raise ProfileError(
            f"{file} contains tests of several models: {models}.", "Choose one: --where model_filename=…."
        )
    if several:
        shown = "; ".join(f"{name} {', '.join(found)}" for name, found in several.items())
        name, found = next(iter(several.items()))
        raise ProfileError(
            f"{file} contains tests under several settings: {shown}.",
            f"Choose one: --where {name}={found[0]}.",
        )
    return [test for test, _ in chosen]


def _rows(tests: Sequence[_BenchTest], where: str) -> list[EdgeRow]:
    """Prefill rows and draft steps. Tests that mix prompt and generation are skipped."""
    rows: dict[str, EdgeRow] = {}
    for test in tests:
        if (test.n_prompt and test.n_gen) or min(test.speeds) <= 0:
            continue
        for speed in test.speeds:
            if not _SPEEDS[0] <= speed <= _SPEEDS[1]:
                raise ArtifactDamaged(
                    f"{where} says {speed:g} tokens/s.", "Make the file again with: llama-bench -o json."
                )
        kind = "prefill" if test.n_prompt else "draft_step"
        tokens = test.n_prompt or 1
        # A generation test grows from its depth: on average half of it precedes each token.
        context = test.n_depth if test.n_prompt else test.n_depth + test.n_gen // 2
        row = EdgeRow(
            f"{kind} {tokens}@{context}",
            kind,
            context,
            tuple(round(1000 * tokens / speed, 6) for speed in test.speeds),
            tokens,
            source="imported",
            citation=test.citation,
        )
        if (earlier := rows.get(row.key)) is not None:  # the same test once more
            rows[row.key] = replace(earlier, samples_ms=(*earlier.samples_ms, *row.samples_ms))
        else:
            rows[row.key] = replace(row, order=len(rows))
    if not any(row.kind == "draft_step" for row in rows.values()):
        raise ProfileError(
            f"{where} contains no generation test.", "Run llama-bench with a number of tokens: -n 64."
        )
    return list(rows.values())


def _manifest(tests: Sequence[_BenchTest]) -> Manifest:
    first = tests[0] if tests else _BenchTest(0, 0)
    facts = {name: getattr(first, name) for name in _ENGINE_FACTS}
    return Manifest(
        kind="edge",
        model=ModelInfo(
            id=Path(first.model_filename or "unknown").name,
            dtype=first.model_type,
            parameters=first.model_n_params,
        ),
        command=command_line(),
        engine={"backend": "llama.cpp", **{k: v for k, v in facts.items() if v is not None}},
        hardware={"cpu": first.cpu_info, "gpus": [{"name": first.gpu_info}] if first.gpu_info else []},
        versions=library_versions(),
        started=first.test_time,
        ended=first.test_time,
        source="imported",
        citation=first.citation,
    )
