"""Settings: from option, environment, file or default, and checked."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from wispprof.cli import app, console
from wispprof.cli.options import with_settings
from wispprof.errors import PlanError, PluginError, SettingsError, WispprofError
from wispprof.policies.registry import make_batch_policy, make_controller
from wispprof.settings.edge_settings import (
    ClientSettings,
    DraftingSettings,
    EdgeSettings,
    LocalApiSettings,
)
from wispprof.settings.fields import Settings, declared, nested
from wispprof.settings.server_settings import ReplicaSettings, ServerSettings
from wispprof.settings.shared_settings import ServerAccess
from wispprof.settings.sources import Config, read_config
from wispprof.simulation.devices import device_of

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

    made = typer.Typer(cls=console.GuardedGroup, context_settings={"auto_envvar_prefix": "WISPPROF"})
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
    ("text", "expected"),
    [
        ("[serv]\nport = 1\n", "Did you mean 'serve'"),
        ("[serve]\nprot = 1\n", "Did you mean 'port'"),
        ("serve = 1\n", "must be a section"),
        ("[serve\n", "is not TOML"),
        ("[serve.port]\nx = 1\n", "must not be a section"),
    ],
)
def test_a_wrong_file_is_one_clear_line(here: Path, text: str, expected: str) -> None:
    (here / "wispprof.toml").write_text(text)
    done = RUNNER.invoke(app, ["fit"])
    assert done.exit_code == console.FAULT
    assert expected in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_file_in_the_working_folder_is_named_if_it_sets_something(here: Path) -> None:
    file = here / "wispprof.toml"
    file.write_text("[fit]\nseed = 3\n")
    said = f"settings of [fit] from {file}"
    assert said in RUNNER.invoke(app, ["fit"]).stderr.replace("\n", "")
    assert "settings of" not in RUNNER.invoke(app, ["--config", str(file), "fit"]).stderr
    assert "settings of" not in RUNNER.invoke(app, ["plan"]).stderr


def test_a_named_file_must_be_there(here: Path) -> None:
    done = RUNNER.invoke(app, ["--config", "nowhere.toml", "fit"])
    assert done.exit_code == console.FAULT
    assert "nowhere.toml" in done.stderr


def test_no_file_means_defaults(here: Path) -> None:
    assert read_config() == Config()


def edge_seen(*typed: str, env: dict[str, str] | None = None) -> EdgeSettings:
    """The settings that a command of an edge gets."""
    seen: list[EdgeSettings] = []

    @with_settings
    def edge(settings: EdgeSettings) -> None:
        seen.append(settings)

    made = typer.Typer(cls=console.GuardedGroup, context_settings={"auto_envvar_prefix": "WISPPROF"})
    made.callback()(app.registered_callback.callback)  # type: ignore[union-attr,arg-type]
    made.command("edge")(edge)
    done = RUNNER.invoke(made, ["edge", *typed], env=env or {})
    assert done.exit_code == 0, done.output
    return seen[0]


def test_settings_come_from_file_environment_and_options(here: Path) -> None:
    (here / "wispprof.toml").write_text(
        "[edge]\nping-ms = 5.0\nname = 'a'\ncontroller-option = ['x=1', 'y=z']\n"
    )
    settings = edge_seen("--slo", "3", env={"WISPPROF_EDGE_DRAFT_AHEAD": "7"})
    assert (settings.client.ping_ms, settings.client.name) == (5.0, "a")
    assert settings.controller_options == {"x": 1, "y": "z"}
    assert settings.drafting == replace(DraftingSettings(), draft_ahead=7)
    assert settings.tokens_per_s == 3.0
    assert replace(settings.client, ping_ms=2000.0, name="") == ClientSettings()


def test_a_key_for_all_commands_yields_to_the_key_of_one(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    @with_settings
    def probe(access: ServerAccess) -> None:
        seen.append(access.key)

    made = typer.Typer(context_settings={"auto_envvar_prefix": "WISPPROF"})
    made.callback()(lambda: None)
    made.command("probe")(probe)
    monkeypatch.setenv("WISPPROF_KEY", "common")
    RUNNER.invoke(made, ["probe"])
    monkeypatch.setenv("WISPPROF_PROBE_KEY", "own")
    RUNNER.invoke(made, ["probe"])
    RUNNER.invoke(made, ["probe", "--key", "typed"])
    assert seen == ["common", "own", "typed"]


def test_without_any_source_settings_are_their_defaults(here: Path) -> None:
    assert edge_seen() == EdgeSettings()


SETTINGS = (
    ServerSettings,
    ReplicaSettings,
    EdgeSettings,
    LocalApiSettings,
    ClientSettings,
    DraftingSettings,
    ServerAccess,
)


@pytest.mark.parametrize("kind", SETTINGS)
def test_every_setting_is_an_option(kind: type[Settings]) -> None:
    group: Any = typer.main.get_command(app)
    command = group.commands["serve" if kind in (ServerSettings, ReplicaSettings) else "edge"]
    reachable = {parameter.name for parameter in command.params}
    assert {each.key for each in declared(kind)} <= reachable
    derived = {"tokenizer", "offline_ok"} if kind is ClientSettings else {"stream", "ahead", "client"}
    names = {each.name for each in declared(kind)} | {name for name, _ in nested(kind)} | derived
    assert {each.name for each in fields(kind)} <= names  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"port": 70000}, "port must be 0 … 65535, got 70000."),
        ({"max_items": 0}, "max_items must be at least 1, got 0."),
        ({"drain_timeout_ms": float("nan")}, "drain_timeout_ms must be at least 0, got nan."),
        ({"admit": "some"}, "admit must be slo or all, got 'some'."),
        ({"max_new": 1.5}, "max_new must be an integer, got 1.5."),
        ({"live": 1}, "live must be true or false, got 1."),
        ({"plan": "plan.json"}, "plan must be a path, got 'plan.json'."),
        ({"api_keys": "secret"}, "api_keys must be a list, got a hidden value."),
        ({"host": None}, "host must be text, got None."),
    ],
)
def test_a_value_that_is_not_allowed_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as err:
        ServerSettings(**given)
    assert str(err.value) == message


def test_settings_are_made_of_options_by_name() -> None:
    made = EdgeSettings.of(server="box:1", key="secret key", slo=3.0, draft_ahead=5, threads=2)
    access, drafting = made.client.access, made.drafting
    assert (made.server, access.key, made.tokens_per_s) == ("box:1", "secret key", 3.0)
    assert (drafting.draft_ahead, made.llama.threads) == (5, 2)
    assert EdgeSettings.of() == EdgeSettings()
    assert EdgeSettings.of(tokens_per_s=3.0) == EdgeSettings.of(slo=3.0) != EdgeSettings()
    with pytest.raises(SettingsError, match="no option 'keys'") as caught:
        EdgeSettings.of(keys="x")
    assert "key" in caught.value.hint
    with pytest.raises(SettingsError, match="draft_ahead must be"):
        EdgeSettings.of(draft_ahead=-1)


def test_secrets_are_not_printed() -> None:
    settings = ServerSettings(api_keys=("a-secret-of-16-chars",))
    assert "a-secret" not in repr(settings)
    assert "a-secret" not in repr(EdgeSettings(client=ClientSettings(ServerAccess("a-secret"))))


def test_a_value_that_is_not_allowed_ends_a_command(here: Path) -> None:
    done = RUNNER.invoke(app, ["edge", "--mode", "steam"])
    assert done.exit_code == console.USAGE
    assert "mode must be empty or round or stream, got 'steam'. Did you mean 'stream'?" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (("simulate", "--policy", "wisprof"), "wispprof"),
        (("simulate", "--policy", "centralized"), "server-only"),
        (("simulate", "--server", "h200-sxm-qwen3-32b-vllm-bf16"), "h200-sxm-qwen3-32b-vllm-bf16-tp1"),
        (("reproduce", "specege"), "specedge"),
    ],
)
def test_a_mistyped_name_is_answered_with_the_nearest(
    here: Path, arguments: tuple[str, ...], nearest: str
) -> None:
    done = RUNNER.invoke(app, arguments)
    assert done.exit_code == console.FAULT
    assert f"Did you mean {nearest!r}?" in " ".join(done.stderr.split())


@pytest.mark.parametrize(("name", "nearest"), [("wispproof", "wispprof"), ("centralized", "server-only")])
def test_a_mistyped_policy_is_answered_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(PluginError, match=f"Did you mean '{nearest}'\\?"):
        make_batch_policy(name)


def test_a_mistyped_device_or_option_is_answered_with_the_nearest() -> None:
    with pytest.raises(WispprofError, match="Did you mean 'medium'"):
        device_of("meduim")
    with pytest.raises(PlanError, match="Did you mean 'k_max'"):
        make_controller("wisp", kmax=3)


def test_a_named_value_needs_a_name(here: Path) -> None:
    done = RUNNER.invoke(app, ["serve", "--policy-option", "boost"])
    assert done.exit_code == console.USAGE
    assert "Expected NAME=VALUE, got 'boost'." in done.stderr
