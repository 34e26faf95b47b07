"""Where drafting pays: every shipped GPU profile × load level, for the drafting of a fleet's first class."""

from __future__ import annotations

from collections.abc import Callable

from wispprof.artifacts.fleet_answer import PayRow
from wispprof.artifacts.plan import MODES
from wispprof.artifacts.profile import shipped_servers
from wispprof.planning.batch_table import sessions_of_levels
from wispprof.planning.draft_table import EdgeCosts, speed_curve
from wispprof.planning.fleet_file import FleetSpec
from wispprof.planning.session_speed import LoadedStepTimes, Runs
from wispprof.settings.planner_settings import PlanSettings
from wispprof.simulation.server_models import server_of


def pays_map(spec: FleetSpec, progress: Callable[[str], None] = lambda doing: None) -> tuple[PayRow, ...]:
    """Rows of all candidates and of every shipped server profile that has an estimator."""
    of = spec.devices[0]
    runs = Runs.geometric(of.acceptance)
    workload = spec.workload(of)
    context = workload.quantile("context", 0.5) if workload else of.prompt + of.output // 2
    rows: list[PayRow] = []
    for name in dict.fromkeys((*shipped_servers(), *(c.server for c in spec.servers))):
        model, _ = server_of(name)
        times = LoadedStepTimes(model.estimator, max(1, context))
        limits = PlanSettings(contexts=(times.cached,), kv_tokens=model.kv_tokens or 0, max_sessions=512)
        gpu, shape = _parts(name)
        for level, sessions in sessions_of_levels(times, limits.kv_sessions).items():
            found = []
            for mode in MODES:
                curve = speed_curve(times, sessions, EdgeCosts(of.profile(), of.rtt_ms, mode, runs, runs), 8)
                best = max(range(1, 9), key=lambda k: curve.mean[k].tokens_per_s)
                found.append((curve.mean[best].tokens_per_s / curve.mean[0].tokens_per_s, best, mode))
            gain, k, mode = max(found)
            rows.append(PayRow(name, gpu, shape, level, sessions, gain, k, mode))
        progress(f"{name}: where drafting pays")
    return tuple(rows)


_GPUS = ("a100-sxm", "h100-sxm", "h200-sxm", "b200-sxm", "l40s")


def _parts(name: str) -> tuple[str, str]:
    """GPU and model in the name of a shipped profile: ``h100-sxm-qwen3-32b-vllm-bf16-tp2``."""
    gpu = next((g for g in _GPUS if name.startswith(g)), "")
    if not gpu:
        return name, ""
    model, _, rest = name[len(gpu) + 1 :].partition("-vllm-")
    gpus = rest.rpartition("tp")[2]
    return (f"{gpus} × {gpu}" if gpus not in ("", "1") else gpu), model
