"""NCSN's RefineNet: formulas of its normalisation and blocks, and its use of the noise level."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.diffusion.parameterizations import LevelIndexConditioning, LogSNRConditioning, Score
from gencompare.errors import UserError
from gencompare.generative_model import DataSpec
from gencompare.models.diffusion import Diffusion
from gencompare.networks.layers import InstanceNormPlus, NoNorm
from gencompare.networks.refinenet import (
    ChainedPooling,
    DilatedBlock,
    Fusion,
    RefineBlock,
    RefineNet,
    ResidualConvUnits,
)
from gencompare.rng import RandomSource, generator
from parts import part


def randomized(net: nn.Module) -> Any:
    """Give the network random weights, because some are zero at initialisation."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(std=0.2)
    return net.double().eval()


def features(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


# Normalisation


def test_normalisation_formula_with_parameters_per_level() -> None:
    norm = randomized(InstanceNormPlus(5, num_levels=3))
    h = features(4, 5, 4, 6) + 3 * features(4, 5, 1, 1)
    level = [2, 0, 0, 1]
    got = norm(h, torch.eye(3, dtype=torch.float64)[level])
    for i, x in enumerate(h.numpy()):
        gamma, alpha, beta = norm.level.weight.detach()[:, level[i]].view(3, 5).numpy()
        mu, var = x.mean((1, 2)), x.var((1, 2))
        spread = (mu - mu.mean()) / np.sqrt(mu.var(ddof=1) + 1e-5)
        expected = (x - mu[:, None, None]) / np.sqrt(var + 1e-5)[:, None, None] * gamma[:, None, None]
        expected += (alpha * spread + beta)[:, None, None]
        assert np.allclose(got[i].detach().numpy(), expected, atol=1e-10)


def test_normalisation_keeps_differences_between_channel_means() -> None:
    norm, one = InstanceNormPlus(4).double(), torch.ones(2, 1, dtype=torch.float64)
    h = features(2, 4, 5, 5)
    assert torch.allclose(norm(h + 7, one), norm(h, one), atol=1e-8)
    assert torch.allclose(norm(100 * h, one), norm(h, one), atol=1e-2)
    shifted = h + torch.tensor([1.0, 0.0, 0.0, -1.0], dtype=torch.float64).view(4, 1, 1)
    assert (norm(shifted, one) - norm(h, one)).abs().amax((0, 2, 3))[0] > 0.1


def test_normalisation_parameters_at_initialisation() -> None:
    weight = InstanceNormPlus(500, num_levels=20).level.weight.detach()
    gamma, alpha, beta = weight.view(3, 500, 20)
    for values in (gamma, alpha):
        assert float((values - 1).std()) == pytest.approx(0.02, rel=0.05) and abs(float(values.mean()) - 1) < 1e-3
    assert not beta.any()


# Blocks


@pytest.mark.parametrize(
    ("first_of_stage", "downsample", "dilation"), [(False, False, 1), (True, True, 1), (True, False, 2)]
)
def test_dilated_block_formula(first_of_stage: bool, downsample: bool, dilation: int) -> None:
    width = 6 if downsample else 4
    options: Any = {"dilation": dilation, "first_of_stage": first_of_stage, "downsample": downsample}
    block = randomized(DilatedBlock(4, width, InstanceNormPlus, **options))
    h, one = features(2, 4, 8, 8), torch.ones(2, 1, dtype=torch.float64)

    def conv(x: Tensor, layer: nn.Conv2d, d: int) -> Tensor:
        return F.conv2d(x, layer.weight, layer.bias, padding=d * (layer.kernel_size[0] // 2), dilation=d)

    r = conv(F.elu(block.norm1(h, one)), block.conv1, dilation)
    r = conv(F.elu(block.norm2(r, one)), block.conv2, dilation)
    expected = r + (conv(h, block.shortcut, 1 if downsample else dilation) if first_of_stage else h)
    if downsample:
        expected = expected.unflatten(2, (4, 2)).unflatten(4, (4, 2)).mean((3, 5))
    assert torch.allclose(block(h, one), expected, atol=1e-10)


def test_refine_block_formula() -> None:
    block = randomized(RefineBlock([6, 4], 4, lambda _: NoNorm(), F.max_pool2d, num_output_units=3))
    fine, coarse, c = features(2, 6, 8, 8), features(2, 4, 4, 4), torch.ones(2, 1, dtype=torch.float64)

    def conv(x: Tensor, layer: Any) -> Tensor:
        return F.conv2d(x, layer.weight, layer.bias, padding=1)

    def units(h: Tensor, layer: Any) -> Tensor:
        for first, second in zip(layer.convs[::2], layer.convs[1::2], strict=True):
            h = h + conv(F.elu(conv(F.elu(h), first)), second)
        return h

    assert [len(layer.convs) // 2 for layer in (*block.adapt, block.last)] == [2, 2, 3]
    a, b = units(fine, block.adapt[0]), units(coarse, block.adapt[1])
    b = F.interpolate(conv(b, block.fuse.convs[1]), size=(8, 8), mode="bilinear", align_corners=True)
    g = F.elu(conv(a, block.fuse.convs[0]) + b)
    one = conv(F.max_pool2d(g, 5, 1, 2), block.pool.convs[0])
    two = conv(F.max_pool2d(one, 5, 1, 2), block.pool.convs[1])
    assert torch.allclose(block([fine, coarse], c), units(g + one + two, block.last), atol=1e-10)


@pytest.mark.parametrize(
    "layer",
    [
        ResidualConvUnits(4, 2, lambda channels: InstanceNormPlus(channels, num_levels=3)),
        ChainedPooling(4, lambda channels: InstanceNormPlus(channels, num_levels=3), F.avg_pool2d),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_every_convolution_is_preceded_by_a_normalisation(layer: Any) -> None:
    assert len(layer.norms) == len(layer.convs)
    c, h = torch.eye(3, dtype=torch.float64)[[0, 2]], features(2, 4, 6, 6)
    before = randomized(layer)(h, c)
    for norm in layer.norms:
        with torch.no_grad():
            norm.level.weight[:, 2] += 0.5
        after = layer(h, c)
        assert torch.equal(after[0], before[0]) and not torch.allclose(after[1], before[1], atol=1e-3)
        before = after


def test_fusion_at_equal_resolutions_is_a_sum() -> None:
    fusion = randomized(Fusion([3, 5], 4, lambda _: NoNorm()))
    a, b, c = features(1, 3, 4, 4), features(1, 5, 4, 4), torch.ones(1, 1, dtype=torch.float64)
    assert torch.allclose(fusion([a, b], c), fusion.convs[0](a) + fusion.convs[1](b), atol=1e-10)


# The whole network


def net(**changes: Any) -> Any:
    return randomized(RefineNet((1, 8, 8), 1, channels=8, **changes))


def test_one_level_ignores_noise_and_has_unnormalised_refine_blocks() -> None:
    several, one = net(num_levels=5), net()
    assert any(isinstance(m, InstanceNormPlus) for m in several.refine.modules())
    assert not any(isinstance(m, InstanceNormPlus) for m in one.refine.modules())
    x = features(2, 1, 8, 8)
    assert torch.equal(one(x, torch.tensor([0.0, 3.0]).double(), {}), one(x, torch.tensor([-8.0, 1e9]).double(), {}))
    assert not torch.allclose(several(x, torch.zeros(2).double(), {}), several(x, torch.ones(2).double(), {}))


def test_each_level_has_its_own_parameters() -> None:
    """Training on level 2 does not change the normalisation parameters of other levels."""
    several = net(num_levels=5)
    several(features(3, 1, 8, 8), torch.full((3,), 2.0).double(), {}).square().sum().backward()
    for norm in (m for m in several.modules() if isinstance(m, InstanceNormPlus)):
        changed = norm.level.weight.grad.any(dim=0)  # type: ignore[union-attr]
        assert changed.tolist() == [False, False, True, False, False]


@pytest.mark.parametrize(
    ("shape", "changes", "message"),
    [
        ((1, 7, 8), {}, "impossible for 7x8"),
        ((1, 2, 2), {}, "impossible for 2x2"),
        ((1, 8, 8), {"num_levels": 0}, "num_levels=0"),
        ((1, 8, 8), {"channels": 1}, "channels=1"),
    ],
)
def test_invalid_sizes_are_errors(shape: Any, changes: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RefineNet(shape, 1, **changes)


# In a diffusion model


def model(num_levels: int, schedule: str, noise_conditioning: Any, **changes: Any) -> Diffusion:
    return Diffusion(
        DataSpec(name="x", shape=(1, 8, 8), num_classes=3),
        network=lambda **k: RefineNet(**k, channels=4, num_levels=num_levels),
        schedule=part("schedule", schedule),
        parameterization=Score(noise_conditioning=noise_conditioning),
        objective=part("objective", "simple"),
        sampler=part("sampler", "euler", num_steps=3),
        clip_x0=False,
        **changes,
    )


@pytest.mark.parametrize(
    ("num_levels", "schedule", "noise_conditioning", "message"),
    [
        (10, "ve", LogSNRConditioning(), "VE is a continuous-time schedule, and the noise conditioning is LogSNR"),
        (10, "ncsn", LogSNRConditioning(), "GeometricSigmas has 10 levels, and the noise conditioning is LogSNR"),
        (
            7,
            "ncsn",
            LevelIndexConditioning(),
            "parameters for 7 noise levels.*schedule of 7 levels.*GeometricSigmas has 10",
        ),
    ],
)
def test_network_and_schedule_must_have_equal_numbers_of_levels(
    num_levels: int, schedule: str, noise_conditioning: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        model(num_levels, schedule, noise_conditioning)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("num_levels", "schedule", "noise_conditioning"),
    [(10, "ncsn", LevelIndexConditioning()), (1, "ve", LogSNRConditioning())],
)
@pytest.mark.parametrize("conditional", [False, True])
def test_losses_and_samples(num_levels: int, schedule: str, noise_conditioning: Any, conditional: bool) -> None:
    torch.manual_seed(0)
    diffusion = model(num_levels, schedule, noise_conditioning, conditional=conditional)
    cond = {"label": torch.tensor([0, 1, 2, 0])} if conditional else {}
    loss = diffusion.losses(torch.zeros(4, 1, 8, 8), cond, RandomSource.for_batch(generator("cpu", 0), 4))["loss"]
    # The network outputs zero at initialisation, so the error is the noise itself: 1 per pixel.
    assert loss.shape == (4,) and float(loss.detach().mean()) == pytest.approx(1, abs=0.4)
    assert diffusion.sample(4, cond, generator=generator("cpu", 0)).isfinite().all()
