"""``generate`` and ``chat`` in the terminal, on the hash pair."""

from __future__ import annotations

import json

import pytest
from fake_pair import fake_runtime, text_of
from typer.testing import CliRunner, Result

import wispprof
from wispprof.cli import app
from wispprof.errors import SettingsError
from wispprof.settings.edge_settings import EdgeSettings
from wispprof.types import Sampling


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Run a command; ``run.settings`` holds the settings it made."""

    def command(*arguments: str, typed: str = "") -> Result:
        return CliRunner().invoke(app, list(arguments), input=typed)

    def opened(settings: EdgeSettings):  # type: ignore[no-untyped-def]
        command.settings = settings  # type: ignore[attr-defined]
        return fake_runtime()

    monkeypatch.setattr("wispprof.edge.edge_runtime.open_edge", opened)
    return command


def test_generate_streams_the_text_and_one_line_of_statistics(run) -> None:  # type: ignore[no-untyped-def]
    result = run("generate", "abc", "--max-tokens", "20")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == text_of("abc", 20) + "\n"
    assert result.stderr.startswith("20 tokens")


async def test_generate_blocks_and_so_refuses_to_run_under_an_event_loop() -> None:
    with pytest.raises(SettingsError, match="Use `async with open_edge"):
        wispprof.generate("abc")


def test_generate_makes_one_document_and_honours_its_options(run) -> None:  # type: ignore[no-untyped-def]
    expected = text_of("abc", 30, Sampling(0.9, 5, 0.8, seed=4))
    sampling = ["--temperature", "0.9", "--top-k", "5", "--top-p", "0.8", "--seed", "4"]
    edge = [
        "--k",
        "6",
        "--threshold",
        "0.4",
        "--controller",
        "wisp",
        "--give-up-ms",
        "3000",
        "--slo",
        "9",
    ]
    stop = expected[7:9]
    result = run("generate", "abc", "--json", *sampling, *edge, "--stop", stop, "--stop", "never")
    document = json.loads(result.stdout)
    assert document["text"] == expected[: expected.index(stop)]
    assert (document["prompt"], document["finished"]) == ("abc", "stop")
    assert run.settings.controller_options == {"k_max": 6, "threshold": 0.4}
    assert (run.settings.client.give_up_ms, run.settings.tokens_per_s) == (3000.0, 9.0)


def test_chat_continues_the_conversation(run) -> None:  # type: ignore[no-untyped-def]
    greedy = ["--temperature", "0", "--top-p", "1", "--max-tokens", "12"]
    result = run("chat", "--system", "be", *greedy, typed="hi\nmore\n\nnever read\n")
    assert result.exit_code == 0, result.stderr
    first = text_of("be\nhi", 12)
    second = text_of(f"be\nhi\n{first}\nmore", 12)
    assert result.stdout == f"> {first}\n> {second}\n> "
    assert "no chat template" in result.stderr
    assert result.stderr.count("12 tokens") == 2


def test_chat_uses_a_new_seed_per_turn_and_ends_with_the_input(run) -> None:  # type: ignore[no-untyped-def]
    result = run("chat", "--seed", "5", "--max-tokens", "8", typed="a\nb\n")
    first = text_of("a", 8, Sampling(0.7, 0, 0.95, seed=5))
    second = text_of(f"a\n{first}\nb", 8, Sampling(0.7, 0, 0.95, seed=6))
    assert result.stdout == f"> {first}\n> {second}\n> "
    assert result.exit_code == 0
