"""Hierarchical VAEs: the bound and its exact gap, posteriors and priors, and skipped steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import DummyLogger
from scipy import stats
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from forking import in_processes, needs_fork
from gencompare.data.digits import Digits
from gencompare.errors import TrainingStopped, UserError
from gencompare.evaluation.sampling import draw_samples
from gencompare.generative_model import DataSpec, SupportsReconstruction, SupportsVisualization
from gencompare.models.hvae import HVAE, MAX_CONSECUTIVE_SKIPS
from gencompare.models.pixel_likelihoods import BernoulliLikelihood, DiscretizedLogistic, GaussianLikelihood
from gencompare.networks.hierarchical import BottleneckBlock, DiagonalGaussian, TopDownBlock, TopDownDecoder
from gencompare.rng import RandomSource
from gencompare.training.budget import Budget
from gencompare.training.checkpoints import Checkpoints
from gencompare.training.clock import TrainingClock
from gencompare.training.ema import EMA
from gencompare.training.lightning_plugins import AtomicCheckpointIO
from gencompare.training.loggers import MetricLogger
from parts import assert_same_state

SMALL: dict[str, Any] = {"channels": 8, "max_channels": 16, "bottleneck_ratio": 2.0, "latent_channels": 4}


def hvae(spec: DataSpec = Digits.spec, decoder: dict[str, Any] | None = None, **options: Any) -> HVAE:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "decoder": partial(TopDownDecoder, **(SMALL | (decoder or {}))),
        "likelihood": DiscretizedLogistic,
        "optimizer": partial(torch.optim.AdamW, lr=5e-3),
        "grad_clip": 200.0,
        "grad_skip": 400.0,
    }
    return HVAE(spec, **(settings | options))


def perturbed(model: HVAE) -> HVAE:
    """Perturb the weights of the model, some of which are zero at initialisation."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    return model


def source(n: int, seed: int = 0) -> RandomSource:
    return RandomSource.for_batch(torch.Generator().manual_seed(seed), n)


def digits(n: int) -> tuple[Tensor, Tensor]:
    x, cond = next(iter(Digits().batches("val", n)))
    return x, cond["label"]


def learn(model: HVAE, optimizer: torch.optim.Optimizer, x: Tensor, cond: dict[str, Tensor], steps: range) -> None:
    for step in steps:
        loss = model.losses(x, cond, source(len(x), step))["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        model.on_before_optimizer_step(optimizer)
        optimizer.step()


# Evidence lower bound


def test_log_stds_of_residual_posteriors_are_bounded() -> None:
    raw = torch.tensor([-1000.0, -0.1, 0.1, 1000.0])
    assert torch.allclose(DiagonalGaussian(raw, raw, bound=5.0).log_std, torch.tensor([-5, -0.1, 0.1, 5]), atol=1e-4)
    assert torch.equal(DiagonalGaussian(raw, raw).log_std, raw)
    for residual, bound in ((True, 5.0), (False, None)):
        layer = hvae(decoder={"residual_posterior": residual}).ladder.layers[0]
        prior, h = layer.prior(torch.zeros(1, 16, 1, 1))
        assert prior.bound == layer.posterior(h, torch.zeros_like(h), prior).bound == bound


def test_kl_matches_two_normal_distributions() -> None:
    a, b, c, d = torch.randn(4, 200, dtype=torch.float64)
    found = DiagonalGaussian(a, b).kl(DiagonalGaussian(c, d))
    assert torch.allclose(found, kl_divergence(Normal(a, b.exp()), Normal(c, d.exp())))
    assert not DiagonalGaussian(a, b).kl(DiagonalGaussian(a, b)).any()


def make_linear(block: BottleneckBlock, weight: Tensor, bias: Tensor, offset: float) -> None:
    """Make a block linear, y = weight (x - offset) + bias, with inputs so large that GELU acts as the identity."""
    first, second, third, last = block.convs
    with torch.no_grad():
        for conv in (first, second, third):
            conv.weight.zero_()  # type: ignore[operator,union-attr]
            conv.bias.zero_()  # type: ignore[operator,union-attr]
            eye = torch.eye(conv.weight.shape[0], conv.weight.shape[1])  # type: ignore[union-attr]
            conv.weight[:, :, 0, 0] = eye  # type: ignore[index]
        last.weight[:, :, 0, 0] = weight  # type: ignore[index]
        last.bias.copy_(bias - offset * weight.sum(1))  # type: ignore[union-attr,operator]


@pytest.mark.parametrize("residual", [True, False])
def test_the_gap_of_the_bound_is_the_kl_of_the_posterior(residual: bool) -> None:
    r"""Two layers, z1 ~ N(0, 1), z2 ~ N(A z1, s^2), x ~ N(U z1 + V z2, sigma^2), under the posterior q(z1|x) = N(B x,
    t1^2), q(z2|z1, x) = N(C x + D z1, t2^2), have ELBO = log p(x) - KL(q(z1, z2|x) || p(z1, z2|x)), where all three
    terms follow from the moments of joint Gaussians."""
    rng = np.random.default_rng(0)
    d, k, sigma, far = 4, 2, 1.0, 20.0
    a, u, v = rng.normal(size=(k, k)), 0.5 * rng.normal(size=(d, k)), 0.5 * rng.normal(size=(d, k))
    b, c, e = 0.2 * rng.normal(size=(k, d)), 0.2 * rng.normal(size=(k, d)), 0.3 * rng.normal(size=(k, k))
    s, t1, t2 = np.array([0.6, 0.9]), np.array([0.7, 0.5]), np.array([0.4, 0.6])

    spec = DataSpec("points", (d, 1, 1), num_bins=None)
    decoder = partial(
        TopDownDecoder, channels=8, max_channels=8, bottleneck_ratio=1.0, latent_channels=k, num_encoder_blocks=1,
        num_decoder_blocks=2,
        residual_posterior=residual,
    )  # fmt: skip
    model = HVAE(spec, decoder=decoder, likelihood=GaussianLikelihood)
    net, tensor = model.ladder, partial(torch.tensor, dtype=torch.float32)
    eye = torch.eye(k)
    with torch.no_grad():
        # Features are x and the state is (z1, z2), both with a large offset.
        for p in net.stem.parameters(), net.features.parameters(), net.starts.parameters():
            for weight in p:
                weight.zero_()
        net.stem.weight[:d, :, 1, 1] = torch.eye(d)
        net.stem.bias.fill_(far)  # type: ignore[union-attr]
        net.starts[0].fill_(far)
        for place, layer in enumerate(net.layers):
            nn.init.zeros_(layer.block.convs[-1].weight)  # type: ignore[arg-type]
            layer.project.weight.zero_()
            layer.project.weight[place * k : (place + 1) * k, :, 0, 0] = eye
        first, second = net.layers
        zeros = torch.zeros(2 * k + 8, 8)
        make_linear(first.prior_block, zeros, torch.zeros(2 * k + 8), far)
        prior, bias = zeros.clone(), torch.zeros(2 * k + 8)
        prior[:k, :k], bias[k : 2 * k] = tensor(a), tensor(np.log(s))
        make_linear(second.prior_block, prior, bias, far)
        # Hidden channels of a posterior block: z1 in two state channels, x in four feature channels.
        for layer, mean_z, mean_x, log_std in (
            (first, np.zeros((k, k)), b, np.log(t1)),
            (second, e - residual * a, c, np.log(t2) - residual * np.log(s)),
        ):
            out = torch.zeros(2 * k, 8)
            out[:k, :k], out[:k, k : k + d] = tensor(mean_z), tensor(mean_x)
            make_linear(layer.posterior_block, out, torch.cat([torch.zeros(k), tensor(log_std)]), far)
            narrow = torch.zeros(8, 16)
            narrow[:k, :k], narrow[k : k + d, 8 : 8 + d] = eye, torch.eye(d)
            layer.posterior_block.convs[0].weight[:, :, 0, 0] = narrow  # type: ignore[index]
        mixing = torch.cat([tensor(u), tensor(v)], dim=1)
        net.out.weight.zero_()
        net.out.weight[:, : 2 * k, 0, 0] = mixing
        net.out.bias.copy_(-far * mixing.sum(1))  # type: ignore[union-attr]
        assert isinstance(model.likelihood, GaussianLikelihood)
        model.likelihood.weight.fill_(math.log(sigma) / GaussianLikelihood.GAIN)

    # The joint distribution of z = (z1, z2) = M n with standard normal n, and the true posterior.
    m = np.block([[np.eye(k), np.zeros((k, k))], [a, np.diag(s)]])
    w, cov_z = np.concatenate([u, v], axis=1), m @ m.T
    marginal = stats.multivariate_normal(np.zeros(d), w @ cov_z @ w.T + sigma**2 * np.eye(d))
    true_cov = np.linalg.inv(np.linalg.inv(cov_z) + w.T @ w / sigma**2)
    x = rng.normal(size=(5, 2 * k)) @ m.T @ w.T + sigma * rng.normal(size=(5, d))
    true_mean = x @ (true_cov @ w.T / sigma**2).T
    mean = np.concatenate([x @ b.T, x @ (c + e @ b).T], axis=1)
    n = np.block([[np.diag(t1), np.zeros((k, k))], [e @ np.diag(t1), np.diag(t2)]])
    cov, inverse, gap = n @ n.T, np.linalg.inv(true_cov), mean - true_mean
    log_ratio = np.linalg.slogdet(true_cov)[1] - np.linalg.slogdet(cov)[1]
    divergence = 0.5 * (np.trace(inverse @ cov) - 2 * k + log_ratio + np.einsum("ni,ij,nj->n", gap, inverse, gap))
    exact = marginal.logpdf(x)

    repeats = 20_000
    many = tensor(x).repeat_interleave(repeats, 0)[:, :, None, None]
    bits = model.likelihoods()["elbo"].bits_per_dim(many, {}, torch.Generator().manual_seed(0)).double()
    elbo = -(bits * d * math.log(2)).reshape(5, repeats)
    error = 4 * elbo.std(1).numpy() / math.sqrt(repeats) + 1e-3
    assert divergence.min() > 5 * error.max()
    assert (np.abs(elbo.mean(1).numpy() - (exact - divergence)) < error).all()


def test_training_uses_latents_and_the_bound_is_above_the_entropy() -> None:
    """Four equally frequent patterns of 4x4 pixels have an entropy of 2 bits. Without latents, pixels would be
    independent, with at least the sum of their individual entropies."""
    patterns = torch.randint(2, (4, 1, 4, 4), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    x, entropy, bits = patterns, 2 / 16, math.inf
    share = (x.mean(0).numpy() + 1) / 2
    independent = stats.bernoulli(share).entropy().mean() / math.log(2)
    model = hvae(DataSpec("patterns", (1, 4, 4), num_bins=2), decoder={"num_decoder_blocks": 1})
    optimizer = model.configure_optimizers()
    for step in range(0, 120, 20):
        learn(model, optimizer, x.repeat(8, 1, 1, 1), {}, range(step, step + 20))
        noise = torch.Generator().manual_seed(step)
        scored = model.likelihoods()["elbo"].bits_per_dim(x.repeat(400, 1, 1, 1), {}, noise)
        bits, error = scored.mean().item(), 4 * scored.std().item() / math.sqrt(len(scored))
        assert bits > entropy - error, step
    assert bits < 0.7 * independent


def test_terms_add_up_to_the_bound_and_name_each_resolution() -> None:
    model, (x, _) = perturbed(hvae()), digits(6)
    terms = model.likelihoods()["elbo"].terms(x, {}, torch.Generator().manual_seed(0))
    assert list(terms) == ["reconstruction", "kl_1x1", "kl_4x4", "kl_8x8"]
    assert all((value > 0).all() for value in terms.values())
    losses = model.losses(x, {}, source(6))
    for name, value in terms.items():
        assert torch.allclose(losses[name], value, atol=1e-6), name
    assert torch.allclose(losses["bits_per_dim"], torch.stack(list(terms.values())).sum(0), atol=1e-5)
    assert torch.allclose(losses["loss"], losses["bits_per_dim"] * math.log(2), atol=1e-5)


def test_kl_warmup_is_linear_and_does_not_change_the_bound() -> None:
    (x, _), model = digits(4), perturbed(hvae(kl_warmup_steps=4)).train()
    plain = model.eval().losses(x, {}, source(4))
    reconstruction = plain["reconstruction"] * math.log(2)
    for step in range(6):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(HVAE, "global_step", step)
            warm = model.train().losses(x, {}, source(4))
        expected = reconstruction + min(1, (step + 1) / 4) * (plain["loss"] - reconstruction)
        assert torch.allclose(warm["loss"], expected, atol=1e-5), step
        assert torch.equal(warm["bits_per_dim"], plain["bits_per_dim"])


# Priors and posteriors


def test_a_residual_posterior_without_residual_is_the_prior() -> None:
    model, (x, _) = perturbed(hvae(decoder={"residual_posterior": True})), digits(4)
    for layer in model.ladder.layers:
        for p in layer.posterior_block.convs[-1].parameters():
            nn.init.zeros_(p)
    terms = model.likelihoods()["elbo"].terms(x, {}, torch.Generator().manual_seed(0))
    assert all(not value.any() for name, value in terms.items() if name != "reconstruction")
    # Without the prior as reference, a zero output is the posterior N(0, 1), which is not the prior.
    for layer in model.ladder.layers:
        layer.residual_posterior = False
    terms = model.likelihoods()["elbo"].terms(x, {}, torch.Generator().manual_seed(0))
    assert all((value > 0).all() for name, value in terms.items() if name != "reconstruction")


def test_the_spread_of_latents_is_proportional_to_the_temperature() -> None:
    model = perturbed(hvae(temperature=0.0))
    seen: list[tuple[Tensor, DiagonalGaussian]] = []
    original = TopDownBlock.forward

    def watch(self: TopDownBlock, h: Tensor, z: Tensor) -> Tensor:
        seen.append((z, priors[-1]))
        return original(self, h, z)

    priors: list[DiagonalGaussian] = []
    original_prior = TopDownBlock.prior

    def prior(self: TopDownBlock, h: Tensor) -> Any:
        found = original_prior(self, h)
        priors.append(found[0])
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TopDownBlock, "forward", watch)
        patch.setattr(TopDownBlock, "prior", prior)
        for temperature in (0.0, 0.5, 1.0):
            model.temperature = temperature
            seen.clear()
            model.sample(400, generator=torch.Generator().manual_seed(0))
            assert len(seen) == len(model.ladder.layers) == 6
            for z, p in seen:
                spread = ((z - p.mean) / p.log_std.exp()).std().item()
                assert spread == pytest.approx(temperature, abs=0.05)
                assert temperature or torch.equal(z, p.mean)
    model.temperature = 0.7
    assert "temperature 0.7" in model.sampling_description()


def test_a_sample_takes_one_pass_of_the_decoder() -> None:
    assert draw_samples(hvae(), 5, seed=0).nfe == {"decoder": 1}


def test_keeping_all_latents_reconstructs_the_image() -> None:
    model, (x, _) = perturbed(hvae()), digits(4)
    assert isinstance(model, SupportsReconstruction) and isinstance(model, SupportsVisualization)
    grids = model.visualize(x, {}, generator=torch.Generator().manual_seed(0))
    reconstruction = model.reconstruct(x, {}, generator=torch.Generator())
    kept = grids["kept_latents"]
    assert kept.shape == (4, 1 + 3, 1, 8, 8) and torch.equal(kept[:, 0], x)
    assert torch.allclose(kept[:, -1], reconstruction, atol=1e-5)
    assert not torch.allclose(kept[:, 1], reconstruction, atol=1e-2)
    between = grids["interpolation"]
    assert between.shape == (2, 9, 1, 8, 8)
    assert torch.allclose(between[:, [0, -1]].flatten(0, 1), reconstruction, atol=1e-5)
    cold = grids["temperatures"]
    assert cold.shape == (5, 4, 1, 8, 8)
    # At temperature 0 all images are equal; at temperature 1 they differ.
    assert torch.allclose(cold[-1], cold[-1, :1].expand(4, -1, -1, -1), atol=1e-6)
    assert not torch.allclose(cold[0, 0], cold[0, 1], atol=1e-2)


def test_images_of_a_batch_are_independent() -> None:
    model, (x, _) = perturbed(hvae()).train(), digits(8)
    both = model.losses(x, {}, source(8))["loss"]
    half = model.losses(x[4:], {}, RandomSource(torch.Generator().manual_seed(0), 4, 8, 8))["loss"]
    assert torch.allclose(both[4:], half, atol=1e-5)


def test_padding_is_not_scored_and_is_black_in_samples() -> None:
    spec = DataSpec("padded", (1, 12, 12), num_bins=17, padding=2)
    model = perturbed(hvae(spec))
    x = torch.zeros(2, 1, 12, 12)
    h = torch.randn(2, model.likelihood.decoder_channels, 12, 12)
    moved = h.clone()
    moved[..., :2, :] += 1
    assert torch.equal(model.likelihood.log_prob(h, x), model.likelihood.log_prob(moved, x))
    for images in (
        model.sample(3, generator=torch.Generator().manual_seed(0)),
        model.reconstruct(x, {}, generator=torch.Generator()),
    ):
        assert (images[..., :2, :] == -1).all() and (images[..., -2:] == -1).all()
        assert (images[..., 2:-2, 2:-2] != -1).any()


def test_conditional_samples_have_the_requested_class() -> None:
    spec = DataSpec("marks", (1, 4, 4), num_classes=2, num_bins=17)
    x = torch.full((2, 1, 4, 4), -0.5)
    x[0, :, :2], x[1, :, 2:] = 0.5, 0.5
    x, cond = x.repeat(8, 1, 1, 1), {"label": torch.arange(2).repeat(8)}
    model = hvae(spec, conditional=True, decoder={"num_decoder_blocks": 1})
    learn(model, model.configure_optimizers(), x, cond, range(60))
    drawn = model.sample(16, cond, generator=torch.Generator().manual_seed(0))
    assert (drawn - x).square().mean() < 0.25 * (drawn + x).square().mean()  # -x belongs to the other class
    with pytest.raises(UserError, match="label"):
        model.sample(2, generator=torch.Generator())


# Gradient skipping


class LatestMetrics(DummyLogger):
    """Keeps the metrics that were logged last."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.latest = metrics


def fit(
    folder: Path, *, steps: int, until: int | None = None, resume: bool = False, factor: float = 1e6,
    planted: Container[int] = (3,),
) -> Any:  # fmt: skip
    """Train with a Trainer; the losses of the steps in ``planted`` are multiplied by ``factor``, which is huge or
    NaN."""

    class Planted(HVAE):
        def losses(self, x: Tensor, cond: Any, rng: RandomSource) -> dict[str, Tensor]:
            found = super().losses(x, cond, rng)
            if self.trainer.callbacks[0].step not in planted:  # type: ignore[attr-defined]
                return found
            return {**found, "loss": found["loss"] * factor}

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, model: Any, outputs: Any, *_: Any) -> None:
            step = trainer.callbacks[0].step
            weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
            metrics.append({name: float(value.detach()) for name, value in outputs.items()})
            if step == until:
                trainer.should_stop = True

    weights: list[dict[str, Tensor]] = []
    metrics: list[dict[str, float]] = []
    torch.manual_seed(0)
    model = Planted(
        Digits.spec, decoder=partial(TopDownDecoder, **SMALL), likelihood=DiscretizedLogistic, grad_skip=400.0,
        grad_clip=200.0,
        optimizer=partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
    )  # fmt: skip
    callbacks = [TrainingClock(0, 16, Budget(steps=steps)), EMA(0.9), Watch(), MetricLogger(2), Checkpoints(folder)]
    trainer = pl.Trainer(
        callbacks=callbacks, plugins=[AtomicCheckpointIO()], logger=LatestMetrics(), max_epochs=-1, limit_val_batches=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    checkpoint = folder / "last.ckpt" if resume else None
    trainer.fit(model, datamodule=Digits(batch_size=16), ckpt_path=checkpoint, weights_only=resume or None)
    return model, callbacks, weights, metrics


def test_a_step_with_a_huge_gradient_is_skipped_also_when_resumed(tmp_path: Path) -> None:
    model, callbacks, weights, metrics = fit(tmp_path / "whole", steps=7)
    assert metrics[3]["grad_norm"] > 400 > metrics[2]["grad_norm"] > 0
    for name, value in weights[3].items():
        assert torch.equal(value, weights[2][name]), name
    changed = [any(not torch.equal(b[name], a[name]) for name in a) for a, b in pairwise(weights)]
    assert changed == [True, True, False, True, True, True]
    assert [row["skipped"] for row in metrics] == [0, 0, 0, 1, 0, 0, 0]
    assert model.skipped_steps == 1
    # The optimiser has taken six steps, not seven.
    steps = {int(state["step"]) for state in model.trainer.optimizers[0].state.values()}
    assert steps == {6}

    fit(tmp_path / "broken", steps=7, until=4)
    resumed, again, _, _ = fit(tmp_path / "broken", steps=7, resume=True)
    assert_same_state(model, resumed)
    for name, value in callbacks[1].average.items():
        assert torch.equal(value, again[1].average[name]), name


def test_a_step_with_a_nonfinite_loss_is_skipped_and_logged_as_skipped(tmp_path: Path) -> None:
    model, _, weights, _ = fit(tmp_path, steps=6, factor=math.nan, planted=(3, 4, 5))
    assert model.skipped_steps == 3
    for name, value in weights[5].items():
        assert torch.equal(value, weights[2][name]), name
    # The last metrics of six steps are for steps 5 and 6, both skipped; those of four steps are for 3 (skipped) and 4.
    logged = model.trainer.logger.latest
    assert logged["train/skipped"] == 1 and "train/loss" not in logged
    model, _, _, metrics = fit(tmp_path / "half", steps=4, factor=math.nan)
    logged = model.trainer.logger.latest
    assert logged["train/skipped"] == 0.5
    assert logged["train/loss"] == pytest.approx(metrics[2]["loss"])
    assert logged["train/grad_norm"] == pytest.approx(metrics[2]["grad_norm"])


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1e6, math.nan])
def test_training_ends_after_too_many_consecutive_skips(factor: float, tmp_path: Path) -> None:
    steps = range(3, 3 + MAX_CONSECUTIVE_SKIPS)
    with pytest.raises(TrainingStopped, match=r"50 consecutive steps .*grad_skip=400.*lower learning rate"):
        fit(tmp_path / "all", steps=60, factor=factor, planted=steps)
    model, *_ = fit(tmp_path / "but one", steps=60, factor=factor, planted={*steps, 54} - {30})
    assert model.skipped_steps == 50


def test_bernoulli_likelihoods_of_grey_images_give_no_bits_per_dim() -> None:
    x, _ = digits(4)
    grey = hvae(likelihood=BernoulliLikelihood)
    assert not grey.likelihoods() and "bits_per_dim" not in grey.losses(x, {}, source(4))
    assert "bits_per_dim" in hvae().losses(x, {}, source(4))


@pytest.mark.parametrize(("norm", "skip", "clip", "expected"), [
    (3.0, None, None, 3.0), (3.0, 2.0, 1.0, None), (3.0, 4.0, 1.0, 1.0), (math.nan, 4.0, 1.0, None),
    (math.inf, 4.0, 1.0, None), (3.0, 4.0, None, 3.0),
])  # fmt: skip
def test_gradients_are_kept_clipped_or_removed(
    norm: float, skip: float | None, clip: float | None, expected: float | None
) -> None:
    model = hvae(grad_skip=skip, grad_clip=clip)
    optimizer = model.configure_optimizers()
    first = next(model.parameters())
    first.grad = torch.zeros_like(first)
    first.grad.flatten()[0] = norm
    model.on_before_optimizer_step(optimizer)
    assert (first.grad is None) == (expected is None)
    assert expected is None or first.grad.norm().item() == pytest.approx(expected, rel=1e-4)
    assert model.skipped_steps == (expected is None)


def train_on_part(rank: int, world: int) -> dict[str, Tensor]:
    """Train one of ``world`` processes for four steps under DDP; in the third, only the last process has a huge
    gradient."""
    model = hvae(grad_skip=1e4, grad_clip=1.0, optimizer=partial(torch.optim.AdamW, lr=1e-3, eps=1e-2))

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor, rng: RandomSource) -> Tensor:
            return self.model.losses(x, {}, rng)["loss"].mean()

    step, optimizer = nn.parallel.DistributedDataParallel(Step()), model.configure_optimizers()
    x, _ = digits(32)
    rows = slice(rank * 8 // world, (rank + 1) * 8 // world)
    for k in range(4):
        rng = RandomSource(torch.Generator().manual_seed(k), rows.start, rows.stop, 8)
        loss = step(x[8 * k :][rows], rng)
        optimizer.zero_grad()
        (loss * (1e6 if k == 2 and rank == world - 1 else 1)).backward()
        model.on_before_optimizer_step(optimizer)
        optimizer.step()
    return model.state_dict()


@needs_fork
def test_two_processes_skip_and_learn_the_same_as_one(tmp_path: Path) -> None:
    (alone,) = in_processes(1, tmp_path, train_on_part)
    first, second = in_processes(2, tmp_path, train_on_part)
    assert alone["skipped_steps"] == first["skipped_steps"] == 1
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(value, first[name], atol=1e-5), name


# Networks


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 64, 64), (1, 28, 28), (2, 12, 20), (1, 2, 2), (2, 1, 1)])
def test_every_weight_gets_a_gradient_at_every_image_size(shape: tuple[int, int, int]) -> None:
    spec = DataSpec("any", shape, num_classes=3, num_bins=9)
    model = perturbed(hvae(spec, decoder={"num_decoder_blocks": 1}, conditional=True))
    x = torch.rand(3, *shape) * 2 - 1
    model.losses(x, {"label": torch.arange(3)}, source(3))["loss"].mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert model.ladder.shapes[-1][1:] == (1, 1)


def test_resolutions_without_latents_have_a_block_and_no_kl() -> None:
    """There are no latent layers at 8x8, one at 4x4 and two at 1x1, each with 4 channels."""
    model, (x, _) = perturbed(hvae(decoder={"num_decoder_blocks": [0, 1, 2]})), digits(3)
    assert set(model.terms(x, {}, source(3))) == {"reconstruction", "kl_1x1", "kl_4x4"}
    assert model.latent_dim == 2 * 4 + 4 * 16
    assert model.visualize(x, {}, generator=torch.Generator())["kept_latents"].shape == (3, 1 + 2, 1, 8, 8)
    model.losses(x, {}, source(3))["loss"].mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_prior_is_initialised_to_a_standard_normal() -> None:
    model = hvae()
    found: list[DiagonalGaussian] = []
    model.ladder(
        torch.zeros(2, dtype=torch.int64), lambda layer, h, prior: found.append(prior) or torch.randn_like(prior.mean)
    )
    assert all(not p.mean.any() and not p.log_std.any() for p in found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"grad_skip": 0.0}, "grad_skip"),
        ({"kl_warmup_steps": -1}, "kl_warmup_steps"),
        ({"decoder": {"channels": 0}}, "channels"),
        ({"decoder": {"bottleneck_ratio": 0.0}}, "bottleneck_ratio"),
        ({"decoder": {"num_encoder_blocks": [1, 2]}}, "num_encoder_blocks.*8x8, 4x4, 1x1"),
        ({"decoder": {"num_decoder_blocks": [2, -1, 1]}}, "num_decoder_blocks"),
        ({"decoder": {"num_decoder_blocks": [2, 1, 0]}}, "num_decoder_blocks.*coarsest"),
        ({"decoder": {"num_decoder_blocks": 0}}, "num_decoder_blocks.*coarsest"),
        ({"decoder": {"num_decoder_blocks": 1.5}}, "num_decoder_blocks"),
    ],
)
def test_invalid_settings_raise_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        hvae(**options)


@pytest.mark.parametrize(
    ("family", "decoder", "message"),
    [("hvae", "resnet", "model/decoder=vdvae"), ("hvae", "mlp", "model/decoder=vdvae"), ("vae", "vdvae", "model=hvae")],
)
def test_a_decoder_of_another_model_is_refused(
    family: str, decoder: str, message: str, cli: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(f"model={family}", f"model/decoder={decoder}", "trainer=cpu") == 1
    assert message in capsys.readouterr().err
