"""``wispprof fit`` without the printing: profiles and traces in, artifacts and model cards out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from wispprof.artifacts import (
    ServerProfile,
    files,
    load_server,
    load_trace,
    read_document,
    trace_hash,
    write_document,
)
from wispprof.artifacts.median_interval import ROUGH, known_to, noisy_count
from wispprof.artifacts.profile import estimator_beside
from wispprof.artifacts.rows import AcceptanceTrace, StepRow
from wispprof.errors import FitError, TooFewOutcomes
from wispprof.fitting.controller_replay import Fold, compare_controllers, summarise
from wispprof.fitting.drift import recalibrate
from wispprof.fitting.estimator import ESTIMATOR_KINDS, FittedEstimator, load_estimator
from wispprof.fitting.evaluation import Evaluation, Progress, assemble, evaluate, out_of_fold, relative_errors
from wispprof.fitting.model_card import estimator_card, plot_evaluation, predictor_card, write_card
from wispprof.fitting.observations import Observations, check_same_model, read_step_log
from wispprof.fitting.rejection_predictor import (
    PREDICTOR_KINDS,
    FittedPredictor,
    fit_predictor,
    fit_scorer,
    paths_of,
)
from wispprof.fitting.rejection_scorers import split_prompts
from wispprof.hardware import compute_device_name
from wispprof.settings.planner_settings import FitSettings

REPLAY_FOLDS = 5


@dataclass
class FitResult:
    """The fitted artifacts and the files that were written. ``notes``: what was left out, and why."""

    estimator: FittedEstimator | None = None
    predictor: FittedPredictor | None = None
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ServerRows:
    """Rows of one or more profiles of one model, with the profiles' hashes."""

    rows: tuple[StepRow, ...]
    inputs: dict[str, str]
    model: str
    tokenizer_hash: str


def load_server_rows(paths: Sequence[Path]) -> ServerRows:
    """Load server profiles that may be fitted together.

    Raises :class:`FitError` if their models, number formats or devices differ.
    """
    rows: list[StepRow] = []
    inputs: dict[str, str] = {}
    identities: dict[str, str] = {}
    tokenizer = ""
    machines: dict[str, None] = {}
    for path in paths:
        profile = load_server(path)
        manifest, model, name = profile.manifest, profile.manifest.model, Path(path).name
        inputs["model"] = model.id
        identities[name] = " ".join(filter(None, (model.id, model.dtype, model.config_hash)))
        inputs[f"profile:{name}" if len(paths) > 1 else "profile"] = profile.hash
        device = str(manifest.engine.get("device", ""))
        machines[compute_device_name(device, manifest.hardware)] = None
        tokenizer = tokenizer or model.tokenizer_hash
        rows.extend(profile.rows)
    check_same_model(identities)
    if any(machines):
        inputs["machine"] = " and ".join(filter(None, machines))
    return ServerRows(tuple(rows), inputs, next(iter(identities.values()), ""), tokenizer)


def fit_estimator(
    rows: Sequence[StepRow] | Observations,
    kind: str = FitSettings.estimator,
    coverage: float = FitSettings.coverage,
    kinds: Sequence[str] = ESTIMATOR_KINDS,
) -> FittedEstimator:
    """Fit a verification-time estimator on profile rows.

    ``kind`` names a step-time model; ``auto`` fits all of ``kinds`` and keeps the one of least held-out
    error among the monotone ones. ``.report`` holds the comparison.
    Raises :class:`FitError` for rows that :func:`~wispprof.fitting.observations.check_rows` refuses.
    """
    data = rows if isinstance(rows, Observations) else Observations.of(rows)
    tried = tuple(kinds) if kind == "auto" else (kind,)
    fitted: dict[str, FittedEstimator] = {}
    errors: dict[str, dict[str, float]] = {}
    for name in tried:
        predicted, step_model = out_of_fold(name, data)
        errors[name] = relative_errors(predicted, data.median_ms)
        fitted[name] = assemble(step_model, predicted, data, coverage)
    eligible = [n for n in tried if fitted[n].step_model.monotone] if kind == "auto" else list(tried)
    if not eligible:
        raise FitError("None of the estimators tried is monotone.", "Add wisp-linear to them.")
    best = min(eligible, key=lambda n: errors[n]["mape"])
    noise = data.repeat_noise()
    report: dict[str, Any] = {
        "chosen": best,
        "requested": kind,
        "held_out": errors,
        "monotone": {n: fitted[n].step_model.monotone for n in tried},
        "shapes": len(data),
        "samples": int(sum(len(s) for s in data.samples)),
        "repeat_noise_percent": float(100 * np.median(noise)),
        "coverage": coverage,
        "flagged_rows": {"kept": data.flagged, "left_out": data.left_out},
        "drift_percent": float(100 * (np.exp(data.drift) - 1)),
        **_origin(() if isinstance(rows, Observations) else rows),
    }
    fitted[best].report.update(report)
    return fitted[best]


def _origin(rows: Sequence[StepRow]) -> dict[str, list[str]]:
    """``sources`` and ``citations`` of rows that were not measured here; empty if all were."""
    foreign = [row for row in rows if row.source != "measured"]
    if not foreign:
        return {}
    return {
        "sources": sorted({row.source for row in rows}),
        "citations": sorted({row.citation for row in foreign}),
    }


def fit_files(
    out: Path,
    server: Sequence[Path] = (),
    trace: Sequence[Path] = (),
    kind: str = FitSettings.estimator,
    predictor_kind: str = FitSettings.predictor,
    coverage: float = FitSettings.coverage,
    seed: int = FitSettings.seed,
) -> FitResult:
    """Fit an estimator, a predictor or both; writes them and their model cards to ``out``.

    Beside an estimator, a trace with too few outcomes gives no predictor but a note; alone it raises
    :class:`TooFewOutcomes`.
    """
    if not server and not trace:
        raise FitError("There is nothing to fit.", "Name a server profile, a trace, or both.")
    result = FitResult()
    loaded = load_server_rows(server) if server else None
    traces = [load_trace(path) for path in trace]
    if loaded is not None:
        _check_pair(loaded, traces)
        result.estimator = fit_estimator(loaded.rows, kind, coverage)
        result.notes += _noise(loaded.rows)
    if traces:
        try:
            result.predictor = fit_predictor(traces, predictor_kind, seed)
        except TooFewOutcomes as err:
            if loaded is None:
                raise
            result.notes.append(f"No predictor: {err}")
    if loaded is not None and result.estimator is not None:
        result.files += _save_estimator(out, result.estimator, loaded.inputs)
    if result.predictor is not None:
        inputs = _trace_hashes(trace, traces)
        if len(inputs) == 1:
            inputs = {"trace": next(iter(inputs.values()))}
        target = Path(out) / "predictor.json"
        result.predictor.save(target, inputs)
        result.files += [target, *write_card(target, predictor_card(result.predictor, inputs))]
    return result


def _noise(rows: Sequence[StepRow]) -> list[str]:
    """A note if step times are known too roughly to plan by them."""
    width = known_to([row for row in rows if row.kind != "sentinel"])
    if width <= ROUGH:
        return []
    return [
        f"Half of the step times are known to ± {width:.0%} at best ({noisy_count(rows)}). Run "
        "`wispprof profile-server` again on an idle machine."
    ]


def save_beside(profile: ServerProfile, path: Path, coverage: float = FitSettings.coverage) -> Path:
    """Fit a modelled profile and write its estimator beside it, as ``NAME.estimator.json``.

    Modelled rows have no noise, so the bound covers the error of the fit alone.
    """
    target = estimator_beside(path)
    estimator = fit_estimator(profile.rows, "wispprof", coverage)
    estimator.save(target, {"profile": profile.hash, "machine": profile.manifest.citation})
    return target


def _save_estimator(out: Path, estimator: FittedEstimator, inputs: dict[str, str]) -> list[Path]:
    target = Path(out) / "estimator.json"
    estimator.save(target, inputs)
    return [target, *write_card(target, estimator_card(estimator, inputs))]


def _trace_hashes(paths: Sequence[Path], traces: Sequence[AcceptanceTrace]) -> dict[str, str]:
    pairs = zip(paths, traces, strict=True)
    return {f"trace:{Path(path).name}": trace_hash(trace) for path, trace in pairs}


def evaluate_files(
    out: Path,
    server: Sequence[Path],
    splits: int = FitSettings.splits,
    seed: int = FitSettings.seed,
    progress: Progress | None = None,
) -> tuple[Evaluation, list[Path]]:
    """Score every estimator on held-out groups; writes ``evaluation.json`` and plots to ``out``."""
    loaded = load_server_rows(server)
    found = evaluate(Observations.of(loaded.rows), splits=splits, seed=seed, progress=progress)
    target = Path(out) / "evaluation.json"
    write_document(target, "evaluation", asdict(found), loaded.inputs)
    return found, [target, *plot_evaluation(found, Path(out))]


def replay_files(
    out: Path, trace: Sequence[Path], seed: int = FitSettings.seed
) -> tuple[list[dict[str, Any]], list[Path]]:
    """Replay whole rounds under every predictor; writes ``replay.json`` to ``out``.

    Every prompt is tested once, in one of five folds. Rules are tuned on the prompts that calibrate the
    fold's predictors and tested on others.
    """
    traces = [load_trace(path) for path in trace]
    parts = split_prompts(paths_of(traces), (1.0,) * REPLAY_FOLDS, seed)
    folds = []
    for number, test in enumerate(parts):
        tune, *others = parts[number + 1 :] + parts[:number]
        learn = [path for part in others for path in part]
        folds.append(Fold(tune, test, {k: fit_scorer(k, learn, tune) for k in PREDICTOR_KINDS}))
    records = compare_controllers(folds)
    target = Path(out) / "replay.json"
    write_document(target, "replay", {"records": records}, _trace_hashes(trace, traces))
    return summarise(records), [target]


def update_files(out: Path, log: Path) -> FitResult:
    """Recalibrate ``out/estimator.json`` on a server's own step log, in place, atomically."""
    target = Path(out) / "estimator.json"
    estimator = recalibrate(load_estimator(target), read_step_log(log))
    inputs = read_document(target, "estimator").inputs
    inputs["update"] = files.content_hash(Path(log).read_bytes())
    return FitResult(estimator, None, _save_estimator(out, estimator, inputs))


def _check_pair(loaded: ServerRows, traces: Sequence[AcceptanceTrace]) -> None:
    for trace in traces:
        if loaded.tokenizer_hash and trace.tokenizer_hash not in ("", loaded.tokenizer_hash):
            raise FitError(
                f"The server profile is of {loaded.model}, the trace of {trace.target} with another "
                "tokenizer.",
                "Fit a profile and a trace of the same target.",
            )
