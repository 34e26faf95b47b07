"""What the demo measures and the load it offers: the trade between its time and its precision."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from wispprof.profiling.shape_grid import Axes
from wispprof.settings.profiler_settings import SweepSettings
from wispprof.types import Sampling

__all__ = ["DemoSettings"]

PROMPT = '''def read_config(path, encoding="utf-8"):
    """'''


@dataclass(frozen=True)
class DemoSettings:
    """``pair``: folder with ``target`` and ``draft``; ``None`` is the bundled pair.

    ``axes`` and ``sweep``: the server profile; a few dozen shapes, and a higher drift limit than a real
    profile, because a demo runs beside other programs. The trace has ``prompts`` of ``prompt_tokens``, paths
    of ``path_tokens`` and drafts of ``depth`` tokens. ``devices`` replayed edges make ``requests`` each.
    ``shares``: the SLOs of their classes, as shares of the speed that the estimator expects of server-only
    serving with as many sessions. ``systems`` are compared over an emulated link of ``rtt_ms``. ``answer``:
    sampling of the answer that is shown, because small models repeat themselves when greedy; all else is
    greedy.
    """

    out: Path = Path("out/demo")
    pair: Path | None = None
    prompt: str = PROMPT
    answer_tokens: int = 96
    answer: Sampling = field(default_factory=lambda: Sampling(temperature=0.8, top_p=0.9))
    axes: Axes = field(
        default_factory=lambda: Axes(
            items=(1, 2, 4, 8, 16),
            new=(1, 3, 6),
            cached=(64, 256, 512),
            skew_items=(4, 12),
            chunk=(64, 128),
            chunk_cached=(0, 256),
            mixed_items=(4,),
        )
    )
    sweep: SweepSettings = field(
        default_factory=lambda: SweepSettings(
            target=0.06,
            min_samples=5,
            max_samples=12,
            max_workload_s=0.5,
            sentinel_every=12,
            drift=0.6,
        )
    )
    prompts: int = 16
    prompt_tokens: int = 96
    path_tokens: int = 96
    depth: int = 8
    systems: tuple[str, ...] = ("server-only", "sled", "wisp", "wispprof")
    devices: int = 8
    requests: int = 3
    max_new: int = 64
    shares: tuple[float, ...] = (0.3, 0.5, 0.7, 0.9)
    rtt_ms: float = 5.0
    seed: int = 0

    @classmethod
    def quick(cls, out: Path = Path("out/demo"), pair: Path | None = None) -> DemoSettings:
        """The same with fewer measurements and requests: a minute instead of three."""
        full = cls(out=out, pair=pair)
        return replace(
            full,
            axes=replace(full.axes, items=(1, 4, 8), new=(1, 5), cached=(64, 256), skew_items=(4,)),
            sweep=replace(full.sweep, min_samples=4, max_samples=6, max_workload_s=0.25),
            prompts=8,
            prompt_tokens=64,
            path_tokens=64,
            answer_tokens=64,
            requests=2,
            max_new=40,
        )

    @property
    def target(self) -> Path:
        return self._side("target")

    @property
    def draft(self) -> Path:
        return self._side("draft")

    def _side(self, name: str) -> Path:
        from wispprof.artifacts import bundled_path

        return self.pair / name if self.pair else bundled_path(f"models/reference-pair/{name}")
