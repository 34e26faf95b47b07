"""``vllm-http`` over a real, unmodified API server of vLLM."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import pytest
from conftest import TARGET
from decoding import decode, half_right

from wispprof.engines import EngineOptions, load_engine

START_S = 250.0


@pytest.fixture
def address() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", TARGET),
        *(
            "--port",
            str(port),
            "--dtype",
            "float32",
            "--enforce-eager",
            "--kv-cache-memory-bytes",
            str(1 << 27),
        ),
    ]
    process = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + START_S
        while True:
            assert process.poll() is None
            assert time.monotonic() < deadline
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.timeout(400)
def test_greedy_text_is_the_target_s(address: str, own, prompts) -> None:
    few = prompts[:6]
    wanted = decode(own, few, 16)
    options = EngineOptions(address, arguments={"tokenizer": TARGET})
    engine, model, tokenizer = load_engine("vllm-http", options)
    assert model.max_context == 2047
    assert tokenizer is not None
    assert decode(engine, few, 16, drafts=half_right(wanted, 6, 4096), chunk=50) == wanted
    engine.shutdown()
