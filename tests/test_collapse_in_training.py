"""A collapse with finite losses ends training, and the last good checkpoint is kept."""

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
from gencompare.training.checkpoints import Checkpoints
from gencompare.training.clock import TrainingClock
from gencompare.training.ema import EMA
from gencompare.training.lightning_plugins import AtomicCheckpointIO
from parts import part


def fit(model: TrainedModel, folder: Path, *callbacks: pl.Callback, steps: int = 20) -> None:
    """Train, saving a checkpoint after each step if possible."""
    trainer = pl.Trainer(
        callbacks=[TrainingClock(0, 16, Budget(steps=steps)), *callbacks, EMA(0.9), Checkpoints(folder,
        every_minutes=0)],
        plugins=[AtomicCheckpointIO()], logger=False, max_epochs=-1, limit_val_batches=0, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(model, datamodule=Digits(batch_size=16, seed=1))


def saved_step(folder: Path, model: TrainedModel) -> int:
    """Load last.ckpt into the model and return its step."""
    saved = torch.load(folder / "last.ckpt", weights_only=True)
    model.load_state_dict(saved["state_dict"])
    return saved["callbacks"]["TrainingClock"]["step"]


def last_good_step(model: TrainedModel, folder: Path, *callbacks: pl.Callback) -> int:
    """Train until a collapse is detected and return the step of last.ckpt."""
    with pytest.raises(UserError, match=r"collapsed.*Training was stopped; the last good checkpoint is kept") as error:
        fit(model, folder, *callbacks)
    assert "\n" not in str(error.value)
    return saved_step(folder, model)


class After(pl.Callback):
    """Calls ``act`` after a given step."""

    def __init__(self, step: int, act: Callable[[pl.Trainer, Any], None]) -> None:
        self.step, self.act = step, act

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx + 1 == self.step:
            self.act(trainer, pl_module)


def narrow(trainer: pl.Trainer, model: Any) -> None:
    """Shrink the log-SNR range of the learned schedule to a tenth of the allowed minimum."""
    with torch.no_grad():
        model.schedule.gamma_max.copy_(model.schedule.gamma_min + 0.1)


def stop(trainer: pl.Trainer, model: Any) -> None:
    """Stop training, like Ctrl-C."""
    trainer.should_stop = True


def test_a_collapsed_learned_schedule_ends_training_and_is_not_saved(tmp_path: Path) -> None:
    model = Diffusion(
        Digits.spec,
        network=partial(DenoisingMLP, width=16, depth=1),
        schedule=part("schedule", "learned", num_features=8),
        parameterization=part("parameterization", "eps"),
        objective=part("objective", "vlb"),
        sampler=part("sampler", "ddim", num_steps=2),
        optimizer=partial(torch.optim.Adam, lr=1e-3),
    )
    assert last_good_step(model, tmp_path, After(4, narrow)) == 3
    model.schedule.check()


class Encoder(nn.Module):
    """Encodes each image as one latent: its brightness in the first ``healthy`` calls, and a constant afterwards."""

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
    """Return an autoencoder that gives all images the same code after ``healthy`` steps. Building it calls the encoder
    once."""
    return Autoencoder(
        Digits.spec,
        encoder=partial(Encoder, healthy=1 + healthy),
        decoder=Decoder,
        bottleneck=VectorQuantizer(channels=1, num_codes=4, decay=0.5, revival_threshold=0.25),
        optimizer=partial(torch.optim.SGD, lr=1e-3),
    )


def test_a_collapsed_codebook_ends_training_and_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VectorQuantizer, "PATIENCE", 3)
    model = collapsing()
    assert last_good_step(model, tmp_path) == 1
    assert not model.possibly_collapsed
    assert model.coder.encoder.healthy == -5, "a code is reset after two steps, and patience is three steps"


@pytest.mark.parametrize("stops, steps, kept", [(4, 20, 1), (1, 20, 1), (4, 4, 4)])
def test_a_possible_collapse_is_saved_only_at_the_end_of_the_budget(
    tmp_path: Path, stops: int, steps: int, kept: int
) -> None:
    model = collapsing()
    fit(model, tmp_path, After(stops, stop), steps=steps)
    assert saved_step(tmp_path, model) == kept


def test_stopping_before_the_first_checkpoint_saves_one(tmp_path: Path) -> None:
    model = collapsing(healthy=0)
    fit(model, tmp_path, After(2, stop))
    assert saved_step(tmp_path, model) == 2
