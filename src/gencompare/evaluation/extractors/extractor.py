"""The interface of feature extractors, and the identity extractor for data with few dimensions."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from gencompare.distributed import distributed_map
from gencompare.errors import UserError
from gencompare.generative_model import DataSpec

BLOCK_SIZE = 1000
"""Number of rows of a set of features that are copied at a time, to float64 or with the mean subtracted. A copy of all
rows takes as much memory as the features or more: 50,000 Inception features are 0.4 GB in float32."""


def check_finite(features: Tensor) -> None:
    """Raise `UserError` if features contain NaN or infinite values."""
    if not all(bool(torch.isfinite(block).all()) for block in features.split(BLOCK_SIZE)):
        raise UserError(
            "Features contain NaN or infinite values: the extractor's weights or the images are not finite."
        )


class ImageSequence(Protocol):
    """Images (n, C, H, W): a tensor, or an object that reads or converts them when it is sliced."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Tensor: ...


@dataclass(frozen=True)
class Features:
    """The outputs of an extractor for n images, float32 on the CPU."""

    features: Tensor
    """Features, (n, d)."""
    logits: Tensor | None = None
    """Logits (n, classes), if the network is a classifier."""
    spatial: Tensor | None = None
    """Flattened activations (n, s) of an early layer, if the network provides them."""

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: Tensor | slice) -> Features:
        return Features(*(None if part is None else part[rows] for part in self.parts()))  # type: ignore[arg-type]

    def parts(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the tuple (features, logits, spatial)."""
        return self.features, self.logits, self.spatial

    @staticmethod
    def concatenate(batches: Iterable[Features]) -> Features:
        """Concatenate batches along n."""
        columns = zip(*(batch.parts() for batch in batches), strict=True)
        return Features(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore[arg-type]

    def to_cpu(self) -> Features:
        """Return a float32 copy on the CPU that can be used outside inference mode."""
        return Features(*(None if part is None else part.float().cpu().clone() for part in self.parts()))  # type: ignore[arg-type]


class Extractor(ABC):
    """A frozen network that maps images to features.

    Subclasses set the attributes that have no default, and implement `extract_batch`.

    Attributes:
        name: used in metric names, such as ``mmd_<name>`` and ``fd_<name>``.
        hash: SHA-256 of its weights.
        dim: number of features.
        module: the network. It is moved to the device of each call, and back to the CPU afterwards.
        predicts_data_classes: whether its logits are over the data's own classes.
        resize: describes how images are resized to the input size.
        details: facts to show with a result, such as accuracy or a warning. They do not affect the ranking.
        batch_size: images in one forward pass on a GPU.
        cpu_batch_size: images in one forward pass on a CPU, smaller because of its caches.
        layer_slices: the slice of the features that comes from each layer; ``{"": slice(None)}`` for a single layer.
    """

    name: str
    hash: str
    dim: int
    module: nn.Module
    predicts_data_classes: bool = False
    resize: str = "none"
    batch_size: int = 500
    cpu_batch_size: int = 500
    layer_slices: Mapping[str, slice]

    def __init__(self) -> None:
        self.details: dict[str, object] = {}
        self.layer_slices = {"": slice(None)}

    @property
    def primary(self) -> str:
        """Name of the metric used for ranking: the maximum mean discrepancy, which is unbiased at any sample size."""
        return self.mmd_name

    @property
    def mmd_name(self) -> str:
        """Name of the maximum mean discrepancy."""
        return f"mmd_{self.name}"

    @property
    def frechet_name(self) -> str:
        """Name of the Frechet distance."""
        return f"fd_{self.name}"

    @property
    def kernel_name(self) -> str:
        """Name of the distance with the cubic kernel."""
        return f"kd_{self.name}"

    @property
    def score_name(self) -> str:
        """Name of `classifier_score`."""
        return "classifier_score"

    @abstractmethod
    def extract_batch(self, images: Tensor) -> Features:
        """Extract the features of a batch of images, as returned by `quantize_images`, on the device of the network."""

    def __call__(
        self,
        images: ImageSequence,
        device: torch.device | str = "cpu",
        progress: Callable[[int, int], None] | None = None,
    ) -> Features:
        """Extract features of images (n, C, H, W), uint8 or (for continuous data) float32, without gradients.

        Under torch.distributed, all ranks must call this. The batches are split between the ranks, and all ranks return
        all features.
        ``progress`` is called with (images done, n).
        """

        batch_size = self.cpu_batch_size if torch.device(device).type == "cpu" else self.batch_size

        def extract(k: int) -> Features:
            with torch.inference_mode():
                features = self.extract_batch(images[k * batch_size : (k + 1) * batch_size].to(device))
            if progress is not None:
                progress(min(len(images), (k + 1) * batch_size), len(images))
            return features.to_cpu()

        self.module.to(device)
        batches = distributed_map(extract, -(-len(images) // batch_size))
        self.module.to("cpu")
        return Features.concatenate(batches)

    def features(self, images: Tensor) -> Tensor:
        """Extract features (n, d), float32 on the CPU."""
        return self(images).features

    def logits(self, images: Tensor) -> Tensor | None:
        """Compute logits (n, classes). Return None if the network is not a classifier."""
        return self(images).logits


MAX_IDENTITY_VALUES = 64
"""Largest number of values per image for `IdentityExtractor`. Metrics of thousands of pixel values would need tens of
thousands of images."""


class IdentityExtractor(Extractor):
    """Uses the flattened pixel values as features, for data with few dimensions."""

    name = "raw"  # results that were recorded under this name remain comparable
    hash = hashlib.sha256(b"identity").hexdigest()

    def __init__(self, spec: DataSpec) -> None:
        super().__init__()
        self.dim = spec.num_values
        self.module = nn.Identity()
        if self.dim > MAX_IDENTITY_VALUES:
            raise UserError(
                f"The identity extractor needs data with at most {MAX_IDENTITY_VALUES} values, but '{spec.name}' has"
                f" {self.dim}."
            )

    def extract_batch(self, images: Tensor) -> Features:
        return Features(images.flatten(1).float())
