"""The classifier of noisy images: its inputs, the meaning of its logits, and the loss of a perfect classifier."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from composing import options
from gencompare.diffusion.guidance import ClassifierGuidance, Guided
from gencompare.diffusion.parameterizations import Prediction
from gencompare.diffusion.schedules import NoiseSchedule
from gencompare.diffusion.times import UniformTimes
from gencompare.errors import UserError
from gencompare.generative_model import DataSpec
from gencompare.models.classifier import NoisyClassifier
from gencompare.networks.residual_classifier import AttentionPool, NoisyClassifierNet
from gencompare.rng import RandomSource, generator
from parts import part

SPEC = DataSpec(name="points", shape=(2, 1, 1), num_classes=2, num_bins=None)
MEANS = torch.tensor([[0.6, -0.2], [-0.4, 0.3]], dtype=torch.float64)
STD = 0.3
FIXED = [name for name in options("model/schedule") if not list(part("schedule", name).parameters())]


pytestmark = pytest.mark.usefixtures("double")


class Exploding(NoiseSchedule):
    """A schedule with alpha = 1 and sigma from 0.01 to 100, so x_t grows and its scaling matters."""

    t_min = 0.0

    def log_alpha(self, t: Tensor) -> Tensor:
        return 0 * t

    def log_snr(self, t: Tensor) -> Tensor:
        return math.log(1e4) * (1 - 2 * t)


@pytest.fixture(params=[*FIXED, "exploding"])
def schedule(request: pytest.FixtureRequest) -> NoiseSchedule:
    return Exploding() if request.param == "exploding" else part("schedule", request.param)


class Posterior(nn.Module):
    """The exact log p(x_t, y) of two equally frequent Gaussians, up to a term without y, from the network inputs.

    The inputs are x_t / sqrt(alpha^2 + sigma^2), whose signal fraction is SNR / (1 + SNR), and 500 + 25 log-SNR, the
    log-SNR in DDPM's range.
    """

    def __init__(self, shape: Any, num_classes: int, off: float = 0.0) -> None:
        super().__init__()
        self.off = off

    def forward(self, x: Tensor, noise_cond: Tensor) -> Tensor:
        signal = torch.sigmoid((noise_cond - 500) / 25 + self.off)[:, None, None]
        total = signal * STD**2 + 1 - signal
        return -((x.flatten(1)[:, None] - signal.sqrt() * MEANS) ** 2 / total).sum(2) / 2


def classifier(schedule: NoiseSchedule, network: Callable[..., nn.Module] = Posterior) -> NoisyClassifier:
    return NoisyClassifier(SPEC, network=network, schedule=schedule, times=UniformTimes())


def in_range(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """Return the times with a log-SNR within +-20, the range of the network input."""
    return t[schedule.log_snr(t).abs() < 20]


def test_a_perfect_network_gives_the_bayes_posterior(schedule: NoiseSchedule) -> None:
    t = in_range(schedule, torch.linspace(schedule.t_min, schedule.t_max, 40))
    log_alpha = schedule.log_alpha(t)
    alpha, sigma = log_alpha.exp()[:, None], (log_alpha - schedule.log_snr(t) / 2).exp()[:, None]
    source = generator("cpu", 0)
    label = torch.arange(len(t)) % 2
    x0 = MEANS[label] + STD * torch.randn(len(t), 2, generator=source)
    x_t = alpha * x0 + sigma * torch.randn(len(t), 2, generator=source)
    off = x_t[:, None] - alpha[:, None] * MEANS
    expected = (-(off**2).sum(2) / (alpha**2 * STD**2 + sigma**2) / 2).softmax(1)
    found = classifier(schedule)(x_t[:, :, None, None], t).softmax(1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)

    # Its gradient, through the input scaling, is the difference of the scores.
    def unconditional(label: Tensor) -> Prediction:
        variance = alpha**2 * STD**2 + sigma**2
        x0_of = MEANS + alpha[:, None] * STD**2 * off / variance[:, None]
        p = torch.where((label == 2)[:, None], expected, nn.functional.one_hot(label.clamp(max=1), 2))
        x0 = (p[:, :, None] * x0_of).sum(1)
        return Prediction(x0[:, :, None, None], ((x_t - alpha * x0) / sigma)[:, :, None, None])

    class Plain:
        def __init__(self) -> None:
            self.schedule = schedule

        def __call__(self, x: Tensor, t: Tensor, cond: Any) -> Prediction:
            return unconditional(torch.full((len(x),), 2))

    guidance = ClassifierGuidance(scale=1.0, classifier=classifier(schedule))
    guided = Guided(Plain(), guidance, dict)(x_t[:, :, None, None], t, {"label": label})
    torch.testing.assert_close(guided.eps, unconditional(label).eps, rtol=1e-5, atol=1e-6)


def test_the_loss_of_a_perfect_network_is_the_class_entropy() -> None:
    """The loss is E[-log p(y | x_t)] over data, times and noise; any other network has a higher loss."""
    schedule, n = part("schedule", "cosine"), 40_000
    source = generator("cpu", 1)
    label = torch.arange(n) % 2
    x = (MEANS[label] + STD * torch.randn(n, 2, generator=source))[:, :, None, None]

    def loss(network: Callable[..., nn.Module]) -> float:
        metrics = classifier(schedule, network).losses(
            x, {"label": label}, RandomSource.for_batch(generator("cpu", 2), n)
        )
        assert metrics["loss"].shape == metrics["accuracy"].shape == (n,)
        return float(metrics["loss"].mean())

    # Along the line between the means, x_t is N(+-d / 2, 1) with d the distance in standard deviations.
    t = torch.arange(1, 1001) / 1000
    log_alpha = schedule.log_alpha(t)
    alpha, sigma2 = log_alpha.exp(), (2 * log_alpha - schedule.log_snr(t)).exp()
    d = alpha * (MEANS[0] - MEANS[1]).norm() / (alpha**2 * STD**2 + sigma2).sqrt()
    z = torch.linspace(-6, 6, 2001)
    density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    # At distance z from the mean of its class, the log odds of the class are d^2 / 2 + d z.
    entropy = (density * nn.functional.softplus(-(d[:, None] ** 2 / 2 + d[:, None] * z))).sum(1).mean()
    assert loss(Posterior) == pytest.approx(float(entropy), abs=0.01)
    for off in (-3.0, 3.0):
        assert loss(lambda shape, num_classes, off=off: Posterior(shape, num_classes, off)) > float(entropy) + 0.01


def test_invalid_settings_raise_an_error() -> None:
    with pytest.raises(UserError, match="needs labels"):
        NoisyClassifier(
            DataSpec(name="x", shape=(2, 1, 1)), network=Posterior, schedule=part("schedule", "cosine"),
            times=UniformTimes(),
        )  # fmt: skip

    class Learned(type(part("schedule", "cosine"))):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

    with pytest.raises(UserError, match="cannot learn its schedule"):
        classifier(Learned())
    for bad in ({"channel_mult": (1, 2, 2, 2, 2)}, {"channels": 20}, {"num_blocks": 0}):
        with pytest.raises(UserError):
            NoisyClassifierNet((1, 8, 8), 10, **bad)


# The network


def test_attention_pooling_matches_its_equation() -> None:
    torch.manual_seed(0)
    pool = AttentionPool(6)
    h = torch.randn(3, 6, 2, 4)
    k, v = pool.kv.weight.split(6)
    for image, found in zip(h, pool(h), strict=True):
        pixels = image.flatten(1)
        weights = ((pool.q.weight @ pixels.mean(1)) @ (k @ pixels) / math.sqrt(6)).softmax(0)
        torch.testing.assert_close(found, pool.out.weight @ (v @ pixels @ weights))


def test_the_network_depends_on_image_and_noise_level() -> None:
    torch.manual_seed(0)
    net = NoisyClassifierNet((1, 8, 8), 10, channels=8, channel_mult=(1, 2), num_blocks=1, attention_resolutions=(4,))
    x, noise = torch.randn(4, 1, 8, 8), torch.tensor([10.0, 400.0, 600.0, 990.0])
    assert torch.equal(net(x, noise), torch.zeros(4, 10)), "zero at initialisation"
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    logits = net(x, noise)
    assert logits.shape == (4, 10)
    torch.testing.assert_close(logits[1:2], net(x[1:2], noise[1:2]))
    assert not torch.allclose(logits, net(x, noise.flip(0)))
    assert not torch.allclose(logits, net(x.flip(0), noise))
