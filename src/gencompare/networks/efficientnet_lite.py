"""EfficientNet-Lite0, the ImageNet network of the default feature extractor."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

STAGES = (
    # expansion, kernel size, stride, channels, blocks
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
"""Stages of EfficientNet-B0 (Tan and Le 2019, table 1, https://arxiv.org/abs/1905.11946). The Lite variant has the same
stages, ReLU6 instead of swish, and no squeeze-and-excitation."""
STEM_CHANNELS, HEAD_CHANNELS, NUM_CLASSES = 32, 1280, 1000


class ConvNorm(nn.Module):
    """Convolution with TensorFlow's "same" padding, batch norm and, if ``activation``, ReLU6."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        activation: bool = True,
    ) -> None:
        super().__init__()
        self.conv: nn.Module = nn.Conv2d(channels_in, channels_out, kernel_size, stride, groups=groups, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(channels_out, eps=1e-3)
        self.kernel_size, self.stride, self.activation = kernel_size, stride, activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(same_padding(x, self.kernel_size, self.stride)))
        return F.relu6(x) if self.activation else x


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution and linear projection (Sandler et al. 2018, "MobileNetV2", figure 4,
    https://arxiv.org/abs/1801.04381)."""

    def __init__(self, channels_in: int, channels_out: int, expansion: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        hidden = channels_in * expansion
        self.expand = ConvNorm(channels_in, hidden, 1) if expansion > 1 else nn.Identity()
        self.depthwise = ConvNorm(hidden, hidden, kernel_size, stride, groups=hidden)
        self.project = ConvNorm(hidden, channels_out, 1, activation=False)
        self.is_residual = stride == 1 and channels_in == channels_out

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.is_residual else y


class EfficientNetLite0(nn.Module):
    """An ImageNet classifier: stem, seven stages of inverted residuals, 1x1 head, global average pooling, linear layer.

    ``forward`` maps RGB images (n, 3, H, W) in [-1, 1] of any size to logits (n, 1000).
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, STEM_CHANNELS, 3, stride=2)
        self.stages = nn.ModuleList()
        channels_in = STEM_CHANNELS
        for expansion, kernel_size, stride, channels_out, num_blocks in STAGES:
            stage = nn.Sequential()
            for k in range(num_blocks):
                block_stride = stride if k == 0 else 1
                stage.append(InvertedResidual(channels_in, channels_out, expansion, kernel_size, block_stride))
                channels_in = channels_out
            self.stages.append(stage)
        self.head = ConvNorm(channels_in, HEAD_CHANNELS, 1)
        self.classifier = nn.Linear(HEAD_CHANNELS, NUM_CLASSES)

    def activations(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the activations by layer: ``stage1`` (n, 16, H/2, W/2) to ``stage7`` (n, 320, H/32, W/32), and
        ``head`` (n, 1280, H/32, W/32). Stages end in a linear projection, the head in ReLU6."""
        activations = {}
        x = self.stem(x)
        for number, stage in enumerate(self.stages, 1):
            x = activations[f"stage{number}"] = stage(x)
        activations["head"] = self.head(x)
        return activations

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.activations(x)["head"].mean((2, 3)))

    def load_published(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load a state dict with the names of the published file. Raise an exception if names or shapes differ."""
        self.load_state_dict(convert_names(state_dict))

    @torch.no_grad()
    def fold(self) -> EfficientNetLite0:
        """Fold every batch norm into its convolution, in place, and use the channels-last memory format.

        The folded network computes the same function with less memory traffic, but only works in eval mode.
        """
        self.eval()
        for module in self.modules():
            if isinstance(module, ConvNorm):
                module.conv = fuse_conv_bn_eval(module.conv, module.norm)  # type: ignore[arg-type]
                module.norm = nn.Identity()
        return self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def same_padding(x: Tensor, kernel_size: int, stride: int) -> Tensor:
    """Pad ``x`` so that a convolution gives ceil(size / stride) pixels. An odd pixel goes to the right or bottom."""
    padding = []
    for size in (x.shape[3], x.shape[2]):
        total = max((-(-size // stride) - 1) * stride + kernel_size - size, 0)
        padding += [total // 2, total - total // 2]
    return F.pad(x, padding) if any(padding) else x


def convert_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of the published file, which numbers blocks consecutively, to those of `EfficientNetLite0`."""
    positions = [(stage, block) for stage, (*_, num_blocks) in enumerate(STAGES) for block in range(num_blocks)]
    block_names = {"_expand_conv": "expand.conv", "_depthwise_conv": "depthwise.conv", "_project_conv": "project.conv",
                   "_bn0": "expand.norm", "_bn1": "depthwise.norm", "_bn2": "project.norm"}  # fmt: skip
    other_names = {"_conv_stem": "stem.conv", "_bn0": "stem.norm", "_conv_head": "head.conv", "_bn1": "head.norm",
                   "_fc": "classifier"}  # fmt: skip
    converted = {}
    for name, value in state_dict.items():
        first, *rest = name.split(".")
        if first == "_blocks":
            stage, block = positions[int(rest[0])]
            converted[".".join([f"stages.{stage}.{block}", block_names[rest[1]], *rest[2:]])] = value
        else:
            converted[".".join([other_names[first], *rest])] = value
    return converted
