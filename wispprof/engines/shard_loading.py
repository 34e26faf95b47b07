"""One rank's share of a target: which rows or columns of each matrix, and reading no more than those.

Which layers split, and along which dimension, is transformers' own ``tp_plan`` of the model class. A
column-wise layer keeps its rank's output features, so attention keeps whole heads; a row-wise one keeps
the matching input features, and its partial output is summed over ranks. The output head keeps its
rank's part of the vocabulary.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wispprof.engines.ranks import Ranks
from wispprof.errors import ModelError, ModelUnsupported

__all__ = ["load_shard"]


def load_shard(folder: Path, config: Any, dtype: torch.dtype, ranks: Ranks) -> tuple[Any, int]:
    """The model with this rank's parameters on its device, and how many parameters the whole has.

    Its forward is not transformers' any more (that would need the sums between ranks): it holds the
    weights that :class:`~wispprof.engines.torch.decoder.LeanDecoder` computes with.

    Raises :class:`ModelUnsupported` for a model that does not split over so many ranks, and
    :class:`ModelError` where weights are missing.
    """
    from transformers import AutoModelForCausalLM

    _check_divides(config, ranks.size)
    with torch.device("meta"):
        auto: Any = AutoModelForCausalLM
        model = auto.from_config(config, dtype=dtype)
    parameters = sum(p.numel() for p in model.parameters())
    plan = getattr(model, "tp_plan", None)
    if not plan:
        raise ModelUnsupported(
            f"transformers has no tensor-parallel plan for {type(model).__name__}.",
            "Serve it on one device, or use a Llama-, Qwen- or Mistral-family model.",
        )
    tied = bool(config.tie_word_embeddings)
    with ExitStack() as stack:
        files = _open_files(folder, stack)
        for name, parameter in list(model.named_parameters()):
            share = _share(name, tuple(parameter.shape), plan, ranks)
            value = _read(files, name, share).to(ranks.device, dtype)
            _place(model, name, value)
    if tied:
        # The embedding is whole on every rank; the head is a view of its rank's rows.
        rows, _ = _share("lm_head.weight", (config.vocab_size, 1), plan, ranks)
        _place(model, "lm_head.weight", model.model.embed_tokens.weight[rows])
    rotary = model.model.rotary_emb
    with torch.device(ranks.device):
        model.model.rotary_emb = type(rotary)(config=config)
    return model, parameters


def _check_divides(config: Any, size: int) -> None:
    heads = config.num_attention_heads
    counts = {
        "attention heads": heads,
        "KV heads": getattr(config, "num_key_value_heads", None) or heads,
        "intermediate features": config.intermediate_size,
    }
    for what, count in counts.items():
        if count % size:
            raise ModelUnsupported(
                f"{count} {what} cannot be split over {size} ranks.",
                "Use a number of ranks that divides the KV heads.",
            )


def _share(
    name: str, shape: tuple[int, ...], plan: dict[str, str], ranks: Ranks
) -> tuple[slice, ...]:
    """What this rank keeps of a parameter, as one slice per dimension."""
    layer, kind = name.rsplit(".", 1)
    style = plan.get(re.sub(r"\.\d+\.", ".*.", layer), "replicate")
    everything = tuple(slice(0, n) for n in shape)
    if style.startswith(("replicate", "embedding")):
        # An embedding stays whole: looking rows up is no work, and needs no sum when all rows are there.
        return everything
    if style.startswith("colwise"):
        dim = 0
    elif style.startswith("rowwise"):
        if kind == "bias":
            # Added once, by the rank whose share has it: the others add nothing.
            return everything if ranks.rank == 0 else (slice(0, 0),)
        dim = 1
    else:
        raise ModelUnsupported(
            f"The tensor-parallel plan splits {layer} as {style!r}, which this engine does not know.",
            "Serve the model on one device.",
        )
    share = -(-shape[dim] // ranks.size)
    start = min(ranks.rank * share, shape[dim])
    own = slice(start, min(start + share, shape[dim]))
    return (*everything[:dim], own, *everything[dim + 1 :])


def _open_files(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Tensor name → open file that holds it."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    try:
        if index.is_file():
            where = json.loads(index.read_text())["weight_map"]
            paths = {name: folder / file for name, file in where.items()}
        else:
            paths = dict(_names_in(sorted(folder.glob("*.safetensors"))))
        opened: dict[Path, Any] = {
            path: stack.enter_context(safe_open(path, framework="pt"))
            for path in sorted(set(paths.values()))
        }
    except (OSError, KeyError, ValueError) as err:
        raise _unreadable(folder, str(err)) from err
    if not opened:
        raise _unreadable(folder, "it holds no *.safetensors")
    return {name: opened[path] for name, path in paths.items()}


def _names_in(files: list[Path]) -> Iterator[tuple[str, Path]]:
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt") as opened:
            yield from ((name, file) for name in opened.keys())  # noqa: SIM118


def _read(files: dict[str, Any], name: str, share: tuple[slice, ...]) -> Tensor:
    if name not in files:
        raise ModelError(
            f"The model's files lack the weight {name}.",
            "Check that the download is complete (config.json and all *.safetensors).",
        )
    if any(part.start >= part.stop for part in share):
        return torch.empty(0)
    value: Tensor = files[name].get_slice(name)[share]
    return value


def _place(model: Any, name: str, value: Tensor) -> None:
    layer, attribute = name.rsplit(".", 1)
    parameter = None if not value.numel() else nn.Parameter(value, requires_grad=False)
    setattr(model.get_submodule(layer), attribute, parameter)


def _unreadable(folder: Path, reason: str) -> ModelError:
    return ModelError(
        f"The model in {folder} cannot be read: {reason}.",
        "Check that the download is complete (config.json and all *.safetensors).",
    )
