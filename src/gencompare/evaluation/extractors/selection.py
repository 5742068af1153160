"""Which extractors measure which data, and any module as an extractor."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.errors import UserError
from gencompare.evaluation.extractors.efficientnet import efficientnet_lite0
from gencompare.evaluation.extractors.extractor import Extractor, Features, IdentityExtractor
from gencompare.evaluation.extractors.shipped_classifiers import SHIPPED, shipped_classifier
from gencompare.evaluation.extractors.torch_fidelity_networks import state_hash
from gencompare.generative_model import DataSpec


def module_extractor(
    spec: DataSpec, network: nn.Module, name: str, size: int | None = None, channels: int | None = None
) -> Extractor:
    """``network`` as an extractor for data of ``spec``; see `ModuleExtractor`."""
    return ModuleExtractor(spec, network, name, size, channels)


class ModuleExtractor(Extractor):
    """A network from float images in [0, 1] to features (n, d).

        evaluation.protocol.extractor={_target_: gencompare.evaluation.extractors.selection.module_extractor,
                                       _partial_: true, network: {_target_: my.Network}, name: mine, size: 224}

    Args:
        spec: of the data to be measured.
        network: any module; normalisation beyond [0, 1] is its own affair.
        name: its distance is ``fd_<name>``.
        size: height and width that images are resized to (bilinear, antialiased); None leaves them as they are.
        channels: of the images that it takes: 3 gives grey images three equal channels; None takes them as they are.

    Raises:
        UserError: what comes out is not (n, d), or not finite.
    """

    batch = 100

    def __init__(
        self, spec: DataSpec, network: nn.Module, name: str, size: int | None = None, channels: int | None = None
    ) -> None:
        super().__init__()
        if spec.num_levels is None:
            raise UserError(f"Extractor '{name}' measures images; data '{spec.name}' are numbers.")
        self.name, self.size, self.channels = name, size, channels
        self.module = network.eval().requires_grad_(False)
        self.hash = state_hash(network)
        if size is not None:
            self.resize = f"bilinear antialias to {size}x{size}"
        real = [side - 2 * spec.padding for side in spec.shape[1:]]
        self.dim = self.run(torch.zeros(2, spec.shape[0], *real, dtype=torch.uint8)).features.shape[1]

    def run(self, images: Tensor) -> Features:
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
            raise UserError(f"Extractor '{self.name}' gave {shape} for {len(images)} images, not (images, features).")
        return Features(features)


ExtractorFactory = Callable[..., Extractor]
"""``(spec, [weights]) -> Extractor``."""


def default_extractors(spec: DataSpec) -> list[ExtractorFactory]:
    """What measures data of ``spec`` where a protocol names nothing, the first one ranks.

    Images: EfficientNet-Lite0, chosen by the study in docs/evaluation.md, and beside it the classifier that this
    package ships for the data set, for class metrics and as a second opinion. Points: their own values.
    """
    if spec.num_levels is None:
        return [IdentityExtractor]
    return [efficientnet_lite0, *([shipped_classifier] if (SHIPPED / f"{spec.name}.safetensors").is_file() else [])]


def build_extractors(
    factories: Sequence[ExtractorFactory] | None, spec: DataSpec, weights: str | os.PathLike[str] | None = None
) -> list[Extractor]:
    """The extractors of ``factories``, or the default ones, for data of ``spec``; ``weights`` are the first one's.

    Raises `UserError` for an empty list, two that are the same, and what an extractor refuses.
    """
    if factories is not None and not factories:
        raise UserError("evaluation.extractors=[] measures nothing: name at least one, or leave it out.")
    built = [
        factory(spec, **({"weights": weights} if weights is not None and k == 0 else {}))
        for k, factory in enumerate(factories or default_extractors(spec))
    ]
    seen = [(extractor.name, extractor.hash, extractor.resize) for extractor in built]
    if len(set(seen)) < len(seen):
        raise UserError(f"evaluation.extractors names one twice: {', '.join(e.name for e in built)}.")
    return built
