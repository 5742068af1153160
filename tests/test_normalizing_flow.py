"""Normalizing flows: exact determinants and inverses, densities that integrate to 1, and the formulas of the papers."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import counted
from checkpoints import checkpoint
from composing import compose, options
from forking import in_processes, needs_fork
from gencompare.data.toy2d import Toy2D
from gencompare.errors import TrainingStopped, UserError
from gencompare.evaluation.sampling import draw_samples
from gencompare.generative_model import DataSpec
from gencompare.models.normalizing_flow import NormalizingFlow
from gencompare.networks import glow, tarflow
from gencompare.networks.bijection import Bijection
from gencompare.networks.glow import ActNorm, Glow, InvertibleConv1x1
from gencompare.rng import RandomSource, generator
from gencompare.tasks.runs.build import build_data, build_model
from parts import part
from test_cli import QUICK, Cli, error_line

SMALL = {"depth": 2, "width": 4, "hidden_size": 8, "num_heads": 2, "num_blocks": 3}
BIJECTIONS = options("model/bijection")
CASES: list[tuple[str, tuple[int, int, int], dict[str, Any]]] = [
    *((option, (1, 8, 8) if "cifar10" in option else (2, 4, 4), {}) for option in BIJECTIONS),
    ("glow", (3, 2, 4), {"num_levels": 1}),
    ("glow", (3, 1, 1), {"num_levels": 1}),
    ("tarflow", (1, 1, 2), {"patch_size": 1}),
]


def randomized(net: Bijection, std: float = 0.2) -> Any:
    """Give the network random weights in float64, because it is close to linear at initialisation."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(std=std)
    return net.double().eval()


def tiny(
    option: str, shape: tuple[int, ...] = (2, 4, 4), num_classes: int = 0, std: float = 0.2, **changes: Any
) -> Any:
    """Build a bijection with the structure of an option, small and with random weights."""
    torch.manual_seed(0)
    factory = part("bijection", option)
    small = {name: size for name, size in SMALL.items() if name in factory.keywords}
    return randomized(part("bijection", option, **{**small, **changes})(shape, num_classes), std)


def images(n: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(n, *shape, generator=generator("cpu", "images", seed), dtype=torch.float64)


# Every bijection


@pytest.mark.parametrize("num_classes", [0, 3])
@pytest.mark.parametrize(("option", "shape", "changes"), CASES, ids=str)
def test_determinant_and_inverse(option: str, shape: tuple[int, ...], changes: Any, num_classes: int) -> None:
    """The log-determinant is that of autograd's Jacobian, and the inverse is exact."""
    net = tiny(option, shape, num_classes, **changes)
    x, label = images(2, shape), torch.tensor([0, 2]) if num_classes else None
    z, log_det = net(x, label)
    assert (net.inverse(z, label) - x).abs().max() < 1e-10
    jacobian = torch.autograd.functional.jacobian(lambda x: net(x[None], None if label is None else label[:1])[0], x[0])
    (sign, log_abs) = torch.linalg.slogdet(jacobian.view(z.shape[1], -1))
    assert sign != 0 and log_det[0].item() == pytest.approx(log_abs.item(), abs=1e-9)
    if num_classes:
        other, _ = net(x, torch.tensor([1, 2]))
        assert (other[0] - z[0]).abs().max() > 1e-3 and torch.equal(other[1], z[1])


@pytest.mark.parametrize("option", BIJECTIONS)
def test_every_parameter_has_a_gradient(option: str) -> None:
    shape = (1, 8, 8)
    net = tiny(option, shape, 3)
    z, log_det = net(images(4, shape), torch.arange(4) % 3)
    (z.square().sum() - log_det.sum()).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    ("option", "count"),
    [("glow_cifar10", counted.glow(of_code=False)["bijection"]), ("tarflow_imagenet64", counted.tarflow())],
)
def test_published_sizes(option: str, count: int) -> None:
    with torch.device("meta"):
        net = part("bijection", option)((3, 32, 32) if "cifar10" in option else (3, 64, 64))
    assert sum(p.numel() for p in net.parameters()) == count


# Glow


def test_actnorm_normalises_the_first_training_batch_only() -> None:
    x = 3 + images(50, (2, 3, 4)) * torch.tensor([0.1, 20.0]).view(2, 1, 1)
    norm = ActNorm(2).double()
    assert torch.equal(norm.eval()(x)[0], x), "the identity before training"
    y, log_det = norm.train()(x)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(2).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(y.std((0, 2, 3), correction=0), torch.ones(2).double(), rtol=0, atol=2e-5)
    std = x.std((0, 2, 3), correction=0)
    assert log_det.item() == pytest.approx(-12 * std.log().sum().item(), abs=1e-3)
    torch.testing.assert_close(norm(2 * x)[0], 2 * y + norm(0 * x)[0] * -1, rtol=0, atol=1e-9)  # still the same map
    fresh = ActNorm(2).double().state_dict()
    norm.load_state_dict(fresh)  # as after a rollback to the start
    assert norm(2 * x)[0].std().item() == pytest.approx(1, abs=1e-3)


def actnorm_of_a_share(rank: int, world: int) -> dict[str, Tensor]:
    norm, x = ActNorm(2).double().train(), 3 + images(8, (2, 3, 4))
    norm(x[rank * 8 // world : (rank + 1) * 8 // world])
    return norm.state_dict()


@needs_fork
def test_actnorm_does_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    (one,), two = (in_processes(world, tmp_path, actnorm_of_a_share) for world in (1, 2))
    for name, value in one.items():
        for other in two:
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-12)


def test_the_1x1_convolution_starts_as_a_rotation() -> None:
    conv, x = InvertibleConv1x1(6).double(), images(2, (6, 3, 2))
    lower, upper = conv._factors()
    weight = conv.permutation @ lower @ upper
    torch.testing.assert_close(weight @ weight.mT, torch.eye(6).double(), rtol=0, atol=1e-5)
    with torch.no_grad():
        conv.lu.add_(0.3 * torch.randn(6, 6, generator=generator("cpu", 0), dtype=torch.float64))
    lower, upper = conv._factors()
    weight = conv.permutation @ lower @ upper
    y, log_det = conv(x)
    torch.testing.assert_close(y, nn.functional.conv2d(x, weight[:, :, None, None]))
    assert log_det.item() == pytest.approx(6 * torch.linalg.slogdet(weight)[1].item())


def test_products_of_the_flow_are_exact_under_autocast() -> None:
    """Networks compute in 16 bits, but the flow itself does not: otherwise, errors would be about 1e-2."""
    conv, x = InvertibleConv1x1(6), images(2, (6, 3, 2)).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert (conv.inverse(conv(x)[0]) - x).abs().max() < 1e-5
        for option in ("glow", "tarflow"):
            z, log_det = tiny(option).float()(images(4, (2, 4, 4)).float())
            assert z.dtype == log_det.dtype == torch.float32


# TarFlow


def test_tarflow_is_the_formula_of_its_paper() -> None:
    r"""Zhai et al. (2024), section 3.1: z_k = (x_k - mu_k) exp(-alpha_k), where mu_k and alpha_k depend on the tokens
    before k, and the loss is :math:`|z|^2 / 2 + \sum \alpha`, up to a constant. Each prefix is computed on its own.
    """
    spec = DataSpec("points", (2, 4, 4), num_bins=None)
    net = tiny("tarflow")
    model = NormalizingFlow(spec, bijection=lambda shape, classes: net).double()
    x = images(3, spec.shape)
    tokens = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    total = x.new_zeros(3)
    for block in net.blocks:
        order = range(3, -1, -1) if block.reverse else range(4)
        ordered = tokens[:, list(order)]
        z = [ordered[:, 0]]
        for k in range(1, 4):
            h = block.stem(ordered[:, :k]) + block.positions[:k]
            mu, alpha = block.out(block.transformer(h))[:, -1].chunk(2, dim=1)
            z.append((ordered[:, k] - mu) * torch.exp(-alpha))
            total += alpha.sum(1)
        tokens = torch.stack([z[list(order).index(k)] for k in range(4)], dim=1)
    loss = tokens.square().flatten(1).sum(1) / 2 + total
    nats = -model.log_prob(x) - 32 / 2 * math.log(2 * math.pi)
    torch.testing.assert_close(nats, loss, rtol=1e-12, atol=1e-12)
    bits = model.losses(x, {}, RandomSource.for_batch(generator("cpu", 0), 3))["loss"]
    torch.testing.assert_close(bits, -model.log_prob(x) / (32 * math.log(2)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 0.0, 2.5])
def test_cached_sampling_with_guidance_equals_the_whole_sequence(scale: float) -> None:
    """The first k tokens give the parameters of token k + 1, without the cache and one at a time."""
    net, label = tiny("tarflow", num_classes=3), torch.tensor([2, 0])
    z = images(2, (32,))
    expected = z.unflatten(1, (4, 8))
    for block in reversed(net.blocks):
        latents = expected.flip(1) if block.reverse else expected
        x = latents[:, :1]
        for k in range(1, 4):
            parameters = []
            for each in (label, torch.tensor([3, 3])):
                h = block.stem(x) + block.positions[:k] + block.label(each)[:, None]
                parameters.append(block.out(block.transformer(h))[:, -1:])
            guided = parameters[1] + scale * (parameters[0] - parameters[1])
            mean, log_scale = guided.chunk(2, dim=2)
            x = torch.cat([x, latents[:, k : k + 1] * log_scale.exp() + mean], dim=1)
        expected = x.flip(1) if block.reverse else x
    found = net.inverse(z, label, scale)
    assert (tarflow.patchify(found, 2) - expected).abs().max() < 1e-10


# The model


POINTS = DataSpec("points", (2, 1, 1), num_bins=None)


def points_flow() -> NormalizingFlow:
    torch.manual_seed(0)
    return NormalizingFlow(
        POINTS, bijection=lambda shape, classes: Glow(shape, classes, num_levels=1, depth=3, width=16)
    )


@pytest.fixture(scope="module")
def trained_on_points() -> tuple[NormalizingFlow, Toy2D]:
    """Train a flow on points of known density, which it cannot fit exactly."""
    data, model = Toy2D("two_gaussians"), points_flow()
    points = data.split("train").images
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.01, total_iters=120)
    for step in range(120):
        rng = RandomSource.for_batch(generator("cpu", step), 256)
        rows = rng.integers(len(points))
        optimizer.zero_grad()
        model.losses(points[rows], {}, rng)["loss"].mean().backward()
        optimizer.step()
        schedule.step()
    return model.eval(), data


def test_a_trained_density_integrates_to_one(trained_on_points: tuple[NormalizingFlow, Toy2D]) -> None:
    model, _ = trained_on_points
    side = torch.linspace(-2, 2, 251)
    grid = torch.cartesian_prod(side, side).view(-1, 2, 1, 1)
    with torch.no_grad():
        mass = model.log_prob(grid).double().exp().sum().item() * (4 / 250) ** 2
    assert mass == pytest.approx(1, abs=0.01)


def test_bits_are_not_better_than_the_truth_and_near_it(trained_on_points: tuple[NormalizingFlow, Toy2D]) -> None:
    r"""The mean of :math:`\log p_{true} - \log p` over samples of the truth estimates a KL divergence."""
    model, data = trained_on_points
    x = data.split("test").images
    truth = data.log_density(x)
    assert truth is not None
    (estimate,) = model.likelihoods().values()
    assert estimate.kind == "exact"
    bits = estimate.bits_per_dim(x, {}, generator("cpu", 0)).double()
    excess = bits * 2 * math.log(2) + truth
    error = excess.std().item() / len(x) ** 0.5
    assert -4 * error < excess.mean().item() < 0.6, (excess.mean().item(), error)
    samples = draw_samples(model, 2000, postprocess=lambda x, spec: x).images.flatten(1)
    assert (samples.mean(0) - x.flatten(1).mean(0)).abs().max() < 0.1
    assert (samples.T.cov() - x.flatten(1).T.cov()).abs().max() < 0.05


@pytest.mark.parametrize("option", ["glow", "tarflow"])
def test_probabilities_of_all_discrete_images_sum_to_at_most_one(option: str) -> None:
    """Bits/dim of dequantised images are a bound: with a wrong width or sign of the bins, the sum exceeds 1."""
    spec = DataSpec("pairs", (1, 2, 2), num_bins=2)
    changes = {"num_levels": 1} if option == "glow" else {"patch_size": 1}
    net = tiny(option, (1, 2, 2), **changes)
    model = NormalizingFlow(spec, bijection=lambda shape, classes: net).double().eval()
    x = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4))).double().view(16, 1, 2, 2)
    (estimate,) = model.likelihoods().values()
    assert (estimate.kind, estimate.method) == ("exact", "uniform dequantisation")
    bits = torch.stack([estimate.bits_per_dim(x, {}, generator("cpu", k)) for k in range(200)])
    assert 0.001 < (2 ** (-4 * bits.mean(0))).sum() < 1
    # Without Jensen's inequality, the sum is the mass in [-2, 2]^4, which the density cannot exceed.
    assert (2 ** (-4 * bits)).mean(0).sum() < 1.05


@pytest.mark.parametrize("noise_std", [None, 0.3])
def test_noise_of_training_and_of_likelihoods(noise_std: float | None) -> None:
    """Uniform noise as wide as a bin, 2 / 16, or Gaussian noise in training; bits/dim always take the former."""
    spec = DataSpec("grey", (1, 8, 8), num_bins=17, padding=2)
    model = NormalizingFlow(spec, bijection=lambda shape, classes: Scaling(1.0), noise_std=noise_std)
    x, seen = torch.full((500, 1, 8, 8), 0.5), []
    model.bijection.register_forward_pre_hook(lambda module, args: seen.append(args[0] - 0.5))
    (estimate,) = model.likelihoods().values()
    model.losses(x, {}, RandomSource.for_batch(generator("cpu", 0), 500))
    estimate.terms(x, {}, generator("cpu", 0))
    metrics = model.validation_metrics(x, {}, RandomSource.for_batch(generator("cpu", 0), 500))
    torch.testing.assert_close(metrics["bits_per_dim"].mean(), estimate.bits_per_dim(x, {}, generator("cpu", 1)).mean(),
                               rtol=0, atol=0.02)  # fmt: skip
    assert seen[0].shape == (500, 1, 4, 4), "without padding"
    assert seen[0].std().item() == pytest.approx(noise_std or 0.125 / 12**0.5, rel=0.03)
    assert seen[1].std().item() == pytest.approx(0.125 / 12**0.5, rel=0.03) and seen[1].abs().max() <= 0.0625


class Scaling(Bijection):
    """z = x / std, with a fixed standard deviation."""

    def __init__(self, std: float) -> None:
        super().__init__()
        self.log_std = nn.Parameter(torch.tensor(std).log())

    def forward(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return (x / self.log_std.exp()).flatten(1), -self.log_std.expand(x.shape).flatten(1).sum(1)

    def inverse(self, z: Tensor, label: Tensor | None = None, guidance_scale: float = 1.0) -> Tensor:
        side = math.isqrt(z.shape[1])
        return (z * self.log_std.exp()).unflatten(1, (1, side, side))

    def nfe_networks(self) -> dict[str, nn.Module]:
        return {"flow": self}


def test_denoising_is_the_posterior_mean_of_a_gaussian() -> None:
    r"""If clean values are N(0, s^2), noisy ones are N(0, s^2 + sigma^2), and E[clean | noisy] is noisy times
    s^2 / (s^2 + sigma^2)."""
    s, sigma = 0.2, 0.1
    noisy_std = math.hypot(s, sigma)
    spec = DataSpec("noise", (1, 4, 4), num_bins=None, padding=1)
    model = NormalizingFlow(spec, bijection=lambda shape, classes: Scaling(noisy_std), noise_std=sigma).double()
    x = images(3, (1, 2, 2))
    torch.testing.assert_close(model.denoise(x), x * s**2 / noisy_std**2)
    drawn = model.sample(5000, generator=generator("cpu", 0))
    assert spec.crop(drawn).std().item() == pytest.approx(s**2 / noisy_std, rel=0.02)
    assert torch.equal(spec.pad(spec.crop(drawn)), drawn), "the padding is black"
    clean = s * images(5000, (1, 4, 4))
    loss = model.losses(clean, {}, RandomSource.for_batch(generator("cpu", 1), 5000))
    entropy = math.log(2 * math.pi * math.e * noisy_std**2) / (2 * math.log(2))
    assert loss["loss"].mean().item() == pytest.approx(entropy, abs=0.02)


@pytest.mark.parametrize(("noise", "scale", "calls"), [(None, 1.0, 3), (0.1, 1.0, 4), (None, 2.0, 6)])
def test_network_evaluations(noise: float | None, scale: float, calls: int) -> None:
    """Each block processes all tokens but the last one by one. Guidance doubles that, and denoising adds one pass."""
    spec = DataSpec("tiny", (2, 4, 4), num_classes=3)
    model = NormalizingFlow(
        spec, bijection=lambda shape, classes: tiny("tarflow", shape, classes), conditional=True, noise_std=noise,
        label_dropout=0.1, guidance_scale=scale,
    )  # fmt: skip
    drawn = draw_samples(model.double(), 2)
    assert drawn.nfe == dict.fromkeys(("block_1", "block_2", "block_3"), calls)
    assert draw_samples(points_flow(), 2, postprocess=lambda x, spec: x).nfe == {"flow": 1}


def test_images_are_decoded_exactly_and_temperature_scales_latents() -> None:
    data = build_data(compose("model=glow", "data=digits"))
    x, cond = next(data.batches("val", 4))
    model = NormalizingFlow(data.spec, bijection=lambda s, c: tiny("glow", s, c, std=0.1, num_levels=3)).double()
    shown = model.visualize(x.double(), cond, generator=generator("cpu", 0))
    assert shown["interpolation"].shape[:2] == (2, 9) and shown["temperatures"].shape[:2] == (5, 4)
    torch.testing.assert_close(shown["interpolation"][:, [0, -1]].flatten(0, 1), x.double(), rtol=0, atol=1e-9)
    zero = model.decode(torch.zeros(1, 64).double(), {})
    torch.testing.assert_close(shown["temperatures"][-1], zero.expand(4, -1, -1, -1))
    model.temperature = 0.5
    half = model.sample(4, generator=generator("cpu", 0))
    torch.testing.assert_close(half, shown["temperatures"][3].clamp(-1, 1))


def test_the_label_is_dropped_in_training_only() -> None:
    seen = []
    model = build_model(
        compose("model=tarflow", "data=digits", "model.conditional=true", "model.label_dropout=0.5"),
        build_data(compose("model=tarflow", "data=digits")),
    )
    assert isinstance(model, NormalizingFlow)
    model.bijection.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    cond = {"label": torch.full((64,), 3)}
    for mode in (True, False):
        model.train(mode)
        model.losses(torch.zeros(64, 1, 8, 8), cond, RandomSource.for_batch(generator("cpu", 0), 64))
    assert set(seen[0].tolist()) == {3, 10} and 20 < (seen[0] == 10).sum() < 44
    assert set(seen[1].tolist()) == {3}


# Errors


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=glow", "model.bijection.num_levels=4"], "model.bijection.num_levels=3"),
        (["model=glow", "data=toy2d"], "model.bijection.num_levels=1"),
        (["model=glow", "model.bijection.permutation=shuffle"], "permutation=shuffle: choose conv1x1 or reverse"),
        (["model=tarflow", "model.bijection.patch_size=3"], "use model.bijection.patch_size=1"),
        (["model=tarflow", "model.bijection.patch_size=8"], "use model.bijection.patch_size=1"),
        (["model=tarflow", "model.bijection.num_heads=5"], "multiple of model.bijection.num_heads=5"),
        (["model=tarflow", "data=toy2d"], "use model=glow"),
        (["model=tarflow", "model.label_dropout=0.1"], "add model.conditional=true"),
        (["model=tarflow", "model.conditional=true", "model.guidance_scale=2"], "train it with model.label_dropout"),
        (["model=glow", "model.conditional=true", "+model.label_dropout=0.1"], "Glow has no guidance"),
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(overrides: list[str], message: str) -> None:
    cfg = compose("data=digits", *overrides)
    with pytest.raises(UserError) as error:
        build_model(cfg, build_data(cfg))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_28x28_images_are_halved_twice() -> None:
    assert Glow((1, 28, 28), num_levels=2, depth=1, width=4)
    with pytest.raises(UserError, match=r"28x28 images only 2 times: use model\.bijection\.num_levels=2"):
        Glow((1, 28, 28), num_levels=3)


@pytest.mark.parametrize("option", ["glow", "tarflow"])
def test_an_inverse_that_overflows_is_named(option: str) -> None:
    net = tiny(option)
    weights = net.splits[0].bias if option == "glow" else net.blocks[0].out.bias
    nn.init.constant_(weights, 1000.0)
    with pytest.raises(TrainingStopped, match=r"level 1 of Glow|block 1 of TarFlow") as error:
        net.inverse(images(2, (32,)))
    assert "model.temperature" in str(error.value)


def test_an_overflow_ends_a_run_and_keeps_the_last_good_checkpoint(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = NormalizingFlow.losses

    def losses(self: NormalizingFlow, *args: Any) -> dict[str, Tensor]:
        if self.training and self.global_step == 3:  # after the evaluation and the checkpoint of step 2
            assert isinstance(self.bijection, Glow)
            self.bijection.prior.weight.data.fill_(200.0)  # the log-density is finite, but exp(200) is not
        return original(self, *args)

    monkeypatch.setattr(NormalizingFlow, "losses", losses)
    run = ["model=glow", *QUICK, "budget.steps=4", "callbacks.evaluation.num_evaluations=2", "callbacks.ema.decay=0"]
    assert cli(*run, "model.bijection.depth=1", "hydra.run.dir=run") == 1
    assert "overflowed in level 2 of Glow. Training was stopped; the last good checkpoint is kept" in error_line(capsys)
    stored = checkpoint(tmp_path / "run")
    assert stored["callbacks"]["TrainingClock"]["step"] == 2
    assert stored["state_dict"]["bijection.prior.weight"].abs().max() < 1


# Planted faults


@pytest.mark.parametrize(
    "fault",
    [
        lambda patch: patch.setattr(
            glow.AffineCoupling, "forward", lambda self, x, label: (glow_coupling(self, x, label)[0], 0)
        ),
        lambda patch: patch.setattr(
            glow, "standardize", lambda x, m: ((x - m.chunk(2, 1)[0]) * torch.exp(-m.chunk(2, 1)[1]), 0)
        ),
        lambda patch: patch.setattr(
            InvertibleConv1x1, "forward", lambda self, x: (inverted(self, x), self.lu.diagonal().sum())  # without h w
        ),
    ],
    ids=["coupling", "split", "pixels"],
)  # fmt: skip
def test_a_wrong_determinant_is_found(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        test_determinant_and_inverse("glow", (2, 4, 4), {}, 0)


glow_coupling = glow.AffineCoupling.forward


def inverted(conv: InvertibleConv1x1, x: Tensor) -> Tensor:
    lower, upper = conv._factors()
    return (conv.permutation @ lower @ upper @ x.flatten(2)).view_as(x)
