"""The processes that serve one target together, each with its share of every layer (tensor parallel).

``torchrun`` starts one process per device; :func:`join` makes them a group. Rank 0 leads: it has the
server, and its choice of tokens is the one that counts. Two kinds of messages pass between ranks:
the collectives inside a step (:meth:`Ranks.sum`, :meth:`Ranks.gather`, :meth:`Ranks.agree`), on the
device, and the leader's orders (:meth:`Ranks.say`, :meth:`Ranks.hear`), between the hosts' memories, so
that an idle follower waits on a socket and not on a GPU.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from wispprof.errors import EngineError, ModelError

__all__ = ["Ranks", "join", "launched"]

# Bytes of the first part of an order; nearly every step's order fits into it.
_FIRST = 8192
# An idle leader is silent for as long as nobody asks it anything.
_IDLE = timedelta(days=365)


@dataclass(frozen=True)
class Ranks:
    """This process among ``size`` processes, as number ``rank``. ``device`` holds its share.

    Every method but :meth:`leave` must be called by all ranks, in the same order.
    """

    rank: int
    size: int
    device: torch.device
    orders: Any
    """The process group of orders (gloo, whatever the device)."""

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks, in place and the same on all."""
        dist.all_reduce(x)
        return x

    def gather(self, x: Tensor, width: int) -> Tensor:
        """Ranks' columns (n, ≤ ceil(width / size)) side by side: (n, width), on every rank."""
        share = -(-width // self.size)
        if x.shape[1] < share:
            x = torch.nn.functional.pad(x, (0, share - x.shape[1]))
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, 1)[:, :width]

    def agree(self, chosen: np.ndarray) -> np.ndarray:
        """Rank 0's array (n,) int64, on every rank."""
        shared = torch.from_numpy(chosen).to(self.device)
        dist.broadcast(shared, 0)
        return shared.cpu().numpy()

    def least(self, number: int) -> int:
        """The smallest of the ranks' numbers."""
        shared = torch.tensor([number], dtype=torch.int64)
        dist.all_reduce(shared, dist.ReduceOp.MIN, group=self.orders)
        return int(shared)

    def say(self, order: bytes) -> None:
        """Rank 0: send an order to all followers, who must :meth:`hear` it."""
        first = np.zeros(_FIRST, dtype=np.uint8)
        first[:8] = np.frombuffer(len(order).to_bytes(8, "little"), dtype=np.uint8)
        head = order[: _FIRST - 8]
        first[8 : 8 + len(head)] = np.frombuffer(head, dtype=np.uint8)
        dist.broadcast(torch.from_numpy(first), 0, group=self.orders)
        if rest := order[_FIRST - 8 :]:
            tail = np.frombuffer(rest, dtype=np.uint8).copy()
            dist.broadcast(torch.from_numpy(tail), 0, group=self.orders)

    def hear(self) -> bytes:
        """Followers: the next order. Waits for as long as the leader lives."""
        first = torch.empty(_FIRST, dtype=torch.uint8)
        dist.broadcast(first, 0, group=self.orders)
        data = first.numpy().tobytes()
        size = int.from_bytes(data[:8], "little")
        rest = size - (_FIRST - 8)
        if rest <= 0:
            return data[8 : 8 + size]
        tail = torch.empty(rest, dtype=torch.uint8)
        dist.broadcast(tail, 0, group=self.orders)
        return data[8:] + tail.numpy().tobytes()

    def leave(self) -> None:
        """End this process's part. Whoever still waits for it fails at once instead of for ever."""
        if dist.is_initialized():
            dist.destroy_process_group()


def launched() -> bool:
    """Whether ``torchrun`` started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def join(size: int, device: str = "auto") -> Ranks:
    """Become one of ``size`` ranks, as ``torchrun``'s environment says which.

    ``device``: ``auto``, ``cpu`` (gloo) or ``cuda`` (NCCL; each process takes the GPU of its local rank).

    Raises :class:`EngineError` where the processes are not ``size``, and :class:`ModelError` where there
    is no such device.
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
        place = torch.device("cpu")
    elif kind == "cuda":
        local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= there:
            raise ModelError(
                f"Rank {local} needs a GPU of its own; torch sees {there} here.",
                "Start as many ranks as there are GPUs, or use --device cpu.",
            )
        place = torch.device("cuda", local)
        torch.cuda.set_device(place)
        dist.init_process_group("nccl", device_id=place)
    else:
        raise ModelError(
            f"Ranks cannot share the device {device!r}.", "Use --device auto, cpu or cuda."
        )
    orders = dist.new_group(backend="gloo", timeout=_IDLE)
    return Ranks(dist.get_rank(), size, place, orders)
