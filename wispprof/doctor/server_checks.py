"""What a server needs before others may reach it, and whether a running one answers."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
import stat
import time
from urllib.parse import urlsplit

from wispprof.doctor.findings import DoctorContext, Finding

__all__ = ["api_keys", "port", "server", "tls"]

DIAL_MS = 3000.0


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_named(situation: DoctorContext) -> bool:
    """Whether ``--server`` is what listens at the port: whether it answers is for :func:`server` to say."""
    from wispprof.edge.connection import server_url

    if not situation.server:
        return False
    named = urlsplit(server_url(situation.server))
    return named.port == situation.port and _loopback(named.hostname or "")


def port(situation: DoctorContext) -> Finding:
    """The port is free to listen on."""
    host, number = situation.host, situation.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, number))
        except OSError as err:
            if _is_named(situation):
                return Finding("port", "ok", f"{host}:{number} is the server's that --server names")
            return Finding(
                "port",
                "fail",
                f"{host}:{number} cannot be listened on: {err.strerror}.",
                "Stop the program that listens there (`ss -ltnp`), or choose another --port.",
            )
    return Finding("port", "ok", f"{host}:{number} is free")


def api_keys(situation: DoctorContext) -> Finding:
    """Beyond loopback there are keys, long enough, and readable by their owner alone."""
    from wispprof.settings.server_settings import read_api_keys

    file = situation.api_key_file
    if file is None:
        if _loopback(situation.host):
            return Finding("API keys", "ok", f"none needed on {situation.host}")
        return Finding(
            "API keys",
            "fail",
            f"A server on {situation.host} can be reached by others and has no key.",
            "Write one into a file (`openssl rand -hex 24`) and give --api-key-file.",
        )
    if not file.is_file():
        return Finding("API keys", "fail", f"There is no file {file}.", "Check --api-key-file.")
    keys = read_api_keys(file)
    if file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        return Finding(
            "API keys",
            "warn",
            f"Other users of this machine can read {file}.",
            f"chmod 600 {file}",
        )
    return Finding("API keys", "ok", f"{len(keys)} key{'s' if len(keys) != 1 else ''} in {file}")


def tls(situation: DoctorContext) -> Finding:
    """Certificate and key belong together and are still valid."""
    cert, key = situation.tls_cert, situation.tls_key
    if cert is None and key is None:
        if _loopback(situation.host):
            return Finding("TLS", "skip", f"not used on {situation.host}")
        return Finding(
            "TLS",
            "warn",
            f"Prompts and keys travel to {situation.host} unencrypted.",
            "Give --tls-cert and --tls-key, or put a TLS proxy in front.",
        )
    if cert is None or key is None:
        return Finding("TLS", "fail", "One of certificate and key is missing.", "Give both.")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as err:
        reason = err.reason if isinstance(err, ssl.SSLError) else err.strerror
        return Finding(
            "TLS",
            "fail",
            f"{cert} and {key} cannot be used: {reason}.",
            "Give a PEM certificate chain and the private key that belongs to it.",
        )
    days = _days_left(cert)
    if days < 0:
        return Finding("TLS", "fail", f"{cert} expired {-days:.0f} days ago.", "Renew it.")
    if days < 14:
        return Finding("TLS", "warn", f"{cert} expires in {days:.0f} days.", "Renew it soon.")
    return Finding("TLS", "ok", f"{cert} is valid for {days:.0f} more days")


def _days_left(cert: object) -> float:
    # The only parser of certificates in the standard library; tested with every Python we support.
    decode = ssl._ssl._test_decode_cert  # type: ignore[attr-defined]
    ends = decode(str(cert))["notAfter"]
    return (ssl.cert_time_to_seconds(ends) - time.time()) / 86_400


def server(situation: DoctorContext) -> Finding:
    """A running server answers a hello."""
    if not situation.server:
        return Finding("server", "skip", "no --server named")
    return asyncio.run(_greet(situation))


async def _greet(situation: DoctorContext) -> Finding:
    from wispprof.edge.client import EdgeClient
    from wispprof.edge.connection import ssl_context, websocket_connections
    from wispprof.settings.edge_settings import ClientSettings
    from wispprof.settings.shared_settings import ServerAccess

    settings = ClientSettings(
        access=ServerAccess(situation.key), name="doctor", hello_ms=DIAL_MS, give_up_ms=DIAL_MS
    )
    connect = websocket_connections(situation.server, ssl=ssl_context(situation.ca_file))
    async with EdgeClient(connect, settings) as client:
        target = client.welcome.target if client.welcome else ""
        return Finding("server", "ok", f"serves {target}; round trip {client.rtt.least_ms:.1f} ms")
