"""Evaluation during training: held-out metrics, a sample grid, a cheap distance."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback
from torchmetrics import MeanMetric

from gencompare.data.datamodule import ImageData
from gencompare.errors import UserError
from gencompare.evaluation.evaluate import EvaluationProtocol, draw_like
from gencompare.evaluation.metrics.compute import cheap_metrics
from gencompare.evaluation.model_metrics import with_low_res
from gencompare.evaluation.reference import to_uint8
from gencompare.evaluation.sampling import choose_conditions, draw_samples, evaluating
from gencompare.evaluation.sanity import missing_modes
from gencompare.generative_model import GenerativeModel, TrainedModel
from gencompare.image_grid import grid, save_png
from gencompare.resources import forget_peak, peak_memory_bytes
from gencompare.rng import RandomSource, generator
from gencompare.training.clock import clock_of
from gencompare.training.ema import EMA
from gencompare.training.loggers import check_weights, log_image, log_metrics

if TYPE_CHECKING:
    pass


class CheapMetrics:
    """Frechet distance, density and coverage of ``n`` samples and the validation split, in the protocol's features.

    Biased upwards by its small n, and on another reference than a result's: fit to compare one run's looks with each
    other, and nothing else. All processes share the sampling.
    """

    def __init__(self, data: ImageData, protocol: EvaluationProtocol, *, n: int) -> None:
        self.data, self.n = data, n
        # A seed of its own: the samples that a result is measured on choose no checkpoint.
        self.protocol = replace(
            protocol, seed=protocol.seed + 1_000_003, chunk=min(protocol.chunk, n), conditions="val"
        )
        self.extractor = protocol.build(data.spec)[0]

    @property
    def images(self) -> int:
        """Images on each side of density and coverage."""
        return min(self.n, len(self.data.split("val")))

    def __call__(self, model: GenerativeModel) -> dict[str, float]:
        """The figures by name, the distance first."""
        images = draw_like(model, self.n, self.data, self.protocol).images
        return cheap_metrics(images, self.data, self.extractor)


class EvaluationCallback(Callback):
    """Looks at the averaged weights ``count`` times, evenly over the budget.

    A look logs the means of ``validation_figures`` over the validation split (the same noise each time), writes a
    grid of samples from one fixed seed, and logs a Frechet distance between few samples and the validation images.
    That distance is biased by its small n: it draws the curve and chooses ``best``, and is never a result. Beside it
    stand density and coverage of the same samples; where they say that modes of the data are missing, the look says so.

    Args:
        count: looks in a run, the last at its end; 0 for none.
        grid: samples in the picture.
        held_out: validation images that the figures are means over, the first ones of the split.
        preview: the cheap distance; None leaves it out.
        folder: where the pictures go.
        patience: training ends after so many looks in a row without a better preview; None never ends it so.
    """

    def __init__(
        self,
        *,
        count: int,
        grid: int,
        held_out: int,
        preview: CheapMetrics | None,
        folder: Path,
        seed: int,
        patience: int | None = None,
    ) -> None:
        if count < 0 or grid < 0 or held_out < 0:
            raise UserError("callbacks.looks: count, grid and held_out cannot be negative (0 leaves them out).")
        if patience is not None and (patience < 1 or preview is None):
            raise UserError(f"callbacks.looks.patience={patience}: give null, or at least 1 with a preview above 0.")
        self.count, self.grid, self.held_out, self.preview = count, grid, held_out, preview
        self.folder, self.seed, self.patience = folder, seed, patience
        self.done = 0
        self.improved = False
        """Whether the last look was the best so far."""
        self.best: float | None = None
        """The preview's distance at the best look so far."""
        self.last: float | None = None
        """The same at the last look."""
        self.since_best = 0
        """Looks since the best one."""
        self.best_coverage = 0.0
        self.missing: dict[int, str] = {}
        """What was said of missing modes, by the step of the look."""
        self.peak_memory_bytes = 0
        """The most memory that training held; looks reset the device's own count."""

    def state_dict(self) -> dict[str, Any]:
        names = ("done", "best", "last", "since_best", "best_coverage", "missing")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.done, self.best = state_dict["done"], state_dict["best"]
        self.last = state_dict.get("last")
        self.since_best = state_dict.get("since_best", 0)
        self.best_coverage, self.missing = state_dict.get("best_coverage", 0.0), dict(state_dict.get("missing", {}))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if 0 < self.held_out < trainer.world_size:
            raise UserError(f"callbacks.looks.held_out={self.held_out} is less than one image a process.")
        # A budget that was raised on resuming has looks left in it.
        self.done = min(self.done, int(clock_of(trainer).progress * self.count))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        clock = clock_of(trainer)
        due = int(clock.progress * self.count)
        self.improved = False
        if due <= self.done:
            return
        self.done = due
        check_weights(pl_module, clock.step)  # what they draw would not be finite either
        self.peak_memory_bytes = max(self.peak_memory_bytes, peak_memory_bytes(pl_module.device))
        with evaluation_mode(trainer, pl_module):
            self.look(trainer, pl_module)
        forget_peak(pl_module.device)
        if self.patience is not None and trainer.strategy.broadcast(self.since_best >= self.patience, src=0):
            trainer.should_stop = True
        clock.pause()

    def look(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        figures = validation_metrics(trainer, model, self.held_out, self.seed)
        if not isinstance(model, GenerativeModel):
            self.reconstructions(trainer, model)
        else:
            self.picture(trainer, model)
            if self.preview is not None:
                found = self.preview(model)
                figures |= {f"val/{name}": value for name, value in found.items()}
                distance = next(iter(found.values()))
                self.watch(trainer, found)
                self.last = distance
                if self.best is None or distance < self.best:
                    self.best, self.improved = distance, True
                self.since_best = 0 if self.improved else self.since_best + 1
        log_metrics(trainer, figures)

    def watch(self, trainer: pl.Trainer, found: dict[str, float]) -> None:
        """Say where modes of the data are missing from the samples, of whatever family they are."""
        if "coverage" not in found:
            return
        assert self.preview is not None
        said = missing_modes(found["density"], found["coverage"], self.best_coverage, n=self.preview.images)
        self.best_coverage = max(self.best_coverage, found["coverage"])
        if said is not None:
            step = clock_of(trainer).step
            self.missing[step] = said
            if trainer.is_global_zero:
                print(f"Step {step}: {said}.", flush=True)

    def picture(self, trainer: pl.Trainer, model: GenerativeModel) -> None:
        if not self.grid:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        asked = choose_conditions(model, data, self.grid, seed=self.seed, split="val")
        images = draw_samples(model, self.grid, seed=self.seed, asked=asked).images
        shown, columns = with_low_res(images, asked)
        self.save(trainer, "samples", shown, columns)

    def reconstructions(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        """Held-out images, each beside what an autoencoder makes of it."""
        assert isinstance(model, TrainedModel)
        autoencoder = model.autoencoder()
        if not self.grid or autoencoder is None:
            return
        x, cond = next(iter(trainer.datamodule.batches("val", max(1, self.grid // 2))))  # type: ignore[attr-defined]
        again = autoencoder.reconstruct(x.to(model.device), cond, generator=generator(model.device, self.seed))
        pairs = torch.stack([x, again.cpu()], dim=1).flatten(0, 1).clamp(-1, 1)
        self.save(trainer, "reconstructions", to_uint8(pairs, model.spec), 8)

    def save(self, trainer: pl.Trainer, title: str, images: torch.Tensor, columns: int | None) -> None:
        if trainer.is_global_zero:
            path = self.folder / f"step_{clock_of(trainer).step:08d}.png"
            save_png(grid(images.numpy(), columns), path)
            log_image(trainer, title, path, clock_of(trainer).step)


def validation_metrics(trainer: pl.Trainer, model: pl.LightningModule, n: int, seed: int) -> dict[str, float]:
    """Means of ``validation_figures`` over the first ``n`` validation images, with the same noise each time.

    Each process takes its part of the rows of every batch, so the figures do not depend on their number.
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
            draws = RandomSource(generator(model.device, seed, "validation", k), start, stop, len(x))
            mine = {name: value[start:stop].to(model.device) for name, value in cond.items()}
            for name, value in model.validation_figures(x[start:stop].to(model.device), mine, draws).items():
                if name not in means:
                    means[name] = MeanMetric(nan_strategy="disable").to(model.device)
                means[name].update(value.float())
    return {f"val/{name}": float(mean.compute()) for name, mean in means.items()}


@contextlib.contextmanager
def evaluation_mode(trainer: pl.Trainer, model: pl.LightningModule) -> Iterator[None]:
    """The model in eval mode with its averaged weights; both are put back when the block ends."""
    ema = next((c for c in trainer.callbacks if isinstance(c, EMA)), None)  # type: ignore[attr-defined]
    with evaluating(model), ema.averaged(model) if ema else contextlib.nullcontext():
        yield
