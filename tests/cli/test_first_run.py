"""``wispprof`` without a command, and shell completion."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import typer
from typer.testing import CliRunner

import wispprof.cli
from wispprof.cli import app
from wispprof.cli.first_run import OFFERS, choose

GROUP = typer.main.get_command(app)


def answering(*answers: str) -> Iterator[str]:
    yield from answers
    raise AssertionError("asked for more than there are answers")


@pytest.mark.parametrize("number", range(1, len(OFFERS) + 1))
def test_every_offer_leads_to_commands_that_parse(number: int) -> None:
    answers = answering(str(number), "gpu-box:8200", "models/draft")
    for words in choose(lambda question, default: next(answers)):
        if words != ["--help"]:
            command = GROUP.commands[words[0]]  # type: ignore[attr-defined]
            command.make_context(words[0], words[1:])


def test_an_answer_that_is_no_line_is_asked_again(capsys: pytest.CaptureFixture[str]) -> None:
    answers = answering("9", "two", "2")
    assert choose(lambda question, default: next(answers)) == [["doctor"]]
    assert capsys.readouterr().out.count("There is no") == 2


def test_an_empty_answer_runs_nothing() -> None:
    assert choose(lambda question, default: "") == []


def test_chosen_commands_are_shown_and_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wispprof.cli, "on_terminal", lambda: True)
    done = CliRunner().invoke(app, [], input="5\n")
    assert "$ wispprof --help" in done.stdout
    assert "profile-server" in done.stdout


def test_without_a_terminal_the_overview_is_printed() -> None:
    done = CliRunner().invoke(app, [])
    assert done.exit_code == 2
    assert "profile-server" in done.stdout
    assert "What would you like" not in done.stdout


@pytest.mark.parametrize(
    ("words", "expected"), [("wispprof prof", "profile-edge"), ("wispprof serve --ten", "--tensor-parallel")]
)
def test_the_shell_completes_commands_and_options(words: str, expected: str) -> None:
    asked = {"_WISPPROF_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    code = "from wispprof.cli import app; app(prog_name='wispprof')"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True
    )
    assert expected in done.stdout.split()
