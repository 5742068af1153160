"""Log the config and the results of a run to W&B, TensorBoard or any other Lightning logger."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger, TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only

from gencompare.comparison.load_runs import RunFolder
from gencompare.records import RECORD_FILE, Result, RunRecord, newest
from gencompare.tasks.runs import run_config
from gencompare.training.loggers import CurveCSVLogger, RunWandbLogger, tolerate_failures

RUN_FILES = (RECORD_FILE, run_config.FILE, "curve.csv", "compare.html", "checkpoints/*.ckpt", "samples/*.png")
"""Files of a run folder that make up its W&B artifact; `load_run` reads a folder with these files."""


@rank_zero_only
def log_config(loggers: Sequence[Logger], config: dict[str, Any]) -> None:
    """Log the config of a run as its hyperparameters. TensorBoard gets them with the results, which it requires."""
    for logger in loggers:
        with tolerate_failures(logger):
            if isinstance(logger, RunWandbLogger):
                logger.experiment.config.update(config, allow_val_change=True)
            elif not isinstance(logger, CurveCSVLogger | TensorBoardLogger):
                logger.log_hyperparams(config)


@rank_zero_only
def log_results(loggers: Sequence[Logger], record: RunRecord, folder: Path, page: Path) -> None:
    """Log the results and images of a finished run, and close its W&B run.

    Each metric of each result is logged as ``RESULT/METRIC``, named by `result_names`.

    Args:
        loggers: the loggers of the run.
        record: the record of the run.
        folder: the run folder.
        page: the HTML page of the run.
    """
    metrics = {
        f"{name}/{metric}": value.value
        for name, result in zip(result_names(record.results), record.results, strict=True)
        for metric, value in result.metrics.items()
        if value.value is not None
    }
    for logger in loggers:
        with tolerate_failures(logger):
            if isinstance(logger, RunWandbLogger):
                _log_to_wandb(logger, metrics, record, folder, page)
            elif isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(record.config, metrics)
                logger.finalize("success")
            elif not isinstance(logger, CurveCSVLogger):
                if metrics:
                    logger.log_metrics(metrics, step=record.training.get("steps"))
                logger.save()


def result_names(results: Sequence[Result]) -> list[str]:
    """Return a short, unique name for each result: its checkpoint, and how it differs from the checkpoint's own result.

    That is the first result of its newest step. Examples: ``last`` for a run's own sampler, ``last/ddim 10 steps`` for
    another one, ``last/digits`` for the same samples with the extractor ``digits``. The names contain only letters,
    digits, spaces and ``_./-``, as trackers require.
    """
    names: list[str] = []
    for result in results:
        checkpoint = result.generation.checkpoint
        reference = newest(other for other in results if other.generation.checkpoint == checkpoint) or result
        differences = {
            field.name: value
            for new, old in ((result.generation, reference.generation), (result.measurement, reference.measurement))
            for field in fields(new)
            if (value := getattr(new, field.name)) != getattr(old, field.name)
        }
        parts = [
            value if isinstance(value, str) else f"{key.replace('_', ' ')} {value}"
            for key, value in differences.items()
            if key not in ("nfe", "resize", "images_seen")
            and not key.endswith("_hash")  # these follow from the other fields
        ]
        name = "/".join([checkpoint, *(re.sub(r"[^\w.-]+", " ", part).strip() for part in parts)])
        names.append(name if name not in names else f"{name}/{result.id}")
    return names


def _log_to_wandb(
    logger: RunWandbLogger, metrics: dict[str, float], record: RunRecord, folder: Path, page: Path
) -> None:
    import wandb

    run = logger.experiment
    run.config.update(record.config, allow_val_change=True)
    run.summary.update(metrics)
    if record.results:
        run.log({"metrics": wandb_table(record), **wandb_images(record, folder)})
    # Files in the W&B folder are uploaded, now or by `wandb sync`. These files are enough for a comparison.
    files = RunFolder(folder, record, "")  # refuses paths outside the folder
    for file in (page, files.file(record.curve), files.file(RECORD_FILE)):
        if file is not None and file.is_file():
            shutil.copy(file, run.dir)
    samples = Path(run.dir) / "samples"
    samples.mkdir(exist_ok=True)
    for image in {image for result in record.results for image in result.images.values()}:
        if files.read_png(image) is not None:
            shutil.copy(folder / image, samples)
    if logger.log_model:
        artifact = wandb.Artifact(f"run-{run.id}", type="model", metadata={"family": record.family, **metrics})
        for pattern in RUN_FILES:
            for file in sorted(folder.glob(pattern)):
                artifact.add_file(str(file), str(file.relative_to(folder)))
        run.log_artifact(artifact)
    run.finish()


def wandb_table(record: RunRecord) -> Any:
    """Create a `wandb.Table` with a row per metric of each result, including the sampling settings."""
    import wandb

    table = wandb.Table(
        columns=["metric", "value", "low", "high", "real data", "checkpoint", "weights", "sampler", "protocol", "note"]
    )
    for result in record.results:
        generation = result.generation
        for name, metric in result.metrics.items():
            low, high = metric.interval or (None, None)
            table.add_data(
                name, metric.value, low, high, metric.baseline, generation.checkpoint, generation.weights,
                generation.sampler, result.measurement.id, metric.note,
            )  # fmt: skip
    return table


def wandb_images(record: RunRecord, folder: Path) -> dict[str, Any]:
    """Return the images of a record's results by result and title, captioned with the sampling settings."""
    import wandb

    images: dict[str, Any] = {}
    files = RunFolder(folder, record, "")
    for name, result in zip(result_names(record.results), record.results, strict=True):
        generation = result.generation
        caption = ", ".join([generation.checkpoint, generation.weights, generation.sampler])
        for title, path in result.images.items():
            if files.read_png(path) is not None:
                images[f"{name}/{title}"] = wandb.Image(str(folder / path), caption=caption)
    return images


def abandon_loggers(loggers: Sequence[Logger]) -> None:
    """Close the W&B run of a failed job, so that the next job of a sweep starts a new one."""
    for logger in loggers:
        if isinstance(logger, RunWandbLogger) and rank_zero_only.rank == 0:
            with suppress(Exception):
                logger.experiment.finish(exit_code=1)
