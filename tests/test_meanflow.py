"""MeanFlow: exact average velocities, derivatives, the loss against its published formula, and settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gaussian_truth import GivenNoise, GivenTimes, cubature
from gencompare.diffusion import meanflow
from gencompare.diffusion.denoiser import Cond, Denoiser
from gencompare.diffusion.meanflow import MeanFlow, MeanFlowSampler, time_derivative
from gencompare.diffusion.objectives import UniformVelocityWeighting, WeightedMSE
from gencompare.diffusion.parameterizations import TimeConditioning, Velocity
from gencompare.diffusion.schedules import RectifiedFlow
from gencompare.diffusion.times import EqualStepsGrid, TimeDistribution
from gencompare.errors import UserError
from gencompare.generative_model import DataSpec
from gencompare.models.diffusion import Diffusion
from gencompare.rng import RandomSource, generator
from parts import part

pytestmark = pytest.mark.usefixtures("double")

M = 0.4


class AverageVelocity(nn.Module):
    r"""The average velocity of data N(m, V) along their probability-flow ODE, which keeps (x - alpha m) / g with
    :math:`g^2 = \alpha^2 V + \sigma^2`, times a trainable theta of 1.

    Divided by t - r, :math:`g_t^2 - g_r^2` is t + r - V (2 - t - r), so that r = t is no special case.
    """

    def __init__(self, variance: float) -> None:
        super().__init__()
        self.variance, self.theta = variance, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        r = t - cond.get("interval", torch.zeros_like(t))
        t, r = t.view(-1, 1, 1, 1), r.view(-1, 1, 1, 1)
        g_t, g_r = (((1 - s) ** 2 * self.variance + s**2).sqrt() for s in (t, r))
        slope = t + r - self.variance * (2 - t - r)
        return self.theta * (-M + (x - (1 - t) * M) * slope / ((g_t + g_r) * g_t))


def denoiser(network: nn.Module) -> Denoiser:
    return Denoiser(network, RectifiedFlow(), Velocity(TimeConditioning(1.0)))


class Both(TimeDistribution):
    """The given times t, then the given r, (n,)."""

    def __init__(self, t: Tensor, r: Tensor) -> None:
        self.left = [t, r]

    def __call__(self, schedule: Any, rng: Any) -> Tensor:
        self.left.append(self.left.pop(0))
        return self.left[-1]


T, R = torch.tensor([0.3, 0.95, 0.6, 0.8]).double(), torch.tensor([0.1, 0.05, 0.59, 0.4]).double()


def objective(t: Tensor = T, r: Tensor = R, *, ratio: float = 1.0, p: float = 0.0) -> MeanFlow:
    return MeanFlow(times=Both(t, r), ratio=ratio, p=p)


# The average velocity


@pytest.mark.parametrize("calls", [1, 2, 4])
def test_samples_end_on_their_trajectories(calls: int) -> None:
    network, sampler = AverageVelocity(0.3), MeanFlowSampler(num_steps=calls, grid=EqualStepsGrid())
    x, t = torch.randn(5, 1, 1, 2, generator=generator("cpu", 1)), RectifiedFlow.t_max
    samples = sampler.sample(denoiser(network), x, generator=generator("cpu", 2))
    g = ((1 - t) ** 2 * 0.3 + t**2) ** 0.5
    torch.testing.assert_close(samples, M + 0.3**0.5 / g * (x - (1 - t) * M), rtol=0, atol=1e-9)
    euler = part("sampler", "euler", num_steps=calls).sample(denoiser(network), x, generator=generator("cpu", 2))
    assert (euler - samples).abs().max() > 0.01


def test_average_and_instantaneous_velocity_satisfy_the_identity() -> None:
    """u = v - (t - r) du/dt, with the derivative along the trajectory."""
    made, x = denoiser(AverageVelocity(0.3)), torch.randn(4, 1, 2, 2, generator=generator("cpu", 1))
    v = made.output(x, T, made.schedule.at(T, x), {})
    u = made.output(x, T, made.schedule.at(T, x), {"interval": T - R})
    interval = (T - R).view(-1, 1, 1, 1)
    torch.testing.assert_close(u, v - interval * time_derivative(made, x, T, R, v, {}), rtol=0, atol=1e-12)


def expected_gradient(variance: float) -> float:
    """Return the largest expected gradient of theta over several pairs of times."""
    x0, eps = cubature(M, variance)
    found = []
    for t, r in zip(T, R, strict=True):
        network = AverageVelocity(variance)
        loss = objective(t.expand(4), r.expand(4))(denoiser(network), x0, {}, GivenNoise.of(eps))["loss"]
        loss.mean().backward()
        assert network.theta.grad is not None
        found.append(abs(float(network.theta.grad)))
    return max(found)


def test_the_average_velocity_is_a_fixed_point() -> None:
    assert expected_gradient(0.3) < 1e-12


def wrong_sign(*args: Any) -> Tensor:
    return -time_derivative(*args)


def r_moves_with_t(made: Denoiser, x: Tensor, t: Tensor, r: Tensor, v: Tensor, cond: Cond) -> Tensor:
    h = 1e-5
    ends = (made.output(x + s * v, t + s, made.schedule.at(t + s, x), {**cond, "interval": t - r}) for s in (h, -h))
    after, before = ends
    return ((after - before) / (2 * h)).detach()


def x_is_fixed(made: Denoiser, x: Tensor, t: Tensor, r: Tensor, v: Tensor, cond: Cond) -> Tensor:
    return time_derivative(made, x, t, r, torch.zeros_like(v), cond)


@pytest.mark.parametrize("wrong", [wrong_sign, r_moves_with_t, x_is_fixed])
def test_the_fixed_point_detects_wrong_derivatives(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meanflow, "time_derivative", wrong)
    assert expected_gradient(0.3) > 0.01


def test_the_fixed_point_detects_a_gradient_through_the_target() -> None:
    """The gradient of (u - u*)^2 / 2 contains that of the variance of u*."""
    x0, eps = cubature(M, 0.3)
    network = AverageVelocity(0.3)
    t, r = T[1].expand(4), R[1].expand(4)
    x, v, h = (1 - T[1]) * x0 + T[1] * eps, eps - x0, 1e-4

    def u(s: float) -> Tensor:
        return network(x + s * v, t + s, {"interval": t + s - r})

    target = v - (T[1] - R[1]) * (u(h) - u(-h)) / (2 * h)
    (u(0.0) - target).square().mean().backward()
    assert network.theta.grad is not None and abs(float(network.theta.grad)) > 0.01


def test_images_of_a_single_point_have_no_loss() -> None:
    x0, eps = torch.full((4, 1, 1, 1), M), torch.randn(4, 1, 1, 1, generator=generator("cpu", 1))
    loss = objective()(denoiser(AverageVelocity(0.0)), x0, {}, GivenNoise.of(eps))["loss"]
    assert (loss < 1e-24).all()


# Networks and derivatives

SMALL: dict[str, dict[str, Any]] = {
    "unet": {"channels": 8, "num_groups": 4, "attention_resolutions": [4]},
    "dit": {"hidden_size": 16, "depth": 2, "num_heads": 2},
    "mlp": {"width": 16, "depth": 1},
}


def network_of(option: str, *, std: float = 0.2, num_classes: int = 0) -> Any:
    torch.manual_seed(0)
    net = part("network", option, **SMALL[option])(
        shape=(1, 8, 8), out_channels=1, num_classes=num_classes, interval_dim=1
    )
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(std=std)
    return net.double()


def images(n: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(n, 1, 8, 8, generator=generator("cpu", seed))


@pytest.mark.parametrize("option", SMALL)
def test_derivatives_of_networks_equal_finite_differences(option: str) -> None:
    made, x, v, h = denoiser(network_of(option, std=0.1)), images(), images(seed=2), 1e-6

    def u(s: float) -> Tensor:
        return made.output(x + s * v, T + s, made.schedule.at(T + s, x), {"interval": T + s - R})

    found = time_derivative(made, x, T, R, v, {})
    assert not found.requires_grad and found.abs().max() > 0.01
    torch.testing.assert_close(found, ((u(h) - u(-h)) / (2 * h)).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("option", SMALL)
def test_networks_without_an_interval_predict_the_velocity(option: str) -> None:
    net, x = network_of(option), images()
    at_t, over_interval = net(x, T, {}), net(x, T, {"interval": T - R})
    assert torch.equal(at_t, net(x, T, {"interval": torch.zeros(4)}))
    assert ((at_t - over_interval).abs().amax((1, 2, 3)) > 1e-5).all()
    net.conditions.interval.weight.data.zero_()  # as at initialisation
    assert torch.equal(net(x, T, {}), net(x, T, {"interval": T - R}))


# The loss


def published_loss(network: nn.Module, x0: Tensor, eps: Tensor, t: Tensor, r: Tensor, p: float) -> Tensor:
    """Restated from Geng et al. (2025), algorithm 1 and eq. 22, with a single Jacobian-vector product."""
    z, v = (1 - t.view(-1, 1, 1, 1)) * x0 + t.view(-1, 1, 1, 1) * eps, eps - x0
    u, du_dt = torch.func.jvp(  # type: ignore[misc]
        lambda z, r, t: network(z, t, {"interval": t - r}), (z, r, t), (v, torch.zeros_like(r), torch.ones_like(t))
    )
    error = u - (v - (t - r).view(-1, 1, 1, 1) * du_dt).detach()
    squared = (error**2).sum((1, 2, 3))
    return squared / (squared.detach() + 1e-3) ** p


@pytest.mark.parametrize("p", [0.0, 0.75, 1.0])
def test_loss_and_gradient_are_those_of_the_published_algorithm(p: float) -> None:
    net, x0, eps = network_of("mlp"), images(), images(seed=2)
    gradients = []
    for loss in (
        objective(p=p)(denoiser(net), x0, {}, GivenNoise.of(eps))["loss"] * 64 ** (1 - p),
        published_loss(net, x0, eps, T, R, p),
    ):
        net.zero_grad()
        loss.sum().backward()
        gradients.append([loss.detach(), *(p.grad.clone() for p in net.parameters())])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_without_intervals_the_loss_is_that_of_flow_matching() -> None:
    net, x0, eps = network_of("mlp"), images(), images(seed=2)
    flow = WeightedMSE(weighting=UniformVelocityWeighting(), times=GivenTimes(T))
    found = objective(ratio=0.0)(denoiser(net), x0, {}, GivenNoise.of(eps))["loss"]
    torch.testing.assert_close(found, flow(denoiser(net), x0, {}, GivenNoise.of(eps))["loss"], rtol=1e-10, atol=0)


@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.25, 0.3, 0.75, 1.0])
def test_the_fraction_of_intervals_is_exact_and_the_same_on_all_processes(ratio: float) -> None:
    chosen = []
    for step in range(60):
        source = RandomSource.for_batch(generator("cpu", step), 20)
        mask, count = MeanFlow(ratio=ratio).choose_intervals(source)
        halves = [MeanFlow(ratio=ratio).choose_intervals(replace(source, start=s, stop=s + 10)) for s in (0, 10)]
        assert torch.equal(mask, torch.cat([half for half, _ in halves]))
        assert [int(half.sum()) for half, _ in halves] == [local for _, local in halves]
        assert int(mask.sum()) == count == (max(1, 20 * ratio) if ratio else 0)
        chosen.append(mask)
    share = torch.stack(chosen).double().mean(0)
    assert share.min() > ratio - 0.3 and share.max() < ratio + 0.3, "any image of a batch may have an interval"


def test_the_derivative_has_the_dropout_masks_of_the_velocity() -> None:
    """A linear network with dropout, which scales x and hence v, has u = drop(x) and du/dt = drop(v)."""

    class WithDropout(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
            return self.drop(x)

    torch.manual_seed(0)
    x0, eps = images(), images(seed=2)
    t = torch.full((4,), 0.6)
    found = objective(t, t - 0.6, ratio=0.5)(denoiser(WithDropout()), x0, {}, GivenNoise.of(eps))
    torch.manual_seed(0)
    v, mask = eps - x0, nn.Dropout(0.5)(torch.ones_like(x0))
    interval = objective(ratio=0.5).choose_intervals(GivenNoise.of(eps))[0].double().view(-1, 1, 1, 1) * 0.6
    error = mask * (0.4 * x0 + 0.6 * eps) - (v - interval * mask * v)
    torch.testing.assert_close(found["mse"], error.square().mean((1, 2, 3)))


# Guidance in the target

MEANS, STD, NULL = torch.tensor([-0.6, 0.9]), 0.4, 2
"""Two classes of equal probability, N(MEANS[c], STD^2) in every pixel, and the label of images without a class."""


class GuidedAverageVelocity(nn.Module):
    """The average velocity of w v(x, t | c) + (1 - w) v(x, t), by the Runge-Kutta method along the trajectory back to
    r, and of v(x, t) itself for images without a class."""

    def __init__(self, scale: float, steps: int = 16) -> None:
        super().__init__()
        self.scale, self.steps = scale, steps

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        label, interval = cond["label"], cond.get("interval", torch.zeros_like(t))
        slopes, start, h = torch.zeros_like(x), x, interval / self.steps
        for k in range(self.steps):
            half, s = h.view(-1, 1, 1, 1) / 2, t - k * h
            a = self.velocity(x, s, label)
            b = self.velocity(x - half * a, s - h / 2, label)
            c = self.velocity(x - half * b, s - h / 2, label)
            d = self.velocity(x - 2 * half * c, s - h, label)
            slopes = slopes + (a + 2 * b + 2 * c + d) / 6
            x = start - 2 * half * slopes
        return slopes / self.steps

    def velocity(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        velocities, positive = class_velocities(x, t), label.clamp(max=1)
        distance = (x - (1 - t.view(-1, 1, 1, 1)) * MEANS.view(2, 1, 1, 1, 1)).square().flatten(2).sum(2)
        share = (-0.5 * distance / ((1 - t) ** 2 * STD**2 + t**2)).softmax(0)
        unconditional = (share.view(2, -1, 1, 1, 1) * velocities).sum(0)
        conditional = torch.where(positive.view(-1, 1, 1, 1) == 0, velocities[0], velocities[1])
        scale = torch.where(label == NULL, 0.0, self.scale).view(-1, 1, 1, 1)
        return scale * conditional + (1 - scale) * unconditional


def class_velocities(x: Tensor, t: Tensor) -> Tensor:
    """Return E[eps - x_0 | x_t, c] of both classes, (2, n, C, H, W)."""
    t, means = t.view(-1, 1, 1, 1), MEANS.view(2, 1, 1, 1, 1)
    eps_minus_x0 = (t - (1 - t) * STD**2) / ((1 - t) ** 2 * STD**2 + t**2)
    return -means + (x - (1 - t) * means) * eps_minus_x0


def drop_label(cond: Cond) -> Cond:
    return {**cond, "label": torch.full_like(cond["label"], NULL)}


def guided(scale: float, mixing: float = 0.0, **changes: Any) -> MeanFlow:
    made = replace(objective(**changes), guidance_scale=scale, guidance_mixing=mixing)
    return made.with_drop_cond(drop_label)


LABELS = torch.tensor([0, 1, 1, NULL])


def distance_from_target(network_scale: float, made: MeanFlow, labels: Tensor = LABELS) -> Tensor:
    """Return the squared distance (n,) of the average velocity from its expected target given x_t.

    The target is affine in eps - x_0, so its expectation is that of a pair whose eps - x_0 is its expectation.
    """
    network, x = GuidedAverageVelocity(network_scale), torch.randn(4, 1, 1, 2, generator=generator("cpu", 1))
    v = network.velocity(x, T, labels)
    if (labels != NULL).any():
        v = torch.where((labels == NULL).view(-1, 1, 1, 1), v, class_velocities(x, T)[labels.clamp(max=1), range(4)])
    time = T.view(-1, 1, 1, 1)
    return made(denoiser(network), x - time * v, {"label": labels}, GivenNoise.of(x + (1 - time) * v))["mse"]


@pytest.mark.parametrize(
    ("scale", "ratio", "mixing"), [(0.0, 1.0, 0.0), (2.5, 1.0, 0.0), (2.5, 1.0, 0.7), (2.5, 0.5, 0.7)]
)
def test_the_average_velocity_of_the_guided_field_is_a_fixed_point(scale: float, ratio: float, mixing: float) -> None:
    assert distance_from_target(scale, guided(scale, mixing, ratio=ratio)).max() < 1e-9


@pytest.mark.parametrize(("learned", "scale"), [(1.0, 2.5), (2.5, 1.0), (2.5, 2.4)])
def test_other_scales_are_no_fixed_points(learned: float, scale: float) -> None:
    found = distance_from_target(learned, guided(scale))
    assert (found[:3] > 1e-5).all() and found[3] < 1e-12, "images without a class have no guidance"


def along_the_velocity_without_guidance(
    made: Denoiser, x: Tensor, t: Tensor, r: Tensor, v: Tensor, cond: Cond
) -> Tensor:
    return time_derivative(made, x, t, r, class_velocities(x, t)[cond["label"], range(len(x))], cond)


def test_the_fixed_point_detects_a_derivative_without_guidance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meanflow, "time_derivative", along_the_velocity_without_guidance)
    assert distance_from_target(2.5, guided(2.5), LABELS % NULL)[[0, 1, 3]].min() > 1e-4


def guided_algorithm(network: nn.Module, x0: Tensor, eps: Tensor, labels: Tensor, omega: float, kappa: float) -> Tensor:
    """Restated from Geng et al. (2025), algorithm 1 with eq. 18, 19 and 21, and from the code of the authors, where
    images whose label is dropped keep the velocity of the pair. Without an adaptive weight."""
    t, r = T.view(-1, 1, 1, 1), R.view(-1, 1, 1, 1)
    z, v = (1 - t) * x0 + t * eps, eps - x0
    with torch.no_grad():
        u_null, u_class = (network(z, T, {"label": each}) for each in (torch.full_like(labels, NULL), labels))
        v_tilde = omega * v + kappa * u_class + (1 - omega - kappa) * u_null
        v_tilde[labels == NULL] = v[labels == NULL]
    u, du_dt = torch.func.jvp(
        lambda z, r, t: network(z, t, {"label": labels, "interval": t - r}),
        (z, R, T),
        (v_tilde, torch.zeros_like(R), torch.ones_like(T)),
    )[:2]
    return (u - (v_tilde - (t - r) * du_dt).detach()).square().sum((1, 2, 3))


@pytest.mark.parametrize(("omega", "kappa"), [(2.0, 0.0), (1.0, 0.5), (0.2, 0.92)])  # of the paper
def test_guided_loss_and_gradient_are_those_of_the_published_algorithm(omega: float, kappa: float) -> None:
    net, x0, eps = network_of("mlp", num_classes=NULL), images(), images(seed=2)
    gradients = []
    for loss in (
        guided(omega / (1 - kappa), kappa)(denoiser(net), x0, {"label": LABELS}, GivenNoise.of(eps))["loss"] * 64,
        guided_algorithm(net, x0, eps, LABELS, omega, kappa),
    ):
        net.zero_grad()
        loss.sum().backward()
        gradients.append([loss.detach(), *(p.grad.clone() for p in net.parameters())])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-11)


def test_at_scale_1_the_loss_is_that_without_guidance() -> None:
    net, x0, eps = network_of("unet", num_classes=NULL), images(), images(seed=2)
    calls: list[Tensor] = []
    net.register_forward_hook(lambda *_: calls.append(T))
    losses = [
        made(denoiser(net), x0, {"label": LABELS}, GivenNoise.of(eps))["loss"]
        for made in (objective(p=1.0), guided(1.0, p=1.0), guided(1.0, 0.5, p=1.0), guided(2.0, p=1.0))
    ]
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])
    assert len(calls) == 2 + 2 + 2 + 3
    assert (losses[0] != losses[3]).tolist() == [True, True, True, False]


def test_guided_velocities_have_no_dropout() -> None:
    class WithDropout(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
            return self.drop(x)

    net, x0, eps = WithDropout(), images(), images(seed=2)
    torch.manual_seed(0)
    found = guided(3.0, ratio=0.0)(denoiser(net), x0, {"label": LABELS[:1].expand(4)}, GivenNoise.of(eps))["mse"]
    torch.manual_seed(0)
    x_t = (1 - T.view(-1, 1, 1, 1)) * x0 + T.view(-1, 1, 1, 1) * eps
    target = x_t + 3 * (eps - x0 - x_t)
    torch.testing.assert_close(found, (nn.Dropout(0.5)(x_t) - target).square().mean((1, 2, 3)))
    assert net.drop.training


# Settings

SPEC = DataSpec("points", (1, 8, 8), num_bins=None)


def model(**changes: Any) -> Diffusion:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "network": part("network", "mlp", **SMALL["mlp"]), "schedule": RectifiedFlow(),
        "parameterization": Velocity(TimeConditioning(1.0)), "objective": part("objective", "meanflow"),
        "sampler": MeanFlowSampler(num_steps=1),
    }  # fmt: skip
    return Diffusion(changes.pop("spec", SPEC), **arguments | changes)


LABELLED = replace(SPEC, num_classes=NULL)


@pytest.mark.parametrize(("label_dropout", "is_guided"), [(1.0, False), (1e-9, True)])
def test_a_model_guides_the_images_whose_label_it_keeps(label_dropout: float, is_guided: bool) -> None:
    losses = []
    for scale in (1.0, 3.0):
        made = model(
            spec=LABELLED, conditional=True, label_dropout=label_dropout,
            objective=part("objective", "meanflow", guidance_scale=scale, ratio=1.0),
        ).train()  # fmt: skip
        nn.init.normal_(made.network.get_parameter(list(dict(made.network.named_parameters()))[-1]))
        source = RandomSource.for_batch(generator("cpu", 0), 4)
        losses.append(made.losses(images(), {"label": LABELS % NULL}, source)["mse"])
    assert (losses[0] != losses[1]).all() if is_guided else torch.equal(*losses)


def test_other_samplers_see_the_velocity() -> None:
    """With short steps, Euler's method and MeanFlow's agree."""
    made = model(objective=part("objective", "meanflow"), clip_x0=False)
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(std=0.05)
    samples = {}
    for name in ("meanflow", "euler"):
        for steps in (1, 50):
            made.sampler = part("sampler", name, num_steps=steps)
            samples[name, steps] = made.sample(4, generator=generator("cpu", 3))
    near, far = ((samples["meanflow", n] - samples["euler", n]).abs().max() for n in (50, 1))
    assert near < 0.1 * far


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: model(schedule=part("schedule", "vp")), "straight paths.*model/schedule=rectified"),
        (lambda: model(parameterization=part("parameterization", "v")), "model/parameterization=velocity"),
        (
            lambda: model(objective=part("objective", "flow")),
            "MeanFlowSampler needs a network that predicts the average velocity.*use model=meanflow",
        ),
        (lambda: MeanFlow(ratio=1.5), r"objective\.ratio=1\.5"),
        (lambda: MeanFlow(p=-1.0), r"objective\.p=-1"),
        (lambda: MeanFlow(guidance_scale=-1.0), r"objective\.guidance_scale=-1"),
        (lambda: MeanFlow(guidance_mixing=1.0), r"objective\.guidance_mixing=1\.0 must be at least 0 and below 1"),
        (
            lambda: model(objective=part("objective", "meanflow", guidance_scale=2.0)),
            r"guidance_scale=2 needs a conditional model: add model\.conditional=true model\.label_dropout=0\.1",
        ),
        (
            lambda: model(objective=part("objective", "meanflow", guidance_scale=2.0), spec=LABELLED, conditional=True),
            r"guidance_scale=2 needs training images without labels: add model\.label_dropout=0\.1",
        ),
        (lambda: model(patches=part("patches", "random")), "MeanFlow is a loss of whole images"),
    ],
)
def test_impossible_settings_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
