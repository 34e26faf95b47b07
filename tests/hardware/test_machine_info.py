"""Artifacts of another machine are named in one clear line, from the profile to the server."""

from __future__ import annotations

from pathlib import Path

import pytest

from wispprof.artifacts import write_document
from wispprof.hardware import compute_device_name, fingerprint, machine_mismatch
from wispprof.server.startup import warn_about_other_machines
from wispprof.settings.server_settings import ServerSettings

H200 = {"cpu": "Xeon", "cores": 16, "gpus": [{"name": "NVIDIA H200"}, {"name": "NVIDIA L4"}]}


@pytest.mark.parametrize(
    ("device", "hardware", "name"),
    [
        ("cuda", H200, "NVIDIA H200"),
        ("cuda:1", H200, "NVIDIA L4"),
        ("auto", H200, "NVIDIA H200"),
        ("cpu", H200, "Xeon, 16 cores"),
        ("cuda", {"cpu": "AMD EPYC", "cores": 2, "gpus": []}, "AMD EPYC, 2 cores"),
        ("", {"board": "Raspberry Pi 5"}, "Raspberry Pi 5"),
        ("", {}, ""),
    ],
)
def test_what_computes_has_one_name(device: str, hardware: dict[str, object], name: str) -> None:
    assert compute_device_name(device, hardware) == name


def test_only_what_is_known_and_differs_is_said() -> None:
    assert machine_mismatch("It", "NVIDIA H200", "NVIDIA H200") is None
    assert machine_mismatch("It", "", "NVIDIA H200") is None
    line = machine_mismatch("The estimator e.json", "NVIDIA H200", "NVIDIA L4")
    assert line is not None
    assert "\n" not in line
    assert "e.json was made on NVIDIA H200, but this machine is NVIDIA L4" in line
    assert "wispprof fit" in line


def test_a_server_names_each_artifact_that_is_not_of_it(tmp_path: Path) -> None:
    here = compute_device_name("cpu", fingerprint().as_dict())
    estimator, plan = tmp_path / "estimator.json", tmp_path / "plan.json"
    settings = ServerSettings(device="cpu", estimator=estimator, plan=plan)

    def lines(made_on: str, plan_of: str = "") -> list[str]:
        made = write_document(estimator, "estimator", {"a": 1}, {"machine": made_on})
        of = {"machine": made_on, "estimator": plan_of or made}
        write_document(plan, "plan", {"b": 1}, of)
        return warn_about_other_machines(settings)

    assert lines(here) == []
    assert lines("") == []
    other = lines("NVIDIA H200")
    assert [line.split(" was made on")[0] for line in other] == [
        f"The estimator {estimator}",
        f"The plan {plan}",
    ]
    (mismatch,) = lines(here, "blake2b:another")
    assert "another estimator" in mismatch
    assert warn_about_other_machines(ServerSettings(device="cpu")) == []
