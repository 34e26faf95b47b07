"""Where the files that ship with the package lie: beside it in a checkout, inside it in a wheel."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from wispprof.errors import ArtifactMissing

__all__ = ["path", "roots"]

PACKAGE = Path(__file__).resolve().parent.parent


def roots() -> tuple[Path, ...]:
    """Folders that are searched, in order: the wheel's ``_bundled``, then the checkout's root."""
    found = [PACKAGE / "_bundled"]
    checkout = PACKAGE.parent
    # site-packages may hold a stranger's ``models`` folder: only a real checkout counts.
    if (checkout / "pyproject.toml").is_file():
        found.append(checkout)
    return tuple(found)


def path(relative: str) -> Path:
    """Find a shipped file or folder, such as ``models/reference-pair/target`` or ``profiles/x``.

    ``relative`` uses forward slashes and may not leave the shipped folders (ValueError). Raises
    :class:`ArtifactMissing` where this installation does not hold it.
    """
    parts = PurePosixPath(relative)
    if parts.is_absolute() or ".." in parts.parts:
        raise ValueError(f"bundled paths are relative to the package's own files, got {relative!r}")
    for root in roots():
        candidate = root.joinpath(*parts.parts)
        if candidate.exists():
            return candidate
    looked = " or ".join(str(root) for root in roots())
    raise ArtifactMissing(
        f"This installation does not hold {relative} (looked in {looked}).",
        "Install a complete wheel or checkout, or name your own file instead.",
    )
