"""The energy of training is that of the counters during steps, and unknown where one cannot be read."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gencompare.comparison.run_costs import total_cost
from gencompare.records import RunRecord
from gencompare.tasks.runs import dependency_costs
from gencompare.training.budget import Budget
from gencompare.training.clock import TrainingClock
from gencompare.training.energy_use import EnergyMeter, TrainingEnergy

SIZE = 262_143_328_850
"""Where the counters of a real package wrap around, in microjoules."""


def counter(folder: Path, number: str, microjoules: int, name: str) -> Path:
    zone = folder / f"intel-rapl:{number}"
    zone.mkdir(parents=True, exist_ok=True)
    (zone / "name").write_text(f"{name}\n")
    (zone / "energy_uj").write_text(f"{microjoules}\n")
    (zone / "max_energy_range_uj").write_text(f"{SIZE}\n")
    return zone


def test_packages_are_added_up_and_wrap_around(tmp_path: Path) -> None:
    """Zones within a package, and the whole platform, would count the same joules again."""
    counter(tmp_path, "0", SIZE - 1_000_000, "package-0")
    counter(tmp_path, "0:0", 0, "core")
    counter(tmp_path, "1", 5_000_000, "package-1")
    counter(tmp_path, "2", 0, "psys")
    meter = EnergyMeter(powercap=tmp_path)
    assert meter.read() == 0
    counter(tmp_path, "0", 2_000_000, "package-0")
    counter(tmp_path, "0:0", 10**9, "core")
    counter(tmp_path, "1", 9_000_000, "package-1")
    counter(tmp_path, "2", 10**9, "psys")
    assert meter.read() == pytest.approx(3 + 4)
    assert meter.read() == 0


def test_energy_is_unknown_without_readable_counters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert EnergyMeter(powercap=tmp_path).read() is None
    zone = counter(tmp_path, "0", 0, "package-0")
    monkeypatch.setitem(sys.modules, "pynvml", None)  # cannot be imported
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: SimpleNamespace(uuid="a"))
    assert EnergyMeter([0], tmp_path).read() is None
    meter = EnergyMeter(powercap=tmp_path)
    (zone / "energy_uj").unlink()  # as for a user who is not root
    assert meter.read() is None


def test_gpus_are_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter(tmp_path, "0", 0, "package-0")
    millijoules = {"GPU-b": 7_000, "GPU-d": 100}

    class NVMLError(Exception): ...

    fake: Any = SimpleNamespace(
        nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=lambda uuid: uuid, NVMLError=NVMLError,
        nvmlDeviceGetTotalEnergyConsumption=millijoules.__getitem__,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    # CUDA_VISIBLE_DEVICES=1,3: CUDA numbers them 0 and 1
    visible = {0: SimpleNamespace(uuid="b"), 1: SimpleNamespace(uuid="d")}
    monkeypatch.setattr(torch.cuda, "get_device_properties", visible.__getitem__)
    meter = EnergyMeter([0, 1], tmp_path)
    millijoules |= {"GPU-b": 8_500, "GPU-d": 600}
    counter(tmp_path, "0", 250_000, "package-0")
    assert meter.read() == pytest.approx(1.5 + 0.5 + 0.25)


def test_only_steps_count_and_a_resumed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gencompare.training.energy_use.POWERCAP", tmp_path)
    clock = TrainingClock(0, 8, Budget(steps=8))
    trainer: Any = SimpleNamespace(
        strategy=SimpleNamespace(root_device=SimpleNamespace(type="cpu")), num_nodes=1, is_global_zero=True,
        global_step=0, lightning_module=SimpleNamespace(clock=clock),
    )  # fmt: skip
    module: Any = None
    used = 0

    def spend(joules: int) -> None:
        nonlocal used
        used += joules
        counter(tmp_path, "0", used * 1_000_000, "package-0")

    def step(energy: TrainingEnergy, loading: int, training: int) -> None:
        spend(loading)
        energy.on_train_batch_start(trainer, module, None, 0)
        spend(training)
        energy.on_train_batch_end(trainer, module, None, None, 0)

    spend(0)
    energy = TrainingEnergy()
    energy.on_train_start(trainer, module)
    for _ in range(3):
        step(energy, loading=1, training=2)
        spend(100)  # an evaluation
        clock.exclude_elapsed_time()
    assert energy.joules == pytest.approx(3 + 2 + 2), (
        "the first batch after an evaluation is loaded without being counted"
    )
    trainer.global_step = 3
    resumed, unknown = TrainingEnergy(), TrainingEnergy()
    resumed.load_state_dict(energy.state_dict())
    for each in (resumed, unknown):  # the latter continues a run that is older than the callback
        each.on_train_start(trainer, module)
        step(each, loading=1, training=2)
    assert resumed.joules == pytest.approx(7 + 3) and unknown.joules is None
    trainer.num_nodes = 2  # this process reads one machine
    resumed.on_train_start(trainer, module)
    assert resumed.joules is None


def test_the_total_contains_dependencies_and_is_unknown_if_one_is() -> None:
    def record(own: float | None, autoencoder: dict[str, float]) -> RunRecord:
        cost = {"images_seen": 1, "steps": 1, "flops": 1.0, "device_seconds": 1.0}
        part = {"role": "autoencoder", "run": "a", "id": "a", "family": "vqvae", **cost, **autoencoder}
        run = RunRecord("r", "ldm", {}, training={**cost, "energy_joules": own, "dependencies": [part]})
        dependency_costs.update_total_cost(run)
        return run

    assert total_cost(record(5.0, {"energy_joules": 7.0}))["energy_joules"] == 12
    assert total_cost(record(5.0, {}))["energy_joules"] is None
    assert total_cost(record(None, {"energy_joules": 7.0}))["energy_joules"] is None
