"""Profiles on disk: ``NAME.jsonl`` of rows and ``NAME.manifest.json`` beside it."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar, cast

from wispprof.artifacts import files
from wispprof.artifacts.document import check_schema
from wispprof.artifacts.manifest import PROFILE_SCHEMA, Manifest
from wispprof.artifacts.rows import (
    MODELLED,
    EdgeRow,
    LinkRow,
    Row,
    StepRow,
    damaged,
    decode_row,
    encode_row,
)
from wispprof.errors import ArtifactDamaged, nearest

FORMAT = "wispprof/profile"
RESTED_MS = 6.0
"""Idle time after which a device pays the whole cost of resuming: threads sleep, caches and clocks have
cooled. Shorter pauses cost their share: 35 % after 2 ms, 72 % after 4, 88 % after 7 on a two-core CPU."""


RowT = TypeVar("RowT", StepRow, EdgeRow, LinkRow)


@dataclass(frozen=True)
class _Measured(Generic[RowT]):
    manifest: Manifest
    rows: tuple[RowT, ...]

    @property
    def hash(self) -> str:
        """Content hash of the rows: the name other artifacts know this profile by."""
        return rows_hash(self.rows)


class ServerProfile(_Measured[StepRow]):
    """Step times of a verifier engine by batch shape."""


class LinkProfile(_Measured[LinkRow]):
    """Round trips and transfer times between an edge and a server."""


class EdgeProfile(_Measured[EdgeRow]):
    """What drafting costs on an edge device."""

    def of_kind(self, kind: str) -> tuple[EdgeRow, ...]:
        """Rows of one kind by rising context."""
        return of_kind(self.rows, kind)

    def draft_ms(self, context: int) -> float:
        """Milliseconds of one draft step over ``context`` cached tokens, as :func:`row_ms`.

        Raises :class:`ArtifactDamaged` without such rows.
        """
        step_ms = row_ms(self.rows, "draft_step", context)
        if step_ms is None:
            raise ArtifactDamaged(
                f"The edge profile of {self.manifest.model.id} has no draft_step rows.",
                "Measure it with profile-edge.",
            )
        return step_ms

    def resume_ms(self, context: int, rested_ms: float = math.inf) -> float:
        """Milliseconds that a rest of ``rested_ms`` adds to the drafting after it."""
        return resume_ms(self.rows, context) * rested_share(rested_ms)

    def drafting_ms(self, context: int, caught_up: float, resumed: float = 0.0) -> float:
        """Mean milliseconds per drafted token.

        A share ``caught_up`` of the steps reads two tokens: the last draft and the target's own one, after
        a round accepted whole. A profile without ``catch_up`` rows counts them like any other step.
        A share ``resumed`` comes after a rest: one over the draft length in round mode.
        """
        step_ms = self.draft_ms(context)
        behind_ms = row_ms(self.rows, "catch_up", context)
        if behind_ms is not None:
            step_ms += caught_up * (behind_ms - step_ms)
        return step_ms + resumed * self.resume_ms(context)


def of_kind(rows: Iterable[EdgeRow], kind: str) -> tuple[EdgeRow, ...]:
    """Rows of one kind by rising context."""
    found = (row for row in rows if row.kind == kind)
    return tuple(sorted(found, key=lambda row: (row.context, row.tokens)))


def row_ms(rows: Iterable[EdgeRow], kind: str, context: int) -> float | None:
    """Median of the rows of this kind, interpolated between their contexts, constant outside them; None
    without such rows."""
    return _between([(row.context, row.median_ms) for row in of_kind(rows, kind)], context)


def resume_ms(rows: Iterable[EdgeRow], context: int) -> float:
    """What a rest adds to the drafting after it: a ``round`` less as many draft steps over the same
    context, never negative, interpolated; 0 if no rounds were measured."""
    listed = list(rows)
    added = [
        (row.context, max(0.0, row.median_ms - row.tokens * step_ms))
        for row in of_kind(listed, "round")
        if (step_ms := row_ms(listed, "draft_step", row.context)) is not None
    ]
    return _between(added, context) or 0.0


def rested_share(rested_ms: float) -> float:
    """How much of :func:`resume_ms` drafting pays after a pause this long: proportional up to
    :data:`RESTED_MS`, all of it beyond."""
    return min(1.0, max(0.0, rested_ms) / RESTED_MS)


def _between(points: Sequence[tuple[int, float]], context: int) -> float | None:
    """Interpolated between points by rising context, constant outside them; None without points."""
    if not points:
        return None
    if context <= points[0][0]:
        return points[0][1]
    for (low, low_ms), (high, high_ms) in itertools.pairwise(points):
        if context <= high:
            return low_ms + (context - low) / max(1, high - low) * (high_ms - low_ms)
    return points[-1][1]


Profile = ServerProfile | EdgeProfile | LinkProfile
PROFILES: dict[str, Callable[..., Profile]] = {
    "server": ServerProfile,
    "edge": EdgeProfile,
    "link": LinkProfile,
}


def profile_files(path: Path) -> tuple[Path, Path]:
    """The files (rows, manifest) that ``NAME``, ``NAME.jsonl`` or ``NAME.manifest.json`` stands for."""
    name = path.name.removesuffix(".manifest.json").removesuffix(".jsonl")
    return path.with_name(f"{name}.jsonl"), path.with_name(f"{name}.manifest.json")


def found_profile(path: Path) -> Path:
    """``path``, or the shipped profile of that name if there is no such file."""
    rows_file, manifest_file = profile_files(path)
    if len(path.parts) > 1 or rows_file.exists() or manifest_file.exists():
        return path
    shipped = (root / "profiles" / rows_file.name for root in files.bundle_roots())
    return next((file for file in shipped if file.exists()), path)


def _shipped() -> list[str]:
    """Names of all shipped profiles."""
    found = (root.joinpath("profiles").glob("*.manifest.json") for root in files.bundle_roots())
    return sorted({path.name.removesuffix(".manifest.json") for path in itertools.chain(*found)})


def rows_hash(rows: Iterable[Row]) -> str:
    """Hash of the rows as they are written."""
    return files.content_hash(b"".join(encode_row(row) for row in rows))


def make_profile(manifest: Manifest, rows: Iterable[Row]) -> Profile:
    """Rows in the order they were measured, with a manifest that states their count and hash."""
    ordered = tuple(sorted(rows, key=lambda row: (row.order, row.key)))
    whole = replace(manifest, rows=len(ordered), rows_hash=rows_hash(ordered))
    return PROFILES[manifest.kind](whole, ordered)


def save_profile(profile: Profile, path: Path) -> str:
    """Write both files atomically, rows first; returns the rows' hash."""
    whole = make_profile(profile.manifest, profile.rows)
    rows_file, manifest_file = profile_files(Path(path))
    body = b"".join(encode_row(row) for row in whole.rows)
    document = {"format": FORMAT, "schema": PROFILE_SCHEMA, **asdict(whole.manifest)}
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False, default=files.plain)
    files.write_atomic(rows_file, body)
    files.write_atomic(manifest_file, (text + "\n").encode())
    return whole.manifest.rows_hash


def load_manifest(path: Path) -> Manifest:
    """The manifest alone; takes names and raises as :func:`load_profile` does."""
    manifest_file = profile_files(found_profile(Path(path)))[1]
    hint = "Name a profile, or make one with profile-server or -edge."
    if not manifest_file.exists():
        hint = f"{nearest(str(path), _shipped())} {hint}".lstrip()
    data = files.read_bytes(manifest_file, "profile manifest", hint)
    document = files.parse_json(data, f"manifest {manifest_file}")
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ArtifactDamaged(f"{manifest_file} is not a profile's manifest.", "Name a profile.")
    check_schema(manifest_file, "profile", document.get("schema"), PROFILE_SCHEMA)
    manifest: Manifest = files.convert(document, Manifest, f"manifest {manifest_file}")
    return manifest


def load_profile(path: Path) -> Profile:
    """Read and check a profile: a file, or a shipped one by its name.

    Raises :class:`ArtifactMissing`, :class:`ArtifactTooNew`, or :class:`ArtifactDamaged` whose message
    names the line and the fault: torn, changed, out of order, repeated, or missing at the end.
    """
    path = found_profile(Path(path))
    rows_file = profile_files(path)[0]
    manifest = load_manifest(path)
    data = files.read_bytes(rows_file, "profile rows", "Restore the .jsonl beside the manifest.")
    rows = _read_rows(data, manifest, rows_file)
    if files.content_hash(data) != manifest.rows_hash:
        raise ArtifactDamaged(
            f"{rows_file}: every line is whole, but together they are not the {manifest.rows} rows "
            "that the manifest describes (content hash differs).",
            "Restore both files from the same run.",
        )
    return make_profile(manifest, rows)


def _read_rows(data: bytes, manifest: Manifest, rows_file: Path) -> list[Row]:
    rows: list[Row] = []
    seen: dict[tuple[str, int], int] = {}
    for number, line in enumerate(data.splitlines(keepends=True), start=1):
        where = f"{rows_file} line {number}"
        if not line.endswith(b"\n"):
            raise damaged(where, "the line is torn (it has no end)")
        row = decode_row(line, manifest.kind, where)
        key = (row.key, row.order)
        if key in seen:
            raise damaged(where, f"repeats the row {row.key!r} of line {seen[key]}")
        if rows and (row.order, row.key) < (rows[-1].order, rows[-1].key):
            raise damaged(where, f"out of order (row {row.order} after row {rows[-1].order})")
        seen[key] = number
        rows.append(row)
    if len(rows) != manifest.rows:
        raise damaged(
            f"{rows_file} line {len(rows)}",
            f"the file ends here with {len(rows)} rows, the manifest says {manifest.rows}",
        )
    return rows


def shipped_servers() -> dict[str, Manifest]:
    """The manifests of shipped server profiles that were modelled from measured operators, by name."""
    found: dict[str, Manifest] = {}
    for root in files.bundle_roots():
        for path in sorted((root / "profiles").glob("*.manifest.json")):
            manifest = load_manifest(path)
            if manifest.kind == "server" and manifest.source == MODELLED:
                found.setdefault(path.name.removesuffix(".manifest.json"), manifest)
    return found


def estimator_beside(path: Path) -> Path:
    """Where the estimator of a profile lies: ``NAME.estimator.json``."""
    rows_file = profile_files(path)[0]
    return rows_file.with_name(f"{rows_file.stem}.estimator.json")


def load_server(path: Path) -> ServerProfile:
    """Load a profile that must be a server's."""
    return cast(ServerProfile, _of_kind(load_profile(path), "server", path))


def load_edge(path: Path) -> EdgeProfile:
    """Load a profile that must be an edge device's."""
    return cast(EdgeProfile, _of_kind(load_profile(path), "edge", path))


def load_link(path: Path) -> LinkProfile:
    """Load a profile that must be a link's."""
    return cast(LinkProfile, _of_kind(load_profile(path), "link", path))


def _of_kind(profile: Profile, kind: str, path: Path) -> Profile:
    if profile.manifest.kind != kind:
        raise ArtifactDamaged(
            f"{path} is a profile of kind {profile.manifest.kind!r}, not {kind!r}.", f"Name a {kind} profile."
        )
    return profile
