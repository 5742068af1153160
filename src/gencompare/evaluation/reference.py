"""What samples are held against: real images of one split, or the statistics that others computed of theirs."""

from __future__ import annotations

import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gencompare.cache import cached, load, store
from gencompare.errors import UserError
from gencompare.evaluation.distributed import all_agree, once, world
from gencompare.evaluation.features import Extractor, Features
from gencompare.evaluation.frechet import Statistics
from gencompare.evaluation.kernel import Cubic, Gaussian, KernelReference
from gencompare.evaluation.quantize import stored_split
from gencompare.evaluation.source import Data
from gencompare.files import sha256

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
        return KernelReference.of(self.features.features, Gaussian())

    @cached_property
    def cubic(self) -> KernelReference:
        assert self.features is not None
        return KernelReference.of(self.features.features, Cubic())

    @cached_property
    def spatial(self) -> Statistics | None:
        if self.given_spatial is not None or self.features is None or self.features.spatial is None:
            return self.given_spatial
        return Statistics.of(self.features.spatial)


def is_file(reference: str) -> bool:
    """Whether a protocol's reference is a file of statistics rather than a split."""
    return reference.endswith(".npz")


def reference_of(
    data: Data,
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
    data: Data,
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
    if cache is None or world()[1] == 1:
        packed = cached(cache, key, compute)
    else:
        found = once(lambda: load(cache, key))
        packed = compute() if found is None else found
        if found is None:
            once(lambda: store(cache, key, packed))
    with torch.inference_mode():
        like = extractor.run(stored_split(split.images[:1], data.spec))
    widths = [0 if part is None else part.shape[1] for part in like.parts()]
    columns = [part.contiguous() for part in packed.split(widths, dim=1)]
    return Features(*(column if width else None for column, width in zip(columns, widths, strict=True)))  # type: ignore[arg-type]


def spaced(total: int, n: int) -> Tensor:
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
