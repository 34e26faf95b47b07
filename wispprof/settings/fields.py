"""How a setting is declared: a dataclass field that carries its help, unit, bounds and choices.

The command line, the environment, the settings file and their documentation are made from these fields
(:mod:`wispprof.cli.options`). :class:`Settings` checks every value against them, whoever set it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from types import NoneType, SimpleNamespace, UnionType
from typing import Any, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from wispprof.errors import SettingsError, nearest

_KEY = "setting"


@dataclass(frozen=True, slots=True)
class FieldInfo:
    """What a field says of itself. ``option``: its name outside Python, if that is not the field's.

    ``secret`` values are kept out of ``repr``, messages and help. ``parse`` reads one text of the command
    line; a field that is a tuple or a mapping gets the results of all of them. ``variable``: environment
    variable that every command with the field reads if its own is not set.
    """

    help: str
    unit: str = ""
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    option: str = ""
    secret: bool = False
    parse: Callable[[str], Any] | None = None
    variable: str = ""

    @property
    def bounds(self) -> str:
        """The bounds in words; empty if there are none."""
        low, high = self.minimum, self.maximum
        if low is not None and high is not None:
            return f"{low:g} … {high:g}"
        if low is not None:
            return f"at least {low:g}"
        return "" if high is None else f"at most {high:g}"


@dataclass(frozen=True, slots=True)
class Declared:
    """One declared field: its ``kind`` is the type of a value, or of one entry if it is ``many``."""

    name: str
    key: str
    setting: FieldInfo
    kind: type
    optional: bool
    many: bool
    default: Any

    def check(self, value: Any) -> None:
        """Raise :class:`SettingsError` if the field must not have this value."""
        if value is None and self.optional:
            return
        if not self.many:
            self._check_one(value)
        elif isinstance(value, str) or not isinstance(value, tuple | list | Mapping):
            raise SettingsError(f"{self.name} must be a list, got {self._shown(value)}.")
        elif self.setting.parse is None:
            for entry in value:
                self._check_one(entry)

    def _shown(self, value: Any) -> str:
        return "a hidden value" if self.setting.secret else repr(value)

    def _check_one(self, value: Any) -> None:
        of = self.setting
        if not _fits(value, self.kind):
            raise SettingsError(f"{self.name} must be {_KINDS[self.kind]}, got {self._shown(value)}.")
        if of.choices and value not in of.choices:
            choices = " or ".join(choice or "empty" for choice in of.choices)
            raise SettingsError(f"{self.name} must be {choices}, got {value!r}.", nearest(value, of.choices))
        if of.bounds:
            low = -math.inf if of.minimum is None else of.minimum
            high = math.inf if of.maximum is None else of.maximum
            if not low <= value <= high:
                raise SettingsError(f"{self.name} must be {of.bounds}, got {value}.")


def setting(default: Any, help: str, **more: Any) -> Any:
    """A field with a default and what :class:`FieldInfo` says of it."""
    of = FieldInfo(help, **more)
    metadata = {_KEY: of}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata, repr=not of.secret)
    return field(default=default, metadata=metadata, repr=not of.secret)


class Settings:
    """Base of all settings: checks every declared field, then :meth:`check_together`."""

    __slots__ = ()

    @classmethod
    def of(cls, **options: Any) -> Self:
        """Defaults but for some fields, wherever they are nested, by their own names or by those of the
        command line with ``_`` for ``-``. Raises :class:`SettingsError` for a name that is none.

        >>> from wispprof.settings.edge_settings import EdgeSettings
        >>> EdgeSettings.of(server="gpu-box:8200", give_up_ms=5000.0).client.give_up_ms
        5000.0
        """
        known = _keys(cls)
        for name in options:
            if name not in known:
                raise SettingsError(f"{cls.__name__} has no option {name!r}.", nearest(name, sorted(known)))
        return _with(cls(), options)

    def __post_init__(self) -> None:
        for each in declared(type(self)):
            each.check(getattr(self, each.name))
        self.check_together()

    def check_together(self) -> None:
        """Raise :class:`SettingsError` if values that are allowed alone contradict each other."""


S = TypeVar("S", bound=Settings)


def declared(kind: Any) -> tuple[Declared, ...]:
    """The declared fields of a settings class; nested settings are not among them."""
    return _declared(kind)


def nested(kind: Any) -> tuple[tuple[str, type[Settings]], ...]:
    """Fields of a settings class that are settings themselves."""
    return _nested(kind)


def _keys(kind: type[Settings]) -> set[str]:
    inner = (_keys(type_) for _, type_ in nested(kind))
    return {name for each in declared(kind) for name in (each.key, each.name)}.union(*inner)


def _with(base: S, options: Mapping[str, Any]) -> S:
    values = {
        each.name: options[name]
        for each in declared(type(base))
        for name in {each.key, each.name} & options.keys()
    }
    values |= {name: _with(getattr(base, name), options) for name, _ in nested(type(base))}
    return replace(base, **values)  # type: ignore[type-var]


@cache
def _declared(kind: type[Any]) -> tuple[Declared, ...]:
    found = []
    for each, hint in _hinted(kind):
        of: FieldInfo | None = each.metadata.get(_KEY)
        if of is None:
            continue
        default = None if each.default is MISSING else each.default
        if each.default_factory is not MISSING:
            default = each.default_factory()
        parts, optional = (hint,), False
        if get_origin(hint) in (Union, UnionType):
            parts = tuple(part for part in get_args(hint) if part is not NoneType)
            optional = True
        many = get_origin(parts[0]) in (tuple, dict)
        entry = str if of.parse else get_args(parts[0])[0] if many else parts[0]
        key = (of.option or each.name).replace("-", "_")
        found.append(Declared(each.name, key, of, entry, optional, many, default))
    return tuple(found)


@cache
def _nested(kind: type[Any]) -> tuple[tuple[str, type[Settings]], ...]:
    return tuple(
        (each.name, hint)
        for each, hint in _hinted(kind)
        if isinstance(hint, type) and issubclass(hint, Settings)
    )


def _hinted(kind: type[Any]) -> list[tuple[Any, Any]]:
    # Annotations of other fields may name types that are imported for type checkers only.
    scope = vars(sys.modules[kind.__module__])
    chosen = [each for each in fields(kind) if _KEY in each.metadata or str(each.type) in scope]
    names = SimpleNamespace(__annotations__={each.name: each.type for each in chosen})
    hints = get_type_hints(names, globalns=scope)
    return [(each, hints[each.name]) for each in chosen]


_KINDS: Mapping[type, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
}


def _fits(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)
