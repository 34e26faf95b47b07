"""Step times drift from the profile: bounds follow, a warning names the shapes, the step log corrects the
estimator. And a policy that raises costs nobody a session."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from raw_edge import edge
from typer.testing import CliRunner

from wispprof.artifacts import Manifest, make_profile, save_profile
from wispprof.artifacts.rows import StepRow
from wispprof.cli import app
from wispprof.errors import WispprofError
from wispprof.fitting import FittedEstimator, load_estimator
from wispprof.fitting.pipeline import fit_files
from wispprof.policies import BatchPolicy, StepPlan, make_batch_policy
from wispprof.policies.linear_cost import LinearCost
from wispprof.server import running_server
from wispprof.server.metrics import Metrics
from wispprof.server.step_log import StepLog
from wispprof.server.step_time_tracker import StepTimeTracker
from wispprof.settings.server_settings import ServerSettings
from wispprof.testing.fake_engine import FakeDrafter, FakeEngine
from wispprof.types import BatchShape, ModelInfo


def true_ms(shape: BatchShape) -> float:
    return 4.0 + 0.3 * shape.new_tokens + 0.001 * shape.cached_tokens


def shapes(count: int, seed: int = 0) -> list[BatchShape]:
    rng = np.random.default_rng(seed)
    return [
        BatchShape.of((int(rng.integers(1, 9)), int(rng.integers(0, 300))) for _ in range(n))
        for n in rng.integers(1, 12, count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fitted estimator of :func:`true_ms`, as ``estimator.json``."""
    out = tmp_path_factory.mktemp("drift")
    rng = np.random.default_rng(1)
    rows = [
        StepRow(
            shape.key(),
            "verify",
            shape,
            tuple(float(true_ms(shape) * f) for f in np.exp(0.02 * rng.standard_normal(7))),
            order=number,
        )
        for number, shape in enumerate(shapes(60))
    ]
    manifest = Manifest("server", ModelInfo("hash", tokenizer_hash="hash"))
    save_profile(make_profile(manifest, rows), out / "server.jsonl")
    fit_files(out, [out / "server.jsonl"], kind="wisp-linear")
    return out


@pytest.fixture(scope="module")
def estimator(folder: Path) -> FittedEstimator:
    return load_estimator(folder / "estimator.json")


def run_steps(clock: StepTimeTracker, count: int, factor: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for shape in shapes(count, seed):
        taken = float(factor * true_ms(shape) * np.exp(0.02 * rng.standard_normal()))
        clock.observe(shape, clock.estimator.predict(shape)[0], taken)


def test_policies_get_the_corrected_bound_and_the_log_names_the_cells(
    estimator: FittedEstimator, caplog: pytest.LogCaptureFixture
) -> None:
    clock, metrics = StepTimeTracker(estimator), Metrics()
    assert not clock.learning
    run_steps(clock, 300, 1.0, seed=2)
    probe = BatchShape.uniform(6, 4, 150)
    p50, bound = estimator.predict(probe)
    assert clock.estimator.predict(probe) == pytest.approx((p50, bound), rel=0.05)
    assert clock.drift is not None
    assert not clock.drift.re_profile
    with caplog.at_level(logging.WARNING, "wispprof.server"):
        run_steps(clock, 300, 1.3, seed=3)
    now_p50, now_bound = clock.estimator.predict(probe)
    assert now_p50 == pytest.approx(1.3 * p50, rel=0.04)
    assert now_bound >= 1.2 * bound
    assert clock.corrections > 0
    assert clock.ratio == pytest.approx(1.0, abs=0.05)
    status = clock.drift
    assert status.re_profile
    assert status.cells
    messages = [r.getMessage() for r in caplog.records if "re-profile" in r.getMessage()]
    assert 1 <= len(messages) <= 3
    assert "new tokens" in messages[-1]
    metrics.drifted(status)
    found = {
        (sample.name, sample.labels.get("cell", "")): sample.value
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
    }
    assert found["wispprof:re_profile", ""] == 1
    for cell, ratio in status.cells:
        assert found["wispprof:re_profile_cell_ratio", str(cell)] == pytest.approx(ratio)
        assert ratio > 1.1
    assert found["wispprof:step_time_bound_scale", ""] == pytest.approx(status.bound_scale)


def test_an_alarm_that_lasts_is_reported_ever_more_rarely(
    estimator: FittedEstimator, caplog: pytest.LogCaptureFixture
) -> None:
    """Every look finds one more shape that drifted; in 20,000 steps that makes 8 lines, not 156."""
    clock, [shape] = StepTimeTracker(estimator), shapes(1, 6)
    cells: list[tuple[str, float]] = []

    def status() -> SimpleNamespace:
        cells.append((f"shape {len(cells)}", 2.0))
        return SimpleNamespace(re_profile=True, reason="re-profile", cells=tuple(cells))

    clock._monitor = SimpleNamespace(  # type: ignore[assignment]
        observe=lambda shape, ms: None, corrected=lambda: estimator, status=status
    )
    with caplog.at_level(logging.WARNING, "wispprof.server"):
        for _ in range(20_000):
            clock.observe(shape, 1.0, 1.0)
    assert len(caplog.records) == 8


def test_negative_control_steps_as_profiled_log_nothing(
    estimator: FittedEstimator, caplog: pytest.LogCaptureFixture
) -> None:
    clock = StepTimeTracker(estimator)
    with caplog.at_level(logging.WARNING, "wispprof.server"):
        run_steps(clock, 600, 1.0, seed=4)
    assert clock.drift is not None
    assert not clock.drift.re_profile
    assert not caplog.records


def test_another_estimator_is_used_as_it_is() -> None:
    formula = LinearCost(4.0, row_ms=0.3)
    clock = StepTimeTracker(formula)
    run_steps(clock, 200, 3.0, seed=5)
    assert clock.estimator is formula
    assert clock.drift is None


async def test_serve_writes_the_log_that_fit_update_reads(folder: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "fit", tmp_path / "logs" / "steps.jsonl"
    fit_files(out, [folder / "server.jsonl"], kind="wisp-linear")
    estimator = load_estimator(out / "estimator.json")
    engine = FakeEngine(64)
    settings = ServerSettings(policy="wisp", admit="all", step_log=log)
    async with (
        running_server(settings, engine=engine, model=engine.served, estimator=estimator) as running,
        edge(running.split_url) as one,
    ):
        drafter = FakeDrafter(engine.target, 0.5)
        found = await one.generate(0, [1, 2, 3], 200, drafter=drafter)
        assert found == engine.target.generate([1, 2, 3], 200)
        steps = running.server.step_times.steps
        async with httpx.AsyncClient() as client:
            shown = (await client.get(f"{running.http_url}/metrics")).text
    assert "wispprof:re_profile " in shown
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(rows) == steps >= 50
    assert rows[0]["shape"] == [[3, 0, 1]]
    assert all(row["ms"] > 0 for row in rows)
    result = CliRunner().invoke(app, ["fit", "--update", str(log), "--out", str(out)])
    assert result.exit_code == 0, result.stderr
    updated = load_estimator(out / "estimator.json")
    assert updated.report["update"]["steps"] == steps
    # The fake engine takes microseconds, the profile says milliseconds.
    assert updated.p50_scale < 0.5
    update = updated.report["update"]
    assert update["after"]["median_ape"] < update["before"]["median_ape"]


def test_the_step_log_appends_after_a_restart_and_refuses_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    for ms in (1.5, 2.5):
        log = StepLog(path)
        log.append(BatchShape.of([(2, 30), (64, 0, 1)]), ms)
        log.close()
        log.close()
        assert log.written == 1
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"shape": [[2, 30, 0], [64, 0, 1]], "ms": ms} for ms in (1.5, 2.5)]
    with pytest.raises(WispprofError, match="cannot be opened"):
        StepLog(tmp_path)


class FullDisk:
    """A file that cannot be written."""

    def close(self) -> None: ...

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")

    def flush(self) -> None: ...


def test_a_full_disk_ends_the_log_and_not_the_loop(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = StepLog(tmp_path / "steps.jsonl")
    log._file.close()
    log._file = FullDisk()  # type: ignore[assignment]
    log.append(BatchShape.uniform(1, 1, 1), 1.0)
    log._thread.join()
    log.append(BatchShape.uniform(1, 1, 1), 1.0)
    log.close()
    assert "No space" in log.error
    assert log.dropped == 1
    assert "No space" in caplog.text


# --- a policy that raises ---


class Broken:
    """Wraps a policy; raises two kinds of error, at every third step."""

    name = "broken"

    def __init__(self, inner: BatchPolicy) -> None:
        self._inner = inner
        self.stream = inner.stream
        self.asked = self.raised = 0

    def plan(self, now_ms, sessions, estimator, limits) -> StepPlan:
        self.asked += 1
        if self.asked % 3 == 0:
            self.raised += 1
            raise (KeyError if self.raised % 2 else ZeroDivisionError)("a defect")
        return self._inner.plan(now_ms, sessions, estimator, limits)


@pytest.mark.parametrize("name", ["wisp", "wispprof"])
async def test_a_policy_that_raises_costs_its_steps_their_drafts(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakeEngine(64)
    policy = Broken(make_batch_policy(name))
    with caplog.at_level(logging.ERROR, "wispprof.server"):
        async with (
            running_server(
                ServerSettings(prefix_cache_sessions=0),
                engine=engine,
                model=engine.served,
                policy=policy,
            ) as running,
            edge(running.split_url) as one,
        ):
            found = await one.generate(0, [1, 2], 60, drafter=FakeDrafter(engine.target))
            assert found == engine.target.generate([1, 2], 60)
            assert running.server.ready
            async with httpx.AsyncClient() as client:
                shown = (await client.get(f"{running.http_url}/metrics")).text
    assert policy.raised > 4
    counted = {
        sample.labels["kind"]: sample.value
        for family in text_string_to_metric_families(shown)
        for sample in family.samples
        if sample.name == "wispprof:policy_errors_total"
    }
    assert counted.keys() == {"KeyError", "ZeroDivisionError"}
    assert sum(counted.values()) >= 4
    logged = [r for r in caplog.records if "policy broken raised" in r.getMessage()]
    assert len(logged) == 2
    assert engine.sessions == ()
