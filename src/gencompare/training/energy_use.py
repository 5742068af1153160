"""The energy that training uses, where it can be read from counters."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback

from gencompare.training.clock import clock_of

POWERCAP = Path("/sys/class/powercap")
"""Folder of Linux with the RAPL counters of Intel's and AMD's processors, which only root may read by default."""


class EnergyMeter:
    """Reads the energy counters of all processors (RAPL) and of some NVIDIA GPUs (NVML).

    RAPL counts whole packages, with everything else that runs on them, and without the memory outside the package.

    Args:
        gpus: CUDA indices of the GPUs that count. They need ``pip install nvidia-ml-py``.
        powercap: folder of the RAPL counters; None is that of Linux.
    """

    def __init__(self, gpus: Iterable[int] = (), powercap: Path | None = None) -> None:
        self.packages = [
            zone for zone in sorted((powercap or POWERCAP).glob("intel-rapl:*"))
            if zone.name.count(":") == 1 and _text(zone / "name").startswith("package")
        ]  # fmt: skip
        # NVML knows nothing of CUDA_VISIBLE_DEVICES, and numbers GPUs in another order.
        self.gpus = [f"GPU-{torch.cuda.get_device_properties(gpu).uuid}" for gpu in gpus]
        self._nvml: Any = _nvml() if self.gpus else None
        self._last = self._counters()

    def read(self) -> float | None:
        """Return the joules since the last call, or since the meter was made; None if a counter cannot be read."""
        last, self._last = self._last, self._counters()
        if last is None or self._last is None:
            return None
        joules = 0.0
        for (before, _), (after, size) in zip(last, self._last, strict=True):
            joules += (after - before if after >= before else after + size - before) / 1e6  # counters wrap around
        return joules

    def _counters(self) -> list[tuple[int, int]] | None:
        """Return the value and the size of each counter in microjoules, or None if one cannot be read."""
        if not self.packages or (self.gpus and self._nvml is None):
            return None
        try:
            counters = [
                (int(_text(zone / "energy_uj")), int(_text(zone / "max_energy_range_uj"))) for zone in self.packages
            ]
        except ValueError:
            return None
        for gpu in self.gpus:
            try:
                handle = self._nvml.nvmlDeviceGetHandleByUUID(gpu)
                counters.append((1000 * self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle), 2**63))
            except self._nvml.NVMLError:  # older GPUs have no counter
                return None
        return counters


def _text(path: Path) -> str:
    """Return the text of a small file, or an empty string if it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _nvml() -> Any:
    """Return the module of NVML after its initialisation, or None without the module or a driver."""
    try:
        pynvml = importlib.import_module("pynvml")
        pynvml.nvmlInit()
    except Exception:  # the module is not installed, or there is no driver
        return None
    return pynvml


class TrainingEnergy(Callback):
    """Adds up the energy of the time that `TrainingClock` counts: steps and the loading of batches, not evaluations.

    The first process counts the processors of its machine and the GPUs of all processes. Over several machines the
    energy is unknown. Lightning's `DeviceStatsMonitor` logs device use, not energy.
    """

    order = 1
    """After the clock, and before the callbacks that evaluate at the end of a step."""

    def __init__(self) -> None:
        self.joules: float | None = 0.0
        """The energy so far; None if it is unknown."""
        self._meter: EnergyMeter | None = None
        self._exclusions = 0
        self._resumed = False

    def state_dict(self) -> dict[str, Any]:
        return {"joules": self.joules}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.joules, self._resumed = state_dict["joules"], True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        device = trainer.strategy.root_device.type
        continues_without_state = trainer.global_step > 0 and not self._resumed
        if trainer.num_nodes > 1 or device not in ("cpu", "cuda") or continues_without_state:
            self.joules = None
        elif trainer.is_global_zero and self.joules is not None:
            self._meter = EnergyMeter(trainer.device_ids if device == "cuda" else ())
            self._exclusions = clock_of(trainer).exclusions

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, i: int) -> None:
        clock = clock_of(trainer)
        if self._meter is not None and clock.exclusions != self._exclusions:
            self._meter.read()
            self._exclusions = clock.exclusions

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._meter is None or self.joules is None:
            return
        used = self._meter.read()
        self.joules = None if used is None else self.joules + used
        if used is None:
            self._meter = None
