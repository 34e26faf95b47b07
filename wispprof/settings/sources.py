"""The settings file, which stands between the environment and the defaults::

    typed option  >  WISPPROF_SERVE_PORT=9000  >  wispprof.toml: [serve] port = 9000  >  default

A section is named like its command, an entry like its long option. The file is ``wispprof.toml`` in the
working folder, or what ``--config`` or ``WISPPROF_CONFIG`` names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wispprof.errors import SettingsError, WispprofError, suggestion

FILE_NAME = "wispprof.toml"
ENV_PREFIX = "WISPPROF"

KnownNames = Mapping[str, "KnownNames | None"]
"""Names that may appear: a section maps to what it may hold, an option to ``None``."""


class ConfigError(WispprofError):
    """The settings file cannot be used."""


@dataclass(frozen=True)
class Config:
    """What a settings file says: ``sections`` by command, names with underscores, values as in TOML.

    ``path`` is ``None`` if there is no file.
    """

    sections: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None

    def check(self, known: KnownNames) -> None:
        """Raise :class:`ConfigError` for the first section or entry that no command knows."""
        _check(self.path, self.sections, known, "")


def read_config(file: Path | None = None, folder: Path | None = None) -> Config:
    """Read ``file``, or ``wispprof.toml`` in ``folder`` (the working folder) if there is one.

    Raises :class:`ConfigError` if a named file is missing or the file is not TOML.
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


def named_value(text: str) -> tuple[str, Any]:
    """``NAME=VALUE`` as name and value: a JSON number, string, list, ``true``, ``false``, or plain text.

    Raises :class:`SettingsError` if there is no name or no value.
    """
    import json

    name, equals, value = text.partition("=")
    if not name or not equals:
        raise SettingsError(f"Expected NAME=VALUE, got {text!r}.", "For example: k_max=8.")
    try:
        return name.strip(), json.loads(value)
    except ValueError:
        return name.strip(), value


def _underscored(section: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name.replace("-", "_"): _underscored(value) if isinstance(value, Mapping) else value
        for name, value in section.items()
    }


def _check(path: Path | None, given: Mapping[str, Any], known: KnownNames, section: str) -> None:
    for name, value in given.items():
        spelled = name.replace("_", "-")
        if name not in known:
            options = [n.replace("_", "-") for n in known]
            what = f"entry {spelled!r} in [{section}]" if section else f"section [{spelled}]"
            raise ConfigError(f"{path} has an unknown {what}.", suggestion(spelled, options))
        inner = known[name]
        if (inner is None) == isinstance(value, Mapping):
            raise ConfigError(
                f"{path}: {spelled!r} must {'not ' if inner is None else ''}be a section.",
                "See docs/config.md for an example.",
            )
        if inner is not None:
            _check(path, value, inner, f"{section}.{spelled}" if section else spelled)
