"""The style of the figures, and their conversion to inline SVG.

matplotlib draws them in fixed colours. CSS variables then replace these colours, so that a figure follows
the light or dark theme of its page. The series colours are those of Okabe and Ito
(https://jfly.uni-koeln.de/color/), which are safe for colour blindness; each series has its own marker.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, PAPER = "#1c1b22", "#66646f", "#dddce3", "#fefefd"
SERIES = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9")
ACCENT = SERIES[0]
MARKERS = ("o", "s", "^", "D", "v", "P")

_LIGHT = (INK, MUTED, GRID, PAPER, *SERIES)
_DARK = (
    *("#eceaf2", "#a3a0ae", "#34323d", "#17161c"),
    *("#4aa8e0", "#f0b429", "#2fc296", "#f0793a", "#e09cc3", "#8fd0f5"),
)
_NAMES = ("ink", "muted", "grid", "paper", *(f"s{i}" for i in range(len(SERIES))))

_POLICIES = {"server-only": 5, "sled": 1, "specedge": 4, "fcfs": 2, "wisp": 0, "wispprof": 3}


def _block(colors: tuple[str, ...]) -> str:
    return ";".join(f"--{name}:{color}" for name, color in zip(_NAMES, colors, strict=True))


CSS_VARIABLES = (
    f":root{{color-scheme:light dark;{_block(_LIGHT)}}}"
    f"@media (prefers-color-scheme:dark){{:root{{{_block(_DARK)}}}}}"
)
"""The colours of page and figures as CSS variables, for light and dark."""

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "svg.fonttype": "none",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


@contextmanager
def canvas(width: float, height: float, columns: int = 1, **grid: Any) -> Iterator[Any]:
    """A figure of ``width`` × ``height`` inches with one row of axes, in the style of the report.

    Yields ``(figure, axes)`` with ``axes`` a list of length ``columns``. Uses no global state.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(1, columns, squeeze=False, **grid)[0]
        yield figure, list(axes)


def finish(axes: Axes, x: str, y: str, title: str = "") -> None:
    """Label both axes (with units) and set the title."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if title:
        axes.set_title(title)


def policy_color(name: str) -> str:
    """The colour of a policy, equal in all figures."""
    return SERIES[_POLICIES.get(name, sum(name.encode()) % len(SERIES))]


def ramp(count: int) -> list[str]:
    """``count`` colours of viridis, without the ends that vanish on black or white."""
    import matplotlib
    from matplotlib.colors import to_hex

    colors = matplotlib.colormaps["viridis"]
    if count == 1:
        return [ACCENT]
    return [to_hex(colors(0.18 + 0.62 * i / (count - 1))) for i in range(count)]


def svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an inline SVG element that takes its colours from the page. Deterministic.

    ``name`` makes ids unique among the figures of a page; ``label`` is the text for screen readers.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]+)"', text)
    opening = f'<svg viewBox="{box[1] if box else ""}" role="img" aria-label="{html.escape(label)}"'
    text = re.sub(
        r"<svg[^>]*>",
        f'{opening} xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">',
        text,
        count=1,
    )
    # Ids must be unique in the page.
    text = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for color, variable in zip(_LIGHT, _NAMES, strict=True):
        text = re.sub(re.escape(color), f"var(--{variable})", text, flags=re.IGNORECASE)
    text = re.sub(r"font: ([^;\"]*?)px [^;\"]*", r"font-size: \1px; font-family: inherit", text)
    return text.strip()


def standalone(inline: str) -> str:
    """A complete SVG file from an inline one. It follows the viewer's light or dark theme."""
    base = "svg{font-family:system-ui,sans-serif;background:var(--paper)}"
    style = f"<style>{base}{CSS_VARIABLES}</style>"
    return re.sub(r"(<svg[^>]*>)", lambda m: m[1] + style, inline, count=1)
