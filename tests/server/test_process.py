"""What an operator sees: metrics, readiness, drain, the dashboard, logs and the command's messages."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import socket
from typing import get_args, get_type_hints

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from raw_edge import GREEDY, edge
from rich.console import Console
from typer.testing import CliRunner

from wispprof import protocol
from wispprof.cli import app
from wispprof.cli import serve as command
from wispprof.errors import EngineError, WispprofError
from wispprof.server import VerificationServer, running_server
from wispprof.server.dashboard import dashboard_table
from wispprof.server.logs import JsonLines, configure_logging
from wispprof.server.web_server import bind
from wispprof.settings.fields import declared
from wispprof.settings.server_settings import ServerSettings
from wispprof.testing.fake_engine import FakeDrafter, FakeEngine

NOTHING = ServerSettings(policy="wisp", prefix_cache_sessions=2)


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_metrics_pair_predicted_and_actual_step_times() -> None:
    engine = FakeEngine(64)
    async with running_server(NOTHING, engine=engine, model=engine.served) as running:
        async with edge(running.split_url) as one:
            drafter = FakeDrafter(engine.target, 0.7)
            await one.generate(0, [1, 2, 3], 40, drafter=drafter, tokens_per_s=2.0)
        async with httpx.AsyncClient() as client:
            found = samples((await client.get(f"{running.http_url}/metrics")).text)
    predicted = found["wispprof:step_time_predicted_seconds_count", ()]
    assert predicted == found["wispprof:step_time_seconds_count", ()] > 5
    assert found["wispprof:step_time_predicted_seconds_sum", ()] > 0
    assert found["wispprof:generation_tokens_total", ()] == 40
    assert found["wispprof:prompt_tokens_total", ()] == 3
    assert found["wispprof:time_to_first_token_seconds_count", ()] == 1
    assert found["wispprof:request_success_total", (("finished_reason", "length"),)] == 1
    kept = found.get(("wispprof:slo_attained_total", (("slo_class", "2"),)), 0.0)
    missed = found.get(("wispprof:slo_violations_total", (("slo_class", "2"),)), 0.0)
    assert kept + missed == 1
    drafted = found["wispprof:spec_decode_num_draft_tokens_total", ()]
    accepted = found["wispprof:spec_decode_num_accepted_tokens_total", ()]
    wasted = found["wispprof:draft_tokens_wasted_total", ()]
    assert drafted >= accepted + wasted
    assert accepted > 10
    assert wasted > 0
    assert 0 <= found["wispprof:kv_cache_usage_perc", ()] <= 1


async def test_drain_lets_sessions_finish_and_admits_no_more() -> None:
    engine = FakeEngine(64)
    async with running_server(NOTHING, engine=engine, model=engine.served) as running:
        async with edge(running.split_url) as one:
            drafter = FakeDrafter(engine.target)
            last = asyncio.create_task(one.generate(0, [1], 60, drafter=drafter))
            while not len(running.server.manager):
                await asyncio.sleep(0)
            drained = asyncio.create_task(running.server.drain(60_000.0))
            while not running.server.draining:
                await asyncio.sleep(0)
            late = await one.run(1, [1], 5, k=0, drafter=None, sampling=GREEDY)
            assert isinstance(late, protocol.Problem)
            assert late.code == "draining"
            assert await last == engine.target.generate([1], 60)
            await drained
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"{running.http_url}/ready")).status_code == 503
            assert (await client.get(f"{running.http_url}/health")).status_code == 200
        with pytest.raises(AssertionError, match="draining"):
            async with edge(running.split_url):
                pass


async def test_sessions_that_outlast_the_drain_resume_on_another_server() -> None:
    engine = FakeEngine(64)
    async with (
        running_server(NOTHING, engine=engine, model=engine.served) as running,
        edge(running.split_url) as one,
    ):
        # In round mode a session whose edge never answers lasts for ever.
        one.inbox[0] = asyncio.Queue()
        await one.send(protocol.Open(0, [1], 60))
        assert isinstance(await one.inbox[0].get(), protocol.Commit)
        await running.server.drain(1.0)
        problem = await one.inbox[0].get()
        assert isinstance(problem, protocol.Problem)
        assert problem.code == "draining"
    assert engine.sessions == ()


class Failing(FakeEngine):
    """Raises in one step."""

    def step(self, feeds):
        outcomes = super().step(feeds)
        if self.steps == 25:
            raise RuntimeError("device lost")
        return outcomes


async def test_an_engine_error_ends_its_sessions_and_not_the_server() -> None:
    engine = Failing(64)
    logging.getLogger("wispprof.server").setLevel(logging.CRITICAL)
    async with running_server(NOTHING, engine=engine, model=engine.served) as running:
        async with edge(running.split_url) as one:
            failed = await one.run(0, [1], 60, k=2, drafter=FakeDrafter(engine.target), sampling=GREEDY)
            assert isinstance(failed, protocol.Problem)
            assert failed.code == "internal"
            found = await one.generate(1, [1], 60, drafter=FakeDrafter(engine.target))
            assert found == engine.target.generate([1], 60)
        assert running.server.loop.failed_steps == 1
    logging.getLogger("wispprof.server").setLevel(logging.NOTSET)


async def test_the_audit_sees_a_leak() -> None:
    engine = FakeEngine(64)
    async with running_server(NOTHING, engine=engine, model=engine.served) as running:
        await running.server.check_integrity()
        engine.open("stranger", GREEDY)
        with pytest.raises(EngineError, match="unknown sessions"):
            await running.server.check_integrity()
        engine.close("stranger")
        await running.server.check_integrity()


async def test_the_dashboard_shows_the_state() -> None:
    engine = FakeEngine(64)
    async with running_server(NOTHING, engine=engine, model=engine.served) as running:
        console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(dashboard_table(running.server))
        async with edge(running.split_url) as one:
            await one.generate(0, [1, 2], 20, drafter=FakeDrafter(engine.target))
        console.print(dashboard_table(running.server))
        console.file.close()
        shown = console.export_text()
    assert "wisp" in shown
    assert "tokens/s" in shown


def test_a_port_in_use_is_one_clear_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(WispprofError, match="in use") as err:
            bind("127.0.0.1", taken.getsockname()[1])
        assert "--port" in err.value.hint
    with pytest.raises(WispprofError, match="no host"):
        bind("no-such-host.invalid", 1)


def test_logs_are_json_lines() -> None:
    record = logging.LogRecord("wispprof.server", logging.INFO, "", 0, "hello %s", ("you",), None)
    line = json.loads(JsonLines().format(record))
    assert (line["level"], line["message"]) == ("info", "hello you")
    with pytest.raises(ValueError, match="log level"):
        configure_logging("loud")


# --- the command ---


def test_the_command_takes_its_defaults_from_the_settings() -> None:
    settings = {each.key: each.default for each in declared(ServerSettings)}
    parameters = inspect.signature(command.serve).parameters
    for name, parameter in parameters.items():
        # How many servers there are is not a setting of one server.
        if name in ("ray", "replicas", "max_replicas"):
            continue
        many = isinstance(parameter.default, list)
        assert parameter.default == (list(settings[name]) if many else settings[name]), name
    hints = get_type_hints(command.serve, include_extras=True)
    assert all(get_args(hint)[1].help for name, hint in hints.items() if name != "return")


@pytest.mark.parametrize(
    ("options", "says", "code"),
    [
        (["--host", "0.0.0.0", "--target", "x"], "without an API key", 1),
        (["--plan", "/no/such/plan.json"], "no file", 1),
        (["--admit", "maybe", "--target", "x"], "admit", 2),
        (["--tls-cert", __file__, "--target", "x"], "key", 2),
    ],
)
def test_the_command_refuses_clearly(options: list[str], says: str, code: int) -> None:
    result = CliRunner().invoke(app, ["serve", *options])
    assert result.exit_code == code
    assert says in result.stderr
    assert "Traceback" not in result.output


def test_a_server_that_was_not_started_is_not_ready() -> None:
    engine = FakeEngine(64)
    server = VerificationServer(engine, engine.served, NOTHING)
    assert not server.ready
