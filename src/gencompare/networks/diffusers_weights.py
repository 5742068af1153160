"""Weights of diffusers' ``UNet2DModel`` under the names of `gencompare.networks.unet.UNet`.

The two are the same network where the config of the former holds `SAME_NETWORK`, as of published DDPMs, and it is given
whole timesteps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from gencompare.errors import UserError

SAME_NETWORK = {
    "flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0, "norm_eps": 1e-6, "attention_head_dim": None,
    "act_fn": "silu", "mid_block_scale_factor": 1, "time_embedding_type": "positional", "center_input_sample": False,
    "resnet_time_scale_shift": "default", "add_attention": True, "downsample_type": "conv", "upsample_type": "conv",
}  # fmt: skip
"""What ``UNet2DModel`` must say of itself to be the same network. What it leaves out is taken to be so."""

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
"""Published checkpoints call the layers of attention so."""


def name_pairs(levels: int, blocks: int) -> Iterator[tuple[str, str]]:
    """Modules that hold weights: ours, theirs. Several of theirs, parted by blanks, are stacked in one of ours.

    Every block is listed with a shortcut and with attention, whether or not it has them.
    """

    def block(ours: str, theirs: str, j: int) -> Iterator[tuple[str, str]]:
        for a, b in RESIDUAL.items():
            yield f"{ours}.residual.{a}", f"{theirs}.resnets.{j}.{b}"
        for a, b in ATTENTION.items():
            yield f"{ours}.attention.{a}", " ".join(f"{theirs}.attentions.{j}.{name}" for name in b.split())

    yield "noise.1", "time_embedding.linear_1"
    yield "noise.3", "time_embedding.linear_2"
    yield "stem", "conv_in"
    for level in range(levels):
        start = level * (blocks + 1)
        for j in range(blocks):
            yield from block(f"encoder.{start + j}", f"down_blocks.{level}", j)
        yield f"encoder.{start + blocks}.conv", f"down_blocks.{level}.downsamplers.0.conv"
    yield from block("middle.0", "mid_block", 0)
    for a, b in RESIDUAL.items():
        yield f"middle.1.{a}", f"mid_block.resnets.1.{b}"
    for level in range(levels):
        start = level * (blocks + 2)
        for j in range(blocks + 1):
            yield from block(f"decoder.{start + j}", f"up_blocks.{level}", j)
        yield f"decoder.{start + blocks + 1}.conv", f"up_blocks.{level}.upsamplers.0.conv"
    yield "norm", "conv_norm_out"
    yield "out", "conv_out"


def from_diffusers(state: Mapping[str, Tensor], *, levels: int, blocks: int) -> dict[str, Tensor]:
    """The state dict of a `UNet` of so many levels and blocks, from that of a ``UNet2DModel`` of the same sizes.

    Raises `UserError` where the given weights are not all known by name.
    """
    left = {}
    for name, weight in state.items():
        for old, new in OLD_NAMES.items():
            name = name.replace(old, new)
        left[name] = weight
    found = {}
    for ours, theirs in name_pairs(levels, blocks):
        for kind in ("weight", "bias"):
            names = [f"{name}.{kind}" for name in theirs.split()]
            if all(name in left for name in names):
                found[f"{ours}.{kind}"] = torch.cat([left.pop(name) for name in names])
    if left:
        raise UserError(
            f"These weights are not of a UNet2DModel with {levels} levels of {blocks} blocks: nothing here is called"
            f" {', '.join(sorted(left)[:3])}."
        )
    return found


def to_diffusers(state: Mapping[str, Tensor], *, levels: int, blocks: int) -> dict[str, Tensor]:
    """The state dict of a ``UNet2DModel``, from that of a `UNet` of so many levels and blocks.

    Raises `UserError` where the network has weights that a ``UNet2DModel`` has not.
    """
    left = dict(state)
    found = {}
    for ours, theirs in name_pairs(levels, blocks):
        for kind in ("weight", "bias"):
            weight = left.pop(f"{ours}.{kind}", None)
            if weight is not None:
                names = theirs.split()
                parts = weight.chunk(len(names))
                found |= {f"{name}.{kind}": part.contiguous() for name, part in zip(names, parts, strict=True)}
    if left:
        raise UserError(
            f"diffusers' UNet2DModel has nothing like {', '.join(sorted(left)[:3])}: only an unconditional U-Net as of"
            " the DDPM paper (model/network=unet or unet_ddpm_cifar10) can be written for diffusers."
        )
    return found
