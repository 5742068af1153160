"""Objectives beyond the weighted squared error, the part of a model that each one trains, and couplings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from composing import options
from forking import in_processes, needs_fork
from gencompare.diffusion import variational_objectives
from gencompare.diffusion.data_likelihood import DataLikelihood
from gencompare.diffusion.denoiser import Denoiser
from gencompare.diffusion.discrete_schedules import BetaTable, LinearBetas
from gencompare.diffusion.learned_schedule import LearnedSchedule
from gencompare.diffusion.objectives import IndependentCoupling, MinibatchOT, WeightedMSE
from gencompare.diffusion.parameterizations import Eps, LearnedVariance, Velocity
from gencompare.diffusion.schedules import NoiseSchedule, RectifiedFlow, VariancePreserving
from gencompare.diffusion.variational_objectives import ContinuousVLB, DiscreteVLB, Hybrid
from gencompare.errors import UserError
from gencompare.rng import RandomSource, generator
from parts import part

SHAPE = (1, 2, 2)
PIXELS = DataLikelihood(None, torch.ones(1, 2, 2), 4)


pytestmark = pytest.mark.usefixtures("double")


class Scaled(nn.Module):
    """Outputs a x_t in the first channels and b in all further channels, where a and b are trainable."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.7))
        self.b = nn.Parameter(torch.tensor(0.2))
        self.outputs = outputs

    def forward(self, x: Tensor, noise: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([self.a * x, *[self.b.expand_as(x)] * (self.outputs - 1)], 1)


def images(n: int) -> Tensor:
    return torch.rand(n, *SHAPE, generator=generator("cpu", 4)) * 2 - 1


def rng(n: int) -> RandomSource:
    return RandomSource.for_batch(generator("cpu", 9), n)


@pytest.mark.parametrize("name", options("model/objective"))
def test_every_objective_in_conf_trains(name: str) -> None:
    network, x0 = Scaled(2), images(6)
    denoiser = Denoiser(network, LinearBetas(), LearnedVariance())
    if name == "meanflow":
        network = Scaled(1)
        denoiser = Denoiser(network, RectifiedFlow(), Velocity())
    objective = part("objective", name).with_likelihood(PIXELS)
    loss = objective(denoiser, x0, {}, rng(6))["loss"]
    assert loss.shape == (6,) and torch.isfinite(loss).all()
    loss.mean().backward()
    assert network.a.grad is not None and torch.isfinite(network.a.grad) and network.a.grad != 0


# The hybrid objective


def gradients(objective: Any, network: Scaled, schedule: NoiseSchedule, n: int = 40) -> tuple[float, float]:
    network.zero_grad()
    denoiser = Denoiser(network, schedule, LearnedVariance())
    objective.with_likelihood(PIXELS)(denoiser, images(n), {}, rng(n))["loss"].mean().backward()
    return tuple(0.0 if p.grad is None else float(p.grad) for p in (network.a, network.b))  # type: ignore[return-value]


def test_hybrid_trains_the_mean_on_l_simple_and_the_variance_on_the_bound() -> None:
    schedule, network = LinearBetas(num_train_timesteps=40, beta_end=0.5), Scaled(2)
    simple, bound = (gradients(o, network, schedule) for o in (WeightedMSE(), DiscreteVLB()))
    hybrid = gradients(Hybrid(vlb_weight=0.25), network, schedule)
    assert simple[1] == 0 and abs(bound[0]) > 0.1 and abs(bound[1]) > 0.1
    assert hybrid[0] == pytest.approx(simple[0], rel=1e-12), "the bound does not train the mean"
    assert hybrid[1] == pytest.approx(0.25 * bound[1], rel=1e-12)


def test_hybrid_needs_a_learned_variance() -> None:
    with pytest.raises(UserError, match="eps_learned_variance"):
        Hybrid().check(LinearBetas(), Eps())
    with pytest.raises(UserError, match=r"objective\.vlb"):
        Hybrid(vlb_weight=0)
    with pytest.raises(UserError, match=r"objective\.num_timesteps"):
        DiscreteVLB(num_timesteps=0)


# The bound as an objective, computed by hand for one Gaussian pixel

BETA = np.array([0.05, 0.1, 0.2, 0.4])
BAR = np.cumprod(1 - BETA)


def normal_kl(mean: np.ndarray, var: np.ndarray, other_mean: np.ndarray, other_var: np.ndarray) -> np.ndarray:
    return 0.5 * (np.log(other_var / var) + (var + (mean - other_mean) ** 2) / other_var - 1)


@pytest.mark.parametrize("variance_fraction", [None, 0.0, 0.6, 1.0])
def test_discrete_terms_are_kl_divergences_of_gaussians(variance_fraction: float | None) -> None:
    """The terms are those of Ho et al. (2020), eq. 5 to 7, written out for each step, with variances as in Nichol and
    Dhariwal (2021), eq. 15."""
    n, schedule, network = 40, BetaTable(BETA.tolist()), Scaled(1 if variance_fraction is None else 2)
    if variance_fraction is not None:
        network.b.data.fill_(2 * variance_fraction - 1)
    x0 = images(n)
    denoiser = Denoiser(network, schedule, Eps() if variance_fraction is None else LearnedVariance())
    found = DiscreteVLB(likelihood=PIXELS)(denoiser, x0, {}, rng(n))

    source = generator("cpu", 9)
    u = (torch.rand((), generator=source, dtype=torch.float32) + torch.arange(n, dtype=torch.float32) / n) % 1
    i = (u * 4).long().numpy()
    eps = torch.randn(n, *SHAPE, generator=source, dtype=torch.float32).double().numpy()
    x = x0.numpy()
    bar, beta = BAR[i][:, None, None, None], BETA[i][:, None, None, None]
    before = np.where(i > 0, BAR[i - 1], 1)[:, None, None, None]
    x_t = bar**0.5 * x + (1 - bar) ** 0.5 * eps
    guess = (x_t - (1 - bar) ** 0.5 * 0.7 * x_t) / bar**0.5
    small = np.where(before < 1, (1 - before) / (1 - bar) * beta, beta)
    kl = normal_kl(
        before**0.5 * beta / (1 - bar) * x, small, before**0.5 * beta / (1 - bar) * guess,
        beta ** (variance_fraction or 0) * small ** (1 - (variance_fraction or 0)),
    )  # fmt: skip
    nll = 0.5 * (x - guess) ** 2 / (1 - bar) + 0.5 * np.log(2 * np.pi * (1 - bar))
    term = 4 * np.where(before < 1, kl, nll).sum((1, 2, 3))
    prior = normal_kl(BAR[-1] ** 0.5 * x, 1 - BAR[-1], 0, 1).sum((1, 2, 3))
    np.testing.assert_allclose(found["loss"].detach().numpy(), (term + prior) / (4 * np.log(2)), rtol=1e-8)
    np.testing.assert_allclose(found["prior"].numpy(), prior / (4 * np.log(2)), rtol=1e-9)
    assert set(i) == {0, 1, 2, 3}


class Bent(VariancePreserving):
    """A log-SNR that falls from ``top`` to ``bottom`` like t^bend, with trainable endpoints and bend."""

    t_min = 0.0

    def __init__(self, bend: float, trained: bool = False, top: float = 6.0, bottom: float = -4.0) -> None:
        super().__init__()
        values = [nn.Parameter(torch.tensor(v), requires_grad=trained) for v in (bend, top, bottom)]
        self.bend, self.top, self.bottom = values

    def log_snr(self, t: Tensor) -> Tensor:
        return self.top + (self.bottom - self.top) * (0.3 * t + 0.7 * (t + 1e-9) ** self.bend)


def test_continuous_bound_does_not_depend_on_the_interior_of_the_schedule() -> None:
    """As in Kingma et al. (2021), section 5.1, the bound depends only on the endpoints."""

    def learned(height: float = 0.0, bias: float = 0.0, gamma_min: float = -6.0) -> LearnedSchedule:
        """Return a schedule where one sigmoid is larger by ``height`` and all sigmoids are shifted by ``bias``."""
        schedule = LearnedSchedule(gamma_min=gamma_min, gamma_max=4.0, num_features=8).requires_grad_(False)
        schedule.height[2] += height
        schedule.bias += bias
        return schedule

    n, x0 = 40_000, images(1)
    means, scatters, halfway = [], [], []
    for schedule in (learned(), learned(60.0), learned(40.0, -3.0), learned(gamma_min=0.0)):
        halfway.append(float(schedule.log_snr(torch.tensor(0.5))))
        denoiser = Denoiser(Scaled(), schedule, Eps())
        loss = ContinuousVLB(likelihood=PIXELS)(denoiser, x0.expand(n, *SHAPE), {}, rng(n))["loss"].detach()
        means.append(float(loss.mean()))
        scatters.append(float(loss.std()) / math.sqrt(n))
    for k in (1, 2):
        assert abs(halfway[k] - halfway[0]) > 2, "the interior has changed"
        assert abs(means[k] - means[0]) < 4 * math.hypot(scatters[k], scatters[0])
    assert abs(means[3] - means[0]) > 10 * math.hypot(scatters[3], scatters[0])


def test_bound_trains_the_endpoints_and_variance_trains_the_interior() -> None:
    """The endpoints have the gradient of the mean loss, and the interior has the gradient of the mean squared diffusion
    term (Kingma et al. 2021, appendix I.2)."""
    n, h = 64, 1e-5

    def metrics(**moved: float) -> dict[str, Tensor]:
        """Compute metrics under a fixed schedule."""
        denoiser = Denoiser(network, Bent(**({"bend": 2.0} | moved)), Eps())
        return ContinuousVLB(likelihood=PIXELS)(denoiser, images(n), {}, rng(n))

    network, schedule = Scaled(), Bent(2.0, trained=True)
    found = ContinuousVLB(likelihood=PIXELS)(Denoiser(network, schedule, Eps()), images(n), {}, rng(n))
    torch.testing.assert_close(found["loss"], metrics()["loss"], rtol=1e-9, atol=0)
    found["loss"].mean().backward()
    for name, value in (("top", 6.0), ("bottom", -4.0)):
        more, less = (float(metrics(**{name: value + d})["loss"].detach().mean()) for d in (h, -h))
        assert float(getattr(schedule, name).grad) == pytest.approx((more - less) / (2 * h), rel=1e-5)
    more, less = (float(metrics(bend=2.0 + d)["diffusion"].square().mean()) for d in (h, -h))
    assert float(schedule.bend.grad) == pytest.approx((more - less) / (2 * h), rel=1e-5)
    plain = [float(metrics(bend=2.0 + d)["diffusion"].mean()) for d in (h, -h)]
    assert abs(float(schedule.bend.grad)) > 3 * abs(plain[0] - plain[1]) / (2 * h), "not the gradient of the bound"
    network.zero_grad()
    metrics()["loss"].mean().backward()
    expected = float(network.a.grad)  # type: ignore[arg-type]
    network.zero_grad()
    again = ContinuousVLB(likelihood=PIXELS)(Denoiser(network, schedule, Eps()), images(n), {}, rng(n))
    again["loss"].mean().backward()
    assert float(network.a.grad) == pytest.approx(expected, rel=1e-9)  # type: ignore[arg-type]


def test_training_the_interior_lowers_the_variance_and_keeps_the_bound() -> None:
    schedule, n = Bent(0.6, trained=True), 512
    denoiser = Denoiser(Scaled(), schedule, Eps())
    optimizer = torch.optim.Adam([schedule.bend], lr=0.05)
    source, seen = generator("cpu", 3), []
    for _ in range(120):
        optimizer.zero_grad()
        found = ContinuousVLB(likelihood=PIXELS)(denoiser, images(n), {}, RandomSource.for_batch(source, n))
        found["loss"].mean().backward()
        optimizer.step()
        seen.append((float(found["diffusion"].var()), float(found["diffusion"].mean())))
    (before, mean_before), (after, mean_after) = (np.mean(s, 0) for s in (seen[:10], seen[-10:]))
    assert after < 0.7 * before
    assert mean_after == pytest.approx(mean_before, rel=0.1)


def test_only_a_variance_preserving_schedule_can_be_learned() -> None:
    class Loose(NoiseSchedule):
        t_min = 0.0

        def __init__(self) -> None:
            super().__init__()
            self.end = nn.Parameter(torch.tensor(8.0))

        def log_alpha(self, t: Tensor) -> Tensor:
            return torch.zeros_like(t)

        def log_snr(self, t: Tensor) -> Tensor:
            return self.end - 12 * t

    with pytest.raises(UserError, match="Loose"):
        ContinuousVLB().check(Loose(), Eps())


@pytest.mark.parametrize("bug", ["none", "factor 2", "sign", "no prior"])
def test_deliberate_bugs_make_the_bound_wrong(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Gaussian data with the exact network, the bound is exact to 0.03 bits/dim; with a bug it is not."""
    n, variance = 200_000, 0.6
    x0 = variance**0.5 * torch.randn(n, *SHAPE, generator=generator("cpu", 1))
    schedule = Bent(1.0, top=6.0, bottom=-1.0)

    class Perfect(nn.Module):
        def forward(self, x: Tensor, noise: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
            log_snr = ((noise - 500) / 25)[:, None, None, None]
            alpha2 = torch.sigmoid(log_snr)
            return (1 - alpha2).sqrt() * x / (alpha2 * variance + 1 - alpha2)

    if bug == "factor 2":
        right = variational_objectives.NoisyBatch.squared_eps_error
        monkeypatch.setattr(variational_objectives.NoisyBatch, "squared_eps_error", lambda *args: 2 * right(*args))
    if bug == "sign":
        slope = variational_objectives.ScheduleValues.dlog_snr_dt.func  # type: ignore[attr-defined]
        monkeypatch.setattr(variational_objectives.ScheduleValues, "dlog_snr_dt", property(lambda self: -slope(self)))
    if bug == "no prior":
        monkeypatch.setattr(variational_objectives, "prior_kl", lambda schedule, x0: x0.new_zeros(len(x0)))
    loss = ContinuousVLB(likelihood=PIXELS)(Denoiser(Perfect(), schedule, Eps()), x0, {}, rng(n))["loss"]
    exact = x0.square().flatten(1).mean(1) / (2 * variance) + 0.5 * math.log(2 * math.pi * variance)
    gap = loss - exact / math.log(2)
    noise = float(gap.std()) / math.sqrt(n)
    assert noise < 0.02
    assert (-3 * noise < float(gap.mean()) < 0.03) == (bug == "none")


# Couplings


def pairing(x0: Tensor, eps: Tensor) -> list[int]:
    found = MinibatchOT()(x0, eps)
    rows = [int((eps == row).flatten(1).all(1).nonzero()) for row in found]
    assert sorted(rows) == list(range(len(x0))), "a permutation"
    return rows


def cost(x0: Tensor, eps: Tensor) -> float:
    return float((x0 - eps).square().sum())


def test_optimal_transport_is_the_pairing_of_least_cost() -> None:
    for seed in range(5):
        source = generator("cpu", seed)
        x0, eps = (torch.randn(5, *SHAPE, generator=source) for _ in range(2))
        best = min(itertools.permutations(range(5)), key=lambda order: cost(x0, eps[list(order)]))
        assert pairing(x0, eps) == list(best)


def test_optimal_transport_on_a_line_sorts() -> None:
    x0, eps = torch.randn(30, 1, 1, 1), torch.randn(30, 1, 1, 1)
    found = MinibatchOT()(x0, eps).flatten()
    assert torch.equal(found[x0.flatten().argsort()], eps.flatten().sort().values)
    assert cost(x0, found.view_as(eps)) <= cost(x0, eps)


def test_coupling_permutes_only_the_noise() -> None:
    class Nothing(nn.Module):
        def forward(self, x: Tensor, noise: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
            seen.append((x, cond["label"]))
            return torch.zeros_like(x)

    seen: list[tuple[Tensor, Tensor]] = []
    schedule, x0, label = LinearBetas(), images(8), torch.arange(8)
    for coupling in (IndependentCoupling(), MinibatchOT()):
        WeightedMSE(coupling=coupling)(Denoiser(Nothing(), schedule, Eps()), x0, {"label": label}, rng(8))
    source = generator("cpu", 9)
    u = (torch.rand((), generator=source, dtype=torch.float32) + torch.arange(8, dtype=torch.float32) / 8) % 1
    at = schedule.at(((u * 1000).long() + 1) / 1000, x0)
    eps = torch.randn(8, *SHAPE, generator=source, dtype=torch.float32).double()
    for (x_t, labels), noise in zip(seen, (eps, MinibatchOT()(x0, eps)), strict=True):
        torch.testing.assert_close(x_t, at.alpha * x0 + at.sigma * noise, rtol=0, atol=1e-6)
        assert torch.equal(labels, label)
    assert not torch.equal(seen[0][0], seen[1][0])


def pair_part(rank: int, world: int, starts: list[int]) -> dict[str, Tensor]:
    """Return the noise that one of several processes draws for its images, of a global batch and of its own batch."""
    rows = slice(starts[rank], starts[rank + 1])
    x0 = images(12)[rows]
    divided = RandomSource(generator("cpu", 3), rows.start, rows.stop, 12)
    return {
        "global": MinibatchOT().draw(x0, divided),
        "own": MinibatchOT().draw(x0, RandomSource.for_batch(generator("cpu", 4), len(x0))),
    }


@needs_fork
@pytest.mark.parametrize("starts", [[0, 6, 12], [0, 5, 12], [0, 4, 8, 12]])
def test_optimal_transport_pairs_the_global_batch_on_any_number_of_processes(starts: list[int], tmp_path: Path) -> None:
    """Each process pairs its own batch if the batch is not divided, as under a plain Trainer."""
    whole = pair_part(0, 1, [0, 12])["global"]
    parts = in_processes(len(starts) - 1, tmp_path, pair_part, starts)
    assert torch.equal(torch.cat([each["global"] for each in parts]), whole)
    noise = RandomSource.for_batch(generator("cpu", 3), 12).normal(SHAPE).double()
    assert torch.equal(whole, MinibatchOT()(images(12), noise))
    for each, (start, stop) in zip(parts, itertools.pairwise(starts), strict=True):
        own = RandomSource.for_batch(generator("cpu", 4), stop - start).normal(SHAPE).double()
        assert torch.equal(each["own"], MinibatchOT()(images(12)[start:stop], own))
