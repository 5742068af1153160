"""The diffusion model as a whole: composed, trained and sampled."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from composing import compose, options
from gencompare.diffusion.parameterizations import (
    Eps,
    LogSigmaConditioning,
    LogSNRConditioning,
    NoiseConditioning,
    TimeConditioning,
    TimestepConditioning,
)
from gencompare.diffusion.samplers import Sampler
from gencompare.diffusion.schedules import VariancePreserving
from gencompare.diffusion.variational_objectives import ContinuousVLB, DiscreteVLB, Hybrid
from gencompare.errors import UserError
from gencompare.generative_model import DataSpec
from gencompare.models.diffusion import Diffusion
from gencompare.networks.mlp import DenoisingMLP
from gencompare.rng import RandomSource, generator
from parts import part

SPEC = DataSpec(name="points", shape=(2, 1, 1), num_classes=3, num_bins=None)


def diffusion(network: Any = partial(DenoisingMLP, width=32, depth=2), **changes: Any) -> Diffusion:
    torch.manual_seed(0)
    parts: dict[str, Any] = {
        "schedule": part("schedule", "linear"),
        "parameterization": part("parameterization", "eps"),
        "objective": part("objective", "simple"),
        "sampler": part("sampler", "ddim", num_steps=8),
    }
    return Diffusion(SPEC, network=network, **(parts | changes))


def test_only_bounds_train_a_learned_schedule() -> None:
    learned, bound = part("schedule", "learned"), part("objective", "vlb")
    with pytest.warns(UserWarning, match="does not train the schedule.*keeps its initial values"):
        model = diffusion(schedule=learned)
    assert not any(p.requires_grad for p in model.schedule.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = diffusion(schedule=part("schedule", "learned"), objective=bound)
    assert all(p.requires_grad for p in model.schedule.parameters())


def test_only_hybrid_and_discrete_bound_train_a_learned_variance() -> None:
    """With these two losses, the variance output has a gradient. With others it has none, and a warning says so."""
    for name in options("model/objective"):
        if name == "meanflow":  # needs a network that predicts the velocity
            continue
        learned, sampler = part("parameterization", "eps_learned_variance"), part("sampler", "consistency")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = diffusion(parameterization=learned, objective=part("objective", name), sampler=sampler)
        messages = [str(warning.message) for warning in caught]
        x = torch.rand(8, 2, 1, 1, generator=generator("cpu", 0))
        model.losses(x, {}, RandomSource.for_batch(generator("cpu", 0), 8))["loss"].mean().backward()
        last = [p for p in model.network.parameters() if len(p) == 4][-1]  # eps and variance, two channels each
        assert last.grad is not None and last.grad[:2].abs().max() > 0
        trained = bool(last.grad[2:].abs().max() > 0)
        assert trained == (name in ("hybrid", "vlb_discrete")), name
        assert ["does not train the variance" in line for line in messages] == ([] if trained else [True]), name


def test_learned_variance_overrides_the_setting_of_the_sampler() -> None:
    """The setting affects neither the samples nor their description."""
    samples, descriptions = [], []
    for variance in (0.0, 1.0):
        changes = {"sampler": part("sampler", "ancestral", num_steps=8, variance=variance), "objective": Hybrid()}
        model = diffusion(parameterization=part("parameterization", "eps_learned_variance"), **changes)
        samples.append(model.sample(3, generator=generator("cpu", 0)))
        descriptions.append(model.sampling_description())
    assert torch.equal(*samples)
    assert descriptions == ["Ancestral, 8 steps, learned variance, x0 clipped"] * 2
    assert diffusion(sampler=changes["sampler"]).sampling_description() == "Ancestral, 8 steps, variance 1, x0 clipped"


def composed(overrides: str) -> Diffusion:
    """Build the model from space-separated overrides, where later overrides replace earlier ones."""
    values = dict(override.split("=", 1) for override in overrides.split())
    cfg = compose("data=toy2d", *(f"{name}={value}" for name, value in values.items()))
    network = partial(DenoisingMLP, width=8, depth=1)
    return instantiate(cfg.model, _partial_=True, _convert_="all")(spec=SPEC, network=network)


@pytest.mark.filterwarnings("ignore:.*does not train the schedule")
@pytest.mark.parametrize("parameterization", ["eps", "v", "x0"])
@pytest.mark.parametrize("name", options("model/schedule"))
def test_schedules_and_parameterizations_can_be_combined(name: str, parameterization: str) -> None:
    """The sweep in docs/diffusion.md trains the same combinations. With the simple loss, a learned schedule keeps its
    initial values."""
    model = composed(
        f"model=ddpm model/schedule={name} model/parameterization={parameterization} model.sampler.num_steps=5"
    )
    loss = model.losses(torch.rand(4, 2, 1, 1), {}, RandomSource.for_batch(generator("cpu", 0), 4))["loss"]
    assert loss.isfinite().all()
    assert model.sample(4, generator=generator("cpu", 0)).isfinite().all()


@pytest.mark.parametrize(
    ("overrides", "named", "alternative"),
    [
        ("model=vdm model/objective=vlb_discrete", "DiscreteVLB.*Learned", "model.objective.num_timesteps=50"),
        ("model=ddpm model/objective=hybrid", "Hybrid", "model/parameterization=eps_learned_variance"),
        ("model=iddpm model/schedule=vp", "Hybrid.*VP", "model/schedule=cosine"),
        ("model=iddpm model/schedule=vp", "Hybrid.*VP", "model/parameterization=eps model/objective=simple"),
    ],
)
def test_incompatible_objective_is_rejected_before_training(overrides: str, named: str, alternative: str) -> None:
    """The alternative suggested by the message gives a model that trains."""
    with pytest.raises(UserError, match=named) as error:
        composed(overrides)
    assert alternative in str(error.value)
    loss = composed(f"{overrides} {alternative}").losses(
        torch.rand(4, 2, 1, 1), {}, RandomSource.for_batch(generator("cpu", 0), 4)
    )["loss"]
    assert loss.isfinite().all()


def test_no_more_steps_than_those_of_the_schedule() -> None:
    with pytest.raises(UserError, match=r"objective\.num_timesteps=1001.*1000"):
        diffusion(objective=DiscreteVLB(num_timesteps=1001))
    diffusion(objective=DiscreteVLB(num_timesteps=1000))


def along(grid: str, first: float) -> Sampler:
    return replace(part("sampler", "ddim", num_steps=3), grid=part("sampler/grid", grid, log_snr_start=first))


@pytest.mark.parametrize(
    ("change", "left", "instead"),
    [
        # The root of the product of 1 - beta over 100 betas from 1e-4 to 0.02, a tenth of DDPM's 1000 steps.
        (
            {"schedule": ("linear", {"num_train_timesteps": 100})},
            0.6,
            {"schedule": ("linear", {"num_train_timesteps": 100, "beta_end": 0.2})},
        ),
        ({"schedule": ("vp", {}), "sampler": ("log_snr", 0.0)}, 0.71, {"sampler": ("log_snr", -4.5)}),
        ({"schedule": ("rectified", {}), "sampler": ("karras", 0.0)}, 0.5, {"sampler": ("karras", -9.0)}),
    ],
)
def test_sampling_must_start_from_pure_noise(
    change: dict[str, tuple[str, Any]], left: float, instead: dict[str, tuple[str, Any]]
) -> None:
    def build(parts: dict[str, tuple[str, Any]]) -> Diffusion:
        name, settings = parts["schedule"]
        own = {"sampler": along(*parts["sampler"])} if "sampler" in parts else {}
        return diffusion(schedule=part("schedule", name, **settings), **own)

    with pytest.raises(UserError, match=f"a fraction {left} of the image remains"):
        build(change)
    build(change | instead)


def test_replaced_sampler_must_start_from_pure_noise_too() -> None:
    """``evaluation.samplers`` replaces the sampler of a model in this way. If training may still change the end of the
    schedule, there is a warning instead of an error."""
    model = diffusion()
    model.sampler = along("log_snr", -2.0)
    with pytest.raises(UserError, match="starts from pure noise"):
        model.sample(2, generator=generator("cpu", 0))
    with (
        pytest.warns(UserWarning, match="does not train the schedule"),
        pytest.raises(UserError, match=r"pure noise.*Learned"),
    ):
        diffusion(schedule=part("schedule", "learned", gamma_max=2.0))
    with pytest.warns(UserWarning, match="starts from pure noise"):
        diffusion(schedule=part("schedule", "learned", gamma_max=2.0), objective=ContinuousVLB())


POINT = torch.tensor([0.4, -0.8])


class ExactPointNetwork(nn.Module):
    """The exact eps network for data at one point: (x_t - alpha x_0) / sigma, with DDPM's alpha and sigma."""

    def __init__(self, shape: Any, out_channels: int, num_classes: int) -> None:
        super().__init__()
        bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
        self.register_buffer("alpha", bar.sqrt().float())
        self.register_buffer("sigma", (1 - bar).sqrt().float())

    def forward(self, x: Tensor, noise_cond: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        # Find the step whose noise condition, 500 + 25 log-SNR, is closest.
        log_snr = 2 * torch.log(self.alpha / self.sigma)  # type: ignore[operator]
        k = (500 + 25 * log_snr[None] - noise_cond[:, None]).abs().argmin(1)
        alpha, sigma = self.alpha[k, None, None, None], self.sigma[k, None, None, None]  # type: ignore[index]
        return (x - alpha * POINT[:, None, None]) / sigma


def test_exact_network_has_zero_loss_and_samples_the_data() -> None:
    model = diffusion(ExactPointNetwork)
    x = POINT.expand(200, 2)[..., None, None].contiguous()
    loss = model.losses(x, {}, RandomSource.for_batch(generator("cpu", 0), 200))["loss"]
    assert loss.shape == (200,) and loss.max() < 1e-5
    off_by_one = diffusion(ExactPointNetwork, schedule=part("schedule", "linear", beta_end=0.0201))
    assert off_by_one.losses(x, {}, RandomSource.for_batch(generator("cpu", 0), 200))["loss"].max() > 1e-5
    for sampler in (part("sampler", "ddim", num_steps=20), part("sampler", "ancestral", num_steps=50)):
        found = diffusion(ExactPointNetwork, sampler=sampler).sample(30, generator=generator("cpu", 1))
        torch.testing.assert_close(found[:, :, 0, 0], POINT.expand(30, 2), rtol=0, atol=2e-3)


def test_training_learns_the_data() -> None:
    """Samples have the means, variances and weights of the data, which are two narrow modes on the diagonal."""
    model = diffusion(partial(DenoisingMLP, width=48, depth=2), sampler=part("sampler", "ddim", num_steps=25))
    source = generator("cpu", 7)

    def data(n: int) -> Tensor:
        side = (torch.rand(n, 1, generator=source) < 0.7).float() * 2 - 1
        return (0.5 * side + 0.1 * torch.randn(n, 2, generator=source))[..., None, None]

    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(400):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / 400)
        optimizer.zero_grad()
        model.losses(data(128), {}, RandomSource.for_batch(source, 128))["loss"].mean().backward()
        optimizer.step()
    x = model.sample(2000, generator=generator("cpu", 3))[:, :, 0, 0]
    share = float((x[:, 0] > 0).float().mean())
    assert abs(share - 0.7) < 0.06, "the weight of each mode"
    assert ((x[:, 0] > 0) == (x[:, 1] > 0)).float().mean() > 0.98, "both coordinates choose the same mode"
    right = x[x[:, 0] > 0]
    torch.testing.assert_close(right.mean(0), torch.tensor([0.5, 0.5]), rtol=0, atol=0.03)
    torch.testing.assert_close(right.std(0), torch.tensor([0.1, 0.1]), rtol=0, atol=0.04)


class LabelNetwork(nn.Module):
    """Predicts the point (k / 4, k / 4) for class k."""

    def __init__(self, shape: Any, out_channels: int, num_classes: int) -> None:
        super().__init__()
        assert num_classes == 3

    def forward(self, x: Tensor, noise_cond: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return (cond["label"] / 4)[:, None, None, None].expand_as(x)


def test_labels_condition_the_samples() -> None:
    model = diffusion(LabelNetwork, conditional=True, parameterization=part("parameterization", "x0"))
    label = torch.tensor([0, 1, 2, 0])
    one = model.sample(4, {"label": label}, generator=generator("cpu", 1))
    assert torch.equal(one, model.sample(4, {"label": label}, generator=generator("cpu", 1)))
    torch.testing.assert_close(one, (label / 4)[:, None, None, None].expand(4, 2, 1, 1), rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="needs a class for each image"):
        model.sample(4, generator=generator("cpu", 1))
    with pytest.raises(UserError, match="conditional"):
        Diffusion(DataSpec(name="x", shape=(2, 1, 1)), network=DenoisingMLP, conditional=True, **_parts())


def _parts() -> dict[str, Any]:
    model = diffusion()
    return {name: getattr(model, name) for name in ("schedule", "parameterization", "objective", "sampler")}


def test_unconditional_model_ignores_labels() -> None:
    model = diffusion()
    x, label = torch.rand(4, 2, 1, 1), torch.arange(4) % 3
    assert model.select_conditions({"label": label}) == {}
    assert not any("label" in name for name, _ in model.named_parameters())
    assert model.validation_metrics(x, {"label": label}, RandomSource.for_batch(generator("cpu", 0), 4))[
        "loss"
    ].shape == (4,)


def test_samples_stay_in_range_for_any_network() -> None:
    class Wild(ExactPointNetwork):
        def forward(self, x: Tensor, noise_cond: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
            return 30 * torch.sin(7 * x)

    x = diffusion(Wild).sample(20, generator=generator("cpu", 1))
    assert x.min() >= -1 and x.max() <= 1
    assert x.dtype == torch.float32


def test_incompatible_parts_are_rejected_before_training() -> None:
    with pytest.raises(UserError, match="no more than 10 steps"):
        diffusion(
            schedule=part("schedule", "linear", num_train_timesteps=10, beta_end=0.5),
            sampler=part("sampler", "ddim", num_steps=11),
        )

    class Rises(VariancePreserving):
        t_min = 0.0

        def log_snr(self, t: Tensor) -> Tensor:
            return t

    with pytest.raises(UserError, match="not strictly decreasing"):
        diffusion(schedule=Rises())


@pytest.mark.parametrize(("first", "std"), [(None, 100.0), (-2.0, math.e)])
def test_sampling_starts_from_the_noise_of_its_first_time(first: float | None, std: float) -> None:
    """VE has sigma = exp(1) at log-SNR -2, and sigma = 100 at its end."""
    sampler = part("sampler", "ddim", num_steps=3) if first is None else along("log_snr", first)
    seen: list[Tensor] = []

    class Watches(ExactPointNetwork):
        def forward(self, x: Tensor, noise_cond: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
            seen.append(x)
            return x

    diffusion(Watches, schedule=part("schedule", "ve"), sampler=sampler).sample(3000, generator=generator("cpu", 0))
    assert abs(float(seen[0].std()) / std - 1) < 0.03


def test_a_learned_schedule_trains_with_the_network_and_is_averaged() -> None:
    bound = {"schedule": part("schedule", "learned"), "objective": ContinuousVLB()}
    model = diffusion(**bound)
    assert {"schedule.gamma_min", "schedule.height"} <= set(model.averaged_parameters())
    loss = model.losses(torch.rand(8, 2, 1, 1), {}, RandomSource.for_batch(generator("cpu", 0), 8))["loss"]
    loss.mean().backward()
    assert all(p.grad is not None for p in model.schedule.parameters())
    assert model.sample(2, generator=generator("cpu", 0)).isfinite().all()
    with torch.no_grad():
        model.schedule.gamma_max.fill_(-13.2)
    with pytest.raises(UserError, match="LearnedSchedule has collapsed"):
        model.sample(2, generator=generator("cpu", 0))


def test_other_losses_do_not_train_a_learned_schedule() -> None:
    """Other losses would be minimised by a schedule of pure noise."""
    model = diffusion(schedule=part("schedule", "learned"))
    model.losses(torch.rand(8, 2, 1, 1), {}, RandomSource.for_batch(generator("cpu", 0), 8))["loss"].mean().backward()
    assert all(p.grad is None for p in model.schedule.parameters())


@pytest.mark.parametrize(
    "noise", [TimestepConditioning(), TimeConditioning(), LogSNRConditioning(), LogSigmaConditioning()], ids=str
)
def test_churn_works_with_every_noise_conditioning(noise: NoiseConditioning) -> None:
    model = diffusion(
        parameterization=Eps(noise_conditioning=noise), sampler=part("sampler", "heun", num_steps=5, s_churn=2.0)
    )
    assert model.sample(3, generator=generator("cpu", 0)).isfinite().all()


def test_checkpoints_contain_no_tables() -> None:
    assert all(name.startswith("network.") for name in diffusion().state_dict())


def test_what_is_counted_and_said() -> None:
    model = diffusion()
    calls: list[int] = []
    model.nfe_networks()["network"].register_forward_hook(lambda *_: calls.append(1))
    model.sample(3, generator=generator("cpu", 0))
    assert len(calls) == 8
    assert model.sampling_description() == "DDIM, 8 steps, eta 0, x0 clipped"
    assert diffusion(clip_x0=False).sampling_description() == "DDIM, 8 steps, eta 0"
    thresholded = diffusion(dynamic_threshold=0.995)
    assert thresholded.sampling_description() == "DDIM, 8 steps, eta 0, x0 thresholded at quantile 0.995"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dynamic_threshold": 99.5}, r"dynamic_threshold=99.5 must be a quantile in \(0, 1\]"),
        ({"dynamic_threshold": "high"}, "dynamic_threshold=high must be a number"),
        ({"dynamic_threshold": 0.9, "clip_x0": False}, "needs a model of pixels with model.clip_x0=true"),
    ],
)
def test_dynamic_thresholds_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        diffusion(**changes)
