"""VAEs: priors, bounds against exact likelihoods, training, and options."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from gencompare.data.digits import Digits
from gencompare.errors import UserError
from gencompare.generative_model import Cond, DataSpec, SupportsVisualization
from gencompare.models import visualization
from gencompare.models.elbo import importance_weighted_bound, kl_from_standard_normal
from gencompare.models.pixel_likelihoods import BernoulliLikelihood, DiscretizedLogistic, GaussianLikelihood
from gencompare.models.priors import MixtureOfGaussians, StandardNormal
from gencompare.models.vae import VAE
from gencompare.networks.convnets import ResNetDecoder, ResNetEncoder
from gencompare.networks.mlp import MLPDecoder, MLPEncoder
from gencompare.rng import RandomSource
from gencompare.training.budget import Budget
from gencompare.training.checkpoints import Checkpoints
from gencompare.training.clock import TrainingClock
from gencompare.training.ema import EMA
from gencompare.training.lightning_plugins import AtomicCheckpointIO
from parts import assert_same_state


def gaussians() -> tuple[MixtureOfGaussians, torch.distributions.MixtureSameFamily]:
    """Return a mixture prior in two dimensions, and the same distribution from PyTorch."""
    torch.manual_seed(0)
    prior = MixtureOfGaussians(2, num_components=3)
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.7 / prior.GAIN)
    parts = torch.distributions.Independent(
        torch.distributions.Normal(prior.means.detach(), prior.log_stds.detach().exp()), 1
    )
    weights = torch.distributions.Categorical(logits=prior.logits.detach())
    return prior, torch.distributions.MixtureSameFamily(weights, parts)


def test_a_mixture_prior_has_the_right_density_and_moments() -> None:
    prior, truth = gaussians()
    z = 2 * torch.randn(50, 2)
    assert torch.allclose(prior.log_prob(z), truth.log_prob(z), atol=1e-5)
    drawn = prior.sample(40_000, torch.Generator().manual_seed(0))
    assert torch.allclose(drawn.mean(0), truth.mean, atol=0.04) and torch.allclose(
        drawn.var(0), truth.variance, rtol=0.05
    )
    # Samples have the same mean log density as those of the true distribution.
    error = truth.log_prob(drawn).std() / 200
    assert abs(truth.log_prob(drawn).mean() - truth.log_prob(truth.sample((40_000,))).mean()) < 6 * error


def test_the_single_sample_kl_estimate_is_unbiased() -> None:
    """The mean estimate equals E_q[log q - log p], by numerical integration over the plane and by the closed form for a
    standard normal."""
    prior, truth = gaussians()
    mean, log_var = torch.tensor([[0.3, -0.8]]), torch.tensor([[-1.0, 0.4]])
    q = torch.distributions.Independent(torch.distributions.Normal(mean[0], (0.5 * log_var[0]).exp()), 1)
    axis = torch.linspace(-8, 8, 801)
    plane = torch.cartesian_prod(axis, axis)
    log_q = q.log_prob(plane)
    exact = (log_q.exp() * (log_q - truth.log_prob(plane))).sum() * (axis[1] - axis[0]) ** 2
    torch.manual_seed(0)
    z = q.sample((40_000,))
    found = prior.kl(mean.expand(len(z), -1), log_var.expand(len(z), -1), z)
    assert found.shape == (len(z), 1)
    assert found.mean().item() == pytest.approx(exact.item(), abs=6 * found.std().item() / 200)
    normal = StandardNormal(2)
    each = q.log_prob(z) - normal.log_prob(z)
    assert normal.kl(mean, log_var, z[:1]).sum().item() == pytest.approx(each.mean().item(), abs=0.05)


def test_a_learned_prior_reaches_the_information_in_the_latents() -> None:
    """For the equally frequent posteriors N(3, 0.5^2) and N(-3, 0.5^2), the best prior is their mixture, with a KL of
    log 2, the one bit in z. From N(0, 1) the KL is 4.8 nats."""
    torch.manual_seed(0)
    prior = MixtureOfGaussians(1, num_components=2)
    mean = torch.tensor([3.0, -3.0]).repeat(64)[:, None]
    log_var = torch.full_like(mean, 2 * math.log(0.5))
    optimizer = torch.optim.Adam(prior.parameters(), lr=0.01)
    course = []
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 300)
        kl = prior.kl(mean, log_var, mean + 0.5 * torch.randn_like(mean)).mean()
        optimizer.zero_grad()
        kl.backward()
        optimizer.step()
        course.append(kl.item())
    assert sum(course[-50:]) / 50 == pytest.approx(math.log(2), abs=0.03)
    assert StandardNormal(1).kl(mean, log_var, mean).mean().item() == pytest.approx(4.5 + math.log(2) - 0.375, abs=1e-5)
    drawn = prior.sample(4_000, torch.Generator().manual_seed(0))
    assert ((drawn.abs() - 3).abs() < 2.5).all() and (drawn > 0).float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_kl_from_a_standard_normal_matches_pytorch() -> None:
    mean, log_var = torch.randn(50), torch.randn(50)
    q = torch.distributions.Normal(mean, (0.5 * log_var).exp())
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0))
    assert torch.allclose(kl_from_standard_normal(mean, log_var), expected, atol=1e-5)


class Linear(nn.Module):
    """A linear encoder or decoder, for a VAE whose exact likelihood is known."""

    def __init__(self, weight: Tensor, bias: Tensor, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight, self.bias, self.shape = nn.Parameter(weight), nn.Parameter(bias), shape

    def forward(self, x: Tensor, e: Tensor | None = None) -> Tensor:
        return (x.flatten(1) @ self.weight.T + self.bias).unflatten(1, self.shape)


class Truth:
    r"""Probabilistic PCA, x = W z + sigma eps with orthogonal columns in W, for which log p(x) and p(z | x) are
    known."""

    def __init__(self, d: int = 5, k: int = 3, sigma: float = 0.4, n: int = 6) -> None:
        torch.manual_seed(0)
        self.d, self.k, self.sigma = d, k, sigma
        self.w = torch.linalg.qr(torch.randn(d, d)).Q[:, :k] * torch.tensor([1.5, 0.8, 0.3])
        self.x = torch.randn(n, k) @ self.w.T + sigma * torch.randn(n, d)
        covariance = self.w @ self.w.T + sigma**2 * torch.eye(d)
        self.exact = torch.distributions.MultivariateNormal(torch.zeros(d), covariance).log_prob(self.x)
        precision = (self.w.T @ self.w).diagonal() / sigma**2 + 1
        self.weight, self.log_var = (self.w / sigma**2 / precision).T, (1 / precision).log()

    def vae(self, nudge: float, **options: Any) -> tuple[VAE, Tensor]:
        """Return the true decoder with a posterior perturbed by about ``nudge``, and KL(q(z|x) || p(z|x)) of each x."""
        torch.manual_seed(1)
        weight = self.weight + nudge * torch.randn(self.k, self.d)
        log_var = self.log_var + nudge * torch.randn(self.k)
        rows = torch.cat([weight, torch.zeros(self.k, self.d)])
        encoder = Linear(rows, torch.cat([torch.zeros(self.k), log_var]), (2 * self.k,))
        model = VAE(
            DataSpec("points", (self.d, 1, 1), num_bins=None),
            encoder=lambda *_: encoder,
            decoder=lambda *_: Linear(self.w, torch.zeros(self.d), (self.d, 1, 1)),
            likelihood=GaussianLikelihood,
            latent_dim=self.k,
            **options,
        )
        assert isinstance(model.likelihood, GaussianLikelihood)
        model.likelihood.weight.data.fill_(math.log(self.sigma) / GaussianLikelihood.GAIN)
        q = torch.distributions.Normal(self.x @ weight.T, (0.5 * log_var).exp())
        truth = torch.distributions.Normal(self.x @ self.weight.T, (0.5 * self.log_var).exp())
        return model, torch.distributions.kl_divergence(q, truth).sum(1)

    def scored(self, model: VAE, name: str, repeats: int) -> Tensor:
        """Return ``likelihoods()[name]`` of each x in nats for ``repeats`` independent draws of noise, (n, repeats)."""
        many = self.x.repeat_interleave(repeats, 0)[:, :, None, None]
        bits = model.likelihoods()[name].bits_per_dim(many, {}, torch.Generator().manual_seed(1))
        return -(bits * self.d * math.log(2)).reshape(-1, repeats)


def test_the_gap_of_the_bound_is_the_kl_of_the_posterior() -> None:
    """ELBO = log p(x) - KL(q(z|x) || p(z|x)) is never above log p(x), and equals it for the true posterior."""
    truth, gaps = Truth(), []
    for nudge in (0.0, 0.2):
        model, gap = truth.vae(nudge)
        elbo = truth.scored(model, "elbo", 20_000).mean(1)
        assert torch.allclose(elbo, truth.exact - gap, atol=0.05), nudge
        gaps.append((truth.exact - elbo).mean().item())
    assert abs(gaps[0]) < 0.02 and gaps[1] > 0.2


def test_the_importance_weighted_bound_rises_to_the_likelihood() -> None:
    truth = Truth()
    bounds, errors = [], []
    for samples in (1, 4, 16, 64):
        model, gap = truth.vae(0.2, importance_samples=samples)
        found = truth.scored(model, f"iwae_{samples}", 3_000)
        bounds.append(found.mean(1))
        errors.append(found.std(1) / math.sqrt(3_000))
        assert (bounds[-1] < truth.exact + 4 * errors[-1]).all(), "never above the exact likelihood"
    assert torch.allclose(bounds[0], truth.exact - gap, atol=0.1), "with one sample the bound is the ELBO"
    for fewer, more, error in zip(bounds, bounds[1:], errors, strict=False):
        assert (more > fewer - 4 * error).all() and more.mean() > fewer.mean() + 0.005
    assert (truth.exact - bounds[-1]).mean() < 0.1 * (truth.exact - bounds[0]).mean()
    # Under the true posterior every weight equals p(x), so one sample is exact.
    perfect, _ = truth.vae(0.0, importance_samples=4)
    one = truth.scored(perfect, "iwae_4", 1)[:, 0]
    assert torch.allclose(one, truth.exact, atol=1e-4)


def test_the_importance_weighted_bound_is_the_log_mean_weight() -> None:
    weights = torch.tensor([[-900.0, -901.0, -905.0], [-2.0, 30.0, 4.0]], dtype=torch.float64)
    given = iter(weights.T)
    found = importance_weighted_bound(lambda: next(given), 3)
    shift = weights.max(1).values.numpy()
    expected = shift + np.log(np.exp(weights.numpy() - shift[:, None]).mean(1))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_trained_linear_vae_reaches_probabilistic_pca() -> None:
    """By Tipping and Bishop (1999), eqs. 7 and 8, the best k-dimensional linear-Gaussian model has the leading
    eigenvalues of the covariance, and the mean of the others as noise variance. The bound is tight at its optimum
    (Lucas et al. 2019, "Don't blame the ELBO!"), so training reaches this maximum within 1 %."""
    rng = np.random.default_rng(0)
    n, d, k = 400, 5, 2
    x = rng.normal(size=(n, k)) @ rng.normal(size=(k, d)) + 0.5 * rng.normal(size=(n, d)) + rng.normal(size=d)
    eigenvalues = np.linalg.eigvalsh(np.cov(x.T, bias=True))[::-1]
    noise = eigenvalues[k:].mean()
    log_det = np.log(eigenvalues[:k]).sum() + (d - k) * np.log(noise)
    best = -0.5 * (d * math.log(2 * math.pi) + log_det + d)

    spec = DataSpec("points", (d, 1, 1), num_bins=None)
    model = vae(
        spec,
        encoder=partial(MLPEncoder, depth=0),
        decoder=partial(MLPDecoder, depth=0),
        likelihood=GaussianLikelihood,
        latent_dim=k,
        optimizer=partial(torch.optim.Adam, lr=2e-2),
    )
    images = torch.tensor(x).float()[:, :, None, None]
    fit(model, images, {}, 400, decay=True)
    bits = torch.stack(
        [model.likelihoods()["elbo"].bits_per_dim(images, {}, torch.Generator().manual_seed(s)) for s in range(50)]
    )
    elbo = -bits.mean().item() * d * math.log(2)
    assert elbo == pytest.approx(best, rel=0.01)
    assert isinstance(model.likelihood, GaussianLikelihood)
    assert model.likelihood.log_scale.exp().item() ** 2 == pytest.approx(noise, rel=0.05)


def vae(spec: DataSpec, **options: Any) -> VAE:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "encoder": partial(ResNetEncoder, channels=8, num_blocks=1),
        "decoder": partial(ResNetDecoder, channels=8, num_blocks=1),
        "likelihood": DiscretizedLogistic,
        "latent_dim": 4,
        "optimizer": partial(torch.optim.Adam, lr=3e-3),
    }
    return VAE(spec, **(settings | options))


def source(n: int, seed: int = 0) -> RandomSource:
    return RandomSource.for_batch(torch.Generator().manual_seed(seed), n)


def test_beta_and_free_bits_change_the_loss_but_not_the_bound() -> None:
    x, _ = next(iter(Digits().batches("val", 16)))
    plain = vae(Digits.spec).losses(x, {}, source(16))
    assert torch.allclose(plain["loss"], plain["reconstruction"] + plain["kl"], atol=1e-6)
    assert torch.allclose(plain["bits_per_dim"], plain["loss"], atol=1e-6)
    changed = vae(Digits.spec, beta=3.0).losses(x, {}, source(16))
    assert torch.allclose(changed["loss"], plain["reconstruction"] + 3 * plain["kl"], atol=1e-5)
    assert torch.equal(changed["bits_per_dim"], plain["bits_per_dim"])

    # With more free bits than the KL of any dimension, the penalty is constant: 4 dimensions x 5 bits over 64 pixels.
    free = vae(Digits.spec, free_bits=5.0)
    losses = free.losses(x, {}, source(16))
    assert torch.allclose(losses["loss"] - plain["reconstruction"], torch.full((16,), 4 * 5 / 64), atol=1e-5)
    assert torch.equal(losses["bits_per_dim"], plain["bits_per_dim"])
    # Fewer free bits than the KL of every dimension have no effect.
    with torch.no_grad():
        for model in (free := vae(Digits.spec, free_bits=0.5), plain_model := vae(Digits.spec)):
            model.encoder.out.bias[:4] += 5.0  # type: ignore[union-attr,operator]
        assert torch.allclose(free.losses(x, {}, source(16))["loss"], plain_model.losses(x, {}, source(16))["loss"])


def fit(model: VAE, x: Tensor, cond: dict[str, Tensor], steps: int, decay: bool = False) -> list[float]:
    optimizer = model.configure_optimizers()
    course, rate = [], optimizer.param_groups[0]["lr"]
    for step in range(steps):
        if decay:
            optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        loss = model.losses(x, cond, source(len(x), step))["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        course.append(loss.item())
    return course


def test_a_few_images_are_memorised() -> None:
    x, _ = next(iter(Digits().batches("train", 6)))
    model = vae(Digits.spec, latent_dim=4, optimizer=partial(torch.optim.Adam, lr=1e-2))
    course = fit(model, x, {}, 150)
    # The best code for one of six images has log2 6 / 64 = 0.04 bits/dim; the whole data set needs about 2.
    assert course[-1] < 1.2 < 2 < course[0]
    reconstruction = model.reconstruct(x, {}, generator=torch.Generator())
    assert (reconstruction - x).square().mean() < 0.03 < (x - x.mean(0)).square().mean()


def test_conditional_samples_have_the_requested_class() -> None:
    spec = DataSpec("marks", (1, 8, 8), num_classes=2, num_bins=17)
    x = -torch.ones(2, 1, 8, 8)
    x[0, :, :4], x[1, :, 4:] = 1, 1
    x, label = x.repeat(8, 1, 1, 1), torch.arange(2).repeat(8)
    model = vae(spec, conditional=True, latent_dim=2)
    fit(model, x, {"label": label}, 80)
    drawn = model.sample(16, {"label": label}, generator=torch.Generator().manual_seed(0))
    assert (drawn - x).square().mean() < 0.1
    with pytest.raises(UserError, match="label"):
        model.sample(2, generator=torch.Generator())


def test_points_train_with_mlps_and_a_gaussian_likelihood() -> None:
    spec = DataSpec("points", (2, 1, 1), num_bins=None)
    model = vae(
        spec,
        encoder=partial(MLPEncoder, width=32, depth=1),
        decoder=partial(MLPDecoder, width=32, depth=1),
        likelihood=GaussianLikelihood,
        latent_dim=2,
    )
    points = 0.05 * torch.randn(256, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    course = fit(model, points, {}, 250)
    # The entropy of N(0, 0.05^2) in bits is the minimum for any model, on average.
    entropy = math.log2(0.05 * math.sqrt(2 * math.pi * math.e))
    assert entropy - 0.15 < sum(course[-20:]) / 20 < entropy + 0.3


def test_samples_are_pixel_means_or_pixel_samples() -> None:
    means = vae(Digits.spec).sample(200, generator=torch.Generator().manual_seed(0))
    sampling = vae(Digits.spec, pixel_noise=True)
    drawn = sampling.sample(200, generator=torch.Generator().manual_seed(0))
    steps = (drawn + 1) * 8
    assert torch.allclose(steps, steps.round(), atol=1e-4) and not torch.allclose(drawn, means, atol=0.1)
    assert (drawn.mean() - means.mean()).abs() < 0.05
    assert "sample of" in sampling.sampling_description() and "mean" in vae(Digits.spec).sampling_description()


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 64, 64), (1, 28, 28), (2, 12, 20), (2, 1, 1)])
def test_every_image_size_is_supported(shape: tuple[int, int, int]) -> None:
    encoder = ResNetEncoder(shape, 6, 3, channels=8, max_channels=16, num_blocks=1)
    decoder = ResNetDecoder(6, shape, 3, channels=8, max_channels=16, num_blocks=2)
    e = torch.randn(2, 3)
    assert decoder(encoder(torch.zeros(2, *shape), e), e).shape == (2, *shape)


def test_images_of_a_batch_are_independent() -> None:
    model = vae(Digits.spec).train()
    x, _ = next(iter(Digits().batches("val", 8)))
    both = model.losses(x, {}, source(8))["loss"]
    half = model.losses(x[4:], {}, RandomSource(torch.Generator().manual_seed(0), 4, 8, 8))["loss"]
    assert torch.allclose(both[4:], half, atol=1e-6)


def test_padding_of_samples_is_black() -> None:
    model = vae(DataSpec("padded", (1, 8, 8), num_bins=17, padding=2))
    images = model.sample(3, generator=torch.Generator().manual_seed(0))
    assert (images[..., :2, :] == -1).all() and (images[..., -2:] == -1).all()
    assert (images[..., 2:-2, 2:-2] != -1).any()


def test_bernoulli_likelihoods_of_grey_images_give_no_bits_per_dim() -> None:
    x, _ = next(iter(Digits().batches("val", 4)))
    grey = vae(Digits.spec, likelihood=BernoulliLikelihood, importance_samples=5)
    assert not grey.likelihoods() and "bits_per_dim" not in grey.losses(x, {}, source(4))
    binary = vae(DataSpec("binary", (1, 8, 8), num_bins=2), likelihood=BernoulliLikelihood, importance_samples=5)
    assert set(binary.likelihoods()) == {"elbo", "iwae_5"}
    assert "bits_per_dim" in binary.losses(x.sign(), {}, source(4))


def test_kl_warmup_is_linear_and_affects_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = next(iter(Digits().batches("val", 16)))
    model = vae(Digits.spec, beta=2.0, kl_warmup_steps=4)
    for step, beta in enumerate([0.5, 1.0, 1.5, 2.0, 2.0, 2.0]):
        monkeypatch.setattr(VAE, "global_step", step)
        found = model.train().losses(x, {}, source(16))
        assert torch.allclose(found["loss"], found["reconstruction"] + beta * found["kl"], atol=1e-6)
        held_out = model.eval().losses(x, {}, source(16))
        assert torch.allclose(held_out["loss"], held_out["reconstruction"] + 2 * held_out["kl"], atol=1e-6)


def train(folder: Path, *, until: int, resume: bool = False, **options: Any) -> VAE:
    """Train a VAE on digits up to step ``until`` of 8, or ``resume`` it."""

    class StopAt(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop |= trainer.callbacks[0].step == until

    model = vae(Digits.spec, **options)
    callbacks = [TrainingClock(5, 16, Budget(steps=8)), EMA(0.9), StopAt(), Checkpoints(folder)]
    trainer = pl.Trainer(
        callbacks=callbacks, plugins=[AtomicCheckpointIO()], logger=False, max_epochs=-1, limit_val_batches=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    ckpt = folder / "last.ckpt" if resume else None
    trainer.fit(model, datamodule=Digits(batch_size=16), ckpt_path=ckpt, weights_only=resume or None)
    assert callbacks[0].step == until  # type: ignore[union-attr]
    return model


def test_a_run_resumed_during_warmup_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    uninterrupted = train(tmp_path / "whole", until=8, kl_warmup_steps=6)
    train(tmp_path / "broken", until=3, kl_warmup_steps=6)
    resumed = train(tmp_path / "broken", until=8, resume=True, kl_warmup_steps=6)
    assert_same_state(uninterrupted, resumed)
    plain = train(tmp_path / "plain", until=8)
    assert not torch.equal(plain.encoder.out.weight, uninterrupted.encoder.out.weight)  # type: ignore[union-attr,arg-type]


def test_visualisations_show_reconstruction_interpolation_traversal() -> None:
    """With a linear decoder whose columns are orthogonal, latents can be computed from the images."""
    truth = Truth(n=5)
    model, _ = truth.vae(0.0)
    assert isinstance(model, SupportsVisualization)
    x = truth.x[:, :, None, None] / 10
    grids = model.visualize(x, {}, generator=torch.Generator())
    shown = {name: images[..., 0, 0] for name, images in grids.items()}
    z = x.flatten(1) @ truth.weight.T
    reconstruction = z @ truth.w.T
    torch.testing.assert_close(shown["reconstruction"], torch.stack([x.flatten(1), reconstruction]))
    torch.testing.assert_close(
        shown["reconstruction"][1], model.reconstruct(x, {}, generator=torch.Generator())[..., 0, 0]
    )

    interpolated = shown["interpolation"]  # images 0 and 1, then 2 and 3; the last has no partner
    assert interpolated.shape == (2, 9, truth.d)
    torch.testing.assert_close(interpolated[:, [0, -1]], reconstruction[:4].unflatten(0, (2, 2)))
    torch.testing.assert_close(interpolated[:, 4], reconstruction[:4].unflatten(0, (2, 2)).mean(1))

    _, log_var = model.posterior(x, {})
    posterior_variance = log_var.exp()[0]
    traversed = shown["traversal"]
    assert traversed.shape == (3, 9, truth.d)
    by_information = [0, 1, 2]  # columns of W have norms 1.5, 0.8 and 0.3
    for row, j in zip(traversed, by_information, strict=True):
        std = (z[:, j].var(correction=0) + posterior_variance[j]).sqrt()
        for place, image in zip(torch.linspace(-3, 3, 9), row, strict=True):
            expected = z[0].clone()
            expected[j] = z[:, j].mean() + place * std
            torch.testing.assert_close(image, (truth.w @ expected).clamp(-1, 1), atol=1e-5, rtol=0)


def test_a_mixture_prior_of_one_component_gives_the_same_bounds() -> None:
    """A mixture with one component N(0, I) is the standard normal prior."""
    truth = Truth()
    for name in ("elbo", "iwae_8"):
        found = []
        for prior in (StandardNormal, partial(MixtureOfGaussians, num_components=1)):
            model, _ = truth.vae(0.2, importance_samples=8, prior=prior)
            for parameter in model.prior.parameters():
                torch.nn.init.zeros_(parameter)
            found.append(truth.scored(model, name, 3_000).mean(1))
        assert torch.allclose(*found, atol=0.05), name


def test_free_bits_with_a_mixture_prior_raise_an_error() -> None:
    with pytest.raises(UserError, match=r"model.free_bits=0.5 .*standard_normal"):
        vae(Digits.spec, free_bits=0.5, prior=MixtureOfGaussians)
    with pytest.raises(UserError, match="num_components=0"):
        MixtureOfGaussians(2, num_components=0)


def test_visualisations_of_a_conditional_model_keep_the_class() -> None:
    """Interpolations use the class of the nearer image, and traversals the class of their image."""
    z, label = torch.randn(4, 3), torch.tensor([7, 2, 5, 9])

    def decode(z: Tensor, cond: Cond) -> Tensor:
        return cond["label"][:, None, None, None].expand(-1, 1, 2, 2)

    interpolated = visualization.interpolation(decode, z, {"label": label})[..., 0, 0, 0]
    assert interpolated.tolist() == [[7] * 4 + [2] * 5, [5] * 4 + [9] * 5]
    assert (visualization.traversal(decode, z, torch.zeros(4, 3), {"label": label}) == 7).all()


def test_traversals_show_constant_latent_dimensions_last() -> None:
    """A constant dimension has a large KL if it is far from 0 but carries no information."""
    means = torch.stack([torch.full((6,), 5.0), torch.tensor([0.5, -0.5] * 3)], 1)
    log_var = torch.tensor([0.5, 0.1]).square().log().expand(6, 2)
    traversed = visualization.traversal(lambda z, cond: z[:, :, None, None], means, log_var, {})[..., 0, 0]
    std = math.sqrt(0.5**2 + 0.1**2)
    torch.testing.assert_close(traversed[0, :, 1], torch.linspace(-3, 3, 9) * std)
    torch.testing.assert_close(traversed[1, :, 0], 5 + torch.linspace(-3, 3, 9) * 0.5)


@pytest.mark.parametrize(
    "options",
    [{"latent_dim": 0}, {"beta": -1.0}, {"free_bits": -0.1}, {"kl_warmup_steps": -1}, {"importance_samples": -1}],
)
def test_invalid_options_raise_an_error(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(UserError, match=f"model.{name}="):
        vae(Digits.spec, **options)
