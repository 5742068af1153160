"""Four patterns to be learned by heart, and how near to them a model has come."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from gencompare.data.datamodule import ImageData, Split
from gencompare.evaluation.sampling import evaluating
from gencompare.generative_model import DataSpec, GenerativeModel, TrainedModel
from gencompare.rng import generator
from gencompare.training.clock import clock_of
from gencompare.training.ema import EMA

MEMBERS, SIDE, LEVELS = 4, 8, 17
DRAWN = 40


class FourPatterns(ImageData):
    """Halves, quarters and stripes, each pattern a class of its own. The rest of the split, for the protocol to measure
    by, is noise, and is trained on by none: ``data.limit=4``. The patterns are the validation images too."""

    spec = DataSpec("patterns", (1, SIDE, SIDE), num_classes=MEMBERS, num_levels=LEVELS)

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
    """(4, 1, 8, 8) in [-1, 1]."""
    data = FourPatterns()
    return data.normalize(data.split("val").images)


def distance(images: Tensor) -> tuple[float, int]:
    """How far images (n, C, H, W) are from the nearest pattern, on average, in units of the patterns' own distance from
    their mean; and to how many patterns some image comes within half that unit."""
    known = members().flatten(1)
    unit = (known - known.mean(0)).norm(dim=1).mean()
    nearest = torch.cdist(images.flatten(1), known).min(1)
    return float(nearest.values.mean() / unit), len(nearest.indices[nearest.values < unit / 2].unique())


def shown(model: TrainedModel, seed: int) -> Tensor:
    """Samples; or, of a model that has none, what it makes of the patterns."""
    with torch.no_grad(), evaluating(model):
        if isinstance(model, GenerativeModel):
            cond = {"label": torch.arange(DRAWN) % MEMBERS} if model.conditional else {}
            return model.sample(DRAWN, cond, generator=generator("cpu", seed))
        return model.reconstruct(members(), {}, generator=generator("cpu", seed))  # type: ignore[operator]


class UntilLearned(Callback):
    """Ends training when the patterns are known; looks after ``first`` steps, and whenever there are twice as many."""

    def __init__(self, bar: float, first: int) -> None:
        self.bar, self.next = bar, first

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        if clock_of(trainer).step < self.next:
            return
        self.next *= 2
        assert isinstance(pl_module, TrainedModel)
        ema = next(c for c in trainer.callbacks if isinstance(c, EMA))  # type: ignore[attr-defined]
        with ema.averaged(pl_module):
            away, reached = distance(shown(pl_module, seed=0))
        trainer.should_stop |= away < self.bar and reached > 1
