"""The reference (real-image features of a split, or published statistics), and the quantisation of images."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from gencompare.cache import cached_array, load_cached, store_cached
from gencompare.distributed import all_ranks_true, rank_and_world_size, run_on_rank_zero
from gencompare.errors import UserError
from gencompare.evaluation.extractors.extractor import Extractor, Features, ImageSequence
from gencompare.evaluation.metrics.frechet import Statistics
from gencompare.evaluation.metrics.kernel import CubicKernel, GaussianKernel, KernelReference
from gencompare.files import sha256
from gencompare.generative_model import Cond, DataSpec
from gencompare.safe_files import read_npz


class DataSplit(Protocol):
    """One split: unpadded images at the data set's own levels, labels (or None), and stored conditions.

    ``images`` is a tensor, or, if the images do not fit in memory, an object that reads them when it is indexed.
    Indexing the split gives images in memory.
    """

    @property
    def images(self) -> Any: ...

    @property
    def labels(self) -> Tensor | None: ...

    @property
    def extra_conditions(self) -> Mapping[str, Tensor]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Tensor) -> DataSplit: ...


class EvaluationData(Protocol):
    """The part of the datamodule interface that evaluation uses."""

    @property
    def spec(self) -> DataSpec: ...

    def split(self, name: str) -> Any:
        """Return the `DataSplit` called ``name``: ``train``, ``val``, ``test``, or a union such as ``train+val``."""
        ...

    def hash(self, name: str) -> str:
        """Return a hash of the pixels of a split."""
        ...

    def normalize(self, images: Tensor, /) -> Tensor:
        """Convert images of a split to the input of a model: float in [-1, 1], padded."""
        ...

    def cond(self, x: Tensor, part: Any, /) -> Cond:
        """Return all conditions of ``x``, the normalised images of the `DataSplit` ``part``."""
        ...


@runtime_checkable
class SupportsSampling(Protocol):
    """Anything that generates images: a `GenerativeModel`, or any other object with the method `sample`.

    Optional members: ``conditional``, ``condition_names``, ``device``, ``nfe_networks()``, ``likelihoods()``,
    ``reconstruct()``, ``sampling_description()``.
    """

    def sample(self, n: int, cond: Cond | None = None, *, generator: torch.Generator) -> Tensor: ...


def split_batch(
    data: EvaluationData, split: str, rows: Tensor, device: torch.device | str = "cpu"
) -> tuple[Tensor, Cond]:
    """Return normalised images (n, C, H, W) of a split and all their conditions, on ``device``."""
    part = data.split(split)[rows]
    x = data.normalize(part.images.to(device))
    return x, {name: value.to(device) for name, value in data.cond(x, part).items()}


# Quantisation

OVERSHOOT = 0.05
"""Values that exceed [-1, 1] by at most this much (rounding errors) are clamped; larger ones are rejected."""


def to_uint8(x: Tensor, spec: DataSpec) -> Tensor:
    r"""Convert images (n, C, H, W) in [-1, 1] to uint8 in [0, 255] on the CPU, and crop the padding.

    Values are first rounded to the data set's own :math:`L` levels (``spec.num_bins``; 256 for continuous data):

    .. math:: l = \mathrm{round}\left(\tfrac{x + 1}{2} (L - 1)\right), \qquad
        b = \mathrm{round}\left(\tfrac{255\, l}{L - 1}\right)

    Digits images, for example, have only 17 levels.

    Raises:
        UserError: values are not finite, or exceed [-1, 1] by more than `OVERSHOOT`.
    """
    x = crop_padding(x, spec)
    _check_finite(x)
    largest = float(x.abs().max()) if x.numel() else 0.0
    if largest > 1 + OVERSHOOT:
        raise UserError(f"Samples must lie in [-1, 1], but these reach {largest:.4g}: rescale them, or pass uint8.")
    top = (spec.num_bins or 256) - 1
    levels = x.float().clamp(-1, 1).add(1).mul(top / 2).round()
    return _levels_to_uint8(levels, top)


def quantize_images(x: Tensor, spec: DataSpec) -> Tensor:
    """Convert images to the input of an extractor: `to_uint8`, or float32 without rounding for continuous data.

    uint8 images (0 to 255, as in an image file) are also rounded to the data set's own levels.
    """
    if spec.num_bins is None:
        x = crop_padding(x, spec).float()
        _check_finite(x)
        return x.cpu()
    if x.dtype == torch.uint8:
        x, top = crop_padding(x, spec), spec.num_bins - 1
        return x.cpu() if top == 255 else _levels_to_uint8(x.float().mul(top / 255).round(), top)
    if not x.is_floating_point():
        raise UserError(f"Images must be uint8 in 0 to 255 or float in [-1, 1], not {x.dtype}.")
    return to_uint8(x, spec)


def quantize_split(images: Tensor, spec: DataSpec) -> Tensor:
    """Convert unpadded images of a split, with levels 0 to ``num_bins`` - 1, to the input of an extractor."""
    if spec.num_bins is None or (spec.num_bins == 256 and images.dtype == torch.uint8):
        return images  # no copy: a whole split in float32 takes four times its memory
    return _levels_to_uint8(images.float(), spec.num_bins - 1)


@dataclass(frozen=True)
class QuantizedImages:
    """Images of a split that `quantize_split` converts when they are sliced, so that not all are in memory."""

    images: ImageSequence
    spec: DataSpec

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: slice) -> Tensor:
        return quantize_split(self.images[rows], self.spec)


def to_levels(images: Tensor, spec: DataSpec) -> Tensor:
    """Invert `quantize_split`: convert uint8 images in [0, 255] to levels 0 to ``num_bins`` - 1."""
    assert spec.num_bins is not None
    return images.float().mul((spec.num_bins - 1) / 255).round()


def _levels_to_uint8(levels: Tensor, top: int) -> Tensor:
    """Convert levels 0 to ``top`` to uint8 in [0, 255] on the CPU."""
    return levels.mul(255 / top).round().to(torch.uint8).cpu()


def crop_padding(x: Tensor, spec: DataSpec) -> Tensor:
    """Crop images to ``spec.shape`` without its padding. Unpadded images are returned unchanged."""
    channels, height, width = spec.shape
    unpadded = (channels, height - 2 * spec.padding, width - 2 * spec.padding)
    shape = tuple(x.shape[1:])
    if x.ndim == 4 and shape == unpadded:
        return x
    if x.ndim == 4 and shape == tuple(spec.shape):
        return spec.crop(x)
    raise UserError(f"Data set '{spec.name}' has images of shape {unpadded} (channels, height, width), not {shape}.")


def _check_finite(x: Tensor) -> None:
    bad = int((~torch.isfinite(x)).flatten(1).any(1).sum())
    if bad:
        raise UserError(
            f"{bad} of {len(x)} samples contain NaN or infinite values: the model has diverged. "
            "Evaluate an earlier checkpoint (checkpoint=best), or train with a lower learning rate."
        )


# Features of real images

CACHE_VERSION = "1"
"""Part of the cache key; increase it when the features of the same images change."""
MAX_REFERENCES_IN_MEMORY = 8


@dataclass(frozen=True)
class Reference:
    """What samples are compared with: real-image features of a split, or published statistics."""

    name: str
    """The split (such as ``train`` or ``train+val``), or the file name."""
    hash: str
    n: int
    """Number of images; 0 for a statistics file, which does not contain it."""
    features: Features | None = None
    """Features of the real images. None for a statistics file; metrics that need features are then skipped."""
    labels: Tensor | None = None
    file_statistics: Statistics | None = None
    file_spatial_statistics: Statistics | None = None

    @cached_property
    def statistics(self) -> Statistics:
        """Mean and covariance for the Frechet distance."""
        if self.file_statistics is not None:
            return self.file_statistics
        assert self.features is not None
        return Statistics.from_features(self.features.features)

    @cached_property
    def spatial_statistics(self) -> Statistics | None:
        """Mean and covariance of the spatial features, or None if there are none."""
        if self.file_spatial_statistics is not None or self.features is None or self.features.spatial is None:
            return self.file_spatial_statistics
        return Statistics.from_features(self.features.spatial)

    @cached_property
    def gaussian_kernel(self) -> KernelReference:
        """The reference for the MMD with a Gaussian kernel of median bandwidth."""
        assert self.features is not None
        return KernelReference.from_features(self.features.features, GaussianKernel())

    @cached_property
    def cubic_kernel(self) -> KernelReference:
        """The reference for the kernel distance with the cubic kernel of KID."""
        assert self.features is not None
        return KernelReference.from_features(self.features.features, CubicKernel())


def is_statistics_file(reference: str) -> bool:
    """Return whether a protocol's reference is a statistics file rather than a split."""
    return reference.endswith(".npz")


def load_reference(
    data: EvaluationData,
    name: str,
    extractor: Extractor,
    device: torch.device | str = "cpu",
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Reference:
    """Load the reference ``name``, a split of ``data`` or a statistics file. The last 8 splits are cached in memory."""
    if is_statistics_file(name):
        return read_statistics(Path(name), extractor)
    key = (data.hash(name), extractor.hash, extractor.resize)
    # In a sweep, rank zero may have cached it in an earlier job, while the other ranks have just started.
    if not all_ranks_true(key in _REFERENCES):
        split = data.split(name)
        features = split_features(data, name, extractor, device, cache, progress)
        _REFERENCES[key] = Reference(name, data.hash(name), len(split), features, split.labels)
        while len(_REFERENCES) > MAX_REFERENCES_IN_MEMORY:
            _REFERENCES.popitem(last=False)
    _REFERENCES.move_to_end(key)
    return _REFERENCES[key]


_REFERENCES: OrderedDict[tuple[str, str, str], Reference] = OrderedDict()


def split_features(
    data: EvaluationData,
    name: str,
    extractor: Extractor,
    device: torch.device | str = "cpu",
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Features:
    """Load the features of a split from the folder ``cache``, or compute and store them there.

    The file name contains the resizing method and the hashes of the pixels and the extractor's weights, so changed data
    never get stale features. All ranks of a job must call this function. If several single-process jobs need the same
    features at the same time, only one job computes them.
    """
    split = data.split(name)

    def compute() -> Tensor:
        images = QuantizedImages(split.images, data.spec)
        return torch.cat([part for part in extractor(images, device, progress).parts() if part is not None], dim=1)

    resize = "".join(c if c.isalnum() else "_" for c in extractor.resize)[:40]
    key = (
        f"features-{data.spec.name}-{data.hash(name)[:16]}-{extractor.name}-{extractor.hash[:16]}-{resize}"
        f"-{CACHE_VERSION}"
    )
    if cache is None or rank_and_world_size()[1] == 1:
        packed = cached_array(cache, key, compute)
    else:
        stored = run_on_rank_zero(lambda: load_cached(cache, key))
        packed = compute() if stored is None else stored
        if stored is None:
            run_on_rank_zero(lambda: store_cached(cache, key, packed))
    with torch.inference_mode():
        example = extractor.extract_batch(quantize_split(split.images[:1], data.spec))
    widths = [0 if part is None else part.shape[1] for part in example.parts()]
    columns = [part.contiguous() for part in packed.split(widths, dim=1)]
    return Features(*(column if width else None for column, width in zip(columns, widths, strict=True)))  # type: ignore[arg-type]


def read_statistics(path: Path, extractor: Extractor) -> Reference:
    """Read statistics of pytorch-fid, EDM or ADM: ``mu``, ``sigma`` (and ``mu_s``, ``sigma_s``) in an npz file.

    No code in the file is executed. The file does not say which network computed its features. They are assumed to be
    the extractor's, and only their size is checked.

    Raises:
        UserError: the file is missing or corrupted, or does not fit the extractor.
    """
    try:
        arrays = read_npz(path, ("mu", "sigma", "mu_s", "sigma_s"))
        stored = {name: torch.from_numpy(np.asarray(array, dtype=np.float64)) for name, array in arrays.items()}
    except FileNotFoundError as error:
        raise UserError(f"There is no statistics file {path} (evaluation.protocol.reference).") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is corrupted, or not an npz file of statistics ({type(error).__name__}).") from error
    if not {"mu", "sigma"} <= set(stored):
        raise UserError(f"{path} has no 'mu' and 'sigma', so it is not a statistics file of pytorch-fid, EDM or ADM.")
    statistics = Statistics(stored["mu"], stored["sigma"])
    if statistics.mean.shape != (extractor.dim,) or statistics.cov.shape != (extractor.dim,) * 2:
        raise UserError(
            f"{path} has statistics of {statistics.mean.numel()} features, but {extractor.name} has {extractor.dim}. "
            "Statistics files of published FIDs need evaluation=inception."
        )
    if not (torch.isfinite(statistics.mean).all() and torch.isfinite(statistics.cov).all()):
        raise UserError(f"{path} contains values that are not finite.")
    spatial = Statistics(stored["mu_s"], stored["sigma_s"]) if {"mu_s", "sigma_s"} <= set(stored) else None
    return Reference(path.name, sha256(path), 0, file_statistics=statistics, file_spatial_statistics=spatial)
