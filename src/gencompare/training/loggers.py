"""Logging: the run's own CSV, W&B and TensorBoard, and the callback that feeds them."""

from __future__ import annotations

import csv
import io
import math
import os
import shutil
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor
from torchmetrics import MeanMetric

from gencompare.errors import TrainingStopped, UserError
from gencompare.files import write_error, write_text
from gencompare.records import RECORD_FILE, RunRecord
from gencompare.training.clock import clock_of

LEADING = ("step", "images", "seconds")


class CurveCSVLogger(Logger):
    """``curve.csv`` in the run folder: one row a logging call, empty where a figure was not logged.

    A resumed run goes on in the same file; rows past the step that it resumes from are dropped.
    """

    def __init__(self, folder: str | Path, start_step: int = 0, **_: Any) -> None:
        super().__init__()
        self.path = Path(folder) / "curve.csv"
        self.columns: list[str] = list(LEADING)
        if rank_zero_only.rank == 0:
            rows = [row for row in read_curve(self.path) if row["step"] <= start_step]
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
            self._rewrite([*read_curve(self.path), row])
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
        """The frozen config in the run folder has them."""


def read_curve(path: Path) -> list[dict[str, float]]:
    """The rows of a curve file, figures that were logged only; a last line that was cut short is left out."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = []
        for raw in csv.DictReader(file):
            try:
                rows.append({name: _number(value) for name, value in raw.items() if name and value})
            except (TypeError, ValueError):
                continue
        return [row for row in rows if "step" in row]


def _number(text: str) -> float:
    return int(text) if text.lstrip("-").isdigit() else float(text)


def wandb_logger(
    *,
    folder: str | Path,
    name: str,
    id: str,
    project: str,
    group: str | None = None,
    mode: str | None = None,
    tags: Sequence[str] = (),
    start_step: int = 0,
    **further: Any,
) -> Logger:
    """A W&B logger that never stops a run: without a key, or without a network, it writes offline and says so.

    Args:
        mode: ``online``, ``offline`` or ``disabled``; None is online where there is an API key, else offline.
        tags: labels of the run.
        start_step: not used; other loggers need it.
        further: any other argument of ``wandb.init``, such as ``entity`` and ``notes``.
    """
    import wandb
    from wandb.errors import Error as WandbError

    chosen = mode or os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
    # The run says itself where everything lies; W&B's own banner would only repeat it.
    settings = wandb.Settings(init_timeout=30, silent=True)
    options: dict[str, Any] = {
        "name": name, "id": id, "project": project, "group": group, "save_dir": str(folder), "resume": "allow",
        "settings": settings, "tags": list(tags), **further,
    }  # fmt: skip
    if rank_zero_only.rank != 0:
        return _open(mode="disabled", **options)
    later = f"wandb sync {folder}/wandb/offline-*"
    logger = _open(mode=chosen, **options)
    try:
        _ = logger.experiment
    except (WandbError, OSError) as error:
        print(f"W&B cannot be reached ({type(error).__name__}): logging offline. Send it later: {later}")
        logger = _open(mode="offline", **options)
        _ = logger.experiment
    else:
        if chosen == "offline":
            why = "is set to offline" if mode or os.environ.get("WANDB_MODE") else "has no API key here"
            print(f"W&B {why}, so it logs offline. Send it later: {later}")
    return logger


def _open(**options: Any) -> WandbLogger:
    logger = WandbLogger(**options)
    # Lightning passes a setting that today's wandb warns of.
    logger._wandb_init.pop("anonymous", None)
    return logger


def has_key() -> bool:
    """Whether there is an API key of W&B here."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import netrc

    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def tensorboard_logger(*, folder: str | Path, **_: Any) -> Logger:
    """TensorBoard event files under ``tensorboard/`` in the run folder."""
    return TensorBoardLogger(str(folder), name="tensorboard", version="")


@rank_zero_only
def log_image(trainer: pl.Trainer, title: str, path: Path, step: int) -> None:
    """Send a PNG to the loggers that take pictures."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(title, [str(path)], step=step)
        elif isinstance(logger, TensorBoardLogger):
            import numpy as np
            from PIL import Image

            logger.experiment.add_image(title, np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")


def abandon_loggers(loggers: list[Logger]) -> None:
    """After a failure: close the W&B run of this job, so that the next job of a sweep does not write into it."""
    for logger in loggers:
        if isinstance(logger, WandbLogger) and rank_zero_only.rank == 0:
            with suppress(Exception):
                logger.experiment.finish(exit_code=1)


def finish_loggers(loggers: list[Logger], record: RunRecord, folder: Path, page: Path) -> None:
    """At the end of a job: send the record, its table of figures and its pictures to W&B, and close its run, so that
    the next job of a sweep gets its own."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            run = logger.experiment
            run.config.update(record.config, allow_val_change=True)
            for result in record.results:
                prefix = f"{result.generation.checkpoint}/"
                run.summary.update({prefix + name: metric.value for name, metric in result.metrics.items()})
            if record.results:
                run.log({"figures": metrics_table(record), **log_result_images(record, folder)})
            # What lies in the run's own folder is uploaded, now or at a later `wandb sync`: enough for a comparison.
            for file in (page, folder / record.curve):
                if file.is_file():
                    shutil.copy(file, run.dir)
            samples = Path(run.dir) / "samples"
            samples.mkdir(exist_ok=True)
            for picture in {picture for result in record.results for picture in result.images.values()}:
                if (folder / picture).is_file():
                    shutil.copy(folder / picture, samples)
            shutil.copy(folder / RECORD_FILE, run.dir)
            run.finish()


def metrics_table(record: RunRecord) -> Any:
    """A `wandb.Table` with a row for each figure of each result, beside how it was made."""
    import wandb

    table = wandb.Table(
        columns=["figure", "value", "low", "high", "real data", "checkpoint", "weights", "sampler", "protocol", "note"]
    )
    for result in record.results:
        made = result.generation
        for name, metric in result.metrics.items():
            low, high = metric.interval or (None, None)
            table.add_data(
                name, metric.value, low, high, metric.baseline, made.checkpoint, made.weights, made.sampler,
                result.measurement.id, metric.note,
            )  # fmt: skip
    return table


def log_result_images(record: RunRecord, folder: Path) -> dict[str, list[Any]]:
    """The pictures of a record's results by title, each captioned with how its samples were drawn."""
    import wandb

    found: dict[str, list[Any]] = {}
    for result in record.results:
        made = result.generation
        caption = ", ".join([made.checkpoint, made.weights, made.sampler])
        for title, path in result.images.items():
            if (folder / path).is_file():
                found.setdefault(title, []).append(wandb.Image(str(folder / path), caption=caption))
    return found


class MetricLogger(Callback):
    """Logs the mean of every metric that ``training_step`` returned over the last ``log_every_n_steps`` steps.

    The means stay on the device and are read (and averaged over processes) once in ``log_every_n_steps`` steps, so
    that the host never waits in between. A mean that is not finite ends the run. A model that may skip a step returns
    the metric ``skipped`` = 1 for it; the other metrics of such a step are left out.
    """

    order = 5

    def __init__(self, log_every_n_steps: int = 50) -> None:
        if log_every_n_steps < 1:
            raise UserError(f"callbacks.metric_logger.log_every_n_steps={log_every_n_steps}: give at least 1 step.")
        self.log_every_n_steps = log_every_n_steps
        self._means: dict[str, MeanMetric] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._means = {}
        clock = clock_of(trainer)
        self._mark = (clock.seconds, clock.images)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        figures = {name: value.detach() for name, value in (outputs or {}).items() if isinstance(value, Tensor)}
        if figures.get("skipped", 0) > 0:
            figures = {"skipped": figures["skipped"]}
        for name, value in figures.items():
            if name not in self._means:
                # A NaN must show, so it is neither skipped nor warned of (a check would wait for the device).
                self._means[name] = MeanMetric(nan_strategy="disable").to(pl_module.device)
            self._means[name].update(value)
        clock = clock_of(trainer)
        if clock.step % self.log_every_n_steps == 0 or trainer.should_stop:
            self.write(trainer)

    def write(self, trainer: pl.Trainer) -> None:
        clock = clock_of(trainer)
        # Skipped or rolled-back steps return fewer metrics; all ranks agree on which.
        updated = {name: mean for name, mean in self._means.items() if mean.update_called}
        figures = {f"train/{name}": float(mean.compute()) for name, mean in updated.items()}
        for mean in self._means.values():
            mean.reset()
        bad = [name for name, value in figures.items() if not math.isfinite(value)]
        if bad:
            raise not_finite(bad[0], clock.step)
        seconds, images = self._mark
        if clock.seconds > seconds:
            figures["train/images_per_second"] = (clock.images - images) / (clock.seconds - seconds)
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        if groups:
            figures["train/lr"] = groups[0]["lr"]
        self._mark = (clock.seconds, clock.images)
        log_metrics(trainer, figures)


def not_finite(name: str, step: int) -> TrainingStopped:
    """The error that ends a run whose figures or weights can no longer be right."""
    return TrainingStopped(
        f"{name} is not finite at step {step}", "Try a lower learning rate (model.optimizer.lr) or model.grad_clip."
    )


def check_weights(model: pl.LightningModule, step: int) -> None:
    """Raises `TrainingStopped` where a weight is no longer finite."""
    norms = torch._foreach_norm([p.detach() for p in model.parameters()])  # type: ignore[attr-defined]
    if not torch.isfinite(torch.stack(norms)).all():
        raise not_finite("a weight", step)


def log_metrics(trainer: pl.Trainer, figures: dict[str, float]) -> None:
    """Send figures to every logger, with the clock's step, images and seconds."""
    clock = clock_of(trainer)
    row = {**figures, "images": clock.images, "seconds": round(clock.seconds, 3)}
    for logger in trainer.loggers:
        logger.log_metrics(row, step=clock.step)
