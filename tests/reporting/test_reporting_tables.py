"""Tables in the terminal and in HTML."""

from __future__ import annotations

import math

import pytest
from rich.console import Console

from wispprof.reporting import Bench, Column, Table, bench_table, to_html, to_rich

TABLE = Table(
    "policies <b>",
    (Column("policy"), Column("goodput", "tokens/s", best="max"), Column("share", percent=True)),
    (("wisp", 12.345, 0.5), ("sled & co", 3.0, None), ("a", math.nan, 1.0)),
)


def test_html_is_escaped_and_marks_the_best() -> None:
    page = to_html(TABLE)
    assert "policies &lt;b&gt;" in page
    assert "sled &amp; co" in page
    assert page.count('class="n best"') == 1
    assert ">12.3<" in page
    assert "50.0 %" in page


def test_rich_shows_the_same_cells() -> None:
    with open("/dev/null", "w") as null:
        console = Console(width=100, record=True, file=null)
        console.print(to_rich(TABLE))
    text = console.export_text()
    assert "12.3" in text
    assert "50.0 %" in text
    assert "–" in text


def test_the_brief_comparison_fits_a_terminal() -> None:
    names = ("goodput_tokens_per_s", "attainment", "tokens_per_s", "ttft_p50_ms", "tpot_p50_ms")
    figures = {**dict.fromkeys(names, 1234.5), "attainment": 1.0, "accepted_per_round": 2.5}
    benches = [Bench("server-only", {}, {**figures, "step_error": 0.25, "wasted_share": 0.5})]
    with open("/dev/null", "w") as null:
        console = Console(width=80, record=True, file=null)
        console.print(to_rich(bench_table(benches, brief=True)))
    text = console.export_text()
    assert "…" not in text
    assert "server-only" in text
    assert "step" in text


NUMBERS = (12345.678, 0.5, None, 7.0, 1234.5, 3.25, 99.9, 100.0, 2.0, 1234567)


@pytest.mark.parametrize("width", [80, 100, 200])
def test_numbers_stay_whole_where_text_must_wrap(width: int) -> None:
    columns = (Column("the figure"), *(Column(f"a long header {i}") for i in range(9)), Column("why"))
    name, why = "cost efficiency of the pair, in thousand tokens", "within ten percent of the paper " * 3
    table = Table("", columns, ((name, *NUMBERS[:9], why), (name, *NUMBERS[1:], "blake2b:0123456789abcdef")))
    with open("/dev/null", "w") as null:
        console = Console(width=width, record=True, file=null)
        shown = to_rich(table)
        shown.padding = 0
        console.print(shown)
        console.print(shown)  # drawing changes nothing
    text = console.export_text()
    first, second = text[: len(text) // 2], text[len(text) // 2 :]
    assert first == second
    assert "…" not in text
    words = text.split()
    assert all(words.count(Column("").text(value)) >= 2 for value in NUMBERS)


def test_equal_values_have_no_best() -> None:
    table = Table("", (Column("x"), Column("y", best="min")), (("a", 1), ("b", 1)))
    assert "best" not in to_html(table)


def test_ragged_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="2 cells"):
        Table("t", (Column("x"),), (("a", 1),))


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (True, "yes"), (1234567, "1,234,567"), (2.0, "2.0"), (math.inf, "∞"), ("a", "a")],
)
def test_cells(value: object, text: str) -> None:
    assert Column("c").text(value) == text  # type: ignore[arg-type]
