"""Denoising networks: the contract of every option of conf/model/network, published sizes, and layer formulas."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from omegaconf import OmegaConf
from torch import Tensor, nn

from composing import options, roots
from gencompare.errors import UserError
from gencompare.networks.conditioning import FourierEmbedding, FourierFeatures
from gencompare.networks.dit import DiT, DiTBlock, grid_positions, patchify, unpatchify
from gencompare.networks.layers import (
    FUSED_ATTENTION_MIN_TOKENS,
    FIRConvDownsample,
    FIRDownsample,
    FIRUpsample,
    attention,
)
from gencompare.networks.mlp import DenoisingMLP
from gencompare.networks.refinenet import RefineNet
from gencompare.networks.unet import UNet
from gencompare.networks.unet_blocks import InputSkip, OutputSkip, ResidualBlock, ResidualInput, SelfAttention
from parts import part

SMALL = {
    "channels": 8, "num_groups": 4, "head_channels": 4, "num_blocks": 1, "width": 16, "hidden_size": 16, "depth": 2,
    "num_heads": 2,
}  # fmt: skip
NETWORKS = options("model/network")


def tiny(option: str, shape: tuple[int, ...] = (1, 8, 8), num_classes: int = 0, seed: int = 0, **changes: Any) -> Any:
    """Build a network with the option's structure but a small width and depth."""
    cfg = OmegaConf.load(next(p for root in roots() if (p := root / "model/network" / f"{option}.yaml").is_file()))
    small = {name: size for name, size in SMALL.items() if name in cfg}
    torch.manual_seed(seed)
    return part("network", option, **small, **changes)(shape=shape, out_channels=shape[0], num_classes=num_classes)


def randomized(net: nn.Module) -> Any:
    """Give the network random weights, because some are zero at initialisation."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(std=0.2)
    return net.eval()


def inputs(n: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    return torch.randn(n, *shape, generator=g), 1000 * torch.rand(n, generator=g)


# Every option


@pytest.mark.parametrize("option", NETWORKS)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8)], ids=str)
def test_every_network_can_be_built_at_full_size(option: str, shape: tuple[int, ...]) -> None:
    with torch.device("meta"):
        net = part("network", option)(shape=shape, out_channels=shape[0], num_classes=10)
    assert all(p.is_meta for p in net.parameters())


@pytest.mark.parametrize("option", NETWORKS)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (2, 8, 16)], ids=str)
def test_every_network_outputs_zero_at_initialisation(option: str, shape: tuple[int, ...]) -> None:
    net = tiny(option, shape)
    x, t = inputs(2, shape)
    initial_output = x if getattr(net, "add_input", False) else torch.zeros_like(x)
    assert torch.equal(net(x, t, {}), initial_output)


@pytest.mark.parametrize("option", NETWORKS)
def test_every_parameter_has_a_gradient(option: str) -> None:
    net = randomized(tiny(option, num_classes=3, low_res_channels=1, embedding_dim=5))
    x, t = inputs(4, (1, 8, 8))
    cond = {"label": torch.arange(4), "low_res": torch.randn(4, 1, 4, 4), "embedding": torch.randn(4, 5)}
    net(x, t, cond).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert net.conditions.label.weight.grad.abs().sum(1).gt(0).all(), "each label has its own embedding"


@pytest.mark.parametrize("option", NETWORKS)
def test_noise_level_and_conditions_affect_only_their_own_image(option: str) -> None:
    net = randomized(tiny(option, num_classes=3, low_res_channels=2, embedding_dim=5))
    x, t = inputs(3, (1, 8, 8))
    levels = getattr(net, "num_noise_levels", None)  # set if the network receives a level index; 1: index ignored
    t, step = (t, 50.0) if levels is None else (torch.zeros(3), 1.0)
    cond = {"label": torch.tensor([0, 1, 2]), "low_res": torch.randn(3, 2, 4, 4), "embedding": torch.randn(3, 5)}
    with torch.no_grad():
        before = net(x, t, cond)
        row = torch.tensor([0, 1, 0])
        for name, changed in {
            "noise": net(x, t + step * row, cond),
            "label": net(x, t, {**cond, "label": torch.tensor([0, 3, 2])}),
            "low_res": net(x, t, {**cond, "low_res": cond["low_res"] * (1 - row)[:, None, None, None]}),
            "embedding": net(x, t, {**cond, "embedding": cond["embedding"] * (1 - row)[:, None]}),
        }.items():
            if name == "noise" and levels == 1:
                assert torch.equal(changed, before), "num_noise_levels=1 means that the noise level is ignored"
                continue
            assert (changed[1] - before[1]).abs().max() > 1e-3, name
            assert torch.allclose(changed[[0, 2]], before[[0, 2]], atol=1e-5), name


@pytest.mark.parametrize("option", NETWORKS)
def test_every_output_pixel_depends_on_every_input_pixel_of_its_image(option: str) -> None:
    net = randomized(tiny(option))
    x, t = inputs(2, (1, 8, 8))
    x.requires_grad_()
    (seen,) = torch.autograd.grad(net(x, t, {})[0, 0, 0, 0], x)
    assert seen[0].count_nonzero() == x[0].numel() and not seen[1].any()


@pytest.mark.parametrize("option", NETWORKS)
def test_state_dict_restores_the_network(option: str) -> None:
    net = randomized(tiny(option))
    again = tiny(option, seed=7).eval()
    again.load_state_dict(net.state_dict())
    x, t = inputs(2, (1, 8, 8))
    assert torch.equal(again(x, t, {}), net(x, t, {}))


# Published sizes, counted on the meta device. For those of experiment=cifar10_* see test_published_settings.py.


@pytest.mark.parametrize(
    ("option", "changes", "millions", "exactly"),
    [
        # Song et al. (2021) state no sizes. These are from their code (yang-song/score_sde_pytorch, configs/vp and ve,
        # cifar10_{ddpmpp,ncsnpp}[_deep]_continuous), counted in NVlabs/edm's SongUNet, which reproduces it.
        ("unet_ddpmpp_cifar10", {"num_blocks": 8}, 106.6, 106_632_579),
        ("unet_ncsnpp_cifar10", {"num_blocks": 8}, 107.6, 107_586_947),
        # Karras et al. (2022), networks for CIFAR-10: NVlabs/edm's SongUNet(channel_mult=[2, 2, 2]), without labels and
        # augmentation.
        ("unet_edm_cifar10", {}, 55.7, 55_732_739),
        ("unet_ncsnpp_cifar10", {"channel_mult": [2, 2, 2], "dropout": 0.13}, 56.4, 56_395_523),
    ],
)
def test_score_sde_and_edm_unets_have_the_published_parameter_count(
    option: str, changes: dict[str, Any], millions: float, exactly: int
) -> None:
    count = parameters(option, (3, 32, 32), 3, **changes)
    assert round(count / 1e6, 1) == millions
    assert count == exactly


def test_adm_has_the_published_parameter_count() -> None:
    # Dhariwal and Nichol (2021), table 4: 296 M for ImageNet at 64x64, which has 1000 classes.
    count = parameters("unet_adm_imagenet64", (3, 64, 64), 3, 1000)
    assert round(count / 1e6) == 296
    assert count == 295_899_267 + 4 * 192  # NVlabs/edm's DhariwalUNet, plus the embedding for "no label"


@pytest.mark.parametrize(
    ("option", "millions", "exactly"),
    [
        # Peebles and Xie (2023), table 1 and appendix: patch 2, latents of 4x32x32, 1000 classes, learned variances.
        # Exact counts: the trained parameters of facebookresearch/DiT's models, where known.
        ("dit_s", 33, 32_865_056),
        ("dit_b", 130, 130_315_808),
        ("dit_l", 458, 457_840_672),
        ("dit_xl", 675, None),
    ],
)
def test_dits_have_the_published_parameter_count(option: str, millions: int, exactly: int | None) -> None:
    count = parameters(option, (4, 32, 32), 8, 1000)
    assert round(count / 1e6) == millions
    assert exactly in (None, count)


def parameters(option: str, shape: tuple[int, ...], out_channels: int, num_classes: int = 0, **changes: Any) -> int:
    with torch.device("meta"):
        net = part("network", option, **changes)(shape=shape, out_channels=out_channels, num_classes=num_classes)
    return sum(p.numel() for p in net.parameters())


# Conditions

NETS = {
    "unet": lambda **k: UNet((1, 8, 8), 1, k.pop("num_classes", 0), channels=8, channel_mult=(1, 2), num_groups=4, **k),
    "dit": lambda **k: DiT((1, 8, 8), 1, k.pop("num_classes", 0), hidden_size=16, depth=1, num_heads=2, **k),
    "mlp": lambda **k: DenoisingMLP((1, 8, 8), 1, k.pop("num_classes", 0), width=16, depth=1, **k),
    "refinenet": lambda **k: RefineNet((1, 8, 8), 1, k.pop("num_classes", 0), channels=8, **k),
}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_classes": 3}, r"3 classes: pass cond\['label'\], where 3 means no label"),
        ({"low_res_channels": 1}, r"low-resolution image: pass cond\['low_res'\]"),
        ({"embedding_dim": 5}, r"embeddings: pass cond\['embedding'\]"),
    ],
)
def test_error_asks_for_a_missing_condition(net: str, sizes: dict[str, int], message: str) -> None:
    x, t = inputs(2, (1, 8, 8))
    with pytest.raises(UserError, match=message):
        NETS[net](**sizes)(x, t, {})
    everything = {"label": torch.tensor([9, 9]), "low_res": torch.ones(2, 7, 3, 3), "embedding": torch.ones(2, 9)}
    assert torch.equal(NETS[net]()(x, t, everything), torch.zeros_like(x)), (
        "conditions that the network was not built for are ignored"
    )


@pytest.mark.parametrize(
    ("sizes", "cond", "message"),
    [
        ({"low_res_channels": 1}, {"low_res": torch.ones(2, 3, 4, 4)}, r"3 channels.*built for 1.*low_res_channels=3"),
        ({"embedding_dim": 5}, {"embedding": torch.ones(2, 6)}, r"6 features.*built for 5.*embedding_dim=6"),
    ],
)
def test_condition_of_wrong_size_is_an_error(sizes: Any, cond: Any, message: str) -> None:
    x, t = inputs(2, (1, 8, 8))
    with pytest.raises(UserError, match=message):
        NETS["unet"](**sizes)(x, t, cond)


@pytest.mark.parametrize("sizes", [{"low_res_channels": -1}, {"embedding_dim": -2}])
def test_negative_condition_sizes_are_errors(sizes: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"low_res_channels=.*embedding_dim=.*at least 0"):
        NETS["mlp"](**sizes)


@pytest.mark.parametrize("net", NETS)
def test_zero_embedding_means_no_embedding(net: str) -> None:
    conditioned = randomized(NETS[net](embedding_dim=5))
    plain = NETS[net]().eval()
    plain.load_state_dict({k: v for k, v in conditioned.state_dict().items() if "conditions." not in k})
    x, t = inputs(2, (1, 8, 8))
    assert torch.equal(conditioned(x, t, {"embedding": torch.zeros(2, 5)}), plain(x, t, {}))
    assert not torch.allclose(conditioned(x, t, {"embedding": torch.ones(2, 5)}), plain(x, t, {}), atol=1e-3)


@pytest.mark.parametrize("net", NETS)
def test_zero_augmentation_parameters_mean_no_augmentation(net: str) -> None:
    conditioned = randomized(NETS[net](augment_dim=9))
    plain = NETS[net]().eval()
    plain.load_state_dict({k: v for k, v in conditioned.state_dict().items() if "conditions." not in k})
    x, t = inputs(2, (1, 8, 8))
    assert torch.equal(conditioned(x, t, {}), plain(x, t, {}))
    assert torch.equal(conditioned(x, t, {"augment": torch.zeros(2, 9)}), plain(x, t, {}))
    second_row_only = torch.tensor([[0.0], [1.0]]).expand(2, 9)
    augmented = conditioned(x, t, {"augment": second_row_only})
    assert torch.allclose(augmented[0], plain(x, t, {})[0], atol=1e-5)
    assert not torch.allclose(augmented[1], plain(x, t, {})[1], atol=1e-3)


def test_low_resolution_image_is_resized_and_concatenated() -> None:
    conditions = NETS["unet"](low_res_channels=2).conditions
    x = torch.randn(2, 1, 8, 8)
    same = torch.randn(2, 2, 8, 8)
    assert torch.equal(conditions.concat_images(x, {"low_res": same}), torch.cat([x, same], dim=1))
    # A linear ramp stays linear: the pixel centres of the small image are at 1.5 and 5.5 in the large one.
    small = torch.tensor([1.5, 5.5]).expand(2, 2, 2, 2)
    large = conditions.concat_images(x, {"low_res": small})[:, 1:]
    assert torch.allclose(large[..., 2:6], torch.arange(2.0, 6.0).expand(2, 2, 8, 4), atol=1e-6)


def test_training_learns_the_conditions() -> None:
    # The target is the low-resolution image times the sign of the embedding, so the network needs both.
    torch.manual_seed(0)
    net = UNet(
        (1, 4, 4), 1, channels=8, channel_mult=(1,), num_groups=4, num_blocks=1, dropout=0.0, low_res_channels=1,
        embedding_dim=3,
    )  # fmt: skip
    x, t = inputs(16, (1, 4, 4))
    low_res = torch.randn(16, 1, 2, 2)
    sign = torch.tensor([1.0, -1.0]).repeat(8)
    cond = {"low_res": low_res, "embedding": sign[:, None] * torch.ones(3)}
    target = sign[:, None, None, None] * low_res.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    loss = torch.tensor(0.0)
    for _ in range(60):
        loss = F.mse_loss(net(x, t, cond), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * target.var().item()


# Resampling


def filter_of(taps: list[float]) -> np.ndarray[Any, Any]:
    return np.outer(taps, taps) / sum(taps) ** 2


@pytest.mark.parametrize("taps", [[1, 1], [1, 3, 3, 1], [1, 5, 10, 10, 5, 1]], ids=str)
def test_fir_resampling_formulas(taps: list[float]) -> None:
    x = np.random.default_rng(0).normal(size=(6, 8))
    k, p = filter_of(taps), len(taps) // 2 - 1
    padded = np.pad(x, p)
    half = np.array(
        [[(padded[2 * i : 2 * i + len(taps), 2 * j : 2 * j + len(taps)] * k).sum() for j in range(4)] for i in range(3)]
    )
    double = np.zeros((12 + 2 * p, 16 + 2 * p))
    for i in range(6):
        for j in range(8):
            double[2 * i : 2 * i + len(taps), 2 * j : 2 * j + len(taps)] += 4 * k * x[i, j]
    double = double[p : p + 12, p : p + 16]
    image = torch.from_numpy(x)[None, None].repeat(2, 3, 1, 1)
    for layer, expected in ((FIRDownsample(taps), half), (FIRUpsample(taps), double)):
        got = layer.double()(image)
        assert torch.allclose(got, torch.from_numpy(expected).expand(2, 3, -1, -1), atol=1e-7)


def test_two_tap_filter_is_average_pooling_and_nearest_neighbour() -> None:
    x = torch.randn(2, 3, 6, 4)
    assert torch.allclose(FIRDownsample([1, 1])(x), F.avg_pool2d(x, 2), atol=1e-6)
    assert torch.allclose(FIRUpsample([1, 1])(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize("taps", [[1, 1], [1, 3, 3, 1]], ids=str)
def test_filters_keep_constants_and_remove_the_highest_frequency(taps: list[float]) -> None:
    down, up = FIRDownsample(taps), FIRUpsample(taps)
    flat = torch.full((1, 2, 16, 16), 0.7)
    assert torch.allclose(down(up(flat))[..., 2:-2, 2:-2], flat[..., 2:-2, 2:-2])
    assert torch.allclose(up(down(flat))[..., 3:-3, 3:-3], flat[..., 3:-3, 3:-3])
    stripes = torch.ones(1, 1, 16, 16)
    stripes[..., ::2] = -1  # without a filter, every second pixel would be -1
    assert down(stripes)[..., 1:-1, 1:-1].abs().max() < 1e-6


@pytest.mark.parametrize("taps", [[1, 1], [1, 3, 3, 1]], ids=str)
def test_upsampling_is_four_times_the_transpose_of_downsampling(taps: list[float]) -> None:
    down, up = FIRDownsample(taps).double(), FIRUpsample(taps).double()
    x, y = torch.randn(1, 2, 8, 6, dtype=torch.float64), torch.randn(1, 2, 4, 3, dtype=torch.float64)
    assert torch.allclose((down(x) * y).sum(), (x * up(y)).sum() / 4)


def test_fir_conv_downsampling_is_one_convolution_with_combined_kernel() -> None:
    layer = randomized(FIRConvDownsample(2, 3, [1, 3, 3, 1])).double()
    k = filter_of([1, 3, 3, 1])
    combined = np.zeros((3, 2, 6, 6))
    for a in range(4):
        for b in range(4):
            combined[:, :, a : a + 3, b : b + 3] += k[a, b] * layer.conv.weight.detach().numpy()
    x = torch.randn(2, 2, 8, 6, dtype=torch.float64)
    expected = F.conv2d(x, torch.from_numpy(combined), layer.conv.bias, stride=2, padding=2)
    assert expected.shape == (2, 3, 4, 3)
    assert torch.allclose(layer(x), expected, atol=1e-7)


@pytest.mark.parametrize("taps", [[1], [1, 2, 1], [1, 3, 3, 2], [1, -1, -1, 1], []], ids=str)
def test_invalid_filters_are_errors(taps: list[float]) -> None:
    with pytest.raises(UserError, match="even number of symmetric taps"):
        FIRDownsample(taps)


# Blocks


@pytest.mark.parametrize("direction", ["up", "down", "none"])
@pytest.mark.parametrize("scale_shift_norm", [False, True])
@pytest.mark.parametrize("fir", [False, True])
def test_residual_block_agrees_with_diffusers_for_the_same_weights(
    direction: str, scale_shift_norm: bool, fir: bool
) -> None:
    theirs = randomized(
        ResnetBlock2D(
            in_channels=8,
            out_channels=8,
            temb_channels=6,
            groups=4,
            eps=1e-6,
            time_embedding_norm="scale_shift" if scale_shift_norm else "default",
            kernel="fir" if fir else None,
            output_scale_factor=math.sqrt(2),
            use_in_shortcut=direction != "none",
            up=direction == "up",
            down=direction == "down",
        )
    )
    taps = [1, 3, 3, 1] if fir else [1, 1]
    resample = {"up": FIRUpsample(taps), "down": FIRDownsample(taps), "none": None}[direction]
    ours = ResidualBlock(
        8, 8, 6, dropout=0.0, num_groups=4, resample=resample, scale_shift_norm=scale_shift_norm, skip_rescale=True
    ).eval()
    state = theirs.state_dict()
    for old, new in (("time_emb_proj", "emb"), ("conv_shortcut", "shortcut")):
        state = {name.replace(old, new): weight for name, weight in state.items()}
    ours.load_state_dict(state)
    h, emb = torch.randn(2, 8, 8, 8), torch.randn(2, 6)
    expected = theirs(h, emb)
    assert expected.shape[2] == {"up": 16, "down": 4, "none": 8}[direction]
    assert torch.allclose(ours(h, F.silu(emb)), expected, atol=1e-5)


def test_resampling_block_only_resamples_at_initialisation() -> None:
    h, emb = torch.randn(2, 8, 8, 8), torch.randn(2, 6)
    for resample in (FIRUpsample([1, 3, 3, 1]), FIRDownsample([1, 1])):
        block = ResidualBlock(8, 8, 6, dropout=0.0, num_groups=4, resample=resample, resample_proj=False)
        assert torch.equal(block(h, emb), resample(h))


def test_skip_rescale_preserves_the_variance() -> None:
    # Sixteen blocks whose branches have unit variance; SiLU of a standard normal has a second moment of 0.356.
    def through(skip_rescale: bool) -> float:
        torch.manual_seed(0)
        h, emb = torch.randn(4, 32, 16, 16), torch.zeros(4, 8)
        for _ in range(16):
            block = ResidualBlock(32, 32, 8, dropout=0.0, num_groups=8, skip_rescale=skip_rescale)
            nn.init.normal_(block.conv2.weight, std=(0.356 * 9 * 32) ** -0.5)
            with torch.no_grad():
                h = block(h, emb)
        return h.var().item()

    assert through(skip_rescale=True) == pytest.approx(1, abs=0.3)
    assert through(skip_rescale=False) > 8


def test_attention_heads_agree_with_pytorch() -> None:
    layer = randomized(SelfAttention(12, num_groups=3, num_heads=4, skip_rescale=True))
    x = torch.randn(2, 12, 3, 5)
    theirs = nn.MultiheadAttention(12, 4, batch_first=True)
    theirs.load_state_dict(
        {
            "in_proj_weight": layer.qkv.weight,
            "in_proj_bias": layer.qkv.bias,
            "out_proj.weight": layer.out.weight,
            "out_proj.bias": layer.out.bias,
        }
    )
    pixels = F.group_norm(x, 3, layer.norm.weight, layer.norm.bias, 1e-6).flatten(2).mT
    expected = (x + theirs(pixels, pixels, pixels)[0].mT.unflatten(2, (3, 5))) / math.sqrt(2)
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_heads_that_do_not_divide_the_width_are_errors() -> None:
    for changes in ({"num_heads": 3}, {"num_heads": 0}, {"head_channels": 3}, {"head_channels": 0}):
        with pytest.raises(UserError, match=r"attention heads with num_heads=.*choose values that divide"):
            UNet((1, 8, 8), 1, channels=8, channel_mult=(1,), num_groups=4, **changes)


# Progressive input and output


@pytest.mark.parametrize("pyramid", [InputSkip, ResidualInput])
def test_progressive_input_feeds_the_image_into_each_level(pyramid: Any) -> None:
    def sees_image(progressive_input: Any) -> bool:
        sizes: Any = {"channels": 8, "channel_mult": (1, 1, 2), "num_groups": 4, "num_blocks": 1}
        net = randomized(UNet((1, 8, 8), 1, **sizes, progressive_input=progressive_input))
        nn.init.zeros_(net.stem.weight)
        x, t = inputs(2, (1, 8, 8))
        return not torch.equal(net(x, t, {}), net(0 * x, t, {}))

    assert sees_image(pyramid) and not sees_image(None)


def test_input_pyramid_formulas() -> None:
    h, image = torch.randn(2, 8, 4, 4), torch.randn(2, 3, 8, 8)
    for combine in ("sum", "cat"):
        skip = randomized(InputSkip(3, 8, combine=combine))
        small = FIRDownsample([1, 3, 3, 1])(image)
        got, rest = skip(h, image)
        parts = F.conv2d(small, skip.conv.weight, skip.conv.bias)
        assert torch.allclose(got, parts + h if combine == "sum" else torch.cat([parts, h], dim=1))
        assert torch.equal(rest, small) and (got.shape[1], rest.shape[1]) == (skip.width, skip.channels)
    residual = randomized(ResidualInput(3, 8))
    got, rest = residual(h, image)
    assert torch.allclose(got, (h + residual.downsample(image)) / math.sqrt(2)) and rest is got
    with pytest.raises(UserError, match="combine=mean"):
        InputSkip(3, 8, combine="mean")


@pytest.mark.parametrize("combine", ["sum", "cat"])
def test_input_and_output_skips_are_used_and_keep_the_output_zero_at_init(combine: str) -> None:
    net = UNet(
        (1, 8, 8), 2, channels=8, channel_mult=(1, 1, 2), num_groups=4, num_blocks=1, resample_filter=(1, 3, 3, 1),
        progressive_input=lambda c, w: InputSkip(c, w, combine=combine), progressive_output=OutputSkip,
    )  # fmt: skip
    x, t = inputs(2, (1, 8, 8))
    assert torch.equal(net(x, t, {}), torch.zeros(2, 2, 8, 8))
    randomized(net)
    net(x, t, {}).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []
    # Without the finest level, the output is the upsampled sum of the coarser ones, which is not zero.
    with torch.no_grad():
        net.out.weight.zero_()
        net.out.bias.zero_()
        assert net(x, t, {}).abs().max() > 1e-2


def test_output_skip_formula() -> None:
    layer = randomized(OutputSkip(8, 3, 4))
    h, image = torch.randn(2, 8, 4, 4), torch.randn(2, 3, 4, 4)
    normal = F.group_norm(h, 4, layer.norm.weight, layer.norm.bias, 1e-6)
    own = F.conv2d(F.silu(normal), layer.conv.weight, layer.conv.bias, padding=1)
    up = FIRUpsample([1, 3, 3, 1])
    assert torch.allclose(layer(h, None), up(own), atol=1e-5)
    assert torch.allclose(layer(h, image), up(own + image), atol=1e-5)


def test_add_input_requires_equal_channels() -> None:
    with pytest.raises(UserError, match=r"add_input=true.*1 channels.*which has 2"):
        UNet((1, 8, 8), 2, channels=8, channel_mult=(1,), num_groups=4, add_input=True)


# Embeddings


def test_fourier_embedding_formula() -> None:
    torch.manual_seed(0)
    layer = FourierEmbedding(2000, scale=16.0)
    t = torch.tensor([0.0, 0.3, -2.0])
    w = layer.frequencies.double().numpy()
    assert w.std() == pytest.approx(16, rel=0.05) and abs(w.mean()) < 1.5
    angles = 2 * np.pi * t.double().numpy()[:, None] * w
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    assert layer.dim == 4000 and np.allclose(layer(t), expected, atol=1e-3)
    with pytest.raises(UserError, match="positive scale, not 0"):
        FourierEmbedding(8, scale=0.0)


def test_fourier_features_formula_and_separation_of_neighbouring_values() -> None:
    values = (2 * torch.arange(256, dtype=torch.float64) / 255 - 1).reshape(1, 1, 16, 16)
    got = FourierFeatures([7, 8])(values)
    x = values.numpy()
    expected = np.concatenate(
        [x, np.sin(128 * np.pi * x), np.sin(256 * np.pi * x), np.cos(128 * np.pi * x), np.cos(256 * np.pi * x)], axis=1
    )
    assert np.allclose(got, expected)
    flat = got[0].flatten(1)
    assert (flat[:, 1:] - flat[:, :-1]).norm(dim=0).min() > 1.9  # adjacent values are 2/255 apart


# The diffusion transformer


def test_patchify_splits_the_image_row_by_row() -> None:
    x = torch.randn(2, 3, 6, 8)
    tokens = patchify(x, 2)
    assert tokens.shape == (2, 12, 12)
    assert torch.equal(tokens[1, 4 * 1 + 2], x[1, :, 2:4, 4:6].flatten())
    assert torch.equal(unpatchify(tokens, 2, (3, 4)), x)


def test_position_embedding_formula() -> None:
    got = grid_positions(3, 5, 8)
    for row in range(3):
        for column in range(5):
            w = [1.0, 0.01]
            expected = [f(p * k) for p in (column, row) for f in (math.sin, math.cos) for k in w]
            assert got[5 * row + column].tolist() == pytest.approx(expected, abs=1e-6)


def test_permuting_patches_and_positions_permutes_the_output() -> None:
    net = randomized(DiT((1, 8, 8), 1, hidden_size=16, depth=2, num_heads=2))
    x, t = inputs(2, (1, 8, 8))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))

    def permuted(image: Tensor) -> Tensor:
        return unpatchify(patchify(image, 2)[:, order], 2, (4, 4))

    before = net(x, t, {})
    assert not torch.allclose(net(permuted(x), t, {}), permuted(before), atol=1e-3), "positions matter"
    net.positions.copy_(net.positions[order])
    assert torch.allclose(net(permuted(x), t, {}), permuted(before), atol=1e-4)


def test_dit_block_formula_and_identity_at_initialisation() -> None:
    net = DiT((1, 8, 8), 1, hidden_size=16, depth=1, num_heads=2)
    h, emb = torch.randn(2, 5, 16), torch.randn(2, 16)
    initial_block: Any = net.blocks[0]
    assert torch.equal(initial_block(h, emb), h)

    block = randomized(DiTBlock(16, 2, 24))
    theirs = nn.MultiheadAttention(16, 2, batch_first=True)
    theirs.load_state_dict(
        {
            "in_proj_weight": block.qkv.weight,
            "in_proj_bias": block.qkv.bias,
            "out_proj.weight": block.mix.weight,
            "out_proj.bias": block.mix.bias,
        }
    )
    modulation = (emb @ block.modulation.weight.T + block.modulation.bias)[:, None]
    a1, b1, g1, a2, b2, g2 = (modulation[:, :, 16 * i : 16 * (i + 1)] for i in range(6))
    u = (1 + a1) * F.layer_norm(h, (16,), eps=1e-6) + b1
    expected = h + g1 * theirs(u, u, u)[0]
    u = (1 + a2) * F.layer_norm(expected, (16,), eps=1e-6) + b2
    u = F.gelu(u @ block.mlp[0].weight.T + block.mlp[0].bias, approximate="tanh")
    expected = expected + g2 * (u @ block.mlp[2].weight.T + block.mlp[2].bias)
    assert torch.allclose(block(h, emb), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 3}, r"patch_size=3 cannot divide 8x8 images.*: use model\.network\.patch_size=1"),
        ({"patch_size": 16}, r"patch_size=16.*patch_size=8"),
        ({"hidden_size": 18}, r"hidden_size=18 must be a multiple of 4"),
        ({"num_heads": 3}, r"num_heads=3"),
        ({"depth": 0}, r"depth=0"),
        ({"mlp_ratio": 0.0}, r"mlp_ratio=0.0"),
    ],
)
def test_invalid_dit_sizes_are_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DiT((1, 8, 8), 1, **{"hidden_size": 16, "depth": 1, "num_heads": 2, **changes})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [5, 64, FUSED_ATTENTION_MIN_TOKENS])
def test_attention_is_a_softmax_over_the_keys(dtype: torch.dtype, tokens: int) -> None:
    """Values, gradients and the type of the result, with and without autocast, against float64."""
    exact = torch.randn(3, 2, 2, tokens, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    reference = exact.to(torch.float64, copy=True).requires_grad_()
    q, k, v = reference
    expected = torch.einsum("bhqk,bhkd->bhqd", (torch.einsum("bhqd,bhkd->bhqk", q, k) / 8**0.5).softmax(-1), v)
    expected.square().sum().backward()
    inputs = exact.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        attended = attention(*inputs)
    attended.square().sum().backward()
    assert attended.dtype == dtype and inputs.grad is not None and reference.grad is not None
    tolerance = torch.finfo(dtype).eps * (8 if exact.element_size() == 2 else 32)
    for value, exactly in ((attended, expected), (inputs.grad, reference.grad)):
        torch.testing.assert_close(value.double(), exactly, rtol=0, atol=tolerance)
