"""Energy-based models: Langevin steps, the gradient, densities, and recovery from divergence."""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from forking import in_processes, needs_fork
from gencompare.data.digits import Digits
from gencompare.errors import UserError
from gencompare.evaluation.sampling import draw_samples
from gencompare.generative_model import DataSpec
from gencompare.models.energy import EBM
from gencompare.models.langevin import Langevin, ReplayBuffer, input_gradient, last_state
from gencompare.networks.energy_networks import EnergyConvNet, EnergyMLP, EnergyNetwork, EnergyResNet
from gencompare.rng import RandomSource
from gencompare.training.budget import Budget
from gencompare.training.checkpoints import Checkpoints
from gencompare.training.clock import TrainingClock
from gencompare.training.ema import EMA
from gencompare.training.learning_rate import LearningRateScheduler
from gencompare.training.lightning_plugins import AtomicCheckpointIO
from gencompare.training.loggers import MetricLogger
from parts import assert_same_state

POINTS = DataSpec("points", (2, 1, 1), num_classes=3, num_bins=None)


class Quadratic(nn.Module):
    """phi(x) = (|x|^2 / 2, x_1, x_2), which gives any isotropic Gaussian energy with a linear head."""

    num_features = 3

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return torch.cat([x.square().sum(1, keepdim=True) / 2, x], dim=1)


def ebm(spec: DataSpec = POINTS, **options: Any) -> EBM:
    """Build an EBM that can take training steps without a Trainer."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "energy": partial(EnergyMLP, width=16, depth=2),
        "langevin": Langevin(step_size=0.005, noise_std=0.1),
        "num_langevin_steps": 4,
        "num_sampling_steps": 8,
        "buffer_size": 48,
        "energy_l2": 0.0,
        "optimizer": partial(torch.optim.SGD, lr=0.1),
    }
    model = EBM(spec, **(settings | options))
    optimizer = model.configure_optimizers()
    model.optimizers = lambda use_pl_optimizer=True: optimizer  # type: ignore[method-assign,assignment]
    model.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign,assignment]
    return model


def gaussian_energy(model: EBM, precision: float, mean: tuple[float, float]) -> None:
    """Set E(x) = precision |x - mean|^2 / 2 + constant."""
    with torch.no_grad():
        model.network.head.weight.copy_(torch.tensor([[precision, *(-precision * m for m in mean)]]))
        model.network.head.bias.fill_(7.0)


def train(
    model: EBM, x: Tensor, steps: int, cond: dict[str, Tensor] | None = None, first: int = 0
) -> dict[str, Tensor]:
    metrics: dict[str, Tensor] = {}
    for step in range(first, first + steps):
        model.rng = RandomSource.for_batch(torch.Generator().manual_seed(step), len(x))
        metrics = model.training_step((x, cond or {}), step)
    return metrics


# Langevin steps

CURVATURE = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
TEMPERATURE = 0.7


def stationary_covariance(step: float) -> Tensor:
    """Return the stationary covariance S of chains on x' L x / 2. A step is affine, x -> A x + B z, so S = A S A' + B
    B', which is solved as a linear system. A and B come from applying the step to basis vectors and noise."""
    langevin = Langevin(step, math.sqrt(2 * step * TEMPERATURE))
    assert langevin.temperature == pytest.approx(TEMPERATURE)

    def one(x: Tensor, z: Tensor) -> Tensor:
        return last_state(langevin.trajectory(lambda x: ((x @ CURVATURE) * x).sum(1) / 2, x, 1, lambda: z))

    eye, zero = torch.eye(2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    a, b = one(eye, zero).T, one(zero, eye).T
    assert torch.equal(one(zero, zero), zero), "the mean stays zero"
    solution = torch.linalg.solve(torch.eye(4, dtype=torch.float64) - torch.kron(a, a), (b @ b.T).flatten())
    return solution.view(2, 2)


def test_langevin_steps_leave_a_gaussian_invariant_as_the_step_vanishes() -> None:
    """At fixed temperature the covariance converges to T L^-1, with a bias proportional to the step."""
    truth = TEMPERATURE * torch.linalg.inv(CURVATURE)
    biases = [
        float(torch.linalg.matrix_norm(stationary_covariance(step) - truth)) for step in (0.04, 0.02, 0.01, 0.005)
    ]
    ratios = np.array(biases[:-1]) / np.array(biases[1:])
    assert biases[-1] < 0.01 * float(torch.linalg.matrix_norm(truth))
    assert np.allclose(ratios, 2, atol=0.1), ratios
    # Along an eigenvector: (T / lambda) / (1 - step lambda / 2), a bias of about T / 2 times the step.
    step = 0.04
    values = torch.linalg.eigvalsh(CURVATURE)
    expected = (TEMPERATURE / values / (1 - step * values / 2)).sort().values
    assert torch.allclose(torch.linalg.eigvalsh(stationary_covariance(step)), expected, rtol=1e-9)


def test_published_settings_are_equivalent_for_images_in_minus_one_to_one() -> None:
    """A chain of u in [0, 1] with step 10, noise 0.005 and clip 0.01 equals a chain of 2 u - 1 with 40, 0.01 and
    0.005."""
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(6, 5, generator=generator, dtype=torch.float64)
    x, noises = 2 * u - 1, torch.randn(4, 6, 5, generator=generator, dtype=torch.float64)

    def energy(x: Tensor) -> Tensor:
        return 0.004 * (x.square().sum(1) + (3 * x).sin().sum(1))

    theirs, ours, clipped = u, x, 0
    for z in noises:
        leaf = theirs.clone().requires_grad_()
        gradient = torch.autograd.grad(energy(2 * leaf - 1).sum(), leaf)[0]
        clipped += int((gradient.abs() > 0.01).sum())
        theirs = theirs - 10 * gradient.clamp(-0.01, 0.01) + 0.005 * z
    assert 0 < clipped < noises.numel(), "some gradients are clipped and some are not"
    rest = iter(noises)
    ours = last_state(Langevin(40, 0.01, 0.005).trajectory(energy, x, 4, lambda: next(rest)))
    assert torch.allclose(ours, 2 * theirs - 1, atol=1e-12)
    assert Langevin(40, 0.01, 0.005).temperature == pytest.approx(0.005**2 / (2 * 10)) == pytest.approx(1.25e-6)


def test_gradients_are_clipped_elementwise() -> None:
    slope = torch.tensor([5.0, -0.1, -8.0])
    (state,) = Langevin(1.0, 1e-30, grad_clip=0.5).trajectory(
        lambda x: x @ slope, torch.zeros(1, 3), 1, lambda: torch.zeros(1, 3)
    )
    assert torch.allclose(state, torch.tensor([[-0.5, 0.1, 0.5]]))


def test_input_gradients_are_per_row_and_work_without_grad_mode() -> None:
    x = torch.randn(4, 3)
    with torch.no_grad():
        gradient = input_gradient(lambda x: x.pow(3).sum(1), x)
    assert torch.allclose(gradient, 3 * x.square()) and not gradient.requires_grad and not x.requires_grad


# Learning


def test_the_gradient_is_that_of_maximum_likelihood() -> None:
    """For E = a |x|^2 / 2 + b . x, d/da is half the difference of mean squares and d/db the difference of means. The
    chains are those in the buffer after the step, since the batch uses all of them."""
    model = ebm(energy=Quadratic, buffer_size=32, optimizer=partial(torch.optim.SGD, lr=1.0), energy_l2=0.25)
    gaussian_energy(model, 4.0, (0.5, -0.2))
    before = model.network.head.weight.detach().double().clone().squeeze(0)
    x = torch.randn(32, 2, 1, 1)
    metrics = train(model, x, 1)
    real, chains = x.flatten(1).double().numpy(), model.replay.images.flatten(1).double().numpy()
    a, b = before[0].item(), before[1:].numpy()

    def energies(x: np.ndarray) -> np.ndarray:
        return a * (x**2).sum(1) / 2 + x @ b + 7

    expected = np.zeros(3)
    for x_, sign in ((real, 1), (chains, -1)):
        features = np.concatenate([(x_**2).sum(1, keepdims=True) / 2, x_], axis=1)
        # d/dw (E + l2 E^2) = (1 + 2 l2 E) phi for images, (-1 + 2 l2 E) phi for chains.
        expected += ((sign + 2 * 0.25 * energies(x_))[:, None] * features).mean(0)
    moved = before - model.network.head.weight.detach().double().squeeze(0)
    assert np.allclose(moved.numpy(), expected, rtol=1e-4), (moved, expected)
    loss = energies(real).mean() - energies(chains).mean()
    loss += 0.25 * ((energies(real) ** 2).mean() + (energies(chains) ** 2).mean())
    assert metrics["loss"].item() == pytest.approx(loss, rel=1e-4)
    assert metrics["energy_data"].item() == pytest.approx(energies(real).mean(), rel=1e-4)


def test_a_gaussian_is_learned() -> None:
    """Chains on E = a |x - m|^2 / 2 have variance (T / a) / (1 - step a / 2). For data with mean m and variance v, the
    fixed point of training is the a for which this variance is v: a = (1 - sqrt(1 - 2 step T / v)) / step, which is
    about T / v."""
    generator = torch.Generator().manual_seed(3)
    points = torch.tensor([0.4, -0.6]) + 0.5 * torch.randn(500, 2, generator=generator)
    model = ebm(
        energy=Quadratic, langevin=Langevin(step_size=0.1, noise_std=math.sqrt(0.05)), buffer_size=500, reinit_prob=0.0,
        num_langevin_steps=10,
        optimizer=partial(torch.optim.Adam, lr=0.03),
    )  # fmt: skip
    assert model.langevin.temperature == pytest.approx(0.25)
    gaussian_energy(model, 2.0, (0.0, 0.0))
    train(model, points.view(-1, 2, 1, 1), 120)
    mean, variance = points.mean(0), (points - points.mean(0)).square().mean().item()
    a, *b = model.network.head.weight.detach().squeeze(0).tolist()
    assert a == pytest.approx((1 - math.sqrt(1 - 2 * 0.1 * 0.25 / variance)) / 0.1, rel=0.07)
    assert [-value / a for value in b] == pytest.approx(mean.tolist(), abs=0.05)


def test_density_ratios_of_a_gaussian_are_exact() -> None:
    """The ratio is log N(x; m, T / a) - log N(y; m, T / a), computed from normalised densities."""
    model = ebm(energy=Quadratic, langevin=Langevin(step_size=0.02, noise_std=0.1))
    gaussian_energy(model, 3.0, (0.3, 0.1))
    x, y = torch.randn(5, 2, 1, 1), torch.randn(5, 2, 1, 1)
    law = torch.distributions.Normal(torch.tensor([0.3, 0.1]).double(), math.sqrt(0.25 / 3.0))

    def log_p(x: Tensor) -> Tensor:
        return law.log_prob(x.flatten(1).double()).sum(1)

    ratio = model.log_density_ratio(x, y)
    assert ratio.shape == (5,) and torch.allclose(ratio.double(), log_p(x) - log_p(y), rtol=1e-4, atol=1e-4)
    # The unnormalised log density differs by the constant log Z.
    constant = model.unnormalized_log_density(x).double() - log_p(x)
    assert torch.allclose(constant, constant[:1].expand(5), atol=1e-3)


def test_all_modes_of_a_mixture_are_learned() -> None:
    """For eight Gaussians in the plane, 5.7 standard deviations apart, chains from noise under averaged weights find
    all of them, each with an eighth of the mass to within a quarter."""
    angle = torch.arange(8) * math.pi / 4
    centres = 0.75 * torch.stack([angle.cos(), angle.sin()], 1)
    source = torch.Generator().manual_seed(1)
    model = ebm(
        energy=partial(EnergyMLP, width=32, depth=3), langevin=Langevin(step_size=0.015, noise_std=math.sqrt(0.006)),
        num_langevin_steps=10,
        num_sampling_steps=300, buffer_size=1024, reinit_prob=0.02,
        optimizer=partial(torch.optim.Adam, lr=1e-2, betas=(0.0, 0.999)),
    )  # fmt: skip
    average: list[Tensor] = []
    for step in range(400):
        if step == 300:
            for group in model.optimizers().param_groups:  # type: ignore[union-attr]
                group["lr"] = 1e-3
        which = torch.randint(8, (256,), generator=source)
        x = centres[which] + 0.1 * torch.randn(256, 2, generator=source)
        train(model, x.view(-1, 2, 1, 1), 1, first=step)
        if step >= 200:
            weights = [p.detach().clone() for p in model.network.parameters()]
            average = [torch.lerp(a, w, 0.02) for a, w in zip(average or weights, weights, strict=True)]
    for p, a in zip(model.network.parameters(), average, strict=True):
        p.data.copy_(a)
    drawn = model.sample(2000, generator=torch.Generator().manual_seed(2)).flatten(1)
    distance = torch.cdist(drawn, centres)
    assert (distance.min(1).values < 0.3).float().mean() > 0.9, "three standard deviations"
    share = torch.bincount(distance.argmin(1), minlength=8) / 2000
    assert (share > 0.75 / 8).all() and (share < 1.25 / 8).all(), 8 * share


def test_chains_of_a_batch_are_distinct_and_have_its_classes() -> None:
    model = ebm(conditional=True, buffer_size=30)
    label = torch.tensor([2, 0, 0, 1, 2, 2])
    rng = RandomSource.for_batch(torch.Generator().manual_seed(0), 6)
    indices = model.replay.sample_indices(label, rng)
    assert torch.equal(indices // 10, label) and len(set(indices.tolist())) == 6
    train(model, torch.randn(6, 2, 1, 1), 1, {"label": label})
    assert model.replay.started.view(3, 10).sum(1).tolist() == [2, 1, 3]


def test_chains_continue_from_the_buffer_unless_reinitialised() -> None:
    """With a negligible gradient and little noise, a chain stays close to where it starts."""
    kept: dict[float, Tensor] = {}
    for reinit_prob in (0.0, 1.0):
        model = ebm(energy=Quadratic, buffer_size=8, reinit_prob=reinit_prob, langevin=Langevin(1e-12, 1e-9))
        x = torch.randn(8, 2, 1, 1)
        train(model, x, 1)
        first = model.replay.images.clone()
        assert first.abs().max() <= 1 and first.abs().max() > 0.5, "uniform in [-1, 1]"
        train(model, x, 1, first=1)
        kept[reinit_prob] = (model.replay.images - first).abs().amax((1, 2, 3))
    assert kept[0.0].max() < 1e-6 and kept[1.0].min() > 1e-3


def test_chains_of_images_are_stored_as_uint8_and_stay_in_range() -> None:
    spec = DataSpec("padded", (1, 8, 8), padding=2)
    model = ebm(spec, energy=partial(EnergyResNet, channels=(4,)), langevin=Langevin(1.0, 0.5))
    train(model, torch.rand(12, 1, 8, 8), 2)
    assert model.replay.images.dtype == torch.uint8
    middle = torch.full((48, *spec.shape), 0.5)
    states, started = model.replay.get(torch.arange(48), middle)
    assert states.abs().max() <= 1 and 12 <= int(started.sum()) <= 24
    x = model.sample(3, generator=torch.Generator().manual_seed(0))
    for images in (x, states[started]):
        assert (images[:, :, :2] == -1).all() and (images[..., -2:] == -1).all()
        assert images[..., 2:-2, 2:-2].max() > 0
    again = model.replay.get(torch.arange(48), middle)[0]
    model.replay.put(torch.arange(48), again)
    assert torch.equal(model.replay.get(torch.arange(48), middle)[0], again), "stored values are exact"


def test_a_chain_that_moves_less_than_one_level_per_batch_still_moves() -> None:
    """A drift of 0.2 levels per batch is 20 levels after 100 batches."""
    replay = ReplayBuffer(DataSpec("images", (1, 16, 16)), 4)
    everywhere, source = torch.arange(4), torch.Generator().manual_seed(0)
    replay.put(everywhere, torch.full((4, 1, 16, 16), -0.5))
    middle = torch.full((4, 1, 16, 16), 0.5)
    before = replay.get(everywhere, middle)[0].mean()
    for _ in range(100):
        states, _ = replay.get(everywhere, torch.rand(4, 1, 16, 16, generator=source))
        replay.put(everywhere, states + 0.2 * 2 / 255)
    moved = (replay.get(everywhere, middle)[0].mean() - before) * 255 / 2
    # Each of 1,024 values is rounded 100 times, with a variance of at most 1/6 each.
    assert float(moved) == pytest.approx(20, abs=4 * math.sqrt(100 / 6 / 1024))


# Conditions, samples, networks


def test_a_class_adds_one_product_with_the_features() -> None:
    model = ebm(conditional=True)
    network = model.network
    assert network.classes is not None
    x, y, other = torch.randn(4, 2, 1, 1), torch.tensor([0, 1, 2, 0]), torch.tensor([1, 1, 0, 2])
    assert torch.equal(model.energy(x, {"label": y}), model.energy(x, {"label": other})), (
        "all classes have the same initial energy"
    )
    nn.init.normal_(network.classes.weight)
    difference = model.energy(x, {"label": y}) - model.energy(x, {"label": other})
    v = network.classes.weight
    assert torch.allclose(difference, ((v[y] - v[other]) * network.trunk(x)).sum(1), atol=1e-6)


def test_conditional_samples_have_the_requested_class() -> None:
    places = torch.tensor([[0.6, 0.0], [-0.5, 0.5], [-0.3, -0.7]])
    label = torch.arange(96) % 3
    x = places[label][:, :, None, None] + 0.05 * torch.randn(96, 2, 1, 1, generator=torch.Generator().manual_seed(9))
    model = ebm(
        conditional=True, buffer_size=600, num_langevin_steps=10, num_sampling_steps=100,
        langevin=Langevin(0.001, math.sqrt(0.002)),
        energy=partial(EnergyMLP, width=32, depth=2), optimizer=partial(torch.optim.Adam, lr=1e-2, betas=(0.0, 0.999)),
    )  # fmt: skip
    train(model, x, 100, {"label": label})
    drawn = model.sample(96, {"label": label}, generator=torch.Generator().manual_seed(1)).flatten(1)
    assert (drawn - places[label]).norm(dim=1).median() < 0.2
    with pytest.raises(UserError, match="label"):
        model.sample(2, generator=torch.Generator())


def test_samples_do_not_depend_on_the_buffer_and_nfe_is_counted() -> None:
    model = ebm(Digits.spec, energy=partial(EnergyResNet, channels=(4,)), num_sampling_steps=7)
    before = draw_samples(model, 6, seed=1, chunk_size=4)
    model.replay.images.random_(0, 255)
    model.replay.started.fill_(True)
    after = draw_samples(model, 6, seed=1, chunk_size=4)
    assert torch.equal(before.images, after.images)
    assert before.nfe == {"network": 7.0}
    assert not any(name.startswith("replay") for name in model.averaged_parameters())


def test_spectral_norm_gives_every_trunk_weight_norm_one() -> None:
    model = ebm(Digits.spec, energy=partial(EnergyResNet, channels=(8, 12)), spectral_norm=True).train()
    for _ in range(200):
        model.network(torch.zeros(1, 1, 8, 8))
    model.eval()
    weights = [m.weight for m in model.network.trunk.modules() if isinstance(m, nn.Conv2d)]
    assert len(weights) == 1 + 2 + 3
    for weight in weights:
        assert torch.linalg.matrix_norm(weight.detach().flatten(1), 2).item() == pytest.approx(1, abs=0.02)
    model.train()
    train(model, torch.rand(8, 1, 8, 8), 2)  # chains with cached weights, then an optimiser step


def test_each_stage_halves_the_side_down_to_four() -> None:
    """Sizes fall from 32 to 4 in the three stages of the published network; 8x8 is halved once, and 1x1 never."""
    for side, sides in ((32, [16, 8, 4]), (8, [4, 4, 4]), (1, [1, 1, 1])):
        network = EnergyResNet((3, side, side), channels=(4, 6, 8), num_blocks=3)
        seen: list[tuple[int, ...]] = []
        for block in network.blocks[2::3]:
            block.register_forward_hook(lambda module, args, out, seen=seen: seen.append(tuple(out.shape[1:])))
        assert network(torch.zeros(2, 3, side, side)).shape == (2, 8)
        assert seen == [(c, s, s) for c, s in zip((4, 6, 8), sides, strict=True)]


def test_the_plain_network_has_the_layers_of_the_published_one() -> None:
    """The layers are those of ``VanillaNet`` in github.com/point0bar1/ebm-anatomy: 3x3 to 32 channels, 4x4 with stride
    2 to 64, 128 and 256, and 4x4 to one number. Other sizes are halved while they are at least four; points have one
    layer."""
    published = EnergyNetwork(EnergyConvNet((3, 32, 32)))
    sizes = [3 * 32 * 9 + 32, 32 * 64 * 16 + 64, 64 * 128 * 16 + 128, 128 * 256 * 16 + 256, 256 * 16 + 1]
    assert sum(p.numel() for p in published.parameters()) == sum(sizes)
    assert published.trunk.act.negative_slope == 0.05  # type: ignore[union-attr]
    for shape, features in (((1, 8, 8), 8 * 4 * 4), ((1, 64, 64), 16 * 4 * 4), ((2, 1, 1), 4)):
        trunk = EnergyConvNet(shape, channels=4, max_channels=16)
        assert trunk(torch.zeros(3, *shape)).shape == (3, features) and trunk.num_features == features
    assert isinstance(EnergyConvNet((1, 8, 8), negative_slope=None).act, nn.SiLU)


def test_visualisations_order_images_by_energy() -> None:
    """With E = |x|^2 / 2 + constant, the dark grey image has the lowest energy in each row."""
    spec = DataSpec("grey", (1, 4, 4))
    model = ebm(spec, energy=Quadratic4, num_sampling_steps=30)
    with torch.no_grad():
        model.network.head.weight.fill_(1.0)
    x = torch.tensor([0.9, -0.1, 0.5]).view(3, 1, 1, 1).expand(3, 1, 4, 4).contiguous()
    grids = model.visualize(x, {}, generator=torch.Generator().manual_seed(0))
    assert set(grids) == {"kinds", "ordered", "chains"}
    assert grids["kinds"].shape == (6, 3, 1, 4, 4) and grids["chains"].shape == (3, 10, 1, 4, 4)
    assert torch.allclose(grids["kinds"][0, :, 0, 0, 0], torch.tensor([-0.1, 0.5, 0.9]))
    energies = grids["ordered"].flatten(2).square().sum(2).flatten()
    assert (energies.diff() >= 0).all()
    assert torch.equal(grids["chains"][:, -1], model.sample(3, generator=generator_after_corruptions()))


class Quadratic4(nn.Module):
    """phi(x) = |x|^2 / 2."""

    num_features = 1

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).square().sum(1, keepdim=True) / 2


def generator_after_corruptions() -> torch.Generator:
    """Return a generator in its state after the corruptions, which draw a permutation, uniform and normal numbers."""
    generator = torch.Generator().manual_seed(0)
    torch.randperm(16, generator=generator)
    torch.rand(3, 1, 4, 4, generator=generator)
    torch.randn(3, 1, 4, 4, generator=generator)
    return generator


# Divergence


def test_a_diverged_step_is_rolled_back_and_counted() -> None:
    """After a step with a far too high learning rate, weights, moments and chains equal the last snapshot exactly. A
    second divergence, after training from the snapshot, gives the same."""
    model = ebm(optimizer=partial(torch.optim.Adam, lr=1e-3), snapshot_every_n_steps=5, divergence_threshold=10.0)
    optimizer: Any = model.optimizers()
    x = torch.randn(16, 2, 1, 1)
    assert train(model, x, 10)["rollbacks"] == 0
    good, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    for count, step in ((1, 10), (2, 14)):
        train(model, x, 3, first=step)
        assert not torch.equal(good["network.head.weight"], model.network.head.weight)
        optimizer.param_groups[0]["lr"] = 1e4
        metrics = train(model, x, 1, first=step + 3)
        optimizer.param_groups[0]["lr"] = 1e-3
        assert {name: value.item() for name, value in metrics.items()} == {"rollbacks": count}
        assert model.snapshot.consecutive_rollbacks == count
        for name, value in good.items():
            assert torch.equal(value, model.state_dict()[name]), name
        for k, state in optimizer.state_dict()["state"].items():
            assert all(torch.equal(value, moments[k][name]) for name, value in state.items())
    metrics = train(model, x, 5, first=18)
    assert metrics["rollbacks"] == 2 and set(metrics) > {"loss", "grad"}
    assert model.snapshot.consecutive_rollbacks == 0, "five successful steps make a new snapshot"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_energies_are_a_divergence(bad: float) -> None:
    model = ebm()
    x = torch.randn(16, 2, 1, 1)
    train(model, x, 2)
    with torch.no_grad():
        model.network.head.bias.fill_(bad)
    assert set(train(model, x, 1, first=2)) == {"rollbacks"}
    assert torch.isfinite(model.network.head.bias).all()


class Jump:
    """A learning-rate factor that is far too high from step ``at`` to step ``last``."""

    def __init__(self, at: int, last: int | None = None) -> None:
        self.at, self.last = at, last

    def __call__(self, step: int, progress: float) -> float:
        return 1e7 if step >= self.at and (self.last is None or step <= self.last) else 1.0


def run(
    folder: Path, *, steps: int, until: int | None = None, resume: bool = False, **options: Any
) -> tuple[EBM, list[pl.Callback]]:
    """Train on digits with the project's trainer, stopping early after step ``until``; ``resume`` from the
    checkpoint."""

    class StopAt(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if until is not None and trainer.callbacks[0].step == until:
                trainer.should_stop = True

    torch.manual_seed(0)
    data = Digits(batch_size=16, seed=3)
    settings: dict[str, Any] = {
        "energy": partial(EnergyMLP, width=16, depth=2), "langevin": Langevin(0.125, 0.05),
        "num_langevin_steps": 3, "buffer_size": 400, "snapshot_every_n_steps": 4, "divergence_threshold": 50.0,
        "conditional": True, "data_noise": 0.05,
        "optimizer": partial(torch.optim.Adam, lr=1e-3),
    }  # fmt: skip
    model = EBM(data.spec, **(settings | options))
    callbacks: list[pl.Callback] = [
        TrainingClock(5, 16, Budget(steps=steps)), LearningRateScheduler(), EMA(0.9), StopAt(), MetricLogger(1),
        Checkpoints(folder, every_minutes=0),
    ]  # fmt: skip
    trainer = pl.Trainer(
        callbacks=callbacks, plugins=[AtomicCheckpointIO()], logger=False, max_epochs=-1, limit_val_batches=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(model, datamodule=data, ckpt_path=folder / "last.ckpt" if resume else None, weights_only=resume or None)
    return model, callbacks


def test_a_resumed_run_rolls_back_like_an_uninterrupted_one(tmp_path: Path) -> None:
    """The run is interrupted after step 10, and diverges at step 11 with a snapshot from step 8."""
    options: dict[str, Any] = {"steps": 15, "lr_schedule": Jump(11, 11)}
    whole, whole_callbacks = run(tmp_path / "whole", **options)
    run(tmp_path / "broken", until=10, **options)
    resumed, callbacks = run(tmp_path / "broken", resume=True, **options)
    assert whole.snapshot.num_rollbacks == resumed.snapshot.num_rollbacks == 1
    assert_same_state(whole, resumed)
    for name, value in whole_callbacks[2].average.items():  # type: ignore[attr-defined]
        assert torch.equal(value, callbacks[2].average[name]), name  # type: ignore[attr-defined]
        assert torch.isfinite(value).all() and value.abs().max() < 10, "the EMA never includes rolled-back weights"
    assert {"replay.images", "replay.started"} <= whole.state_dict().keys()


def test_repeated_divergence_ends_the_run_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"diverged.*3 times in a row.*last good checkpoint is kept.*model\.optimizer\.lr"
    ):
        run(tmp_path, steps=40, lr_schedule=Jump(9), max_rollbacks=2)
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert stored["callbacks"]["TrainingClock"]["step"] == 11, (
        "the checkpoint is saved after two rolled-back steps, and the third ends the run"
    )
    weights = [value for name, value in stored["state_dict"].items() if name.startswith("network")]
    assert all(torch.isfinite(w).all() and w.abs().max() < 10 for w in weights)


def test_divergence_before_the_first_checkpoint_is_reported(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"diverged.*1 times in a row.*no checkpoint had been saved yet.*model\.optimizer"
    ):
        run(tmp_path, steps=40, lr_schedule=Jump(0), max_rollbacks=0)
    assert not (tmp_path / "last.ckpt").exists()


# Several processes


def train_on_part(rank: int, world: int, alone: bool = False) -> dict[str, Tensor]:
    """Train one of ``world`` processes for six steps on its part of each batch; the fourth step diverges."""
    model = ebm(conditional=True, snapshot_every_n_steps=2, divergence_threshold=10.0, data_noise=0.1)
    rows = slice(rank * 8 // world, (rank + 1) * 8 // world)
    if alone:
        put = model.replay.put
        model.replay.put = lambda indices, x: put(indices[rows], x[rows])  # type: ignore[method-assign]
    generator = torch.Generator().manual_seed(4)
    x, label = torch.randn(48, 2, 1, 1, generator=generator), torch.randint(3, (48,), generator=generator)
    for step in range(6):
        for group in model.optimizers().param_groups:  # type: ignore[union-attr]
            group["lr"] = 1e5 if step == 3 else 0.1
        model.rng = RandomSource(torch.Generator().manual_seed(step), rows.start, rows.stop, 8)
        model.training_step((x[8 * step :][rows], {"label": label[8 * step :][rows]}), step)
    assert model.snapshot.num_rollbacks == 1
    return model.state_dict()


@needs_fork
def test_two_processes_learn_the_same_as_one(tmp_path: Path) -> None:
    (whole,) = in_processes(1, tmp_path, train_on_part)
    first, second = in_processes(2, tmp_path, train_on_part)
    for name, value in whole.items():
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(value.float(), first[name].float(), atol=2e-6), name
    # Without gathering the chains, the buffers differ, so the test can fail.
    first, second = in_processes(2, tmp_path, train_on_part, True)
    assert not torch.equal(first["replay.images"], second["replay.images"])


# Invalid input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_langevin_steps": 0}, "num_langevin_steps"),
        ({"num_sampling_steps": 0}, "num_sampling_steps"),
        ({"reinit_prob": 1.5}, "reinit_prob"),
        ({"energy_l2": -1.0}, "energy_l2"),
        ({"data_noise": -0.1}, "data_noise"),
        ({"divergence_threshold": 0.0}, "divergence_threshold"),
        ({"snapshot_every_n_steps": 0}, "snapshot_every_n_steps"),
        ({"buffer_size": 2, "conditional": True}, "buffer_size"),
        ({"energy": partial(EnergyMLP, depth=0)}, "depth"),
        ({"energy": partial(EnergyResNet, channels=())}, "channels"),
        ({"energy": partial(EnergyConvNet, channels=0)}, "max_channels"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_invalid_settings_raise_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ebm(**options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"step_size": 0.0}, "step_size"), ({"noise_std": 0.0}, "noise_std"), ({"grad_clip": 0.0}, "grad_clip")],
)
def test_invalid_langevin_settings_raise_an_error(changes: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=f"langevin.{message}"):
        Langevin(**({"step_size": 1.0, "noise_std": 1.0} | changes))


def test_a_batch_larger_than_the_buffer_raises_an_error() -> None:
    with pytest.raises(UserError, match=r"buffer_size.*global_batch_size"):
        train(ebm(buffer_size=15), torch.randn(16, 2, 1, 1), 1)


def test_validation_metrics_are_per_image() -> None:
    model = ebm()
    x = torch.zeros(5, 2, 1, 1)
    metrics = model.validation_metrics(x, {}, RandomSource.for_batch(torch.Generator().manual_seed(0), 5))
    assert all(value.shape == (5,) for value in metrics.values())
    assert torch.allclose(metrics["energy_held_out"], model.energy(x))
