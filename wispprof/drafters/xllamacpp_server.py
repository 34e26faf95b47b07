"""A GGUF draft without a compiler: xllamacpp's llama-server in this process, on a free loopback port."""

from __future__ import annotations

import importlib.util
import secrets
from pathlib import Path
from typing import Any

from wispprof.drafters.core_budget import default_threads
from wispprof.errors import ModelError, ModelMissing
from wispprof.settings.draft_settings import LlamaSettings

SCHEME = "xllamacpp:"


class XllamacppServer:
    """``url``: where it answers, ``key``: what it asks of its clients. It stops with the object.
    ``device``: ``cpu`` keeps every layer there.

    Raises :class:`ModelMissing` without the file, :class:`ModelError` without the package or if it cannot
    load the file.
    """

    def __init__(self, path: Path, settings: LlamaSettings, device: str = "auto") -> None:
        if not path.is_file():
            raise ModelMissing(f"There is no model file {path}.", "Give a .gguf file.")
        if importlib.util.find_spec("xllamacpp") is None:
            raise ModelError(
                f"{SCHEME} needs the package xllamacpp, which is not installed.",
                "Install it (`pip install xllamacpp`).",
            )
        import xllamacpp

        self.key = secrets.token_hex(16)
        params: Any = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = settings.draft_context
        params.n_parallel = 1
        params.port = 0
        params.api_keys = [self.key]
        params.cpuparams.n_threads = settings.threads or default_threads()
        params.cpuparams_batch.n_threads = settings.batch_threads or params.cpuparams.n_threads
        if device == "cpu":
            params.n_gpu_layers = 0
        elif settings.gpu_layers is not None:
            params.n_gpu_layers = settings.gpu_layers
        params.verbosity = -1
        try:
            self._server = xllamacpp.Server(params)
        except Exception as err:  # the binding raises what C++ threw
            raise ModelError(f"xllamacpp cannot load {path}: {err}.", "Download the file again.") from err
        self.url = str(self._server.listening_address)
