"""muP: one step of Adam changes a network by the same amount at every width."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gencompare.errors import UserError
from gencompare.generative_model import DataSpec
from gencompare.models.diffusion import Diffusion
from gencompare.networks.dit import DiT
from gencompare.networks.mlp import DenoisingMLP
from gencompare.networks.unet import UNet
from gencompare.networks.unet_blocks import InputSkip, OutputSkip, ResidualInput
from gencompare.rng import RandomSource, generator
from parts import part

SPEC = DataSpec("noise", (1, 4, 4), num_classes=3, num_bins=None)
BASE, WIDTHS = 32, (32, 256)
LEARNING_RATE = 1e-3
Network = Callable[[int, int | None], partial[nn.Module]]
"""(width, base width) -> network factory."""


def dit(width: int, base_width: int | None) -> partial[nn.Module]:
    return partial(DiT, hidden_size=width, depth=2, num_heads=width // 16, base_width=base_width)


def mlp(width: int, base_width: int | None) -> partial[nn.Module]:
    return partial(DenoisingMLP, width=width, depth=2, base_width=base_width)


def unet(width: int, base_width: int | None, **options: Any) -> partial[nn.Module]:
    sizes = {"channels": width, "channel_mult": [1, 2], "num_blocks": 1, "attention_resolutions": [4], "num_groups": 8}
    return partial(UNet, **{**sizes, "head_channels": 16, "base_width": base_width, **options})


def pyramids(width: int, base_width: int | None) -> partial[nn.Module]:
    return unet(width, base_width, progressive_input=InputSkip, progressive_output=OutputSkip)


def residual_inputs(width: int, base_width: int | None) -> partial[nn.Module]:
    return unet(width, base_width, channel_mult=[1, 1, 1], progressive_input=ResidualInput)


SLOW = (unet, pyramids, residual_inputs)


def diffusion(network: partial[nn.Module], optimizer: Any = partial(torch.optim.Adam, lr=LEARNING_RATE)) -> Diffusion:
    torch.manual_seed(0)
    return Diffusion(
        SPEC, network=network, schedule=part("schedule", "rectified"), parameterization=part("parameterization", "v"),
        objective=part("objective", "simple"), sampler=part("sampler", "euler"), clip_x0=False, conditional=True,
        optimizer=optimizer,
    )  # fmt: skip


def changes(network: partial[nn.Module], steps: int = 4) -> dict[str, float]:
    """Return the root mean square of the change of hidden features and of the output in a few steps of Adam."""
    model = diffusion(network)
    (optimizer,) = model.build_optimizers()
    x, cond = torch.randn(16, 1, 4, 4, generator=generator("cpu", 1)), {"label": torch.arange(16) % 3}
    before = activations(model, x, cond)
    for step in range(steps):
        optimizer.zero_grad()
        model.losses(x, cond, RandomSource.for_batch(generator("cpu", step), 16))["loss"].mean().backward()
        optimizer.step()
    after = activations(model, x, cond)
    return {name: float((after[name] - before[name]).square().mean().sqrt()) for name in before}


@torch.no_grad()
def activations(model: Diffusion, x: Tensor, cond: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the features after the last block, and the output of the network."""
    found: dict[str, Tensor] = {}
    handle = model.network.blocks[-1].register_forward_hook(lambda *call: found.update(hidden=call[2]))  # type: ignore[union-attr]
    found["output"] = model.network(x, torch.linspace(0, 1000, len(x)), cond)
    handle.remove()
    return found


def growth(by_width: list[dict[str, float]], name: str) -> float:
    """Return the exponent of the growth of a change with the width, from the narrowest to the widest network."""
    return math.log(by_width[-1][name] / by_width[0][name]) / math.log(WIDTHS[-1] / WIDTHS[0])


@pytest.mark.parametrize("network", [dit, mlp, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_updates_do_not_grow_with_the_width(network: Network) -> None:
    """The coordinate check of Yang et al. (2022), appendix D.1: without muP, updates grow with the width."""
    by_width, without = ([changes(network(width, base)) for width in WIDTHS] for base in (BASE, None))
    for name in ("hidden", "output"):
        assert abs(growth(by_width, name)) < 0.2, name
        assert growth(without, name) > 0.5, name


@pytest.mark.parametrize("network", [dit, mlp, unet])
def test_a_network_of_the_base_width_is_not_changed(network: Network) -> None:
    plain, base = diffusion(network(BASE, None)), diffusion(network(BASE, BASE))
    for name, value in plain.state_dict().items():
        assert torch.equal(base.state_dict()[name], value), name
    (optimizer,) = base.build_optimizers()
    assert {group["lr"] for group in optimizer.param_groups} == {LEARNING_RATE}


@pytest.mark.parametrize(
    ("network", "inputs"),
    [
        (dit, {"stem.weight", "noise.1.weight", "conditions.label.weight"}),
        (mlp, {"stem.weight", "conditions.label.weight"}),
        (unet, {"stem.weight", "conditions.label.weight"}),
        (pyramids, {"stem.weight", "conditions.label.weight", "inputs.0.conv.weight"}),
        (residual_inputs, {"stem.weight", "conditions.label.weight", "inputs.0.downsample.conv.weight"}),
    ],
)
def test_the_learning_rate_of_hidden_and_output_weights_is_divided(network: Network, inputs: set[str]) -> None:
    model = diffusion(network(4 * BASE, BASE))
    (optimizer,) = model.build_optimizers()
    rates = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    for name, parameter in model.network.named_parameters():
        is_bias = parameter.ndim == 1
        expected = LEARNING_RATE if is_bias or name in inputs else LEARNING_RATE / 4
        assert rates[parameter] == pytest.approx(expected), name


@pytest.mark.parametrize("width", [BASE, 512])
def test_input_weights_have_the_variance_of_the_base_width(width: int) -> None:
    inputs = 4 * 4
    network = DiT((1, 8, 8), 1, patch_size=4, hidden_size=width, depth=1, num_heads=width // BASE, base_width=BASE)
    assert float(network.stem.weight.detach().var()) == pytest.approx(2 / (inputs + BASE), rel=0.15)
    conv = unet(width, BASE)((3, 8, 8), 3).get_submodule("stem")
    assert float(next(conv.parameters()).detach().var()) == pytest.approx(2 / (9 * (3 + BASE)), rel=0.15)


def test_other_optimisers_and_sizes_of_heads_are_refused() -> None:
    model = diffusion(mlp(64, BASE), partial(torch.optim.SGD, lr=0.1))
    with pytest.raises(UserError, match="not SGD, or"):
        model.build_optimizers()
    diffusion(mlp(64, BASE), partial(torch.optim.AdamW, lr=0.1)).build_optimizers()
    with pytest.raises(UserError, match="multiple of the size of a head"):
        DiT((1, 4, 4), 1, hidden_size=192, num_heads=3, base_width=96)
    for head_channels in (None, 24):
        with pytest.raises(UserError, match="head_channels"):
            unet(64, 32, head_channels=head_channels)((1, 4, 4), 1)
    for base_width in (0, 1.5):
        with pytest.raises(UserError, match="base_width="):
            DenoisingMLP((1, 4, 4), 1, base_width=base_width)  # type: ignore[arg-type]
