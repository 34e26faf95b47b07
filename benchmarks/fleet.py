"""Time of `wispprof fleet` for 10,000 devices on some 64 servers, with two worker processes.

Physics: none; this is a figure of the tool. All six systems are searched, the best two simulated whole.

    python benchmarks/fleet.py
"""

from __future__ import annotations

import json
import resource
import tempfile
import time
from pathlib import Path

from wispprof.artifacts.fleet_answer import FleetAnswer
from wispprof.planning.fleet_file import read_fleet
from wispprof.planning.fleet_planner import plan_fleet
from wispprof.planning.replica_model import SYSTEM_NAMES
from wispprof.settings.planner_settings import FleetSettings
from wispprof.simulation.capacity_search import workers

FLEET = """
title = "10,000 devices"
model = "Qwen3-32B"

[[devices]]
name = "laptop"
count = 7000
requests_per_h = 60
draft_tokens_per_s = 60
rtt_ms = 30
slos = {4 = 0.5, 8 = 0.5}
ttft_ms = 4000
prompt = 500
output = 180

[[devices]]
name = "phone"
count = 3000
requests_per_h = 40
draft_tokens_per_s = 20
rtt_ms = 60
slos = {4 = 1}
ttft_ms = 5000
prompt = 300
output = 150

[[servers]]
name = "a100"
server = "a100-sxm-qwen3-32b-vllm-bf16-tp1"
gpu = "a100_sxm"
kv_tokens = KV
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "fleet.toml"
        # Little KV memory, so that the fleet needs some 64 servers.
        file.write_text(FLEET.replace("KV", "9000"))
        spec = read_fleet(file, SYSTEM_NAMES)
    begun = time.perf_counter()
    with workers(2) as executor:
        answer: FleetAnswer = plan_fleet(spec, FleetSettings(), executor, print)
    wall_s = time.perf_counter() - begun
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    best = answer.options[0]
    print(f"{best.servers} servers of {best.server} with {best.system}")
    print(f"SLO met: planned {best.attainment}, whole fleet {best.fleet_attainment}")
    print(json.dumps({"servers": best.servers, "wall_s": round(wall_s, 1), "cpu_s": round(used.ru_utime, 1)}))


if __name__ == "__main__":
    main()
