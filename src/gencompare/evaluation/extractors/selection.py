"""Select extractors for a data set, and use any module as an extractor."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.errors import UserError
from gencompare.evaluation.extractors.efficientnet import efficientnet_lite0
from gencompare.evaluation.extractors.extractor import Extractor, Features, IdentityExtractor
from gencompare.evaluation.extractors.shipped_classifiers import WEIGHTS_DIR, shipped_classifier
from gencompare.evaluation.extractors.torch_fidelity_networks import state_hash
from gencompare.generative_model import DataSpec


def module_extractor(
    spec: DataSpec, network: nn.Module, name: str, size: int | None = None, channels: int | None = None
) -> Extractor:
    """Create a `ModuleExtractor` from ``network`` for the data described by ``spec``."""
    return ModuleExtractor(spec, network, name, size, channels)


class ModuleExtractor(Extractor):
    """Any network that maps float images in [0, 1] to features (n, d).

    ::

        +evaluation.available.mine={_target_: gencompare.evaluation.extractors.selection.module_extractor,
                                    _partial_: true, network: {_target_: my.Network}, name: mine, size: 224}
        evaluation.extractors=[mine]

    Args:
        spec: shape and value range of the data to measure.
        network: any module; it must do any normalisation beyond [0, 1] itself.
        name: used in metric names, such as ``fd_<name>``.
        size: height and width to which images are resized (bilinear, antialiased); None keeps their size.
        channels: number of channels to repeat greyscale images to; None keeps the channels.

    Raises:
        UserError: the data are not images, or the network's output is not (n, d).
    """

    batch_size = 100

    def __init__(
        self, spec: DataSpec, network: nn.Module, name: str, size: int | None = None, channels: int | None = None
    ) -> None:
        super().__init__()
        if spec.num_bins is None:
            raise UserError(f"Extractor '{name}' needs images, but data set '{spec.name}' is continuous.")
        self.name, self.size, self.channels = name, size, channels
        self.module = network.eval().requires_grad_(False)
        self.hash = state_hash(network)
        if size is not None:
            self.resize = f"bilinear antialias to {size}x{size}"
        real = [side - 2 * spec.padding for side in spec.shape[1:]]
        self.dim = self.extract_batch(torch.zeros(2, spec.shape[0], *real, dtype=torch.uint8)).features.shape[1]

    def extract_batch(self, images: Tensor) -> Features:
        x = images.float()
        if self.size is not None and x.shape[2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False)
            x = x.round().clamp(0, 255)
        if self.channels is not None:
            x = x.expand(-1, self.channels, -1, -1)
        with torch.inference_mode():
            features = self.module(x / 255)
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise UserError(
                f"Extractor '{self.name}' returned {shape} for {len(images)} images: it must return (images, features)."
            )
        return Features(features)


ExtractorFactory = Callable[..., Extractor]
"""A function ``(spec, [weights]) -> Extractor``."""


def default_extractors(spec: DataSpec) -> list[ExtractorFactory]:
    """Return the extractors that a protocol uses by default; runs are ranked by the first.

    For images, these are EfficientNet-Lite0 (see docs/evaluation.md for the choice) and the classifier bundled for the
    data set, if there is one, for class metrics and as a second opinion. For points, only the identity extractor is
    used.
    """
    if spec.num_bins is None:
        return [IdentityExtractor]
    return [efficientnet_lite0, *([shipped_classifier] if (WEIGHTS_DIR / f"{spec.name}.safetensors").is_file() else [])]


def build_extractors(
    factories: Sequence[ExtractorFactory] | None, spec: DataSpec, weights: str | os.PathLike[str] | None = None
) -> list[Extractor]:
    """Build extractors from ``factories``, or the default extractors, for the data described by ``spec``.

    Args:
        factories: functions ``(spec, [weights]) -> Extractor``; None uses `default_extractors`.
        spec: shape and value range of the data to measure.
        weights: weights file for the first extractor.

    Raises:
        UserError: the list is empty or contains duplicates, or an extractor does not support the data.
    """
    if factories is not None and not factories:
        raise UserError("evaluation.extractors=[] is empty: name at least one extractor, or omit the option.")
    built = [
        factory(spec, **({"weights": weights} if weights is not None and k == 0 else {}))
        for k, factory in enumerate(factories or default_extractors(spec))
    ]
    keys = [(extractor.name, extractor.hash, extractor.resize) for extractor in built]
    if len(set(keys)) < len(keys):
        raise UserError(f"evaluation.extractors contains an extractor twice: {', '.join(e.name for e in built)}.")
    return built
