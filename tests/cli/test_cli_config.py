"""Settings: typed option, then environment, then file, then default."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from wispprof.cli import app, common
from wispprof.settings.edge_settings import ClientSettings
from wispprof.settings.sources import Config, ConfigError, read_config

RUNNER = CliRunner()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def port_seen(*typed: str, env: dict[str, str] | None = None) -> int:
    """The port that a probe command gets under the real root of the tool."""
    seen: list[int] = []

    def probe(port: Annotated[int, typer.Option()] = 1) -> None:
        seen.append(port)

    made = typer.Typer(cls=common.GuardedGroup, context_settings={"auto_envvar_prefix": "WISPPROF"})
    made.callback()(app.registered_callback.callback)  # type: ignore[union-attr,arg-type]
    made.command("probe")(probe)
    done = RUNNER.invoke(made, ["probe", *typed], env=env or {})
    assert done.exit_code == 0, done.output
    return seen[0]


def test_precedence(here: Path) -> None:
    env = {"WISPPROF_PROBE_PORT": "6"}
    assert port_seen() == 1
    (here / "wispprof.toml").write_text("[probe]\nport = 7\n")
    assert port_seen() == 7
    assert port_seen(env=env) == 6
    assert port_seen("--port", "5", env=env) == 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[serv]\nport = 1\n", "Did you mean 'serve'"),
        ("[serve]\nprot = 1\n", "Did you mean 'port'"),
        ("serve = 1\n", "must be a section"),
        ("[serve\n", "is not TOML"),
        ("[serve.port]\nx = 1\n", "must not be a section"),
    ],
)
def test_a_wrong_file_is_one_clear_line(here: Path, text: str, said: str) -> None:
    (here / "wispprof.toml").write_text(text)
    done = RUNNER.invoke(app, ["fit"])
    assert done.exit_code == common.FAULT
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_named_file_must_be_there(here: Path) -> None:
    done = RUNNER.invoke(app, ["--config", "nowhere.toml", "fit"])
    assert done.exit_code == common.FAULT
    assert "nowhere.toml" in done.stderr


def test_no_file_means_defaults(here: Path) -> None:
    assert read_config() == Config()


def test_a_section_fills_a_rooms_settings(here: Path) -> None:
    (here / "wispprof.toml").write_text("[edge]\ngive-up-ms = 5.0\nname = 'a'\n")
    settings = read_config().settings(ClientSettings, "edge")
    assert (settings.give_up_ms, settings.name, settings.ping_ms) == (
        5.0,
        "a",
        ClientSettings().ping_ms,
    )


def test_a_rooms_refusal_names_section_and_file(here: Path) -> None:
    from wispprof.settings.edge_settings import DraftingSettings

    (here / "wispprof.toml").write_text("[edge]\ndraft-ahead = -1\n")
    with pytest.raises(ConfigError, match=r"Section \[edge\]"):
        read_config().settings(DraftingSettings, "edge")
