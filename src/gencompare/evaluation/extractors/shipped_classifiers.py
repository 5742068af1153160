"""Use small classifiers, which this project has trained and bundles, as extractors."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from gencompare.checksums import check_safetensors, seal_safetensors
from gencompare.errors import UserError
from gencompare.evaluation.extractors.extractor import Extractor, Features, IdentityExtractor
from gencompare.files import atomic_write
from gencompare.generative_model import DataSpec
from gencompare.networks.residual_classifier import ResidualClassifier
from gencompare.safe_files import read_bytes

WEIGHTS_DIR = Path(__file__).parent / "weights"
CHECKSUMS = WEIGHTS_DIR / "SHA256SUMS"
MAX_SPATIAL_FEATURES = 128
"""Largest number of spatial features. Estimating their covariance takes several images per feature."""
FILE_VERSION = 2
"""Version of the file format. Version 1 had pre-activation blocks with group norm, and a second head."""
FALLBACK = {1: "fashion_mnist", 3: "cifar10"}
"""Data set whose classifier is used if no classifier is bundled for the data, by number of image channels."""


def shipped_classifier(spec: DataSpec, weights: str | os.PathLike[str] | None = None) -> Extractor:
    """Create the classifier extractor for the data described by ``spec``.

    The classifier bundled for the data set is used. If there is none, the classifier of Fashion-MNIST (greyscale) or
    CIFAR-10 (RGB) is used on images resized to its input size, without class metrics. For continuous data, an
    `IdentityExtractor` is returned.

    Args:
        spec: shape and value range of the data to measure.
        weights: a safetensors file written by `save_classifier`, in place of the bundled one.
    """
    if weights is not None:
        return ClassifierExtractor(Path(weights), spec)
    if spec.num_bins is None:
        return IdentityExtractor(spec)
    own = WEIGHTS_DIR / f"{spec.name}.safetensors"
    if own.is_file():
        return ClassifierExtractor(own, spec, expected=shipped_sha256(own))
    if spec.shape[0] not in FALLBACK:
        raise UserError(
            f"No bundled classifier supports images with {spec.shape[0]} channels: "
            "train one (model=classifier), and set evaluation.weights=FILE."
        )
    other = WEIGHTS_DIR / f"{FALLBACK[spec.shape[0]]}.safetensors"
    return ClassifierExtractor(other, spec, expected=shipped_sha256(other))


class ClassifierExtractor(Extractor):
    """A `ResidualClassifier` from a safetensors file with its architecture and accuracy in the metadata.

    Args:
        path: the safetensors file.
        spec: shape and value range of the data to measure. For data that the classifier was not trained on,
            there are no logits. Images of another size are resized.
        expected: required SHA-256 of the file; None accepts any file.
    """

    def __init__(self, path: Path, spec: DataSpec, expected: str | None = None) -> None:
        super().__init__()
        state, facts, self.hash = read_classifier(path)
        if expected is not None and self.hash != expected:
            raise UserError(f"{path} is corrupted: its SHA-256 is not in {CHECKSUMS.name}. Reinstall gencompare.")
        self.name: str = facts["data"]
        channels, height, width = facts["shape"]
        self.padding: int = facts["padding"]
        self.size = (height - 2 * self.padding, width - 2 * self.padding)
        if spec.shape[0] != channels:
            raise UserError(
                f"{path} needs images with {channels} channels, but data set '{spec.name}' has {spec.shape[0]}."
            )
        self.predicts_data_classes = spec.name == facts["data"] and spec.num_classes == facts["num_classes"]
        real = (spec.shape[1] - 2 * spec.padding, spec.shape[2] - 2 * spec.padding)
        if real != self.size:
            self.resize = f"bilinear antialias to {self.size[0]}x{self.size[1]}"
        self.module = ResidualClassifier(channels, facts["num_classes"], **facts["network"])
        self.module.load_state_dict(state)
        self.module.eval().requires_grad_(False)
        self.dim = self.module.head.in_features
        self.details = {"extractor_accuracy": facts["accuracy"], "extractor_trained_on": facts["data"]}

    def extract_batch(self, images: Tensor) -> Features:
        x = images.float()
        if x.shape[2:] != self.size:
            x = F.interpolate(x, self.size, mode="bilinear", antialias=True, align_corners=False)
            # Round, as if the resized image were saved to a file.
            x = x.round().clamp(0, 255)
        x = F.pad(x.div(127.5).sub(1), (self.padding,) * 4, value=-1.0)
        assert isinstance(self.module, ResidualClassifier)
        activations = self.module.activations(x)
        features = self.module.pool(activations)
        logits = self.module.classify(features) if self.predicts_data_classes else None
        return Features(features, logits, spatial_features(activations))


def spatial_features(activations: Tensor) -> Tensor:
    """Flatten the first channels of activations (n, C, H, W) to (n, s).

    As many channels are kept as fit into `MAX_SPATIAL_FEATURES`, but at least one.
    """
    n, channels, height, width = activations.shape
    kept = max(1, min(channels, MAX_SPATIAL_FEATURES // (height * width)))
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
    """Write a trained `ResidualClassifier` to a file for `ClassifierExtractor`.

    Args:
        path: path of the file.
        state: state dict of the classifier. Floating-point values are stored as float16, which changes the logits by
            less than training noise.
        spec: shape and classes of the training data.
        network: constructor arguments other than channels and classes.
        accuracy: accuracy on the test split, after rounding to float16.
        recipe: the command that trained it.

    Returns:
        The SHA-256 of the file.
    """
    facts = {
        "data": spec.name, "shape": list(spec.shape), "padding": spec.padding, "num_classes": spec.num_classes,
        "network": dict(network), "accuracy": accuracy, "recipe": recipe, "version": FILE_VERSION,
    }  # fmt: skip
    half = {name: to_float16(value).cpu().contiguous() for name, value in state.items()}
    payload = seal_safetensors(partial(save, half), {"extractor": json.dumps(facts, sort_keys=True)})
    with atomic_write(path) as file:
        file.write(payload)
    return hashlib.sha256(payload).hexdigest()


def to_float16(value: Tensor) -> Tensor:
    """Convert ``value`` to float16. Integers, such as the batch counter of batch norm, are unchanged."""
    return value.detach().to(torch.float16) if value.is_floating_point() else value.detach()


def read_classifier(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Read a file written by `save_classifier`, without executing code in it.

    Returns:
        The state dict in float32, the metadata, and the SHA-256 of the file.
    """
    try:
        payload = read_bytes(path)
        check_safetensors(path, payload)
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["extractor"])
        state = {name: value.float() if value.is_floating_point() else value for name, value in load(payload).items()}
        if facts["version"] != FILE_VERSION:
            raise UserError(
                f"{path} is from another version of gencompare ({facts['version']}, not {FILE_VERSION}): train again."
            )
    except FileNotFoundError as error:
        raise UserError(f"There is no extractor file {path}.") from error
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is corrupted, or not an extractor of gencompare ({type(error).__name__}).") from error
    return state, facts, hashlib.sha256(payload).hexdigest()


def shipped_sha256(path: Path) -> str:
    """Return the SHA-256 of a bundled file according to ``SHA256SUMS``."""
    for line in CHECKSUMS.read_text().splitlines():
        digest, name = line.split()
        if name == path.name:
            return digest
    raise UserError(f"{CHECKSUMS} does not list {path.name}: reinstall gencompare.")


def write_checksums() -> None:
    """Rewrite ``SHA256SUMS`` after a bundled file has changed."""
    lines = [
        f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in sorted(WEIGHTS_DIR.glob("*.safetensors"))
    ]
    with atomic_write(CHECKSUMS) as file:
        file.write("".join(lines).encode())
