"""Where an artifact was made, in one name, and whether that is where it is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wispprof.hardware.machine import fingerprint

__all__ = ["computing_on", "made_elsewhere"]


def computing_on(device: str, hardware: Mapping[str, Any] | None = None) -> str:
    """What computes for a torch device (``cpu``, ``cuda:0``; anything else: the GPU if there is one).

    ``hardware``: a manifest's, else this machine's. Empty where nothing is known.
    """
    facts = fingerprint().as_dict() if hardware is None else hardware
    gpus = [str(gpu["name"]) for gpu in facts.get("gpus", [])]
    if gpus and device != "cpu":
        place = device.partition(":")[2]
        return gpus[int(place)] if place.isdigit() and int(place) < len(gpus) else gpus[0]
    cpu, cores = facts.get("cpu", ""), facts.get("cores", 0)
    return f"{cpu}, {cores} cores" if cpu and cores else str(cpu or facts.get("board", ""))


def made_elsewhere(what: str, made_on: str, used_on: str) -> str | None:
    """One line where the two are known and differ, else ``None``."""
    if not made_on or not used_on or made_on == used_on:
        return None
    return (
        f"{what} was made on {made_on}, and this is {used_on}: its times will be off. "
        "Run `wispprof profile-server` and `wispprof fit` here."
    )
