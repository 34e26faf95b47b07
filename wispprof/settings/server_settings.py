"""Settings of a verification server. Durations in ms, sizes in tokens."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wispprof.errors import SettingsError, WispprofError
from wispprof.settings.fields import Settings, setting
from wispprof.settings.shared_settings import (
    backend_setting,
    device_setting,
    engine_dtype_setting,
    engine_setting,
    vllm_args_setting,
    vllm_untested_setting,
)
from wispprof.settings.sources import named_value


@dataclass(frozen=True)
class ServerSettings(Settings):
    """Everything ``wispprof serve`` can be told. Keys of ``api_key_file`` are added to ``api_keys``."""

    target: str = setting("", "Target model: folder or hub id; default: the bundled pair's target.")
    target_id: str = setting("", "Name of the target that edges ask for; default: the last part of --target.")
    estimator: Path | None = setting(
        None, "Fitted step-time estimator; without one the server fits its own steps."
    )
    plan: Path | None = setting(None, "Plan whose batching table the server obeys.")
    step_log: Path | None = setting(
        None, "File to append the shape and time of every step to, for `wispprof fit --update`."
    )
    request_log: Path | None = setting(
        None,
        "File to append a line for every ended request to, for `wispprof traffic`: lengths, SLO, round trip "
        "and acceptance, no texts; at most 64 MiB, and as much again in FILE.1.",
    )
    policy: str = setting(
        "wispprof",
        "Batching policy: server-only, fcfs, sled, specedge, wisp, wispprof or one of your own.",
    )
    policy_options: dict[str, Any] = setting(
        {},
        "Option of the policy, as NAME=VALUE; repeatable.",
        option="policy-option",
        parse=named_value,
    )

    host: str = setting("127.0.0.1", "Address to listen on; beyond loopback an API key is required.")
    port: int = setting(8200, "Port to listen on; 0 takes a free one.", minimum=0, maximum=65535)
    api_keys: tuple[str, ...] = setting(
        (),
        "Accepted API key; repeatable. Other users can read it in the process list.",
        option="api-key",
        secret=True,
    )
    api_key_file: Path | None = setting(None, "File of accepted API keys, one per line.")
    tls_cert: Path | None = setting(None, "Certificate chain (PEM); needs --tls-key.")
    tls_key: Path | None = setting(None, "Private key of the certificate (PEM).")

    device: str = device_setting()
    dtype: str = engine_dtype_setting()
    engine: str = engine_setting()
    in_process: bool = setting(
        False,
        "Run the torch engine in the server's process also on a CPU. By default it has one of its own there.",
    )
    vllm_args: dict[str, Any] = vllm_args_setting()
    vllm_untested: bool = vllm_untested_setting()
    backend: str = backend_setting()
    tensor_parallel: int = setting(1, "Processes, one per device, that share the target.", minimum=1)
    kv_tokens: int = setting(0, "Size of the KV cache; 0 lets the engine choose.", unit="tokens", minimum=0)
    max_context: int = setting(
        0,
        "Maximum tokens of a session; 0 allows the model's context, as far as memory holds it.",
        unit="tokens",
        minimum=0,
    )
    full_digest: bool = setting(
        False, "Identify the target by all bytes of its weights, not by samples of a large model."
    )
    generation_config: str = setting(
        "auto",
        "Sampling of requests that do not say: auto (the target's generation_config.json), openai "
        "(temperature 1, no filters) or a folder with a generation_config.json.",
    )

    max_items: int = setting(64, "Maximum sessions in a step.", minimum=1)
    max_tokens: int = setting(1024, "Maximum new tokens in a step.", unit="tokens", minimum=1)
    prefill_chunk: int = setting(256, "Maximum prompt tokens in a step.", unit="tokens", minimum=1)
    plan_late: bool = setting(
        False, "Plan each step when it begins, not while the one before it runs from what that may bring."
    )
    max_drafts: int = setting(
        32, "Maximum pending draft tokens per session.", unit="tokens", minimum=1, maximum=64
    )

    max_sessions: int = setting(1024, "Maximum open sessions.", minimum=1)
    max_waiting: int = setting(256, "Maximum requests that wait for KV memory.", minimum=0)
    sessions_per_key: int = setting(1024, "Maximum open sessions of one API key.", minimum=1)
    tokens_per_key_per_s: float = setting(
        0.0, "Rate limit of one API key; 0 switches it off.", unit="tokens/s", minimum=0
    )
    max_connections: int = setting(
        1024, "Maximum open connections; the process's limit of open files may allow fewer.", minimum=1
    )
    connections_per_key: int = setting(512, "Maximum edges connected with one API key.", minimum=1)
    connections_per_address: int = setting(
        256, "Maximum connections of one address beyond this machine.", minimum=1
    )
    request_timeout_ms: float = setting(
        10_000.0, "Time for the head of an HTTP request to arrive, and for its body.", unit="ms", minimum=1
    )
    max_body_bytes: int = setting(8 << 20, "Longest body of an HTTP request.", unit="bytes", minimum=1024)
    allowed_hosts: tuple[str, ...] = setting(
        (),
        "Name of this server for HTTP and WebSocket clients of a server without API keys; repeatable. "
        "Loopback names are always allowed.",
        option="allowed-host",
    )
    max_prompt: int = setting(0, "Longest prompt; 0 allows the model's context.", unit="tokens", minimum=0)
    max_new: int = setting(4096, "Maximum tokens that one request may generate.", unit="tokens", minimum=1)
    admit: str = setting(
        "slo",
        "Admission: slo refuses sessions whose SLO the estimator says cannot be met, all refuses none.",
        choices=("slo", "all"),
    )
    admit_load: float = setting(
        0.9, "Share of the server's time that admitted sessions may need.", minimum=0.01
    )
    prefix_cache_sessions: int = setting(64, "Ended or lost sessions whose KV stays for reuse.", minimum=0)
    prefix_cache_ttl_ms: float = setting(
        300_000.0, "Time that the KV of an ended session stays.", unit="ms", minimum=0
    )
    idle_ttl_ms: float = setting(
        600_000.0, "Time without a frame after which a session is closed.", unit="ms", minimum=0
    )
    idle_evict_ms: float = setting(
        2_000.0,
        "Time without a frame after which a session's KV may be evicted if memory is short.",
        unit="ms",
        minimum=0,
    )

    http_tokens_per_s: float = setting(
        0.0, "SLO of an HTTP request that names none; 0 guarantees no speed.", unit="tokens/s", minimum=0
    )
    http_max_tokens: int = setting(
        256, "Maximum tokens of an HTTP request that names no number.", unit="tokens", minimum=1
    )
    hello_timeout_ms: float = setting(
        5_000.0, "Time that a new connection has to say hello.", unit="ms", minimum=1
    )
    backlog_frames: int = setting(
        1024, "Unread frames after which a slow reader's connection is closed.", minimum=1
    )
    fronts: int = setting(
        1, "Processes that hold the connections; 0 holds them in the engine's process.", minimum=0, maximum=64
    )
    drain_timeout_ms: float = setting(
        30_000.0, "Time that sessions have to finish after Ctrl-C or SIGTERM.", unit="ms", minimum=0
    )
    live: bool = setting(False, "Show queue, steps and SLO attainment while serving.")
    log_level: str = setting(
        "info", "Least severe messages to log.", choices=("debug", "info", "warning", "error")
    )

    def check_together(self) -> None:
        if self.api_key_file is not None:
            keys = dict.fromkeys((*self.api_keys, *read_api_keys(self.api_key_file)))
            object.__setattr__(self, "api_keys", tuple(keys))
        if (self.tls_cert is None) != (self.tls_key is None):
            raise SettingsError("TLS needs a certificate and its key.", "Give both --tls-cert and --tls-key.")
        if not self.loopback and not self.api_keys:
            raise WispprofError(
                f"Refusing to listen on {self.host} without an API key.",
                "Give --api-key-file, or listen on 127.0.0.1.",
            )

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)


@dataclass(frozen=True)
class ReplicaSettings(Settings):
    """Several servers behind one address."""

    ray: bool = setting(False, "Run replicas behind one address, by Ray Serve.")
    replicas: int = setting(1, "Servers that --ray starts.", minimum=1)
    max_replicas: int = setting(0, "Maximum servers that --ray adds under load; 0 adds none.", minimum=0)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_api_keys(path: Path) -> tuple[str, ...]:
    """Keys of a file, one per line; empty lines and ``#`` comments are skipped.

    Raises :class:`WispprofError` if the file holds no key or a short one, or cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        reason = err.strerror if isinstance(err, OSError) else "it is not UTF-8 text"
        raise WispprofError(
            f"The keys in {path} cannot be read: {reason}.", "Write one key per line into it."
        ) from err
    lines = [line.strip() for line in text.splitlines()]
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise WispprofError(f"{path} holds no API key.", "Write one key per line into it.")
    short = [key for key in keys if len(key) < 16]
    if short:
        raise WispprofError(
            f"{path} holds a key of {len(short[0])} characters.",
            "Use at least 16, for example from `openssl rand -hex 24`.",
        )
    return keys
