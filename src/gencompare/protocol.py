"""The protocol of a number: what was measured, how, and on samples drawn in which way. No torch here.

Two figures may be ranked against each other when their `Measurement` agrees. Their `Generation` may differ: that is
what a comparison is about, so it is shown beside each figure.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Measurement:
    """What must agree for two figures to be ranked."""

    data: str
    """Name of the data set."""
    n: int
    """Number of generated images."""
    reference: str
    """The split that the images are held against."""
    reference_n: int
    reference_hash: str
    """Hash of the reference split's pixels."""
    extractor: str
    extractor_hash: str
    """Hash of the extractor's weights."""
    resize: str = "none"
    """How images reach the extractor's size."""
    quantization: str = "uint8"
    """Rounding of images before features are taken."""
    conditioning: str = "unconditional"
    """``unconditional``, ``labels``, or further conditions with their shapes and the split that they come from: a
    conditional model is told the class, so it plays another game."""
    label_distribution: str = "none"
    chunk: int = 0
    """Images drawn from one seed at a time."""

    @property
    def id(self) -> str:
        """A short name of the protocol: equal for two figures exactly when they may be ranked."""
        return _short_hash(asdict(self))

    def differences(self, other: Measurement) -> dict[str, tuple[Any, Any]]:
        """The fields in which the two disagree, each with both values."""
        return {
            f.name: (getattr(self, f.name), getattr(other, f.name))
            for f in fields(self)
            if getattr(self, f.name) != getattr(other, f.name)
        }


@dataclass(frozen=True)
class Generation:
    """How the measured samples came about: shown beside a figure, free to differ between rows."""

    weights: str = "unknown"
    """``ema``, ``raw`` or ``unknown``."""
    checkpoint: str = "unknown"
    """Rule by which the checkpoint was chosen: ``last``, or ``best`` (on validation data only)."""
    step: int | None = None
    images_seen: int | None = None
    sampler: str = "unknown"
    """The sampler and its settings, in words."""
    nfe: dict[str, float] | None = None
    """Network calls a sample, counted at each network by name."""
    guidance: str = "none"
    seed: int | None = None

    @property
    def id(self) -> str:
        return _short_hash(asdict(self))


def _short_hash(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
