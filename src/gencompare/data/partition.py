"""Cutting a split in parts that never overlap."""

from __future__ import annotations

import torch

from gencompare.data.base import Split
from gencompare.seeds import generator


def shuffled(split: Split, *purpose: str) -> Split:
    """The same images in an order that depends on ``purpose`` and their number alone.

    Files often come class by class; after this the first n images of a split are a fair sample of it.
    """
    return split[torch.randperm(len(split), generator=generator("cpu", *purpose))]


def hold_out(split: Split, n: int, *purpose: str) -> tuple[Split, Split]:
    """(the rest, ``n`` images held out), both shuffled; each image is in one of the two."""
    mixed = shuffled(split, *purpose)
    return mixed[slice(n, None)], mixed[slice(n)]
