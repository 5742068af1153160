"""The U-Net: initialisation, formulas of its layers, and agreement with diffusers for the same weights."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.errors import UserError
from gencompare.networks.conditioning import SinusoidalEmbedding
from gencompare.networks.diffusers_weights import from_diffusers
from gencompare.networks.unet import UNet
from gencompare.networks.unet_blocks import Downsample, ResidualBlock, SelfAttention, UNetBlock, Upsample

SMALL: Any = {
    "channels": 8, "channel_mult": (1, 2), "num_blocks": 1, "attention_resolutions": (4,), "dropout": 0.0,
    "num_groups": 4,
}  # fmt: skip


def small(**changes: Any) -> UNet:
    torch.manual_seed(0)
    return UNet((2, 8, 8), 2, **{**SMALL, **changes})


def randomized(net: nn.Module) -> Any:
    """Give the network random weights, because some are zero at initialisation."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(std=0.2)
    return net.eval()


def inputs(n: int = 3, shape: tuple[int, ...] = (2, 8, 8)) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    return torch.randn(n, *shape, generator=g), 1000 * torch.rand(n, generator=g)


# Size and initialisation


def test_parameter_count_agrees_with_a_count_by_hand() -> None:
    def conv(i: int, o: int, k: int = 3) -> int:
        return i * o * k * k + o

    def residual(i: int, o: int) -> int:
        return 2 * i + conv(i, o) + conv(32, o, 1) + 2 * o + conv(o, o) + (conv(i, o, 1) if i != o else 0)

    def attention(c: int) -> int:
        return 2 * c + 4 * conv(c, c, 1)

    encoder = residual(8, 8) + conv(8, 8) + residual(8, 16) + attention(16)
    middle = residual(16, 16) + attention(16) + residual(16, 16)
    # Skip connections, in encoder order: stem 8, block 8, downsampling 8, block 16.
    decoder = residual(16 + 16, 16) + residual(16 + 8, 16) + 2 * attention(16) + conv(16, 16)
    decoder += residual(16 + 8, 8) + residual(8 + 8, 8)
    ends = conv(8, 32, 1) + conv(32, 32, 1) + conv(2, 8) + 2 * 8 + conv(8, 2)
    assert sum(p.numel() for p in small().parameters()) == encoder + middle + decoder + ends


def test_blocks_are_the_identity_and_the_output_is_zero_at_initialisation() -> None:
    net = small()
    x, t = inputs()
    assert torch.equal(net(x, t, {}), torch.zeros(3, 2, 8, 8))
    h, emb = torch.randn(3, 8, 8, 8), torch.randn(3, 32)
    block = UNetBlock(ResidualBlock(8, 8, 32, dropout=0.5, num_groups=4), SelfAttention(8, num_groups=4))
    assert torch.equal(block(h, emb), h)
    assert not torch.equal(randomized(block)(h, emb), h)


def test_initial_weights_have_the_variance_of_the_published_code() -> None:
    torch.manual_seed(0)
    net = UNet((3, 8, 8), 3, channels=64, channel_mult=(1, 2), num_blocks=1, attention_resolutions=(8,))
    block: Any = net.encoder[0]
    for weight, fan_in, fan_out in (
        (block.residual.conv1.weight, 64 * 9, 64 * 9),
        (block.residual.emb.weight, 256, 64),
        (block.attention.qkv.weight, 64, 64),  # three square maps
    ):
        assert math.isclose(weight.var().item(), 2 / (fan_in + fan_out), rel_tol=0.05)
        assert weight.abs().max() <= math.sqrt(3 * 2 / (fan_in + fan_out))  # uniform


# Formulas of the layers


def test_sinusoidal_embedding_formula() -> None:
    t = torch.tensor([0.0, 1.0, 37.5, 999.0])
    got = SinusoidalEmbedding(8)(t)
    for row, time in zip(got.tolist(), t.tolist(), strict=True):
        w = [10 ** (-4 * i / 3) for i in range(4)]
        expected = [math.sin(time * f) for f in w] + [math.cos(time * f) for f in w]
        assert row == pytest.approx(expected, abs=1e-4)


def test_attention_formula_and_gradient() -> None:
    c, n, h, w = 4, 2, 3, 2
    layer = randomized(SelfAttention(c, num_groups=2)).double()
    x = torch.randn(n, c, h, w, dtype=torch.float64, requires_grad=True)

    grouped = x.reshape(n, 2, 2 * h * w)
    normal = (grouped - grouped.mean(2, keepdim=True)) / (grouped.var(2, unbiased=False, keepdim=True) + 1e-6).sqrt()
    normal = normal.reshape(n, c, h, w) * layer.norm.weight[:, None, None] + layer.norm.bias[:, None, None]
    expected = x.clone()
    for i in range(n):
        pixels = [normal[i, :, a, b] for a in range(h) for b in range(w)]
        q, k, v = (
            [layer.qkv.weight[s * c : (s + 1) * c] @ p + layer.qkv.bias[s * c : (s + 1) * c] for p in pixels]
            for s in range(3)
        )
        for j, query in enumerate(q):
            e = torch.stack([(query @ key / math.sqrt(c)).exp() for key in k])
            mixed = sum(weight * value for weight, value in zip(e / e.sum(), v, strict=True))
            change = layer.out.weight @ mixed + layer.out.bias
            place = torch.zeros(n, 1, h, w, dtype=torch.float64)
            place[i, 0, j // w, j % w] = 1
            expected = expected + place * change[None, :, None, None]

    got = layer(x)
    assert torch.allclose(got, expected, atol=1e-12)
    g = torch.randn_like(got)
    ours, theirs = torch.autograd.grad(got, x, g)[0], torch.autograd.grad(expected, x, g)[0]
    assert torch.allclose(ours, theirs, atol=1e-10)
    assert torch.autograd.gradcheck(layer, (x,))


def test_attention_is_permutation_equivariant() -> None:
    layer = randomized(SelfAttention(8, num_groups=4))
    x = torch.randn(2, 8, 4, 4)
    order = torch.randperm(16)

    def permuted(h: Tensor) -> Tensor:
        return h.flatten(2)[:, :, order].unflatten(2, (4, 4))

    assert torch.allclose(layer(permuted(x)), permuted(layer(x)), atol=1e-5)


def test_upsampling_is_nearest_neighbour_then_convolution() -> None:
    layer = randomized(Upsample(6)).double()
    h = torch.randn(2, 6, 5, 3, dtype=torch.float64, requires_grad=True)
    doubled = h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    expected = F.conv2d(doubled, layer.conv.weight, layer.conv.bias, padding=1)
    got = layer(h, torch.empty(0))
    assert torch.allclose(got, expected, atol=1e-12)
    g = torch.randn_like(got)
    at = (h, layer.conv.weight, layer.conv.bias)
    for ours, theirs in zip(torch.autograd.grad(got, at, g), torch.autograd.grad(expected, at, g), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10)


def test_downsampling_sees_the_documented_pixels() -> None:
    layer = randomized(Downsample(1))
    h = torch.randn(1, 1, 6, 6, requires_grad=True)
    (seen,) = torch.autograd.grad(layer(h, torch.empty(0))[0, 0, 1, 2], h)
    expected = torch.zeros(6, 6)
    expected[2:5, 4:6] = layer.conv.weight[0, 0, :, :2].detach()
    assert torch.allclose(seen[0, 0], expected)


# The whole network


@pytest.mark.parametrize(
    ("shape", "channel_mult", "attention_resolutions"),
    [
        ((1, 8, 8), (1, 1, 2), (8, 2)),
        ((1, 32, 32), (1, 1, 1, 2), (8, 4)),
        ((3, 64, 64), (1, 1), ()),
        ((2, 8, 12), (1, 1, 1), (4,)),
        ((1, 2, 2), (1, 2), (1,)),
        ((1, 7, 5), (2,), ()),
    ],
)
def test_every_output_pixel_sees_every_input_pixel(
    shape: tuple[int, int, int], channel_mult: tuple[int, ...], attention_resolutions: tuple[int, ...]
) -> None:
    sizes = {**SMALL, "channel_mult": channel_mult, "attention_resolutions": attention_resolutions}
    net = randomized(UNet(shape, 5, **sizes))
    x, t = inputs(2, shape)
    out = net(x.requires_grad_(), t, {})
    assert out.shape == (2, 5, *shape[1:])
    (seen,) = torch.autograd.grad(out[0, 0, 0, 0], x)
    assert seen[0].count_nonzero() == x[0].numel() and not seen[1].any()


def test_the_output_of_an_image_is_independent_of_the_batch() -> None:
    net = randomized(small(num_classes=3))
    x, t = inputs(4)
    label = torch.tensor([0, 2, 3, 1])
    whole = net(x, t, {"label": label})
    for i in range(4):
        assert torch.allclose(net(x[i : i + 1], t[i : i + 1], {"label": label[i : i + 1]})[0], whole[i], atol=1e-5)


def test_noise_level_and_label_affect_only_their_own_image() -> None:
    net = randomized(small(num_classes=3))
    x, t = inputs(3)
    label = torch.tensor([0, 1, 2])
    before = net(x, t, {"label": label})
    for cond, times in (
        ({"label": torch.tensor([0, 3, 2])}, t),
        ({"label": label}, t + torch.tensor([0.0, 50.0, 0.0])),
    ):
        after = net(x, times, cond)
        assert (after[1] - before[1]).abs().max() > 1e-3
        assert torch.allclose(after[[0, 2]], before[[0, 2]], atol=1e-6)


def test_training_learns_labels_and_noise_levels() -> None:
    # The target depends only on label and noise level, so it must be learned through their embeddings.
    net = small(num_classes=2)
    x, _ = inputs(16)
    t = torch.tensor([100.0, 900.0]).repeat(8)
    label = torch.tensor([0, 0, 1, 1]).repeat(4)
    target = torch.where(label == 1, 1.0, -1.0) * torch.where(t > 500, 1.0, 0.3)
    target = target[:, None, None, None].expand(16, 2, 8, 8)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    losses = []
    for _ in range(120):
        loss = F.mse_loss(net(x, t, {"label": label}), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx((1 + 0.3**2) / 2)
    # With labels alone, the loss cannot go below the variance of (1, 0.3); without labels, not below its start.
    assert losses[-1] < 0.1 * (0.7 / 2) ** 2


def test_every_parameter_has_a_gradient() -> None:
    net = randomized(small(num_classes=3)).train()
    x, t = inputs()
    net(x, t, {"label": torch.tensor([0, 1, 2])}).square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []
    label: Any = net.conditions.label
    assert torch.equal(label.weight.grad[3], torch.zeros(32)), "the unused embedding for 'no label' has no gradient"


def test_dropout_is_inactive_in_eval_mode() -> None:
    net = randomized(small(dropout=0.5))
    x, t = inputs()
    assert torch.equal(net(x, t, {}), net(x, t, {}))
    net.train()
    assert not torch.allclose(net(x, t, {}), net(x, t, {}))


# Comparison with diffusers


@pytest.mark.parametrize("names", ["current", "published"])
def test_output_agrees_with_diffusers_for_the_same_weights(names: str) -> None:
    theirs = randomized(
        # The config of google/ddpm-cifar10-32, at a quarter of its width.
        diffusers.UNet2DModel(
            sample_size=32,
            block_out_channels=(32, 64, 64, 64),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=None,
            downsample_padding=0,
            flip_sin_to_cos=False,
            freq_shift=1,
            norm_eps=1e-6,
        )
    )
    with torch.no_grad():  # a scale at which attention and embedding have an effect
        for p in theirs.parameters():
            p.mul_(0.5 if p.ndim > 1 else 1)
    state = theirs.state_dict()
    if names == "published":
        for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
            state = {name.replace(new, old): weight for name, weight in state.items()}
    ours = UNet((3, 32, 32), 3, channels=32).eval()
    ours.load_state_dict(from_diffusers(state, num_levels=4, num_blocks=2))
    x, _ = inputs(2, (3, 32, 32))
    for t in (torch.tensor([0, 999]), torch.tensor([17, 500])):
        with torch.no_grad():
            expected, got = theirs(x, t).sample, ours(x, t.float(), {})
        assert expected.std() > 0.1
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_error_names_the_weights_of_another_network() -> None:
    with pytest.raises(UserError, match=r"2 levels of 1 blocks.*encoder\.layers\.0"):
        from_diffusers({"encoder.layers.0.weight": torch.zeros(1)}, num_levels=2, num_blocks=1)


# Invalid arguments


@pytest.mark.parametrize(
    ("shape", "changes", "message"),
    [
        (
            (1, 28, 28),
            {"channel_mult": (1, 2, 2, 2)},
            r"halves its images 3 time.*28x28.*channel_mult=\[1, 2, 2\]",
        ),
        ((1, 8, 8), {"channel_mult": (1,) * 5}, r"channel_mult=\[1, 1, 1, 1\], or"),
        ((2, 1, 1), {}, r"channel_mult=\[1\], or"),
        ((1, 8, 8), {"channels": 12, "num_groups": 8}, r"channels=12.*num_groups=8.*num_groups=4"),
        ((1, 8, 8), {"channel_mult": ()}, r"channel_mult=\[\]"),
        ((1, 8, 8), {"num_blocks": 0}, r"num_blocks=0"),
        ((1, 8, 8), {"dropout": 1.0}, r"dropout=1.0"),
        ((1, 8, 8), {"channels": 3, "num_groups": 3}, r"even"),
    ],
)
def test_invalid_sizes_are_errors_with_a_suggestion(shape: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        UNet(shape, 1, **{**SMALL, **changes})


def test_attention_resolutions_that_do_not_occur_are_ignored() -> None:
    def has_attention(net: UNet) -> list[bool]:
        return [layer.attention is not None for layer in net.encoder if isinstance(layer, UNetBlock)]

    assert has_attention(small(attention_resolutions=(16, 8))) == [True, False]
    assert has_attention(small(attention_resolutions=(4,))) == [False, True]
    assert has_attention(small(attention_resolutions=())) == [False, False]


def test_error_asks_for_a_missing_label() -> None:
    x, t = inputs()
    with pytest.raises(UserError, match=r"3 classes.*cond\['label'\].*3 means no label"):
        small(num_classes=3)(x, t, {})
    assert torch.equal(small()(x, t, {"label": torch.tensor([9, 9, 9])}), torch.zeros(3, 2, 8, 8))
