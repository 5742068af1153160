"""GANs: training steps against manual ones, learning of known mixtures, and training with two processes."""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from composing import options
from forking import in_processes, needs_fork
from gencompare.data.digits import Digits
from gencompare.errors import UserError
from gencompare.generative_model import DataSpec
from gencompare.models.adversarial import Hinge, NonSaturating, Relativistic, Wasserstein
from gencompare.models.discriminator_augmentation import ADA
from gencompare.models.gan import GAN
from gencompare.models.gan_penalties import R1, R2, WassersteinGP
from gencompare.models.manual_optimization import average_gradients, frozen
from gencompare.networks.gan_networks import (
    MLPDiscriminator,
    MLPGenerator,
    ProjectionHead,
    ResNetDiscriminator,
    ResNetGenerator,
    apply_spectral_norm,
)
from gencompare.rng import RandomSource
from parts import part

POINTS = DataSpec("points", (2, 1, 1), num_classes=3, num_bins=None)


def points_gan(**options: Any) -> GAN:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "generator": partial(MLPGenerator, width=32, depth=2),
        "discriminator": partial(MLPDiscriminator, width=32, depth=2, num_features=16),
        "adversarial": NonSaturating(),
        "latent_dim": 2,
        "optimizer": partial(torch.optim.SGD, lr=0.1),
    }
    return without_trainer(GAN(POINTS, **(settings | options)))


def without_trainer(model: GAN) -> GAN:
    """Make the model able to take training steps without a Trainer."""
    optimizers = model.configure_optimizers()
    model.optimizers = lambda: optimizers  # type: ignore[method-assign,assignment]
    model.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign,assignment]
    return model


def train(model: GAN, x: Tensor, cond: dict[str, Tensor], steps: int) -> dict[str, Tensor]:
    metrics: dict[str, Tensor] = {}
    for step in range(steps):
        model.rng = RandomSource.for_batch(torch.Generator().manual_seed(step), len(x))
        metrics = model.training_step((x, cond), step)
    return metrics


def test_the_projection_adds_an_inner_product_of_class_and_features() -> None:
    """D(x, y) - D(x, y') = (v_y - v_y') . phi(x) (Miyato and Koyama 2018, eq. 3)."""
    torch.manual_seed(0)
    head = ProjectionHead(6, 3)
    assert head.classes is not None
    nn.init.normal_(head.classes.weight)
    phi, label, other = torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1]), torch.tensor([1, 1, 0, 2, 0])
    v = head.classes.weight
    assert torch.allclose(head(phi, label) - head(phi, other), ((v[label] - v[other]) * phi).sum(1), atol=1e-5)
    plain = phi @ head.score.weight[0] + head.score.bias
    assert torch.allclose(head(phi, label), plain + (v[label] * phi).sum(1), atol=1e-5)


def test_spectral_norm_gives_every_weight_norm_one() -> None:
    torch.manual_seed(0)
    network = ResNetDiscriminator((1, 8, 8), 10, channels=8, num_features=16).train()
    apply_spectral_norm(network)
    for _ in range(200):
        network(torch.zeros(1, 1, 8, 8), torch.tensor([0]))
    network.eval()
    weights = [m.weight for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.Embedding))]
    # Two blocks of two convolutions, one skip, the stem and the linear layer, the score and the class embedding.
    assert len(weights) == 2 * 2 + 1 + 2 + 2
    for weight in weights:
        assert torch.linalg.matrix_norm(weight.detach().flatten(1), 2).item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(("r1", "conditional", "d_steps"), [(0.0, False, 1), (3.0, False, 2), (0.7, True, 1)])
def test_a_training_step_matches_a_manual_one(r1: float, conditional: bool, d_steps: int) -> None:
    """The manual step is gradient descent with autograd on copies: D steps with G fixed, each on its part of the images
    with new noise, then a G step with D fixed."""
    model = points_gan(penalty={"r1": R1(r1)} if r1 else None, conditional=conditional, d_steps=d_steps)
    x, label = torch.randn(6, 2, 1, 1), torch.tensor([0, 1, 2, 2, 1, 0])
    twin = copy.deepcopy(model)
    metrics = train(model, x, {"label": label}, 1)

    noise = torch.Generator().manual_seed(0)
    d, g = twin.discriminator, twin.generator

    def fakes(y: Tensor | None) -> Tensor:
        return g(torch.randn(6 // d_steps, 2, generator=noise), y)

    def descend(loss: Tensor, parameters: list[nn.Parameter]) -> None:
        for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.data -= 0.1 * gradient

    for k in range(d_steps):
        y = label[k::d_steps] if conditional else None
        real, fake = x[k::d_steps].clone().requires_grad_(), fakes(y).detach()
        slope = torch.autograd.grad(d(real, y).sum(), real, create_graph=True)[0]
        loss = -torch.log(torch.sigmoid(d(real, y))).mean() - torch.log(1 - torch.sigmoid(d(fake, y))).mean()
        descend(loss + r1 / 2 * slope.square().sum((1, 2, 3)).mean(), list(d.parameters()))
    y = label[::d_steps] if conditional else None
    g_loss = -torch.log(torch.sigmoid(d(fakes(y), y))).mean()
    descend(g_loss, list(g.parameters()))
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5), name
    assert metrics["g_loss"].item() == pytest.approx(g_loss.item(), abs=1e-5)
    assert metrics["d_loss"].item() == pytest.approx(loss.item(), abs=1e-5)
    assert all(not value.requires_grad for value in metrics.values())


def test_only_the_generator_is_averaged() -> None:
    names = set(points_gan(conditional=True).averaged_parameters())
    assert names == {name for name in points_gan(conditional=True).state_dict() if name.startswith("generator.")}
    assert "generator.labels.weight" in names


@pytest.mark.parametrize(
    ("group", "option"), [(g, o) for g in ("penalty", "adversarial") for o in options(f"model/{g}")]
)
def test_every_option_trains(group: str, option: str) -> None:
    model = points_gan(**{group: part(group, option)})
    before = copy.deepcopy(model.state_dict())
    metrics = train(model, torch.randn(6, 2, 1, 1), {}, 2)
    assert all(value.isfinite() for value in metrics.values())
    assert set(model.penalty) <= set(metrics)
    changed = {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"generator", "discriminator"} <= changed


def test_a_frozen_network_passes_gradients_to_its_input() -> None:
    network = nn.Linear(2, 1)
    x = torch.randn(3, 2, requires_grad=True)
    with frozen(network):
        network(x).sum().backward()
    assert x.grad is not None and network.weight.grad is None
    assert all(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize(
    ("adversarial", "options"),
    [
        (NonSaturating(), {"penalty": {"r1": R1(0.1)}}),
        (Hinge(), {"spectral_norm": True}),
        (Wasserstein(), {"penalty": {"wgan_gp": WassersteinGP(0.1)}}),
    ],
    ids=["r1", "sn", "wgan_gp"],
)
def test_a_mixture_of_classes_is_learned(adversarial: Any, options: dict[str, Any]) -> None:
    """For three points in the plane, one per class, the samples of a class are near its point."""
    places = torch.tensor([[0.6, 0.0], [-0.5, 0.5], [-0.3, -0.7]])
    label = torch.arange(48) % 3
    x = places[label][:, :, None, None] + 0.02 * torch.randn(48, 2, 1, 1, generator=torch.Generator().manual_seed(9))
    model = points_gan(
        adversarial=adversarial,
        conditional=True,
        optimizer=partial(torch.optim.Adam, lr=3e-3, betas=(0.0, 0.9)),
        **options,
    )
    train(model, x, {"label": label}, 200)
    drawn = model.sample(48, {"label": label}, generator=torch.Generator().manual_seed(1)).flatten(1)
    distance = (drawn - places[label]).norm(dim=1)
    assert distance.median() < 0.2, distance.median()
    with pytest.raises(UserError, match="label"):
        model.sample(2, generator=torch.Generator())


def test_a_ring_of_eight_modes_is_recovered() -> None:
    """Eight Gaussians of standard deviation 0.09 on a circle of radius 0.6 have 96 % of points within 2.5 standard
    deviations of their mode. Most samples are as close to a mode, and evenly divided among the modes."""
    steps, batch, lr = 450, 256, 5e-3
    angle = torch.arange(8) * math.pi / 4
    modes = 0.6 * torch.stack([angle.cos(), angle.sin()], dim=1)
    numbers = torch.Generator().manual_seed(5)
    x = modes.repeat(1024, 1) + 0.09 * torch.randn(8192, 2, generator=numbers)
    model = points_gan(
        generator=partial(MLPGenerator, width=64, depth=2),
        discriminator=partial(MLPDiscriminator, width=64, depth=2, num_features=64),
        adversarial=Relativistic(),
        penalty={"r1": R1(0.02), "r2": R2(0.02)},
        latent_dim=4,
        optimizer=partial(torch.optim.Adam, lr=lr, betas=(0.0, 0.9)),
    )
    for step in range(steps):
        for optimizer in model.optimizers():  # type: ignore[union-attr]
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        model.rng = RandomSource.for_batch(numbers, batch)
        rows = torch.randint(len(x), (batch,), generator=numbers)
        model.training_step((x[rows][:, :, None, None], {}), step)
    distance = torch.cdist(model.sample(4000, generator=torch.Generator().manual_seed(1)).flatten(1), modes)
    near, mode = distance.min(dim=1)
    on = near < 2.5 * 0.09
    weights = torch.bincount(mode[on], minlength=8) / on.sum()
    assert on.double().mean() > 0.8, on.double().mean()
    assert (weights - 1 / 8).abs().max() < 0.25 / 8, weights


def test_padding_of_samples_is_black() -> None:
    spec = DataSpec("padded", (1, 8, 8), padding=2)
    model = digits_gan(spec)
    x = model.sample(3, generator=torch.Generator().manual_seed(0))
    assert (x[..., :2, :] == -1).all() and (x[..., -2:] == -1).all() and (x[..., 2:-2, 2:-2] > -1).all()


def digits_gan(spec: DataSpec = Digits.spec, **options: Any) -> GAN:
    torch.manual_seed(0)
    return GAN(
        spec,
        generator=partial(ResNetGenerator, channels=8),
        discriminator=partial(ResNetDiscriminator, channels=8, num_features=8),
        adversarial=Relativistic(),
        penalty={"r1": R1(1.0), "r2": R2(1.0), "wgan_gp": WassersteinGP(1.0)},
        discriminator_augmentation=partial(ADA, interval=2, adjustment_images=100, target=0.0, cutout_multiplier=1.0),
        latent_dim=4,
        grad_clip=0.5,
        optimizer=partial(torch.optim.SGD, lr=0.05),
        **options,
    )


def train_on_part(rank: int, world: int, reduce: bool = True) -> dict[str, Tensor]:
    """Train one of ``world`` processes for three steps on its part of each batch, with two discriminator steps each."""
    model = without_trainer(digits_gan(conditional=True, d_steps=2))
    for optimizer in model.optimizers():  # type: ignore[union-attr]
        optimizer.register_step_pre_hook(lambda o, *_: model.on_before_optimizer_step(o))
    if not reduce:
        import gencompare.models.manual_optimization as module

        module.average_gradients = lambda parameters: None  # type: ignore[assignment]
    x, cond = next(iter(Digits().batches("train", 24)))
    rows = slice(rank * 8 // world, (rank + 1) * 8 // world)
    for step in range(3):
        batch, labels = x[8 * step :][rows], cond["label"][8 * step :][rows]
        model.rng = RandomSource(torch.Generator().manual_seed(step), rows.start, rows.stop, 8)
        model.training_step((batch, {"label": labels}), step)
    return model.state_dict()


@needs_fork
def test_two_processes_learn_the_same_as_one(tmp_path: Path) -> None:
    (alone,) = in_processes(1, tmp_path, train_on_part)
    # The strength was adjusted three times, from two discriminator steps of 4 images each.
    assert alone["augmentation.strength"] > 0 and int(alone["seen"]) == 24
    first, second = in_processes(2, tmp_path, train_on_part)
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(value, first[name], atol=2e-6), name
    # Without gradient averaging, the processes differ, so the test can fail.
    first, second = in_processes(2, tmp_path, train_on_part, False)
    assert any(not torch.allclose(first[name], second[name], atol=1e-4) for name in alone)


def test_averaging_gradients_is_a_no_op_with_one_process() -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.tensor([1.0, 2.0, 3.0])
    average_gradients([p])
    assert p.grad.tolist() == [1.0, 2.0, 3.0]


def test_a_step_skipped_by_the_gradient_scaler_has_norm_zero() -> None:
    """In half precision with a far too large scale, gradients overflow and training continues."""
    model = points_gan()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    trainer = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler))
    model._trainer = trainer  # type: ignore[assignment]
    model.manual_backward = lambda loss: (1e6 * scaler.scale(loss)).backward()  # type: ignore[method-assign,assignment]
    x, before = torch.randn(16, 2, 1, 1), [p.clone() for p in model.discriminator.parameters()]
    for optimizer in model.optimizers():  # type: ignore[union-attr]
        optimizer.step = partial(scaled_step, scaler, optimizer, optimizer.step)
    metrics = train(model, x, {}, 1)
    assert metrics["d_grad"] == 0 and all(map(torch.equal, before, model.discriminator.parameters()))
    scaler.update(1e-6)
    metrics = train(model, x, {}, 1)
    assert 0 < metrics["d_grad"] < 1e8 and not all(map(torch.equal, before, model.discriminator.parameters()))


def scaled_step(scaler: Any, optimizer: torch.optim.Optimizer, own: Any) -> None:
    """Unscale the gradients, and step if all are finite, like the precision plugin of Lightning."""
    scaler.unscale_(optimizer)
    if all(torch.isfinite(p.grad).all() for group in optimizer.param_groups for p in group["params"]):
        own()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_steps": 0}, "d_steps"),
        ({"latent_dim": 0}, "latent_dim"),
        ({"discriminator_augmentation": ADA}, r"at least 2x2 pixels.*model/discriminator_augmentation=null"),
    ],
)
def test_invalid_settings_raise_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        points_gan(**options)


def test_a_batch_that_cannot_be_split_raises_an_error() -> None:
    model, x = points_gan(d_steps=3), torch.randn(4, 2, 1, 1)
    metrics = train(model, x, {}, 1)  # parts of 2, 1 and 1 images
    assert metrics["d_loss"].isfinite() and int(model.seen) == 4
    for rng, num_local in (
        (RandomSource(torch.Generator(), 0, 4, 8), 4),
        (RandomSource.for_batch(torch.Generator(), 2), 2),
    ):
        model.rng = rng
        with pytest.raises(UserError, match=r"d_steps=3.*multiple of d_steps times"):
            model.training_step((x[:num_local], {}), 0)


@pytest.mark.parametrize("world", [1, 2])
def test_batch_parts_do_not_depend_on_the_number_of_processes(world: int) -> None:
    """Part k is every third image from image k, with the random numbers that a single process would draw."""
    for k in range(3):
        whole = RandomSource.for_batch(torch.Generator().manual_seed(1), 12).strided(3, k).normal((2,))
        assert whole.shape == (4, 2)
        local = [
            RandomSource(torch.Generator().manual_seed(1), r * 12 // world, (r + 1) * 12 // world, 12)
            for r in range(world)
        ]
        parts = [source.strided(3, k) for source in local]
        assert torch.equal(torch.cat([part.normal((2,)) for part in parts]), whole)


def test_validation_metrics_are_per_image() -> None:
    model = points_gan()
    train(model, torch.randn(8, 2, 1, 1), {}, 2)
    metrics = model.validation_metrics(
        torch.zeros(5, 2, 1, 1), {}, RandomSource.for_batch(torch.Generator().manual_seed(0), 5)
    )
    assert all(value.shape == (5,) for value in metrics.values())
    assert torch.allclose(metrics["d_held_out"], model.discriminator(torch.zeros(5, 2, 1, 1)))
