"""Discriminator augmentation: geometric and colour transforms, their derivatives, and their strength."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from composing import options
from gencompare import distributed
from gencompare.diffusion.augmentation import resample
from gencompare.errors import UserError
from gencompare.generative_model import DataSpec
from gencompare.models.adversarial import NonSaturating
from gencompare.models.discriminator_augmentation import (
    ADA,
    DiscriminatorAugmentation,
    ScheduledAugmentation,
    color_transform,
    sample_color_params,
)
from gencompare.models.gan import GAN
from gencompare.models.gan_penalties import R1, CosineRamp, squared_gradient
from gencompare.networks.gan_networks import MLPDiscriminator, MLPGenerator
from gencompare.rng import RandomSource, generator
from parts import part

GREY, RGB = DataSpec("grey", (1, 8, 8)), DataSpec("rgb", (3, 8, 8))
OPTIONS = options("model/discriminator_augmentation")


def images(n: int = 4, spec: DataSpec = RGB, dtype: torch.dtype = torch.float32) -> Tensor:
    x = 2 * torch.rand(n, *spec.shape, generator=torch.Generator().manual_seed(3), dtype=dtype) - 1
    return x * spec.mask().to(dtype) - (1 - spec.mask().to(dtype))


def rng(n: int, seed: int = 0) -> RandomSource:
    return RandomSource.for_batch(generator("cpu", seed), n)


def at(strength: float, option: str = "ada", spec: DataSpec = RGB, **changes: Any) -> DiscriminatorAugmentation:
    augmentation = part("discriminator_augmentation", option, **changes)(spec)
    augmentation.strength.fill_(strength)
    return augmentation


# Transforms


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("spec", [GREY, RGB, DataSpec("framed", (1, 8, 8), padding=2)], ids=lambda s: s.name)
def test_strength_zero_leaves_images_exactly_unchanged(option: str, spec: DataSpec) -> None:
    x = images(50, spec)
    assert torch.equal(at(0.0, option, spec)(x, rng(50)), x)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("spec", [GREY, RGB, DataSpec("framed", (1, 8, 8), padding=2)], ids=lambda s: s.name)
def test_images_change_stay_valid_and_are_independent(option: str, spec: DataSpec) -> None:
    augmentation, x = at(1.0, option, spec), images(400, spec)
    got = augmentation(x, rng(400))
    assert got.shape == x.shape and got.isfinite().all()
    assert (got - x).flatten(1).any(dim=1).float().mean() > 0.98
    assert (got * (1 - spec.mask()) == spec.mask() - 1).all(), "padding stays black"
    rest = RandomSource(generator("cpu", 0), 100, 400, 400)
    assert torch.allclose(augmentation(x[100:], rest), got[100:], atol=1e-5)


@pytest.mark.parametrize("strength", [0.1, 0.5])
def test_the_fraction_of_unchanged_images_follows_the_strength(strength: float) -> None:
    """Eight transforms have probability p. Two flips and the luma flip have probability p / 2."""
    n = 20_000
    x = images(1).expand(n, -1, -1, -1)
    got = at(strength)(x, rng(n))
    same = float((got == x).flatten(1).all(1).double().mean())
    # Scaling, rotation, anisotropic scaling, translation, brightness, contrast, hue, saturation; two flips, luma flip.
    expected = (1 - strength) ** 8 * (1 - strength / 2) ** 3
    assert abs(same - expected) < 4 * math.sqrt(expected * (1 - expected) / n)
    still = at(strength, color_multiplier=0.0)(x, rng(n))
    moved = float((still == x).flatten(1).all(1).double().mean())
    expected = (1 - strength) ** 4 * (1 - strength / 2) ** 2
    assert abs(moved - expected) < 4 * math.sqrt(expected * (1 - expected) / n)


def test_cutout_is_a_grey_square_of_half_the_side() -> None:
    spec = DataSpec("large", (1, 32, 32))
    augmentation = at(1.0, spec=spec, color_multiplier=0.0, cutout_multiplier=1.0)
    kept = augmentation._cutout_mask(torch.ones(2000, 1, 32, 32), rng(2000))
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    blank = 1 - kept[:, 0]
    rows, columns = blank.amax(2).sum(1), blank.amax(1).sum(1)
    assert torch.equal(blank.sum((1, 2)), rows * columns), "a rectangle"
    assert rows.max() == columns.max() == 16 and rows.min() >= 8, "half the image size, minus the part outside"
    # A central pixel is covered if the square's centre is within a quarter of the image size: probability 1 / 4.
    assert abs(float(blank[:, 15, 15].mean()) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 2000)


# Colour transforms against matrices


def by_matrix(x: Tensor, brightness: float, contrast: float, flip: float, hue: float, saturation: float) -> Tensor:
    """Apply the transforms as 3x3 matrices; the hue rotation is the exponential of the cross product with its axis."""
    v = torch.full((3, 1), 3**-0.5, dtype=torch.float64)
    i, vv = torch.eye(3, dtype=torch.float64), v @ v.T
    k = torch.tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]], dtype=torch.float64) / math.sqrt(3)
    linear = (vv + 2**saturation * (i - vv)) @ torch.matrix_exp(hue * k) @ (i - 2 * flip * vv) * 2**contrast
    return torch.einsum("ij,njhw->nihw", linear, x + brightness)


@pytest.mark.parametrize("values", [(0.3, 0, 0, 0, 0), (0, -0.7, 0, 0, 0), (0, 0, 1, 0, 0), (0, 0, 0, 2.1, 0),
                                    (0, 0, 0, 0, 1.3), (0.2, 0.4, 1, -0.8, -1.1)])  # fmt: skip
def test_colour_transforms_match_their_matrices(values: tuple[float, ...]) -> None:
    a = torch.tensor(values, dtype=torch.float64).expand(4, 5)
    x = images(4, RGB, torch.float64)
    assert torch.allclose(color_transform(x, a), by_matrix(x, *values), atol=1e-12)
    # A grey image has three equal channels, and hue and saturation do not change it.
    grey = x[:, :1]
    as_rgb = by_matrix(grey.expand(-1, 3, -1, -1), *values)
    assert torch.allclose(color_transform(grey, a), as_rgb[:, :1], atol=1e-12)


def test_a_hue_rotation_by_a_third_maps_red_to_green() -> None:
    red = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64).view(1, 3, 1, 1)
    turned = color_transform(red, torch.tensor([[0, 0, 0, 2 * math.pi / 3, 0]], dtype=torch.float64))
    assert torch.allclose(turned.flatten(), torch.tensor([0, 1, 0], dtype=torch.float64), atol=1e-12)


def test_colour_parameters_have_the_published_distributions() -> None:
    a = sample_color_params(rng(40_000), 0.5)
    done = (a != 0).double().mean(0)
    assert torch.allclose(done, torch.tensor([0.5, 0.5, 0.25, 0.5, 0.5], dtype=torch.float64), atol=0.012)
    stds = [float(a[:, k][a[:, k] != 0].std()) for k in range(5)]
    assert stds[0] == pytest.approx(0.2, rel=0.03) and stds[1] == pytest.approx(0.5, rel=0.03)
    assert stds[3] == pytest.approx(math.pi / math.sqrt(3), rel=0.03) and stds[4] == pytest.approx(1.0, rel=0.03)


# Derivatives


def test_derivatives_match_finite_differences() -> None:
    """First and second derivatives of the whole pipeline with respect to the image, at strength 1."""
    spec = DataSpec("x", (3, 4, 3))
    augmentation = at(1.0, spec=spec, cutout_multiplier=1.0).double()
    x = images(2, spec, torch.float64).requires_grad_()

    def shown(x: Tensor) -> Tensor:
        return augmentation(x, rng(2))

    assert torch.autograd.gradcheck(shown, x, atol=1e-6)
    assert torch.autograd.gradgradcheck(lambda x: shown(x).square(), x, atol=1e-5)


def test_resampling_matches_pytorch_and_its_transpose() -> None:
    x = images(2, dtype=torch.float64).requires_grad_()
    grid = 3 * torch.rand(2, 6, 7, 2, dtype=torch.float64) - 1.5
    got = resample(x, grid)
    how: dict[str, Any] = {"mode": "bicubic", "padding_mode": "reflection", "align_corners": True}
    assert torch.equal(got, torch.nn.functional.grid_sample(x, grid, **how))
    y = torch.randn_like(got)
    (back,) = torch.autograd.grad(got, x, y, create_graph=True)
    assert torch.allclose((got * y).sum(), (x * back).sum()), "<A x, y> = <x, A' y>"


def test_a_penalty_through_the_augmentation_has_the_right_gradient() -> None:
    """D(T x) = |T x|^2 / 2 with T linear (geometric transforms only) has the gradient T' T x, where T is built
    column by column."""
    augmentation = at(1.0, spec=DataSpec("x", (1, 4, 4)), color_multiplier=0.0).double()
    x = images(1, DataSpec("x", (1, 4, 4)), torch.float64).requires_grad_()
    basis = torch.eye(16, dtype=torch.float64).view(16, 1, 1, 4, 4)
    t = torch.stack([augmentation(e, rng(1)).flatten() for e in basis], dim=1)
    penalty = squared_gradient(0.5 * augmentation(x, rng(1)).square().flatten(1).sum(1), x)
    assert torch.allclose(penalty, (t.T @ t @ x.flatten()).square().sum(), atol=1e-10)
    (gradient,) = torch.autograd.grad(penalty.sum(), x)
    assert torch.allclose(gradient.flatten(), 2 * t.T @ t @ t.T @ t @ x.flatten(), atol=1e-9)


# Strength


@pytest.mark.parametrize(("share_right", "moves"), [(0.95, 1), (0.6, -1), (0.8, 0)])
def test_the_strength_follows_the_overfitting_heuristic(share_right: float, moves: int) -> None:
    """r_t is 2 times the fraction classified as real, minus 1. It is compared with the target 0.6 every fourth step,
    and each adjustment is four batches over 1000."""
    ada = ADA(RGB, target=0.6, interval=4, adjustment_images=1000)
    ada.strength.fill_(0.5)
    margin = torch.where(torch.arange(20) < 20 * share_right, 3.0, -0.1)
    found = []
    for _ in range(8):
        ada.update(margin, 20, torch.tensor(0))
        found.append(float(ada.strength))
    step = moves * 4 * 20 / 1000
    assert found == pytest.approx([0.5] * 3 + [0.5 + step] * 4 + [0.5 + 2 * step])


def test_the_strength_stays_in_range_and_its_state_is_saved() -> None:
    ada = ADA(RGB, interval=2, adjustment_images=40)
    for k in range(7):
        ada.update(torch.ones(10), 10, torch.tensor(0))
        if k == 0:  # in the middle of an interval
            other = ADA(RGB, interval=2, adjustment_images=40)
            other.load_state_dict(ada.state_dict())
        else:
            other.update(torch.ones(10), 10, torch.tensor(0))
        assert other.strength == ada.strength
    assert ada.strength == 1.0
    for _ in range(8):
        ada.update(-torch.ones(10), 10, torch.tensor(0))
    assert ada.strength == 0.0


@pytest.mark.parametrize(("elsewhere", "strength"), [(10.0, 0.6), (-10.0, 0.4)])
def test_the_heuristic_is_computed_on_the_global_batch(
    monkeypatch: pytest.MonkeyPatch, elsewhere: float, strength: float
) -> None:
    """Half of ten images are classified as real here, and either all or none of ten on another process, so r_t is 1/2
    or -1/2."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda value: value.add_(elsewhere))
    ada = ADA(RGB, target=0.4, interval=1, adjustment_images=200)
    ada.strength.fill_(0.5)
    ada.update(torch.tensor([1.0, -1.0]).repeat(5), 20, torch.tensor(0))
    assert float(ada.strength) == pytest.approx(strength)


def test_a_scheduled_strength_follows_its_ramp() -> None:
    augmentation = ScheduledAugmentation(RGB, ramp=CosineRamp(0.0, 0.6, 100))
    for seen, expected in ((0, 0.0), (50, 0.3), (100, 0.6), (500, 0.6)):
        augmentation.update(torch.ones(3), 3, torch.tensor(seen))
        assert float(augmentation.strength) == pytest.approx(expected)


# In the model


class Watched(MLPDiscriminator):
    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        self.__dict__.setdefault("seen", []).append(x.detach())
        return super().forward(x, label)


def gan(spec: DataSpec = RGB, **changes: Any) -> Any:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "generator": partial(MLPGenerator, width=8, depth=1),
        "discriminator": partial(Watched, width=64, depth=2),
        "adversarial": NonSaturating(),
        "discriminator_augmentation": partial(ADA, target=0.3, interval=1, adjustment_images=400),
        "optimizer": partial(torch.optim.Adam, lr=1e-3),
    }
    model = GAN(spec, **(settings | changes))
    optimizers = model.configure_optimizers()
    model.optimizers = lambda: optimizers  # type: ignore[method-assign,assignment]
    model.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign,assignment]
    return model


def test_real_images_and_fakes_are_augmented_and_samples_are_not() -> None:
    """All images and fakes are constant, so discriminator inputs differ only in their random augmentation."""
    steady = partial(ScheduledAugmentation, ramp=CosineRamp(0.9, 0.9, 1))
    model = gan(penalty={"r1": R1(1.0)}, discriminator_augmentation=steady)
    with torch.no_grad():
        for p in model.generator.parameters():
            p.zero_()  # fakes are constant grey
    model.rng = rng(300)
    model.training_step((torch.zeros(300, *RGB.shape), {}), 0)
    real, fake, for_generator = model.discriminator.seen[:3]
    shares = [float((shown != 0).flatten(1).any(1).double().mean()) for shown in (real, fake, for_generator)]
    # A constant grey image changes if and only if its brightness does, which has probability 0.9.
    assert all(abs(share - 0.9) < 0.08 for share in shares), shares
    assert not torch.equal(real, fake), "each image has its own random parameters"
    with torch.no_grad():
        for p in model.generator.parameters():
            p.zero_()
    assert torch.equal(model.eval().sample(5, generator=generator("cpu", 0)), torch.zeros(5, *RGB.shape))


def test_overfitting_of_the_discriminator_raises_the_strength() -> None:
    """With eight images and a weak generator, D overfits and the strength rises. If fakes equal the real images, D
    cannot overfit, and the strength stays near zero."""
    x = images(8)
    sure = gan(optimizer=partial(torch.optim.Adam, lr=3e-3))
    lost = gan(generator=lambda *_: Copies(x))
    for model in (sure, lost):
        for step in range(40):
            model.rng = rng(8, step)
            metrics = model.training_step((x, {}), step)
        assert metrics["augmentation"] == model.augmentation.strength
    assert sure.augmentation.strength > 0.2 and lost.augmentation.strength < 0.1


class Copies(torch.nn.Module):
    """A generator that returns the given images; its parameter has no effect."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x, self.weight = x, torch.nn.Parameter(torch.zeros(()))

    def forward(self, z: Tensor, label: Tensor | None) -> Tensor:
        return self.x[: len(z)] + 0 * self.weight


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ADA(RGB, target=1.0), r"target=1\.0 must be between"),
        (lambda: ADA(RGB, interval=0), "interval=0"),
        (lambda: ADA(RGB, color_multiplier=1.5), r"color_multiplier=1\.5 must be in \[0, 1\]"),
        (lambda: ADA(DataSpec("points", (2, 1, 1))), "at least 2x2 pixels"),
        (lambda: ADA(DataSpec("two", (2, 8, 8))), "2 channels are neither greyscale nor RGB"),
        (lambda: ScheduledAugmentation(RGB, ramp=CosineRamp(0.0, 1.2, 10)), r"end=1\.2 must be in \[0, 1\]"),
    ],
)
def test_invalid_settings_raise_an_error(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
