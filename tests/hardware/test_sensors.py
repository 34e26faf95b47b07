"""Sensors over a faked /sys and /proc: present, absent, unreadable, wrapping."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from wispprof.hardware import clocks, energy, machine_info, nvml
from wispprof.hardware.machine_info import Gpu, probe_machine


def put(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_this_machine_has_a_stable_fingerprint():
    first, second = machine_info.fingerprint(), machine_info.probe_machine(machine_info.Path("/"))
    assert first == second
    assert first.hash == second.hash
    assert first.cores >= 1
    assert first.memory_gib >= 0
    assert json.loads(json.dumps(first.as_dict()))["hash"] == first.hash


def test_the_hash_follows_hardware_and_not_software(monkeypatch, tmp_path):
    monkeypatch.setattr(nvml, "library", lambda: None)
    put(
        tmp_path,
        {
            "proc/cpuinfo": "processor\t: 0\nmodel name\t: Some  CPU\n",
            "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\x00",
            "proc/driver/nvidia/gpus/0000/information": "Model: \t Some GPU\nIRQ: 5\n",
        },
    )
    found = probe_machine(tmp_path)
    assert (found.cpu, found.board) == ("Some CPU", "Raspberry Pi 5 Model B Rev 1.0")
    assert found.gpus == (Gpu("Some GPU"),)
    assert "Raspberry Pi 5" in found.title
    assert replace(found, kernel="other").hash == found.hash
    assert replace(found, gpus=(Gpu("Some GPU", 0, "driver 9"),)).hash == found.hash
    assert replace(found, gpus=(Gpu("Other GPU"),)).hash != found.hash
    assert replace(found, cores=found.cores + 1).hash != found.hash


def test_cpu_sensors_and_throttling(tmp_path):
    cpu = "sys/devices/system/cpu/cpu0/cpufreq/"
    zone = "sys/class/thermal/thermal_zone0/"
    put(
        tmp_path,
        {
            cpu + "scaling_cur_freq": "1000000",
            cpu + "cpuinfo_max_freq": "2000000",
            zone + "type": "cpu-thermal",
            zone + "temp": "71500",
            "sys/class/thermal/thermal_zone1/type": "battery",
            "sys/class/thermal/thermal_zone1/temp": "99000",
        },
    )
    reading = clocks.CpuSensors(tmp_path).read()
    assert reading == clocks.Reading(1000.0, 71.5, True)
    put(tmp_path, {cpu + "scaling_cur_freq": "1900000"})
    assert clocks.CpuSensors(tmp_path).read().throttled is False


def test_missing_and_broken_sensors_read_as_nothing(tmp_path):
    put(tmp_path, {"sys/class/thermal/thermal_zone0/type": "cpu", "sys/class/powercap/x": ""})
    put(tmp_path, {"sys/class/thermal/thermal_zone0/temp": "what"})
    assert not clocks.CpuSensors(tmp_path).present
    assert clocks.CpuSensors(tmp_path).read() == clocks.Reading()
    assert clocks.Sensors().read() == clocks.Reading()
    meter = energy.energy_meter("cpu", tmp_path)
    meter.begin()
    reading = meter.end()
    assert (reading.energy_j, reading.power_w, reading.sensor) == (None, None, "no sensor")
    assert clocks.sensors("mps").name == "no sensor"


def test_rapl_counts_packages_once_and_survives_a_wrap(tmp_path):
    zone = "sys/class/powercap/intel-rapl:0"
    put(tmp_path, {f"{zone}/energy_uj": "9000000", f"{zone}/max_energy_range_uj": "10000000"})
    put(tmp_path, {f"{zone}:0/energy_uj": "5", f"{zone}:0/max_energy_range_uj": "10"})
    clock = Clock()
    meter = energy.RaplMeter(tmp_path, clock)
    assert meter.present
    meter.begin()
    clock.now = 2.0
    put(tmp_path, {f"{zone}/energy_uj": "3000000"})
    reading = meter.end()
    assert reading.energy_j == pytest.approx(4.0)
    assert reading.power_w == pytest.approx(2.0)
    meter.begin()
    (tmp_path / f"{zone}/energy_uj").unlink()
    assert meter.end().energy_j is None


def test_board_power_is_integrated_over_the_window(tmp_path):
    chip = "sys/class/hwmon/hwmon3/"
    put(tmp_path, {chip + "in1_input": "5000", chip + "curr1_input": "2000"})  # 10 W: the input
    put(tmp_path, {chip + "in2_input": "5000", chip + "curr2_input": "400"})
    put(tmp_path, {chip + "power1_input": "3000000"})
    clock = Clock()
    meter = energy.HwmonMeter(tmp_path, clock, period_s=3600)  # the thread never samples by itself
    assert meter.power_w() == pytest.approx(10.0)
    meter.begin()
    clock.now = 2.0
    put(tmp_path, {chip + "curr1_input": "4000"})
    reading = meter.end()
    assert reading.energy_j == pytest.approx(30.0)  # from 10 W to 20 W, straight
    assert isinstance(energy.energy_meter("cpu", tmp_path), energy.HwmonMeter)


class FakeNvml:
    """As much of pynvml as is used; ``broken`` answers every question with its error."""

    class NVMLError(Exception):
        pass

    def __init__(self, broken=False):
        self.broken, self.energy = broken, 1000

    def __getattr__(self, name):
        if self.broken:
            raise FakeNvml.NVMLError(name)
        answers = {
            "nvmlDeviceGetCount": 1,
            "nvmlDeviceGetHandleByIndex": "device",
            "nvmlDeviceGetName": b"H200",
            "nvmlDeviceGetMemoryInfo": type("Memory", (), {"total": 139 << 30}),
            "nvmlSystemGetDriverVersion": "570",
            "nvmlDeviceGetClockInfo": 1980,
            "nvmlDeviceGetTemperature": 55,
            "nvmlDeviceGetCurrentClocksThrottleReasons": 0x8,
        }
        if name == "nvmlDeviceGetTotalEnergyConsumption":
            return lambda *_: self.energy
        return lambda *_: answers[name]


def test_nvml_present_and_refusing(monkeypatch, tmp_path):
    fake = FakeNvml()
    monkeypatch.setattr(nvml, "library", lambda: fake)
    assert probe_machine(tmp_path).gpus == (Gpu("H200", 139, "570"),)
    assert clocks.sensors("cuda:0").read() == clocks.Reading(1980.0, 55.0, True)
    meter = energy.energy_meter("cuda")
    meter.begin()
    fake.energy += 2500
    assert meter.end().energy_j == pytest.approx(2.5)
    fake.broken = True
    assert clocks.GpuSensors().read() == clocks.Reading()
    meter.begin()
    assert meter.end().energy_j is None
    assert nvml.device_count() == 0


def test_a_gpu_is_found_by_its_uuid_not_by_its_number(monkeypatch):
    """CUDA_VISIBLE_DEVICES=1 makes NVML's second GPU torch's first; a MIG instance has no energy counter."""
    asked = []

    class TwoGpus(FakeNvml):
        def nvmlDeviceGetHandleByUUID(self, uuid):
            asked.append(uuid)
            if uuid not in ("GPU-second", "MIG-slice"):
                raise FakeNvml.NVMLError("not found")
            return uuid

        def nvmlDeviceGetTotalEnergyConsumption(self, handle):
            if handle.startswith("MIG"):
                raise FakeNvml.NVMLError("not supported")
            return {"GPU-second": 7000}[handle]

        def nvmlDeviceGetName(self, handle):
            return {"GPU-second": "B"}.get(handle, "A")

    fake = TwoGpus()
    monkeypatch.setattr(nvml, "library", lambda: fake)
    monkeypatch.setattr(nvml, "cuda_uuid", lambda ordinal: "second")
    meter = energy.energy_meter("cuda:0")
    assert (meter.sensor, asked[-1]) == ("nvml", "GPU-second")
    assert machine_info.compute_device_name("cuda:0") == "B"
    assert clocks.sensors("cuda:0").read().clock_mhz == 1980.0
    monkeypatch.setattr(nvml, "cuda_uuid", lambda ordinal: "slice")
    assert energy.energy_meter("cuda:0").sensor != "nvml"
    monkeypatch.setattr(nvml, "cuda_uuid", lambda ordinal: "gone")
    assert clocks.sensors("cuda:0").read() == clocks.Reading()


def test_the_uuid_is_the_one_that_torch_uses(monkeypatch):
    uuids = ("1111", "2222")
    cuda = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: len(uuids),
        get_device_properties=lambda ordinal: SimpleNamespace(uuid=uuids[ordinal]),
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert [nvml.cuda_uuid(ordinal) for ordinal in (0, 1, 2)] == ["1111", "2222", None]
    monkeypatch.setitem(sys.modules, "torch", None)
    assert nvml.cuda_uuid(0) is None
