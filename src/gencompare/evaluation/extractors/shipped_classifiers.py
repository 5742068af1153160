"""Classifier extractors: small classifiers trained by this project and shipped with it, for use offline."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from gencompare.errors import UserError
from gencompare.evaluation.extractors.extractor import Extractor, Features, IdentityExtractor
from gencompare.files import atomic
from gencompare.generative_model import DataSpec
from gencompare.networks.residual_classifier import ResidualClassifier

SHIPPED = Path(__file__).parent / "weights"
SUMS = SHIPPED / "SHA256SUMS"
SPATIAL = 128
"""Activations at most in the spatial distance of a classifier extractor: a covariance needs several images for each."""
VERSION = 2
"""Of the files. 1: pre-activation blocks with group norm, and a second head."""
FALLBACK = {1: "fashion_mnist", 3: "cifar10"}
"""By channels: whose extractor measures data that have none of their own."""


def shipped_classifier(spec: DataSpec, weights: str | os.PathLike[str] | None = None) -> Extractor:
    """The classifier extractor for data of ``spec``.

    Data with a shipped extractor of their own name get that one. Others get the one of Fashion-MNIST (grey) or
    CIFAR-10 (RGB) on images resized to 32 x 32, without its class figures. Continuous data are measured as they are.

    Args:
        weights: a safetensors file written by `save_classifier`, in place of the shipped one.
    """
    if weights is not None:
        return ClassifierExtractor(Path(weights), spec)
    if spec.num_levels is None:
        return IdentityExtractor(spec)
    own = SHIPPED / f"{spec.name}.safetensors"
    if own.is_file():
        return ClassifierExtractor(own, spec, expected=shipped_sum(own))
    if spec.shape[0] not in FALLBACK:
        raise UserError(
            f"No shipped extractor takes images of {spec.shape[0]} channels: "
            "train one (model=classifier), and name it with evaluation.weights=FILE."
        )
    other = SHIPPED / f"{FALLBACK[spec.shape[0]]}.safetensors"
    return ClassifierExtractor(other, spec, expected=shipped_sum(other))


class ClassifierExtractor(Extractor):
    """A `ResidualClassifier` from a safetensors file, whose metadata say how to build it and how good it is.

    Args:
        path: the file.
        spec: of the data to be measured; with other data than its own, images are resized and logits left out.
        expected: SHA-256 that the file must have; None takes any.
    """

    def __init__(self, path: Path, spec: DataSpec, expected: str | None = None) -> None:
        super().__init__()
        state, facts, self.hash = read_classifier(path)
        if expected is not None and self.hash != expected:
            raise UserError(f"{path} is damaged: its SHA-256 is not the one in {SUMS.name}. Install gencompare again.")
        self.name: str = facts["data"]
        channels, height, width = facts["shape"]
        self.padding: int = facts["padding"]
        self.size = (height - 2 * self.padding, width - 2 * self.padding)
        if spec.shape[0] != channels:
            raise UserError(f"{path} takes images of {channels} channels, and data '{spec.name}' has {spec.shape[0]}.")
        self.knows_classes = spec.name == facts["data"] and spec.num_classes == facts["num_classes"]
        real = (spec.shape[1] - 2 * spec.padding, spec.shape[2] - 2 * spec.padding)
        if real != self.size:
            self.resize = f"bilinear antialias to {self.size[0]}x{self.size[1]}"
        self.module = ResidualClassifier(channels, facts["num_classes"], **facts["network"])
        self.module.load_state_dict(state)
        self.module.eval().requires_grad_(False)
        self.dim = self.module.head.in_features
        self.details = {"extractor_accuracy": facts["accuracy"], "extractor_trained_on": facts["data"]}

    def run(self, images: Tensor) -> Features:
        x = images.float()
        if x.shape[2:] != self.size:
            x = F.interpolate(x, self.size, mode="bilinear", antialias=True, align_corners=False)
            # An image on a disk has whole levels at this size too.
            x = x.round().clamp(0, 255)
        x = F.pad(x.div(127.5).sub(1), (self.padding,) * 4, value=-1.0)
        assert isinstance(self.module, ResidualClassifier)
        activations = self.module.activations(x)
        features = self.module.pool(activations)
        logits = self.module.classify(features) if self.knows_classes else None
        return Features(features, logits, spatial_part(activations))


def spatial_part(activations: Tensor) -> Tensor:
    """The first channels of (n, C, H, W) with their places, (n, s): as many as give at most `SPATIAL` numbers."""
    n, channels, height, width = activations.shape
    kept = max(1, min(channels, SPATIAL // (height * width)))
    return activations[:, :kept].reshape(n, -1)


def save_classifier(
    path: str | os.PathLike[str],
    state: Mapping[str, Tensor],
    spec: DataSpec,
    *,
    network: Mapping[str, Any],
    accuracy: float,
    recipe: str,
) -> str:
    """Write a trained `ResidualClassifier` as an extractor's file; returns its SHA-256.

    Args:
        state: its state dict; what is floating-point in it is stored as float16, which moves the logits by less than
            training noise does.
        network: the arguments that build it, beside channels and classes.
        accuracy: on the data's test split, after rounding to float16.
        recipe: the command that trained it.
    """
    facts = {
        "data": spec.name, "shape": list(spec.shape), "padding": spec.padding, "num_classes": spec.num_classes,
        "network": dict(network), "accuracy": accuracy, "recipe": recipe, "version": VERSION,
    }  # fmt: skip
    half = {name: rounded(value).cpu().contiguous() for name, value in state.items()}
    payload = save(half, {"extractor": json.dumps(facts, sort_keys=True)})
    with atomic(path) as file:
        file.write(payload)
    return hashlib.sha256(payload).hexdigest()


def rounded(value: Tensor) -> Tensor:
    """``value`` as float16; the integers that batch norm counts its batches with stay what they are."""
    return value.detach().to(torch.float16) if value.is_floating_point() else value.detach()


def read_classifier(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """(state dict in float32, facts, SHA-256) of an extractor's file. Nothing in it is run."""
    try:
        payload = path.read_bytes()
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["extractor"])
        state = {name: value.float() if value.is_floating_point() else value for name, value in load(payload).items()}
        if facts["version"] != VERSION:
            raise UserError(
                f"{path} is of another version of gencompare ({facts['version']}, not {VERSION}): train it again."
            )
    except FileNotFoundError as error:
        raise UserError(f"There is no extractor {path}.") from error
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged, or no extractor of gencompare ({type(error).__name__}).") from error
    return state, facts, hashlib.sha256(payload).hexdigest()


def shipped_sum(path: Path) -> str:
    """The SHA-256 that ``SHA256SUMS`` gives for a shipped file."""
    for line in SUMS.read_text().splitlines():
        digest, name = line.split()
        if name == path.name:
            return digest
    raise UserError(f"{SUMS} does not list {path.name}: install gencompare again.")


def write_sums() -> None:
    """Write ``SHA256SUMS`` again, after a shipped file was replaced."""
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in sorted(SHIPPED.glob("*.safetensors"))]
    with atomic(SUMS) as file:
        file.write("".join(lines).encode())
