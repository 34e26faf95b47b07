"""Tables, plots and one self-contained HTML report. Imports no torch."""

from wispprof.reporting.comparison import render_comparison, write_comparison
from wispprof.reporting.report import SERVER_ONLY, render_report, to_html, verdict, write_report
from wispprof.reporting.run_folder import (
    ANSWER_KIND,
    BENCH_KIND,
    CAPACITY_KIND,
    Answer,
    Bench,
    TextSpan,
    bench_table,
    load_run,
)
from wispprof.reporting.tables import Column, Table, to_rich

__all__ = [
    "ANSWER_KIND",
    "BENCH_KIND",
    "CAPACITY_KIND",
    "SERVER_ONLY",
    "Answer",
    "Bench",
    "Column",
    "Table",
    "TextSpan",
    "bench_table",
    "load_run",
    "render_comparison",
    "render_report",
    "to_html",
    "to_rich",
    "verdict",
    "write_comparison",
    "write_report",
]
