"""Command-line options made from settings.

A command names the settings it needs in its signature, and gets them built from its options::

    @with_settings
    def generate(prompt: ..., edge: EdgeSettings, sampling: SamplingSettings) -> None: ...

A parameter's default, if it has one, replaces the defaults of its settings. Two settings of one command
that declare the same name share one option.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from wispprof.settings.fields import Declared, Settings, declared, nested
from wispprof.settings.sources import ENV_PREFIX

JsonFlag = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")
]
"""The ``--json`` option: ``def command(as_json: JsonFlag = False)``."""

Jobs = Annotated[int | None, typer.Option(min=1, help="Processes; default: one per core.")]

OutputFile = Annotated[Path, typer.Option("--out", "-o", help="File to write.")]


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for each field of the settings that its signature names.

    Typer reads options off a signature, so that is what is built here. The result's ``declared_options``
    are the fields by option name, for the documentation.
    """
    hints = get_type_hints(command, include_extras=True)
    options: dict[str, Parameter] = {}
    fields: dict[str, Declared] = {}
    groups: dict[str, Settings] = {}
    for name, parameter in signature(command).parameters.items():
        kind = hints[name]
        if isinstance(kind, type) and issubclass(kind, Settings):
            groups[name] = kind() if parameter.default is Parameter.empty else parameter.default
            for field, default in _flattened(groups[name]):
                assert field.key in fields or field.key not in options, field.key
                fields.setdefault(field.key, field)
                options.setdefault(field.key, _option(field, default, command.__name__))
        else:
            assert name not in fields, f"{command.__name__}: {name} is a setting, too"
            options[name] = parameter.replace(annotation=kind, kind=Parameter.KEYWORD_ONLY)

    @wraps(command)
    def run(**given: Any) -> None:
        built = {name: _built(base, given) for name, base in groups.items()}
        own = {name: value for name, value in given.items() if name not in fields}
        command(**own, **built)

    run.__signature__ = Signature(list(options.values()))  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in options.values()}
    run.declared_options = fields  # type: ignore[attr-defined]
    return run


def _flattened(base: Settings) -> list[tuple[Declared, Any]]:
    found = [(field, getattr(base, field.name)) for field in declared(type(base))]
    for name, _ in nested(type(base)):
        found += _flattened(getattr(base, name))
    return found


def _built(base: Settings, given: Mapping[str, Any]) -> Settings:
    values: dict[str, Any] = {}
    for field in declared(type(base)):
        value, parse = given[field.key], field.setting.parse
        if field.many:
            entries = value or ()
            value = [parse(entry) for entry in entries] if parse else entries
            value = type(getattr(base, field.name))(value)
        elif parse is not None and value is not None:
            value = parse(value)
        values[field.name] = value
    values |= {name: _built(getattr(base, name), given) for name, _ in nested(type(base))}
    return replace(base, **values)  # type: ignore[type-var]


def _option(field: Declared, default: Any, command: str) -> Parameter:
    of = field.setting
    kind: Any = field.kind
    named = re.search(rf"(?<!\w){re.escape(of.unit)}(?!\w)", of.help)
    if field.many:
        kind, default = list[kind], list(default)
    numeric = field.kind in (int, float)
    own = f"{ENV_PREFIX}_{command}_{field.key}".upper()
    option = typer.Option(
        f"--{field.key.replace('_', '-')}",
        help=of.help if named else f"{of.help[:-1]} ({of.unit}).",
        min=of.minimum if numeric else None,
        max=of.maximum if numeric else None,
        metavar="|".join(filter(None, of.choices)) or None,
        show_default=not of.secret and bool(default or numeric),
        envvar=[own, of.variable] if of.variable else None,
    )
    if field.optional:
        kind = kind | None
    annotation: Any = Annotated[kind, option]
    return Parameter(field.key, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
