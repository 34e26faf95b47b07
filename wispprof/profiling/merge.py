"""Several profiles of one model on one machine made into one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

from wispprof.artifacts import Profile, make_profile
from wispprof.artifacts.manifest import ModelInfo
from wispprof.artifacts.provenance import command_line
from wispprof.artifacts.records import LinkRow
from wispprof.artifacts.rows import Row
from wispprof.errors import ProfileError

__all__ = ["merge_profiles"]


def merge_profiles(profiles: Sequence[Profile]) -> Profile:
    """One profile with the rows of all: same kind, model, engine and machine.

    Where several hold a key, the row without flags wins, then the one with more samples. Orders go on from
    profile to profile. Sentinels are kept where all are of one shape, so that they tell how slow the
    machine was from one to the next; otherwise none are. Raises :class:`ProfileError` where they differ.
    """
    if len(profiles) < 2:
        raise ProfileError("Merging needs two profiles or more.", "Name them all.")
    first = profiles[0]
    for other in profiles[1:]:
        for what, one, two in (
            ("kinds", first.manifest.kind, other.manifest.kind),
            ("models", first.manifest.model, other.manifest.model),
            ("engines", _identity(first), _identity(other)),
            ("machines", _machine(first), _machine(other)),
        ):
            if one != two:
                one, two = _apart(one, two)
                raise ProfileError(
                    f"The profiles are of different {what}: {one} and {two}.",
                    "Merge only profiles of the same model on the same machine.",
                )
    best: dict[str, Row] = {}
    looks: list[Row] = []
    start = 0
    for profile in profiles:
        for row in (_later(row, start) for row in profile.rows):
            if row.kind == "sentinel":
                looks.append(row)
            elif row.key not in best or _worth(row) > _worth(best[row.key]):
                best[row.key] = row
        start = 1 + max((_last(row) for row in (*best.values(), *looks)), default=0)
    if len({row.key for row in looks}) > 1:
        looks = []
    rows = sorted((*looks, *best.values()), key=lambda row: row.order)
    manifest = replace(
        first.manifest,
        command=command_line(),
        ended=max(p.manifest.ended for p in profiles),
        started=min(p.manifest.started for p in profiles),
        summary={**first.manifest.summary, "merged": [p.hash for p in profiles]},
    )
    return make_profile(manifest, rows)


def _worth(row: Row) -> tuple[int, int]:
    return -len(row.flags), len(row.samples_ms)


def _identity(profile: Profile) -> dict[str, object]:
    """What must be equal of an engine; room for sessions does not change a step's time."""
    engine = profile.manifest.engine
    stated = {name: engine.get(name) for name in ("backend", "device", "threads")}
    return {
        **stated,
        "attention": engine.get("attention", "dense"),
        "graphs": bool(engine.get("graphs")),
    }


def _apart(one: object, two: object) -> tuple[object, object]:
    """Two things that differ, for a reader: of named properties only those that do."""
    if isinstance(one, ModelInfo) and isinstance(two, ModelInfo):
        one, two = asdict(one), asdict(two)
    if not isinstance(one, dict) or not isinstance(two, dict):
        return one, two
    names = [name for name in one if one[name] != two[name]]
    return tuple(", ".join(f"{name} {its[name]}" for name in names) for its in (one, two))


def _machine(profile: Profile) -> object:
    return profile.manifest.hardware.get("hash") or profile.manifest.citation


def _later(row: Row, start: int) -> Row:
    """The row with every place in its order of measurement moved on by ``start``."""
    if isinstance(row, LinkRow):
        return replace(row, order=row.order + start)
    return replace(
        row,
        order=row.order + start,
        visits=tuple((order + start, count) for order, count in row.visits),
        aside_visits=tuple((order + start, count) for order, count in row.aside_visits),
    )


def _last(row: Row) -> int:
    visits = () if isinstance(row, LinkRow) else (*row.visits, *row.aside_visits)
    return max((order for order, _ in visits), default=row.order)
