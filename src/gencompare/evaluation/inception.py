"""The standard FID network, ``inception-v3-compat``: torch-fidelity's, run in a faster form."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from gencompare.contract import DataSpec
from gencompare.evaluation.features import Extractor, Features
from gencompare.evaluation.fidelity import Fidelity

NAME = "inception-v3-compat"
SPATIAL_CHANNELS = 7


def inception(spec: DataSpec, weights: str | os.PathLike[str] | None = None) -> Extractor:
    """The FID network. ``weights``: a file on this machine; None downloads the published one where that is allowed."""
    return Inception(spec, weights)


class Inception(Fidelity):
    """2048 features of the Inception network of 2015-12-05 (Heusel et al. 2017).

    The same function as torch-fidelity's, to rounding: each batch norm is folded into the convolution before it, and
    images lie channels last. Logits are over 1008 classes of ImageNet, without the bias, as the Inception score takes
    them. Spatial features are 7 channels of 17 x 17 activations in the middle (Nash et al. 2021: sFID).
    """

    def __init__(self, spec: DataSpec, weights: str | os.PathLike[str] | None = None) -> None:
        super().__init__(spec, NAME, weights)

    @property
    def primary(self) -> str:
        """FID, which papers quote."""
        return self.frechet_name

    @property
    def frechet_name(self) -> str:
        return "fid"

    @property
    def kernel_name(self) -> str:
        return "kid"

    @property
    def score_name(self) -> str:
        return "inception_score"

    def layers(self) -> list[str]:
        return ["2048", "logits_unbiased"]

    def build(self, path: Path | None) -> Any:
        module = folded(super().build(path))
        module.Mixed_6d.branch1x1.register_forward_hook(self._remember)
        return module

    def run(self, images: Tensor) -> Features:
        with torch.inference_mode():
            features, logits = self.module(images.expand(-1, 3, -1, -1))
        return Features(features, logits, self._seen[:, :SPATIAL_CHANNELS].flatten(1))

    def _remember(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._seen = output


def folded(network: Any) -> Any:
    """``network`` with every (convolution, batch norm) pair as one convolution, channels last. Changes it in place.

    W' = W g / sqrt(v + e), b' = (b - m) g / sqrt(v + e) + shift: the same map in inference, with less to move.
    """
    for block in network.modules():
        if isinstance(getattr(block, "conv", None), nn.Conv2d) and isinstance(
            getattr(block, "bn", None), nn.BatchNorm2d
        ):
            block.conv = fuse_conv_bn_eval(block.conv, block.bn)
            block.bn = nn.Identity()
    return network.to(memory_format=torch.channels_last)
