"""Value of a rejection predictor: whole rounds replayed over an acceptance trace.

A round drafts k tokens, crosses the link, is verified and commits the accepted prefix and one more token.
How far a rule drafts at each position does not depend on speed, so a rule is walked over the trace once and
then priced for every device and link.

Rules: ``fixed`` k; ``threshold``, stop at the first token whose acceptance probability is below a value
(WISP, SLED); ``gain``, draft on while the probability that the next token counts exceeds a value; and the
clairvoyant, which knows the first rejection. Each rule's value is tuned on other prompts than it is tested
on, for one of two aims: ``fast``, most tokens/s, and ``frugal``, least wasted drafting time among values
faster than the best fixed k. The best fixed k and the clairvoyant are picked on the test prompts, which
favours them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from wispprof.artifacts.rows import TracePath
from wispprof.errors import FitError
from wispprof.fitting.batch_totals import FloatArray
from wispprof.types import RejectionPredictor

DEVICES = {"slow": 66.0, "middle": 16.0, "fast": 5.0}
"""Milliseconds per drafted token: about a Raspberry Pi 5, a laptop CPU, a Jetson or laptop GPU."""
RTTS_MS = (10.0, 30.0, 80.0)
FRUGAL_MARGIN = 1.01
"""A frugal value must beat the best fixed k by this factor on the tuning prompts."""
VALUES = tuple(np.round(np.concatenate([np.linspace(0.02, 0.9, 23), [0.93, 0.96]]), 3).tolist())

Lengths = Sequence[np.ndarray]


@dataclass(frozen=True)
class RoundCost:
    """Cost of a round. ``server_ms``: queue and the fixed part of a verify step; ``row_ms``: per verified
    token; ``decide_ms``: of the controller, per drafted token."""

    draft_ms: float
    rtt_ms: float
    server_ms: float = 30.0
    row_ms: float = 0.2
    decide_ms: float = 0.0


class Walk(NamedTuple):
    """Counts over whole paths. ``wasted``: tokens drafted after the first rejected one of a round."""

    tokens: int
    rounds: int
    drafted: int
    accepted: int
    wasted: int

    def total_ms(self, cost: RoundCost) -> float:
        """Time of all rounds, one after the other."""
        rows = self.drafted + self.rounds
        drafting = self.drafted * (cost.draft_ms + cost.decide_ms)
        return drafting + self.rounds * (cost.rtt_ms + cost.server_ms) + rows * cost.row_ms

    def tokens_per_s(self, cost: RoundCost) -> float:
        return 1000.0 * self.tokens / self.total_ms(cost)

    def wasted_ms(self, cost: RoundCost) -> float:
        """Wasted drafting time per committed token."""
        return self.wasted * cost.draft_ms / self.tokens

    def drafting_ms(self, cost: RoundCost) -> float:
        """Drafting time per committed token."""
        return self.drafted * cost.draft_ms / self.tokens


def count_rounds(rounds: Iterable[tuple[int, int]]) -> Walk:
    """The counts of rounds given as (drafted, accepted)."""
    tokens = count = drafted = accepted = wasted = 0
    for length, good in rounds:
        drafted += length
        accepted += good
        wasted += max(0, length - good - 1)
        tokens += good + 1
        count += 1
    if count == 0:
        raise FitError("No path of the trace is long enough to replay.", "Take longer paths than the depth.")
    return Walk(tokens, count, drafted, accepted, wasted)


def walk(paths: Sequence[TracePath], lengths: Lengths) -> Walk:
    """Play rounds from the start of each path; ``lengths[p][i]`` tokens are drafted at position i."""
    return count_rounds(_rounds(paths, lengths))


def _rounds(paths: Sequence[TracePath], lengths: Lengths) -> Iterator[tuple[int, int]]:
    for path, planned in zip(paths, lengths, strict=True):
        accepted, plan = path.accepted.tolist(), planned.tolist()
        position, rows = 0, path.scored_rows()
        while position < rows:
            good = min(plan[position], accepted[position])
            yield plan[position], good
            position += good + 1


def acceptance_tables(paths: Sequence[TracePath], predictor: RejectionPredictor) -> list[FloatArray]:
    """P(token j of the proposal at position i is accepted | those before were), (m, K) per path."""
    tables = []
    for path in paths:
        rows, depth = path.features.shape[:2]
        flat = np.asarray(path.features, dtype=np.float64).reshape(-1, 4)
        depths = np.tile(np.arange(depth), rows)
        tables.append(np.asarray(predictor.acceptance_prob_batch(flat, depths)).reshape(rows, depth))
    return tables


def fixed_lengths(paths: Sequence[TracePath], k: int) -> Lengths:
    return [np.full(len(path.accepted), k) for path in paths]


def clairvoyant_lengths(paths: Sequence[TracePath], most: int) -> Lengths:
    """Exactly what will be accepted, at most ``most``."""
    return [np.minimum(path.accepted, most) for path in paths]


def threshold_lengths(tables: Iterable[FloatArray], value: float) -> Lengths:
    """Stop after the first token whose acceptance probability is below ``value``; that token is sent too."""
    return [_first(table < value) for table in tables]


def gain_lengths(tables: Iterable[FloatArray], value: float, typical: FloatArray) -> Lengths:
    """Stop when the probability that one more token counts falls below ``value``.

    ``typical`` (K,): mean acceptance probability by depth, used for the token not yet drafted.
    """
    lengths = []
    for table in tables:
        reach = np.cumprod(table, axis=1)
        following = np.append(typical[1:], 0.0)
        length = _first(reach * following < value)
        lengths.append(length if typical[0] >= value else np.zeros_like(length))
    return lengths


def _first(stop: np.ndarray) -> np.ndarray:
    """Tokens drafted when the rule stops after the first True of each row, or never."""
    stop = np.column_stack([stop[:, :-1], np.ones(len(stop), dtype=bool)])
    lengths: np.ndarray = np.argmax(stop, axis=1) + 1
    return lengths


@dataclass(frozen=True)
class Fold:
    """One split of the prompts: ``tune`` to choose the rules' values, ``test`` to score them, and predictors
    fitted on neither."""

    tune: Sequence[TracePath]
    test: Sequence[TracePath]
    predictors: Mapping[str, RejectionPredictor]


def compare_controllers(
    folds: Sequence[Fold],
    devices: dict[str, float] | None = None,
    rtts_ms: Sequence[float] = RTTS_MS,
    base: RoundCost | None = None,
) -> list[dict[str, Any]]:
    """Records of every rule at every device speed and RTT, scored on the folds' test prompts together.

    ``device`` and ``rtt_ms`` name the cell, ``controller`` the rule, ``aim`` what it was tuned for;
    ``value`` is the rule's k or threshold (the median over folds). Results: ``tokens_per_s``;
    ``wasted_ms`` and ``drafting_ms`` per committed token; ``accepted`` per round.
    """
    base = base or RoundCost(1.0, 1.0)
    cells = [
        (name, replace(base, draft_ms=draft, rtt_ms=rtt))
        for name, draft in (devices or DEVICES).items()
        for rtt in rtts_ms
    ]
    depth = folds[0].test[0].depth
    test = [path for fold in folds for path in fold.test]
    fixed = {float(k): walk(test, fixed_lengths(test, k)) for k in range(depth + 1)}
    clairvoyant = {float(k): walk(test, clairvoyant_lengths(test, k)) for k in range(depth + 1)}
    played = [_play(fold, depth) for fold in folds]
    records = []
    for device, cost in cells:
        for name, walks in (("fixed", fixed), ("clairvoyant", clairvoyant)):
            best = _fastest(walks, cost)
            records.append(_record(device, cost, name, best, walks[best]))
        for name in played[0][1]:
            for aim, choose in (("fast", _fastest), ("frugal", _frugal)):
                values = [choose(rules[name][0], cost, tuned_fixed) for tuned_fixed, rules in played]
                chosen = [value for value in values if value is not None]
                if len(chosen) < len(played):
                    continue
                on_tune, on_test = (
                    _together(
                        rules[name][side][value] for (_, rules), value in zip(played, chosen, strict=True)
                    )
                    for side in (0, 1)
                )
                value = float(np.median(chosen))
                records.append(_record(device, cost, name, value, on_test, on_tune, aim))
    return records


Walks = dict[float, Walk]


def _play(fold: Fold, depth: int) -> tuple[Walks, dict[str, tuple[Walks, Walks]]]:
    """Walks of a fold by value: fixed k over the tuning prompts, and each rule over tuning and test."""
    fixed = {float(k): walk(fold.tune, fixed_lengths(fold.tune, k)) for k in range(depth + 1)}
    rules: dict[str, tuple[Walks, Walks]] = {}
    for name, predictor in fold.predictors.items():
        parts = [(paths, acceptance_tables(paths, predictor)) for paths in (fold.tune, fold.test)]
        tuned = parts[0][1]
        typical = np.array([np.concatenate([t[:, j] for t in tuned]).mean() for j in range(depth)])
        for rule, lengths in (
            ("threshold", threshold_lengths),
            ("gain", partial(gain_lengths, typical=typical)),
        ):
            on_tune, on_test = (
                {v: walk(paths, lengths(tables, v)) for v in VALUES} for paths, tables in parts
            )
            rules[f"{rule}:{name}"] = on_tune, on_test
    return fixed, rules


def _together(walks: Iterable[Walk]) -> Walk:
    return Walk(*(sum(counts) for counts in zip(*walks, strict=True)))


def _fastest(walks: Walks, cost: RoundCost, fixed: Walks | None = None) -> float:
    return max(walks, key=lambda v: walks[v].tokens_per_s(cost))


def _frugal(walks: Walks, cost: RoundCost, fixed: Walks) -> float | None:
    """The value of least waste that beats the best of ``fixed`` on the same prompts, if any."""
    enough = FRUGAL_MARGIN * fixed[_fastest(fixed, cost)].tokens_per_s(cost)
    able = [v for v in walks if walks[v].tokens_per_s(cost) >= enough]
    return min(able, key=lambda v: walks[v].wasted) if able else None


def summarise(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per device and RTT: the best fixed k, the rule tuned for most tokens/s (``fastest``) and for least
    waste (``frugal``, None if none beat the best fixed k on the tuning prompts), and the clairvoyant.
    """
    cells: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for record in records:
        cells.setdefault((record["device"], record["rtt_ms"]), []).append(record)
    summary = []
    for (device, rtt), rows in cells.items():
        named = {r["controller"]: r for r in rows if not r["aim"]}
        fast = (r for r in rows if r["aim"] == "fast")
        frugal = (r for r in rows if r["aim"] == "frugal")
        summary.append(
            {
                "device": device,
                "rtt_ms": rtt,
                "fixed": named["fixed"],
                "fastest": max(fast, key=lambda r: r["tuned_tokens_per_s"]),
                "frugal": min(frugal, key=lambda r: r["tuned_wasted_ms"], default=None),
                "clairvoyant": named["clairvoyant"],
            }
        )
    return summary


def _record(
    device: str,
    cost: RoundCost,
    name: str,
    value: float,
    result: Walk,
    on_tune: Walk | None = None,
    aim: str = "",
) -> dict[str, Any]:
    tuned = on_tune or result
    return {
        "device": device,
        "draft_ms": cost.draft_ms,
        "rtt_ms": cost.rtt_ms,
        "controller": name,
        "aim": aim,
        "value": value,
        "tuned_tokens_per_s": tuned.tokens_per_s(cost),
        "tuned_wasted_ms": tuned.wasted_ms(cost),
        "tokens_per_s": result.tokens_per_s(cost),
        "wasted_ms": result.wasted_ms(cost),
        "drafting_ms": result.drafting_ms(cost),
        "accepted": result.accepted / result.rounds,
        "drafted": result.drafted / result.rounds,
    }
