"""Guidance, compared with exact results on a labelled mixture of Gaussians.

The conditional and unconditional scores and the classifier of noisy points are known, and satisfy Bayes' rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from composing import options
from gencompare.diffusion.denoiser import Cond, DenoiserProtocol
from gencompare.diffusion.discrete_schedules import LinearBetas
from gencompare.diffusion.guidance import AutoGuidance, ClassifierFree, ClassifierGuidance, Guidance, Guided
from gencompare.diffusion.parameterizations import Prediction
from gencompare.diffusion.samplers import Sampler
from gencompare.diffusion.schedules import NoiseSchedule
from gencompare.errors import UserError
from gencompare.evaluation.sampling import draw_samples
from gencompare.generative_model import DataSpec
from gencompare.models.diffusion import Diffusion
from gencompare.networks.mlp import DenoisingMLP
from gencompare.rng import RandomSource, generator
from parts import part

WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
MEANS = torch.tensor([[0.6, 0.2], [-0.5, 0.5], [0.0, -0.7]], dtype=torch.float64)
VARIANCES = torch.tensor([[0.09, 0.04], [0.04, 0.16], [0.16, 0.09]], dtype=torch.float64)
"""Three overlapping classes in the plane."""
NO_LABEL = 3


pytestmark = pytest.mark.usefixtures("double")


@pytest.fixture(params=options("model/schedule"))
def schedule(request: pytest.FixtureRequest) -> NoiseSchedule:
    return part("schedule", request.param)


def scales(schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha and sigma, broadcasting with (n, classes, 2)."""
    log_alpha = schedule.log_alpha(t)
    alpha, sigma = log_alpha.exp(), (log_alpha - schedule.log_snr(t) / 2).exp()
    return alpha.reshape(-1, 1, 1), sigma.reshape(-1, 1, 1)


def log_joint(schedule: NoiseSchedule, x_t: Tensor, t: Tensor) -> Tensor:
    """Return log p(x_t, y) up to a constant, (n, 3)."""
    alpha, sigma = scales(schedule, t)
    total = alpha**2 * VARIANCES + sigma**2
    off = x_t.flatten(1)[:, None] - alpha * MEANS
    return WEIGHTS.log() - (off**2 / total + total.log()).sum(2) / 2


@dataclass(frozen=True)
class ExactDenoiser:
    """The exact denoiser of the class in ``label``, or of all classes if ``label`` is 3. Records the size of each
    call's batch.

    E[x_0 | x_t, y] = m_y + alpha v_y (x_t - alpha m_y) / (alpha^2 v_y + sigma^2), and E[x_0 | x_t] is its mean under
    p(y | x_t).
    """

    schedule: NoiseSchedule
    rows: list[int] = field(default_factory=list)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        self.rows.append(len(x_t))
        label = cond["label"]
        alpha, sigma = scales(self.schedule, t)
        total = alpha**2 * VARIANCES + sigma**2
        x0_of = MEANS + alpha * VARIANCES * (x_t.flatten(1)[:, None] - alpha * MEANS) / total
        one_hot = torch.nn.functional.one_hot(label.clamp(max=2), 3).double()
        p = torch.where((label == NO_LABEL)[:, None], log_joint(self.schedule, x_t, t).softmax(1), one_hot)
        x0 = (p[:, :, None] * x0_of).sum(1)
        eps = (x_t.flatten(1) - alpha[:, 0] * x0) / sigma[:, 0]
        return Prediction(x0.reshape(x_t.shape), eps.reshape(x_t.shape))


@dataclass(frozen=True)
class TrueClassifier:
    schedule: NoiseSchedule

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        return log_joint(self.schedule, x_t, t)


@dataclass(frozen=True)
class Unconditional:
    """The exact unconditional denoiser."""

    truth: ExactDenoiser

    @property
    def schedule(self) -> NoiseSchedule:
        return self.truth.schedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        return self.truth(x_t, t, drop_cond(cond))


def drop_cond(cond: Cond) -> Cond:
    return {**cond, "label": torch.full_like(cond["label"], NO_LABEL)}


def guided(denoiser: DenoiserProtocol, guidance: Guidance) -> Guided:
    return Guided(denoiser, guidance, drop_cond)


def cases(schedule: NoiseSchedule) -> tuple[Tensor, Tensor, Cond]:
    """Return noisy points of each class, at times over the whole schedule."""
    t = torch.linspace(schedule.t_min, schedule.t_max, 30)
    label = torch.arange(30) % 3
    alpha, sigma = scales(schedule, t)
    source = generator("cpu", 5)
    x0 = MEANS[label] + VARIANCES[label].sqrt() * torch.randn(30, 2, generator=source)
    x_t = alpha[:, 0] * x0 + sigma[:, 0] * torch.randn(30, 2, generator=source)
    return x_t.reshape(30, 2, 1, 1), t, {"label": label}


def same(one: Prediction, two: Prediction, schedule: NoiseSchedule, t: Tensor) -> bool:
    """Check that x_0 and eps agree, in units of the noise."""
    _, sigma = scales(schedule, t)
    return torch.allclose(one.eps, two.eps, rtol=1e-8, atol=1e-8) and torch.allclose(
        one.x0, two.x0, rtol=1e-8, atol=1e-8 * max(1.0, float(sigma.max()))
    )


# Identities at all noise levels of all schedules


def satisfies_bayes_rule(guidance: Callable[..., Guidance], schedule: NoiseSchedule) -> bool:
    """Check that the exact classifier at scale 1 turns the unconditional model into the conditional one."""
    x, t, cond = cases(schedule)
    found = guided(Unconditional(ExactDenoiser(schedule)), guidance(scale=1.0, classifier=TrueClassifier(schedule)))(
        x, t, cond
    )
    return same(found, ExactDenoiser(schedule)(x, t, cond), schedule, t)


def is_classifier_guidance(guidance: Callable[..., Guidance], schedule: NoiseSchedule) -> bool:
    """Check that classifier-free and classifier guidance agree for exact scores (Ho and Salimans 2022, section 3.2)."""
    x, t, cond = cases(schedule)
    for scale in (0.0, 0.5, 1.0, 3.0):
        free = guided(ExactDenoiser(schedule), guidance(scale=scale))(x, t, cond)
        by_classifier = ClassifierGuidance(scale=scale, classifier=TrueClassifier(schedule))
        if not same(free, guided(Unconditional(ExactDenoiser(schedule)), by_classifier)(x, t, cond), schedule, t):
            return False
    return True


def extrapolates(guidance: Callable[..., Guidance], schedule: NoiseSchedule) -> bool:
    """Check that x_0 and eps are D_weak + scale (D_main - D_weak)."""
    x, t, cond = cases(schedule)
    main, weak = ExactDenoiser(schedule)(x, t, cond), Unconditional(ExactDenoiser(schedule))(x, t, cond)
    for scale in (0.0, 1.0, 2.5):
        found = guided(ExactDenoiser(schedule), guidance(scale=scale, weak=Unconditional(ExactDenoiser(schedule))))(
            x, t, cond
        )
        expected = Prediction(scale * main.x0 + (1 - scale) * weak.x0, scale * main.eps + (1 - scale) * weak.eps)
        if not same(found, expected, schedule, t):
            return False
    return True


def test_classifier_guidance_at_scale_one_satisfies_bayes_rule(schedule: NoiseSchedule) -> None:
    assert satisfies_bayes_rule(ClassifierGuidance, schedule)


def test_classifier_free_guidance_equals_classifier_guidance(schedule: NoiseSchedule) -> None:
    assert is_classifier_guidance(ClassifierFree, schedule)


def test_autoguidance_extrapolates_from_the_weak_model(schedule: NoiseSchedule) -> None:
    assert extrapolates(AutoGuidance, schedule)


def test_autoguidance_with_equal_models_is_that_model(schedule: NoiseSchedule) -> None:
    x, t, cond = cases(schedule)
    main = ExactDenoiser(schedule)
    found = guided(main, AutoGuidance(scale=7.0, weak=main))(x, t, cond)
    assert same(found, main(x, t, cond), schedule, t)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_scales_zero_and_one_call_one_model_once(scale: float, schedule: NoiseSchedule) -> None:
    x, t, cond = cases(schedule)
    truth = ExactDenoiser(schedule)
    found = guided(truth, ClassifierFree(scale=scale))(x, t, cond)
    assert truth.rows == [30]
    expected = ExactDenoiser(schedule)(x, t, cond if scale else drop_cond(cond))
    assert torch.equal(found.x0, expected.x0) and torch.equal(found.eps, expected.eps)


def guidances(schedule: NoiseSchedule) -> list[Guidance]:
    return [
        ClassifierFree(scale=2.0),
        ClassifierFree(scale=2.0, interval=(0.3, 3.0)),
        ClassifierGuidance(scale=2.0, classifier=TrueClassifier(schedule)),
        AutoGuidance(scale=2.0, weak=Unconditional(ExactDenoiser(schedule))),
    ]


def test_guided_x0_and_eps_still_compose_x_t(schedule: NoiseSchedule) -> None:
    x, t, cond = cases(schedule)
    alpha, sigma = (scale.reshape(-1, 1, 1, 1) for scale in scales(schedule, t))
    with torch.no_grad():
        for guidance in guidances(schedule):
            found = guided(ExactDenoiser(schedule), guidance)(x, t, cond)
            torch.testing.assert_close(alpha * found.x0 + sigma * found.eps, x, rtol=1e-8, atol=1e-8)
            assert not found.eps.requires_grad


def test_guidance_keeps_a_learned_variance() -> None:
    @dataclass(frozen=True)
    class Learns(ExactDenoiser):
        def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
            variance = cond["label"].double()[:, None, None, None].expand_as(x_t)
            return Prediction(*super().__call__(x_t, t, cond)[:2], variance)

    schedule = LinearBetas()
    x, t, cond = cases(schedule)
    own = Learns(schedule)(x, t, cond)[2]
    assert own is not None
    for guidance in guidances(schedule):
        found = guided(Learns(schedule), guidance)(x, t, cond)[2]
        assert found is not None and torch.equal(found, own), "of the conditional model"


# The interval


def test_outside_its_interval_guidance_is_the_conditional_model(schedule: NoiseSchedule) -> None:
    x, t, cond = cases(schedule)
    level = torch.exp(-schedule.log_snr(t) / 2)
    low, high = float(level[9] + level[10]) / 2, float(level[19] + level[20]) / 2
    inside = torch.zeros(30, dtype=torch.bool)
    inside[10:20] = True
    limited = guided(ExactDenoiser(schedule), ClassifierFree(scale=3.0, interval=(low, high)))(x, t, cond)
    everywhere = guided(ExactDenoiser(schedule), ClassifierFree(scale=3.0))(x, t, cond)
    plain = ExactDenoiser(schedule)(x, t, cond)
    shape = inside[:, None, None, None]
    expected = Prediction(torch.where(shape, everywhere.x0, plain.x0), torch.where(shape, everywhere.eps, plain.eps))
    assert same(limited, expected, schedule, t)
    assert not same(limited, everywhere, schedule, t) and not same(limited, plain, schedule, t)


def test_outside_its_interval_guidance_costs_one_row() -> None:
    schedule = LinearBetas()
    x, t, cond = cases(schedule)
    truth = ExactDenoiser(schedule)
    limited = guided(truth, ClassifierFree(scale=3.0, interval=(0.3, 3.0)))
    for time in t:
        limited(x, time, cond)
    level = torch.exp(-schedule.log_snr(t) / 2)
    expected = [60 if 0.3 <= value <= 3.0 else 30 for value in level.tolist()]
    assert truth.rows == expected and len(set(expected)) == 2


# Samples

N = 1500


def drawn(sampler: Sampler, denoiser: DenoiserProtocol, labels: Tensor) -> Tensor:
    """Draw N points for each of ``labels``, (labels, N, 2)."""
    x = denoiser.schedule.prior((len(labels) * N, 2, 1, 1), generator("cpu", 1))
    with torch.no_grad():
        found = sampler.sample(denoiser, x, {"label": labels.repeat_interleave(N)}, generator=generator("cpu", 2))
    return found.reshape(len(labels), N, 2)


@pytest.fixture(params=["ddim", "heun", "ancestral"])
def sampler(request: pytest.FixtureRequest) -> Sampler:
    steps = {"ddim": 60, "heun": 30, "ancestral": 120}[request.param]
    return part("sampler", request.param, num_steps=steps)


BIAS = 0.015
"""Discretisation error of the means and standard deviations."""


def close(found: Tensor, mean: Tensor, variance: Tensor) -> bool:
    """Check that means and standard deviations are right within 4 standard errors and `BIAS`."""
    mean_error = 4 * (variance / N).sqrt() + BIAS
    std_error = 4 * (variance / (2 * N)).sqrt() + BIAS
    return bool(((found.mean(-2) - mean).abs() < mean_error).all()) and bool(
        ((found.std(-2) - variance.sqrt()).abs() < std_error).all()
    )


def test_scale_one_samples_the_class(sampler: Sampler) -> None:
    truth = ExactDenoiser(LinearBetas())
    by_classifier = ClassifierGuidance(scale=1.0, classifier=TrueClassifier(LinearBetas()))
    for denoiser in (guided(truth, ClassifierFree(scale=1.0)), guided(Unconditional(truth), by_classifier)):
        found = drawn(sampler, denoiser, torch.arange(3))
        assert close(found, MEANS, VARIANCES)
        assert not close(found.roll(1, dims=0), MEANS, VARIANCES), "another class would be detected"
        assert not close(found, MEANS, VARIANCES * 1.3), "another variance would be detected"


def test_scale_zero_samples_all_classes(sampler: Sampler) -> None:
    mean = WEIGHTS @ MEANS
    variance = WEIGHTS @ (VARIANCES + MEANS**2) - mean**2
    (found,) = drawn(sampler, guided(ExactDenoiser(LinearBetas()), ClassifierFree(scale=0.0)), torch.tensor([2]))
    assert close(found, mean, variance)
    share = log_joint(LinearBetas(), found, torch.tensor(1e-3)).softmax(1).mean(0)
    assert (share - WEIGHTS).abs().max() < 0.06


def test_larger_scales_trade_diversity_for_fidelity(sampler: Sampler) -> None:
    schedule = LinearBetas()
    spread, fidelity = [], []
    for scale in (0.0, 0.5, 1.0, 2.0, 4.0):
        (found,) = drawn(sampler, guided(ExactDenoiser(schedule), ClassifierFree(scale=scale)), torch.tensor([2]))
        spread.append(float(found.var(0).sum()))
        fidelity.append(float(log_joint(schedule, found, torch.tensor(1e-3)).softmax(1)[:, 2].mean()))
    assert spread == sorted(spread, reverse=True) and spread[-1] < 0.85 * spread[2]
    assert fidelity == sorted(fidelity) and fidelity[-1] > 0.99


# Deliberate bugs


class WrongSign(ClassifierGuidance):
    def _gradient(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return -super()._gradient(x_t, t, label)


class NoSigma(ClassifierGuidance):
    """Bug: the gradient is added to eps without the factor sigma."""

    def _gradient(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        _, sigma = scales(self.classifier.schedule, t)
        return super()._gradient(x_t, t, label) / sigma.reshape(-1, 1, 1, 1)


class MeanOverTheBatch(ClassifierGuidance):
    def _gradient(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return super()._gradient(x_t, t, label) / len(x_t)


@dataclass(frozen=True, kw_only=True)
class OneOff(ClassifierFree):
    """Bug: the scale is the w of Ho and Salimans, which is 0 for the conditional model."""

    def _scale_at(self, at: Any) -> float | Tensor:
        return self.scale + 1


@dataclass(frozen=True, kw_only=True)
class OtherWay(ClassifierFree):
    def _scale_at(self, at: Any) -> float | Tensor:
        return 1 - self.scale


class WeakForMain(AutoGuidance):
    def predict(self, denoiser: DenoiserProtocol, x_t: Tensor, t: Tensor, cond: Cond, drop_cond: Any) -> Prediction:
        return AutoGuidance(scale=self.scale, weak=denoiser).predict(self.weak, x_t, t, cond, drop_cond)


@pytest.mark.parametrize(
    ("law", "bug"),
    [
        (satisfies_bayes_rule, WrongSign),
        (satisfies_bayes_rule, NoSigma),
        (satisfies_bayes_rule, MeanOverTheBatch),
        (is_classifier_guidance, OneOff),
        (is_classifier_guidance, OtherWay),
        (extrapolates, WeakForMain),
    ],
)
def test_deliberate_bugs_violate_the_identities(law: Callable[..., bool], bug: Callable[..., Guidance]) -> None:
    assert not law(bug, LinearBetas())


# The model

SPEC = DataSpec(name="points", shape=(2, 1, 1), num_classes=3, num_bins=None)


def model(steps: int = 8, **changes: Any) -> Diffusion:
    torch.manual_seed(0)
    parts: dict[str, Any] = {
        "network": partial(DenoisingMLP, width=16, depth=1),
        "schedule": part("schedule", "linear"),
        "parameterization": part("parameterization", "eps"),
        "objective": part("objective", "simple"),
        "sampler": part("sampler", "ddim", num_steps=steps),
        "conditional": True,
        "label_dropout": 0.1,
    }
    built = Diffusion(SPEC, **(parts | changes))
    # The output is initialised to zero for every label, which is changed here.
    nn.init.normal_(built.network.out.weight, std=0.1)  # type: ignore[union-attr]
    return built


class LinearClassifier(nn.Module):
    def __init__(self, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.schedule, self.layer = schedule, nn.Linear(2, 3)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.layer(x_t.flatten(1))


def by_classifier(scale: float) -> Guidance:
    return ClassifierGuidance(scale=scale, classifier=LinearClassifier(LinearBetas()))


def by_weak(scale: float) -> Guidance:
    return AutoGuidance(scale=scale, weak=model())


def halfway(scale: float) -> Guidance:
    """Return guidance that acts at the lowest four of the eight noise levels."""
    plain = model()
    levels = torch.exp(-plain.schedule.log_snr(plain.sampler.times(plain.schedule)[3:5]) / 2)
    return ClassifierFree(scale=scale, interval=(0.0, float(levels.mean())))


@pytest.mark.parametrize(
    ("guidance", "nfe"),
    [
        (lambda: None, {"network": 8}),
        (lambda: ClassifierFree(scale=0.0), {"network": 8}),
        (lambda: ClassifierFree(scale=1.0), {"network": 8}),
        (lambda: ClassifierFree(scale=3.0), {"network": 16}),
        (lambda: halfway(3.0), {"network": 12}),
        (lambda: by_classifier(1.0), {"network": 8, "classifier": 8}),
        (lambda: by_classifier(0.0), {"network": 8, "classifier": 0}),
        (lambda: by_weak(2.0), {"network": 8, "weak": 8}),
        (lambda: by_weak(1.0), {"network": 8, "weak": 0}),
        (lambda: by_weak(0.0), {"network": 0, "weak": 8}),
    ],
)
def test_nfe_counts_the_calls_of_all_networks(guidance: Callable[[], Any], nfe: dict[str, float]) -> None:
    assert draw_samples(model(guidance=guidance()), 6, seed=0).nfe == nfe


def test_one_step_of_a_guided_model_satisfies_the_equation() -> None:
    """A single step from noise to image is computed by hand."""
    plain = model(steps=1, clip_x0=False)
    label = torch.tensor([0, 1, 2, 0])
    x = plain.schedule.prior((4, 2, 1, 1), generator("cpu", 3))
    one = torch.tensor(1.0)
    weak = model(steps=1)
    nn.init.normal_(weak.network.out.weight, std=0.2)  # type: ignore[union-attr]
    with torch.no_grad():
        conditional = plain.denoiser(x, one, {"label": label}).x0
        unconditional = plain.denoiser(x, one, {"label": torch.full((4,), 3)}).x0
        worse = weak.denoiser(x, one, {"label": label}).x0
    for guidance, expected in (
        (ClassifierFree(scale=3.0), 3 * conditional - 2 * unconditional),
        (AutoGuidance(scale=3.0, weak=weak), 3 * conditional - 2 * worse),
    ):
        for clip in (False, True):
            guided = model(steps=1, clip_x0=clip, guidance=guidance)
            found = guided.sample(4, {"label": label}, generator=generator("cpu", 3))
            torch.testing.assert_close(found, expected.clamp(-1, 1))


def test_guides_are_not_submodules_but_move_with_the_model() -> None:
    plain = model()
    for guidance in (
        AutoGuidance(scale=2.0, weak=model()),
        ClassifierGuidance(scale=2.0, classifier=LinearClassifier(LinearBetas())),
    ):
        guided = model(guidance=guidance)
        (guide,) = guidance.guides().values()
        assert guided.state_dict().keys() == plain.state_dict().keys()
        assert guided.averaged_parameters().keys() == plain.averaged_parameters().keys()
        assert len(list(guided.modules())) == len(list(plain.modules()))
        guided.to("meta")
        assert all(p.device.type == "meta" for p in [*guide.parameters(), *guide.buffers()])
        assert [p.grad for p in guide.parameters()] == [None] * len(list(guide.parameters()))


def test_classifier_guides_an_unconditional_model() -> None:
    guidance = ClassifierGuidance(scale=4.0, classifier=LinearClassifier(LinearBetas()))
    guided = model(conditional=False, label_dropout=0.0, guidance=guidance)
    assert guided.conditional, "labels change the samples"
    assert not any("label" in name for name, _ in guided.named_parameters()), "the network does not use them"
    one, two = (guided.sample(3, {"label": torch.full((3,), k)}, generator=generator("cpu", 0)) for k in (0, 1))
    assert not torch.equal(one, two)
    with pytest.raises(UserError, match="needs a class for each image"):
        guided.sample(3, generator=generator("cpu", 0))


def test_sampling_description_includes_the_guidance() -> None:
    free = ClassifierFree(scale=3.0, interval=(0.3, 3))
    assert model(guidance=free).sampling_description() == (
        "DDIM, 8 steps, eta 0, ClassifierFree, scale 3 where sigma / alpha is 0.3 to 3, x0 clipped"
    )
    weak = model()
    weak.origin = "small (last, ema)"  # type: ignore[assignment]
    assert "AutoGuidance with small (last, ema), scale 2" in (
        model(guidance=AutoGuidance(scale=2.0, weak=weak)).sampling_description()
    )


# Label dropout


class Notes(nn.Module):
    """Records the labels that it receives."""

    def __init__(self, shape: Any, out_channels: int, num_classes: int) -> None:
        super().__init__()
        self.out = nn.Linear(1, 1)
        self.received: list[Tensor] = []

    def forward(self, x: Tensor, noise_cond: Tensor, cond: Cond) -> Tensor:
        self.received.append(cond["label"])
        return torch.zeros_like(x)


def received_labels(dropout: float, *slices: tuple[int, int], seed: int = 0, training: bool = True) -> Tensor:
    noting = model(network=Notes, label_dropout=dropout).train(training)
    label = torch.arange(4000) % 3
    for start, stop in slices:
        rng = RandomSource(generator("cpu", seed), start, stop, 4000)
        noting.losses(torch.zeros(stop - start, 2, 1, 1), {"label": label[start:stop]}, rng)
    return torch.cat(noting.network.received)  # type: ignore[arg-type]


def test_labels_are_dropped_with_their_probability() -> None:
    label, received = torch.arange(4000) % 3, received_labels(0.1, (0, 4000))
    dropped = received == NO_LABEL
    error = math.sqrt(0.1 * 0.9 / 4000)
    assert abs(float(dropped.double().mean()) - 0.1) < 4 * error
    assert torch.equal(received[~dropped], label[~dropped])
    for k in range(3):
        assert abs(float(dropped[label == k].double().mean()) - 0.1) < 4 * error * math.sqrt(3), "of each class"
    assert torch.equal(received_labels(0.0, (0, 4000)), label)
    assert torch.equal(received_labels(0.1, (0, 4000), training=False), label), "held-out images keep their labels"


def test_dropped_labels_do_not_depend_on_the_number_of_processes() -> None:
    one = received_labels(0.1, (0, 4000))
    assert torch.equal(one, received_labels(0.1, (0, 4000)))
    assert torch.equal(one, received_labels(0.1, (0, 1000), (1000, 2000), (2000, 3000), (3000, 4000)))
    assert not torch.equal(one, received_labels(0.1, (0, 4000), seed=1))


# Invalid input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClassifierFree(scale=-1.0), "must be finite and at least 0"),
        (lambda: ClassifierFree(scale=math.nan), "must be finite and at least 0"),
        (lambda: ClassifierFree(scale=2.0, interval=(3.0, 0.3)), r"must be \[lowest, highest\]"),
        (lambda: model(guidance=ClassifierFree(scale=2.0), conditional=False, label_dropout=0.0), "conditional model"),
        (lambda: model(guidance=ClassifierFree(scale=2.0), label_dropout=0.0), "label_dropout=0.1"),
        (lambda: model(conditional=False), "needs labels"),
        (lambda: model(label_dropout=1.5), r"must be in \[0, 1\]"),
        (
            lambda: model(guidance=AutoGuidance(scale=2.0, weak=model(schedule=part("schedule", "cosine")))),
            r"guidance.weak was trained under a different noise schedule \(CosineBetas\)",
        ),
        (
            lambda: model(
                guidance=ClassifierGuidance(scale=1.0, classifier=LinearClassifier(LinearBetas(beta_end=0.021)))
            ),
            "guidance.classifier was trained under a different noise schedule",
        ),
    ],
)
def test_invalid_settings_are_rejected_before_training(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
