"""The harness that all fuzz tests share: their budget, what they count, and what they fuzz.

In ``make test`` every fuzz test runs a few examples with fixed seeds. ``make fuzz`` sets ``FUZZ_MINUTES``:
the tests share these minutes and draw new examples until their part is spent.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
import uvicorn
from fake_pair import LETTERS, fake_runtime, text_of
from hypothesis import HealthCheck, seed, settings

from wispprof.edge.local_api import make_edge_app
from wispprof.openai_api import ChatTokenizer
from wispprof.server.process import bind, running_server
from wispprof.settings.server_settings import ServerSettings
from wispprof.testing.fake_engine import FakeEngine

T = TypeVar("T")
Test = TypeVar("Test", bound=Callable[..., None])

MINUTES = float(os.environ.get("FUZZ_MINUTES") or 0.0)
HANG_S = 20.0
"""An answer that takes longer counts as a hang. The fake engine answers within milliseconds."""

counts: Counter[str] = Counter()
"""What ``make fuzz`` prints: examples, requests, responses by status class, tracebacks, hangs."""

_fuzz_tests = 0


def fuzz(examples: int, cases: int = 1) -> Callable[[Test], Test]:
    """Decorator of a Hypothesis test (above ``@given``).

    ``examples``: its budget in ``make test``. ``cases``: how often pytest's parameters repeat the test.
    """

    def decorate(test: Test) -> Test:
        global _fuzz_tests
        _fuzz_tests += 1
        budget = settings(
            max_examples=examples if not MINUTES else max(examples, 250),
            derandomize=not MINUTES,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        short = budget(test)
        if not MINUTES:
            return short

        @functools.wraps(short)
        def until_spent(*args: Any, **kwargs: Any) -> None:
            end = time.monotonic() + 60.0 * MINUTES / _fuzz_tests / cases
            while True:
                number = secrets.randbits(32)
                try:
                    seed(number)(short)(*args, **kwargs)
                except BaseException:
                    print(f"failed with @seed({number})")
                    raise
                counts["rounds"] += 1
                if time.monotonic() > end:
                    return

        return until_spent  # type: ignore[return-value]

    return decorate


class LogWatch(logging.Handler):
    """Collects what must never be logged: errors, and records with a traceback."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.faults: list[str] = []
        self.setFormatter(logging.Formatter("%(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info or record.levelno >= logging.ERROR:
            self.faults.append(self.format(record))

    def check(self) -> None:
        """Fail if anything was logged since the last check."""
        faults, self.faults = self.faults, []
        counts["tracebacks"] += len(faults)
        assert not faults, "\n".join(faults)


@contextmanager
def watched_logs() -> Iterator[LogWatch]:
    """A :class:`LogWatch` over the logs of wispprof, uvicorn and asyncio."""
    watch = LogWatch()
    loggers = [logging.getLogger(name) for name in ("", "wispprof", "uvicorn.error")]
    loggers = [one for one in loggers if one.name == "root" or not one.propagate]
    for one in loggers:
        one.addHandler(watch)
    try:
        yield watch
    finally:
        for one in loggers:
            one.removeHandler(watch)


class LoopThread:
    """An event loop in a thread of its own: fuzzed servers answer while the test draws and waits."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="fuzzed servers", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], seconds: float = HANG_S) -> T:
        """The result of ``work`` on the loop; a hang raises ``TimeoutError``."""
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result(seconds)
        except TimeoutError:
            counts["hangs"] += 1
            future.cancel()
            raise

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@dataclass
class ServedPair:
    """A server of the fake pair and an edge on it, both with their OpenAI API."""

    thread: LoopThread
    logs: LogWatch
    server_url: str
    edge_url: str
    split_url: str
    http: httpx.Client

    def request(self, url: str, method: str = "POST", **request: Any) -> httpx.Response:
        """Send a request; count its answer. Fails on a hang and on a status of 500 or more."""
        counts["requests"] += 1
        try:
            response = self.http.request(method, url, **request)
        except httpx.TimeoutException:
            counts["hangs"] += 1
            raise
        counts[f"{response.status_code // 100}xx"] += 1
        assert response.status_code < 500, (
            f"{response.status_code}: {response.text[:500]} to {str(request)[:500]}"
        )
        return response

    def check(self) -> None:
        """Nothing was logged, and both endpoints still answer an ordinary request exactly."""
        self.logs.check()
        for url in (self.server_url, self.edge_url):
            body = {"prompt": "fuzz", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
            answer = self.request(f"{url}/v1/completions", json=body)
            assert answer.json()["choices"][0]["text"] == text_of("fuzz", 8)


@contextmanager
def served_pair(max_context: int = 96) -> Iterator[ServedPair]:
    """Both endpoints over real sockets. A short context bounds what a hostile request can cost."""
    thread, stack = LoopThread(), AsyncExitStack()

    async def start() -> tuple[str, str, str]:
        engine = FakeEngine(max_context=max_context, trees=True)
        options = ServerSettings(policy="wispprof", admit="all")
        tokenizer = ChatTokenizer(LETTERS)
        running = await stack.enter_async_context(
            running_server(options, engine=engine, model=engine.served, tokenizer=tokenizer)
        )
        runtime = await stack.enter_async_context(fake_runtime(server=running.split_url))
        listener = bind("127.0.0.1", 0)
        web = uvicorn.Server(
            uvicorn.Config(make_edge_app(runtime), log_config=None, access_log=False, lifespan="off")
        )
        task = asyncio.create_task(web.serve(sockets=[listener]))

        async def stop() -> None:
            web.should_exit = True
            await task

        stack.push_async_callback(stop)
        while not web.started:
            await asyncio.sleep(0.002)
        port = listener.getsockname()[1]
        return f"http://127.0.0.1:{running.port}", f"http://127.0.0.1:{port}", running.split_url

    with watched_logs() as logs, httpx.Client(timeout=HANG_S, trust_env=False) as http:
        server_url, edge_url, split_url = thread.run(start())
        try:
            yield ServedPair(thread, logs, server_url, edge_url, split_url, http)
        finally:
            http.close()  # an open connection would keep the web servers waiting
            thread.run(stack.aclose())
            thread.close()
    logs.check()
