"""LPIPS as a loss, where the published weights of VGG-16 are at hand."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from gencompare.errors import UserError

FILE = "hub/checkpoints/vgg16-397923af.pth"
"""Where torch keeps the network's weights, under TORCH_HOME (by default ~/.cache/torch)."""


class LPIPS(nn.Module):
    """The distance of Zhang et al. (2018), "The unreasonable effectiveness of deep features as a perceptual metric",
    with their learned weights on VGG-16, by torchmetrics. Images (n, 3, H, W) in [-1, 1], twice, to (n,). Frozen."""

    name = "vgg16"

    def __init__(self) -> None:
        super().__init__()
        try:
            self.network = LearnedPerceptualImagePatchSimilarity(net_type="vgg").net
        except OSError as error:
            raise UserError(
                f"LPIPS needs the weights of VGG-16, and they could not be downloaded ({error}): fetch"
                " https://download.pytorch.org/models/vgg16-397923af.pth where there is a network, and put it at"
                f" TORCH_HOME/{FILE}. The offline default is model/perceptual=trained."
            ) from error
        self.network.requires_grad_(False)
        digest = hashlib.sha256()
        for value in self.network.state_dict().values():
            digest.update(value.numpy().tobytes())
        self.sha256 = digest.hexdigest()

    def train(self, mode: bool = True) -> LPIPS:
        """Always in eval mode: it is frozen."""
        return super().train(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.network(x, y).flatten()


def lpips(channels: int) -> LPIPS:
    """`LPIPS` for images of three channels."""
    if channels != 3:
        raise UserError(f"LPIPS compares colour images; these have {channels} channel: use model/perceptual=trained.")
    with torch.random.fork_rng(devices=[]):
        return LPIPS()
