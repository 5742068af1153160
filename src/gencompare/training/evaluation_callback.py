"""Evaluation during training: held-out metrics, a sample grid, a cheap distance."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback
from torchmetrics import MeanMetric

from gencompare.data.datamodule import ImageData
from gencompare.errors import UserError
from gencompare.evaluation.evaluate import EvaluationProtocol, sample_for_protocol
from gencompare.evaluation.metrics.compute import cheap_metrics
from gencompare.evaluation.model_metrics import with_low_res
from gencompare.evaluation.reference import to_uint8
from gencompare.evaluation.sampling import choose_conditions, draw_samples, eval_mode
from gencompare.evaluation.sanity import missing_modes
from gencompare.generative_model import GenerativeModel, TrainedModel
from gencompare.image_grid import grid, save_png
from gencompare.resources import peak_memory_bytes, reset_peak_memory
from gencompare.rng import RandomSource, generator
from gencompare.training.clock import clock_of
from gencompare.training.loggers import check_weights, log_image, log_metrics


class CheapMetrics:
    """Frechet distance, density and coverage of ``n`` samples against the validation split.

    Biased upwards, since n is small, and measured on another reference than a result: fit to compare the evaluations
    of one run with each other, and nothing else. All processes share the sampling.
    """

    def __init__(self, data: ImageData, protocol: EvaluationProtocol, *, n: int) -> None:
        self.data, self.n = data, n
        # A seed of its own: the samples that a result is measured on must not choose the checkpoint.
        self.protocol = replace(
            protocol, seed=protocol.seed + 1_000_003, chunk_size=min(protocol.chunk_size, n), condition_split="val"
        )
        self.extractor = protocol.build_extractors(data.spec)[0]

    @property
    def images(self) -> int:
        """Images on each side of density and coverage."""
        return min(self.n, len(self.data.split("val")))

    def __call__(self, model: GenerativeModel) -> dict[str, float]:
        """The metrics by name, the distance first."""
        images = sample_for_protocol(model, self.n, self.data, self.protocol).images
        return cheap_metrics(images, self.data, self.extractor)


class EvaluationCallback(Callback):
    """Evaluates the averaged weights ``num_evaluations`` times, evenly over the budget.

    An evaluation logs the means of the validation metrics over the validation split (with the same noise each time),
    writes a grid of samples from one fixed seed, and logs `CheapMetrics`. Their distance draws the curve and chooses
    ``best.ckpt``; it is never a result. Density and coverage of the same samples warn of missing modes.

    Lightning's validation loop is tied to epochs; here the unit of training is the budget.

    Args:
        num_evaluations: in a run, the last at its end; 0 for none.
        num_grid_images: samples in the grid; 0 for no grid.
        num_val_images: the first images of the validation split, over which metrics are averaged.
        num_samples: samples of `CheapMetrics`; 0 leaves them out.
        patience: training ends after this many evaluations in a row without a lower distance; None never ends it.
        protocol: of the evaluation after training, whose extractor measures; None leaves `CheapMetrics` out.
        data: the datamodule.
        folder: the run folder; grids go into ``samples/``.
        seed: of the grid's samples and of validation noise.
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
        place = "callbacks.evaluation"
        if min(num_evaluations, num_grid_images, num_val_images, num_samples) < 0:
            raise UserError(
                f"{place}: numbers of evaluations, images and samples cannot be negative (0 leaves them out)."
            )
        if patience is not None and (patience < 1 or not num_samples):
            raise UserError(f"{place}.patience={patience}: give null, or at least 1 with {place}.num_samples above 0.")
        self.num_evaluations, self.num_grid_images, self.num_val_images = (
            num_evaluations,
            num_grid_images,
            num_val_images,
        )
        self.cheap_metrics = (
            CheapMetrics(data, protocol, n=num_samples) if protocol is not None and num_samples else None
        )
        self.folder, self.seed, self.patience = folder / "samples", seed, patience
        self.done = 0
        """Evaluations so far."""
        self.best: float | None = None
        """The lowest distance so far."""
        self.last: float | None = None
        """The distance at the last evaluation."""
        self.since_best = 0
        """Evaluations since the best one."""
        self.best_coverage = 0.0
        self.missing: dict[int, str] = {}
        """Warnings of missing modes, by training step."""
        self.peak_memory_bytes = 0
        """Peak memory of training; each evaluation resets the device's own count."""

    def state_dict(self) -> dict[str, Any]:
        names = ("done", "best", "last", "since_best", "best_coverage", "missing")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.done, self.best = state_dict["done"], state_dict["best"]
        self.last = state_dict.get("last")
        self.since_best = state_dict.get("since_best", 0)
        self.best_coverage, self.missing = state_dict.get("best_coverage", 0.0), dict(state_dict.get("missing", {}))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if 0 < self.num_val_images < trainer.world_size:
            raise UserError(f"callbacks.evaluation.num_val_images={self.num_val_images} is less than one per process.")
        # A budget that was raised on resuming leaves evaluations to do.
        self.done = min(self.done, int(clock_of(trainer).progress * self.num_evaluations))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        clock = clock_of(trainer)
        due = int(clock.progress * self.num_evaluations)
        if due <= self.done:
            return
        self.done = due
        check_weights(pl_module, clock.step)  # samples would not be finite either
        self.peak_memory_bytes = max(self.peak_memory_bytes, peak_memory_bytes(pl_module.device))
        with evaluation_mode(pl_module):
            self.evaluate(trainer, pl_module)
        clock.evaluated_at = clock.step
        reset_peak_memory(pl_module.device)
        if self.patience is not None and trainer.strategy.broadcast(self.since_best >= self.patience, src=0):
            trainer.should_stop = True
        clock.pause()

    def evaluate(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        metrics = validation_metrics(trainer, model, self.num_val_images, self.seed)
        if not isinstance(model, GenerativeModel):
            self.reconstructions(trainer, model)
        else:
            self.sample_grid(trainer, model)
            if self.cheap_metrics is not None:
                measured = self.cheap_metrics(model)
                metrics |= {f"val/{name}": value for name, value in measured.items()}
                self.warn_of_missing_modes(trainer, measured, self.cheap_metrics.images)
                self.last = next(iter(measured.values()))
                self.since_best += 1
                if self.best is None or self.last < self.best:
                    self.best, self.since_best = self.last, 0
                    clock_of(trainer).best_at = clock_of(trainer).step
        log_metrics(trainer, metrics)

    def warn_of_missing_modes(self, trainer: pl.Trainer, measured: dict[str, float], n: int) -> None:
        if "coverage" not in measured:
            return
        warning = missing_modes(measured["density"], measured["coverage"], self.best_coverage, n=n)
        self.best_coverage = max(self.best_coverage, measured["coverage"])
        if warning is not None:
            step = clock_of(trainer).step
            self.missing[step] = warning
            if trainer.is_global_zero:
                print(f"Step {step}: {warning}.", flush=True)

    def sample_grid(self, trainer: pl.Trainer, model: GenerativeModel) -> None:
        if not self.num_grid_images:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        conditions = choose_conditions(model, data, self.num_grid_images, seed=self.seed, split="val")
        images = draw_samples(model, self.num_grid_images, seed=self.seed, condition_source=conditions).images
        shown, columns = with_low_res(images, conditions)
        self.save(trainer, "samples", shown, columns)

    def reconstructions(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        """Pairs of a held-out image and its reconstruction."""
        assert isinstance(model, TrainedModel)
        autoencoder = model.autoencoder()
        if not self.num_grid_images or autoencoder is None:
            return
        x, cond = next(iter(trainer.datamodule.batches("val", max(1, self.num_grid_images // 2))))  # type: ignore[attr-defined]
        again = autoencoder.reconstruct(x.to(model.device), cond, generator=generator(model.device, self.seed))
        pairs = torch.stack([x, again.cpu()], dim=1).flatten(0, 1).clamp(-1, 1)
        self.save(trainer, "reconstructions", to_uint8(pairs, model.spec), 8)

    def save(self, trainer: pl.Trainer, title: str, images: torch.Tensor, columns: int | None) -> None:
        if trainer.is_global_zero:
            path = self.folder / f"step_{clock_of(trainer).step:08d}.png"
            save_png(grid(images.numpy(), columns), path)
            log_image(trainer, title, path, clock_of(trainer).step)


def validation_metrics(trainer: pl.Trainer, model: pl.LightningModule, n: int, seed: int) -> dict[str, float]:
    """Means of the validation metrics over the first ``n`` validation images, with the same noise each time.

    Each process takes its share of the rows of every batch, so the means do not depend on the number of processes.
    """
    assert isinstance(model, TrainedModel)
    means: dict[str, MeanMetric] = {}
    rank, world = trainer.global_rank, trainer.world_size
    with torch.no_grad():
        done = 0
        for k, (x, cond) in enumerate(trainer.datamodule.batches("val")):  # type: ignore[attr-defined]
            if done >= n:
                break
            x, cond = x[: n - done], {name: value[: n - done] for name, value in cond.items()}
            done += len(x)
            start, stop = rank * len(x) // world, (rank + 1) * len(x) // world
            if start == stop:
                continue
            rng = RandomSource(generator(model.device, seed, "validation", k), start, stop, len(x))
            mine = {name: value[start:stop].to(model.device) for name, value in cond.items()}
            for name, value in model.validation_metrics(x[start:stop].to(model.device), mine, rng).items():
                if name not in means:
                    means[name] = MeanMetric(nan_strategy="disable").to(model.device)
                means[name].update(value.float())
    return {f"val/{name}": float(mean.compute()) for name, mean in means.items()}


@contextlib.contextmanager
def evaluation_mode(model: pl.LightningModule) -> Iterator[None]:
    """The model in eval mode with its averaged weights; both are restored when the block ends."""
    ema = getattr(model, "ema", None)
    with eval_mode(model), ema.averaged(model) if ema is not None else contextlib.nullcontext():
        yield
