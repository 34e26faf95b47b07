"""Load a causal language model from a folder or a hub id, or make one with random weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from wispprof.engines.model_config import FAMILIES, check_config, check_draft_config
from wispprof.engines.model_folder import INCOMPLETE, find_model, weight_files
from wispprof.engines.model_shapes import PRESETS
from wispprof.engines.model_weights import check_finite, check_tensors, read_headers, weights_digest
from wispprof.engines.tensor_parallel import Ranks, load_shard
from wispprof.engines.tokenizers import quiet_transformers, read_tokenizer, tokenizer_hash
from wispprof.errors import ModelError, ModelMissing, ModelUnsupported, suggestion
from wispprof.types import ModelInfo

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A transformers causal LM in evaluation mode, its tokenizer (``None`` without one), its identity.

    With ``ranks``, ``model`` holds this rank's shard; ``info`` describes the whole model. ``folder``: where
    its files are, ``None`` for random weights. ``servable``: the engine computes this family exactly;
    otherwise it can only draft.
    """

    model: Any
    tokenizer: Any
    info: ModelInfo
    ranks: Ranks | None = None
    folder: Path | None = None
    servable: bool = True

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype


def load_model(
    path_or_id: str | Path,
    dtype: str = "float32",
    device: str = "auto",
    ranks: Ranks | None = None,
    full_digest: bool = False,
    draft: bool = False,
) -> LoadedModel:
    """Load a Llama-, Qwen2-, Qwen3- or Mistral-family model; as a ``draft``, of any family whose cache can
    be cut.

    ``path_or_id``: a folder in Hugging Face layout, or a hub id. The hub is asked only for an id that is
    not in the local cache, with a short timeout. ``dtype``: ``float32`` (also as ``auto``), ``bfloat16`` or
    ``float16``.
    ``device``: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` … ``ranks``: load this rank's shard onto its device
    instead. ``full_digest``: hash all bytes of the weights, not samples, for ``info.weights_hash``.

    Raises :class:`ModelMissing` if there is no model, :class:`ModelUnsupported` if this engine cannot serve
    it, and :class:`ModelError` if its files cannot be read, do not fit its config or are not finite.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = _named(dtype)
    torch_dtype = _dtype(dtype)
    torch_device = ranks.device if ranks else choose_device(device)
    folder = find_model(str(path_or_id))
    with quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
        except Exception as err:
            raise _unreadable(folder, err) from err
        try:
            max_context, servable = check_config(config, str(path_or_id)), True
        except ModelUnsupported:
            if not draft:
                raise
            max_context, servable = check_draft_config(config, str(path_or_id)), False
        files = weight_files(folder)
        model: Any
        parameters = None
        try:
            if not servable:
                model = _any_family(folder, str(path_or_id), torch_dtype)
            elif ranks is None:
                _check_weights(str(path_or_id), files, config)
                model = AutoModelForCausalLM.from_pretrained(
                    folder, dtype=torch_dtype, local_files_only=True, use_safetensors=True
                )
            else:
                _check_weights(str(path_or_id), files, config)
                model, parameters = load_shard(folder, config, torch_dtype, ranks)
        except ModelError:
            raise
        except Exception as err:
            raise _unreadable(folder, err) from err
        tokenizer = read_tokenizer(folder)
    model.to(torch_device)
    check_finite(str(path_or_id), model.named_parameters())
    name = folder.name if Path(path_or_id).expanduser().is_dir() else str(path_or_id)
    weights = weights_digest(files, full_digest)
    loaded = _loaded(model, tokenizer, name, dtype, weights, max_context, parameters)
    if not servable:
        from wispprof.engines.croppable_cache import check_croppable

        check_croppable(loaded.model, str(path_or_id))
    return replace(loaded, ranks=ranks, folder=folder, servable=servable)


def _any_family(folder: Path, name: str, dtype: torch.dtype) -> Any:
    """A model of any family, with all of its weights. Raises :class:`ModelError` if some are missing."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    model, report = loaded
    wrong = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if wrong:
        raise ModelError(
            f"The weights of {name} do not fit its config: {', '.join(wrong[:4])} are missing or of another "
            "shape.",
            INCOMPLETE,
        )
    return model


def _check_weights(name: str, files: list[Path], config: Any) -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        auto: Any = AutoModelForCausalLM
        model = auto.from_config(config)
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    check_tensors(name, read_headers(files), expected, bool(config.tie_word_embeddings))


def random_model(
    config: Mapping[str, Any] | str,
    seed: int = 0,
    dtype: str = "float32",
    device: str = "auto",
) -> LoadedModel:
    """A model of a given shape with random weights, created on the device without a download.

    ``config``: a name from :data:`~wispprof.engines.model_shapes.PRESETS`, or a config as a mapping with
    ``model_type``. Weights are normal with the config's ``initializer_range``; norms are one, biases
    zero. The same seed gives the same model on the same type of device.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    name = config if isinstance(config, str) else str(config.get("name", "random"))
    if isinstance(config, str):
        if config not in PRESETS:
            raise ModelMissing(f"There is no model shape named {config!r}.", suggestion(config, PRESETS))
        config = PRESETS[config]
    dtype = _named(dtype)
    torch_dtype, torch_device = _dtype(dtype), choose_device(device)
    fields = {k: v for k, v in config.items() if k not in ("model_type", "name")}
    with quiet_transformers():
        made = AutoConfig.for_model(config["model_type"], **fields)
        max_context = check_config(made, name)
        with torch.device("meta"):
            auto: Any = AutoModelForCausalLM
            model = auto.from_config(made, dtype=torch_dtype)
    model.to_empty(device=torch_device)
    model.tie_weights()
    # to_empty() left the buffers (rotary frequencies) uninitialized.
    rotary = model.model.rotary_emb
    with torch.device(torch_device):
        model.model.rotary_emb = type(rotary)(config=made)
    generator = torch.Generator(device=torch_device).manual_seed(seed)
    std = float(getattr(made, "initializer_range", 0.02))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("norm.weight") or "layernorm" in key:
                parameter.fill_(1.0)
            elif key.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(0.0, std, generator=generator)
    return _loaded(model, None, name, dtype, f"random:{seed}", max_context)


def _loaded(
    model: Any,
    tokenizer: Any,
    name: str,
    dtype: str,
    weights: str,
    max_context: int,
    parameters: int | None = None,
) -> LoadedModel:
    model.eval()
    model.requires_grad_(False)
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    info = ModelInfo(
        id=name,
        family=model.config.model_type,
        parameters=parameters or sum(p.numel() for p in model.parameters()),
        dtype=dtype,
        config_hash=config_hash(model.config),
        weights_hash=weights,
        tokenizer_hash=tokenizer_hash(tokenizer) if tokenizer is not None else "",
        max_context=max_context,
        vocab_size=config.vocab_size,
        layers=config.num_hidden_layers,
        kv_heads=kv_heads,
        head_dim=head_dim,
        kv_bytes_per_token=2 * config.num_hidden_layers * kv_heads * head_dim * _dtype(dtype).itemsize,
    )
    return LoadedModel(model=model, tokenizer=tokenizer, info=info)


def _named(dtype: str) -> str:
    """The name of a dtype; ``auto`` is the one whose steps decide alike in any batch."""
    return "float32" if dtype == "auto" else dtype


def _dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise ModelError(f"Unknown dtype {name!r}.", f"Use one of: {', '.join(_DTYPES)}.")
    return _DTYPES[name]


def choose_device(name: str) -> torch.device:
    """The torch device of a ``--device``. Raises :class:`ModelError` if it is not here."""
    if name == "auto":
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        device = torch.device(name)
    except RuntimeError as err:
        raise ModelError(f"Unknown device {name!r}.", "Use auto, cpu, cuda or mps.") from err
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            "torch sees no CUDA device here.", "Use --device cpu, or install a CUDA build of torch."
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ModelError("torch sees no Apple GPU here.", "Use --device cpu.")
    return device


def _unreadable(folder: Path, err: Exception) -> ModelError:
    first = str(err).strip().splitlines()
    line = first[0] if first else type(err).__name__
    if "model type" in line or "model_type" in line:
        return ModelUnsupported(
            f"transformers does not support the model in {folder}: {line}",
            f"Use a model of one of these families: {', '.join(FAMILIES)}.",
        )
    return ModelError(
        f"The model in {folder} cannot be read: {line}",
        INCOMPLETE,
    )


def config_hash(config: Any) -> str:
    """Hash of what in a config decides the architecture."""
    skip = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures"}
    fields = {k: v for k, v in config.to_dict().items() if k not in skip}
    text = json.dumps(fields, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
