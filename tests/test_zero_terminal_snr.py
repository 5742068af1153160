"""Zero terminal SNR: a table of betas that ends in 1, so that sampling starts from what the model was trained on.

The data are the three correlated Gaussian pixels of gaussian_truth.py, and networks are exact, so samples, bounds and
densities are known.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from composing import options
from gaussian_truth import COVARIANCE, MEAN, error, true_moments
from gencompare.diffusion import editing
from gencompare.diffusion.data_likelihood import DataLikelihood
from gencompare.diffusion.denoiser import Denoiser
from gencompare.diffusion.discrete_schedules import BetaTable, CosineBetas, LinearBetas, rescale_to_zero_terminal_snr
from gencompare.diffusion.guidance import ClassifierGuidance
from gencompare.diffusion.likelihoods import ODELikelihood, VLBLikelihood
from gencompare.diffusion.objectives import UniformVWeighting, WeightedMSE
from gencompare.diffusion.parameterizations import (
    X0,
    EDMPreconditioning,
    Parameterization,
    PosteriorMean,
    TimestepConditioning,
    V,
)  # fmt: skip
from gencompare.diffusion.schedules import ZERO_SNR, NoiseSchedule
from gencompare.diffusion.times import KarrasGrid, LogNormalTimes, LogSNRGrid, QuadraticGrid, UniformGrid
from gencompare.diffusion.variational_objectives import DiscreteVLB
from gencompare.errors import UserError
from gencompare.rng import RandomSource, generator, normal_like
from parts import denoiser_samplers, part, samplers

pytestmark = pytest.mark.usefixtures("double")
SHAPE = (1, 1, 3)
PIXELS = DataLikelihood(None, torch.ones(1, 1, 3), 3)
T = 200


def cosine(beta_max: float = 1.0) -> CosineBetas:
    return CosineBetas(num_train_timesteps=T, beta_max=beta_max)


SCHEDULES: dict[str, Callable[[], BetaTable]] = {
    "cosine": cosine,
    "linear": lambda: LinearBetas(5e-4, 0.1, T, zero_terminal_snr=True),
    "list": lambda: BetaTable([*torch.linspace(0.001, 0.1, T - 1).tolist(), 1.0]),
}


class ExactNetwork(nn.Module):
    """Returns the expected target of ``parameterization``, which is linear in x_0 and eps, for Gaussian data."""

    def __init__(self, schedule: NoiseSchedule, parameterization: Parameterization) -> None:
        super().__init__()
        self.schedule, self.parameterization = schedule, parameterization

    def forward(self, x: Tensor, noise_cond: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        at = self.schedule.at((noise_cond + 1) / T, x)
        if isinstance(self.parameterization, EDMPreconditioning):
            x = x * self.parameterization._r(at)
        alpha, sigma = at.alpha.flatten()[:, None, None], at.sigma.flatten()[:, None, None]
        covariance, mean = COVARIANCE.to(x), MEAN.to(x)
        inverse = torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(3).to(x))
        off = x.flatten(1)[:, None] - alpha * mean
        x0 = (mean + alpha * off @ inverse @ covariance).view_as(x)
        eps = (sigma * off @ inverse).view_as(x)
        return self.parameterization.target(x0, eps, at)


def exact(
    schedule: NoiseSchedule, parameterization: type[Parameterization] = V, dtype: torch.dtype = torch.float64
) -> Denoiser:
    how = parameterization(TimestepConditioning(T))  # type: ignore[call-arg]
    schedule = schedule.to(dtype)
    return Denoiser(ExactNetwork(schedule, how), schedule, how)


def images(n: int, seed: int = 0) -> Tensor:
    noise = torch.randn(n, 3, generator=generator("cpu", seed))
    return (MEAN + noise @ torch.linalg.cholesky(COVARIANCE).T).view(n, *SHAPE)


def nearly(schedule: BetaTable) -> BetaTable:
    """Return a table whose last beta is slightly below 1."""
    log_alpha_bar = torch.nn.functional.logsigmoid(schedule.table)
    betas = -torch.expm1(log_alpha_bar.diff(prepend=torch.zeros(1)))
    return BetaTable([*betas[:-1].tolist(), 1 - 1e-6])


def sampler_named(name: str, steps: int = 50, **changes: Any) -> Any:
    slow = {"num_langevin_steps": 3} if name == "annealed_langevin" else {}
    return part("sampler", name, num_steps=steps, **slow, **changes)


# Schedules


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_last_step_is_pure_noise_and_the_others_are_those_of_the_table(name: str) -> None:
    schedule = SCHEDULES[name]()
    schedule.check()
    assert schedule.ends_in_pure_noise and float(schedule.table[-1]) == ZERO_SNR
    at = schedule.at(schedule.discrete_times)
    assert float(at.alpha[-1]) < 1e-12 and float(at.sigma[-1]) == 1
    assert schedule.prior_mismatch(torch.tensor(1.0)) is None
    assert not cosine(0.999).ends_in_pure_noise
    if name == "cosine":
        assert torch.equal(schedule.table[:-1], cosine(0.999999999).table[:-1])


def test_rescaling_keeps_the_first_step_and_removes_all_signal_from_the_last() -> None:
    """The published algorithm 1, in the form of its code."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas_bar_sqrt = (1 - betas).cumprod(0).sqrt()
    first, last = alphas_bar_sqrt[0].clone(), alphas_bar_sqrt[-1].clone()
    rescaled = (alphas_bar_sqrt - last) * first / (first - last)
    alphas_bar = rescaled**2
    alphas = torch.cat([alphas_bar[:1], alphas_bar[1:] / alphas_bar[:-1]])
    torch.testing.assert_close(rescale_to_zero_terminal_snr(betas), 1 - alphas, rtol=1e-9, atol=1e-12)
    table = part("schedule", "scaled_linear", beta_start=0.00085, beta_end=0.012, zero_terminal_snr=True)
    torch.testing.assert_close(torch.sigmoid(table.table[:-1]), alphas_bar[:-1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("grid", [UniformGrid(), QuadraticGrid(), LogSNRGrid(), KarrasGrid()])
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_every_grid_starts_at_the_last_step_and_spends_one_step_on_pure_noise(grid: Any, steps: int) -> None:
    schedule = cosine()
    times = grid(schedule, steps)
    assert len(times) == steps + 1 and float(times[0]) == 1
    assert (schedule.log_snr(times[1:-1]) > -30).all()


# Sampling


@pytest.mark.parametrize("parameterization", [V, X0, EDMPreconditioning, PosteriorMean])
@pytest.mark.parametrize("name", denoiser_samplers())
def test_samples_have_the_moments_of_the_data(name: str, parameterization: type[Parameterization]) -> None:
    """The error is that of a finite number of steps: no larger than if the last beta is 0.999."""
    sampler = sampler_named(name)
    found = error(sampler, exact(cosine(), parameterization), sampler.times(cosine()))
    usual = cosine(0.999)
    expected = error(sampler, exact(usual, parameterization), sampler.times(usual))
    # Euler's method takes a DDIM step out of pure noise, which is of the same order.
    assert found < 1.2 * expected + (0.015 if name == "euler" else 1e-4), (found, expected)


@pytest.mark.parametrize(
    "name", ["heun", "restart", "dpmpp_2m", "dpmpp_2s", "unipc", "deis", "sa_solver", "er_sde", "rk45"]
)
def test_samplers_of_higher_order_reproduce_the_data(name: str) -> None:
    # The error of the two steps of a restart does not depend on the grid.
    sampler = sampler_named(name, T, **({"restart_steps": 10} if name == "restart" else {}))
    assert error(sampler, exact(cosine()), sampler.times(cosine())) < 5e-3


@pytest.mark.parametrize("grid", [KarrasGrid(), LogSNRGrid(), QuadraticGrid()])
def test_other_grids_reproduce_the_data(grid: Any) -> None:
    sampler = replace(sampler_named("dpmpp_2m", 60), grid=grid)
    assert error(sampler, exact(cosine()), sampler.times(cosine())) < 0.01


def test_pure_noise_alone_gives_the_mean_of_the_data() -> None:
    """A schedule with signal at its end starts from noise of the wrong mean, and its samples keep part of the error."""
    errors = []
    for schedule in (SCHEDULES["linear"](), LinearBetas(5e-4, 0.02, T)):
        denoiser, times = exact(schedule), UniformGrid()(schedule, T)
        noise = torch.zeros(1, *SHAPE)  # the mean of the prior
        out = sampler_named("ddim", T).sample(denoiser, noise, generator=generator("cpu", 0), times=times)
        errors.append(float((out.flatten() - MEAN).abs().max()))
    assert errors[0] < 5e-3 < 0.1 < errors[1]


@pytest.mark.parametrize("parameterization", [V, X0])
@pytest.mark.parametrize("name", samplers())
def test_sampling_in_float32_equals_float64(name: str, parameterization: type[Parameterization]) -> None:
    outs = []
    for dtype in (torch.float32, torch.float64):
        sampler = sampler_named(name, **({"rtol": 1e-3, "atol": 1e-3} if name == "rk45" else {}))
        denoiser = exact(cosine(), parameterization, dtype)
        x = torch.randn(8, *SHAPE, generator=generator("cpu", 1), dtype=torch.float32).to(dtype)
        outs.append(sampler.sample(denoiser, x, generator=generator("cpu", 2)))
    torch.testing.assert_close(outs[0].double(), outs[1], rtol=0, atol=5e-3)


def test_encoding_to_pure_noise_and_back_returns_the_image() -> None:
    denoiser, x = exact(cosine()), images(20)
    same, noise, back = editing.round_trip(denoiser, x, {})
    assert torch.equal(same, x) and torch.isfinite(noise).all()
    torch.testing.assert_close(back, x, rtol=0, atol=0.02)
    known = torch.tensor([True, False, False]).view(1, 1, 3)
    filled = editing.inpaint(sampler_named("ddim"), denoiser, x, known, generator=generator("cpu", 0))
    assert torch.equal(filled[..., 0], x[..., 0]) and torch.isfinite(filled).all()


def test_a_classifier_does_not_guide_pure_noise() -> None:
    class Classifier(nn.Module):
        schedule = cosine()

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.stack([x.flatten(1).sum(1), -x.flatten(1).sum(1)], 1)

    denoiser, x = exact(cosine()), images(4)
    guidance = ClassifierGuidance(scale=2.0, classifier=Classifier())
    guided = guidance.predict(denoiser, x, torch.tensor(1.0), {"label": torch.zeros(4, dtype=torch.int64)}, dict)
    assert torch.equal(guided.x0, denoiser(x, torch.tensor(1.0), {}).x0)


# Likelihoods


def nats(x: Tensor) -> Tensor:
    normal = torch.distributions.MultivariateNormal(MEAN, COVARIANCE)
    return -normal.log_prob(x.flatten(1))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("parameterization", [V, X0])
def test_the_bound_is_that_of_a_last_beta_slightly_below_1(name: str, parameterization: type[Parameterization]) -> None:
    x, schedule = images(2000), SCHEDULES[name]()

    def terms(schedule: BetaTable, num_samples: int | None, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        denoiser = exact(schedule, parameterization, dtype)
        return VLBLikelihood(num_samples).terms(denoiser, x.to(dtype), {}, PIXELS, generator("cpu", 1))

    every, some, expected = terms(schedule, None), terms(schedule, 8), terms(nearly(schedule), None)
    for key, value in every.items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-4)
    assert every["prior"].abs().max() < 1e-12
    gap = torch.stack(list(every.values())).sum(0) - nats(x) / (3 * math.log(2))
    assert float(gap.mean()) > -4 * float(gap.std()) / len(x) ** 0.5, "an upper bound"
    difference = some["diffusion"] - every["diffusion"]
    assert abs(float(difference.mean())) < 4 * float(difference.std()) / len(x) ** 0.5
    for key, value in terms(SCHEDULES[name](), None, torch.float32).items():
        torch.testing.assert_close(value.double().mean(), every[key].mean(), rtol=0, atol=5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_density_of_the_probability_flow_is_exact(dtype: torch.dtype) -> None:
    """The flow starts at the first step, whose noise is small compared with the data."""
    x = images(5).to(dtype)
    found = -ODELikelihood(exact_trace=True).log_density(exact(cosine(), V, dtype), x, {}, generator("cpu", 0))
    usual = -ODELikelihood(exact_trace=True).log_density(exact(cosine(0.999), V, dtype), x, {}, generator("cpu", 0))
    torch.testing.assert_close(found, usual, rtol=0, atol=2e-3)
    torch.testing.assert_close(found.double(), nats(x.double()), rtol=0, atol=0.02)


# Training


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["v", "x0"])
@pytest.mark.parametrize("objective", ["uniform_v", "vlb_discrete"])
def test_the_last_step_is_trained_on_the_error_of_the_image(name: str, objective: str, dtype: torch.dtype) -> None:
    """At pure noise, the loss of v is the squared error of the image, and that of the bound its difference in SNR."""
    schedule, how = cosine().to(dtype), part("parameterization", name)
    loss = part("objective", objective).with_likelihood(PIXELS)
    loss.check(schedule, how)
    output = nn.Parameter(torch.full((1, *SHAPE), 0.3, dtype=dtype))

    class Constant(nn.Module):
        def forward(self, x: Tensor, noise_cond: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
            return output.expand_as(x)

    x0 = images(T).to(dtype)  # stratified times: image i is at step i + 1
    source = RandomSource(generator("cpu", 0), 0, T, T, dtype)
    losses = loss(Denoiser(Constant(), schedule, how), x0, {}, source)["loss"]
    assert torch.isfinite(losses).all()
    drawn = RandomSource(generator("cpu", 0), 0, T, T, torch.float64).stratified()
    last = int(drawn.argmax())
    sign = -1 if name == "v" else 1
    squared = (x0[last] - sign * 0.3).double().square().sum()
    before = float(schedule.table.double()[-2].exp())
    expected = squared / 3 if objective == "uniform_v" else T * before * squared / 2 / (3 * math.log(2))
    assert float(losses[last].detach()) == pytest.approx(float(expected), rel=1e-3)
    losses[last].backward()
    assert output.grad is not None and torch.isfinite(output.grad).all() and output.grad.abs().max() > 0


@pytest.mark.parametrize("name", options("model/parameterization"))
def test_parameterisations_that_cannot_predict_the_image_are_refused(name: str) -> None:
    how = part("parameterization", name)
    if name in ("v", "x0", "karras", "posterior_mean"):
        how.check(cosine())
    else:
        with pytest.raises(UserError, match=r"ends in pure noise .* use model/parameterization=v or x0"):
            how.check(cosine())
    how.check(cosine(0.999))


@pytest.mark.parametrize("name", options("model/objective"))
def test_objectives_that_do_not_train_the_last_step_are_refused(name: str) -> None:
    loss, how = part("objective", name), V()
    if name in ("uniform_v", "vlb", "vlb_discrete"):
        loss.check(cosine(), how)
        return
    with pytest.raises(UserError, match=r"uniform_v|does not learn|use model/schedule="):
        loss.check(cosine(), how)


def test_times_that_never_reach_the_last_step_are_refused() -> None:
    with pytest.raises(UserError, match="LogNormalTimes never draws"):
        WeightedMSE(UniformVWeighting(), LogNormalTimes()).check(cosine(), V())
    assert DiscreteVLB().check(cosine(), V()) is None


RUN = [
    "model=ddpm", "data=digits", "trainer=cpu", "trainer.global_batch_size=16", "budget=steps", "budget.steps=3",
    "model/network=mlp", "model.sampler.num_steps=5", "callbacks.evaluation.num_evaluations=1", "logger=none",
    "callbacks.evaluation.num_samples=0", "callbacks.evaluation.num_grid_images=4", "evaluation.num_images=40",
    "evaluation.extractors=[classifier]", "evaluation.protocol.num_likelihood_images=10", "hydra.run.dir=run",
    "evaluation.checkpoints=[last]", "model.schedule.beta_max=1",
]  # fmt: skip


def test_a_run_with_zero_terminal_snr(
    cli: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_default_dtype(torch.float32)
    for overrides, advice in (
        (["model/objective=uniform_v"], "model/parameterization=v or x0"),
        (["model/parameterization=v"], "use model/objective=uniform_v"),
    ):
        assert cli(*RUN, *overrides) == 1
        message = capsys.readouterr().err.strip()
        assert advice in message and len(message.splitlines()) == 1, message
        assert not (tmp_path / "run").exists()
    assert cli(*RUN, "model/parameterization=v", "model/objective=uniform_v") == 0
    (result,) = json.loads((tmp_path / "run" / "record.json").read_text())["results"]
    assert math.isfinite(result["metrics"]["bpd_vlb"]["value"])


def test_moments_start_from_pure_noise() -> None:
    """The tests above start from the exact distribution of x_T, which is the prior."""
    mean, covariance = true_moments(cosine(), torch.tensor(1.0))
    torch.testing.assert_close(mean, torch.zeros(3), rtol=0, atol=1e-12)
    torch.testing.assert_close(covariance, torch.eye(3), rtol=0, atol=1e-12)
    x = images(3)
    at = cosine().at(torch.tensor(1.0), x)
    noise = normal_like(x, generator("cpu", 0))
    torch.testing.assert_close(at.alpha * x + at.sigma * noise, noise, rtol=0, atol=1e-12)
