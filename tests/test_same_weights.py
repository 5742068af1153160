"""One process and two processes train the same weights, for every family, up to the rounding of float64."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor

from composing import compose
from forking import in_processes, needs_fork
from gencompare.data.datamodule import TrainStream
from gencompare.generative_model import TrainedModel
from gencompare.models import manual_optimization
from gencompare.models.latents import FrozenAutoencoder, Tokens
from gencompare.tasks.runs.build import build_data, build_model, build_trainer
from gencompare.training.budget import Budget
from gencompare.training.clock import TrainingClock
from gencompare.training.ema import EMA
from gencompare.training.learning_rate import LearningRateScheduler

BATCH = 8
UNET = [
    "model.network.channels=8", "model.network.channel_mult=[1,2]", "model.network.num_groups=4",
    "model.network.attention_resolutions=[4]",
]  # fmt: skip
MLP = ["model/network=mlp", "model.network.width=16", "model.network.depth=1"]
RESNETS = [
    f"model.{network}.{size}" for network in ("encoder", "decoder")
    for size in ("channels=8", "max_channels=8", "num_blocks=1")
]  # fmt: skip
CODER = ["model.encoder.channels=8", "model.discriminator.channels=8", "model.adversarial_start=0.3"]
FAMILIES: dict[str, list[str]] = {
    "vae": ["model=vae", "model.conditional=true", "model.kl_warmup_steps=5", *RESNETS],
    "vae with a learned prior": ["model=vae", "model/prior=mixture_of_gaussians", *RESNETS],
    "hvae": ["model=hvae", "model.decoder.channels=8", "model.decoder.max_channels=8"],
    "glow": ["model=glow", "model.conditional=true", "model.bijection.depth=2", "model.bijection.width=8"],
    "tarflow": [
        "model=tarflow", "model.conditional=true", "model.label_dropout=0.2", "model.noise_std=0.1",
        "model.bijection.num_blocks=2", "model.bijection.depth=1", "model.bijection.hidden_size=8",
        "model.bijection.num_heads=2",
    ],
    "gan": [
        "model=gan", "model.d_steps=2", "model/discriminator_augmentation=ada", "model/generator=mlp",
        "model.discriminator.channels=8", "model.discriminator.max_channels=8", "model.generator.width=16",
        "model.discriminator_augmentation.adjustment_images=100",
    ],
    "wgan": ["model=gan", "model/adversarial=wasserstein", "model/penalty=wgan_gp", "model/generator=mlp",
             "model/discriminator=mlp", "model.generator.width=16", "model.discriminator.width=16",
             "model.conditional=true"],
    "ebm": ["model=ebm", "model.num_langevin_steps=3", "model.energy.width=16", "model.buffer_size=32"],
    "ddpm": ["model=ddpm", *UNET],
    "iddpm": ["model=iddpm", *MLP],
    "vdm": ["model=vdm", "model.schedule.num_features=8", *MLP],
    "ncsn": ["model=ncsn", *MLP],
    "sde_vp": ["model=sde_vp", *MLP],
    "sde_subvp": ["model=sde_subvp", *MLP],
    "sde_ve": ["model=sde_ve", *MLP],
    "edm": ["model=edm", "model/augmentation=edm", *MLP],
    "flow": ["model=flow", *MLP],
    "flow with optimal transport": ["model=flow", "model/objective=ot_flow", *MLP],
    "consistency": ["model=consistency", *MLP],
    "meanflow": ["model=meanflow", *MLP],
    "autoencoder": ["model=autoencoder", *CODER],
    "ldm": ["model=ldm", "model.latent.autoencoder.encoder.channels=8", *MLP],
    "vqvae": ["model=vqvae", *CODER],
    "vqtransformer": ["model=vqtransformer", "model.latent.autoencoder.encoder.channels=8",
                      "model.network.hidden_size=16", "model.network.depth=1"],
    "pixelcnnpp": ["model=pixelcnnpp", "model.network.channels=8", "model.likelihood.num_components=3",
                   "model.conditional=true"],
    "classifier": ["model=classifier", "model.network.widths=[8,8]"],
    "noisy_classifier": ["model=noisy_classifier", "model.network.channels=8", "model.network.dropout=0"],
}  # fmt: skip
"""Overrides that make each family small. A latent model works on the latents of the autoencoder before it."""
STEPS = 10
"""Steps of ``make test``, in which a fault must show; ``make test-slow`` trains for 50."""
TOLERANCE = 1e-8
"""Relative difference between the weights of one and two processes that rounding may cause."""


@cache
def config(name: str, world: int) -> DictConfig:
    shared = [
        "data=digits",
        "trainer.accelerator=cpu",
        "trainer.precision=64-true",
        f"trainer.global_batch_size={BATCH}",
    ]
    if world == 1:
        return compose(*FAMILIES[name], "trainer=cpu", "model.lr_schedule.warmup_steps=2", *shared)
    cfg = copy.deepcopy(config(name, 1))
    cfg.trainer = compose("trainer=ddp", f"trainer.devices={world}", *shared).trainer
    return cfg


def fit(name: str, world: int, steps: int, folder: Path, trained: Mapping[str, TrainedModel]) -> TrainedModel:
    """Train a family as a run does, with the callbacks that change weights."""
    cfg = config(name, world)
    data = build_data(cfg)
    model = build_model(cfg, data)
    if isinstance(space := getattr(model, "space", None), FrozenAutoencoder):
        images = [data.normalize(data.train_subset.images[:64])]
        autoencoder = trained["vqvae" if isinstance(space, Tokens) else "autoencoder"]
        space.load_autoencoder(autoencoder.eval().coder, images)  # type: ignore[arg-type]
    callbacks = {
        "clock": TrainingClock(0, BATCH, Budget(steps=steps)),
        "rate": LearningRateScheduler(),
        "ema": EMA(0.9),
    }
    trainer = build_trainer(cfg, model, callbacks, [], folder)  # type: ignore[arg-type]
    trainer.fit(model, datamodule=data)
    assert callbacks["clock"].step == steps and trainer.world_size == world  # type: ignore[attr-defined]
    return model


def train_families(
    rank: int, world: int, steps: int, folder: Path, fault: Callable[[], None] | None
) -> dict[str, Tensor]:
    """Train every family in one of ``world`` processes. Return all weights and buffers."""
    if world > 1:
        os.environ["LOCAL_RANK"] = str(rank)  # Lightning uses the processes that exist
    if fault is not None:
        fault()
    trained: dict[str, TrainedModel] = {}
    for name in FAMILIES:
        trained[name] = fit(name, world, steps, folder, trained)
    return {f"{name}: {key}": value for name in FAMILIES for key, value in trained[name].state_dict().items()}


def differences(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the largest difference of each family, relative to the largest number of the same tensor."""
    assert one.keys() == two.keys()
    found = dict.fromkeys(FAMILIES, 0.0)
    for key, value in one.items():
        if value.numel():
            a, b = value.double(), two[key].double()
            name = key.partition(": ")[0]
            found[name] = max(found[name], float((a - b).abs().max() / a.abs().max().clamp(min=1e-3)))
    return found


def no_reduction() -> None:
    """Disable averaging gradients over processes, under automatic and manual optimisation."""
    manual_optimization.average_gradients = lambda parameters: None  # type: ignore[assignment]
    DDPStrategy._setup_model = lambda self, model: model  # type: ignore[method-assign,assignment]


def same_images() -> None:
    """Make all processes train on the images of the first one."""
    original = TrainStream.__init__

    def broken(self: TrainStream, data: Any, *, rank: int, **rest: Any) -> None:
        original(self, data, rank=0, **rest)

    TrainStream.__init__ = broken  # type: ignore[method-assign]


def trained(world: int, steps: int, folder: Path, fault: Callable[[], None] | None = None) -> list[dict[str, Tensor]]:
    for name in FAMILIES:
        config(name, world)  # the processes inherit the composed configs
    return in_processes(world, folder, train_families, steps, folder, fault, timeout=900)


@pytest.fixture(scope="module")
def weights_of_one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return trained(1, STEPS, tmp_path_factory.mktemp("one"))[0]


@needs_fork
def test_two_processes_train_the_same_weights_as_one(weights_of_one_process: dict[str, Tensor], tmp_path: Path) -> None:
    check_equal(weights_of_one_process, *trained(2, STEPS, tmp_path))


@needs_fork
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_train_the_same_weights_as_one_for_50_steps(tmp_path: Path) -> None:
    check_equal(*trained(1, 50, tmp_path), *trained(2, 50, tmp_path))


def check_equal(one: dict[str, Tensor], first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Check that two processes end with the weights ``first`` and ``second``, equal to those of one process."""
    between_ranks = differences(first, second)
    assert not any(between_ranks.values()), between_ranks
    from_one = differences(one, first)
    assert all(difference < TOLERANCE for difference in from_one.values()), from_one


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("fault", [no_reduction, same_images])
def test_the_comparison_finds_a_fault_in_every_family(
    fault: Callable[[], None], weights_of_one_process: dict[str, Tensor], tmp_path: Path
) -> None:
    wrong = differences(weights_of_one_process, trained(2, STEPS, tmp_path, fault)[0])
    assert all(difference > 100 * TOLERANCE for difference in wrong.values()), wrong
