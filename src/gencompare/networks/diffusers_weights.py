"""Conversion of weights between diffusers' ``UNet2DModel`` and `gencompare.networks.unet.UNet`.

The two networks are identical if the ``UNet2DModel`` config agrees with `REQUIRED_CONFIG`, as the configs of published
DDPMs do, and timesteps are integers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from gencompare.errors import UserError

REQUIRED_CONFIG = {
    "flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0, "norm_eps": 1e-6, "attention_head_dim": None,
    "act_fn": "silu", "mid_block_scale_factor": 1, "time_embedding_type": "positional", "center_input_sample": False,
    "resnet_time_scale_shift": "default", "add_attention": True, "downsample_type": "conv", "upsample_type": "conv",
}  # fmt: skip
"""Config values that make a ``UNet2DModel`` identical to a `UNet`. Missing keys are assumed to have these values."""

RESIDUAL = {
    "norm1": "norm1",
    "conv1": "conv1",
    "emb": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "shortcut": "conv_shortcut",
}
ATTENTION = {"norm": "group_norm", "qkv": "to_q to_k to_v", "out": "to_out.0"}
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""Attention layer names in older published checkpoints, and their current names."""


def name_pairs(num_levels: int, num_blocks: int) -> Iterator[tuple[str, str]]:
    """Yield pairs of module names (`UNet`, ``UNet2DModel``).

    If several names are given for the ``UNet2DModel``, the `UNet` module stacks their weights. Every block is listed
    with a shortcut and with attention, even if it does not have them.
    """

    def block(ours: str, theirs: str, j: int) -> Iterator[tuple[str, str]]:
        for a, b in RESIDUAL.items():
            yield f"{ours}.residual.{a}", f"{theirs}.resnets.{j}.{b}"
        for a, b in ATTENTION.items():
            yield f"{ours}.attention.{a}", " ".join(f"{theirs}.attentions.{j}.{name}" for name in b.split())

    yield "noise.1", "time_embedding.linear_1"
    yield "noise.3", "time_embedding.linear_2"
    yield "stem", "conv_in"
    for level in range(num_levels):
        start = level * (num_blocks + 1)
        for j in range(num_blocks):
            yield from block(f"encoder.{start + j}", f"down_blocks.{level}", j)
        yield f"encoder.{start + num_blocks}.conv", f"down_blocks.{level}.downsamplers.0.conv"
    yield from block("middle.0", "mid_block", 0)
    for a, b in RESIDUAL.items():
        yield f"middle.1.{a}", f"mid_block.resnets.1.{b}"
    for level in range(num_levels):
        start = level * (num_blocks + 2)
        for j in range(num_blocks + 1):
            yield from block(f"decoder.{start + j}", f"up_blocks.{level}", j)
        yield f"decoder.{start + num_blocks + 1}.conv", f"up_blocks.{level}.upsamplers.0.conv"
    yield "norm", "conv_norm_out"
    yield "out", "conv_out"


def from_diffusers(state_dict: Mapping[str, Tensor], *, num_levels: int, num_blocks: int) -> dict[str, Tensor]:
    """Convert the state dict of a ``UNet2DModel`` to that of a `UNet` of the same size.

    Args:
        state_dict: weights of the ``UNet2DModel``.
        num_levels: number of resolutions.
        num_blocks: residual blocks per encoder level.

    Raises:
        UserError: if a key is unexpected.
    """
    remaining = {}
    for name, weight in state_dict.items():
        for old, new in OLD_NAMES.items():
            name = name.replace(old, new)
        remaining[name] = weight
    converted = {}
    for ours, theirs in name_pairs(num_levels, num_blocks):
        for kind in ("weight", "bias"):
            names = [f"{name}.{kind}" for name in theirs.split()]
            if all(name in remaining for name in names):
                converted[f"{ours}.{kind}"] = torch.cat([remaining.pop(name) for name in names])
    if remaining:
        raise UserError(
            f"These weights do not belong to a UNet2DModel with {num_levels} levels of {num_blocks} blocks: unexpected"
            f" keys {', '.join(sorted(remaining)[:3])}."
        )
    return converted


def to_diffusers(state_dict: Mapping[str, Tensor], *, num_levels: int, num_blocks: int) -> dict[str, Tensor]:
    """Convert the state dict of a `UNet` to that of a ``UNet2DModel`` of the same size.

    Args:
        state_dict: weights of the `UNet`.
        num_levels: number of resolutions.
        num_blocks: residual blocks per encoder level.

    Raises:
        UserError: if ``UNet2DModel`` has no counterpart for a weight.
    """
    remaining = dict(state_dict)
    converted = {}
    for ours, theirs in name_pairs(num_levels, num_blocks):
        for kind in ("weight", "bias"):
            weight = remaining.pop(f"{ours}.{kind}", None)
            if weight is not None:
                names = theirs.split()
                parts = weight.chunk(len(names))
                converted |= {f"{name}.{kind}": part.contiguous() for name, part in zip(names, parts, strict=True)}
    if remaining:
        raise UserError(
            f"diffusers' UNet2DModel has no counterpart for {', '.join(sorted(remaining)[:3])}: only an unconditional"
            " U-Net of the DDPM paper (model/network=unet or unet_ddpm_cifar10) can be exported to diffusers."
        )
    return converted
