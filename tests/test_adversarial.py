"""GAN losses and penalties against closed forms, on scores and on a quadratic discriminator."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gencompare.errors import UserError
from gencompare.models.adversarial import AdversarialLoss, Hinge, NonSaturating, Relativistic, Wasserstein
from gencompare.models.gan_penalties import R1, R2, CosineRamp, DiscriminatorStep, WassersteinGP
from gencompare.rng import RandomSource


def test_losses_match_the_papers() -> None:
    real, fake = torch.randn(20), torch.randn(20)
    ones, zeros = torch.ones(20), torch.zeros(20)
    entropy = partial(nn.functional.binary_cross_entropy_with_logits, reduction="none")
    loss_fn = NonSaturating()
    assert torch.allclose(loss_fn.discriminator_loss(real, fake), entropy(real, ones) + entropy(fake, zeros), atol=1e-6)
    assert torch.allclose(loss_fn.generator_loss(None, fake), entropy(fake, ones), atol=1e-6)
    two = Hinge().discriminator_loss(torch.tensor([0.25, 2.0]), torch.tensor([-3.0, 0.5]))
    assert two.tolist() == [0.75, 1.5]
    assert Hinge().generator_loss(None, torch.tensor([0.5, -2.0])).tolist() == [-0.5, 2.0]
    critic = Wasserstein()
    assert critic.discriminator_loss(torch.tensor([0.25, 2.0]), torch.tensor([-3.0, 0.5])).tolist() == [-3.25, -1.5]
    assert critic.generator_loss(None, torch.tensor([0.5, -2.0])).tolist() == [-0.5, 2.0]
    # Both losses are cross-entropies for the question which image of a pair is real, so they are symmetric.
    pairs = Relativistic()
    assert torch.allclose(pairs.discriminator_loss(real, fake), entropy(real - fake, ones), atol=1e-6)
    assert torch.allclose(pairs.generator_loss(real, fake), entropy(fake - real, ones), atol=1e-6)


@pytest.mark.parametrize("loss", [Relativistic(), Wasserstein()])
def test_pairwise_losses_depend_on_score_differences_only(loss: AdversarialLoss) -> None:
    """Adding a constant to both scores of a pair, different for each pair, changes neither the losses nor the
    margin."""
    real, fake = torch.randn(20, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    shift = 100 * torch.randn(20, dtype=torch.float64)
    for function in (loss.discriminator_loss, loss.margin, *([loss.generator_loss] if loss.needs_real_scores else [])):
        assert torch.allclose(function(real, fake), function(real + shift, fake + shift), atol=1e-10)
        assert not torch.allclose(function(real, fake), function(real + shift, fake), atol=1e-3)


def quadratic(n: int = 7, dim: int = 5) -> tuple[Tensor, DiscriminatorStep]:
    """Return the symmetric matrix A of D(x) = x'Ax / 2, whose gradient at x is Ax, and a `DiscriminatorStep` of D."""
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
def test_r1_and_r2_are_differentiable_squared_gradients(penalty: Any, where: str) -> None:
    """|grad_x D|^2 is |Ax|^2, whose gradient in A is 2 A x x'. The penalty multiplies both by half the weight."""
    a, step = quadratic()
    x = getattr(step, where).flatten(1)
    found = penalty(step)
    assert torch.allclose(found, (x @ a).square().sum(1))
    # D depends only on the symmetric part of A, and so does the gradient of the penalty.
    (gradient,) = torch.autograd.grad(found.sum(), a)
    expected = 2 * a @ x.T @ x
    assert torch.allclose(gradient, (expected + expected.T) / 2)
    assert penalty.factor(torch.tensor(0)) == 1.0


def test_the_wasserstein_penalty_is_taken_between_pairs() -> None:
    """The penalty is (|Ax| - 1)^2 at x = u x_real + (1 - u) x_fake. Its gradient in A is 2 (|Ax| - 1) / |Ax| A x x'."""
    a, step = quadratic()
    u = torch.rand(7, 1, generator=torch.Generator().manual_seed(3)).double()
    x = (u * step.real.flatten(1) + (1 - u) * step.fake.flatten(1)).detach()
    norm = (x @ a).norm(dim=1, keepdim=True)
    found = WassersteinGP(10.0)(step)
    assert torch.allclose(found, (norm - 1).square().squeeze(1), atol=1e-9)
    (gradient,) = torch.autograd.grad(found.sum(), a)
    expected = a @ (2 * (norm - 1) / norm * x).T @ x
    assert torch.allclose(gradient, (expected + expected.T) / 2, atol=1e-9)
    assert WassersteinGP(10.0).factor(torch.tensor(0)) == 10.0


def test_the_penalty_of_a_constant_discriminator_has_a_finite_gradient() -> None:
    """The square root in the Wasserstein penalty has no derivative at zero, but the gradient must not be NaN."""
    a = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)

    def score(x: Tensor) -> Tensor:
        return ((x @ a) * x).sum(1)

    rng = RandomSource.for_batch(torch.Generator().manual_seed(0), 3)
    reshaped = x[:, :, None, None]
    step = DiscriminatorStep(reshaped, reshaped, score(x), score(x), lambda images: score(images.flatten(1)), rng)
    found = WassersteinGP(1.0)(step)
    assert torch.allclose(found, torch.ones(3, dtype=torch.float64), atol=1e-5)
    assert torch.autograd.grad(found.sum(), a)[0].isfinite().all()


def test_penalty_weights_can_follow_a_cosine_ramp() -> None:
    """The weight is the mean of both ends halfway along the ramp, and constant after its end."""
    penalty = R1(CosineRamp(start=0.05, end=0.005, num_images=200))
    found = [float(penalty.factor(torch.tensor(seen))) for seen in (0, 50, 100, 200, 1000)]
    quarter = 0.05 - 0.045 * (1 - 0.5**0.5) / 2
    assert found == pytest.approx([0.025, quarter / 2, 0.01375, 0.0025, 0.0025])


@pytest.mark.parametrize("weight", [-1.0, CosineRamp(0.1, -0.1, 10)])
def test_a_negative_penalty_weight_raises_an_error(weight: Any) -> None:
    with pytest.raises(UserError, match=r"weight=-.*at least 0"):
        R1(weight)
    with pytest.raises(UserError, match="images=0"):
        CosineRamp(0.0, 1.0, 0)
