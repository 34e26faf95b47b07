"""Tensor parallelism: the ranks that serve one target together, and the shard of the weights that each loads.

``torchrun`` starts one process per device; :func:`join` makes them a group. Rank 0 runs the server, and its
sampled tokens count. Collectives inside a step run on the device. Rank 0's commands go through host memory,
so that an idle rank waits on a socket and not on a GPU.
"""

from __future__ import annotations

import os
import re
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from wispprof.engines.model_folder import INCOMPLETE, weight_files
from wispprof.errors import EngineError, ModelError, ModelUnsupported

# Bytes of the first message of a command; nearly every step fits into it.
_FIRST = 8192
# An idle rank 0 sends nothing until a request comes.
_COMMAND_TIMEOUT = timedelta(days=365)


@dataclass(frozen=True)
class Ranks:
    """This process among ``size`` processes, as number ``rank``. ``device`` holds its shard.

    All ranks must call every method except :meth:`leave`, in the same order. ``commands``: the process group
    of commands (gloo on any device).
    """

    rank: int
    size: int
    device: torch.device
    commands: Any

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, in place and the same on all."""
        dist.all_reduce(x)
        return x

    def all_gather_columns(self, x: Tensor, width: int) -> Tensor:
        """The ranks' columns (n, ≤ ceil(width / size)) side by side: (n, width), on every rank."""
        share = -(-width // self.size)
        if x.shape[1] < share:
            x = torch.nn.functional.pad(x, (0, share - x.shape[1]))
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, 1)[:, :width]

    def broadcast_tokens(self, chosen: np.ndarray) -> np.ndarray:
        """Rank 0's array (n,) int64, on every rank."""
        shared = torch.from_numpy(chosen).to(self.device)
        dist.broadcast(shared, 0)
        return shared.cpu().numpy()

    def all_reduce_min(self, number: int) -> int:
        """The smallest of the ranks' numbers."""
        shared = torch.tensor([number], dtype=torch.int64)
        dist.all_reduce(shared, dist.ReduceOp.MIN, group=self.commands)
        return int(shared)

    def broadcast(self, command: bytes) -> None:
        """Rank 0: send a command to all other ranks, which must :meth:`recv` it."""
        first = np.zeros(_FIRST, dtype=np.uint8)
        first[:8] = np.frombuffer(len(command).to_bytes(8, "little"), dtype=np.uint8)
        head = command[: _FIRST - 8]
        first[8 : 8 + len(head)] = np.frombuffer(head, dtype=np.uint8)
        dist.broadcast(torch.from_numpy(first), 0, group=self.commands)
        if rest := command[_FIRST - 8 :]:
            second = np.frombuffer(rest, dtype=np.uint8).copy()
            dist.broadcast(torch.from_numpy(second), 0, group=self.commands)

    def recv(self) -> bytes:
        """Other ranks: the next command. Blocks while rank 0 lives."""
        first = torch.empty(_FIRST, dtype=torch.uint8)
        dist.broadcast(first, 0, group=self.commands)
        data = first.numpy().tobytes()
        size = int.from_bytes(data[:8], "little")
        rest = size - (_FIRST - 8)
        if rest <= 0:
            return data[8 : 8 + size]
        second = torch.empty(rest, dtype=torch.uint8)
        dist.broadcast(second, 0, group=self.commands)
        return data[8:] + second.numpy().tobytes()

    def leave(self) -> None:
        """End this process's part. Ranks that still wait for it fail at once."""
        if dist.is_initialized():
            dist.destroy_process_group()


def launched() -> bool:
    """Whether ``torchrun`` started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def join(size: int, device: str = "auto") -> Ranks:
    """Become one of ``size`` ranks, by ``torchrun``'s environment variables.

    ``device``: ``auto``, ``cpu`` (gloo) or ``cuda`` (NCCL; each process takes the GPU of its local rank).
    Raises :class:`EngineError` if the number of processes differs, :class:`ModelError` without such a device.
    """
    if not launched():
        raise EngineError(
            "Tensor parallel ranks are started by torchrun.",
            f"Run it as `torchrun --nproc-per-node {size} …`.",
        )
    started = int(os.environ["WORLD_SIZE"])
    if started != size:
        raise EngineError(
            f"{started} processes were started for {size} ranks.",
            f"Give --tensor-parallel {started}, or start {size} processes.",
        )
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if kind == "cpu":
        dist.init_process_group("gloo")
        own = torch.device("cpu")
    elif kind == "cuda":
        local, visible = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= visible:
            raise ModelError(
                f"Rank {local} needs a GPU of its own; torch sees {visible} here.",
                "Start as many ranks as there are GPUs, or use --device cpu.",
            )
        own = torch.device("cuda", local)
        torch.cuda.set_device(own)
        dist.init_process_group("nccl", device_id=own)
    else:
        raise ModelError(f"Ranks cannot share the device {device!r}.", "Use --device auto, cpu or cuda.")
    commands = dist.new_group(backend="gloo", timeout=_COMMAND_TIMEOUT)
    return Ranks(dist.get_rank(), size, own, commands)


def load_shard(folder: Path, config: Any, dtype: torch.dtype, ranks: Ranks) -> tuple[Any, int]:
    """The model with this rank's parameters on its device, and the parameter count of the whole model.

    transformers' ``tp_plan`` of the model class says which layers split, and along which dimension. A
    column-wise layer keeps its rank's output features, so attention keeps whole heads. A row-wise layer
    keeps the matching input features; its partial output is summed over ranks. The output head keeps its
    part of the vocabulary. :class:`~wispprof.engines.torch.decoder.FusedDecoder` computes with these
    weights.

    Raises :class:`ModelUnsupported` for a model that does not split over so many ranks,
    :class:`ModelError` if weights are missing, and what reading the files raises.
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
    with ExitStack() as stack:
        files = _open_files(folder, stack)
        for name, parameter in list(model.named_parameters()):
            share = _share(name, tuple(parameter.shape), plan, ranks)
            value = _read(files, name, share).to(ranks.device, dtype)
            _set_parameter(model, name, value)
    if config.tie_word_embeddings:
        # The embedding is complete on every rank; the head is a view of its rank's rows.
        rows, _ = _share("lm_head.weight", (config.vocab_size, 1), plan, ranks)
        _set_parameter(model, "lm_head.weight", model.model.embed_tokens.weight[rows])
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


def _share(name: str, shape: tuple[int, ...], plan: dict[str, str], ranks: Ranks) -> tuple[slice, ...]:
    """What this rank keeps of a parameter, as one slice per dimension."""
    layer, kind = name.rsplit(".", 1)
    style = plan.get(re.sub(r"\.\d+\.", ".*.", layer), "replicate")
    everything = tuple(slice(0, n) for n in shape)
    if style.startswith(("replicate", "embedding")):
        # A lookup is no work, and with all rows on each rank it needs no all-reduce.
        return everything
    if style.startswith("colwise"):
        dim = 0
    elif style.startswith("rowwise"):
        if kind == "bias":
            # Only one rank may add it before the sum.
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

    opened = [stack.enter_context(safe_open(file, framework="pt")) for file in weight_files(folder)]
    return {name: file for file in opened for name in file.keys()}  # noqa: SIM118


def _read(files: dict[str, Any], name: str, share: tuple[slice, ...]) -> Tensor:
    if name not in files:
        raise ModelError(
            f"The model's files lack the weight {name}.",
            INCOMPLETE,
        )
    if any(part.start >= part.stop for part in share):
        return torch.empty(0)
    value: Tensor = files[name].get_slice(name)[share]
    return value


def _set_parameter(model: Any, name: str, value: Tensor) -> None:
    layer, attribute = name.rsplit(".", 1)
    parameter = None if not value.numel() else nn.Parameter(value, requires_grad=False)
    setattr(model.get_submodule(layer), attribute, parameter)
