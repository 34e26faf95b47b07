"""Compile the Triton kernels for GPUs that need not be here; print ptxas' figures of each as JSON.

Run as a process of its own: within the tests the kernels may be loaded for Triton's interpreter.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource

from wispprof.engines.torch.triton_attention import _merge_splits_kernel, _split_kv_kernel, num_warps

# Qwen3-8B: 32 query heads over 8 KV heads of 128.
SPLIT_KV = {"GROUP": 4, "DIM": 128, "BLOCK_SIZE": 64, "KEY_TILE": 64, "SPLITS": 16}
MERGE_SPLITS = {"DIM": 128, "SPLITS": 16}
INDICES = ("query_start_loc", "seq_lens", "block_tables", "tree_starts")
DIVISIBLE_BY_16 = ("q_token", "q_head", "kv_block", "kv_slot", "kv_head", "heads")


def main() -> None:
    found: dict[str, dict[str, int]] = {}
    for cap, dtype in itertools.product((80, 89, 90, 100), ("bf16", "fp16")):
        # Both dtypes give the same figures; the wide tile, of prompts, is compiled in one.
        for tile, trees in itertools.product((16, 64) if dtype == "bf16" else (16,), (False, True)):
            constants = SPLIT_KV | {"QUERY_TILE": tile, "TREES": trees}
            name = f"{'tree' if trees else 'chain'} sm_{cap} {tile} {dtype}"
            found[name] = figures(_split_kv_kernel, dtype, constants, cap, num_warps(tile))
    for cap in (80, 89, 90, 100):
        found[f"merge sm_{cap} 0 bf16"] = figures(_merge_splits_kernel, "bf16", MERGE_SPLITS, cap)
    print(json.dumps(found))


def figures(kernel: Any, dtype: str, constants: dict[str, int], cap: int, warps: int = 4) -> dict[str, int]:
    """Registers a thread, spilled bytes, bytes of shared memory, with the arguments of a served step."""
    types = dict.fromkeys(kernel.arg_names, "i32") | {"scale": "fp32"}
    types |= dict.fromkeys(("q", "keys", "values", "out"), f"*{dtype}")
    types |= dict.fromkeys(("partial", "stats"), "*fp32") | dict.fromkeys(INDICES, "*i32")
    types |= {"ancestors": "*i64"}
    types |= dict.fromkeys(constants, "constexpr")
    place = kernel.arg_names.index
    aligned = [n for n in kernel.arg_names if types[n].startswith("*") or n in DIVISIBLE_BY_16]
    source = ASTSource(
        kernel,
        {name: types[name] for name in kernel.arg_names},
        {(place(name),): value for name, value in constants.items()},
        {(place(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", cap, 32), options={"num_warps": warps})
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(compiled.asm["ptx"])
        command = [get_ptxas(cap).path, "-v", f"--gpu-name={sm_arch_from_capability(cap)}", ptx]
        done = subprocess.run([*command, "-o", "/dev/null"], capture_output=True, text=True, check=True)
    patterns = {
        "registers": r"Used (\d+) registers",
        "spill_stores": r"(\d+) bytes spill stores",
        "spill_loads": r"(\d+) bytes spill loads",
    }
    report = {name: int(re.findall(text, done.stderr)[0]) for name, text in patterns.items()}
    return {**report, "shared": compiled.metadata.shared}


if __name__ == "__main__":
    main()
