"""Loggers for CSV, W&B and TensorBoard, and the callback that logs training metrics."""

from __future__ import annotations

import csv
import io
import math
import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning import Callback
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor
from torch.nn.utils import get_total_norm
from torchmetrics import MeanMetric

from gencompare.errors import TrainingStopped, UserError, printable
from gencompare.files import write_error, write_text
from gencompare.training.clock import clock_of

FIRST_COLUMNS = ("step", "images", "seconds")


class CurveCSVLogger(Logger):
    """Writes ``curve.csv`` in the run folder: a row per logging call, with empty cells for missing metrics.

    A resumed run drops the rows after the step that it resumes from, and appends to the file. Lightning's `CSVLogger`
    cannot continue an existing file, and does not write it atomically.

    Args:
        folder: the run folder.
        start_step: the step that training resumes from.
    """

    def __init__(self, folder: str | Path, start_step: int = 0, **_: Any) -> None:
        super().__init__()
        self.path = Path(folder) / "curve.csv"
        self.columns: list[str] = list(FIRST_COLUMNS)
        if rank_zero_only.rank == 0:
            rows = [row for row in _read_rows(self.path) if row["step"] <= start_step]
            for row in rows:
                self.columns += [name for name in row if name not in self.columns]
            if rows:
                self._rewrite(rows)
            else:
                self.path.unlink(missing_ok=True)

    @property
    def name(self) -> str:
        return "curve"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {"step": step or 0, **metrics}
        new = [name for name in row if name not in self.columns]
        if new or not self.path.exists():
            self.columns += new
            self._rewrite([*_read_rows(self.path), row])
            return
        try:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(row)
        except OSError as error:
            raise write_error(self.path, error) or error from error

    def _rewrite(self, rows: list[dict[str, float]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns)
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path, text.getvalue())

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing, because the run folder contains the config."""


def _read_rows(path: Path) -> list[dict[str, float]]:
    """Read the rows of a curve file, without empty cells and without a truncated last line."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = []
        for raw in csv.DictReader(file):
            try:
                rows.append({name: _parse_number(value) for name, value in raw.items() if name and value})
            except (TypeError, ValueError):  # a truncated line
                continue
        return [row for row in rows if "step" in row]


def _parse_number(text: str) -> float:
    return int(text) if text.lstrip("-").isdigit() else float(text)


class RunWandbLogger(WandbLogger):
    """Lightning's logger of a W&B run. ``log_model`` says whether the finished run folder is uploaded as an artifact.

    Lightning's own ``log_model`` uploads the files of its ``ModelCheckpoint``, which this package does not use.
    """

    def __init__(self, *, log_model: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.log_model = log_model
        # Lightning passes a setting that is deprecated in wandb.
        self._wandb_init.pop("anonymous", None)


def wandb_logger(
    *,
    folder: str | Path,
    name: str,
    id: str,
    project: str,
    group: str | None = None,
    mode: str | None = None,
    tags: Sequence[str] = (),
    log_model: bool = False,
    start_step: int = 0,
    **init_options: Any,
) -> Logger:
    """Create a W&B logger that falls back to offline logging, with a message, if there is no API key or no network.

    Args:
        folder: the run folder.
        name: the name of the run.
        id: the id of the run; a resumed run has the same id.
        project: the W&B project.
        group: the name of the sweep.
        mode: ``online``, ``offline`` or ``disabled``; None uses the environment variable WANDB_MODE if it is set,
            otherwise ``online`` if there is an API key, otherwise ``offline``.
        tags: labels of the run.
        log_model: whether to upload the finished run folder, with its checkpoints, as an artifact.
        start_step: not used here; other loggers need it.
        init_options: other arguments of ``wandb.init``, such as ``entity`` and ``notes``.
    """
    import wandb
    from wandb.errors import Error as WandbError

    mode_used = mode or os.environ.get("WANDB_MODE") or ("online" if has_api_key() else "offline")
    # Silent, because the run itself prints all paths.
    settings = wandb.Settings(init_timeout=30, silent=True)
    options: dict[str, Any] = {
        "name": name, "id": id, "project": project, "group": group, "save_dir": str(folder), "resume": "allow",
        "settings": settings, "tags": list(tags), "log_model": log_model, **init_options,
    }  # fmt: skip
    if rank_zero_only.rank != 0:
        return RunWandbLogger(mode="disabled", **options)
    sync = printable(f"wandb sync {folder}/wandb/offline-*")
    logger = RunWandbLogger(mode=mode_used, **options)
    try:
        _ = logger.experiment
    except (WandbError, OSError) as error:
        print(f"W&B cannot be reached ({type(error).__name__}): logging offline. To upload the run later: {sync}")
        logger = RunWandbLogger(mode="offline", **options)
        _ = logger.experiment
    else:
        if mode_used == "offline":
            reason = "is set to offline" if mode or os.environ.get("WANDB_MODE") else "has no API key here"
            print(f"W&B {reason}: logging offline. To upload the run later: {sync}")
    return logger


def has_api_key() -> bool:
    """Return whether there is a W&B API key."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import netrc

    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def tensorboard_logger(*, folder: str | Path, **_: Any) -> Logger:
    """Create a logger that writes TensorBoard event files to ``tensorboard/`` in the run folder."""
    # Hyperparameters are logged together with the final metrics, so no placeholder metric is needed.
    return TensorBoardLogger(str(folder), name="tensorboard", version="", default_hp_metric=False)


@rank_zero_only
def log_image(trainer: pl.Trainer, title: str, path: Path, step: int) -> None:
    """Log a PNG file to the loggers that support images."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(title, [str(path)], step=step)
        elif isinstance(logger, TensorBoardLogger):
            import numpy as np
            from PIL import Image

            logger.experiment.add_image(title, np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")


class MetricLogger(Callback):
    """Logs the means of all metrics that ``training_step`` returned in the last ``log_every_n_steps`` steps.

    Lightning's ``self.log`` logs the value of a single step, or means over an epoch. The means here stay on the device
    and are read, and averaged over ranks, only when they are logged, so the host rarely waits for the device. A mean
    that is not finite raises `TrainingStopped`. A skipped step returns the metric ``skipped`` = 1; its other metrics
    are ignored.

    Args:
        log_every_n_steps: steps between rows of the curve.
    """

    order = 5

    def __init__(self, log_every_n_steps: int = 50) -> None:
        if log_every_n_steps < 1:
            raise UserError(f"callbacks.metric_logger.log_every_n_steps={log_every_n_steps} must be at least 1.")
        self.log_every_n_steps = log_every_n_steps
        self._means: dict[str, MeanMetric] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._means = {}
        clock = clock_of(trainer)
        self._last_log = (clock.seconds, clock.images)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        metrics = {name: value.detach() for name, value in (outputs or {}).items() if isinstance(value, Tensor)}
        if metrics.get("skipped", 0) > 0:
            metrics = {"skipped": metrics["skipped"]}
        for name, value in metrics.items():
            if name not in self._means:
                # NaN must propagate to the mean, and a check of each value would wait for the device.
                self._means[name] = MeanMetric(nan_strategy="disable").to(pl_module.device)
            self._means[name].update(value)
        clock = clock_of(trainer)
        if clock.step % self.log_every_n_steps == 0 or trainer.should_stop:
            self.log_means(trainer)

    def log_means(self, trainer: pl.Trainer) -> None:
        """Log the means and reset them."""
        clock = clock_of(trainer)
        # Skipped or rolled-back steps return fewer metrics; all ranks agree on which.
        updated = {name: mean for name, mean in self._means.items() if mean.update_called}
        metrics = {f"train/{name}": float(mean.compute()) for name, mean in updated.items()}
        for mean in self._means.values():
            mean.reset()
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            raise not_finite_error(bad[0], clock.step)
        seconds, images = self._last_log
        if clock.seconds > seconds:
            metrics["train/images_per_second"] = (clock.images - images) / (clock.seconds - seconds)
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        if groups:
            metrics["train/lr"] = groups[0]["lr"]
        self._last_log = (clock.seconds, clock.images)
        log_metrics(trainer, metrics)


def not_finite_error(name: str, step: int) -> TrainingStopped:
    """Return the error that stops training when a metric or a weight is not finite."""
    return TrainingStopped(
        f"{name} is not finite at step {step}", "Try a lower learning rate (model.optimizer.lr) or model.grad_clip."
    )


def check_weights(model: pl.LightningModule, step: int) -> None:
    """Raise `TrainingStopped` if a weight is not finite."""
    if not get_total_norm([p.detach() for p in model.parameters()]).isfinite():
        raise not_finite_error("a weight", step)


def log_metrics(trainer: pl.Trainer, metrics: dict[str, float]) -> None:
    """Log metrics to all loggers, together with the step, the images seen and the seconds of the training clock."""
    clock = clock_of(trainer)
    row = {**metrics, "images": clock.images, "seconds": round(clock.seconds, 3)}
    for logger in trainer.loggers:
        logger.log_metrics(row, step=clock.step)
