"""Patch training: crops see the noise of whole images, with the coordinates of their pixels."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import assert_same_training
from composing import compose
from gencompare.diffusion.patches import RandomPatches, crop
from gencompare.errors import UserError
from gencompare.generative_model import DataSpec
from gencompare.models.diffusion import Diffusion
from gencompare.networks.conditioning import pixel_coordinates
from gencompare.rng import RandomSource, generator
from gencompare.tasks.export import write_pipeline
from gencompare.tasks.runs.build import build_callbacks, build_data, build_model, build_trainer
from parts import part
from test_augmentation import UNET, Watches, images, rng, shaken

HALVES = RandomPatches(full_image_prob=0.0, divisors=(2,), weights=(1.0,))
WHOLE = RandomPatches(full_image_prob=1.0)


def model(network: Any = Watches, shape: tuple[int, int, int] = (1, 8, 8), **changes: Any) -> Diffusion:
    torch.manual_seed(0)
    parts: dict[str, Any] = {
        "schedule": part("schedule", "rectified"),
        "parameterization": part("parameterization", "velocity"),
        "objective": part("objective", "flow"),
        "sampler": part("sampler", "euler", num_steps=2),
    }
    return Diffusion(DataSpec(name="x", shape=shape), network=network, clip_x0=False, **(parts | changes))


class AnySize(Watches):
    size_multiple = 1


def source(seed: int, n: int) -> RandomSource:
    return RandomSource.for_batch(generator("cpu", seed), n)


def test_each_crop_is_the_part_of_its_image_at_its_coordinates() -> None:
    """The pixels of these images are their own coordinates."""
    grid = pixel_coordinates(8, 12, like=torch.zeros(())).expand(50, -1, -1, -1)
    assert grid[0, :, 0, 0].tolist() == [-1, -1] and grid[0, :, 0, -1].tolist() == [1, -1]
    top, left = torch.arange(50) % 5, torch.arange(50) % 7
    crops = crop(grid, top, left, 4, 6)
    for i in range(50):
        assert torch.equal(crops[i], grid[i, :, int(top[i]) : int(top[i]) + 4, int(left[i]) : int(left[i]) + 6])

    diffusion = model(AnySize, (2, 8, 12), patches=HALVES, objective=part("objective", "simple"),
                      parameterization=part("parameterization", "eps"),
                      schedule=part("schedule", "karras", sigma_min=1e-6, sigma_max=2e-6),
                      sampler=part("sampler", "heun", num_steps=2))  # fmt: skip
    diffusion.losses(grid, {}, rng(50))
    net: Any = diffusion.network
    shown, cond = net.seen[-1]
    assert shown.shape == (50, 2, 4, 6) and torch.allclose(shown, cond["coordinates"], atol=1e-4)


def test_every_position_is_equally_likely() -> None:
    n = 9000
    index = torch.arange(16.0).view(1, 1, 4, 4).expand(n, -1, -1, -1)
    corners = HALVES(index, 2, source(0, n))[:, 0, 0, 0].long()
    counts = torch.bincount(corners, minlength=16)
    assert (counts > 0).nonzero().flatten().tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert ((counts[counts > 0] / n - 1 / 9).abs() < 5 * (8 / 81 / n) ** 0.5).all()


def test_the_sizes_have_the_probabilities_of_the_paper() -> None:
    n = 4000
    divisors = [RandomPatches().draw_divisor(source(seed, 3)) for seed in range(n)]
    for divisor, p in ((1, 0.5), (2, 0.3), (4, 0.2)):
        assert abs(divisors.count(divisor) / n - p) < 5 * (p * (1 - p) / n) ** 0.5


def test_whole_images_give_the_losses_of_plain_training_with_coordinates() -> None:
    with_patches = shaken(model(UNET, patches=WHOLE))
    plain = shaken(model(partial(UNET, coordinate_channels=2)))
    x = images(6, (1, 8, 8))
    expected = plain.losses(x, {}, rng(6))["loss"]
    assert torch.equal(with_patches.losses(x, {}, rng(6))["loss"], expected)
    assert torch.equal(with_patches.eval().losses(x, {}, rng(6))["loss"], expected)
    assert torch.equal(
        with_patches.sample(3, generator=generator("cpu", 2)), plain.eval().sample(3, generator=generator("cpu", 2))
    )


def test_coordinates_tell_positions_apart() -> None:
    net = shaken(model(UNET, patches=WHOLE)).network
    x, t = images(1, (1, 8, 8)), torch.zeros(1)
    moved = pixel_coordinates(8, 8, like=x)[None] + 0.5
    assert not torch.allclose(net(x, t, {}), net(x, t, {"coordinates": moved}), atol=1e-3)


def test_the_loss_per_pixel_of_crops_is_that_of_whole_images() -> None:
    """The network predicts 0, so its loss is a fixed function of image and noise. Crops have the same pixels as whole
    images, since the images are periodic with the period of the crops."""
    x = images(2, (1, 4, 4)).repeat(1000, 1, 2, 2)
    losses = {}
    for name, patches in (("crops", HALVES), ("whole", WHOLE)):
        diffusion = model(AnySize, patches=patches)
        losses[name] = diffusion.losses(x, {}, source(3, len(x)))["loss"].detach().double()
    error = sum(float(values.var()) / len(x) for values in losses.values()) ** 0.5
    assert abs(float(losses["crops"].mean() - losses["whole"].mean())) < 4 * error
    assert error < 0.02 * float(losses["whole"].mean()), "the test would see a wrong scale of the noise"


def test_losses_do_not_depend_on_the_number_of_processes() -> None:
    diffusion, x = shaken(model(UNET, patches=HALVES)), images(8, (1, 8, 8))
    whole = diffusion.losses(x, {}, rng(8))["loss"]
    halves = [diffusion.losses(x[i : i + 4], {}, rng(8, i, i + 4))["loss"] for i in (0, 4)]
    assert torch.allclose(whole, torch.cat(halves), rtol=1e-4)


OVERRIDES = (
    "model=flow", "model/patches=random", "model.patches.divisors=[2]", "model.patches.weights=[1]", "data=digits",
    "model.network.channels=8", "model.network.num_groups=4", "trainer=cpu", "trainer.global_batch_size=8",
    "budget.images=null", "callbacks.evaluation.num_evaluations=0", "callbacks.progress_bar=null",
)  # fmt: skip


def train(folder: Path, steps: int, resumed: Path | None = None, *overrides: str) -> Any:
    cfg = compose(*OVERRIDES, f"budget.steps={steps}", *overrides)
    data = build_data(cfg)
    diffusion = build_model(cfg, data)
    callbacks = build_callbacks(cfg, diffusion, data, None, folder)
    trainer = build_trainer(cfg, diffusion, callbacks, [], folder)
    trainer.fit(diffusion, datamodule=data, ckpt_path=resumed, weights_only=True if resumed else None)
    return callbacks


def test_a_resumed_run_equals_an_uninterrupted_one_and_crops_cost_less(tmp_path: Path) -> None:
    schedule = "model.lr_schedule=null"
    whole = train(tmp_path / "whole", 6, None, schedule)
    train(tmp_path / "half", 3, None, schedule)
    resumed = train(tmp_path / "resumed", 6, tmp_path / "half" / "checkpoints" / "last.ckpt", schedule)
    assert_same_training(tmp_path / "whole", tmp_path / "resumed")
    assert whole["clock"].flops == resumed["clock"].flops
    kinds = whole["flops"].per_image
    assert kinds.keys() == {"", "crops of 1/2"} and 0.2 < kinds["crops of 1/2"] / kinds[""] < 0.4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"divisors": (2, 4), "weights": (1.0,)},
            r"one weight for each divisor.*divisors=\[2, 4\] and weights=\[1.0\]",
        ),
        ({"divisors": (1,), "weights": (1.0,)}, r"model\.patches\.divisors=1 must be a whole number of at least 2"),
        ({"weights": (1.0, 0.0)}, r"model\.patches\.weights=0.0 must be a positive number"),
        ({"full_image_prob": 1.5}, r"model\.patches\.full_image_prob=1.5 must be in \[0, 1\]"),
    ],
)
def test_invalid_settings_are_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RandomPatches(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": part("network", "mlp")}, r"DenoisingMLP takes only whole images: use model/network=unet"),
        ({"network": part("network", "dit")}, r"DiT takes only whole images"),
        ({"patches": RandomPatches(divisors=(8,), weights=(1.0,))}, r"8x8 images divided by 8 give no crops.*of 2"),
        ({"objective": part("objective", "ot_flow")}, r"MinibatchOT pairs whole images.*use model/objective=flow"),
        (
            {"objective": part("objective", "vlb")},
            r"ContinuousVLB is a loss of whole images.*objective=simple",
        ),
    ],
)
def test_parts_that_cannot_train_on_crops_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        model(**({"network": UNET, "patches": HALVES} | changes))
    with pytest.raises(UserError, match=r"not their low-resolution images: use model/patches=null"):
        Diffusion(
            DataSpec(name="x", shape=(1, 8, 8), conditions={"low_res": (1, 4, 4)}), network=UNET, patches=HALVES,
            schedule=part("schedule", "rectified"), parameterization=part("parameterization", "velocity"),
            objective=part("objective", "flow"), sampler=part("sampler", "euler"),
        )  # fmt: skip


def test_export_to_diffusers_refuses_coordinates(tmp_path: Path) -> None:
    patches = "model/patches=random", "model.patches.divisors=[2]", "model.patches.weights=[1]"
    cfg = compose("model=ddpm", "data=digits", *patches)
    with pytest.raises(UserError, match=r"takes only the noisy image.*coordinates from model/patches\): omit format"):
        write_pipeline(cfg, build_model(cfg, build_data(cfg)), tmp_path)
