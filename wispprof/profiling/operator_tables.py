"""Measured GPU operators: the public tables of ``aiconfigurator-core``, read through its compiled engine.

The package is the extra ``wispprof[gpu-tables]``. Only this module knows it. It answers for one model on one
GPU under one framework: operators of each token by rows, attention by (items, new, cached), and how much of
a time was measured. Nothing here composes steps (:mod:`wispprof.profiling.operator_steps`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from wispprof.artifacts.files import content_hash
from wispprof.errors import ProfileError, suggestion
from wispprof.types import ModelInfo

PACKAGE = "aiconfigurator-core"
DTYPES = ("bf16", "fp8")
FRAMEWORKS = ("vllm", "trtllm", "sglang")
# GEMM, KV cache, attention. vLLM and SGLang keep KV in bf16 beside fp8 weights unless told otherwise.
_QUANTIZED = {
    "bf16": ("bfloat16", "bfloat16", "bfloat16"),
    "fp8": ("fp8", "bfloat16", "bfloat16"),
    "fp8-trtllm": ("fp8", "fp8", "fp8"),
}
MEMORY_SHARE = 0.9
"""Of a GPU's memory that vLLM uses, and of what is free that TensorRT-LLM gives to KV: their defaults."""
STEP_TOKENS = 8192
"""Most tokens of a step: vLLM's default for a server on such a GPU, and TensorRT-LLM's."""


class GpuTarget(NamedTuple):
    """What a profile is of. ``system``: the tables' name of a GPU, such as ``h200_sxm``."""

    system: str
    model: str
    tp: int = 1
    framework: str = "vllm"
    dtype: str = "bf16"

    @property
    def name(self) -> str:
        """Of its profile: ``h200-sxm-qwen3-32b-vllm-bf16-tp2``."""
        model = self.model.rpartition("/")[2].lower().removeprefix("meta-")
        return f"{self.system.replace('_', '-')}-{model}-{self.framework}-{self.dtype}-tp{self.tp}"

    @property
    def command(self) -> str:
        """That makes its profile."""
        return (
            f"wispprof profile import-gpu --system {self.system} --model {self.model} --tp {self.tp} "
            f"--framework {self.framework} --dtype {self.dtype}"
        )


class Shares(NamedTuple):
    """Of a step's time by the origin of its operators: a measured point itself, between measured points,
    and from a formula. Attention over a cached prefix counts as a formula: it scales a measured one."""

    measured: float
    interpolated: float
    formula: float


@dataclass(frozen=True)
class GpuMemory:
    """Cache tokens of one replica (all its GPUs), and bytes of the weights on each GPU."""

    kv_tokens: int
    weight_bytes: int


def _missing() -> ProfileError:
    return ProfileError(
        f"Measured GPU tables need the package {PACKAGE}, which is not installed.",
        "Install it with: pip install 'wispprof[gpu-tables]'. The shipped profiles work without it.",
    )


def _core() -> Any:
    """The package. Raises :class:`ProfileError` without it."""
    try:
        import aiconfigurator_core
    except ImportError:
        raise _missing() from None
    return aiconfigurator_core


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the package's remarks on tables of other model families."""
    logger = logging.getLogger("aiconfigurator_core")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def package_version() -> str:
    """The package's version, read without importing it."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise _missing() from None


def tables_hash(system: str) -> str:
    """Hash of the system's tables and of the engine that reads them, from the checksums of the installed
    package."""
    found = importlib.metadata.distribution(PACKAGE).files or []
    parts = (f"systems/data/{system}/", f"systems/{system}.yaml", "_aiconfigurator_core.abi3.so")
    lines = sorted(f"{f} {f.hash.value}" for f in found if f.hash and any(p in str(f) for p in parts))
    return content_hash("\n".join(lines).encode())


def systems() -> list[dict[str, Any]]:
    """The GPUs in the tables: name, memory, and the tables' version for each framework."""
    core = _core()
    from pathlib import Path

    import yaml
    from aiconfigurator_core.sdk import perf_database

    folder = Path(core.__file__).parent / "systems"
    found = []
    for path in sorted(folder.glob("*.yaml")):
        spec = yaml.safe_load(path.read_text("utf-8"))
        if not isinstance(spec, dict) or "gpu" not in spec:
            continue
        versions = {}
        for framework in FRAMEWORKS:
            if not list((folder / spec["data_dir"]).glob(f"gemm/{framework}/*")):
                continue
            with _quiet():
                versions[framework] = str(
                    perf_database.resolve_query_version(path.stem, framework, "current")
                )
        gib = spec["gpu"]["mem_capacity"] / 2**30
        found.append({"system": path.stem, "memory_gib": round(gib), "versions": versions})
    return found


def models() -> list[str]:
    """Models whose configs ship with the package."""
    from pathlib import Path

    folder = Path(_core().__file__).parent / "model_configs"
    names = (p.name.removesuffix("_config.json") for p in folder.glob("*_config.json"))
    return sorted(n.replace("--", "/", 1) for n in names if not n.endswith("_hf_quant"))


class OperatorTables:
    """The operators of one :class:`GpuTarget`. Raises :class:`ProfileError` for what the tables lack."""

    def __init__(self, target: GpuTarget) -> None:
        self.target = target
        _check(target)
        from aiconfigurator_core.sdk import EngineHandle, perf_database

        key = f"{target.dtype}-{target.framework}"
        gemm, cache, attention = _QUANTIZED.get(key, _QUANTIZED[target.dtype])
        self._modes: dict[str, Any] = {"gemm_quant_mode": gemm, "kvcache_quant_mode": cache}
        self._experts: dict[str, Any] = {}
        if self._config.get("num_experts"):
            if target.dtype != "bf16":
                raise ProfileError(
                    f"The tables' {target.dtype} times of the experts of {target.model} are up to four times "
                    "those in bf16.",
                    "Use --dtype bf16.",
                )
            # As vLLM does by default: every GPU holds a slice of each expert.
            self._experts = {"moe_tp_size": target.tp, "moe_ep_size": 1, "moe_quant_mode": gemm}
        try:
            with _quiet():
                self.tables_version = str(
                    perf_database.resolve_query_version(target.system, target.framework, "current")
                )
                self._engine: Any = EngineHandle.compile(
                    target.model,
                    target.system,
                    target.framework,
                    backend_version=self.tables_version,
                    tp_size=target.tp,
                    fmha_quant_mode=attention,
                    **self._modes,
                    **self._experts,
                )
                self._engine.run_static_per_op(batch_size=1, isl=16, osl=2, prefix=8)
                names, last, gemms = self._operators()
        except Exception as err:
            raise ProfileError(
                f"The tables cannot price {target.model} on {target.tp} × {target.system} under "
                f"{target.framework} in {target.dtype}: {str(err).splitlines()[0].partition(' at /')[0]}",
                "See `wispprof profile gpus` for what there is.",
            ) from err
        if names.count("context_attention") != 1 or "generation_logits_gemm" not in last:
            raise ProfileError(
                f"{target.model} does not have plain attention (its operators: {', '.join(names)}).",
                "Import a model with grouped-query attention alone, such as Qwen/Qwen3-32B or "
                "Qwen/Qwen3-30B-A3B.",
            )
        self._attention = [names.index("context_attention")]
        # Lists of models with experts have the output head among the operators of a decode step alone.
        head = [i for i, name in enumerate(names) if name == "context_logits_gemm"]
        self._tokenwise = [i for i in range(len(names)) if i not in self._attention + head]
        self._head, self._decode_head = head, [last.index("generation_logits_gemm")]
        self._gemms, self._grid = gemms, self._measured_gemms(gemm)

    @functools.cached_property
    def _config(self) -> dict[str, Any]:
        from aiconfigurator_core.sdk.utils import get_model_config_from_model_path

        with _quiet():
            return dict(get_model_config_from_model_path(self.target.model))

    def _operators(self) -> tuple[list[str], list[str], dict[str, tuple[int, int]]]:
        """Names of the operators of a prompt and of a decode step, and (columns, depth) of each GEMM."""
        from aiconfigurator_core.sdk.config_builders import build_model_config
        from aiconfigurator_core.sdk.models import get_model

        target, experts = self.target, self._experts
        config = build_model_config(
            target.tp,
            1,
            1,
            experts.get("moe_tp_size", 1),
            experts.get("moe_ep_size", 1),
            moe_quant_mode=experts.get("moe_quant_mode"),
            **self._modes,
        )
        model = get_model(target.model, config, target.framework)
        lists: list[list[str]] = []
        gemms: dict[str, tuple[int, int]] = {}
        for operators in (model.context_ops, model.generation_ops):
            names: list[str] = []
            for operator in operators:
                ((kind, spec),) = json.loads(operator._spec_json()).items()
                names.append(spec["name"])
                if kind == "Gemm":
                    gemms[spec["name"]] = (spec["n"], spec["k"])
            lists.append(names)
        return lists[0], lists[1], gemms

    def _measured_gemms(self, gemm: str) -> dict[Any, Any]:
        """Measured GEMMs as rows → columns → depths."""
        from aiconfigurator_core.sdk import common, perf_database
        from aiconfigurator_core.sdk.engine_table_view import fetch_table_view

        target = self.target
        with _quiet():
            database = perf_database.get_database(target.system, target.framework, self.tables_version)
            table: dict[Any, Any] = fetch_table_view(database, "_gemm_data")[common.GEMMQuantMode[gemm]]
        return table

    @functools.cached_property
    def measured_rows(self) -> tuple[int, ...]:
        """Row counts at which GEMMs were measured, ascending. Between them times are interpolated."""
        return tuple(sorted(rows for rows, columns in self._grid.items() if columns))

    def tokenwise(self, rows: int) -> list[tuple[str, float, str]]:
        """(name, ms, origin) of every operator that works on each token, the output head excluded."""
        return self._evaluate(self._tokenwise, rows)

    def output_head(self, rows: int) -> list[tuple[str, float, str]]:
        """(name, ms, origin) of the output head over so many sampled rows."""
        if self._head:
            return self._evaluate(self._head, rows)
        return self._named(
            self._engine.evaluate_generation_ops(self._decode_head, batch_size=rows, s=1), rows
        )

    def _evaluate(self, indices: list[int], rows: int) -> list[tuple[str, float, str]]:
        return self._named(self._engine.evaluate_context_ops(indices, batch_size=1, s=rows, x=rows), rows)

    def _named(self, priced: list[Any], rows: int) -> list[tuple[str, float, str]]:
        return [(name, ms, self._origin(name, source, rows)) for name, ms, _, source in priced]

    def _origin(self, name: str, source: str, rows: int) -> str:
        if source != "silicon":
            return "formula"
        shape = self._gemms.get(name)
        if shape is not None and shape[1] in self._grid.get(rows, {}).get(shape[0], {}):
            return "measured"
        return "interpolated"

    def prompt_attention(self, items: int, new: int, cached: int) -> float:
        """Milliseconds of attention of ``items`` × ``new`` tokens over ``cached`` each, all layers, by the
        kernel for several tokens a sequence."""
        ((_, ms, _, _),) = self._engine.evaluate_context_ops(
            self._attention, batch_size=items, s=new, prefix=cached
        )
        return float(ms)

    def decode_attention(self, items: int, cached: int) -> float:
        """Milliseconds of attention of one token each over ``cached`` ones, by the decode kernel."""
        _, priced = self._engine.run_static_per_op(batch_size=items, isl=max(cached, 1), osl=2)
        return next(float(ms) for name, ms, *_ in priced if name == "generation_attention")

    def decode_step(self, items: int, cached: int) -> float:
        """Milliseconds of a plain decode step of ``items`` sessions over ``cached`` tokens each."""
        _, priced = self._engine.run_static_per_op(batch_size=items, isl=cached, osl=2)
        return sum(float(ms) for _, ms, *_ in priced)

    @functools.cached_property
    def memory(self) -> GpuMemory:
        """KV memory of a replica by the package's memory model at the framework's default share."""
        from aiconfigurator_core.sdk.memory import estimate_kv_cache

        target = self.target
        free = target.framework == "trtllm"
        try:
            with _quiet():
                found = estimate_kv_cache(
                    target.model,
                    target.system,
                    target.framework,
                    self.tables_version,
                    max_num_tokens=STEP_TOKENS,
                    max_batch_size=256,
                    memory_fraction_kind="of_free" if free else "of_total",
                    memory_fraction_value=MEMORY_SHARE,
                    tp_size=target.tp,
                    **self._modes,
                    **self._experts,
                )
            return GpuMemory(
                int(found["total_kv_size_tokens"]), int(found["memory_breakdown"]["weights_bytes"])
            )
        except ValueError as err:
            raise ProfileError(
                f"{target.model} in {target.dtype} leaves no memory for KV on {target.tp} × {target.system}.",
                "Raise --tp, or use --dtype fp8.",
            ) from err

    @functools.cached_property
    def model_info(self) -> ModelInfo:
        """Sizes of the model by its config; parameters count every expert."""
        config = self._config
        raw = config["raw_config"]
        layers, heads, width = config["layers"], config["n_kv"], config["d"]
        hidden, inner, queries = config["hidden_size"], config["inter_size"], config["n"]
        attention = hidden * width * (2 * queries + 2 * heads)
        mlp = 3 * hidden * inner
        if experts := config.get("num_experts"):
            mlp = experts * (3 * hidden * config["moe_inter_size"] + hidden)
        tables = config["vocab"] * hidden * (1 if raw.get("tie_word_embeddings") else 2)
        bytes_each = 1 if self._modes["kvcache_quant_mode"] == "fp8" else 2
        return ModelInfo(
            id=self.target.model,
            dtype={"bf16": "bfloat16"}.get(self.target.dtype, self.target.dtype),
            parameters=layers * (attention + mlp) + tables,
            family=str(raw.get("model_type", "")),
            config_hash=content_hash(json.dumps(raw, sort_keys=True).encode()).removeprefix("blake2b:")[:16],
            max_context=int(config["context"]),
            vocab_size=int(config["vocab"]),
            layers=int(layers),
            kv_heads=int(heads),
            head_dim=int(width),
            kv_bytes_per_token=2 * layers * heads * width * bytes_each,
        )


def _check(target: GpuTarget) -> None:
    """Raise :class:`ProfileError` for a name that the tables do not know."""
    _core()
    known = {entry["system"]: entry["versions"] for entry in systems()}
    if target.system not in known:
        raise ProfileError(
            f"There is no GPU {target.system!r} in the tables.",
            suggestion(target.system, known, "; `wispprof profile gpus` lists all"),
        )
    if target.framework not in known[target.system]:
        raise ProfileError(
            f"The tables have no {target.framework!r} on {target.system}.",
            suggestion(target.framework, known[target.system]),
        )
    if target.dtype not in DTYPES:
        raise ProfileError(f"There is no dtype {target.dtype!r}.", suggestion(target.dtype, DTYPES))
    if target.tp not in (1, 2, 4, 8):
        raise ProfileError(f"--tp must be 1, 2, 4 or 8, got {target.tp}.", "Correct --tp.")
    shipped = models()
    if target.model not in shipped:
        raise ProfileError(
            f"The tables have no config of {target.model!r}, and nothing is downloaded.",
            suggestion(target.model, shipped, "; `wispprof profile gpus` lists all"),
        )
