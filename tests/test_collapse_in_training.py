"""What collapses while a model trains, finite all the same: training ends, and the last good checkpoint stays."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from gencompare.data.digits import Digits
from gencompare.errors import UserError
from gencompare.generative_model import TrainedModel
from gencompare.models.autoencoder import Autoencoder
from gencompare.models.bottlenecks import VectorQuantizer
from gencompare.models.diffusion import Diffusion
from gencompare.networks.mlp import DenoisingMLP
from gencompare.training.budget import Budget
from gencompare.training.checkpoints import AtomicCheckpointIO, Checkpoints
from gencompare.training.clock import TrainingClock
from gencompare.training.ema import EMA
from parts import part


def fit(model: TrainedModel, folder: Path, *callbacks: pl.Callback, steps: int = 20) -> None:
    """Trains; every step is saved that may be."""
    trainer = pl.Trainer(
        callbacks=[TrainingClock(0, 16, Budget(steps=steps)), *callbacks, EMA(0.9), Checkpoints(folder,
        every_minutes=0)],
        plugins=[AtomicCheckpointIO()], logger=False, max_epochs=-1, limit_val_batches=0, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(model, datamodule=Digits(batch_size=16, seed=1))


def saved_step(folder: Path, model: TrainedModel) -> int:
    """The step of last.ckpt, whose weights the model takes."""
    saved = torch.load(folder / "last.ckpt", weights_only=True)
    model.load_state_dict(saved["state_dict"])
    return saved["callbacks"]["TrainingClock"]["step"]


def last_good_step(model: TrainedModel, folder: Path, *callbacks: pl.Callback) -> int:
    """Trains until the model is found to have collapsed. Gives the step of last.ckpt."""
    with pytest.raises(UserError, match=r"collapsed.*Training was stopped; the last good checkpoint is kept") as told:
        fit(model, folder, *callbacks)
    assert "\n" not in str(told.value)
    return saved_step(folder, model)


class After(pl.Callback):
    """Does something after a step."""

    def __init__(self, step: int, act: Callable[[pl.Trainer, Any], None]) -> None:
        self.step, self.act = step, act

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx + 1 == self.step:
            self.act(trainer, pl_module)


def narrow(trainer: pl.Trainer, model: Any) -> None:
    """The learned log-SNR spans a tenth of what is least."""
    with torch.no_grad():
        model.schedule.gamma_max.copy_(model.schedule.gamma_min + 0.1)


def stop(trainer: pl.Trainer, model: Any) -> None:
    """As Ctrl-C does."""
    trainer.should_stop = True


def test_a_learned_schedule_that_collapses_ends_training_and_is_not_saved(tmp_path: Path) -> None:
    model = Diffusion(
        Digits.spec,
        network=partial(DenoisingMLP, width=16, depth=1),
        schedule=part("schedule", "learned", features=8),
        parameterization=part("parameterization", "eps"),
        objective=part("objective", "vlb"),
        sampler=part("sampler", "ddim", steps=2),
        optimizer=partial(torch.optim.Adam, lr=1e-3),
    )
    assert last_good_step(model, tmp_path, After(4, narrow)) == 3
    model.schedule.check()


class Encoder(nn.Module):
    """One latent an image: its brightness, and after ``healthy`` calls the same for all."""

    def __init__(self, shape: tuple[int, ...], out_channels: int, healthy: int) -> None:
        super().__init__()
        self.healthy, self.scale = healthy, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.healthy -= 1
        return self.scale * x.mean((2, 3), keepdim=True) * (self.healthy >= 0)


class Decoder(nn.Module):
    def __init__(self, in_channels: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.out = nn.ConvTranspose2d(in_channels, shape[0], shape[-1])

    def forward(self, z: Tensor) -> Tensor:
        return self.out(z)


def collapsing(healthy: int = 1) -> Autoencoder:
    """After some healthy steps all images have one code. The encoder's first call is of the model being built."""
    return Autoencoder(
        Digits.spec,
        encoder=partial(Encoder, healthy=1 + healthy),
        decoder=Decoder,
        bottleneck=VectorQuantizer(channels=1, codes=4, decay=0.5, revive=0.25),
        optimizer=partial(torch.optim.SGD, lr=1e-3),
    )


def test_a_codebook_that_collapses_ends_training_and_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VectorQuantizer, "PATIENCE", 3)
    model = collapsing()
    assert last_good_step(model, tmp_path) == 1
    assert not model.doubtful
    assert model.coder.encoder.healthy == -5, "two steps until a code is revived, and three of patience"


@pytest.mark.parametrize("stops, steps, kept", [(4, 20, 1), (1, 20, 1), (4, 4, 4)])
def test_what_may_be_a_collapse_is_saved_at_the_end_of_the_budget_alone(
    tmp_path: Path, stops: int, steps: int, kept: int
) -> None:
    model = collapsing()
    fit(model, tmp_path, After(stops, stop), steps=steps)
    assert saved_step(tmp_path, model) == kept


def test_training_that_is_stopped_before_anything_was_saved_is_saved(tmp_path: Path) -> None:
    model = collapsing(healthy=0)
    fit(model, tmp_path, After(2, stop))
    assert saved_step(tmp_path, model) == 2
