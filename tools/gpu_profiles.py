"""Write the shipped profiles and estimators of GPUs: ``python -m tools.gpu_profiles`` (extra: gpu-tables).

An 8B, a 32B and a 70B model in bf16 under vLLM, each on the fewest GPUs that leave KV memory for a service;
the 32B one also on a single A100, as WISP used it.
"""

from __future__ import annotations

from pathlib import Path

from wispprof.fitting.pipeline import save_beside
from wispprof.profiling.gpu_import import import_profile
from wispprof.profiling.operator_tables import GpuTarget
from wispprof.settings.profiler_settings import Output

LLAMA_8B, QWEN_32B, LLAMA_70B = (
    "meta-llama/Meta-Llama-3.1-8B",
    "Qwen/Qwen3-32B",
    "meta-llama/Meta-Llama-3.1-70B",
)
TARGETS = tuple(
    GpuTarget(system, model, tp)
    for model, sizes in (
        (LLAMA_8B, {"a100_sxm": (1,), "h100_sxm": (1,), "h200_sxm": (1,), "b200_sxm": (1,), "l40s": (1,)}),
        (QWEN_32B, {"a100_sxm": (1, 2), "h100_sxm": (2,), "h200_sxm": (1,), "b200_sxm": (1,), "l40s": (4,)}),
        (LLAMA_70B, {"a100_sxm": (4,), "h100_sxm": (4,), "h200_sxm": (2,), "b200_sxm": (2,), "l40s": (8,)}),
    )
    for system, counts in sizes.items()
    for tp in counts
)


def write_all(folder: Path) -> None:
    """Write a profile, its manifest and its estimator of every target."""
    for target in TARGETS:
        path = folder / target.name
        profile = import_profile(target, Output(path, overwrite=True))
        save_beside(profile, path)
        print(f"{target.name}: {len(profile.rows)} rows, KV {profile.manifest.engine['kv_tokens']:,} tokens")


if __name__ == "__main__":
    write_all(Path(__file__).resolve().parent.parent / "profiles")
