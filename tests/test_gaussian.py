"""The Gaussian baseline against closed forms from scipy."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from scipy.integrate import quad
from scipy.stats import multivariate_normal, norm

from gencompare.data.digits import Digits
from gencompare.errors import UserError
from gencompare.generative_model import DataSpec
from gencompare.models.gaussian import GaussianBaseline
from gencompare.rng import generator
from parts import assert_same_state

PLANE = DataSpec(name="plane", shape=(3, 1, 1), num_classes=2, num_bins=None)


def plane(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return 3-d points of two classes in a ratio of 3 to 1, with non-diagonal covariances, and their labels."""
    source = generator("cpu", "plane")
    label = (torch.arange(n) % 4 == 0).long()
    mix = torch.tensor(
        [[[0.2, 0.0, 0.0], [0.1, 0.1, 0.0], [-0.1, 0.05, 0.05]], [[0.1, 0, 0], [0, 0.2, 0], [0, 0.1, 0.1]]]
    )
    centre = torch.tensor([[0.2, -0.3, 0.1], [-0.4, 0.2, 0.0]])
    x = centre[label] + (mix[label] @ torch.randn(n, 3, 1, generator=source))[..., 0]
    return x.view(n, 3, 1, 1), label


@pytest.mark.parametrize("conditional", [False, True])
def test_density_is_the_maximum_likelihood_mixture(conditional: bool) -> None:
    x, label = plane(400)
    model = GaussianBaseline(PLANE, conditional=conditional).fit(
        [(x[:150], {"label": label[:150]}), (x[150:], {"label": label[150:]})]
    )
    points, classes = x[:50].flatten(1).double().numpy(), label[:50].numpy()
    densities = []
    for k in range(2):
        own = x[label == k].flatten(1).double().numpy()
        covariance: Any = np.cov(own.T, bias=True)
        densities.append(multivariate_normal(own.mean(0), covariance).pdf(points))
    expected = np.where(classes == 0, *densities) if conditional else 0.75 * densities[0] + 0.25 * densities[1]
    found = model.bits_per_dim(x[:50], model.select_conditions({"label": label[:50]}))
    np.testing.assert_allclose(found.numpy(), -np.log2(expected) / 3, rtol=1e-5)
    assert model.likelihoods()["density"].kind == "exact"


def test_low_rank_covariances_are_probabilistic_pca() -> None:
    """With rank 1, the variance in all other directions is the mean of the other eigenvalues."""
    x, _ = plane(300)
    flat = x.flatten(1).double().numpy()
    values, vectors = np.linalg.eigh(np.cov(flat.T, bias=True))
    rest = values[:2].mean()
    lead = vectors[:, 2]
    covariance = rest * np.eye(3) + (values[2] - rest) * np.outer(lead, lead)
    model = GaussianBaseline(PLANE, per_class=False, max_parameters=3).fit([(x, {})])
    assert model.rank == 1
    expected = -multivariate_normal(flat.mean(0), covariance).logpdf(flat) / math.log(2) / 3
    np.testing.assert_allclose(model.bits_per_dim(x, {}).numpy(), expected, rtol=1e-5)


def test_the_gram_matrix_gives_the_same_covariance() -> None:
    """With 5 images of 12 values, the Gram matrix of the images is used."""
    spec = DataSpec(name="wide", shape=(3, 2, 2), num_bins=256)
    x = torch.rand(5, 3, 2, 2, generator=generator("cpu", 3)) * 2 - 1
    model = GaussianBaseline(spec).fit([(x, {})])
    flat = x.flatten(1).double().numpy()
    step = 2 / 255
    covariance = np.cov(flat.T, bias=True) + step**2 / 12 * np.eye(12)
    w, s = model.factor[0].detach().double(), float(model.variance[0].detach())
    np.testing.assert_allclose((w.T @ w + s * torch.eye(12)).numpy(), covariance, atol=1e-6)


def test_discrete_bits_average_over_dequantisation_and_are_a_bound() -> None:
    """For one pixel of four values, the average equals the integral over the bin and is never below -log2 of its
    probability."""
    spec = DataSpec(name="pixel", shape=(1, 1, 1), num_bins=4)
    levels = torch.tensor([0, 1, 1, 1, 2, 2, 3, 1, 2, 1])
    x = (levels * 2 / 3 - 1).view(-1, 1, 1, 1)
    model = GaussianBaseline(spec).fit([(x, {})])
    step, values = 2 / 3, x.flatten().double().numpy()
    normal: Any = norm(values.mean(), math.sqrt(values.var() + step**2 / 12))
    density = model.likelihoods()["density"]
    assert (density.kind, density.method) == ("exact", "uniform dequantisation")
    for level in range(4):
        centre = level * step - 1
        average = quad(lambda u, c=centre: normal.logpdf(c + u), -step / 2, step / 2)[0] / step
        found = float(model.bits_per_dim(torch.full((1, 1, 1, 1), centre), {}))
        assert found == pytest.approx(-(average + math.log(step)) / math.log(2), rel=1e-6)
        assert found >= -math.log2(normal.cdf(centre + step / 2) - normal.cdf(centre - step / 2))


def test_samples_have_the_moments_of_the_data() -> None:
    """The moments agree within five standard errors; clamping to [-1, 1] has no effect here."""
    x, label = plane(400)
    model = GaussianBaseline(PLANE, conditional=True).fit([(x, {"label": label})])
    n = 40_000
    for k in range(2):
        cond = {"label": torch.full((n,), k)}
        drawn = model.sample(n, cond, generator=generator("cpu", 1)).flatten(1).double().numpy()
        own = x[label == k].flatten(1).double().numpy()
        deviation = own.std(0)
        np.testing.assert_array_less(np.abs(drawn.mean(0) - own.mean(0)), 5 * deviation / math.sqrt(n))
        scale = np.outer(deviation, deviation)
        assert np.abs((np.cov(drawn.T) - np.cov(own.T, bias=True)) / scale).max() < 5 * math.sqrt(2 / n)


def test_unconditional_samples_have_the_class_weights() -> None:
    x, label = plane(400)
    model = GaussianBaseline(PLANE).fit([(x, {"label": label})])
    drawn = model.sample(20_000, generator=generator("cpu", 2))
    densities = torch.stack([model._log_density(drawn.flatten(1), k) for k in range(2)], 1)
    share = float((densities[:, 1] > densities[:, 0]).double().mean())
    assert share == pytest.approx(0.25, abs=0.02)


def test_the_ridge_improves_held_out_likelihood() -> None:
    data = Digits()
    few = list(itertools.islice(data.batches("train", 100), 3))
    plain = GaussianBaseline(data.spec).fit(few)
    ridged = GaussianBaseline(data.spec).fit(few, data.batches("val"))
    x, cond = next(data.batches("test"))
    assert ridged.bits_per_dim(x, cond).mean() < plain.bits_per_dim(x, cond).mean() - 0.1


def test_padding_is_black_and_adds_no_bits() -> None:
    small = DataSpec(name="s", shape=(1, 2, 2), num_bins=256)
    padded = DataSpec(name="p", shape=(1, 6, 6), num_bins=256, padding=2)
    x = torch.rand(30, 1, 2, 2, generator=generator("cpu", 4)) * 2 - 1
    wide = torch.nn.functional.pad(x, (2,) * 4, value=-1.0)
    one, two = GaussianBaseline(small).fit([(x, {})]), GaussianBaseline(padded).fit([(wide, {})])
    torch.testing.assert_close(one.bits_per_dim(x, {}), two.bits_per_dim(wide, {}))
    drawn = two.sample(3, generator=generator("cpu", 0))
    assert drawn.shape == (3, 1, 6, 6)
    torch.testing.assert_close(padded.crop(drawn), one.sample(3, generator=generator("cpu", 0)))
    assert (drawn[:, :, :2] == -1).all() and (drawn[..., -2:] == -1).all()


def test_one_training_step_fits_everything(tmp_path) -> None:
    data = Digits(batch_size=16)
    model = GaussianBaseline(data.spec)
    trainer = pl.Trainer(
        max_epochs=1, limit_train_batches=1, limit_val_batches=0, accelerator="cpu", logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    expected = GaussianBaseline(data.spec).fit(data.batches("train"), data.batches("val"))
    assert_same_state(expected, model)
    assert model.closed_form and not model.averaged_parameters()


def test_a_single_gaussian_cannot_be_conditional() -> None:
    with pytest.raises(UserError, match="per_class"):
        GaussianBaseline(PLANE, conditional=True, per_class=False)
