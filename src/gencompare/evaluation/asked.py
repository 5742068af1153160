"""What each sample is asked for, where more than a class steers a model: the conditions of a held-out image."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gencompare.contract import Cond
from gencompare.evaluation.source import Data, batch_of
from gencompare.seeds import generator


@dataclass(frozen=True)
class Asked:
    """Sample k gets the conditions of image ``rows[k]`` of the split ``split``."""

    data: Data
    split: str
    rows: Tensor

    def batch(self, places: slice, device: torch.device | str = "cpu") -> tuple[Tensor, Cond]:
        """The images (n, C, H, W) in [-1, 1] behind samples ``places``, and all that the data tell of them."""
        return batch_of(self.data, self.split, self.rows[places], device)

    @property
    def labels(self) -> Tensor | None:
        labels = self.data.split(self.split).labels
        return None if labels is None else labels[self.rows]

    def describe(self, uses: tuple[str, ...]) -> str:
        """The conditions of a model that uses ``uses``, in words for a `Measurement`: names, shapes, the split.

        Rows that were kept in a file are told apart by the first digits of their SHA-256.
        """
        kept = self.data.split(self.split).kept
        words = ["labels"] if "label" in uses else []
        for name, shape in self.data.spec.conditions.items():
            if name in uses:
                word = f"{name} {'x'.join(map(str, shape))}"
                words.append(f"{word} ({digest(kept[name])[:8]})" if name in kept else word)
        return f"{' and '.join(words)} of {self.split}"


def asked_for(model: Any, data: Data, n: int, *, seed: int, split: str) -> Asked | None:
    """Whose conditions ``n`` samples get; None where nothing but a class steers the model.

    Sample k gets those of place k in an order of all images of ``split``, a function of ``seed``; after the last
    image comes the first one again. So they depend on neither n, nor processes, nor the size of a batch.
    """
    if not set(getattr(model, "uses", ())) - {"label"}:
        return None
    images = len(data.split(split))
    order = torch.randperm(images, generator=generator("cpu", seed, "conditions"))
    return Asked(data, split, order[torch.arange(n) % images])


def digest(rows: Tensor) -> str:
    return hashlib.sha256(rows.contiguous().cpu().numpy().tobytes()).hexdigest()
