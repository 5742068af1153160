"""Points in the plane: samples follow the stated density."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gencompare.data.toy2d import DISTRIBUTIONS, Toy2D
from gencompare.errors import UserError

EXACT = {"gaussians8", "two_gaussians", "checkerboard"}


def points(name: str, n: int = 20_000) -> tuple[Toy2D, np.ndarray, torch.Tensor | None]:
    data = Toy2D(name, num_points=n)
    split = data.split("train")
    return data, split.images.flatten(1).double().numpy(), split.labels


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_points_are_fixed_within_the_square_and_splits_are_disjoint(name: str) -> None:
    data, x, labels = points(name)
    assert data.spec.name == f"toy2d_{name}" and data.spec.num_bins is None
    assert np.abs(x).max() < 1.05 and np.abs(x).max() > 0.7
    assert np.mean(np.abs(x).max(1) > 1) < 1e-3, "almost all points are within [-1, 1]"
    assert (labels is None) == (data.spec.num_classes == 0)
    rows = [{tuple(p) for p in data.split(s).images.flatten(1).tolist()} for s in ("train", "val", "test")]
    assert not rows[0] & rows[1] and not rows[0] & rows[2] and not rows[1] & rows[2]
    assert Toy2D(name, num_points=20_000, seed=5).hash("train") == data.hash("train"), (
        "the points do not depend on the seed"
    )


def test_distributions_without_closed_form_have_no_density() -> None:
    assert {name for name in DISTRIBUTIONS if Toy2D(name).log_density(torch.zeros(1, 2)) is not None} == EXACT


@pytest.mark.parametrize("name", sorted(EXACT))
def test_density_integrates_to_one_and_matches_the_points(name: str) -> None:
    data, x, _ = points(name)
    side = 800
    centres = (torch.arange(side, dtype=torch.float64) + 0.5) / side * 3 - 1.5
    grid = torch.cartesian_prod(centres, centres)
    log_p = data.log_density(grid)
    assert log_p is not None and log_p.dtype == torch.float64
    p = log_p.exp().reshape(side, side).numpy()
    cell = (3 / side) ** 2
    assert p.sum() * cell == pytest.approx(1, abs=1e-9 if name != "checkerboard" else 1e-2)
    # Point counts in coarse cells agree with the expected n p within 5 standard deviations.
    coarse = p.reshape(20, 40, 20, 40).sum((1, 3)) * cell
    counts, *_ = np.histogram2d(x[:, 0], x[:, 1], bins=20, range=[[-1.5, 1.5]] * 2)
    n = len(x)
    tolerance = 5 * np.sqrt(n * coarse * (1 - coarse)) + (0.02 * n * coarse if name == "checkerboard" else 0) + 5
    assert (np.abs(counts - n * coarse) < tolerance).all()


def test_log_density_accepts_images_and_points() -> None:
    data = Toy2D("gaussians8", num_points=50)
    x = data.split("val").images
    assert x.shape == (50, 2, 1, 1)
    one, two = data.log_density(x), data.log_density(x.flatten(1))
    assert one is not None and two is not None and one.shape == (50,) and torch.equal(one, two)


def test_two_gaussians_is_the_toy_example_of_ncsn() -> None:
    """The data are those of Song and Ermon (2019), section 3.2.2, 1/5 N(-5, I) + 4/5 N(5, I), divided by 10."""
    data, x, labels = points("two_gaussians")
    assert labels is not None
    assert np.mean(x.sum(1) < 0) == pytest.approx(0.2, abs=5 * 0.4 / math.sqrt(len(x)))
    assert np.array_equal(labels.numpy() == 0, x.sum(1) < 0)
    at = np.array([[0.1, -0.3], [0.5, 0.5], [-0.6, -0.4]])
    y = 10 * at
    expected = np.log(
        0.2 * np.exp(-((y + 5) ** 2).sum(1) / 2) / (2 * np.pi) + 0.8 * np.exp(-((y - 5) ** 2).sum(1) / 2) / (2 * np.pi)
    ) + 2 * np.log(10)
    log_p = data.log_density(torch.tensor(at))
    assert log_p is not None
    np.testing.assert_allclose(log_p.numpy(), expected, rtol=1e-12)


def test_gaussians8_has_its_means_on_a_circle() -> None:
    _, x, labels = points("gaussians8")
    assert labels is not None
    for k in range(8):
        own = x[labels.numpy() == k]
        angle = 2 * np.pi * k / 8
        assert len(own) == pytest.approx(2500, abs=5 * math.sqrt(2500))
        np.testing.assert_allclose(own.mean(0), 0.75 * np.array([np.cos(angle), np.sin(angle)]), atol=0.006)
        np.testing.assert_allclose(own.std(0), 0.05, rtol=0.08)


def test_checkerboard_labels_number_its_squares() -> None:
    _, x, labels = points("checkerboard")
    assert labels is not None
    squares = {k: {tuple(p) for p in np.floor((x[labels.numpy() == k] + 1) * 2).astype(int).tolist()} for k in range(8)}
    assert all(len(own) == 1 for own in squares.values()), "each label is one square"
    dark = set().union(*squares.values())
    assert dark == {(i, j) for i in range(4) for j in range(4) if (i + j) % 2 == 0}


def test_moons_and_swiss_roll_lie_on_their_curves() -> None:
    _, x, labels = points("moons", 4000)
    assert labels is not None
    upper = x * 1.75 + [0.5, 0.25]
    lower = [1.0, 0.5] - upper
    radius = np.where(labels.numpy() == 0, np.hypot(*upper.T), np.hypot(*lower.T))
    assert np.abs(radius - 1).std() < 1.75 * 0.03 and abs(radius.mean() - 1) < 0.005
    half = np.where(labels.numpy() == 0, upper[:, 1], lower[:, 1])
    assert half.min() > -5 * 1.75 * 0.03, "the points lie on half circles"

    _, x, _ = points("swiss_roll", 4000)
    radius = np.hypot(*x.T) / 0.9 * 4.5 * np.pi  # the total angle of a point on the curve
    turns = (radius - np.arctan2(x[:, 1], x[:, 0])) / (2 * np.pi)
    off = np.abs(turns - np.round(turns)) * 2 * np.pi * 0.9 / (4.5 * np.pi)
    assert np.sqrt((off**2).mean()) == pytest.approx(0.02, rel=0.15)
    assert radius.min() > 1.5 * np.pi - 2 and radius.max() < 4.5 * np.pi + 2


def test_unknown_distribution_lists_the_choices() -> None:
    with pytest.raises(UserError, match=r"no distribution 'spiral'.*gaussians8, two_gaussians"):
        Toy2D("spiral")
