"""Loggers for CSV, W&B and TensorBoard, and the callback that logs training metrics."""

from __future__ import annotations

import csv
import io
import math
import os
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor
from torchmetrics import MeanMetric

from gencompare.checksums import GrowingFile
from gencompare.errors import UserError, printable
from gencompare.training.clock import clock_of

FIRST_COLUMNS = ("step", "images", "seconds")


class CurveCSVLogger(Logger):
    """Writes ``curve.csv`` in the run folder: a row per logging call, with empty cells for missing metrics.

    A resumed run drops the rows after the step that it resumes from, and appends to the file. A corrupted file is kept
    as ``curve.csv.corrupted``, and its readable rows are used. Lightning's `CSVLogger` cannot continue an existing
    file, and does not write it atomically.

    Args:
        folder: the run folder.
        start_step: the step that training resumes from.
    """

    def __init__(self, folder: str | Path, start_step: int = 0, **_: Any) -> None:
        super().__init__()
        self._file = GrowingFile(Path(folder) / "curve.csv")
        self.columns: list[str] = list(FIRST_COLUMNS)
        if rank_zero_only.rank == 0:
            self._rows = [row for row in self._read() if row["step"] <= start_step]
            for row in self._rows:
                self.columns += [name for name in row if name not in self.columns]
            if self._rows:
                self._file.rewrite(self._text(self._rows, header=True))
            else:
                self._file.remove()
        self._complete = bool(rank_zero_only.rank == 0 and self._rows)
        """Whether the file contains all rows."""

    @property
    def path(self) -> Path:
        return self._file.path

    @property
    def name(self) -> str:
        return "curve"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {"step": step or 0, **metrics}
        self._rows.append(row)
        new = [name for name in row if name not in self.columns]
        self.columns += new
        complete, self._complete = self._complete, False
        try:
            if new or not complete:
                self._file.rewrite(self._text(self._rows, header=True))
            else:
                self._file.append(self._text([row]))
            self._complete = True
        except (OSError, UserError) as error:
            if complete:
                print(f"{self.path} cannot be written ({error}). Training goes on, and its rows are kept.", flush=True)

    def finalize(self, status: str) -> None:
        """Write the rows that could not be written when they were logged."""
        if rank_zero_only.rank == 0 and self._rows and not self._complete:
            self._file.rewrite(self._text(self._rows, header=True))
            self._complete = True

    def _text(self, rows: list[dict[str, float]], *, header: bool = False) -> str:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns)
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def _read(self) -> list[dict[str, float]]:
        """Read the rows of the file, without empty cells and without lines that are corrupted or truncated."""
        if not self.path.exists():
            return []
        intact = self._file.is_intact()
        text = self.path.read_bytes().decode(errors="replace")
        complete = text[: text.rfind("\n") + 1]  # a killed process may have written half a line
        rows = []
        for raw in csv.DictReader(complete.replace("\0", "").splitlines()):
            try:
                rows.append({name: _parse_number(value) for name, value in raw.items() if name and value})
            except (TypeError, ValueError):
                intact = False
        if not intact:
            os.replace(self.path, corrupted := self.path.with_name(f"{self.path.name}.corrupted"))
            print(f"{self.path} is corrupted: it is kept as {corrupted.name}, and the rows that can be read are used.")
        return [row for row in rows if "step" in row]

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing, because the run folder contains the config."""


def last_step(curve: Path) -> int:
    """Return the last step in a ``curve.csv``, or 0 if there is none. Lines that cannot be read are ignored."""
    text = curve.read_bytes().decode(errors="replace") if curve.exists() else ""
    steps = [int(cell) for line in text.splitlines() if (cell := line.partition(",")[0]).isdecimal()]
    return max(steps, default=0)


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
    init_timeout: float = 3.0,
    finish_timeout: float = 10.0,
    start_step: int = 0,
    **init_options: Any,
) -> Logger:
    """Create a W&B logger that logs offline, with a message, if there is no API key or W&B does not answer in time.

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
        init_timeout: seconds to wait for W&B at the start.
        finish_timeout: seconds to wait for uploads at the end of the run; not limited with ``log_model``. Data that are
            not uploaded by then stay in the run folder, and ``wandb sync`` uploads them.
        start_step: not used here; other loggers need it.
        init_options: other arguments of ``wandb.init``, such as ``entity`` and ``notes``.
    """
    import wandb
    from wandb.errors import Error as WandbError

    mode_used = mode or os.environ.get("WANDB_MODE") or ("online" if has_api_key() else "offline")
    # Silent, because the run itself prints all paths.
    settings = wandb.Settings(
        init_timeout=init_timeout, login_timeout=init_timeout, finish_timeout=0 if log_model else finish_timeout,
        silent=True,
    )  # fmt: skip
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
        wandb.teardown()  # its service would refuse the same run id
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


@contextmanager
def tolerate_failures(logger: Logger) -> Iterator[None]:
    """Print the first error of ``logger`` in the block, and go on: tracking must not end training."""
    try:
        yield
    except Exception as error:
        if not getattr(logger, "has_failed", False):
            logger.has_failed = True  # type: ignore[attr-defined]
            reason = " ".join(str(error).split())[:200]
            print(f"{type(logger).__name__} failed ({type(error).__name__}: {reason}). Training goes on.", flush=True)


def fail_safe(logger: Logger) -> Logger:
    """Let the calls of ``logger`` that Lightning and other callbacks make fail without an error."""

    def guarded(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            with tolerate_failures(logger):
                return method(*args, **kwargs)

        return call

    for name in ("log_metrics", "log_hyperparams", "log_graph", "log_image", "save", "finalize"):
        if hasattr(logger, name):
            setattr(logger, name, guarded(getattr(logger, name)))
    return logger


@rank_zero_only
def log_image(trainer: pl.Trainer, title: str, path: Path, step: int) -> None:
    """Log a PNG file to the loggers that support images."""
    for logger in trainer.loggers:
        with tolerate_failures(logger):
            if isinstance(logger, WandbLogger):
                logger.log_image(title, [str(path)], step=step)
            elif isinstance(logger, TensorBoardLogger):
                import numpy as np
                from PIL import Image

                pixels = np.asarray(Image.open(path).convert("RGB"))
                logger.experiment.add_image(title, pixels, step, dataformats="HWC")


class MetricLogger(Callback):
    """Logs the means of all metrics that ``training_step`` returned in the last ``log_every_n_steps`` steps.

    Lightning's ``self.log`` logs the value of a single step, or means over an epoch. The means here stay on the device
    and are read, and averaged over ranks, only when they are logged, so the host rarely waits for the device. Values
    that are not finite are left out, and a metric without a finite value is not logged. A skipped step returns the
    metric ``skipped`` = 1; its other metrics are ignored.

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
                # Another strategy for NaN would wait for the device.
                self._means[name] = MeanMetric(nan_strategy="disable").to(pl_module.device)
            finite = value.isfinite()
            self._means[name].update(torch.where(finite, value, 0), weight=finite)
        clock = clock_of(trainer)
        if clock.step % self.log_every_n_steps == 0 or trainer.should_stop:
            self.log_means(trainer)

    def log_means(self, trainer: pl.Trainer) -> None:
        """Log the means and reset them."""
        clock = clock_of(trainer)
        # Skipped or rolled-back steps return fewer metrics; all ranks agree on which.
        updated = {name: mean for name, mean in self._means.items() if mean.update_called}
        means = {f"train/{name}": float(mean.compute()) for name, mean in updated.items()}
        metrics = {name: value for name, value in means.items() if math.isfinite(value)}
        for mean in self._means.values():
            mean.reset()
        seconds, images = self._last_log
        if clock.seconds > seconds:
            metrics["train/images_per_second"] = (clock.images - images) / (clock.seconds - seconds)
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        if groups:
            metrics["train/lr"] = groups[0]["lr"]
        self._last_log = (clock.seconds, clock.images)
        log_metrics(trainer, metrics)


def log_metrics(trainer: pl.Trainer, metrics: dict[str, float]) -> None:
    """Log metrics to all loggers, together with the step, the images seen and the seconds of the training clock."""
    clock = clock_of(trainer)
    row = {**metrics, "images": clock.images, "seconds": round(clock.seconds, 3)}
    for logger in trainer.loggers:
        logger.log_metrics(row, step=clock.step)
