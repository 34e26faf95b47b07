"""Find policies, controllers, estimators, predictors, drafters and engines by name.

A name is one of three things, tried in this order:

- a built-in, such as ``wisp``;
- an entry point of an installed package, in the group ``wispprof.policies``, ``wispprof.controllers``,
  ``wispprof.estimators``, ``wispprof.predictors``, ``wispprof.drafters`` or ``wispprof.engines``;
- ``module:attribute``, such as ``my_package.batching:MyPolicy``; the module is installed, or a file in the
  working folder.

See docs/extending.md.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from wispprof.errors import PluginError, suggestion

__all__ = ["GROUPS", "load", "names"]

GROUPS = ("policies", "controllers", "estimators", "predictors", "drafters", "engines")
"""Entry point groups, each under the prefix ``wispprof.``."""

Builtin = Mapping[str, Callable[..., Any]]


def load(group: str, name: str, builtin: Builtin) -> Callable[..., Any]:
    """Return the class or function that ``name`` stands for in ``group``.

    ``builtin`` maps the group's own names to classes or functions.
    Raises :class:`~wispprof.errors.PluginError` if nothing has that name or its module cannot be imported.
    """
    if name in builtin:
        return builtin[name]
    found = tuple(entry_points(group=f"wispprof.{group}", name=name))
    if found:
        return _imported(found[0].load, group, name)
    module, separator, attribute = name.partition(":")
    if separator and module and attribute:
        return _imported(lambda: _attribute(module, attribute), group, name)
    raise PluginError(
        f"Unknown name {name!r} in {group}.",
        suggestion(name, names(group, builtin), ", or MODULE:NAME"),
    )


def names(group: str, builtin: Builtin) -> tuple[str, ...]:
    """Every name that :func:`load` knows in ``group``: built-ins first, then installed entry points."""
    installed = sorted(point.name for point in entry_points(group=f"wispprof.{group}"))
    return tuple(dict.fromkeys((*builtin, *installed)))


def _imported(load_one: Callable[[], Any], group: str, name: str) -> Callable[..., Any]:
    try:
        made = load_one()
    except (ImportError, AttributeError) as err:
        raise PluginError(
            f"Cannot load {name!r} for {group}: {err}.",
            "Check the name; install its package, or run where its file lies.",
        ) from err
    if not callable(made):
        raise PluginError(f"{name!r} is not a class or function.", "Name a class or a function.")
    return made  # type: ignore[no-any-return]


def _attribute(module: str, attribute: str) -> Any:
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)  # The console script's path does not have it, unlike that of `python -m`.
    made: Any = import_module(module)
    for part in attribute.split("."):
        made = getattr(made, part)
    return made
