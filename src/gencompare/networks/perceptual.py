"""Perceptual distances between images, for losses and never for measuring."""

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

from gencompare.errors import UserError


class VGG(nn.Module):
    """Stages of two 3x3 convolutions, each at half of the side of the one before; average pool; logits.

    Simonyan and Zisserman (2015), "Very deep convolutional networks for large-scale image recognition", with two
    convolutions a stage and group norm, which needs no statistic of the batch.

    Args:
        channels: of the image.
        num_classes: logits.
        widths: channels of each stage, multiples of 8.
    """

    def __init__(self, channels: int, num_classes: int, *, widths: Sequence[int]) -> None:
        super().__init__()
        if not widths or any(width % 8 for width in widths):
            raise UserError(f"The widths of a classifier must be multiples of 8, not {list(widths)}.")
        self.stages = nn.ModuleList(
            nn.Sequential(*convolution(before, width), *convolution(width, width))
            for before, width in zip([channels, *widths[:-1]], widths, strict=True)
        )
        self.head = nn.Linear(widths[-1], num_classes)

    def activations(self, x: Tensor) -> list[Tensor]:
        """The activations after each stage, finest first, of images (n, C, H, W) in [-1, 1]."""
        found: list[Tensor] = []
        for stage in self.stages:
            x = stage(nn.functional.max_pool2d(found[-1], 2) if found else x)
            found.append(x)
        return found

    def features(self, x: Tensor) -> Tensor:
        """(n, widths[-1]): the mean over all places of the last stage."""
        return self.activations(x)[-1].mean((2, 3))

    def classify(self, features: Tensor) -> Tensor:
        """Logits (n, num_classes) of ``features``."""
        return self.head(features)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x))


def convolution(before: int, after: int) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(8, after), nn.ReLU()]


SHIPPED = Path(__file__).parent / "weights"
TRAINED_ON = {1: "fashion_mnist", 3: "cifar10"}
"""By channels of the images: the data set whose network is taken."""


class PerceptualNetwork(nn.Module):
    r"""d(x, y) = sum over stages l of the mean over places of |u_l(x) - u_l(y)|^2, with u_l the activations after stage
    l scaled to length 1 at each place.

    Zhang et al. (2018), "The unreasonable effectiveness of deep features as a perceptual metric", eq. 1, with equal
    weights. Images (n, C, H, W) in [-1, 1], twice, to (n,). The network is frozen: gradients pass to the images.

    Args:
        network: what gives the activations.
        name, sha256: of its weights; a record lists them among what a model was trained against.
    """

    def __init__(self, network: VGG, name: str, sha256: str) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.name, self.sha256 = name, sha256

    def train(self, mode: bool = True) -> PerceptualNetwork:
        """Always in eval mode: it is frozen."""
        return super().train(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        pairs = zip(self.network.activations(x), self.network.activations(y), strict=True)
        return sum((unit(a) - unit(b)).square().sum(1).mean((1, 2)) for a, b in pairs)  # type: ignore[return-value]


def unit(activations: Tensor) -> Tensor:
    """(n, C, H, W) with length 1 over C at each place; nought stays nought."""
    return F.normalize(activations, dim=1, eps=1e-6)


def perceptual_network(channels: int, weights: str | os.PathLike[str] | None = None) -> PerceptualNetwork:
    """A `VGG` that was trained to classify, from a file of ``task=export`` of its run.

    Of another architecture than the residual networks that measure, and from another seed.

    Args:
        channels: of the images.
        weights: the file; None is the one shipped for images of so many channels.
    """
    if weights is None and channels not in TRAINED_ON:
        raise UserError(
            f"No perceptual network is shipped for images of {channels} channels: train one"
            " (experiment=cifar10_perceptual shows how) and give model.perceptual.weights=FILE, or take"
            " model/perceptual=null."
        )
    path = SHIPPED / f"perceptual_{TRAINED_ON[channels]}.safetensors" if weights is None else Path(weights)
    try:
        payload = path.read_bytes()
        with safe_open(path, "pt") as file:
            options = json.loads(file.metadata()["model"])["network"]
        state = {name.removeprefix("net."): value for name, value in load(payload).items()}
        # The shipped networks were trained with a second head, which a distance does not use.
        state = {name: value for name, value in state.items() if not name.startswith("grades.")}
        taken, classes = state["stages.0.0.weight"].shape[1], len(state["head.weight"])
        network = VGG(taken, classes, widths=options["widths"])
        network.load_state_dict(state)
    except FileNotFoundError as error:
        raise UserError(f"There is no perceptual network {path}.") from error
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(
            f"{path} is damaged, or no perceptual network ({type(error).__name__}): task=export of a run of"
            " experiment=cifar10_perceptual or the like writes one."
        ) from error
    if taken != channels:
        raise UserError(f"{path} takes images of {taken} channels; these have {channels}.")
    return PerceptualNetwork(network, path.stem, hashlib.sha256(payload).hexdigest())
