"""Post-hoc EMA: snapshots of two averages, from which an average of any length is synthesised after training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from gencompare.checkpoint_files import POSTHOC_EMA_KEY
from gencompare.errors import CorruptedFileError, DiskFullError, UserError, check_counts
from gencompare.sharding import full_tensor, shard_like
from gencompare.tensor_files import read_tensors, write_tensors
from gencompare.training.clock import clock_of
from gencompare.training.divergence import check_divergence
from gencompare.training.ema import WeightAverage, averaged_parameters, place_like_parameters, update_average
from gencompare.training.power_average import MAX_LENGTH, decay, exponent_of, solve_coefficients

SNAPSHOT_FOLDER = "posthoc_ema"
"""Folder of the snapshots in a run folder."""
WEIGHTS_PREFIX = "posthoc:"
"""Prefix of the option ``weights=posthoc:LENGTH``."""
MAX_ERROR = 0.05
"""Maximum relative error of a synthesised averaging profile."""


class PosthocEMA(WeightAverage):
    r"""Maintains power-function averages of ``model.averaged_parameters()``, and saves snapshots of them.

    After step t, :math:`\bar w \leftarrow \beta \bar w + (1 - \beta) w` with :math:`\beta = (1 - 1/t)^{\gamma + 1}`,
    for each length (`gencompare.training.power_average`). Averages of other lengths are linear combinations of the
    snapshots, so that the length can be chosen after training (`synthesize`).

    Checkpoints contain the averages and the list of snapshots. Steps that a `DivergenceGuard` rolls back do not count.

    Snapshots are stored in float16, in half the space of float32, as by Karras et al. (2024). Values beyond its range
    stay float32.

    Args:
        folder: the run folder; snapshots are saved in ``posthoc_ema`` in it.
        lengths: the stored lengths :math:`\sigma_\mathrm{rel}`, each the standard deviation of the averaged steps as a
            fraction of all steps.
        num_snapshots: number of snapshots, evenly spaced over the budget.
    """

    def __init__(self, folder: Path, lengths: Sequence[float] = (0.05, 0.1), num_snapshots: int = 16) -> None:
        check_counts("callbacks.posthoc_ema", num_snapshots=num_snapshots)
        if not isinstance(lengths, Sequence) or isinstance(lengths, str) or not lengths:
            raise UserError(f"callbacks.posthoc_ema.lengths={lengths} must be a list of lengths, such as [0.05, 0.1].")
        for length in lengths:
            check_length(f"callbacks.posthoc_ema.lengths={lengths}", length)
        self.folder, self.num_snapshots = Path(folder) / SNAPSHOT_FOLDER, num_snapshots
        self.exponents = {str(float(length)): exponent_of(length) for length in lengths}
        self.averages: dict[str, dict[str, Tensor]] = {}
        """The averages by length."""
        self.step = 0
        """Number of averaged steps."""
        self.snapshots: list[int] = []
        """The step of each snapshot."""
        self._due = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.averages = {
            length: {name: p.detach().clone() for name, p in averaged_parameters(pl_module).items()}
            for length in self.exponents
        }

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.averages = {length: place_like_parameters(average, pl_module) for length, average in self.averages.items()}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._due = self._number_due(trainer)
        if trainer.is_global_zero:
            for path in self.folder.glob("step_*.safetensors"):
                if path not in [snapshot_path(self.folder, step) for step in self.snapshots]:
                    path.unlink()  # its step is trained again

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.step += 1
        for length, average in self.averages.items():
            update_average(average, pl_module, decay(self.exponents[length], self.step))
        due = self._number_due(trainer)
        if due > self._due:
            self._due = due
            check_divergence(trainer, pl_module)  # may return to an earlier step
            if self.step not in (0, *self.snapshots):
                self._save_snapshot(trainer)
                clock_of(trainer).exclude_elapsed_time()

    def restart(self, pl_module: pl.LightningModule, checkpoint: dict[str, Any] | None) -> None:
        stored = (checkpoint or {}).get(POSTHOC_EMA_KEY, {"step": 0, "snapshots": [], "averages": {}})
        self.step, self.snapshots = stored["step"], list(stored["snapshots"])
        for length, average in stored["averages"].items():  # without any, the next step replaces them
            for name, value in average.items():
                self.averages[length][name].copy_(value)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        checkpoint[POSTHOC_EMA_KEY] = {
            "step": self.step,
            "snapshots": list(self.snapshots),
            "averages": {
                length: {name: full_tensor(value) for name, value in average.items()}
                for length, average in self.averages.items()
            },
        }

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        stored = checkpoint.get(POSTHOC_EMA_KEY)
        if stored is None or stored["averages"].keys() != self.averages.keys():
            raise UserError(
                "callbacks.posthoc_ema averages from the first step, and this run was started with other lengths or"
                " without it: resume with the callbacks of the run, or train again in another folder."
            )
        self.step, self.snapshots = stored["step"], list(stored["snapshots"])
        parameters = averaged_parameters(pl_module)
        self.averages = {
            length: {name: shard_like(value, parameters[name]) for name, value in average.items()}
            for length, average in stored["averages"].items()
        }

    def _number_due(self, trainer: pl.Trainer) -> int:
        return int(clock_of(trainer).progress * self.num_snapshots)

    def _save_snapshot(self, trainer: pl.Trainer) -> None:
        tensors = {
            f"{length}/{name}": to_half(full_tensor(value))
            for length, average in self.averages.items()
            for name, value in average.items()
        }
        saved = True
        if trainer.is_global_zero and tensors:
            path = snapshot_path(self.folder, self.step)
            try:
                write_tensors(tensors, path, {})
            except DiskFullError as error:
                print(f"{error} Training continues without this snapshot.", flush=True)
                saved = False
        if trainer.strategy.broadcast(saved, src=0):  # all ranks must list the same snapshots
            self.snapshots.append(self.step)


def snapshot_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}.safetensors"


def to_half(value: Tensor) -> Tensor:
    """Convert a tensor to float16, or to float32 if a value is beyond the range of float16."""
    half = value.detach().half()
    return half if half.isfinite().all() else value.detach().float()


def check_length(setting: str, length: object) -> None:
    """Raise `UserError` unless ``length``, which is part of ``setting``, is the length of a power-function average."""
    if not isinstance(length, int | float) or not 0 < length < MAX_LENGTH:
        raise UserError(
            f"{setting}: a length must be a number above 0 and below {MAX_LENGTH:.4f}, that of the mean over all steps."
        )


def posthoc_length(weights: str) -> float | None:
    """Return LENGTH of the option ``weights=posthoc:LENGTH``, or None for other weights.

    Raises:
        UserError: it is not a length.
    """
    if not weights.startswith(WEIGHTS_PREFIX):
        return None
    try:
        length = float(weights.removeprefix(WEIGHTS_PREFIX))
    except ValueError:
        length = math.nan
    check_length(f"weights={weights}", length)
    return length


def synthesize(folder: Path, checkpoint: dict[str, Any], length: float) -> dict[str, Tensor]:
    """Synthesise the power-function average of a given length at the step of a checkpoint.

    It is a linear combination of the averages in the checkpoint and in the snapshots before it.

    Args:
        folder: the run folder.
        checkpoint: content of one of its checkpoints.
        length: the length, sigma_rel.

    Returns:
        The averaged parameters by state-dict name.

    Raises:
        UserError: the run has no snapshots, one is missing or corrupted, or they cannot express the length.
    """
    stored = checkpoint.get(POSTHOC_EMA_KEY, {})
    averages: dict[str, dict[str, Tensor]] = stored.get("averages", {})
    if not any(averages.values()):
        raise UserError(
            f"{folder} has no snapshots for weights=posthoc:LENGTH: use weights=ema, or train with"
            " +callbacks.posthoc_ema=posthoc_ema."
        )
    steps = [*(step for step in stored["snapshots"] if step < stored["step"]), stored["step"]]
    coefficients = combine(steps, list(averages), length, folder)
    first = next(iter(averages.values()))
    total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in first.items()}
    for step, row in zip(steps, coefficients, strict=True):
        if step < stored["step"]:
            snapshot = read_snapshot(snapshot_path(folder / SNAPSHOT_FOLDER, step), averages)
        else:
            snapshot = averages
        for coefficient, average in zip(row, snapshot.values(), strict=True):
            for name, value in average.items():
                total[name] += coefficient * value.double()
    return {name: total[name].to(value) for name, value in first.items()}


def combine(steps: list[int], stored_lengths: list[str], length: float, folder: Path) -> np.ndarray:
    """Return the coefficient of each stored length at each step, (steps, lengths), for an average at the last step.

    Raises:
        UserError: the profile of the average cannot be expressed.
    """
    times = np.repeat(np.array(steps, dtype=np.float64), len(stored_lengths))
    exponents = np.tile([exponent_of(float(each)) for each in stored_lengths], len(steps))
    coefficients, error = solve_coefficients(times, exponents, steps[-1], exponent_of(length))
    if error > MAX_ERROR:
        lengths = np.array(sorted({*np.arange(0.005, MAX_LENGTH, 0.005), *map(float, stored_lengths)}))
        errors = np.array([solve_coefficients(times, exponents, steps[-1], exponent_of(each))[1] for each in lengths])
        possible = lengths[errors <= MAX_ERROR]
        raise UserError(
            f"weights=posthoc:{length:g}: the {len(steps)} snapshots of {folder} express lengths from"
            f" {possible.min():.3g} to {possible.max():.3g}. Choose one of these, or train with more"
            " callbacks.posthoc_ema.num_snapshots."
        )
    return coefficients.reshape(len(steps), len(stored_lengths))


def read_snapshot(path: Path, like: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Read the averages of a snapshot by length and name, with the names and shapes of ``like``.

    Raises:
        UserError: the snapshot is missing or corrupted, or belongs to another model.
    """
    try:
        tensors = read_tensors(path)
    except FileNotFoundError as error:
        raise UserError(f"The snapshot {path} is missing: put it back, or use weights=ema.") from error
    except CorruptedFileError as error:
        raise UserError(f"{error} Put back an intact copy, or use weights=ema.") from error
    expected = {f"{length}/{name}": value.shape for length, each in like.items() for name, value in each.items()}
    if {name: value.shape for name, value in tensors.items()} != expected:
        raise UserError(f"The snapshot {path} belongs to another model: put back that of this run, or use weights=ema.")
    return {length: {name: tensors[f"{length}/{name}"] for name in each} for length, each in like.items()}
