"""``wispprof fit``: estimator and predictor from a server profile and an acceptance trace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wispprof.cli.console import emit_json, note, output, table, tracker, warn
from wispprof.cli.options import JsonFlag, with_settings
from wispprof.settings.planner_settings import FitSettings

if TYPE_CHECKING:
    from wispprof.fitting.evaluation import Evaluation


@with_settings
def fit(settings: FitSettings, as_json: JsonFlag = False) -> None:
    """Fit a step-time estimator and a rejection predictor, and score them."""
    from wispprof.fitting.model_card import explain_estimator, explain_predictor
    from wispprof.fitting.pipeline import evaluate_files, fit_files, replay_files, update_files

    out, seed = settings.out, settings.seed
    if settings.update is not None:
        fitted = update_files(out, settings.update)
    else:
        kinds = (settings.estimator, settings.predictor)
        fitted = fit_files(out, settings.server, settings.trace, *kinds, settings.coverage, seed)
    document: dict[str, Any] = {}
    found = None
    if settings.evaluate and settings.server:
        with tracker("evaluate") as report:
            found, files = evaluate_files(out, settings.server, settings.splits, seed, report)
        fitted.files += files
        document["evaluation"] = {name: value for name, value in vars(found).items() if name != "points"}
    if settings.evaluate and settings.trace:
        document["replay"], files = replay_files(out, settings.trace, seed)
        fitted.files += files
    if fitted.estimator is not None:
        explained = explain_estimator(fitted.estimator)
        document["estimator"] = {**fitted.estimator.report, "explanation": explained}
    if fitted.predictor is not None:
        explained = explain_predictor(fitted.predictor)
        document["predictor"] = {**fitted.predictor.report, "explanation": explained}
    document["notes"] = fitted.notes
    for line in fitted.notes:
        warn(line)
    document["files"] = [str(f) for f in fitted.files]
    if as_json:
        emit_json(document)
        return
    if fitted.estimator is not None:
        _show_estimator(document["estimator"])
    if found is not None:
        _show_evaluation(found)
    if fitted.predictor is not None:
        _show_predictor(document["predictor"])
    if "replay" in document:
        _show_replay(document["replay"])
    for file in fitted.files:
        note(f"wrote {file}")


_SCORES = "n|MAPE:.1f|median:.1f|p90:.1f|p99:.1f|bias:+.1f|cover:.1f|bound:.2f"


def _scores(row: dict[str, Any]) -> tuple[Any, ...]:
    errors = (row[k] for k in ("mape", "median_ape", "p90_ape", "p99_ape", "bias"))
    return (row["shapes"], *errors, 100 * row["coverage"], row["sharpness"])


def _show_evaluation(found: Evaluation) -> None:
    for inside, what in ((True, "inside"), (False, "outside")):
        rows: list[tuple[Any, ...]] = [
            (row["scheme"], row["estimator"], *_scores(row))
            for row in found.groups
            if row["in_domain"] == inside
        ]
        if inside and found.repeat_error is not None:
            bound = {"shapes": None, "coverage": 0.95, "sharpness": found.noise_floor[0.95]}
            rows.append(("", "oracle", *_scores({**found.repeat_error, **bound})))
        shown = table(
            f"Blocks of shapes held out, {what} the range of the others (percent; "
            f"noise {found.noise['median']:.2f})",
            f"held out by|estimator|{_SCORES}",
            rows,
            "cover: samples below the 95 % bound. bound: bound ÷ median.\noracle: predicts each shape "
            "by another measurement of it, and bounds it by the quantile of its samples.",
        )
        output().print(shown)
    regimes = (
        (row["regime"], row["estimator"], *_scores(row))
        for row in sorted(found.regimes, key=lambda r: r["regime"])
    )
    shown = table("By regime, inside the range (percent)", f"regime|estimator|{_SCORES}", regimes)
    output().print(shown)
    floors = (("oracle", found.noise_floor), ("speed-corrected", found.speed_corrected_floor))
    bounds = [
        (row["estimator"], row["level"], row["coverage"], row["worst_split"], row["sharpness"])
        for row in found.splits
    ]
    bounds += [(name, k, k, None, ratio) for name, floor in floors for k, ratio in floor.items()]
    shown = table(
        "Coverage of the bound over random splits of shapes",
        "estimator|wanted:.1%|found:.1%|worst split:.1%|bound ÷ median:.3f",
        bounds,
        "oracle: the quantile of each shape's own steps.\n"
        "speed-corrected: with the machine's speed at every step known.",
    )
    output().print(shown)
    sizes = sorted({row["shapes"] for row in found.learning})
    errors = {(row["estimator"], row["shapes"]): row["mape"] for row in found.learning}
    kinds = dict.fromkeys(kind for kind, _ in errors)
    shown = table(
        "Held-out MAPE by number of training shapes (percent)",
        "|".join(("estimator", *(f"{size}:.2f" for size in sizes))),
        ((kind, *(errors[kind, size] for size in sizes)) for kind in kinds),
    )
    output().print(shown)


def _show_replay(summary: list[dict[str, Any]]) -> None:
    signs = {"fixed": "", "fastest": "↑ ", "frugal": "↓ ", "clairvoyant": ""}
    figures = ("value", "tokens_per_s", "wasted_ms", "drafted", "accepted")
    rows = (
        (
            f"{cell['device']} {cell['draft_ms']:g}" if rule == "fixed" else "",
            cell["rtt_ms"] if rule == "fixed" else "",
            sign + cell[rule]["controller"],
            *(cell[rule][name] for name in figures),
        )
        for cell in summary
        for rule, sign in signs.items()
        if cell[rule] is not None
    )
    shown = table(
        "Rounds replayed on held-out prompts (wasted: drafting ms per token)",
        "device|RTT:g|rule|value:g|tokens/s:.2f|wasted:.2f|drafted:.2f|accepted:.2f",
        rows,
        "↑ tuned for most tokens/s, ↓ for least waste at the speed of the best fixed k, both on "
        "other prompts.\nDevice: ms per draft token.",
    )
    output().print(shown)


def _chosen(name: str, report: dict[str, Any]) -> str:
    return f"{name} ←" if name == report["chosen"] else name


def _show_estimator(report: dict[str, Any]) -> None:
    figures = ("mape", "median_ape", "p90_ape", "p99_ape", "bias")
    scored = sorted(report["held_out"].items(), key=lambda item: item[1]["mape"])
    shown = table(
        "Step-time estimators, scored on held-out shapes (percent)",
        "estimator|MAPE:.2f|median:.2f|p90:.2f|p99:.2f|bias:+.2f|monotone",
        (
            (_chosen(name, report), *(row[k] for k in figures), report["monotone"][name])
            for name, row in scored
        ),
    )
    output().print(shown)
    output().print(report["explanation"], markup=False)


def _show_predictor(report: dict[str, Any]) -> None:
    figures = ("auc", "false_acceptance", "ece", "log_loss")
    shown = table(
        "Rejection predictors, scored on held-out prompts",
        "predictor|AUC:.3f|false acceptance at 80 % recall:.3f|ECE:.3f|log loss:.3f",
        ((_chosen(name, report), *(row[k] for k in figures)) for name, row in report["held_out"].items()),
    )
    output().print(shown)
    output().print(report["explanation"], markup=False)
