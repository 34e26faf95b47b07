"""The command line: parse, call, print. Every command imports its room when it runs."""

import typer

app = typer.Typer(
    name="wispprof",
    no_args_is_help=True,
    add_completion=False,
    help="Measure, fit, plan and run split speculative LLM serving.",
)
