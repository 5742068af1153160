"""Laws of the GAN: its losses and penalty against calculus, a step against one by hand, one process against two."""

from __future__ import annotations

import copy
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gencompare.contract import DataSpec
from gencompare.data.digits import Digits
from gencompare.errors import UserError
from gencompare.models.adversarial import Hinge, NonSaturating, squared_gradient
from gencompare.models.alternating import average_gradients, frozen
from gencompare.models.gan import GAN
from gencompare.networks.convnets import ResNetDecoder, ResNetEncoder
from gencompare.networks.mlp import MLPDecoder, MLPEncoder
from gencompare.networks.projection import ProjectionDiscriminator
from gencompare.seeds import Draws

POINTS = DataSpec("points", (2, 1, 1), num_classes=3, num_levels=None)


def points_gan(**options: Any) -> GAN:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "generator": partial(MLPDecoder, width=32, depth=2),
        "discriminator": partial(MLPEncoder, width=32, depth=2),
        "adversarial": NonSaturating(),
        "latent_dim": 2,
        "features": 16,
        "spectral_norm": False,
        "optimizer": partial(torch.optim.SGD, lr=0.1),
    }
    return by_hand(GAN(POINTS, **(settings | options)))


def by_hand(model: GAN) -> GAN:
    """The model with its optimisers and backward pass outside of a trainer."""
    optimizers = model.configure_optimizers()
    model.optimizers = lambda: optimizers  # type: ignore[method-assign,assignment]
    model.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign,assignment]
    return model


def train(model: GAN, x: Tensor, cond: dict[str, Tensor], steps: int) -> dict[str, Tensor]:
    figures: dict[str, Tensor] = {}
    for step in range(steps):
        model.draws = Draws.whole(torch.Generator().manual_seed(step), len(x))
        figures = model.training_step((x, cond), step)
    return figures


def test_losses_are_those_of_the_papers() -> None:
    real, fake = torch.randn(20), torch.randn(20)
    ones, zeros = torch.ones(20), torch.zeros(20)
    entropy = partial(nn.functional.binary_cross_entropy_with_logits, reduction="none")
    game = NonSaturating()
    assert torch.allclose(game.discriminator(real, fake), entropy(real, ones) + entropy(fake, zeros), atol=1e-6)
    assert torch.allclose(game.generator(fake), entropy(fake, ones), atol=1e-6)
    two = Hinge().discriminator(torch.tensor([0.25, 2.0]), torch.tensor([-3.0, 0.5]))
    assert two.tolist() == [0.75, 1.5]
    assert Hinge().generator(torch.tensor([0.5, -2.0])).tolist() == [-0.5, 2.0]


def test_r1_is_the_squared_gradient_of_a_quadratic_and_can_be_trained_through() -> None:
    """D(x) = x'Ax / 2 with A symmetric: |grad_x D|^2 = |Ax|^2, and its gradient in A is 2 A x x'."""
    a = torch.randn(5, 5, dtype=torch.float64)
    a = (a + a.T).requires_grad_()
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    penalty = squared_gradient(0.5 * ((x @ a) * x).sum(1), x)
    assert torch.allclose(penalty, (x @ a).square().sum(1))
    # D depends on A through its symmetric part alone, and so does the penalty's gradient.
    (gradient,) = torch.autograd.grad(penalty.sum(), a)
    expected = 2 * a @ x.T @ x
    assert torch.allclose(gradient, (expected + expected.T) / 2)


def test_the_projection_adds_one_product_of_class_and_features() -> None:
    """D(x, y) - D(x, y') = (v_y - v_y') . phi(x) (Miyato and Koyama 2018, eq. 3)."""
    torch.manual_seed(0)
    network = ProjectionDiscriminator(nn.Linear(4, 6), 6, 3)
    assert network.classes is not None
    nn.init.normal_(network.classes.weight)
    x, label, other = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]), torch.tensor([1, 1, 0, 2, 0])
    phi = nn.functional.leaky_relu(network.trunk(x), 0.2)
    v = network.classes.weight
    assert torch.allclose(network(x, label) - network(x, other), ((v[label] - v[other]) * phi).sum(1), atol=1e-5)
    plain = phi @ network.score.weight[0] + network.score.bias
    assert torch.allclose(network(x, label), plain + (v[label] * phi).sum(1), atol=1e-5)


def test_spectral_norm_brings_every_weight_to_norm_one() -> None:
    torch.manual_seed(0)
    trunk = ResNetEncoder((1, 8, 8), 16, channels=8, blocks=1, normalize=False)
    network = ProjectionDiscriminator(trunk, 16, 10, spectral_norm=True).train()
    for _ in range(200):
        network(torch.zeros(1, 1, 8, 8), torch.tensor([0]))
    network.eval()
    weights = [m.weight for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.Embedding))]
    assert len(weights) == 2 * 2 + 1 + 2 + 2  # two blocks, one with a skip, stem and linear, score and classes
    for weight in weights:
        assert torch.linalg.matrix_norm(weight.detach().flatten(1), 2).item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(("r1", "conditional", "d_steps"), [(0.0, False, 1), (3.0, False, 2), (0.7, True, 1)])
def test_a_step_is_the_one_worked_out_by_hand(r1: float, conditional: bool, d_steps: int) -> None:
    """Gradient descent by autograd on copies: D's steps with G fixed, each on fresh noise, then G's with D fixed."""
    model = points_gan(r1=r1, conditional=conditional, d_steps=d_steps)
    x, label = torch.randn(6, 2, 1, 1), torch.tensor([0, 1, 2, 2, 1, 0])
    twin = copy.deepcopy(model)
    figures = train(model, x, {"label": label}, 1)

    noise = torch.Generator().manual_seed(0)
    d, g, labels = twin.discriminator, twin.generator, twin.labels
    y = label if conditional else None

    def fakes() -> Tensor:
        z = torch.randn(6, 2, generator=noise)
        return torch.tanh(g(z, z if labels is None else torch.cat([z, labels(label)], 1)))

    def descend(loss: Tensor, parameters: list[nn.Parameter]) -> None:
        for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.data -= 0.1 * gradient

    for _ in range(d_steps):
        real, fake = x.clone().requires_grad_(), fakes().detach()
        slope = torch.autograd.grad(d(real, y).sum(), real, create_graph=True)[0]
        loss = -torch.log(torch.sigmoid(d(x, y))).mean() - torch.log(1 - torch.sigmoid(d(fake, y))).mean()
        descend(loss + r1 / 2 * slope.square().sum((1, 2, 3)).mean(), list(d.parameters()))
    g_loss = -torch.log(torch.sigmoid(d(fakes(), y))).mean()
    descend(g_loss, [*g.parameters(), *([] if labels is None else labels.parameters())])
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5), name
    assert figures["g_loss"].item() == pytest.approx(g_loss.item(), abs=1e-5)
    assert figures["d_loss"].item() == pytest.approx(loss.item(), abs=1e-5)
    assert all(not value.requires_grad for value in figures.values())


def test_what_is_averaged_is_the_generator_alone() -> None:
    names = set(points_gan(conditional=True).averaged_parameters())
    assert names and all(name.split(".")[0] in ("generator", "labels") for name in names)
    assert "labels.weight" in names


def test_a_frozen_network_passes_gradients_on_and_thaws() -> None:
    network = nn.Linear(2, 1)
    x = torch.randn(3, 2, requires_grad=True)
    with frozen(network):
        network(x).sum().backward()
    assert x.grad is not None and network.weight.grad is None
    assert all(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize(
    ("game", "options"), [(NonSaturating(), {"r1": 0.1}), (Hinge(), {"spectral_norm": True})], ids=["r1", "sn"]
)
def test_a_mixture_of_classes_is_learned(game: Any, options: dict[str, Any]) -> None:
    """Three points of the plane, one a class: fakes of a class go to its point."""
    places = torch.tensor([[0.6, 0.0], [-0.5, 0.5], [-0.3, -0.7]])
    label = torch.arange(48) % 3
    x = places[label][:, :, None, None] + 0.02 * torch.randn(48, 2, 1, 1, generator=torch.Generator().manual_seed(9))
    model = points_gan(
        adversarial=game, conditional=True, optimizer=partial(torch.optim.Adam, lr=3e-3, betas=(0.0, 0.9)), **options
    )
    train(model, x, {"label": label}, 200)
    drawn = model.sample(48, {"label": label}, generator=torch.Generator().manual_seed(1)).flatten(1)
    distance = (drawn - places[label]).norm(dim=1)
    assert distance.median() < 0.2, distance.median()
    with pytest.raises(UserError, match="label"):
        model.sample(2, generator=torch.Generator())


def test_fakes_are_black_outside_of_the_real_pixels() -> None:
    spec = DataSpec("padded", (1, 8, 8), padding=2)
    model = digits_gan(spec)
    x = model.sample(3, generator=torch.Generator().manual_seed(0))
    assert (x[..., :2, :] == -1).all() and (x[..., -2:] == -1).all() and (x[..., 2:-2, 2:-2] > -1).all()


def digits_gan(spec: DataSpec = Digits.spec, **options: Any) -> GAN:
    torch.manual_seed(0)
    return GAN(
        spec,
        generator=partial(ResNetDecoder, channels=8, blocks=1),
        discriminator=partial(ResNetEncoder, channels=8, blocks=1, normalize=False),
        adversarial=NonSaturating(),
        latent_dim=4,
        features=8,
        r1=1.0,
        grad_clip=0.5,
        optimizer=partial(torch.optim.SGD, lr=0.05),
        **options,
    )


def share_of_training(rank: int, world: int, folder: Path, reduce: bool) -> None:
    """Three steps of one of ``world`` processes, each with its part of the batches."""
    torch.set_num_threads(1)
    if world > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        meeting = f"file://{folder}/store_{reduce}"
        torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    model = by_hand(digits_gan(conditional=True))
    for optimizer in model.optimizers():  # type: ignore[union-attr]
        optimizer.register_step_pre_hook(lambda o, *_: model.on_before_optimizer_step(o))
    if not reduce:
        import gencompare.models.alternating as module

        module.average_gradients = lambda parameters: None  # type: ignore[assignment]
    x, cond = next(iter(Digits().batches("train", 24)))
    rows = slice(rank * 8 // world, (rank + 1) * 8 // world)
    for step in range(3):
        batch, labels = x[8 * step :][rows], cond["label"][8 * step :][rows]
        model.draws = Draws(torch.Generator().manual_seed(step), rows.start, rows.stop, 8)
        model.training_step((batch, {"label": labels}), step)
    torch.save(model.state_dict(), folder / f"{world}_{rank}_{reduce}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


def trained_by(world: int, folder: Path, reduce: bool = True) -> list[dict[str, Tensor]]:
    context = torch.multiprocessing.get_context("fork")
    processes = [context.Process(target=share_of_training, args=(r, world, folder, reduce)) for r in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode == 0
    return [torch.load(folder / f"{world}_{r}_{reduce}.pt") for r in range(world)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked here")
def test_two_processes_with_half_the_batch_learn_what_one_learns(tmp_path: Path) -> None:
    (alone,) = trained_by(1, tmp_path)
    first, second = trained_by(2, tmp_path)
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(value, first[name], atol=2e-6), name
    # Without the reduction they would part: the law can fail.
    first, second = trained_by(2, tmp_path, reduce=False)
    assert any(not torch.allclose(first[name], second[name], atol=1e-4) for name in alone)


def test_gradients_are_left_alone_by_a_single_process() -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.tensor([1.0, 2.0, 3.0])
    average_gradients([p])
    assert p.grad.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("options", "message"), [({"d_steps": 0}, "d_steps"), ({"r1": -1.0}, "r1"), ({"latent_dim": 0}, "latent_dim")]
)
def test_settings_without_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        points_gan(**options)


def test_held_out_scores_are_a_figure_an_image() -> None:
    model = points_gan()
    train(model, torch.randn(8, 2, 1, 1), {}, 2)
    figures = model.validation_figures(torch.zeros(5, 2, 1, 1), {}, Draws.whole(torch.Generator().manual_seed(0), 5))
    assert all(value.shape == (5,) for value in figures.values())
    assert torch.allclose(figures["d_held_out"], model.score(torch.zeros(5, 2, 1, 1), {}))
