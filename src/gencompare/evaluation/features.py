"""What a feature extractor is: a frozen network with a name and a hash, from uint8 images to features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Features:
    """One pass of an extractor: ``features`` (n, d) float32, ``logits`` (n, classes) or None, both on the CPU."""

    features: Tensor
    logits: Tensor | None = None

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: Tensor | slice) -> Features:
        return Features(self.features[rows], None if self.logits is None else self.logits[rows])


class Extractor(ABC):
    """A frozen network that turns images into features.

    Attributes:
        name: what its distance is called by: ``fd_<name>``.
        hash: SHA-256 of its weights.
        dim: features of an image.
        resize: how images reach its size, in words.
        details: what a reader of a result should know of it (accuracy, a fallback): shown, never ranked.
        batch: images in one pass.
    """

    name: str
    hash: str
    dim: int
    resize: str = "none"
    batch: int = 500
    module: nn.Module

    def __init__(self) -> None:
        self.details: dict[str, object] = {}

    @property
    def frechet_name(self) -> str:
        """The metric that ranks."""
        return f"fd_{self.name}"

    @property
    def kernel_name(self) -> str:
        return f"kd_{self.name}"

    @abstractmethod
    def run(self, images: Tensor) -> Features:
        """One batch of images as `quantize.as_stored` gives them, on the network's device."""

    def __call__(self, images: Tensor, device: torch.device | str = "cpu") -> Features:
        """Features of images (n, C, H, W): uint8, or float32 for continuous data. Batched; no gradients."""
        self.module.to(device)
        with torch.inference_mode():
            parts = [self.run(part.to(device)) for part in images.split(self.batch)]
        self.module.to("cpu")
        with_logits = [part.logits.float().cpu() for part in parts if part.logits is not None]
        return Features(
            torch.cat([part.features.float().cpu() for part in parts]).clone(),
            torch.cat(with_logits).clone() if with_logits else None,
        )

    def features(self, images: Tensor) -> Tensor:
        """(n, d) float32 on the CPU."""
        return self(images).features

    def logits(self, images: Tensor) -> Tensor | None:
        """(n, classes) of the data's own classes, or None where the network knows none of them."""
        return self(images).logits
