"""Steps put together from measured operators, the profiles of GPUs that ship, and the commands without the
extra. Tests of the tables themselves need the extra ``gpu-tables``, which the locked environment has."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from wispprof.artifacts import load_server
from wispprof.artifacts.files import bundled_path
from wispprof.artifacts.profile import estimator_beside, load_edge, shipped_servers
from wispprof.artifacts.rows import MODELLED
from wispprof.cli import app
from wispprof.errors import ArtifactMissing, PlanError, ProfileError
from wispprof.fitting import load_estimator
from wispprof.profiling.gpu_import import draft_step
from wispprof.profiling.operator_steps import AttentionSurface, launch_ms, never_falling
from wispprof.profiling.operator_tables import GpuTarget, OperatorTables
from wispprof.settings.fleet_settings import InputSettings
from wispprof.simulation.scenario_inputs import read_inputs
from wispprof.simulation.server_models import server_of
from wispprof.types import BatchShape, VerifyItem

HAS_TABLES = importlib.util.find_spec("aiconfigurator_core") is not None


def _surface() -> AttentionSurface:
    """A launch of 1 ms that runs up to 8 items side by side."""
    return AttentionSurface.of(
        (1, 2, 4, 8, 16, 32), (1, 2, 4, 8), (64, 1024, 8192), lambda i, n, c: 1 + max(i, 8) * (n + c) / 1e4
    )


def test_a_curve_that_falls_becomes_the_nearest_that_does_not() -> None:
    assert never_falling(np.array([1.0, 4.0, 1.0, 5.0])).tolist() == pytest.approx([1.0, 2.0, 2.0, 5.0])


def test_a_uniform_launch_split_in_two_groups_costs_the_same() -> None:
    surface = _surface()
    whole = launch_ms(surface, [VerifyItem(4, 1000)] * 16)
    apart = launch_ms(surface, [VerifyItem(4, 999)] * 8 + [VerifyItem(4, 1001)] * 8)
    assert apart == pytest.approx(whole, rel=0.001)
    # Two launches would pay the fixed part twice.
    assert 2 * launch_ms(surface, [VerifyItem(4, 1000)] * 8) > 1.1 * whole


def test_a_launch_never_gets_cheaper_when_work_is_added() -> None:
    surface = _surface()
    rng = np.random.default_rng(0)
    for _ in range(50):
        items = [
            VerifyItem(int(n), int(c)) for n, c in zip(*rng.integers(1, (9, 9000), (12, 2)).T, strict=True)
        ]
        costs = [launch_ms(surface, items[:count]) for count in range(1, 13)]
        assert costs == sorted(costs)
        assert launch_ms(surface, [items[0]._replace(cached=items[0].cached + 500), *items[1:]]) >= costs[-1]


def test_shipped_profiles_are_small_complete_and_say_where_they_come_from() -> None:
    shipped = shipped_servers()
    cards = {manifest.hardware["gpus"][0]["name"] for manifest in shipped.values()}
    assert cards == {"a100_sxm", "h100_sxm", "h200_sxm", "b200_sxm", "l40s"}
    sizes = [p.stat().st_size for p in bundled_path("profiles").iterdir()]
    assert sum(sizes) < 3_000_000
    for name in shipped:
        profile = load_server(bundled_path(f"profiles/{name}.jsonl"))
        assert all(row.source == MODELLED and "blake2b:" in row.citation for row in profile.rows)
        assert all(sum(row.origins) == pytest.approx(1.0, abs=0.002) for row in profile.rows)
        estimator = load_estimator(estimator_beside(bundled_path(f"profiles/{name}.jsonl")))
        assert estimator.report["held_out"]["wispprof"]["median_ape"] < 2.0
        errors = [estimator.predict(row.shape)[0] / row.median_ms - 1 for row in profile.rows]
        assert np.median(np.abs(errors)) < 0.02


def test_the_estimator_keeps_the_tile_edges_of_the_profile() -> None:
    """An A100 computes 129 to 160 rows at the price of 160: the step grows there and hardly before."""
    model, _ = server_of("a100-sxm-qwen3-32b-vllm-bf16-tp1")

    def step(rows: int) -> float:
        return model.estimator.predict(BatchShape.uniform(rows // 4, 4, 128))[0]

    flat, edge = step(128) / step(96), step(160) / step(128)
    assert flat < 1.06 < 1.25 < edge


def test_shares_of_modelled_times_are_said_wherever_one_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = "9 % measured, 77 % interpolated, 14 % formula"
    name = "a100-sxm-qwen3-32b-vllm-bf16-tp2"
    assert shares in server_of(name)[1]
    monkeypatch.setenv("COLUMNS", "80")
    shown = CliRunner().invoke(app, ["profile", "show", name]).stdout
    assert shares in " ".join(shown.split())
    assert "2 × a100_sxm" in " ".join(shown.split())
    for word in ("∞", "{", "naive_split", "unknown machine"):
        assert word not in shown
    monkeypatch.setitem(sys.modules, "aiconfigurator_core", None)
    listed = CliRunner().invoke(app, ["profile", "gpus"]).stdout
    assert "…" not in listed
    assert "interpolated" in listed
    assert set(shipped_servers()) <= set(listed.split())
    assert max(map(len, listed.splitlines())) <= 80
    assert "0.14.0" in listed


def test_a_shipped_profile_is_read_by_its_name_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_edge(Path("rpi-5")).manifest.hardware["board"] == "Raspberry Pi 5"
    assert load_server(Path("h100-sxm-llama-3.1-8b-vllm-bf16-tp1")).manifest.source == MODELLED
    with pytest.raises(ArtifactMissing, match=r"other/rpi-5"):
        load_edge(Path("other/rpi-5"))
    with pytest.raises(ArtifactMissing, match=r"rpi-6") as caught:
        load_edge(Path("rpi-6"))
    assert "rpi-5" in caught.value.hint
    inputs = read_inputs(InputSettings(edge=Path("rpi-5")))
    assert inputs.device.name == "rpi-5"
    assert any("rpi-5, published (derived from ConfigSpec" in note for note in inputs.notes)


def test_an_unknown_server_names_those_near_it_alone() -> None:
    with pytest.raises(PlanError) as caught:
        server_of("a100")
    assert "a100-sxm-llama-3.1-8b-vllm-bf16-tp1" in caught.value.hint
    assert "h100-sxm" not in caught.value.hint
    assert "wispprof profile gpus" in caught.value.hint


@pytest.mark.parametrize("arguments", [["import-gpu", "--system", "h200_sxm", "--model", "Qwen/Qwen3-32B"]])
def test_without_the_extra_import_says_how_to_install_it(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "aiconfigurator_core", None)
    done = CliRunner().invoke(app, ["profile", *arguments])
    assert done.exit_code == 1
    assert "wispprof[gpu-tables]" in " ".join(done.output.split())


def test_gpus_lists_shipped_profiles_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiconfigurator_core", None)
    done = CliRunner().invoke(app, ["profile", "gpus", "--json"])
    assert done.exit_code == 0, done.output
    assert "h100-sxm-llama-3.1-8b-vllm-bf16-tp1" in json.loads(done.stdout)["shipped"]


@pytest.mark.skipif(not HAS_TABLES, reason="needs the extra gpu-tables")
def test_the_tables_give_the_shipped_profile(tmp_path) -> None:  # type: ignore[no-untyped-def]
    name = "a100-sxm-qwen3-32b-vllm-bf16-tp1"
    out = tmp_path / name
    options = ["--system", "a100_sxm", "--model", "Qwen/Qwen3-32B", "--out", str(out)]
    done = CliRunner().invoke(app, ["profile", "import-gpu", *options, "--json"])
    assert done.exit_code == 0, done.output
    made, shipped = load_server(out), load_server(bundled_path(f"profiles/{name}.jsonl"))
    assert made.hash == shipped.hash
    assert made.manifest.summary["split"] < 0.01
    times = {row.key: row.median_ms for row in made.rows}
    for less, more in itertools.pairwise(f"{n}x(5@512)" for n in (1, 4, 16, 64, 128)):
        assert times[less] <= times[more]


@pytest.mark.skipif(not HAS_TABLES, reason="needs the extra gpu-tables")
def test_experts_are_operators_of_each_token() -> None:
    tables = OperatorTables(GpuTarget("a100_sxm", "Qwen/Qwen3-30B-A3B"))
    assert tables.model_info.parameters == pytest.approx(30.5e9, rel=0.01)
    times = {rows: {n: ms for n, ms, _ in tables.tokenwise(rows)} for rows in (1, 64, 512)}
    experts = [times[rows]["context_moe"] for rows in times]
    # Few tokens wake few experts; all are read long before the step is bound by arithmetic.
    assert experts[1] > 4 * experts[0]
    assert experts[2] < 2 * experts[1]
    assert all(experts[i] > 0.5 * sum(times[rows].values()) for i, rows in enumerate(times))
    ((name, alone, _),) = tables.output_head(1)
    ((_, many, _),) = tables.output_head(512)
    assert name == "generation_logits_gemm"
    assert 0 < alone < many


@pytest.mark.skipif(not HAS_TABLES, reason="needs the extra gpu-tables")
@pytest.mark.parametrize(
    ("target", "says"),
    [
        (GpuTarget("h200_sxm", "Qwen/Qwen3-30B-A3B", dtype="fp8"), "those in bf16"),
        (GpuTarget("a100_sxm", "deepseek-ai/DeepSeek-V3", 8), "cannot price|plain attention"),
    ],
)
def test_what_the_tables_lack_is_refused(target: GpuTarget, says: str) -> None:
    with pytest.raises(ProfileError, match=says):
        OperatorTables(target)


@pytest.mark.skipif(not HAS_TABLES, reason="needs the extra gpu-tables")
def test_a_draft_step_grows_with_its_sessions() -> None:
    step = draft_step(GpuTarget("a100_sxm", "Qwen/Qwen3-32B", 2))
    assert 0.5 < step["ms"] < 5.0
    assert 0 < step["row_ms"] < 0.1
