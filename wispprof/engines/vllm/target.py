"""What vLLM serves: sizes, identity and tokenizer of the target, read from its folder and vLLM's config."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

from wispprof.engines import EngineOptions
from wispprof.engines.loading import config_hash
from wispprof.engines.model_folder import find_model, weight_files
from wispprof.engines.model_shapes import PRESETS
from wispprof.engines.model_weights import read_headers, weights_digest
from wispprof.engines.served_model import describe_model
from wispprof.engines.tokenizers import read_tokenizer, tokenizer_hash
from wispprof.errors import ModelMissing, suggestion
from wispprof.types import ModelInfo, ServedModel


def read_target(core: Any, options: EngineOptions) -> tuple[ModelInfo, ServedModel, Any]:
    """Sizes and identity of the loaded target, and its tokenizer (``None`` without one)."""
    model_config = core.vllm_config.model_config
    config = model_config.hf_text_config
    folder = find_model(options.target)
    tokenizer = read_tokenizer(folder)
    dummy = core.vllm_config.load_config.load_format == "dummy"
    files = [] if dummy else weight_files(folder)
    weights = "random:dummy" if dummy else weights_digest(files, options.full_digest)
    # By the files, if there are any: vLLM's CPU build keeps packed weights outside the module's parameters.
    stored = sum(math.prod(tensor.shape) for tensor in read_headers(files).values())
    parallel = core.vllm_config.parallel_config
    heads = model_config.get_total_num_kv_heads()
    specs = [group.kv_cache_spec for group in core.scheduler.kv_cache_config.kv_cache_groups]
    layers = [len(group.layer_names) for group in core.scheduler.kv_cache_config.kv_cache_groups]
    per_rank = sum(s.page_size_bytes // s.block_size * n for s, n in zip(specs, layers, strict=True))
    info = ModelInfo(
        id=Path(options.target).name or options.target,
        family=config.model_type,
        parameters=stored or int(sum(core.collective_rpc("wispprof_parameters"))),
        dtype=str(model_config.dtype).removeprefix("torch."),
        config_hash=config_hash(config),
        weights_hash=weights,
        tokenizer_hash=tokenizer_hash(tokenizer) if tokenizer is not None else "",
        max_context=int(model_config.max_model_len) - 1,
        vocab_size=int(model_config.get_vocab_size()),
        layers=int(model_config.get_total_num_hidden_layers()),
        kv_heads=int(heads),
        head_dim=int(model_config.get_head_size()),
        kv_bytes_per_token=per_rank * int(parallel.tensor_parallel_size),
    )
    served = describe_model(
        info.id,
        folder,
        config,
        tokenizer,
        weights=weights,
        dtype=arithmetic(core.vllm_config),
        vocabulary=info.tokenizer_hash,
        max_context=info.max_context,
        generation_config=options.generation_config,
    )
    return info, served, tokenizer


def arithmetic(config: Any) -> str:
    """All that changes the text besides the weights: dtype, and quantisation of weights and KV, if any.
    ``config``: a ``VllmConfig``."""
    parts = [
        str(config.model_config.dtype).removeprefix("torch."),
        config.model_config.quantization,
        config.cache_config.cache_dtype,
    ]
    return "+".join(part for part in parts if part and part != "auto")


def max_context_of(target: str) -> int:
    """Positions of a model, from its config alone."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(find_model(target), local_files_only=True)
    return int(config.get_text_config().max_position_embeddings)


def provenance(core: Any) -> dict[str, Any]:
    """What a profile must say about the engine besides its model: two profiles that differ in one of
    these are not comparable."""
    from wispprof.engines.vllm.versions import vllm_version

    config = core.vllm_config
    compilation = config.compilation_config
    eager = bool(config.model_config.enforce_eager)
    return {
        "vllm": vllm_version(),
        "runner": core.collective_rpc("wispprof_runner")[0],
        "attention": core.collective_rpc("wispprof_attention")[0],
        "graph_mode": "none" if eager else str(getattr(compilation.cudagraph_mode, "name", "none")).lower(),
        "compiled": not eager,
        "quantization": config.model_config.quantization or "none",
        "threads": core.collective_rpc("wispprof_threads")[0],
        "ranks": int(config.parallel_config.tensor_parallel_size),
        "kv_dtype": str(config.cache_config.cache_dtype),
        "block_tokens": int(core.scheduler.block_size),
        "prefix_cache": bool(config.cache_config.enable_prefix_caching),
    }


def write_shape(name: str, folder: str | None = None) -> Path:
    """A folder with only the config of a known shape, for random weights (``load_format=dummy``)."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if name not in PRESETS:
        raise ModelMissing(f"There is no model shape named {name!r}.", suggestion(name, PRESETS))
    fields = dict(PRESETS[name])
    family = fields.pop("model_type")
    config = AutoConfig.for_model(family, **fields).to_dict()
    config["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]]
    path = Path(folder or tempfile.mkdtemp(prefix="wispprof-shape-")) / name
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return path
