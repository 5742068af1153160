"""The interface of invertible networks, which normalizing flows are made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from gencompare.errors import TrainingStopped


class Bijection(nn.Module, ABC):
    r"""Base class of invertible networks :math:`z = f(x)` whose Jacobian determinant is known.

    Images x are (n, C, H, W), latents z are (n, C H W), and a label is (n,) int64, or None if the network has no
    classes.
    """

    supports_guidance: ClassVar[bool] = False
    """Whether `inverse` takes a ``guidance_scale`` other than 1, and label ``num_classes`` means "no label"."""
    maps_each_sample: ClassVar[bool] = True
    """Whether a training step maps each image on its own, so that a batch may be divided (``num_micro_batches``)."""

    @abstractmethod
    def forward(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Map images to latents.

        Returns:
            z, and :math:`\log |\det \partial z / \partial x|` (n,), in at least float32.
        """

    @abstractmethod
    def inverse(self, z: Tensor, label: Tensor | None = None, guidance_scale: float = 1.0) -> Tensor:
        """Map latents to images.

        Raises:
            TrainingStopped: values are not finite.
        """

    @abstractmethod
    def nfe_networks(self) -> dict[str, nn.Module]:
        """Return the networks whose calls are counted as network evaluations (NFE), by name."""

    def describe_inverse(self) -> str:
        """Describe the work of `inverse`, for tables."""
        return "one pass"


def check_inverse(x: Tensor, place: str) -> Tensor:
    """Return ``x``, or raise `TrainingStopped` if it contains NaN or infinite values, which come from ``place``."""
    if not torch.isfinite(x).all():
        raise TrainingStopped(
            f"The inverse of the flow overflowed in {place}",
            "Sample at a lower model.temperature, or train with a lower learning rate (model.optimizer.lr) or"
            " model.grad_clip.",
        )
    return x
