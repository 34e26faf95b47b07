"""Load a causal language model from a folder or a hub id, or make one with random weights."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from wispprof.engines.model_shapes import PRESETS
from wispprof.engines.tensor_parallel import Ranks, load_shard
from wispprof.errors import ModelError, ModelMissing, ModelUnsupported, suggestion
from wispprof.types import ModelInfo

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HASH_CHUNK = 1 << 20
_MAX_FULLY_HASHED = 256 << 20


@dataclass(frozen=True)
class LoadedModel:
    """A transformers causal LM in evaluation mode, its tokenizer (``None`` without one), its identity.

    With ``ranks``, ``model`` holds this rank's shard; ``info`` describes the whole model.
    """

    model: Any
    tokenizer: Any
    info: ModelInfo
    ranks: Ranks | None = None

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
) -> LoadedModel:
    """Load a Llama-, Qwen2-, Qwen3- or Mistral-family model.

    ``path_or_id``: a folder in Hugging Face layout, or a hub id. The hub is asked only for an id that is
    not in the local cache, with a short timeout. ``dtype``: ``float32``, ``bfloat16`` or ``float16``.
    ``device``: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` … ``ranks``: load this rank's shard onto its device
    instead.

    Raises :class:`ModelMissing` if there is no model, :class:`ModelUnsupported` if this engine cannot serve
    it, and :class:`ModelError` if its files cannot be read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    torch_dtype = _dtype(dtype)
    torch_device = ranks.device if ranks else _device(device)
    folder = _find(str(path_or_id))
    with _quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
        except Exception as err:
            raise _unreadable(folder, err) from err
        max_context = _check_supported(config, str(path_or_id))
        model: Any
        parameters = None
        try:
            if ranks is None:
                model = AutoModelForCausalLM.from_pretrained(
                    folder, dtype=torch_dtype, local_files_only=True, use_safetensors=True
                )
            else:
                model, parameters = load_shard(folder, config, torch_dtype, ranks)
        except ModelError:
            raise
        except Exception as err:
            raise _unreadable(folder, err) from err
        tokenizer = _tokenizer(folder)
    model.to(torch_device)
    name = folder.name if Path(path_or_id).expanduser().is_dir() else str(path_or_id)
    weights = _weights_hash(folder)
    loaded = _loaded(model, tokenizer, name, dtype, weights, max_context, parameters)
    return replace(loaded, ranks=ranks)


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
    torch_dtype, torch_device = _dtype(dtype), _device(device)
    fields = {k: v for k, v in config.items() if k not in ("model_type", "name")}
    with _quiet_transformers():
        made = AutoConfig.for_model(config["model_type"], **fields)
        max_context = _check_supported(made, name)
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


def tokenizer_hash(tokenizer: Any) -> str:
    """A hash of the vocabulary and the special ids, whatever the file format."""
    digest = hashlib.sha256()
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{number}:{token}\n".encode("utf-8", "surrogatepass"))
    digest.update(json.dumps(sorted(set(tokenizer.all_special_ids))).encode())
    return digest.hexdigest()[:16]


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
    config = model.config
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    info = ModelInfo(
        id=name,
        family=config.model_type,
        parameters=parameters or sum(p.numel() for p in model.parameters()),
        dtype=dtype,
        config_hash=_config_hash(config),
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


def _dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise ModelError(f"Unknown dtype {name!r}.", f"Use one of: {', '.join(_DTYPES)}.")
    return _DTYPES[name]


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as err:
        raise ModelError(f"Unknown device {name!r}.", "Use auto, cpu or cuda.") from err
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            "torch sees no CUDA device here.", "Use --device cpu, or install a CUDA build of torch."
        )
    return device


def _find(path_or_id: str) -> Path:
    """The folder with the model's files; asks the hub only for a name that looks like a hub id."""
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelMissing(
                f"The folder {folder} holds no config.json.",
                "Give a folder in Hugging Face layout (config.json, *.safetensors, tokenizer).",
            )
        return folder
    parts = path_or_id.split("/")
    looks_like_path = path_or_id.startswith((".", "~", "/")) or len(parts) != 2 or folder.exists()
    if looks_like_path or folder.parent.is_dir():
        raise ModelMissing(
            f"There is no model folder at {path_or_id}.",
            "Give a folder with config.json and *.safetensors, or a hub id such as Qwen/Qwen3-8B.",
        )
    return _find_on_hub(path_or_id)


def _find_on_hub(repo: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    hint = "Download the model into a folder and give that folder, or check the id and the network."
    try:
        return Path(snapshot_download(repo, local_files_only=True, allow_patterns=patterns))
    except HFValidationError as err:
        raise ModelMissing(f"{repo} is neither a folder nor a hub id.", hint) from err
    except LocalEntryNotFoundError:
        pass  # not in the local cache
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise ModelMissing(f"{repo} is not in the local hub cache, and HF_HUB_OFFLINE is set.", hint)
    try:
        HfApi().model_info(repo, timeout=5.0)
        return Path(snapshot_download(repo, allow_patterns=patterns, etag_timeout=5.0))
    except Exception as err:
        reason = type(err).__name__
        raise ModelMissing(
            f"{repo} is neither a folder nor in the local hub cache; the hub did not return it ({reason}).",
            hint,
        ) from err


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
        "Check that the download is complete (config.json and all *.safetensors).",
    )


def _check_supported(config: Any, name: str) -> int:
    """Refuse models that cannot be rolled back by length; return the longest context to serve."""
    hint = f"Use a decoder-only model of one of these families: {', '.join(FAMILIES)}."
    if getattr(config, "is_encoder_decoder", False):
        raise ModelUnsupported(f"{name} is an encoder-decoder model.", hint)
    layer_types = set(getattr(config, "layer_types", None) or ())
    family = config.model_type
    recurrent = layer_types - {"full_attention", "sliding_attention", "chunked_attention"}
    if recurrent or any(w in family for w in ("mamba", "rwkv", "jamba", "recurrent", "bamba")):
        kinds = ", ".join(sorted(recurrent)) or family
        raise ModelUnsupported(
            f"{name} keeps recurrent state ({kinds}), which cannot be rolled back by length.", hint
        )
    if family not in FAMILIES:
        raise ModelUnsupported(f"The model family {family!r} of {name} is not supported.", hint)
    max_context = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    if family.startswith("qwen") and not getattr(config, "use_sliding_window", False):
        window = None
    windowed = layer_types & {"sliding_attention", "chunked_attention"} or window is not None
    if windowed and (not window or window < max_context):
        raise ModelUnsupported(
            f"{name} has a sliding window of {window} tokens, shorter than its context of {max_context}.",
            "Use a model with full attention, or lower max_position_embeddings in its config.json "
            "to the window.",
        )
    rope = getattr(config, "rope_parameters", None) or {}
    rope_type = rope.get("rope_type", "default")
    if rope_type in ("dynamic", "longrope"):
        raise ModelUnsupported(
            f"{name} uses {rope_type} rotary scaling, whose frequencies depend on the longest sequence "
            "in the batch.",
            "Set rope_type to default, linear, yarn or llama3 in its config.json.",
        )
    return max_context


def _tokenizer(folder: Path) -> Any:
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    if not any((folder / n).is_file() for n in names):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as err:
        raise ModelError(
            f"The tokenizer in {folder} cannot be read: {str(err).splitlines()[0]}",
            "Download tokenizer.json and tokenizer_config.json again.",
        ) from err


def _config_hash(config: Any) -> str:
    skip = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures"}
    fields = {k: v for k, v in config.to_dict().items() if k not in skip}
    text = json.dumps(fields, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _weights_hash(folder: Path) -> str:
    """Identity of the weight files: their names, sizes and content.

    Of a file over 256 MiB, 64 MiB spread evenly are hashed, so that a 70 B model does not take a minute.
    """
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}\n".encode())
        with file.open("rb") as stream:
            if size <= _MAX_FULLY_HASHED:
                while block := stream.read(_HASH_CHUNK):
                    digest.update(block)
            else:
                for i in range(64):
                    stream.seek((size - _HASH_CHUNK) * i // 63)
                    digest.update(stream.read(_HASH_CHUNK))
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and advice, which would clutter a command's output."""
    from transformers.utils import logging as library_logging

    logging: Any = library_logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
