"""Settings of the profilers and of acceptance traces."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wispprof.errors import SettingsError
from wispprof.settings.draft_settings import LlamaSettings
from wispprof.settings.fields import Settings, setting
from wispprof.settings.shared_settings import (
    ServerAccess,
    backend_setting,
    device_setting,
    dtype_setting,
    engine_dtype_setting,
    engine_setting,
    vllm_args_setting,
    vllm_untested_setting,
)
from wispprof.types import Sampling

if TYPE_CHECKING:
    from wispprof.profiling.drafter_runner import EdgeAxes
    from wispprof.profiling.shape_grid import Axes

QUICK_MINUTES = 0.6
"""Time limit of the quick server grid, so that it stays quick on a slow machine."""


@dataclass(frozen=True)
class SweepSettings(Settings):
    """How often a workload is measured.

    It is measured in blocks of ``block`` samples until the half-width of the 95 % confidence interval of its
    median, relative to the median, is at most ``target``. It gets ``min_samples`` to ``max_samples``, and no
    further block once its samples took ``max_workload_s`` seconds. The first block starts with ``warmup``
    uncounted runs, later ones with one. After every ``sentinel_every`` blocks the sentinel workload is
    measured with ``reference_samples``; if its median is more than ``drift`` away from the others, the
    neighbouring blocks count as disturbed.
    """

    seed: int = 0
    target: float = 0.03
    warmup: int = 2
    block: int = 3
    min_samples: int = 6
    max_samples: int = 30
    max_workload_s: float = 4.0
    sentinel_every: int = 10
    reference_samples: int = 6
    drift: float = 0.10

    def check_together(self) -> None:
        counts = (self.block, self.min_samples, self.sentinel_every, self.reference_samples)
        if not 0 < self.target < 1:
            raise SettingsError(f"target must be between 0 and 1, got {self.target}.")
        if min(counts) < 1 or self.min_samples > self.max_samples:
            raise SettingsError(
                "block, min_samples, sentinel_every and reference_samples must be at least 1 and "
                f"min_samples at most max_samples, got {counts} and {self.max_samples}."
            )

    @property
    def reference_warmup(self) -> int:
        """Uncounted runs of the sentinel. Short measurements are frequent, so they need only one."""
        return min(1 if self.reference_samples < self.min_samples else self.warmup, self.warmup)


@dataclass(frozen=True)
class PrecisionSettings(Settings):
    """What a command changes of the :class:`SweepSettings` of a grid."""

    target: float | None = setting(
        None,
        "Relative half-width of the median's 95 % confidence interval to reach.",
        minimum=0.001,
        maximum=0.5,
    )
    repeats: int | None = setting(None, "Maximum samples of a workload.", minimum=1)
    seed: int = setting(0, "Seed of order, contents and sampling.", minimum=0)

    def applied_to(self, sweep: SweepSettings) -> SweepSettings:
        """``sweep`` with these changes."""
        changed = replace(sweep, seed=self.seed)
        if self.target is not None:
            changed = replace(changed, target=self.target)
        if self.repeats is not None:
            least = min(sweep.min_samples, self.repeats)
            changed = replace(changed, max_samples=self.repeats, min_samples=least)
        return changed


@dataclass(frozen=True)
class Output:
    """Where a profile goes. Without ``path`` it is only returned, and no journal is written."""

    path: Path | None = None
    resume: bool = False
    overwrite: bool = False


def _grid() -> Any:
    return setting("quick", "Grid of workloads: quick, standard, full, or a TOML file of axes.")


@dataclass(frozen=True)
class ServerProfilerSettings(Settings):
    """What a server profile measures. ``axes`` replaces the named ``grid``, ``sweep`` its precision.

    Without ``budget_minutes`` only the quick grid is limited, to :data:`QUICK_MINUTES`; its first
    :data:`~wispprof.profiling.server_profiler.QUICK_SHAPES` shapes are measured all the same.
    """

    model: str = setting("", "Target model: folder or hub id; default: the bundled one.")
    shape: str = setting("", "Random weights in a known shape instead of --model, such as qwen3-8b.")
    dtype: str = engine_dtype_setting()
    device: str = device_setting()
    engine: str = engine_setting()
    vllm_args: dict[str, Any] = vllm_args_setting()
    vllm_untested: bool = vllm_untested_setting()
    backend: str = backend_setting()
    grid: str = _grid()
    axes: Axes | None = None
    kv_tokens: int | None = setting(
        None,
        "Size of the KV cache; default: what the device holds and the grid uses.",
        unit="tokens",
        minimum=1,
    )
    max_sessions: int = 0
    budget_minutes: float | None = setting(
        None, "Time limit; the most informative workloads are measured first.", unit="minutes", minimum=0
    )
    precision: PrecisionSettings = field(default_factory=PrecisionSettings)
    sweep: SweepSettings | None = None
    output: Output = field(default_factory=Output)

    @property
    def budget_s(self) -> float | None:
        minutes = self.budget_minutes
        if minutes is None and self.grid == "quick" and self.axes is None:
            minutes = QUICK_MINUTES
        return None if minutes is None else minutes * 60


@dataclass(frozen=True)
class EdgeProfilerSettings(Settings):
    """What an edge profile measures. ``axes`` replaces the named ``grid``, ``sweep`` its precision."""

    draft: str = setting("", "Draft model: folder, hub id or .gguf file; default: the bundled one.")
    dtype: str = dtype_setting()
    device: str = device_setting()
    llama: LlamaSettings = field(default_factory=LlamaSettings)
    grid: str = _grid()
    axes: EdgeAxes | None = None
    sampling: Sampling = field(default_factory=Sampling)
    sustained_s: float | None = setting(
        None,
        "Length of the sustained window; 0 omits it; default: the grid's.",
        unit="s",
        minimum=0,
        option="sustained-seconds",
    )
    precision: PrecisionSettings = field(default_factory=PrecisionSettings)
    sweep: SweepSettings | None = None
    output: Output = field(default_factory=Output)


@dataclass(frozen=True)
class LinkProfilerSettings(Settings):
    """What a link profile measures. ``sizes``: payload bytes one way; ``timeout_s``: of one exchange."""

    server: str = ""
    access: ServerAccess = field(default_factory=ServerAccess)
    count: int = setting(40, "Counted exchanges of each kind.", minimum=3)
    warmup: int = 3
    sizes: tuple[int, ...] = (1 << 10, 16 << 10, 64 << 10)
    timeout_s: float = 10.0
    output: Output = field(default_factory=Output)


@dataclass(frozen=True)
class TraceSettings(Settings):
    """What an acceptance trace records. ``batch``: sessions of the target at once."""

    target: str = setting("", "Target model: folder or hub id; default: the bundled one.", option="model")
    draft: str = setting(
        "",
        "Draft model: folder, hub id, FILE.gguf, xllamacpp:FILE.gguf or llama-server:URL; default: the "
        "bundled one.",
    )
    tokenizer: str = setting(
        "", "The target's tokenizer for a .gguf draft; default: that of --model, or beside the draft."
    )
    drafter: str = setting("model", "What drafts: model, lookup or both (lookup first).")
    dtype: str = engine_dtype_setting()
    device: str = device_setting()
    llama: LlamaSettings = field(default_factory=LlamaSettings)
    sampling: Sampling = field(default_factory=Sampling)
    prompts: Path | None = setting(
        None,
        "Prompts: a text file, or JSON lines with prompt, text or messages (a chat, for which the model's "
        "template is applied); default: held-out source files.",
    )
    count: int = setting(32, "Number of prompts.", minimum=1)
    prompt_tokens: int = setting(128, "Maximum length of a prompt.", unit="tokens", minimum=1)
    path_tokens: int = setting(128, "Maximum length of the target's continuation.", unit="tokens", minimum=1)
    depth: int = setting(8, "Draft tokens per position.", minimum=1, maximum=64, option="k")
    batch: int = 16
    seed: int = setting(0, "Seed of prompts and sampling.", minimum=0)


@dataclass(frozen=True)
class TraceEngineSettings(Settings):
    """Which engine generates the paths of a trace."""

    engine: str = engine_setting()
    vllm_args: dict[str, Any] = vllm_args_setting()
    vllm_untested: bool = vllm_untested_setting()
