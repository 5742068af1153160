"""EfficientNet-Lite0, the ImageNet network of the default feature extractor."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

STAGES = (
    # expansion, kernel, stride, channels, blocks
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
"""EfficientNet-B0 (Tan and Le 2019, table 1, https://arxiv.org/abs/1905.11946). The Lite variant keeps its widths, and
has ReLU6 for swish and no squeeze-and-excitation."""
STEM, HEAD, CLASSES = 32, 1280, 1000


class ConvNorm(nn.Module):
    """Convolution with TensorFlow's "same" padding, batch norm, and ReLU6 where ``activation`` is set."""

    def __init__(
        self, channels: int, width: int, kernel: int, stride: int = 1, groups: int = 1, activation: bool = True
    ) -> None:
        super().__init__()
        self.conv: nn.Module = nn.Conv2d(channels, width, kernel, stride, groups=groups, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(width, eps=1e-3)
        self.kernel, self.stride, self.activation = kernel, stride, activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(same_padding(x, self.kernel, self.stride)))
        return F.relu6(x) if self.activation else x


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, linear projection (Sandler et al. 2018, "MobileNetV2", figure 4)."""

    def __init__(self, channels: int, width: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        inner = channels * expansion
        self.expand = ConvNorm(channels, inner, 1) if expansion > 1 else nn.Identity()
        self.depthwise = ConvNorm(inner, inner, kernel, stride, groups=inner)
        self.project = ConvNorm(inner, width, 1, activation=False)
        self.residual = stride == 1 and channels == width

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """A classifier of ImageNet: stem, seven stages of inverted residuals, 1x1 head, mean over pixels, linear layer.

    ``forward`` maps RGB images (n, 3, H, W) in [-1, 1] of any size to logits (n, 1000); `activations` stops earlier.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, STEM, 3, stride=2)
        self.stages = nn.ModuleList()
        channels = STEM
        for expansion, kernel, stride, width, blocks in STAGES:
            stage = nn.Sequential()
            for block in range(blocks):
                stage.append(InvertedResidual(channels, width, expansion, kernel, stride if block == 0 else 1))
                channels = width
            self.stages.append(stage)
        self.head = ConvNorm(channels, HEAD, 1)
        self.classifier = nn.Linear(HEAD, CLASSES)

    def activations(self, x: Tensor) -> dict[str, Tensor]:
        """Activations by layer: ``stage1`` (n, 16, H/2, W/2) to ``stage7`` (n, 320, H/32, W/32), and ``head`` (n, 1280,
        H/32, W/32). Stages end in a linear projection, the head in ReLU6."""
        found = {}
        x = self.stem(x)
        for number, stage in enumerate(self.stages, 1):
            x = found[f"stage{number}"] = stage(x)
        found["head"] = self.head(x)
        return found

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.activations(x)["head"].mean((2, 3)))

    def load_published(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights of a state dict with the names of the published file. Raises RuntimeError where one does
        not fit."""
        self.load_state_dict(renamed(state))

    @torch.no_grad()
    def fold(self) -> EfficientNetLite0:
        """Fold every batch norm into the convolution before it, in place: the same function in evaluation mode, with
        less memory traffic. Weights lie channels last."""
        self.eval()
        for module in self.modules():
            if isinstance(module, ConvNorm):
                module.conv = fuse_conv_bn_eval(module.conv, module.norm)  # type: ignore[arg-type]
                module.norm = nn.Identity()
        return self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def same_padding(x: Tensor, kernel: int, stride: int) -> Tensor:
    """``x`` padded so that a convolution gives ceil(size / stride) pixels; an odd pixel goes right and below."""
    pads = []
    for size in (x.shape[3], x.shape[2]):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads) if any(pads) else x


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published file's names as those of `EfficientNetLite0`: its blocks are numbered through, not by stage."""
    places = [(stage, block) for stage, (*_, blocks) in enumerate(STAGES) for block in range(blocks)]
    parts = {"_expand_conv": "expand.conv", "_depthwise_conv": "depthwise.conv", "_project_conv": "project.conv",
             "_bn0": "expand.norm", "_bn1": "depthwise.norm", "_bn2": "project.norm"}  # fmt: skip
    outside = {"_conv_stem": "stem.conv", "_bn0": "stem.norm", "_conv_head": "head.conv", "_bn1": "head.norm",
               "_fc": "classifier"}  # fmt: skip
    found = {}
    for name, value in state.items():
        first, *rest = name.split(".")
        if first == "_blocks":
            stage, block = places[int(rest[0])]
            found[".".join([f"stages.{stage}.{block}", parts[rest[1]], *rest[2:]])] = value
        else:
            found[".".join([outside[first], *rest])] = value
    return found
