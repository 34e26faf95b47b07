"""Settings of draft models, shared by everything that runs one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wispprof.settings.fields import Settings, setting


@dataclass(frozen=True, slots=True)
class LlamaSettings(Settings):
    """How llama.cpp runs a ``.gguf`` draft."""

    threads: int | None = setting(
        None,
        "Threads of a .gguf draft; default: the physical cores that other programs leave free.",
        minimum=1,
        maximum=512,
    )
    batch_threads: int | None = setting(
        None,
        "Threads of a .gguf draft that reads several tokens; default: --threads.",
        minimum=1,
        maximum=512,
    )
    draft_context: int = setting(4096, "Maximum context of a .gguf draft.", unit="tokens", minimum=16)
    gpu_layers: int | None = setting(
        None, "Layers of a .gguf draft on the GPU; default: all, if llama.cpp was built for one.", minimum=0
    )
    llama_lib: Path | None = setting(
        None, "Shared library of llama.cpp (libllama); default: that of an installed Python package."
    )
