"""The values themselves as features, for data of few dimensions."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gencompare.distributed import distribute
from gencompare.errors import UserError
from gencompare.generative_model import DataSpec


def check_finite(features: Tensor) -> None:
    """Raise `UserError` for features that hold NaN or infinite values."""
    if not torch.isfinite(features).all():
        raise UserError("Features hold NaN or infinite values: the extractor's weights or the images are not finite.")


@dataclass(frozen=True)
class Features:
    """One pass of an extractor over n images, float32 on the CPU."""

    features: Tensor
    """(n, d)."""
    logits: Tensor | None = None
    """(n, classes), where the network is a classifier."""
    spatial: Tensor | None = None
    """(n, s): an early layer's activations with their places, where the network gives them."""

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: Tensor | slice) -> Features:
        return Features(*(None if part is None else part[rows] for part in self.parts()))  # type: ignore[arg-type]

    def parts(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.features, self.logits, self.spatial

    @staticmethod
    def joined(sets: Iterable[Features]) -> Features:
        columns = zip(*(part.parts() for part in sets), strict=True)
        return Features(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore[arg-type]

    def stored(self) -> Features:
        """In memory of its own, float32 on the CPU, fit for gradients' mode or not."""
        return Features(*(None if part is None else part.float().cpu().clone() for part in self.parts()))  # type: ignore[arg-type]


class Extractor(ABC):
    """A frozen network that turns images into features.

    Attributes:
        name: what its distance is called by: ``fd_<name>``.
        hash: SHA-256 of its weights.
        dim: features of an image.
        knows_classes: whether its logits are over the data's own classes.
        resize: how images reach its size, in words.
        details: what a reader of a result should know of it (accuracy, a fallback): shown, never ranked.
        batch: images in one pass on a GPU.
        cpu_batch: on a processor, whose caches hold fewer.
    """

    name: str
    hash: str
    dim: int
    knows_classes: bool = False
    resize: str = "none"
    batch: int = 500
    cpu_batch: int = 500
    module: nn.Module
    columns: Mapping[str, slice]
    """Which features come from which layer; ``{"": all}`` where there is one."""

    def __init__(self) -> None:
        self.details: dict[str, object] = {}
        self.columns = {"": slice(None)}

    @property
    def primary(self) -> str:
        """The metric that ranks: the maximum mean discrepancy, which has no bias in the number of samples."""
        return self.mmd_name

    @property
    def mmd_name(self) -> str:
        return f"mmd_{self.name}"

    @property
    def frechet_name(self) -> str:
        return f"fd_{self.name}"

    @property
    def kernel_name(self) -> str:
        return f"kd_{self.name}"

    @property
    def score_name(self) -> str:
        """Of `classes.classifier_score`."""
        return "classifier_score"

    @abstractmethod
    def run(self, images: Tensor) -> Features:
        """One batch of images as `quantize.as_stored` gives them, on the network's device."""

    def __call__(
        self,
        images: Tensor,
        device: torch.device | str = "cpu",
        progress: Callable[[int, int], None] | None = None,
    ) -> Features:
        """Features of images (n, C, H, W): uint8, or float32 for continuous data. No gradients.

        Where torch.distributed runs, all processes must call this: they share the batches, and all get all features.
        ``progress`` is called with (images done, n).
        """

        batch = self.cpu_batch if torch.device(device).type == "cpu" else self.batch

        def one(k: int) -> Features:
            with torch.inference_mode():
                found = self.run(images[k * batch : (k + 1) * batch].to(device))
            if progress is not None:
                progress(min(len(images), (k + 1) * batch), len(images))
            return found.stored()

        self.module.to(device)
        parts = distribute(-(-len(images) // batch), one)
        self.module.to("cpu")
        return Features.joined(parts)

    def features(self, images: Tensor) -> Tensor:
        """(n, d) float32 on the CPU."""
        return self(images).features

    def logits(self, images: Tensor) -> Tensor | None:
        """(n, classes), or None where the network is no classifier."""
        return self(images).logits


MOST = 64
"""Values an image may have: a distance between thousands of pixels needs tens of thousands of images."""


class IdentityExtractor(Extractor):
    """Identity: an image's values in a row."""

    name = "raw"
    hash = hashlib.sha256(b"identity").hexdigest()

    def __init__(self, spec: DataSpec) -> None:
        super().__init__()
        self.dim = spec.dims
        self.module = nn.Identity()
        if self.dim > MOST:
            raise UserError(f"Raw values serve data of at most {MOST} numbers; '{spec.name}' has {self.dim}.")

    def run(self, images: Tensor) -> Features:
        return Features(images.flatten(1).float())
