"""A data set of four patterns that a model must memorise, and the distance of samples from them."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from gencompare.data.datamodule import ImageData, Split
from gencompare.evaluation.sampling import eval_mode
from gencompare.generative_model import DataSpec, GenerativeModel, TrainedModel
from gencompare.rng import generator
from gencompare.training.clock import clock_of
from gencompare.training.ema import EMA

MEMBERS, SIDE, LEVELS = 4, 8, 17
DRAWN = 40


class FourPatterns(ImageData):
    """Four patterns of halves, quarters and stripes, each with its own label.

    The rest of the training split is noise, used by the protocol and excluded from training by
    ``data.train_subset_size=4``. The patterns are also the validation images.
    """

    spec = DataSpec("patterns", (1, SIDE, SIDE), num_classes=MEMBERS, num_bins=LEVELS)

    def load(self) -> dict[str, Split]:
        y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
        right, low = x >= SIDE // 2, y >= SIDE // 2
        members = torch.stack([right, low, right ^ low, x % 2 == 1])[:, None].to(torch.uint8) * (LEVELS - 1)
        noise = torch.randint(LEVELS, (200, *self.spec.shape), generator=generator("cpu", "noise"))
        labels = torch.arange(MEMBERS)
        rest = Split(noise.to(torch.uint8), torch.arange(len(noise)) % MEMBERS)
        train = Split(torch.cat([members, rest.images]), torch.cat([labels, rest.labels]))  # type: ignore[list-item]
        return {"train": train, "val": Split(members, labels), "test": rest}


def members() -> Tensor:
    """Return the patterns, (4, 1, 8, 8) in [-1, 1]."""
    data = FourPatterns()
    return data.normalize(data.split("val").images)


def distance(images: Tensor) -> tuple[float, int]:
    """Return the mean distance of images (n, C, H, W) from the nearest pattern, and the number of patterns with an
    image nearby.

    Distances are in units of the patterns' mean distance from their mean; nearby means within half a unit.
    """
    known = members().flatten(1)
    unit = (known - known.mean(0)).norm(dim=1).mean()
    nearest = torch.cdist(images.flatten(1), known).min(1)
    return float(nearest.values.mean() / unit), len(nearest.indices[nearest.values < unit / 2].unique())


def shown(model: TrainedModel, seed: int) -> Tensor:
    """Return samples, or reconstructions of the patterns if the model is not generative."""
    with torch.no_grad(), eval_mode(model):
        if isinstance(model, GenerativeModel):
            cond = {"label": torch.arange(DRAWN) % MEMBERS} if model.conditional else {}
            return model.sample(DRAWN, cond, generator=generator("cpu", seed))
        return model.reconstruct(members(), {}, generator=generator("cpu", seed))  # type: ignore[operator]


class UntilLearned(Callback):
    """Ends training when the patterns are learned. The first check is after ``first`` steps, and the number of steps
    grows by half from check to check.

    Args:
        bar: the maximum distance of samples from the patterns.
        first: the step of the first check.
    """

    def __init__(self, bar: float, first: int) -> None:
        self.bar, self.next = bar, first

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        if clock_of(trainer).step < self.next:
            return
        self.next += self.next // 2
        assert isinstance(pl_module, TrainedModel)
        ema = next(c for c in trainer.callbacks if isinstance(c, EMA))  # type: ignore[attr-defined]
        with ema.averaged(pl_module):
            away, reached = distance(shown(pl_module, seed=0))
        trainer.should_stop |= away < self.bar and reached > 1
