"""One self-contained page: no script, no font, no image and no style from anywhere else."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources

from wispprof.reporting import theme


@dataclass(frozen=True)
class Tile:
    """One figure of the head: what it is, its value, its unit."""

    name: str
    value: str
    unit: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page. ``body`` is HTML; ``title`` and ``draft_ahead`` are plain text."""

    anchor: str
    title: str
    draft_ahead: str
    body: str


@dataclass(frozen=True)
class Page:
    """``headline`` is the finding in one sentence, ``draft_ahead`` what it was found on."""

    title: str
    headline: str
    draft_ahead: str
    tiles: Sequence[Tile] = ()
    sections: Sequence[Section] = field(default=())
    footer: str = ""

    def render(self) -> str:
        """The whole page as HTML."""
        head = f'<dl class="tiles">{"".join(map(_tile, self.tiles))}</dl>' if self.tiles else ""
        sections = "\n".join(map(_section, self.sections))
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<title>{html.escape(self.title)}</title>"
            f"<style>{theme.CSS_VARIABLES}\n{_css()}</style></head>\n<body>"
            f'<header><p class="brand">wispprof</p><h1>{html.escape(self.headline)}</h1>'
            f'<p class="lead">{html.escape(self.draft_ahead)}</p>{head}</header>\n'
            f"<main>{sections}</main>\n<footer>{html.escape(self.footer)}</footer></body></html>\n"
        )


def _tile(tile: Tile) -> str:
    unit = f"<small>{html.escape(tile.unit)}</small>" if tile.unit else ""
    name, value = html.escape(tile.name), html.escape(tile.value)
    return f'<div class="tile"><dt>{name}</dt><dd>{value}{unit}</dd></div>'


def _section(section: Section) -> str:
    title = f"<h2>{html.escape(section.title)}</h2>"
    return f'<section id="{section.anchor}">{title}{paragraph(section.draft_ahead)}{section.body}</section>'


@cache
def _css() -> str:
    return (resources.files("wispprof.reporting") / "page.css").read_text()


def paragraph(text: str) -> str:
    """Plain text as a paragraph; nothing where there is none."""
    return f"<p>{html.escape(text)}</p>" if text else ""


def figure(inline_svg: str, narrow: bool = False, note: str = "") -> str:
    """A figure with an optional note under it."""
    caption = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return f"<figure{' class=narrow' if narrow else ''}>{inline_svg}</figure>{caption}"


def facts(entries: Sequence[tuple[str, str]]) -> str:
    """Name and value pairs, one under the other."""
    rows = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in entries if v)
    return f'<dl class="facts">{rows}</dl>'
