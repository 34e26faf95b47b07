"""TLS between edge and server, with a real certificate made on the spot."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from fake_pair import drafting, edge, hash_trace, truth

from wispprof.bench import run_bench
from wispprof.edge import websocket_connections
from wispprof.edge.connection import LinkLost, ssl_context
from wispprof.errors import WispprofError
from wispprof.server.process import running_server
from wispprof.settings.fleet_settings import BenchSettings
from wispprof.settings.server_settings import ServerSettings
from wispprof.settings.shared_settings import ServerAccess
from wispprof.testing.fake_engine import FakeEngine

OPENSSL = shutil.which("openssl")
pytestmark = pytest.mark.skipif(OPENSSL is None, reason="openssl makes the certificate")


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(certificate for ``localhost`` that is its own authority, its key)."""
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "2"]
    command = [str(OPENSSL), "req", "-x509", *curve, *name, "-out", str(cert), "-keyout", str(key)]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


def tls_server(certified: tuple[Path, Path]):  # type: ignore[no-untyped-def]
    engine = FakeEngine()
    settings = ServerSettings(tls_cert=certified[0], tls_key=certified[1], admit="all")
    return running_server(settings, engine=engine, model=engine.served)


async def test_a_generation_over_tls(certified: tuple[Path, Path]) -> None:
    ssl_context = ssl.create_default_context(cafile=certified[0])
    async with tls_server(certified) as running:
        connect = websocket_connections(f"wss://localhost:{running.port}", ssl=ssl_context)
        async with edge(connect) as client:
            generation = drafting(client, (1, 2, 3), max_new=24, draft_ms=1.0)
            await generation.run()
    assert list(generation.output) == truth((1, 2, 3), 24)


async def test_a_bench_over_tls_reads_the_servers_steps_too(certified: tuple[Path, Path]) -> None:
    load = BenchSettings(devices=2, requests=1, max_new=8, access=ServerAccess(ca_file=certified[0]))
    trace = replace(hash_trace(), tokenizer_hash="hash")
    async with tls_server(certified) as running:
        server = f"wss://localhost:{running.port}"
        result = await run_bench(load, server, trace)
        with pytest.raises(WispprofError, match="TLS with"):
            await run_bench(replace(load, access=ServerAccess()), server, trace)
    assert result.lossless
    assert result.figures["steps"] > 0


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_what_is_no_authority_is_refused_by_name(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "ca.pem"
    if content is not None:
        file.write_text(content)
    with pytest.raises(WispprofError, match="is not a certificate authority") as err:
        ssl_context(file)
    assert "--ca-file" in err.value.hint


async def test_an_unknown_authority_is_refused_at_once(certified: tuple[Path, Path]) -> None:
    async with tls_server(certified) as running:
        with pytest.raises(LinkLost, match="TLS with") as err:
            async with edge(websocket_connections(f"wss://localhost:{running.port}")):
                pass
    assert err.value.final
    assert "certificate" in err.value.hint.lower()
    assert "--ca-file" in err.value.hint


async def test_a_certificate_for_another_host_is_refused(certified: tuple[Path, Path]) -> None:
    ssl_context = ssl.create_default_context(cafile=certified[0])
    async with tls_server(certified) as running:
        with pytest.raises(LinkLost, match="TLS with"):
            async with edge(websocket_connections(f"wss://127.0.0.1:{running.port}", ssl=ssl_context)):
                pass


async def test_plain_text_does_not_reach_a_tls_server(certified: tuple[Path, Path]) -> None:
    async with tls_server(certified) as running:
        with pytest.raises(LinkLost) as err:
            await websocket_connections(f"ws://localhost:{running.port}")()
    assert "wss://" in err.value.hint
