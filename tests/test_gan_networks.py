"""Generators and discriminators: independence of the images in a batch, formulas of the blocks, presets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from composing import compose, options
from gencompare.data.cifar10 import CIFAR10
from gencompare.errors import UserError
from gencompare.networks.gan_networks import apply_spectral_norm
from gencompare.networks.layers import ClassConditionalGroupNorm
from gencompare.networks.r3gan import R3GANDiscriminator, R3GANGenerator
from gencompare.networks.sngan import DownBlock, FirstBlock, UpBlock
from gencompare.tasks.runs.build import build_model
from parts import loaded, part

GENERATORS, DISCRIMINATORS = options("model/generator"), options("model/discriminator")
PRESETS = ("cifar10_dcgan", "cifar10_gan", "cifar10_r3gan", "cifar10_sngan", "digits_gan", "fashion_mnist_gan")


def small(group: str, option: str) -> Any:
    """Build a small network of an option, by changing those size arguments that the option has."""
    sizes = {"channels": 16, "max_channels": 32, "width": 16, "depth": 1, "num_features": 16}
    return part(group, option, **{name: size for name, size in sizes.items() if name in loaded(group, option)})


# Every option


@pytest.mark.parametrize("option", GENERATORS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 8), (3, 32, 32)], ids=str)
def test_generated_image_depends_only_on_its_own_latent_and_class(option: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    net = small("generator", option)(5, shape, 3)
    for p in net.parameters():  # some weights are zero at initialisation
        p.data += 0.05 * torch.randn_like(p)
    z, label = torch.randn(4, 5), torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        x = net(z, label)
        assert x.shape == (4, *shape) and x.dtype == torch.float32
        assert torch.allclose(net(z[2:], label[2:]), x[2:], atol=1e-5)
        other_class, other_latent = net(z, (label + 1) % 3), net(z.flip(0), label)
    for other in (other_class, other_latent):
        assert ((other - x).flatten(1).abs().amax(1) > 1e-4).all()
    unconditional = small("generator", option)(5, shape, 0)
    assert unconditional(z, None).shape == (4, *shape)


@pytest.mark.parametrize("option", DISCRIMINATORS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 8), (3, 32, 32)], ids=str)
def test_discriminator_score_depends_only_on_its_own_image_and_class(option: str, shape: tuple[int, ...]) -> None:
    """Score i depends on every pixel of image i and on no other image, which gradient penalties rely on."""
    torch.manual_seed(0)
    net = small("discriminator", option)(shape, 3)
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    x, label = torch.randn(4, *shape, requires_grad=True), torch.tensor([0, 1, 2, 0])
    scores = net(x, label)
    assert scores.shape == (4,)
    assert torch.allclose(net(x[2:], label[2:]), scores[2:], atol=1e-5)
    assert ((net(x, (label + 1) % 3) - scores).abs() > 1e-5).all()
    (gradient,) = torch.autograd.grad(scores[1], x)
    assert gradient[1].ne(0).all() and not gradient[[0, 2, 3]].any()
    assert small("discriminator", option)(shape, 0)(x, None).shape == (4,)


@pytest.mark.parametrize("option", DISCRIMINATORS)
def test_discriminators_with_spectral_norm_are_trainable(option: str) -> None:
    """Weights that are zero at initialisation cannot be normalised, so they are replaced."""
    net = small("discriminator", option)((1, 8, 8), 3)
    apply_spectral_norm(net)
    x, label = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    for _ in range(2):
        scores = net(x, label)
        scores.sum().backward()
        assert scores.isfinite().all()
        assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


@pytest.mark.parametrize("role", ["generator", "discriminator"])
@pytest.mark.parametrize("classes", [0, 3])
def test_every_parameter_has_a_gradient(role: str, classes: int) -> None:
    label = torch.tensor([0, 1, 2, 0]) if classes else None
    for option in options(f"model/{role}"):
        torch.manual_seed(0)
        factory = small(role, option)
        net = factory(5, (3, 8, 8), classes) if role == "generator" else factory((3, 8, 8), classes)
        for p in net.parameters():
            p.data += 0.05 * torch.randn_like(p)
        net(torch.randn(4, 5) if role == "generator" else torch.randn(4, 3, 8, 8), label).square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in net.parameters()), option


# Blocks


def test_class_conditional_norm_has_a_scale_and_shift_per_class() -> None:
    """Each channel has mean b and standard deviation |a|, which are initially 0 and 1, as without classes."""
    torch.manual_seed(0)
    norm, plain, x = ClassConditionalGroupNorm(8, 3), ClassConditionalGroupNorm(8), 5 + 3 * torch.randn(3, 8, 6, 6)
    label = torch.tensor([0, 1, 2])
    assert torch.allclose(norm(x, label), plain(x), atol=1e-6)
    assert norm.classes is not None
    norm.classes.weight.data.copy_(torch.arange(1.0, 49.0).view(3, 16))
    y = norm(x, label).flatten(2)
    expected = norm.classes.weight.data[label]
    assert torch.allclose(y.mean(2), expected[:, 8:], atol=1e-3)
    assert torch.allclose(y.std(2, unbiased=False), expected[:, :8], rtol=1e-3)


def test_r3gan_networks_are_linear_at_initialisation() -> None:
    """Every block is the identity at initialisation, so the generator is linear in its latent."""
    torch.manual_seed(0)
    net = R3GANGenerator(5, (3, 16, 16), channels=16).double()
    z, w = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    assert torch.allclose(net(2 * z - 3 * w), 2 * net(z) - 3 * net(w), atol=1e-10)
    discriminator = R3GANDiscriminator((3, 16, 16), channels=16).double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert torch.allclose(
        discriminator(2 * x - 3), 2 * discriminator(x) - 3 * discriminator(torch.ones_like(x)), atol=1e-10
    )


def test_r3gan_signal_variance_is_bounded_at_any_depth() -> None:
    """Even with full-size last layers, the variance grows by a bounded factor (Zhang et al. 2019)."""
    for num_blocks in (1, 4, 16):
        torch.manual_seed(0)
        discriminator = R3GANDiscriminator((3, 4, 4), channels=64, num_blocks=num_blocks)
        for block in discriminator.stages[0]:  # type: ignore[union-attr]
            nn.init.normal_(block.narrow.weight, std=128**-0.5)
        h = torch.randn(16, 64, 4, 4)
        growth = discriminator.stages[0](h).var() / h.var()
        assert 1.2 < float(growth.detach()) < 4


def test_sngan_block_formulas() -> None:
    """The blocks match figure 8 of the paper, written with functions only, in double precision."""
    torch.manual_seed(0)
    f = nn.functional

    def c(layer: nn.Conv2d, x: Tensor) -> Tensor:
        return f.conv2d(x, layer.weight, layer.bias, padding=layer.kernel_size[0] // 2)

    def n(norm: ClassConditionalGroupNorm, x: Tensor) -> Tensor:
        return f.group_norm(x, 8, norm.norm.weight, norm.norm.bias)

    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    up = UpBlock(8, 0).double()
    upsampled = f.interpolate(f.relu(n(up.norm1, x)), scale_factor=2)
    expected = c(up.conv2, f.relu(n(up.norm2, c(up.conv1, upsampled)))) + c(up.skip, f.interpolate(x, scale_factor=2))
    assert torch.allclose(up(x, None), expected)
    down = DownBlock(8, downsample=True).double()
    inner = c(down.conv2, f.relu(c(down.conv1, f.relu(x))))
    assert isinstance(down.skip, nn.Conv2d)
    assert torch.allclose(down(x), f.avg_pool2d(inner + c(down.skip, x), 2))
    same = DownBlock(8, downsample=False).double()
    assert torch.allclose(same(x), x + c(same.conv2, f.relu(c(same.conv1, f.relu(x)))))
    first = FirstBlock(8, 8).double()
    inner = c(first.conv2, f.relu(c(first.conv1, x)))
    assert torch.allclose(first(x), f.avg_pool2d(inner + c(first.skip, x), 2))


def test_invalid_sizes_are_errors() -> None:
    with pytest.raises(
        UserError, match=r"halves its images twice, which is impossible for 6x6: use\s+model/discriminator"
    ):
        part("discriminator", "sngan", channels=8)((1, 6, 6))
    with pytest.raises(UserError, match="group_width=16"):
        part("generator", "r3gan", channels=4)(5, (1, 8, 8))


# Presets


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("conditional", [False, True])
def test_presets_work_with_and_without_classes(preset: str, conditional: bool) -> None:
    cfg = compose(f"experiment={preset}", f"model.conditional={str(conditional).lower()}")
    for network in (cfg.model.generator, cfg.model.discriminator):
        network.channels = 16
    data = CIFAR10.__new__(CIFAR10)  # only its spec is needed
    model = build_model(cfg, data)
    with torch.no_grad():
        cond = {"label": torch.tensor([3, 1])} if conditional else {}
        assert model.sample(2, cond, generator=torch.Generator().manual_seed(0)).shape == (2, 3, 32, 32)  # type: ignore[operator]
