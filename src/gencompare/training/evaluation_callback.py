"""Evaluation during training: validation metrics, a grid of samples, and cheap sample metrics."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback
from torchmetrics import MeanMetric

from gencompare.data.datamodule import ImageData
from gencompare.errors import DiskFullError, UserError
from gencompare.evaluation.evaluate import EvaluationProtocol, sample_for_protocol
from gencompare.evaluation.metrics.compute import cheap_metrics
from gencompare.evaluation.metrics.neighbors import missing_modes
from gencompare.evaluation.model_metrics import with_low_res
from gencompare.evaluation.reference import to_uint8
from gencompare.evaluation.sampling import choose_conditions, draw_samples, eval_mode
from gencompare.generative_model import GenerativeModel, TrainedModel
from gencompare.image_grid import grid, save_png
from gencompare.resources import peak_memory_bytes, reset_peak_memory
from gencompare.rng import RandomSource, full_precision, generator
from gencompare.sharding import gathered_weights
from gencompare.training.clock import clock_of
from gencompare.training.divergence import check_divergence
from gencompare.training.loggers import log_image, log_metrics
from gencompare.training.progress_bar import TrainingProgressBar


class CheapMetrics:
    """Primary distance, density and coverage of a few samples, compared with the validation split.

    Use the distance only to compare evaluations of the same run: its reference is not the one used for results, and a
    Frechet distance of few samples is biased upwards. Sampling is divided among the ranks.

    Args:
        data: the data set.
        protocol: the evaluation protocol, whose first extractor computes the metrics.
        n: number of samples.
    """

    def __init__(self, data: ImageData, protocol: EvaluationProtocol, *, n: int) -> None:
        self.data, self.n = data, n
        # A different seed, so that the checkpoint is not chosen on the samples that results are computed from.
        self.protocol = replace(
            protocol,
            seed=protocol.seed + 1_000_003,
            chunk_size=min(protocol.chunk_size, n),
            condition_split="val",
            compile=False,
        )
        self.extractor = protocol.build_extractors(data.spec)[0]

    @property
    def images(self) -> int:
        """Number of samples, and of validation images, that density and coverage use."""
        return min(self.n, len(self.data.split("val")))

    def __call__(self, model: GenerativeModel) -> dict[str, float]:
        """Compute the metrics by name, the distance first."""
        images = sample_for_protocol(model, self.n, self.data, self.protocol).images
        return cheap_metrics(images, self.data, self.extractor)


class EvaluationCallback(Callback):
    """Evaluates the averaged weights ``num_evaluations`` times, evenly spaced over the budget.

    Each evaluation logs the means of the model's validation metrics (with the same noise each time) and `CheapMetrics`,
    and writes a grid of samples with a fixed seed. The cheap distance selects ``best.ckpt`` and drives early stopping,
    but is not reported as a result. Cheap density and coverage are used to warn about missing modes.

    Lightning schedules its validation loop by epochs or batches. Here evaluations are scheduled by the budget, use the
    averaged weights, and do not count as training time.

    Args:
        num_evaluations: number of evaluations per run, the last of them at the end; 0 for none.
        num_grid_images: samples in the grid; 0 for no grid.
        num_val_images: number of validation images that metrics are averaged over.
        num_samples: number of samples for `CheapMetrics`; 0 disables them.
        patience: stop early after this many evaluations without a lower distance; None disables early stopping.
        protocol: the evaluation protocol, whose first extractor computes the metrics; None disables `CheapMetrics`.
        data: the data set.
        folder: the run folder; grids go into ``samples/``.
        seed: seed of the samples in the grid and of the noise in validation metrics.
    """

    order = 6

    def __init__(
        self,
        *,
        num_evaluations: int = 5,
        num_grid_images: int = 64,
        num_val_images: int = 1000,
        num_samples: int = 250,
        patience: int | None = None,
        protocol: EvaluationProtocol | None,
        data: ImageData,
        folder: Path,
        seed: int,
    ) -> None:
        key = "callbacks.evaluation"
        if min(num_evaluations, num_grid_images, num_val_images, num_samples) < 0:
            raise UserError(
                f"{key}: the numbers of evaluations, images and samples must be at least 0 (0 disables them)."
            )
        if patience is not None and (patience < 1 or not num_samples):
            raise UserError(f"{key}.patience={patience} must be null, or at least 1 with {key}.num_samples above 0.")
        self.num_evaluations, self.num_val_images = num_evaluations, num_val_images
        self.num_grid_images = num_grid_images
        self.cheap_metrics = None
        if protocol is not None and num_samples:
            self.cheap_metrics = CheapMetrics(data, protocol, n=num_samples)
        self.folder, self.seed, self.patience = folder / "samples", seed, patience
        self.done = 0
        """Number of evaluations so far."""
        self.best: float | None = None
        """The lowest distance so far."""
        self.last: float | None = None
        """The distance at the last evaluation."""
        self.seconds = 0.0
        """Wall time of all evaluations."""
        self.since_best = 0
        """Number of evaluations since the best one."""
        self.best_coverage = 0.0
        """The highest coverage so far."""
        self.missing_modes: dict[int, str] = {}
        """Warnings about missing modes, by training step."""
        self.peak_memory_bytes = 0
        """Peak memory of training, excluding evaluations."""

    def state_dict(self) -> dict[str, Any]:
        names = ("done", "best", "last", "since_best", "best_coverage", "seconds")
        return {name: getattr(self, name) for name in names} | {"missing": self.missing_modes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.done, self.best = state_dict["done"], state_dict["best"]
        self.last = state_dict.get("last")
        self.since_best = state_dict.get("since_best", 0)
        self.seconds = state_dict.get("seconds", 0.0)
        self.best_coverage = state_dict.get("best_coverage", 0.0)
        self.missing_modes = dict(state_dict.get("missing", {}))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if 0 < self.num_val_images < trainer.world_size:
            raise UserError(
                f"callbacks.evaluation.num_val_images={self.num_val_images} must be at least the number of processes."
            )
        # If the budget was raised on resuming, more evaluations are due.
        self.done = min(self.done, int(clock_of(trainer).progress * self.num_evaluations))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        clock = clock_of(trainer)
        due = int(clock.progress * self.num_evaluations)
        if due <= self.done:
            return
        self.done = due
        check_divergence(trainer, pl_module)  # otherwise the samples would not be finite either
        self.peak_memory_bytes = max(self.peak_memory_bytes, peak_memory_bytes(pl_module.device))
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, TrainingProgressBar):
                callback.show_evaluation(trainer)
        start = time.monotonic()
        with evaluation_mode(pl_module):
            self.evaluate(trainer, pl_module)
        self.seconds += time.monotonic() - start
        clock.evaluated_at = clock.step
        reset_peak_memory(pl_module.device)
        if self.patience is not None and trainer.strategy.broadcast(self.since_best >= self.patience, src=0):
            trainer.should_stop = True
        clock.exclude_elapsed_time()

    def evaluate(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        """Evaluate the current weights of ``model``."""
        metrics = validation_metrics(trainer, model, self.num_val_images, self.seed)
        if not isinstance(model, GenerativeModel):
            self.save_reconstructions(trainer, model)
        else:
            self.save_samples(trainer, model)
            if self.cheap_metrics is not None:
                cheap = self.cheap_metrics(model)
                metrics |= {f"val/{name}": value for name, value in cheap.items()}
                self.warn_of_missing_modes(trainer, cheap, self.cheap_metrics.images)
                self.last = next(iter(cheap.values()))
                self.since_best += 1
                if self.best is None or self.last < self.best:
                    self.best, self.since_best = self.last, 0
                    clock_of(trainer).best_at = clock_of(trainer).step
        log_metrics(trainer, metrics)

    def warn_of_missing_modes(self, trainer: pl.Trainer, metrics: dict[str, float], n: int) -> None:
        """Print and store a warning if density and coverage suggest missing modes."""
        if "coverage" not in metrics:
            return
        warning = missing_modes(metrics["density"], metrics["coverage"], self.best_coverage, n=n)
        self.best_coverage = max(self.best_coverage, metrics["coverage"])
        if warning is not None:
            step = clock_of(trainer).step
            self.missing_modes[step] = warning
            if trainer.is_global_zero:
                print(f"Step {step}: {warning}.", flush=True)

    def save_samples(self, trainer: pl.Trainer, model: GenerativeModel) -> None:
        """Save a grid of samples."""
        if not self.num_grid_images:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        conditions = choose_conditions(model, data, self.num_grid_images, seed=self.seed, split="val")
        images = draw_samples(model, self.num_grid_images, seed=self.seed, condition_source=conditions).images
        shown, columns = with_low_res(images, conditions)
        self.save_grid(trainer, "samples", shown, columns)

    def save_reconstructions(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        """Save a grid of validation images, each followed by its reconstruction."""
        assert isinstance(model, TrainedModel)
        autoencoder = model.autoencoder()
        if not self.num_grid_images or autoencoder is None:
            return
        x, cond = next(iter(trainer.datamodule.batches("val", max(1, self.num_grid_images // 2))))  # type: ignore[attr-defined]
        local_x = x.to(model.device, full_precision(model.dtype))
        reconstructed = autoencoder.reconstruct(local_x, cond, generator=generator(model.device, self.seed))
        pairs = torch.stack([x, reconstructed.cpu()], dim=1).flatten(0, 1).clamp(-1, 1)
        self.save_grid(trainer, "reconstructions", to_uint8(pairs, model.spec), 8)

    def save_grid(self, trainer: pl.Trainer, title: str, images: torch.Tensor, columns: int | None) -> None:
        """Write and log a grid of uint8 images, on rank 0."""
        if trainer.is_global_zero:
            path = self.folder / f"step_{clock_of(trainer).step:08d}.png"
            try:
                save_png(grid(images.numpy(), columns), path)
            except DiskFullError as error:
                print(f"{error} Training continues without this grid.", flush=True)
            else:
                log_image(trainer, title, path, clock_of(trainer).step)


def validation_metrics(trainer: pl.Trainer, model: pl.LightningModule, n: int, seed: int) -> dict[str, float]:
    """Average the model's validation metrics over the first ``n`` validation images, with the same noise each time.

    Each rank takes a slice of every batch, so the means do not depend on the number of ranks.
    """
    assert isinstance(model, TrainedModel)
    means: dict[str, MeanMetric] = {}
    rank, world = trainer.global_rank, trainer.world_size
    dtype = full_precision(model.dtype)
    with torch.no_grad():
        done = 0
        for k, (x, cond) in enumerate(trainer.datamodule.batches("val")):  # type: ignore[attr-defined]
            if done >= n:
                break
            x, cond = x[: n - done], {name: value[: n - done] for name, value in cond.items()}
            done += len(x)
            start, stop = rank * len(x) // world, (rank + 1) * len(x) // world
            if len(x) < world:  # a model that exchanges data with other ranks needs all of them, or none
                start, stop = (0, len(x)) if rank == 0 else (0, 0)
            if start == stop:
                continue
            local_x = x[start:stop].to(model.device, dtype)
            rng = RandomSource(generator(model.device, seed, "validation", k), start, stop, len(x), local_x.dtype)
            local_cond = {name: value[start:stop].to(model.device) for name, value in cond.items()}
            for name, value in model.validation_metrics(local_x, local_cond, rng).items():
                if name not in means:
                    means[name] = MeanMetric(nan_strategy="disable").to(model.device)
                means[name].update(value.float())
    return {f"val/{name}": float(mean.compute()) for name, mean in means.items()}


@contextlib.contextmanager
def evaluation_mode(model: pl.LightningModule) -> Iterator[None]:
    """Put the model in eval mode with its averaged weights during the block."""
    ema = getattr(model, "ema", None)
    averaged = ema.averaged(model) if ema is not None else contextlib.nullcontext()
    with eval_mode(model), averaged, gathered_weights(model):
        yield
