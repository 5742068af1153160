"""Controls: sets of images of known quality, measured like a model, so that a protocol's figures can be read."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gencompare.errors import UserError
from gencompare.evaluation import source
from gencompare.evaluation.evaluate import Progress, Protocol, evaluate
from gencompare.evaluation.quantize import as_stored, stored_split
from gencompare.records import Result
from gencompare.seeds import generator

NOISE = 0.2
"""Standard deviation of the pixel noise, in units of the model's range [-1, 1]."""


def control_images(data: source.Data, n: int, seed: int = 0) -> dict[str, Tensor]:
    """At most ``n`` images of each control, as `quantize.as_stored` gives them.

    - ``copies``: training images, unchanged. Distances cannot tell them from perfect samples; memorisation does.
    - ``class dropped``: training images without one class (the most frequent one). Labelled data only.
    - ``noise``: test images with Gaussian noise of standard deviation 0.2 on every pixel.
    """
    train, test = data.split("train"), data.split("test")
    order = torch.randperm(len(train), generator=generator("cpu", seed, "controls"))
    sets = {"copies": stored_split(train.images[order[:n]], data.spec)}
    if train.labels is not None:
        dropped = train.labels.mode().values
        kept = order[train.labels[order] != dropped]
        sets["class dropped"] = stored_split(train.images[kept[:n]], data.spec)
    x = data.normalize(test.images[:n])
    noise = torch.randn(x.shape, generator=generator("cpu", seed, "control noise"))
    noisy = x + NOISE * noise
    sets["noise"] = as_stored(noisy.clamp(-1, 1) if data.spec.num_levels is not None else noisy, data.spec)
    return sets


def controls(
    data: source.Data,
    protocol: Protocol | None = None,
    *,
    baseline: source.Samples | None = None,
    progress: Progress | None = None,
) -> dict[str, Result]:
    """The result of each control, and of a fitted ``baseline`` (the Gaussian one), under ``protocol``."""
    protocol = protocol or Protocol()
    n = protocol.size(data, protocol.check(data))
    sources: dict[str, source.Samples | Tensor] = dict(control_images(data, n, protocol.seed))
    for name, images in sources.items():
        if isinstance(images, Tensor) and len(images) < n and protocol.n is not None:
            raise UserError(f"The control '{name}' has {len(images)} images, fewer than evaluation.n={n}.")
    if baseline is not None:
        sources["gaussian"] = baseline
    found = {name: evaluate(images, data, protocol, progress=of(progress, name)) for name, images in sources.items()}
    return {name: replace(r, generation=replace(r.generation, sampler=f"control: {name}")) for name, r in found.items()}


def of(progress: Progress | None, control: str) -> Progress | None:
    """``progress`` with the control's name before each stage."""
    if progress is None:
        return None
    return lambda stage, done, total: progress(f"{control}: {stage}", done, total)
