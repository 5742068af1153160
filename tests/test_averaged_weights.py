"""Samples of a trained run use its EMA weights and match the data, unlike samples from the online weights.

The weights of the diffusion model are the mean and variances of Gaussian data (`gaussian_truth`). It is trained with a
constant learning rate so high that the weights keep fluctuating around the truth. The mean and covariance of its
samples follow from the weights without Monte Carlo error, and match the data if the weights are averaged.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from gaussian_truth import AXES, MEAN, VARIANCE, error
from gencompare.data.datamodule import SPLITS, ImageData, Split
from gencompare.generative_model import DataSpec
from gencompare.models.diffusion import Diffusion
from gencompare.rng import generator
from gencompare.tasks.runs import loading
from gencompare.training.budget import Budget
from gencompare.training.checkpoints import Checkpoints
from gencompare.training.clock import TrainingClock
from gencompare.training.ema import EMA
from gencompare.training.evaluation_callback import evaluation_mode
from gencompare.training.lightning_plugins import AtomicCheckpointIO
from parts import part

TOLERANCE = 0.1
"""Tolerance for the error of the samples' mean and standard deviation, over all pixels. The error of the training
images is 0.02."""


class GaussianPixels(ImageData):
    """Gaussian images of three pixels."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.spec = DataSpec(name="gaussian_pixels", shape=(1, 1, 3), num_classes=0, num_bins=None)

    def load(self) -> dict[str, Split]:
        sources = {split: generator("cpu", self.spec.name, split) for split in SPLITS}
        draw = {split: torch.randn(4096, 1, 1, 3, generator=source) for split, source in sources.items()}
        return {split: Split((MEAN + VARIANCE.sqrt() * z @ AXES.T).float(), None) for split, z in draw.items()}


class GaussianNetwork(nn.Module):
    """E[x_0 | x_t] = m + alpha V (x_t - alpha m) / (alpha^2 V + sigma^2) along the axes; m and log V are learned."""

    def __init__(self, shape: Any, out_channels: int, num_classes: int) -> None:
        super().__init__()
        self.mean, self.log_variance = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor, noise_cond: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        # noise_cond is 500 + 25 log-SNR, and alpha^2 + sigma^2 = 1.
        axes = AXES.to(x)
        alpha2 = torch.sigmoid((noise_cond - 500) / 25)[:, None, None, None]
        noise = (x - alpha2.sqrt() * self.mean) @ axes / (alpha2 * self.log_variance.exp() + 1 - alpha2)
        return self.mean + alpha2.sqrt() * self.log_variance.exp() * noise @ axes.T


def untrained() -> Diffusion:
    return Diffusion(
        GaussianPixels().spec,
        network=GaussianNetwork,
        schedule=part("schedule", "vp"),
        parameterization=part("parameterization", "x0"),
        objective=part("objective", "simple"),
        sampler=part("sampler", "ddim", num_steps=200),
        clip_x0=False,
        optimizer=lambda weights: torch.optim.Adam(weights, lr=0.3),
    )


def samples_error(model: Diffusion) -> float:
    """Compute the error of the samples' mean and standard deviation."""
    with torch.no_grad():
        return error(model.sampler, model.sampling_denoiser, model.sampler.times(model.schedule))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[pl.Trainer, Diffusion, Path]:
    """Return the trainer and model after training, and the run folder."""
    folder = tmp_path_factory.mktemp("run")
    trainer = pl.Trainer(
        callbacks=[TrainingClock(0, 64, Budget(steps=900)), EMA(0.99), Checkpoints(folder / "checkpoints")],
        plugins=[AtomicCheckpointIO()], logger=False, max_epochs=-1, limit_val_batches=0, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    model = untrained()
    trainer.fit(model, datamodule=GaussianPixels(batch_size=64, seed=1))
    return trainer, model, folder


def loaded_error(folder: Path, weights: str = "ema") -> float:
    """Compute the error of the model loaded from the run folder."""
    model = untrained()
    loading.load_weights(model, folder, checkpoint="last", weights=weights)
    return samples_error(model)


def evaluation_error(trainer: pl.Trainer, model: Diffusion) -> float:
    """Compute the error of the model during an evaluation while training."""
    with evaluation_mode(model):
        return samples_error(model)


def test_ema_samples_match_the_data_after_and_during_training(trained: tuple[pl.Trainer, Diffusion, Path]) -> None:
    trainer, model, folder = trained
    assert loaded_error(folder) < TOLERANCE
    assert evaluation_error(trainer, model) < TOLERANCE


def test_online_weights_do_not_match_the_data(
    trained: tuple[pl.Trainer, Diffusion, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, model, folder = trained
    assert loaded_error(folder, "raw") > TOLERANCE, "requested"
    monkeypatch.setattr(loading, "EMA_KEY", "average")  # not a key of the checkpoint
    assert loaded_error(folder) > TOLERANCE, "if loading ignores the EMA"
    monkeypatch.setattr(EMA, "averaged", lambda self, model: nullcontext())
    assert evaluation_error(trainer, model) > TOLERANCE, "if the evaluation ignores the EMA"
