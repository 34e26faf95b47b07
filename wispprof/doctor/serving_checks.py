"""Checks of what serving needs: models, port, API keys, TLS, and a running server."""

from __future__ import annotations

import asyncio
import socket
import ssl
import stat
import time
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from wispprof.artifacts import bundled_model
from wispprof.doctor.findings import DoctorContext, Finding
from wispprof.settings.draft_settings import LlamaSettings
from wispprof.settings.server_settings import is_loopback, read_api_keys
from wispprof.types import ModelInfo

CONNECT_MS = 3000.0


def _paths(context: DoctorContext) -> tuple[str, str]:
    return context.target or bundled_model("target"), context.draft or bundled_model("draft")


@cache
def _load(path: str, draft: bool = False) -> Any:
    from wispprof.engines.loading import load_model

    return load_model(path, device="cpu", draft=draft)


class _Target(NamedTuple):
    """The target as its engine loads it."""

    info: ModelInfo
    tokenizer: Any


def _target(context: DoctorContext) -> _Target:
    if context.engine == "vllm":
        from wispprof.doctor.vllm_checks import load_vllm

        on_vllm = load_vllm(context)
        return _Target(on_vllm.engine.info, on_vllm.tokenizer)
    loaded = _load(_paths(context)[0])
    return _Target(loaded.info, loaded.tokenizer)


@cache
def _gguf(path: str, settings: LlamaSettings) -> Any:
    from wispprof.drafters.gguf_model import GgufModel

    return GgufModel(Path(path), settings)


def _draft_info(context: DoctorContext) -> ModelInfo:
    draft = _paths(context)[1]
    if draft.endswith(".gguf"):
        info: ModelInfo = _gguf(draft, context.llama).info
        return info
    loaded: ModelInfo = _load(draft, draft=True).info
    return loaded


def _describe(side: str, info: Any) -> str:
    name = side if info.id == side else f"{side} {info.id}"
    return f"{name}: {info.family}, {info.parameters / 1e6:.1f} M"


def models(context: DoctorContext) -> Finding:
    """Target and draft load (default: the bundled pair), and the draft is the smaller one, or the target's
    own quantisation."""
    target, draft = _target(context).info, _draft_info(context)
    quantised = draft.parameters == target.parameters and _paths(context)[1].endswith(".gguf")
    if draft.parameters >= target.parameters and not quantised:
        return Finding(
            "warn",
            f"The draft ({draft.parameters:,} parameters) is not smaller than the target "
            f"({target.parameters:,}).",
            "Swap --target and --draft, or choose a smaller draft.",
        )
    return Finding("ok", f"{_describe('target', target)} parameters; {_describe('draft', draft)}")


def tokenizers(context: DoctorContext) -> Finding:
    """Draft and target use the same tokenizer."""
    if _paths(context)[1].endswith(".gguf"):
        return _gguf_vocabulary(context)
    loaded = [_target(context), _load(_paths(context)[1], draft=True)]
    target, draft = (one.info for one in loaded)
    for side, info in (("target", target), ("draft", draft)):
        if not info.tokenizer_hash:
            return Finding(
                "fail",
                f"The {side} {info.id} has no tokenizer in its folder.",
                "Copy the tokenizer files of the model into the folder.",
            )
    if target.tokenizer_hash != draft.tokenizer_hash:
        return Finding(
            "fail",
            f"Target and draft have different tokenizers ({target.tokenizer_hash} and "
            f"{draft.tokenizer_hash}); the server will reject the edge.",
            "Choose a draft of the target's family.",
        )
    ends = [one.tokenizer.eos_token for one in loaded]
    if ends[0] != ends[1]:
        return Finding(
            "warn",
            f"Target and draft share a vocabulary, but the target ends a text with {ends[0]} and the draft "
            f"with {ends[1]}; ends of texts are drafted wrong.",
            "Prefer a draft that was trained on the target's chat format.",
        )
    return Finding("ok", f"the same on both sides ({target.tokenizer_hash})")


def _gguf_vocabulary(context: DoctorContext) -> Finding:
    from wispprof.drafters.vocabulary import match_vocabulary

    target, draft = _paths(context)
    tokenizer = _target(context).tokenizer
    if tokenizer is None:
        return Finding(
            "fail", f"The target {target} has no tokenizer in its folder.", "Copy its files there."
        )
    match = match_vocabulary(_gguf(draft, context.llama).token_texts(), tokenizer)
    if match.same:
        return Finding("ok", match.summary)
    return Finding(
        "warn",
        f"{match.summary}.",
        "The draft can write text, which the edge tokenizes anew; a draft of the target's family is faster.",
    )


def engine(context: DoctorContext) -> Finding:
    """A forward pass of the target gives finite logits, twice the same."""
    if context.engine != "torch":
        return Finding("skip", "only with --engine torch")
    import torch

    loaded = _load(_paths(context)[0])
    ids = torch.arange(4, 12).unsqueeze(0) % loaded.info.vocab_size
    with torch.inference_mode():
        first, second = (loaded.model(ids, use_cache=False).logits for _ in range(2))
    if not bool(torch.isfinite(first).all()):
        return Finding(
            "fail",
            "The target's logits are not finite.",
            "The weights are damaged or overflow in this dtype; restore them, or use float32.",
        )
    if not torch.equal(first, second):
        return Finding(
            "warn",
            "Two forward passes of the same input gave different logits.",
            "Kernels are not deterministic here; near ties may decode differently.",
        )
    return Finding("ok", "logits of the target are finite and repeatable")


def _is_the_server(context: DoctorContext) -> bool:
    """Whether ``--server`` names the port that is checked."""
    from wispprof.edge.connection import server_url

    if not context.server:
        return False
    named = urlsplit(server_url(context.server))
    return named.port == context.port and is_loopback(named.hostname or "")


def port(context: DoctorContext) -> Finding:
    """The port is free to listen on."""
    host, number = context.host, context.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, number))
        except OSError as err:
            if _is_the_server(context):
                return Finding("ok", f"{host}:{number} is used by --server")
            return Finding(
                "fail",
                f"Cannot listen on {host}:{number}: {err.strerror}.",
                "Stop the program that listens there (`ss -ltnp`), or choose another --port.",
            )
    return Finding("ok", f"{host}:{number} is free")


def api_keys(context: DoctorContext) -> Finding:
    """A server beyond loopback has API keys that only their owner can read."""
    file = context.api_key_file
    if file is None:
        if is_loopback(context.host):
            return Finding("ok", f"none needed on {context.host}")
        return Finding(
            "fail",
            f"A server on {context.host} is reachable from other machines and has no API key.",
            "Write one to a file (`openssl rand -hex 24`) and give --api-key-file.",
        )
    if not file.is_file():
        return Finding("fail", f"File {file} does not exist.", "Check --api-key-file.")
    keys = read_api_keys(file)
    if file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        return Finding("warn", f"Other users of this machine can read {file}.", f"Run `chmod 600 {file}`.")
    return Finding("ok", f"{len(keys)} key{'s' if len(keys) != 1 else ''} in {file}")


def tls(context: DoctorContext) -> Finding:
    """Certificate and key belong together and are still valid."""
    cert, key = context.tls_cert, context.tls_key
    if cert is None and key is None:
        if is_loopback(context.host):
            return Finding("skip", f"not used on {context.host}")
        return Finding(
            "warn",
            f"Prompts and keys are sent to {context.host} unencrypted.",
            "Give --tls-cert and --tls-key, or use a TLS proxy.",
        )
    if cert is None or key is None:
        return Finding("fail", "Certificate or key is missing.", "Give --tls-cert and --tls-key.")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as err:
        if _is_key(cert) and not _is_key(key):
            return Finding(
                "fail", f"{cert} holds a private key, {key} does not.", "Swap --tls-cert and --tls-key."
            )
        reason = err.reason if isinstance(err, ssl.SSLError) else err.strerror
        return Finding(
            "fail",
            f"Cannot use {cert} and {key}: {reason}.",
            "Give a PEM certificate chain and its private key.",
        )
    days = _days_left(cert)
    if days < 0:
        return Finding("fail", f"{cert} expired {-days:.0f} days ago.", "Renew it.")
    if days < 14:
        return Finding("warn", f"{cert} expires in {days:.0f} days.", "Renew it soon.")
    return Finding("ok", f"{cert} is valid for {days:.0f} more days")


def _is_key(file: Path) -> bool:
    return file.is_file() and b"PRIVATE KEY-----" in file.read_bytes()


def _days_left(cert: object) -> float:
    # The only certificate parser of the standard library; tested with every supported Python.
    decode = ssl._ssl._test_decode_cert  # type: ignore[attr-defined]
    ends = decode(str(cert))["notAfter"]
    return (ssl.cert_time_to_seconds(ends) - time.time()) / 86_400


def server(context: DoctorContext) -> Finding:
    """A running server answers a hello."""
    if not context.server:
        return Finding("skip", "no --server given")
    return asyncio.run(_hello(context))


async def _hello(context: DoctorContext) -> Finding:
    from wispprof.edge.client import EdgeClient
    from wispprof.edge.connection import ssl_context, websocket_connections
    from wispprof.settings.edge_settings import ClientSettings

    settings = ClientSettings(
        access=context.access, name="doctor", hello_ms=CONNECT_MS, give_up_ms=CONNECT_MS
    )
    connect = websocket_connections(context.server, ssl=ssl_context(context.access.ca_file))
    async with EdgeClient(connect, settings) as client:
        target = client.welcome.target if client.welcome else ""
        return Finding("ok", f"serves {target}; round trip {client.rtt.least_ms:.1f} ms")
