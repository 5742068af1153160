"""Perceptual distances between images, used in losses and never in evaluation."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor, nn

from gencompare.checksums import check_safetensors
from gencompare.errors import UserError
from gencompare.safe_files import read_bytes

WEIGHTS_DIR = Path(__file__).parent / "weights"
TRAINING_DATA = {1: "fashion_mnist", 3: "cifar10"}
"""The training data of each bundled perceptual network, by number of image channels."""


class VGG(nn.Module):
    """A VGG classifier: stages of two 3x3 convolutions with max pooling in between, average pooling, and logits.

    Simonyan and Zisserman (2015), "Very deep convolutional networks for large-scale image recognition"
    (https://arxiv.org/abs/1409.1556), with two convolutions per stage and group norm.

    Args:
        channels: channels of the image.
        num_classes: number of logits.
        widths: channels of each stage, multiples of 8.
    """

    def __init__(self, channels: int, num_classes: int, *, widths: Sequence[int]) -> None:
        super().__init__()
        if not widths or any(width % 8 for width in widths):
            raise UserError(f"The widths of a classifier must be multiples of 8, not {list(widths)}.")
        self.stages = nn.ModuleList(
            nn.Sequential(*conv_norm_relu(before, width), *conv_norm_relu(width, width))
            for before, width in zip([channels, *widths[:-1]], widths, strict=True)
        )
        self.head = nn.Linear(widths[-1], num_classes)

    def activations(self, x: Tensor) -> list[Tensor]:
        """Compute the activations after each stage, finest first, for images (n, C, H, W) in [-1, 1]."""
        activations: list[Tensor] = []
        for stage in self.stages:
            x = stage(F.max_pool2d(activations[-1], 2) if activations else x)
            activations.append(x)
        return activations

    def features(self, x: Tensor) -> Tensor:
        """Average the activations of the last stage over all pixels, (n, widths[-1])."""
        return self.activations(x)[-1].mean((2, 3))

    def classify(self, features: Tensor) -> Tensor:
        """Compute logits (n, num_classes) from ``features``."""
        return self.head(features)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x))


def conv_norm_relu(channels_in: int, channels_out: int) -> list[nn.Module]:
    return [nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.GroupNorm(8, channels_out), nn.ReLU()]


class PerceptualNetwork(nn.Module):
    r"""A perceptual distance between images in the feature space of a frozen classifier.

    .. math:: d(x, y) = \sum_l \mathrm{mean}_{h, w} \| u_l(x) - u_l(y) \|^2

    where :math:`u_l` are the activations after stage :math:`l`, normalised to unit length at each pixel: Zhang et al.
    (2018), "The unreasonable effectiveness of deep features as a perceptual metric", eq. 1
    (https://arxiv.org/abs/1801.03924), with equal weights. Gradients flow to the images, not to the network.

    Shapes: x, y (n, C, H, W) in [-1, 1] -> (n,).

    Args:
        network: computes the activations.
        name: name of the weights; a run record lists it among the perceptual networks of the model.
        sha256: hash of the weights; also in the run record.
    """

    def __init__(self, network: VGG, name: str, sha256: str) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.name, self.sha256 = name, sha256

    def train(self, mode: bool = True) -> PerceptualNetwork:
        """Stay in eval mode, because the network is frozen."""
        return super().train(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        pairs = zip(self.network.activations(x), self.network.activations(y), strict=True)
        distances = ((unit_length(a) - unit_length(b)).square().sum(1).mean((1, 2)) for a, b in pairs)
        return sum(distances)  # type: ignore[return-value]


def unit_length(activations: Tensor) -> Tensor:
    """Normalise activations (n, C, H, W) to length 1 over C at each pixel; zero stays zero."""
    return F.normalize(activations, dim=1, eps=1e-6)


def perceptual_network(channels: int, weights: str | os.PathLike[str] | None = None) -> PerceptualNetwork:
    """Load a perceptual network from a file written by ``task=export`` for a run with the `VGG` classifier.

    Its architecture and seed differ from those of the residual classifiers used in evaluation.

    Args:
        channels: channels of the images.
        weights: path of the file; None loads the bundled network for this number of channels.

    Raises:
        UserError: the file is missing, corrupted, or for a different number of channels; or there is no bundled network
            for this number of channels.
    """
    if weights is None and channels not in TRAINING_DATA:
        raise UserError(
            f"No perceptual network is bundled for images with {channels} channels: train one (see"
            " experiment=cifar10_perceptual) and set model.perceptual.weights=FILE, or use model/perceptual=null."
        )
    path = WEIGHTS_DIR / f"perceptual_{TRAINING_DATA[channels]}.safetensors" if weights is None else Path(weights)
    try:
        payload = read_bytes(path)
        check_safetensors(path, payload)
        with safe_open(path, "pt") as file:
            options = json.loads(file.metadata()["model"])["network"]
        state_dict = {name.removeprefix("net."): value for name, value in load(payload).items()}
        # The bundled networks were trained with a second head, which the distance does not use.
        state_dict = {name: value for name, value in state_dict.items() if not name.startswith("grades.")}
        channels_in, num_classes = state_dict["stages.0.0.weight"].shape[1], len(state_dict["head.weight"])
        network = VGG(channels_in, num_classes, widths=options["widths"])
        network.load_state_dict(state_dict)
    except FileNotFoundError as error:
        raise UserError(f"There is no perceptual network at {path}.") from error
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(
            f"{path} is corrupted or not a perceptual network ({type(error).__name__}): create one with task=export"
            " from a run such as experiment=cifar10_perceptual."
        ) from error
    if channels_in != channels:
        raise UserError(f"{path} needs images with {channels_in} channels, but these have {channels}.")
    return PerceptualNetwork(network, path.stem, hashlib.sha256(payload).hexdigest())
