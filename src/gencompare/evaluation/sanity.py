"""Sanity checks of whether samples can be images of the data set at all.

Metrics turn any array into a number. Images that are wrongly scaled, inverted, or have their channels reordered score
like those of a poor model. These checks compare samples with real images and warn of the likely cause. They use only
pixels, so they do not depend on the extractor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from gencompare.errors import UserError
from gencompare.evaluation.indices import evenly_spaced_indices
from gencompare.evaluation.metrics.neighbors import PRECISION_K
from gencompare.evaluation.reference import OVERSHOOT, crop_padding, quantize_images, quantize_split
from gencompare.generative_model import DataSpec

MAX_IMAGES = 1_000
"""Number of evenly spaced samples, and of real images, that are compared. Duplicates are counted in all samples."""
MAX_CONVERTED = 250
"""Number of evenly spaced images that conversions are tried on."""
RARE = 0.05
"""A range is too narrow if at most this fraction of real images lie within it individually, and it spans at most
`NARROW` of the range of all real images."""
NARROW = 0.6
"""Maximum width of a narrow range, as a fraction of the range of all real images."""
FEW_LEVELS = 0.55
"""Samples have too few levels if they have at most this fraction of the levels that the same number of real images have
in the same range."""
EXTREME_EXCESS = 0.25
"""The fraction of values that are 0 or 255 may exceed the fraction in real images by this much."""
BACKGROUND = 0.2
"""A level is a background if at least this fraction of all real values have it."""
WRAPPED = 0.05
"""The excess of `wrap_ratio` over 1 may be twice that of real images plus this much."""
UNRELATED = 60.0
"""Mean absolute difference of adjacent values above which they are unrelated. Independent uniform values differ by 85
on average, or by 64 modulo 256."""
REPEATED = 0.05
"""The fraction of blank images, and of exact copies, may exceed that among real images by this much."""
CLOSE, MUCH_CLOSER = 0.25, 0.1
"""A conversion explains the samples if undoing it reduces their `RealImages.distance` from above `CLOSE` to at most
`CLOSE`, and to at most `MUCH_CLOSER` times the original distance. For few samples, see `RealImages.explains`."""
TOLERANCE = 4.0
"""Standard deviation added (in quadrature) to that of every statistic, to tolerate differences of a few levels."""
GRID = 4
"""Images are divided into `GRID` x `GRID` cells, whose means are compared."""
CONSTANT = 0.25
"""Fraction of features that may be constant over samples but vary over real images."""
BATCH_SIZE = 50
"""Number of images that are processed at a time. Larger temporary tensors are slower."""


def check_images(images: Tensor, reference: Tensor, spec: DataSpec, *, refuse: bool = True) -> list[str]:
    """Check ``images`` as samples of a data set, and return warnings of one sentence each (empty if nothing is wrong).

    Images are rejected only if no model of this data set, however poor, could have generated them. These are the data
    set's own levels instead of 0 to 255 (digits: 0 to 16), images whose only levels are 0 and 1 (and 255, after a cast
    from [-1, 1]), integers other than uint8, floats outside [-1, 1], and floats in [0, 1] that match the statistics of
    real images if rescaled to [-1, 1]. Everything else is a warning.

    Args:
        images: (n, C, H, W) as accepted by `evaluate`, or a model's samples as returned by `quantize_images`.
        reference: (m, C, H, W) images of a split: levels 0 to ``spec.num_bins`` - 1, unpadded.
        spec: shape and value range of the data.
        refuse: raise an error in the cases above. A model's own samples do not need this, since their scale is known.

    Returns:
        The warnings.

    Raises:
        UserError: in the cases above; the message says how to convert the images.
    """
    if spec.num_bins is None:
        return [_identical(len(images))] if len(images) > 1 and bool((images == images[0]).all()) else []
    pixels = crop_padding(images, spec)
    if len(pixels) < 2 or (pixels.is_floating_point() and not bool(torch.isfinite(pixels).all())):
        return []  # rejected by `quantize_images`
    subset = reference[evenly_spaced_indices(len(reference), MAX_IMAGES)].split(BATCH_SIZE)
    real = RealImages(torch.cat([quantize_split(batch, spec) for batch in subset]), spec)
    rows = evenly_spaced_indices(len(pixels), MAX_IMAGES)
    if refuse:
        _check_integers(pixels, real)
        _check_floats(pixels, real)
    quantized = torch.cat([quantize_images(batch, spec) for batch in pixels.split(BATCH_SIZE)])
    warnings = _check_padding(images, spec)
    if bool((quantized == quantized[0]).all()):
        return [*warnings, _identical(len(quantized))]
    compared = pixels[rows].cpu() if pixels.dtype == torch.uint8 else quantized[rows]
    conversion = _find_conversion(compared, real)
    if conversion is not None:
        warnings.append(conversion)
    elif pixels.is_floating_point() and in_unit_interval(pixels):
        low, high = float(pixels.min()), float(pixels.max())
        warnings.append(
            f"samples are in [{low:.2g}, {high:.2g}], but {spec.name} images are in [-1, 1]: if the samples were scaled"
            " to [0, 1], pass 2 * images - 1"
        )
    else:
        warnings += _check_range(compared, real) or _check_levels(compared, real)
        warnings += _check_structure(compared, real)
    return warnings + _check_duplicates(quantized, real)


def check_features(features: Tensor, real: Tensor) -> list[str]:
    """Warn of degenerate ``features`` (n, d), which are constant over samples but vary over ``real`` images (m, d).

    Features that are also constant over real images do not count, since some are 0 after a ReLU for a whole data set.
    A fraction of up to `CONSTANT` is accepted, since samples may happen to lack some rare features.
    """
    varies = (real != real[0]).any(0)
    constant = int((features[:, varies] == features[0, varies]).all(0).sum())
    if constant and constant == int(varies.sum()):
        return ["all samples have the same features: the model generates a single image"]
    if constant <= CONSTANT * int(varies.sum()):
        return []
    return [f"{constant} of {int(varies.sum())} features are the same for all samples but differ between real images"]


def check_reference(reference: Tensor, name: str) -> list[str]:
    """Return a warning if the reference images (m, C, H, W) have so many copies that k-NN metrics are unreliable."""
    share = share_of_copies(reference, PRECISION_K)
    if share <= REPEATED:
        return []
    return [
        f"{share:.0%} of the reference images ({name}) have {PRECISION_K} or more exact copies, so their"
        " nearest-neighbour radius is 0: remove the copies from the data, or ignore precision, recall, density and"
        " coverage"
    ]


@dataclass(frozen=True)
class RealImages:
    """The real images (m, C, H, W), uint8 in [0, 255], that samples are compared with."""

    images: Tensor
    spec: DataSpec

    @cached_property
    def range(self) -> tuple[int, int]:
        return int(self.images.min()), int(self.images.max())

    @property
    def describe_range(self) -> str:
        """The range of real images, as a clause for messages."""
        low, high = self.range
        return f"real {self.spec.name} images span {low} to {high}"

    @cached_property
    def histogram(self) -> Tensor:
        """Fraction of values at each level, (256,)."""
        return histogram(self.images)

    @cached_property
    def _whitened(self) -> tuple[Tensor, Tensor]:
        values = statistics(self.images)
        covariance = values.T.cov() + TOLERANCE**2 * torch.eye(values.shape[1], dtype=values.dtype)
        return values.mean(0), torch.linalg.cholesky(covariance)

    def distance(self, images: Tensor) -> float:
        r"""Compute the distance of the mean statistics of ``images`` (n, C, H, W) from those of real images:

        .. math:: (\bar s - \mu)^\top \Sigma^{-1} (\bar s - \mu) - k / n

        where :math:`\mu` and :math:`\Sigma` are the mean and covariance of the k `statistics` over single real images.
        This is Hotelling's one-sample :math:`T^2`, divided by n, minus its expected value. For real images it is about
        0 at any n. A value of 1 means that the mean sample is one standard deviation of single real images away.
        """
        mean, factor = self._whitened
        values = statistics(images)
        whitened = torch.linalg.solve_triangular(factor, (values.mean(0) - mean)[:, None], upper=False)
        return float(whitened.square().sum()) - len(mean) / len(values)

    def explains(self, before: float, after: float, n: int) -> bool:
        r"""Return whether a conversion explains ``n`` samples, given their `distance` before and after it is undone.

        The limits are widened according to the standard deviation of the distance of n real images,
        :math:`\sqrt{2 k} / n`.
        """
        noise = (2 * len(self._whitened[0])) ** 0.5 / n
        return before > CLOSE + 4 * noise and after <= min(CLOSE + 2 * noise, MUCH_CLOSER * before + noise)


def statistics(images: Tensor) -> Tensor:
    """Compute coarse statistics (n, k), float64, of images (n, C, H, W) in [0, 255].

    The statistics are the means over up to 4 x 4 cells of the mean over channels and of the difference between each
    channel and the first; the standard deviation of each channel; and the mean absolute difference of vertical and of
    horizontal neighbours.
    """
    return torch.cat([_statistics(batch.float()) for batch in images.split(BATCH_SIZE)])


def _statistics(x: Tensor) -> Tensor:
    opponent = torch.cat([x.mean(1, keepdim=True), x[:, 1:] - x[:, :1]], 1)
    grid = (min(GRID, x.shape[2]), min(GRID, x.shape[3]))
    variance = x.square().mean((2, 3)) - x.mean((2, 3)).square()
    parts = [F.adaptive_avg_pool2d(opponent, grid).flatten(1), variance.clamp(min=0).sqrt()]
    parts += [x.diff(dim=dim).abs().flatten(1).mean(1, keepdim=True) for dim in (2, 3) if x.shape[dim] > 1]
    return torch.cat(parts, 1).double()


def histogram(images: Tensor) -> Tensor:
    """Return the fraction of values at each level of uint8 images, (256,)."""
    return torch.bincount(images.flatten(), minlength=256).double() / images.numel()


def wrap_ratio(images: Tensor) -> tuple[float, float]:
    """Return (ratio, circular) over pairs of horizontal neighbours with values strictly between 0 and 255.

    ``circular`` is the mean circular difference min(d, 256 - d), where d is the absolute difference, and ``ratio`` is
    the mean of d divided by ``circular``. A value that overflows leaves the range at one end and returns at the other,
    which is a jump of almost 256 in a smooth region, but no jump on the circle. Real images have ratios near 1.
    Saturated values are excluded, because edges from 0 to 255 are common.
    """
    linear = circular = pairs = 0.0
    for batch in images.split(BATCH_SIZE):
        unsaturated = (batch > 0) & (batch < 255)
        counted = unsaturated[..., :-1] & unsaturated[..., 1:]
        difference = batch.float().diff(dim=3).abs() * counted
        linear += float(difference.sum())
        circular += float(torch.minimum(difference, 256 - difference).sum())
        pairs += float(counted.sum())
    return (linear / circular, circular / pairs) if circular else (1.0, 0.0)


def share_of_copies(images: Tensor, at_least: int = 1) -> float:
    """Return the fraction of images with at least ``at_least`` exact copies among the other images."""
    keys = [hash(row.tobytes()) for row in images.cpu().contiguous().numpy()]
    counts = Counter(keys)
    return sum(counts[key] > at_least for key in keys) / len(keys)


# Errors


def _check_integers(pixels: Tensor, real: RealImages) -> None:
    """Raise `UserError` for integers that cannot be pixel values in [0, 255]."""
    if pixels.is_floating_point():
        return
    spec, high = real.spec, int(pixels.max())
    own = (spec.num_bins or 256) - 1
    if own < 255 and high == own and int(pixels.min()) >= 0:
        steps = torch.round(torch.arange(own + 1) * (255 / own)).long()
        of_real, of_samples = real.histogram[steps], histogram(pixels.to(torch.uint8))[: own + 1]
        if float((of_real - of_samples).abs().sum()) / 2 < 0.5:  # total variation distance
            raise UserError(
                f"Samples have values of at most {own}, which are the data set's own levels, but {real.describe_range}:"
                f" pass data.normalize(images), or multiply by 255 / {own} before saving."
            )
    if pixels.dtype != torch.uint8:
        raise UserError(
            f"Images must be uint8 in 0 to 255 or float in [-1, 1], not {pixels.dtype}: pass data.normalize(images) for"
            f" images of a split of {spec.name}, or images.to(torch.uint8) for images in [0, 255]."
        )
    used = histogram(pixels).nonzero().flatten().tolist() if high in (1, 255) else []
    if used in ([0, 1], [0, 1, 255]) and int((real.histogram > 0).sum()) > 3:
        cause = (
            "multiply by 255 before saving"
            if high == 1
            else "images in [-1, 1] were cast to integers: save (x + 1) * 127.5, rounded and clipped to 0 to 255"
        )
        raise UserError(f"Samples have only the levels {_listed(used)} of 0 to 255; {real.describe_range}: {cause}.")


def _check_floats(pixels: Tensor, real: RealImages) -> None:
    """Raise `UserError` for floats above 1, and for floats in [0, 1] that match real images if rescaled to [-1, 1]."""
    if not pixels.is_floating_point():
        return
    low, high = float(pixels.min()), float(pixels.max())
    levels = (real.spec.num_bins or 256) - 1
    if low >= 0 and high > 1 + OVERSHOOT:
        cause = (
            f"if they are the data set's own levels (0 to {levels}), pass data.normalize(images)"
            if high <= levels < 255
            else "if they are in [0, 255], pass images.round().to(torch.uint8)"
        )
        raise UserError(f"Samples must lie in [-1, 1], but these reach {high:.4g}: {cause}.")
    if in_unit_interval(pixels):
        some = pixels[evenly_spaced_indices(len(pixels), MAX_CONVERTED)].float()
        read, rescaled = (quantize_images(x, real.spec) for x in (some.clamp(-1, 1), (2 * some - 1).clamp(-1, 1)))
        if real.explains(real.distance(read), real.distance(rescaled), len(some)):
            raise UserError(
                f"Samples lie in [0, 1] ({low:.3g} to {high:.3g}), but floats must be in [-1, 1]: pass 2 * images - 1."
            )


def in_unit_interval(pixels: Tensor) -> bool:
    """Return whether floats lie in [0, 1] up to rounding, and are not all equal."""
    return -OVERSHOOT / 2 <= float(pixels.min()) < float(pixels.max()) <= 1 + OVERSHOOT


# Warnings


def _identical(n: int) -> str:
    return f"all {n:,} samples are the same image: the model generates a single image"


def _listed(levels: list[int]) -> str:
    return ", ".join(map(str, levels[:-1])) + f" and {levels[-1]}"


def _check_padding(images: Tensor, spec: DataSpec) -> list[str]:
    """Warn if images have the padded size, but their padding is not black."""
    if not spec.padding or images.shape[2:] != spec.shape[1:]:
        return []
    black = 0 if images.dtype == torch.uint8 else -1
    scale = 1 if images.dtype == torch.uint8 else 127.5
    difference = float((images[:MAX_IMAGES].float() - black).mul(1 - spec.mask(images.device)).sum())
    mean = scale * difference / (float((1 - spec.mask()).sum()) * len(images[:MAX_IMAGES]) * spec.shape[0])
    if mean <= TOLERANCE:
        return []
    height, width = (side - 2 * spec.padding for side in spec.shape[1:])
    return [
        f"the padding around the {height}x{width} pixels of {spec.name} images is not black (mean level {mean:.0f}) and"
        f" is cropped: if the samples were resized to {spec.shape[1]}x{spec.shape[2]}, resize them to {height}x{width}"
    ]


def conversions(images: Tensor, real: RealImages) -> Iterator[tuple[str, Tensor]]:
    """Yield pairs (description of a likely mistake and its fix, ``images`` with the mistake undone)."""
    n, channels, height, width = images.shape
    low, high = int(images.min()), int(images.max())
    name = real.spec.name
    bottom, top = real.range
    stretched = (images.float() - low) * ((top - bottom) / max(high - low, 1)) + bottom
    if high - low <= NARROW * (top - bottom):
        scale = (
            f"multiply by {255 / high:.2g} before saving"
            if low <= bottom + TOLERANCE
            else "images in [0, 1] were read as [-1, 1]: pass 2 x - 1"
            if low in (127, 128)
            else f"stretch them to {bottom} to {top} before saving"
        )
        yield f"samples span {low} to {high}, but {real.describe_range}: {scale}", stretched
    yield f"samples look inverted: 255 - x matches {name} images", 255 - images
    # Values overflow in uint8 arithmetic, and signed bytes that are read as unsigned are shifted by 128.
    yield (
        f"samples overflowed: -x modulo 256 matches {name} images; convert to float before scaling",
        (256 - images.int()) % 256,
    )
    yield (
        f"samples are shifted by half the range: x + 128 modulo 256 matches {name} images; save unsigned bytes",
        (images.int() + 128) % 256,
    )
    if channels == 3:
        yield f"channels look reversed: samples match {name} images as BGR; save them as RGB", images.flip(1)
    if channels > 1:
        shape = f"({channels}, {height}, {width})"
        yield (
            f"samples look scrambled: they match {name} images if their memory is read as {shape}; transpose images"
            " instead of reshaping them",
            images.permute(0, 2, 3, 1).reshape(n, channels, height, width),
        )
        yield (
            f"samples look scrambled: they match {name} images if their memory is read as ({height}, {width},"
            f" {channels}); transpose images instead of reshaping them",
            images.reshape(n, height, width, channels).permute(0, 3, 1, 2),
        )
    if height == width:
        yield f"rows and columns look swapped: samples match {name} images when transposed", images.mT
        for degrees, turned in ((90, images.mT.flip(2)), (-90, images.mT.flip(3))):
            yield f"samples look rotated: they match {name} images when turned by {degrees} degrees", turned
    yield f"samples look upside down: they match {name} images with their rows reversed", images.flip(2)
    yield f"samples look mirrored: they match {name} images with their columns reversed", images.flip(3)
    yield f"samples look rotated: they match {name} images when turned by 180 degrees", images.flip(2, 3)
    yield (
        f"samples look too dark: they match {name} images after gamma correction, (x / 255) ** (1 / 2.2)",
        255 * (images / 255) ** (1 / 2.2),
    )


def _find_conversion(images: Tensor, real: RealImages) -> str | None:
    """Return the conversion that makes samples match real images, or None if they match already or if none does."""
    subset = images[evenly_spaced_indices(len(images), MAX_CONVERTED)]
    distance = real.distance(subset)
    if not real.explains(distance, 0.0, len(subset)):
        return None
    candidates = {cause: real.distance(undone) for cause, undone in conversions(subset, real)}
    smallest = min(candidates.values())
    if not real.explains(distance, smallest, len(subset)):
        return None
    # If several are equally good (as for symmetric images), choose the first, which is the simplest.
    return next(cause for cause, reached in candidates.items() if reached <= smallest + MUCH_CLOSER * CLOSE)


def _check_range(images: Tensor, real: RealImages) -> list[str]:
    """Warn if all samples together cover a smaller range than nearly every single real image."""
    low, high = int(images.min()), int(images.max())
    bottom, top = real.range
    flat = real.images.flatten(1)
    wide = top - bottom
    dark = float((flat.amax(1) <= high).double().mean()) <= RARE and high - bottom <= NARROW * wide
    bright = float((flat.amin(1) >= low).double().mean()) <= RARE and top - low <= NARROW * wide
    if not (dark or bright):
        return []
    cause = (
        "images in [0, 1] were read as [-1, 1] (pass 2 x - 1), or the model generates bright images"
        if bright and low >= 127
        else f"the scale is wrong (multiply by {255 / max(high, 1):.2g}?), or the model generates dark images"
        if dark and low <= bottom + TOLERANCE
        else "the scale is wrong, or the model generates low-contrast images"
    )
    return [f"samples span {low} to {high}, but {real.describe_range}: {cause}"]


def _check_levels(images: Tensor, real: RealImages) -> list[str]:
    """Warn of a wrong background level, too few distinct levels, and clipping."""
    found, expected, name = histogram(images), real.histogram, real.spec.name
    warnings = []
    background, other = int(expected.argmax()), int(found.argmax())
    share = float(expected[background])
    if share >= BACKGROUND and float(found[background]) < share / 10 and float(found[other]) >= share / 2:
        warnings.append(
            f"the background of the samples has level {other}, but that of {name} images has level {background}:"
            " check the scale, and whether the images are inverted"
        )
    as_many = histogram(real.images[evenly_spaced_indices(len(real.images), len(images))])
    within = slice(int(images.min()), int(images.max()) + 1)
    used, usual = (int((levels[within] > 0).sum()) for levels in (found, as_many))
    if used <= FEW_LEVELS * usual:
        warnings.append(
            f"samples have {used} distinct pixel values, but {name} images have {usual}: values were thresholded, or"
            " rounded before they were scaled"
        )
    extreme, usual = (float(shares[0] + shares[255]) for shares in (found, expected))
    if extreme - usual > EXTREME_EXCESS:
        warnings.append(
            f"{extreme:.0%} of all values are 0 or 255, but only {usual:.0%} in {name} images: values were clipped;"
            " check the scale before clipping"
        )
    return warnings


def _check_structure(images: Tensor, real: RealImages) -> list[str]:
    """Warn of blank images, noise, overflow, and missing colour."""
    name = real.spec.name
    some, as_many = (x[evenly_spaced_indices(len(x), MAX_CONVERTED)] for x in (images, real.images))
    warnings = []
    blank, usual = (
        float((x.flatten(2).amax(2) == x.flatten(2).amin(2)).all(1).double().mean()) for x in (images, real.images)
    )
    if blank - usual > REPEATED:
        warnings.append(f"{blank:.0%} of the samples are blank: each has a single colour")
    rough, usual = (float(x.float().diff(dim=3).abs().mean()) for x in (some, as_many))
    (ratio, circular), (of_real, _) = wrap_ratio(some), wrap_ratio(as_many)
    if rough > max(UNRELATED, 2 * usual) and images.shape[3] > GRID:
        warnings.append(
            f"adjacent values differ by {rough:.0f} on average, but by {usual:.0f} in {name} images: samples are"
            " noise, or their pixels are in the wrong order"
        )
    elif ratio - 1 > 2 * (of_real - 1) + WRAPPED and circular < UNRELATED:
        warnings.append(
            "adjacent values jump from one end of the range to the other: values overflowed 0 to 255; clip them"
            " before converting to uint8"
        )
    if images.shape[1] > 1:
        grey, usual = (bool((x == x[:, :1]).all()) for x in (images, real.images))
        if grey and not usual:
            warnings.append(f"all samples are greyscale, but {name} images have colour: save all channels")
    return warnings


def _check_duplicates(images: Tensor, real: RealImages) -> list[str]:
    share = share_of_copies(images)
    if share - share_of_copies(real.images) <= REPEATED:
        return []
    return [
        f"{share:.0%} of the samples are exact copies of others, so neighbour radii may be 0: do not rely on precision,"
        " recall, density and coverage. The images were repeated, or the model has collapsed to a few images"
    ]
