"""Losses and penalties of GANs against closed forms: on scores, and on a quadratic whose gradient is known."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gencompare.errors import UserError
from gencompare.models.adversarial import Adversarial, Hinge, NonSaturating, Relativistic, Wasserstein
from gencompare.models.gan_penalties import R1, R2, CosineRamp, DiscriminatorStep, WassersteinGP
from gencompare.rng import RandomSource


def test_losses_are_those_of_the_papers() -> None:
    real, fake = torch.randn(20), torch.randn(20)
    ones, zeros = torch.ones(20), torch.zeros(20)
    entropy = partial(nn.functional.binary_cross_entropy_with_logits, reduction="none")
    game = NonSaturating()
    assert torch.allclose(game.discriminator(real, fake), entropy(real, ones) + entropy(fake, zeros), atol=1e-6)
    assert torch.allclose(game.generator(None, fake), entropy(fake, ones), atol=1e-6)
    two = Hinge().discriminator(torch.tensor([0.25, 2.0]), torch.tensor([-3.0, 0.5]))
    assert two.tolist() == [0.75, 1.5]
    assert Hinge().generator(None, torch.tensor([0.5, -2.0])).tolist() == [-0.5, 2.0]
    critic = Wasserstein()
    assert critic.discriminator(torch.tensor([0.25, 2.0]), torch.tensor([-3.0, 0.5])).tolist() == [-3.25, -1.5]
    assert critic.generator(None, torch.tensor([0.5, -2.0])).tolist() == [-0.5, 2.0]
    # Of a pair, which one is real? One is the other's mirror image.
    pairs = Relativistic()
    assert torch.allclose(pairs.discriminator(real, fake), entropy(real - fake, ones), atol=1e-6)
    assert torch.allclose(pairs.generator(real, fake), entropy(fake - real, ones), atol=1e-6)


@pytest.mark.parametrize("game", [Relativistic(), Wasserstein()])
def test_a_loss_of_pairs_depends_on_differences_alone(game: Adversarial) -> None:
    """Any constant may be added to both scores of a pair, another to each pair; the margin does not see it either."""
    real, fake = torch.randn(20, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    shift = 100 * torch.randn(20, dtype=torch.float64)
    for found in (game.discriminator, game.margin, *([game.generator] if game.pairs else [])):
        assert torch.allclose(found(real, fake), found(real + shift, fake + shift), atol=1e-10)
        assert not torch.allclose(found(real, fake), found(real + shift, fake), atol=1e-3)


def quadratic(n: int = 7, dim: int = 5) -> tuple[Tensor, DiscriminatorStep]:
    """D(x) = x'Ax / 2 with A symmetric, and a duel between points; gradients at x are Ax."""
    a = torch.randn(dim, dim, dtype=torch.float64)
    a = (a + a.T).requires_grad_()
    real, fake = (torch.randn(n, dim, 1, 1, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def score(x: Tensor) -> Tensor:
        x = x.flatten(1)
        return 0.5 * ((x @ a) * x).sum(1)

    return a, DiscriminatorStep(
        real, fake, score(real), score(fake), score, RandomSource.for_batch(torch.Generator().manual_seed(3), n)
    )


@pytest.mark.parametrize(("penalty", "where"), [(R1(2.0), "real"), (R2(2.0), "fake")])
def test_r1_and_r2_are_squared_gradients_and_can_be_trained_through(penalty: Any, where: str) -> None:
    """|grad_x D|^2 = |Ax|^2, and its gradient in A is 2 A x x'; half the weight is put before it."""
    a, duel = quadratic()
    x = getattr(duel, where).flatten(1)
    found = penalty(duel)
    assert torch.allclose(found, (x @ a).square().sum(1))
    # D depends on A through its symmetric part alone, and so does the penalty's gradient.
    (gradient,) = torch.autograd.grad(found.sum(), a)
    expected = 2 * a @ x.T @ x
    assert torch.allclose(gradient, (expected + expected.T) / 2)
    assert penalty.factor(torch.tensor(0)) == 1.0


def test_the_wasserstein_penalty_is_that_of_points_between_pairs() -> None:
    """(|Ax| - 1)^2 at x = u x_real + (1 - u) x_fake, and its gradient in A is 2 (|Ax| - 1) / |Ax| A x x'."""
    a, duel = quadratic()
    u = torch.rand(7, 1, generator=torch.Generator().manual_seed(3)).double()
    x = (u * duel.real.flatten(1) + (1 - u) * duel.fake.flatten(1)).detach()
    norm = (x @ a).norm(dim=1, keepdim=True)
    found = WassersteinGP(10.0)(duel)
    assert torch.allclose(found, (norm - 1).square().squeeze(1), atol=1e-9)
    (gradient,) = torch.autograd.grad(found.sum(), a)
    expected = a @ (2 * (norm - 1) / norm * x).T @ x
    assert torch.allclose(gradient, (expected + expected.T) / 2, atol=1e-9)
    assert WassersteinGP(10.0).factor(torch.tensor(0)) == 10.0


def test_a_discriminator_that_is_constant_has_a_penalty_with_a_gradient() -> None:
    """The root in the Wasserstein penalty has no derivative at nought, and must not give NaN."""
    a = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)

    def score(x: Tensor) -> Tensor:
        return ((x @ a) * x).sum(1)

    rng = RandomSource.for_batch(torch.Generator().manual_seed(0), 3)
    reshaped = x[:, :, None, None]
    duel = DiscriminatorStep(reshaped, reshaped, score(x), score(x), lambda images: score(images.flatten(1)), rng)
    found = WassersteinGP(1.0)(duel)
    assert torch.allclose(found, torch.ones(3, dtype=torch.float64), atol=1e-5)
    assert torch.autograd.grad(found.sum(), a)[0].isfinite().all()


def test_a_weight_can_change_with_the_images_seen() -> None:
    """Half-way along a cosine lies the mean; beyond its end nothing changes."""
    penalty = R1(CosineRamp(start=0.05, end=0.005, num_images=200))
    found = [float(penalty.factor(torch.tensor(seen))) for seen in (0, 50, 100, 200, 1000)]
    quarter = 0.05 - 0.045 * (1 - 0.5**0.5) / 2
    assert found == pytest.approx([0.025, quarter / 2, 0.01375, 0.0025, 0.0025])


@pytest.mark.parametrize("weight", [-1.0, CosineRamp(0.1, -0.1, 10)])
def test_a_penalty_that_rewards_is_refused(weight: Any) -> None:
    with pytest.raises(UserError, match=r"weight=-.* cannot be negative"):
        R1(weight)
    with pytest.raises(UserError, match="images=0"):
        CosineRamp(0.0, 1.0, 0)
