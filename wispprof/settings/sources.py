"""Settings from a file and from the environment, for every option of every command.

Each room keeps its own frozen settings with its own defaults, and a command's options take their
defaults from there. Between those defaults and what is typed stand two more layers::

    typed option  >  WISPPROF_SERVE_PORT=9000  >  wispprof.toml: [serve] port = 9000  >  default

A section of the file is named like the command, an entry like its long option. The file is
``wispprof.toml`` in the working folder, or what ``--config`` or ``WISPPROF_CONFIG`` names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from wispprof.errors import WispprofError

__all__ = ["ENV_PREFIX", "FILE_NAME", "Config", "ConfigError", "Known", "read_config"]

FILE_NAME = "wispprof.toml"
ENV_PREFIX = "WISPPROF"

Known = Mapping[str, "Known | None"]
"""Names that may appear: a section maps to what it may hold, an option to ``None``."""

T = TypeVar("T")


class ConfigError(WispprofError):
    """The settings file cannot be used."""


@dataclass(frozen=True)
class Config:
    """What a settings file says: ``sections`` by command, names with underscores, values as in TOML.

    ``path`` is ``None`` where there is no file.
    """

    sections: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None

    def check(self, known: Known) -> None:
        """Raise :class:`ConfigError` for the first section or entry that no command knows."""
        self._check(self.sections, known, "")

    def section(self, name: str) -> dict[str, Any]:
        """Entries of one command; empty where the file says nothing."""
        return dict(self.sections.get(name, {}))

    def settings(self, kind: type[T], name: str) -> T:
        """A room's settings (a dataclass) with what section ``name`` says of its fields."""
        given = self.section(name)
        wanted = {f.name: given[f.name] for f in fields(kind) if f.name in given}  # type: ignore[arg-type]
        try:
            return kind(**wanted)
        except (TypeError, ValueError) as err:
            raise ConfigError(f"Section [{name}] of {self.path}: {err}.", "Correct it.") from None

    def _check(self, given: Mapping[str, Any], known: Known, where: str) -> None:
        import difflib

        for name, value in given.items():
            spelled = name.replace("_", "-")
            if name not in known:
                options = [n.replace("_", "-") for n in known]
                close = difflib.get_close_matches(spelled, options, 1)
                what = f"entry {spelled!r} in [{where}]" if where else f"section [{spelled}]"
                raise ConfigError(
                    f"{self.path} has an unknown {what}.",
                    f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(options)}.",
                )
            inner = known[name]
            if (inner is None) == isinstance(value, Mapping):
                raise ConfigError(
                    f"{self.path}: {spelled!r} must {'not ' if inner is None else ''}be a section.",
                    "See docs/config.md for an example.",
                )
            if inner is not None:
                self._check(value, inner, f"{where}.{spelled}" if where else spelled)


def read_config(file: Path | None = None, folder: Path | None = None) -> Config:
    """Read ``file``, or ``wispprof.toml`` in ``folder`` (the working folder) where there is one.

    Raises :class:`ConfigError` where a named file is missing or the file is not TOML.
    """
    import tomllib

    path = file or (folder or Path.cwd()) / FILE_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if file is None:
            return Config()
        raise ConfigError(f"There is no settings file {file}.", "Check --config.") from None
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"{path} cannot be read: {err}.", "Name a text file.") from None
    try:
        return Config(_underscored(tomllib.loads(text)), path)
    except tomllib.TOMLDecodeError as err:
        raise ConfigError(f"{path} is not TOML: {err}.", "Correct that line.") from None


def _underscored(section: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name.replace("-", "_"): _underscored(value) if isinstance(value, Mapping) else value
        for name, value in section.items()
    }
