"""Laws of the VAE: pixel likelihoods that are probabilities, a bound that is one, and what its options change."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from gencompare.contract import DataSpec
from gencompare.data.digits import Digits
from gencompare.errors import UserError
from gencompare.models.likelihoods import DiscretizedLogistic, Gaussian, PixelLikelihood
from gencompare.models.vae import VAE, kl_from_standard_normal
from gencompare.networks.convnets import ResNetDecoder, ResNetEncoder
from gencompare.networks.mlp import MLPDecoder, MLPEncoder
from gencompare.seeds import Draws

PIXEL = DataSpec("pixel", (1, 1, 1), num_levels=17)
LOCATIONS = [-3.0, -1.0, -0.96, 0.0, 0.21, 1.0, 1.7]
LOG_SCALES = [-12.0, -4.0, -2.0, 0.0, 2.0]


def levels_of(levels: int) -> Tensor:
    return torch.arange(levels) * 2 / (levels - 1) - 1


def logistic_at(levels: int, location: float, log_scale: float) -> tuple[PixelLikelihood, Tensor, Any]:
    """The likelihood of one pixel, the decoder's output that asks for these parameters, and the distribution."""
    lowest = math.log(2 / (levels - 1)) - 2.15
    kept = max(log_scale, lowest + 0.01)
    raw = lowest + math.log(math.expm1(kept - lowest))
    h = torch.tensor([location, raw]).reshape(1, 2, 1, 1)
    return (
        DiscretizedLogistic(DataSpec("pixel", (1, 1, 1), num_levels=levels)),
        h,
        stats.logistic(location, math.exp(kept)),
    )


def gaussian_at(levels: int, location: float, log_scale: float) -> tuple[PixelLikelihood, Tensor, Any]:
    likelihood = Gaussian(DataSpec("pixel", (1, 1, 1), num_levels=levels))
    likelihood.weight.data.fill_(max(log_scale, -9) / likelihood.GAIN)
    return likelihood, torch.full((1, 1, 1, 1), location), stats.norm(location, math.exp(max(log_scale, -9)))


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("make", [logistic_at, gaussian_at])
def test_pixel_probabilities_sum_to_one_and_are_the_mass_of_bins(make: Callable[..., Any], levels: int) -> None:
    x, delta = levels_of(levels), 2 / (levels - 1)
    for location in LOCATIONS:
        for log_scale in LOG_SCALES:
            likelihood, h, distribution = make(levels, location, log_scale)
            log_p = likelihood.log_prob(h.expand(levels, -1, -1, -1), x.reshape(-1, 1, 1, 1)).detach().double()
            # Single precision places an edge to about 1e-7, which a narrow distribution magnifies.
            rounding = 2e-6 + 1e-7 / distribution.std()
            assert log_p.exp().sum() == pytest.approx(1, abs=2 * rounding), (location, log_scale)
            edges = torch.cat([torch.tensor([-math.inf]), x[:-1] + delta / 2, torch.tensor([math.inf])]).double()
            mass = torch.tensor(distribution.cdf(edges[1:]) - distribution.cdf(edges[:-1]))
            assert torch.allclose(log_p.exp(), mass, atol=rounding), (location, log_scale)


@pytest.mark.parametrize("make", [logistic_at, gaussian_at])
def test_improbable_pixels_keep_a_finite_logarithm_and_a_gradient(make: Callable[..., Any]) -> None:
    for location in LOCATIONS:
        for log_scale in LOG_SCALES[1:]:
            likelihood, h, _ = make(17, location, log_scale)
            h = h.expand(17, -1, -1, -1).clone().requires_grad_()
            log_p = likelihood.log_prob(h, levels_of(17).reshape(-1, 1, 1, 1))
            log_p.sum().backward()
            assert torch.isfinite(log_p).all() and torch.isfinite(h.grad).all()
    # Far below the location the logarithm falls with slope 1 / scale: 3 units at scale 0.05 are 60 nats.
    likelihood, h, _ = logistic_at(17, 3.0, math.log(0.05))
    two = likelihood.log_prob(h.expand(2, -1, -1, -1), torch.tensor([-0.5, 0.5]).reshape(2, 1, 1, 1))
    assert (two[1] - two[0]).item() == pytest.approx(20, abs=1e-3)


@pytest.mark.parametrize("make", [logistic_at, gaussian_at])
def test_drawn_pixels_have_the_probabilities_and_the_mean_that_are_claimed(make: Callable[..., Any]) -> None:
    n, x = 20_000, levels_of(17)
    for location, log_scale in [(0.3, -2.0), (-0.9, -1.5), (1.2, -1.0)]:
        likelihood, h, _ = make(17, location, log_scale)
        log_p = likelihood.log_prob(h.expand(17, -1, -1, -1), x.reshape(-1, 1, 1, 1))
        drawn = likelihood.sample(h.expand(n, -1, -1, -1), torch.Generator().manual_seed(0)).flatten()
        counts = torch.bincount(((drawn + 1) * 8).round().long(), minlength=17)
        error = (counts / n - log_p.exp()).abs()
        assert (error < 5 * (log_p.exp() / n).sqrt() + 1e-3).all()
        if make is logistic_at:
            assert likelihood.mean(h).item() == pytest.approx((log_p.exp() * x).sum().item(), abs=1 / 16)


def test_a_gaussian_on_continuous_data_is_a_density() -> None:
    likelihood = Gaussian(DataSpec("points", (2, 1, 1), num_levels=None))
    likelihood.weight.data.fill_(-0.07)
    h, x = torch.randn(5, 2, 1, 1), torch.randn(5, 2, 1, 1)
    expected = torch.distributions.Normal(h, math.exp(-0.07 * likelihood.GAIN)).log_prob(x).flatten(1).sum(1)
    assert torch.allclose(likelihood.log_prob(h, x), expected, atol=1e-5)


@pytest.mark.parametrize("kind", [DiscretizedLogistic, Gaussian])
def test_padding_is_not_scored_and_comes_out_black(kind: Callable[..., PixelLikelihood]) -> None:
    spec = DataSpec("padded", (1, 8, 8), num_levels=17, padding=2)
    model = vae(spec, likelihood=kind)
    x = torch.zeros(3, 1, 8, 8)
    h = torch.randn(3, model.likelihood.maps, 8, 8)
    full = model.likelihood.log_prob(h, x)
    inner = h[..., 2:-2, 2:-2]
    alone = kind(DataSpec("bare", (1, 4, 4), num_levels=17)).log_prob(inner, x[..., 2:-2, 2:-2])
    assert torch.allclose(full, alone, atol=1e-4)
    images = model.sample(3, generator=torch.Generator().manual_seed(0))
    assert (images[..., :2, :] == -1).all() and (images[..., -2:] == -1).all()
    assert (images[..., 2:-2, 2:-2] != -1).any()


def test_kl_is_the_closed_form() -> None:
    mean, log_var = torch.randn(50), torch.randn(50)
    q = torch.distributions.Normal(mean, (0.5 * log_var).exp())
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0))
    assert torch.allclose(kl_from_standard_normal(mean, log_var), expected, atol=1e-5)


class Linear(nn.Module):
    """An encoder or decoder that is one linear map, for a VAE whose truth is known."""

    def __init__(self, weight: Tensor, bias: Tensor, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight, self.bias, self.shape = nn.Parameter(weight), nn.Parameter(bias), shape

    def forward(self, x: Tensor, e: Tensor | None = None) -> Tensor:
        return (x.flatten(1) @ self.weight.T + self.bias).unflatten(1, self.shape)


def test_the_bound_misses_the_exact_likelihood_by_the_posteriors_divergence() -> None:
    r"""Probabilistic PCA, x = W z + sigma eps with orthogonal columns in W: log p(x) and p(z | x) are known, and
    ELBO = log p(x) - KL(q(z|x) || p(z|x)): never above log p(x), and equal to it for the true posterior."""
    torch.manual_seed(0)
    d, k, sigma = 5, 3, 0.4
    w = torch.linalg.qr(torch.randn(d, d)).Q[:, :k] * torch.tensor([1.5, 0.8, 0.3])
    x = torch.randn(6, k) @ w.T + sigma * torch.randn(6, d)
    exact = torch.distributions.MultivariateNormal(torch.zeros(d), w @ w.T + sigma**2 * torch.eye(d)).log_prob(x)
    precision = (w.T @ w).diagonal() / sigma**2 + 1
    best = (w / sigma**2 / precision).T, (1 / precision).log()
    gaps = []
    for nudge in (0.0, 0.2):
        weight, log_var = best[0] + nudge * torch.randn(k, d), best[1] + nudge * torch.randn(k)
        encoder = Linear(torch.cat([weight, torch.zeros(k, d)]), torch.cat([torch.zeros(k), log_var]), (2 * k,))
        model = VAE(
            DataSpec("points", (d, 1, 1), num_levels=None),
            encoder=lambda *_, net=encoder: net,
            decoder=lambda *_: Linear(w, torch.zeros(d), (d, 1, 1)),
            likelihood=Gaussian,
            latent_dim=k,
        )
        assert isinstance(model.likelihood, Gaussian)
        model.likelihood.weight.data.fill_(math.log(sigma) / Gaussian.GAIN)
        n = 20_000
        many = x.repeat_interleave(n, 0)[:, :, None, None]
        bits = model.likelihoods()["elbo"].bits_per_dim(many, {}, torch.Generator().manual_seed(1))
        elbo = -(bits * d * math.log(2)).reshape(6, n).mean(1)
        q = torch.distributions.Normal(x @ weight.T, (0.5 * log_var).exp())
        truth = torch.distributions.Normal(x @ best[0].T, (0.5 * best[1]).exp())
        gap = torch.distributions.kl_divergence(q, truth).sum(1)
        assert torch.allclose(elbo, exact - gap, atol=0.05), nudge
        gaps.append((exact - elbo).mean().item())
    assert abs(gaps[0]) < 0.02 and gaps[1] > 0.2


def vae(spec: DataSpec, **options: Any) -> VAE:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "encoder": partial(ResNetEncoder, channels=8, blocks=1),
        "decoder": partial(ResNetDecoder, channels=8, blocks=1),
        "likelihood": DiscretizedLogistic,
        "latent_dim": 4,
        "optimizer": partial(torch.optim.Adam, lr=3e-3),
    }
    return VAE(spec, **(settings | options))


def whole(n: int, seed: int = 0) -> Draws:
    return Draws.whole(torch.Generator().manual_seed(seed), n)


def test_beta_and_free_bits_change_the_loss_and_never_the_bound() -> None:
    x, _ = next(iter(Digits().batches("val", 16)))
    plain = vae(Digits.spec).losses(x, {}, whole(16))
    assert torch.allclose(plain["loss"], plain["reconstruction"] + plain["kl"], atol=1e-6)
    assert torch.allclose(plain["bits_per_dim"], plain["loss"], atol=1e-6)
    changed = vae(Digits.spec, beta=3.0).losses(x, {}, whole(16))
    assert torch.allclose(changed["loss"], plain["reconstruction"] + 3 * plain["kl"], atol=1e-5)
    assert torch.equal(changed["bits_per_dim"], plain["bits_per_dim"])

    # More free bits than any latent number holds: the penalty is constant, 4 numbers x 5 bits over 64 pixels.
    free = vae(Digits.spec, free_bits=5.0)
    losses = free.losses(x, {}, whole(16))
    assert torch.allclose(losses["loss"] - plain["reconstruction"], torch.full((16,), 4 * 5 / 64), atol=1e-5)
    assert torch.equal(losses["bits_per_dim"], plain["bits_per_dim"])
    # Fewer than each one holds: nothing is free.
    with torch.no_grad():
        for model in (held := vae(Digits.spec, free_bits=0.5), bare := vae(Digits.spec)):
            model.encoder.out.bias[:4] += 5.0  # type: ignore[union-attr,operator]
        assert torch.allclose(held.losses(x, {}, whole(16))["loss"], bare.losses(x, {}, whole(16))["loss"])


def fit(model: VAE, x: Tensor, cond: dict[str, Tensor], steps: int) -> list[float]:
    optimizer = model.configure_optimizers()
    course = []
    for step in range(steps):
        loss = model.losses(x, cond, whole(len(x), step))["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        course.append(loss.item())
    return course


def test_a_few_images_are_learned_by_heart() -> None:
    x, _ = next(iter(Digits().batches("train", 6)))
    model = vae(Digits.spec, latent_dim=4, optimizer=partial(torch.optim.Adam, lr=1e-2))
    course = fit(model, x, {}, 150)
    # log2 6 / 64 = 0.04 bits/dim would be the best code for one of six images; the data set at large takes about 2.
    assert course[-1] < 1.2 < 2 < course[0]
    again = model.reconstruct(x, {}, generator=torch.Generator())
    assert (again - x).square().mean() < 0.03 < (x - x.mean(0)).square().mean()


def test_a_conditional_vae_decodes_the_class_it_is_asked_for() -> None:
    spec = DataSpec("marks", (1, 8, 8), num_classes=2, num_levels=17)
    x = -torch.ones(2, 1, 8, 8)
    x[0, :, :4], x[1, :, 4:] = 1, 1
    x, label = x.repeat(8, 1, 1, 1), torch.arange(2).repeat(8)
    model = vae(spec, conditional=True, latent_dim=2)
    fit(model, x, {"label": label}, 80)
    drawn = model.sample(16, {"label": label}, generator=torch.Generator().manual_seed(0))
    assert (drawn - x).square().mean() < 0.1
    with pytest.raises(UserError, match="label"):
        model.sample(2, generator=torch.Generator())


def test_points_in_the_plane_train_with_perceptrons_and_a_gaussian() -> None:
    spec = DataSpec("points", (2, 1, 1), num_levels=None)
    model = vae(
        spec,
        encoder=partial(MLPEncoder, width=32, depth=1),
        decoder=partial(MLPDecoder, width=32, depth=1),
        likelihood=Gaussian,
        latent_dim=2,
    )
    points = 0.05 * torch.randn(256, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    course = fit(model, points, {}, 250)
    # The entropy of N(0, 0.05^2) in bits is the best that any model can do, on average.
    entropy = math.log2(0.05 * math.sqrt(2 * math.pi * math.e))
    assert entropy - 0.15 < sum(course[-20:]) / 20 < entropy + 0.3


def test_samples_are_the_means_of_pixels_or_draws_from_them() -> None:
    means = vae(Digits.spec).sample(200, generator=torch.Generator().manual_seed(0))
    drawing = vae(Digits.spec, pixel_noise=True)
    drawn = drawing.sample(200, generator=torch.Generator().manual_seed(0))
    steps = (drawn + 1) * 8
    assert torch.allclose(steps, steps.round(), atol=1e-4) and not torch.allclose(drawn, means, atol=0.1)
    assert (drawn.mean() - means.mean()).abs() < 0.05
    assert "draw" in drawing.sampling_description() and "mean" in vae(Digits.spec).sampling_description()


def test_a_logistic_on_continuous_data_is_refused() -> None:
    with pytest.raises(UserError, match="model/likelihood=gaussian"):
        DiscretizedLogistic(DataSpec("points", (2, 1, 1), num_levels=None))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 64, 64), (1, 28, 28), (2, 12, 20), (2, 1, 1)])
def test_every_size_is_encoded_and_decoded(shape: tuple[int, int, int]) -> None:
    encoder = ResNetEncoder(shape, 6, 3, channels=8, max_channels=16, blocks=1)
    decoder = ResNetDecoder(6, shape, 3, channels=8, max_channels=16, blocks=2)
    e = torch.randn(2, 3)
    assert decoder(encoder(torch.zeros(2, *shape), e), e).shape == (2, *shape)


def test_images_do_not_see_each_other() -> None:
    model = vae(Digits.spec).train()
    x, _ = next(iter(Digits().batches("val", 8)))
    both = model.losses(x, {}, whole(8))["loss"]
    half = model.losses(x[4:], {}, Draws(torch.Generator().manual_seed(0), 4, 8, 8))["loss"]
    assert torch.allclose(both[4:], half, atol=1e-6)
