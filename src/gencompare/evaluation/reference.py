"""The reference: real images of one split, stored as samples are, or published statistics."""

from __future__ import annotations

import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from gencompare.cache import cached_array, load, store
from gencompare.distributed import all_agree, rank_and_world_size, run_on_first
from gencompare.errors import UserError
from gencompare.evaluation.extractors.extractor import Extractor, Features
from gencompare.evaluation.metrics.frechet import Statistics
from gencompare.evaluation.metrics.kernel import CubicKernel, GaussianKernel, KernelReference
from gencompare.files import sha256
from gencompare.generative_model import Cond, DataSpec


class DataSplit(Protocol):
    """One split: images at their own levels, unpadded, labels (or None), and further conditions that are kept."""

    @property
    def images(self) -> Tensor: ...

    @property
    def labels(self) -> Tensor | None: ...

    @property
    def kept(self) -> Mapping[str, Tensor]: ...

    def __len__(self) -> int: ...


class EvaluationData(Protocol):
    """The part of a datamodule that evaluation uses."""

    spec: DataSpec

    def split(self, name: str) -> Any: ...

    def hash(self, name: str) -> str: ...

    def normalize(self, images: Tensor) -> Tensor: ...

    def cond(self, x: Tensor, part: Any) -> Cond: ...


@runtime_checkable
class SupportsSampling(Protocol):
    """Anything that draws images: a `GenerativeModel`, or an object with this one method.

    Also used where they are there: ``conditional``, ``uses``, ``device``, ``counted_networks()``, ``likelihoods()``,
    ``reconstruct()``, ``sampling_description()``.
    """

    def sample(self, n: int, cond: Cond | None = None, *, generator: torch.Generator) -> Tensor: ...


def batch_of(data: EvaluationData, split: str, rows: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Cond]:
    """Images of a split as a model sees them, (n, C, H, W), and all that the data tell of them, on ``device``."""
    part = data.split(split)[rows]
    x = data.normalize(part.images.to(device))
    return x, {name: value.to(device) for name, value in data.cond(x, part).items()}


OVERSHOOT = 0.05
"""Values beyond [-1, 1] by no more than this (rounding of other programs) are clamped; further out is refused."""


def to_uint8(x: Tensor, spec: DataSpec) -> Tensor:
    """Images in [-1, 1], (n, C, H, W), as uint8 0 to 255 on the CPU, padding cropped.

    Values are rounded to the data's own ``L = num_levels`` levels first (256 for continuous data), then spread over
    0 to 255: level = round((x + 1) / 2 (L - 1)), byte = round(255 level / (L - 1)). Digits have 17 levels, and an
    image of that set can hold no others.

    Raises `UserError` for NaN, infinite values, and values further than `OVERSHOOT` outside [-1, 1].
    """
    x = unpadded(x, spec)
    check_finite(x)
    most = float(x.abs().max()) if x.numel() else 0.0
    if most > 1 + OVERSHOOT:
        raise UserError(f"Samples must lie in [-1, 1], and these reach {most:.4g}: scale them, or give uint8 images.")
    steps = (spec.num_levels or 256) - 1
    level = x.float().clamp(-1, 1).add(1).mul(steps / 2).round()
    return spread(level, steps)


def as_stored(x: Tensor, spec: DataSpec) -> Tensor:
    """What an extractor is given: `to_uint8` for images, float32 as it is for continuous data (``num_levels`` None).

    uint8 images (0 to 255, as they are on a disk) are brought to the data's own levels too.
    """
    if spec.num_levels is None:
        x = unpadded(x, spec).float()
        check_finite(x)
        return x.cpu()
    if x.dtype == torch.uint8:
        steps = spec.num_levels - 1
        return spread(unpadded(x, spec).float().mul(steps / 255).round(), steps)
    if not x.is_floating_point():
        raise UserError(f"Images must be uint8 in 0 to 255 or float in [-1, 1], not {x.dtype}.")
    return to_uint8(x, spec)


def stored_split(images: Tensor, spec: DataSpec) -> Tensor:
    """The images of a split (levels 0 to ``num_levels`` - 1, unpadded) in the same form."""
    return images if spec.num_levels is None else spread(images.float(), spec.num_levels - 1)


def levels_of(images: Tensor, spec: DataSpec) -> Tensor:
    """The way back from `spread`: uint8 images of 0 to 255 to the levels of a split."""
    assert spec.num_levels is not None
    return images.float().mul((spec.num_levels - 1) / 255).round()


def spread(level: Tensor, steps: int) -> Tensor:
    """Levels 0 to ``steps`` as uint8 0 to 255 on the CPU."""
    return level.mul(255 / steps).round().to(torch.uint8).cpu()


def unpadded(x: Tensor, spec: DataSpec) -> Tensor:
    """Images of ``spec.shape`` without their padding; images that have none already pass as they are."""
    channels, height, width = spec.shape
    real = (channels, height - 2 * spec.padding, width - 2 * spec.padding)
    shape = tuple(x.shape[1:])
    if x.ndim == 4 and shape == real:
        return x
    if x.ndim == 4 and shape == tuple(spec.shape):
        return spec.crop(x)
    raise UserError(f"Data '{spec.name}' has images of shape {real} (channels, height, width), not {shape}.")


def check_finite(x: Tensor) -> None:
    bad = int((~torch.isfinite(x)).flatten(1).any(1).sum())
    if bad:
        raise UserError(
            f"{bad} of {len(x)} samples hold NaN or infinite values: the model has diverged. "
            "Evaluate an earlier checkpoint (checkpoint=best), or train with a lower learning rate."
        )


RECIPE = "1"
"""Part of the cache's key: raise it when the same images come to have other features."""
KEPT = 8


@dataclass(frozen=True)
class Reference:
    """The real side of every distance."""

    name: str
    """The split (``train``, ``train+val``), or the file's name."""
    hash: str
    n: int
    """Images; 0 where a file does not say."""
    features: Features | None = None
    """None for statistics from a file: what needs more than mean and covariance is then left out."""
    labels: Tensor | None = None
    given: Statistics | None = None
    given_spatial: Statistics | None = None

    @cached_property
    def statistics(self) -> Statistics:
        if self.given is not None:
            return self.given
        assert self.features is not None
        return Statistics.of(self.features.features)

    @cached_property
    def kernel(self) -> KernelReference:
        assert self.features is not None
        return KernelReference.of(self.features.features, GaussianKernel())

    @cached_property
    def cubic(self) -> KernelReference:
        assert self.features is not None
        return KernelReference.of(self.features.features, CubicKernel())

    @cached_property
    def spatial(self) -> Statistics | None:
        if self.given_spatial is not None or self.features is None or self.features.spatial is None:
            return self.given_spatial
        return Statistics.of(self.features.spatial)


def is_file(reference: str) -> bool:
    """Whether a protocol's reference is a file of statistics rather than a split."""
    return reference.endswith(".npz")


def reference_of(
    data: EvaluationData,
    name: str,
    extractor: Extractor,
    device: torch.device | str = "cpu",
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Reference:
    """The reference called ``name``: a split of ``data``, or a statistics file. Kept in memory (the last 8)."""
    if is_file(name):
        return read_statistics(Path(name), extractor)
    key = (data.hash(name), extractor.hash, extractor.resize)
    # The first process of a sweep may remember an earlier job, while the others are new.
    if not all_agree(key in _kept):
        split = data.split(name)
        features = split_features(data, name, extractor, device, cache, progress)
        _kept[key] = Reference(name, data.hash(name), len(split), features, split.labels)
        while len(_kept) > KEPT:
            _kept.popitem(last=False)
    _kept.move_to_end(key)
    return _kept[key]


_kept: OrderedDict[tuple[str, str, str], Reference] = OrderedDict()


def split_features(
    data: EvaluationData,
    name: str,
    extractor: Extractor,
    device: torch.device | str = "cpu",
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Features:
    """Features of a split, read from the folder ``cache`` where it holds them, else computed and kept there.

    The file is named by the hashes of pixels and of the extractor's weights and by the way between them, so changed
    data never get old features. All processes of a job must call this; jobs that ask at once compute once.
    """
    split = data.split(name)

    def compute() -> Tensor:
        images = stored_split(split.images, data.spec)
        return torch.cat([part for part in extractor(images, device, progress).parts() if part is not None], dim=1)

    way = "".join(c if c.isalnum() else "_" for c in extractor.resize)[:40]
    key = f"features-{data.spec.name}-{data.hash(name)[:16]}-{extractor.name}-{extractor.hash[:16]}-{way}-{RECIPE}"
    if cache is None or rank_and_world_size()[1] == 1:
        packed = cached_array(cache, key, compute)
    else:
        found = run_on_first(lambda: load(cache, key))
        packed = compute() if found is None else found
        if found is None:
            run_on_first(lambda: store(cache, key, packed))
    with torch.inference_mode():
        like = extractor.run(stored_split(split.images[:1], data.spec))
    widths = [0 if part is None else part.shape[1] for part in like.parts()]
    columns = [part.contiguous() for part in packed.split(widths, dim=1)]
    return Features(*(column if width else None for column, width in zip(columns, widths, strict=True)))  # type: ignore[arg-type]


def evenly_spaced_indices(total: int, n: int) -> Tensor:
    """``n`` row numbers spread evenly over ``total``: of a set sorted by class, a fair part of each."""
    n = min(n, total)
    return torch.arange(n) * total // n


def read_statistics(path: Path, extractor: Extractor) -> Reference:
    """Statistics that pytorch-fid, EDM or ADM wrote: ``mu``, ``sigma`` (and ``mu_s``, ``sigma_s``) in an npz file.

    Nothing in the file is run. What network they are of is not in it: they are taken to be the extractor's, and only
    their size is checked. Raises `UserError` for a missing, damaged or unfit file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            stored = {name: torch.from_numpy(np.asarray(file[name], dtype=np.float64)) for name in file.files
                      if name in ("mu", "sigma", "mu_s", "sigma_s")}  # fmt: skip
    except FileNotFoundError as error:
        raise UserError(f"There is no statistics file {path}: evaluation.protocol.reference names it.") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged, or no npz file of statistics ({type(error).__name__}).") from error
    if not {"mu", "sigma"} <= set(stored):
        raise UserError(f"{path} holds no 'mu' and 'sigma': it is no statistics file of pytorch-fid, EDM or ADM.")
    given = Statistics(stored["mu"], stored["sigma"])
    if given.mean.shape != (extractor.dim,) or given.cov.shape != (extractor.dim,) * 2:
        raise UserError(
            f"{path} has statistics of {given.mean.numel()} features; {extractor.name} has {extractor.dim}. "
            "Files of published FIDs go with evaluation=inception."
        )
    if not (torch.isfinite(given.mean).all() and torch.isfinite(given.cov).all()):
        raise UserError(f"{path} holds values that are not finite.")
    spatial = Statistics(stored["mu_s"], stored["sigma_s"]) if {"mu_s", "sigma_s"} <= set(stored) else None
    return Reference(path.name, sha256(path), 0, given=given, given_spatial=spatial)
