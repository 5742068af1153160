"""Sanity checks of samples: can they be images of the data set at all?

Every metric turns any array into a number. Images on a wrong scale, inverted, or with their channels in another order
get one that looks like that of a poor model. These checks compare samples with real images and say so in words. They
look at pixels alone, so they are the same for every extractor.
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
from gencompare.evaluation.metrics.neighbors import DENSITY_NEIGHBOURS, PRECISION_NEIGHBOURS
from gencompare.evaluation.reference import OVERSHOOT, as_stored, evenly_spaced_indices, stored_split, unpadded
from gencompare.generative_model import DataSpec

EXPECTED_COVERAGE = 1 - 2.0**-DENSITY_NEIGHBOURS
"""Coverage by as many further real images as there are, whatever the data: the k nearest to a real image are each one
or the other with equal chance, and it is covered unless all k are its own kind (Naeem et al. 2020 derive it for finite
sets)."""
MIN_IMAGES = 100
"""Samples and real images from which on density and coverage can show a collapse. With fewer, the ball to the fifth
neighbour spans much of the real images, and what lies off them falls into a few balls. Of noise of four kinds (uniform,
normal, faint, smooth), measured 40 times each against digits, MNIST, Fashion-MNIST and CIFAR-10 (640 sets, compact
networks), 25 % were called a collapse at n = 20, 28 % at 50, 0.8 % at 100, and none at 150 to 400."""
HALF = 0.5
"""How far below what real images reach a figure must be to be called low."""


def missing_modes(density: float, coverage: float, best_coverage: float = 0.0, *, n: int = MIN_IMAGES) -> str | None:
    """A line that says so where samples leave much of the data out, else None.

    It is so if samples lie where real images do (density at least half of the 1 that real images have), and still fewer
    than half as many real images as should have a sample near do: the samples crowd in few places. Bad samples lie
    nowhere near real images and are another matter. It is also so if coverage fell below half of ``best_coverage``,
    that of an earlier look at the same model, once that was as high.

    Args:
        density: as in `neighbours.Neighbourhood`, of as many samples as real images, and so are the others.
        n: how many these are; fewer than `MIN_IMAGES` give no warning.
    """
    if n < MIN_IMAGES:
        return None
    low = HALF * EXPECTED_COVERAGE
    if density >= HALF and coverage < low:
        return (
            f"modes are missing: samples lie among the real images and reach {coverage:.0%} of them, where real ones"
            f" would reach {EXPECTED_COVERAGE:.0%}"
        )
    if best_coverage >= low and coverage < HALF * best_coverage:
        return f"modes were lost: samples reach {coverage:.0%} of the real images, after {best_coverage:.0%} earlier on"
    return None


MAX_IMAGES = 1_000
"""Images on each side, evenly spaced, that are compared; duplicates are counted among all."""
MAX_CONVERTED = 250
"""Images, evenly spaced, on which conversions are tried."""
RARE = 0.05
"""A range is too narrow if at most this share of single real images stay within it ..."""
NARROW = 0.6
"""... and if it covers at most this share of the range of the real images."""
FEW_LEVELS = 0.55
"""Samples may have no more than this share of the levels that as many real images have within the same range."""
EXTREME_EXCESS = 0.25
"""The share of values that are 0 or 255 may exceed that of real images by this much."""
BACKGROUND = 0.2
"""A level that at least this share of all real values have is a background."""
WRAPPED = 0.05
"""The excess of `wrap_ratio` over 1 may be twice that of real images and this much more."""
RELATED = 60.0
"""Mean absolute difference of neighbouring values, in grey levels, from which on they are unrelated: independent
uniform values differ by 85, by 64 on the circle."""
REPEATED = 0.05
"""The share of blank images, and of exact copies, may exceed that among real images by this much."""
CLOSE, MUCH_CLOSER = 0.25, 0.1
"""A conversion explains the samples if `RealImages.distance` is above the first as they are, and at most the first, and
at most the second times what it was, once the conversion is undone (see `RealImages.explains` for few samples)."""
TOLERANCE = 4.0
"""Standard deviation, in grey levels, added to that of every statistic: a few levels are no fault."""
GRID = 4
"""Cells along each side of an image whose means are compared."""
CHUNK = 50
"""Images in one pass: large temporary tensors cost more time than the arithmetic."""


def check_images(images: Tensor, reference: Tensor, spec: DataSpec, *, refuse: bool = True) -> list[str]:
    """Warnings about ``images`` as samples of a data set, one sentence each; empty if nothing is wrong.

    Only what cannot come from a model of these data, however poor, is refused: the data set's own levels in place of
    0 to 255 (digits: 0 to 16), images whose only levels are 0 and 1 (and 255, after a cast of [-1, 1]), floats outside
    of [-1, 1], and floats in [0, 1] that have the statistics of real images once they are brought to [-1, 1].
    Everything else is a warning.

    Args:
        images: (n, C, H, W) as `evaluate` takes them, or a model's samples as `quantize.as_stored` gives them.
        reference: (m, C, H, W) images of a split: levels 0 to ``spec.num_levels`` - 1, unpadded.
        refuse: raise an error for the cases above. A model's own samples need none: their scale is known.

    Raises:
        UserError: for the cases above; it says how to convert the images.
    """
    if spec.num_levels is None:
        return [_same(len(images))] if len(images) > 1 and bool((images == images[0]).all()) else []
    pixels = unpadded(images, spec)
    if len(pixels) < 2 or (pixels.is_floating_point() and not bool(torch.isfinite(pixels).all())):
        return []  # `as_stored` refuses values that are not finite
    some = reference[evenly_spaced_indices(len(reference), MAX_IMAGES)].split(CHUNK)
    real = RealImages(torch.cat([stored_split(part, spec) for part in some]), spec)
    rows = evenly_spaced_indices(len(pixels), MAX_IMAGES)
    if refuse:
        _check_integers(pixels, real)
        _check_floats(pixels, real)
    stored = torch.cat([as_stored(part, spec) for part in pixels.split(CHUNK)])
    warnings = _check_padding(images, spec)
    if bool((stored == stored[0]).all()):
        return [*warnings, _same(len(stored))]
    compared = pixels[rows].cpu() if pixels.dtype == torch.uint8 else stored[rows]
    explained = _converted(compared, real)
    if explained is not None:
        warnings.append(explained)
    elif pixels.is_floating_point() and in_unit_interval(pixels):
        low, high = float(pixels.min()), float(pixels.max())
        warnings.append(
            f"samples use {low:.2g} to {high:.2g}, and images of {spec.name} use [-1, 1]: if they are in [0, 1], give"
            " 2 * images - 1"
        )
    else:
        warnings += _check_range(compared, real) or _check_levels(compared, real)
        warnings += _check_structure(compared, real)
    return warnings + _check_duplicates(stored, real)


def check_features(features: Tensor, real: Tensor) -> list[str]:
    """Warnings about features (n, d) that are the same for all samples, and not for as many ``real`` images (m, d).

    A network's ReLU leaves some features at 0 for all images of one data set, which says nothing about the samples.
    Fewer than `CONSTANT` of the others are rare features that these samples happen not to have.
    """
    varies = (real != real[0]).any(0)
    constant = int((features[:, varies] == features[0, varies]).all(0).sum())
    if constant and constant == int(varies.sum()):
        return ["all samples have the same features: the model draws one image"]
    if constant <= CONSTANT * int(varies.sum()):
        return []
    return [f"{constant} of {int(varies.sum())} features are the same for all samples, and differ between real images"]


CONSTANT = 0.25


def check_reference(reference: Tensor, name: str) -> list[str]:
    """A warning if images (m, C, H, W) of the reference ``name`` have enough copies to break neighbour metrics."""
    share = share_of_copies(reference, PRECISION_NEIGHBOURS)
    if share <= REPEATED:
        return []
    return [
        f"{share:.0%} of the reference images ({name}) have {PRECISION_NEIGHBOURS} or more exact copies there, so their"
        " nearest-neighbour radius is 0: do not rely on precision, recall, density and coverage, or remove the copies"
        " from the data"
    ]


@dataclass(frozen=True)
class RealImages:
    """The real images (m, C, H, W), uint8 0 to 255, that samples are compared with."""

    images: Tensor
    spec: DataSpec

    @cached_property
    def range(self) -> tuple[int, int]:
        return int(self.images.min()), int(self.images.max())

    @property
    def described(self) -> str:
        """The data set and its range, for a sentence."""
        low, high = self.range
        return f"images of {self.spec.name} use {low} to {high}"

    @cached_property
    def histogram(self) -> Tensor:
        """(256,) share of values at each level."""
        return histogram(self.images)

    @cached_property
    def _whitened(self) -> tuple[Tensor, Tensor]:
        values = statistics(self.images)
        covariance = values.T.cov() + TOLERANCE**2 * torch.eye(values.shape[1], dtype=values.dtype)
        return values.mean(0), torch.linalg.cholesky(covariance)

    def distance(self, images: Tensor) -> float:
        r"""How far the mean statistics of ``images`` (n, C, H, W) lie from the real ones.

        .. math:: (\bar s - \mu)^T \Sigma^{-1} (\bar s - \mu) - k / n

        with mean mu and covariance Sigma of the k `statistics` of single real images: Hotelling's T^2 of one sample,
        over n, less its expected value. About 0 for real images at any n; 1 means that the average sample is one
        standard deviation of single real images away.
        """
        mean, factor = self._whitened
        values = statistics(images)
        away = torch.linalg.solve_triangular(factor, (values.mean(0) - mean)[:, None], upper=False)
        return float(away.square().sum()) - len(mean) / len(values)

    def explains(self, before: float, after: float, n: int) -> bool:
        """Whether a conversion explains ``n`` samples, by their `distance` before and after it is undone.

        The distance of n real images has standard deviation sqrt(2 k) / n about 0, which widens both limits.
        """
        noise = (2 * len(self._whitened[0])) ** 0.5 / n
        return before > CLOSE + 4 * noise and after <= min(CLOSE + 2 * noise, MUCH_CLOSER * before + noise)


def statistics(images: Tensor) -> Tensor:
    """Coarse statistics of each image (n, C, H, W) of 0 to 255, (n, k) float64, in grey levels.

    Means of up to 4 x 4 cells of the mean over channels and of the differences of the channels from the first one,
    standard deviation of each channel, mean absolute differences of vertical and of horizontal neighbours.
    """
    return torch.cat([_statistics(part.float()) for part in images.split(CHUNK)])


def _statistics(x: Tensor) -> Tensor:
    opponent = torch.cat([x.mean(1, keepdim=True), x[:, 1:] - x[:, :1]], 1)
    grid = (min(GRID, x.shape[2]), min(GRID, x.shape[3]))
    variance = x.square().mean((2, 3)) - x.mean((2, 3)).square()
    parts = [F.adaptive_avg_pool2d(opponent, grid).flatten(1), variance.clamp(min=0).sqrt()]
    parts += [x.diff(dim=dim).abs().flatten(1).mean(1, keepdim=True) for dim in (2, 3) if x.shape[dim] > 1]
    return torch.cat(parts, 1).double()


def histogram(images: Tensor) -> Tensor:
    """(256,) share of the values of uint8 images at each level."""
    return torch.bincount(images.flatten(), minlength=256).double() / images.numel()


def wrap_ratio(images: Tensor) -> tuple[float, float]:
    """(ratio, circular): how much larger the mean absolute difference of neighbours is than its circular counterpart
    min(d, 256 - d), and that one, over pairs of horizontal neighbours strictly between 0 and 255.

    A value that overflows leaves at one end of the range and returns at the other: a jump of almost 256 where the image
    is smooth, and no jump on the circle. Real images have ratios near 1. Saturated values are left out, since edges
    from 0 to 255 are common.
    """
    linear = circular = pairs = 0.0
    for part in images.split(CHUNK):
        between = (part > 0) & (part < 255)
        between = between[..., :-1] & between[..., 1:]
        difference = part.float().diff(dim=3).abs() * between
        linear += float(difference.sum())
        circular += float(torch.minimum(difference, 256 - difference).sum())
        pairs += float(between.sum())
    return (linear / circular, circular / pairs) if circular else (1.0, 0.0)


def share_of_copies(images: Tensor, at_least: int = 1) -> float:
    """The share of images that have at least that number of exact copies among the others."""
    keys = [hash(row.tobytes()) for row in images.cpu().contiguous().numpy()]
    counts = Counter(keys)
    return sum(counts[key] > at_least for key in keys) / len(keys)


# What is refused


def _check_integers(pixels: Tensor, real: RealImages) -> None:
    """Refuse integers that are no levels of 0 to 255."""
    if pixels.is_floating_point():
        return
    spec, high = real.spec, int(pixels.max())
    own = (spec.num_levels or 256) - 1
    if own < 255 and high == own and int(pixels.min()) >= 0:
        steps = torch.round(torch.arange(own + 1) * (255 / own)).long()
        of_real, of_samples = real.histogram[steps], histogram(pixels.to(torch.uint8))[: own + 1]
        if float((of_real - of_samples).abs().sum()) / 2 < 0.5:
            raise UserError(
                f"Samples reach {own} of 255 grey levels, which are the data set's own levels; {real.described}: give"
                f" data.normalize(images), or multiply by 255 / {own} before saving."
            )
    if pixels.dtype != torch.uint8:
        raise UserError(
            f"Images must be uint8 in 0 to 255 or float in [-1, 1], not {pixels.dtype}: give data.normalize(images) for"
            f" the images of a split of {spec.name}, or images.to(torch.uint8) where they use 0 to 255."
        )
    used = histogram(pixels).nonzero().flatten().tolist() if high in (1, 255) else []
    if used in ([0, 1], [0, 1, 255]) and int((real.histogram > 0).sum()) > 3:
        cause = (
            "multiply by 255 before saving"
            if high == 1
            else "images in [-1, 1] were cast to integers: save (x + 1) * 127.5, rounded and clipped to 0 to 255"
        )
        raise UserError(f"Samples have only the levels {_listed(used)} of 0 to 255; {real.described}: {cause}.")


def _check_floats(pixels: Tensor, real: RealImages) -> None:
    """Refuse floats that are not in [-1, 1]."""
    if not pixels.is_floating_point():
        return
    low, high = float(pixels.min()), float(pixels.max())
    levels = (real.spec.num_levels or 256) - 1
    if low >= 0 and high > 1 + OVERSHOOT:
        cause = (
            f"the data set's own levels are 0 to {levels}: give data.normalize(images)"
            if high <= levels < 255
            else "if they use 0 to 255, give images.round().to(torch.uint8)"
        )
        raise UserError(f"Samples must lie in [-1, 1], and these reach {high:.4g}: {cause}.")
    if in_unit_interval(pixels):
        some = pixels[evenly_spaced_indices(len(pixels), MAX_CONVERTED)].float()
        read, rescaled = (as_stored(x, real.spec) for x in (some.clamp(-1, 1), (2 * some - 1).clamp(-1, 1)))
        if real.explains(real.distance(read), real.distance(rescaled), len(some)):
            raise UserError(
                f"Samples lie in [0, 1] ({low:.3g} to {high:.3g}), and floats are read as [-1, 1]: give 2 * images - 1."
            )


def in_unit_interval(pixels: Tensor) -> bool:
    """Whether floats lie in [0, 1], give or take rounding, and are not all the same."""
    return -OVERSHOOT / 2 <= float(pixels.min()) < float(pixels.max()) <= 1 + OVERSHOOT


# What is warned of


def _same(n: int) -> str:
    return f"all {n:,} samples are the same image: the model draws one image"


def _listed(levels: list[int]) -> str:
    return ", ".join(map(str, levels[:-1])) + f" and {levels[-1]}"


def _check_padding(images: Tensor, spec: DataSpec) -> list[str]:
    """Images of the padded size whose padding holds something."""
    if not spec.padding or images.shape[2:] != spec.shape[1:]:
        return []
    black = 0 if images.dtype == torch.uint8 else -1
    scale = 1 if images.dtype == torch.uint8 else 127.5
    away = float((images[:MAX_IMAGES].float() - black).mul(1 - spec.mask(images.device)).sum())
    mean = scale * away / (float((1 - spec.mask()).sum()) * len(images[:MAX_IMAGES]) * spec.shape[0])
    if mean <= TOLERANCE:
        return []
    height, width = (side - 2 * spec.padding for side in spec.shape[1:])
    return [
        f"the padding around the {height}x{width} pixels of {spec.name} is not black (mean level {mean:.0f}) and is cut"
        f" off: if the samples were resized to {spec.shape[1]}x{spec.shape[2]}, resize them to {height}x{width}"
    ]


def conversions(images: Tensor, real: RealImages) -> Iterator[tuple[str, Tensor]]:
    """(what was done to the images and the way out, the images with it undone), for uint8 (n, C, H, W)."""
    n, channels, height, width = images.shape
    low, high = int(images.min()), int(images.max())
    name = real.spec.name
    bottom, top = real.range
    stretched = (images.float() - low) * ((top - bottom) / max(high - low, 1)) + bottom
    if high - low <= NARROW * (top - bottom):
        scale = (
            f"multiply by {255 / high:.2g} before saving"
            if low <= bottom + TOLERANCE
            else "images in [0, 1] were read as [-1, 1]: give 2 x - 1"
            if low in (127, 128)
            else f"stretch them to {bottom} to {top} before saving"
        )
        yield f"samples use {low} to {high} of 255 grey levels; {real.described}: {scale}", stretched
    yield f"samples look inverted: they match images of {name} as 255 - x", 255 - images
    # uint8 arithmetic overflows, and a signed byte has its zero where an unsigned one has 128.
    yield (
        f"samples overflowed: they match images of {name} as -x modulo 256; convert to float before scaling",
        (256 - images.int()) % 256,
    )
    yield (
        f"samples are shifted by half of the range: they match images of {name} as x + 128 modulo 256; save unsigned"
        " bytes",
        (images.int() + 128) % 256,
    )
    if channels == 3:
        yield f"channels look reversed: samples match images of {name} as BGR; save them as RGB", images.flip(1)
    if channels > 1:
        shape = f"({channels}, {height}, {width})"
        yield (
            f"samples look scrambled: they match images of {name} if their memory is read as {shape}; transpose images"
            " in place of reshaping them",
            images.permute(0, 2, 3, 1).reshape(n, channels, height, width),
        )
        yield (
            f"samples look scrambled: they match images of {name} if their memory is read as ({height}, {width},"
            f" {channels}); transpose images in place of reshaping them",
            images.reshape(n, height, width, channels).permute(0, 3, 1, 2),
        )
    if height == width:
        yield f"rows and columns look swapped: samples match images of {name} when transposed", images.mT
        for degrees, turned in ((90, images.mT.flip(2)), (-90, images.mT.flip(3))):
            yield f"samples look rotated: they match images of {name} when turned by {degrees} degrees", turned
    yield f"samples look upside down: they match images of {name} with their rows reversed", images.flip(2)
    yield f"samples look mirrored: they match images of {name} with their columns reversed", images.flip(3)
    yield f"samples look rotated: they match images of {name} when turned by 180 degrees", images.flip(2, 3)
    yield (
        f"samples look too dark: they match images of {name} after gamma correction, (x / 255) ** (1 / 2.2)",
        255 * (images / 255) ** (1 / 2.2),
    )


def _converted(images: Tensor, real: RealImages) -> str | None:
    """The conversion that makes samples match the real images, where there is one and they do not match as they are."""
    some = images[evenly_spaced_indices(len(images), MAX_CONVERTED)]
    distance = real.distance(some)
    if not real.explains(distance, 0.0, len(some)):
        return None
    candidates = {cause: real.distance(undone) for cause, undone in conversions(some, real)}
    least = min(candidates.values())
    if not real.explains(distance, least, len(some)):
        return None
    # Of several that do equally well (images without left and right can be turned or reversed), the first is simplest.
    return next(cause for cause, reached in candidates.items() if reached <= least + MUCH_CLOSER * CLOSE)


def _check_range(images: Tensor, real: RealImages) -> list[str]:
    """Samples that together cover a range which single real images exceed."""
    low, high = int(images.min()), int(images.max())
    bottom, top = real.range
    flat = real.images.flatten(1)
    wide = top - bottom
    dark = float((flat.amax(1) <= high).double().mean()) <= RARE and high - bottom <= NARROW * wide
    bright = float((flat.amin(1) >= low).double().mean()) <= RARE and top - low <= NARROW * wide
    if not (dark or bright):
        return []
    cause = (
        "images in [0, 1] were read as [-1, 1] (give 2 x - 1), or the model draws bright images"
        if bright and low >= 127
        else f"check the scale (times {255 / max(high, 1):.2g}?), or the model draws dark images"
        if dark and low <= bottom + TOLERANCE
        else "check the scale, or the model draws images of low contrast"
    )
    return [f"samples use {low} to {high} of 255 grey levels; {real.described}: {cause}"]


def _check_levels(images: Tensor, real: RealImages) -> list[str]:
    """How often levels occur."""
    found, expected, name = histogram(images), real.histogram, real.spec.name
    warnings = []
    background, other = int(expected.argmax()), int(found.argmax())
    share = float(expected[background])
    if share >= BACKGROUND and float(found[background]) < share / 10 and float(found[other]) >= share / 2:
        warnings.append(
            f"the background of the samples has level {other}, and that of images of {name} level {background}: check"
            " the scale, and whether the images are inverted"
        )
    as_many = histogram(real.images[evenly_spaced_indices(len(real.images), len(images))])
    within = slice(int(images.min()), int(images.max()) + 1)
    used, usual = (int((levels[within] > 0).sum()) for levels in (found, as_many))
    if used <= FEW_LEVELS * usual:
        warnings.append(
            f"samples use {used} distinct grey levels where images of {name} use {usual}: values were thresholded, or"
            " rounded before they were scaled"
        )
    extreme, usual = (float(shares[0] + shares[255]) for shares in (found, expected))
    if extreme - usual > EXTREME_EXCESS:
        warnings.append(
            f"{extreme:.0%} of all values are 0 or 255, and {usual:.0%} in images of {name}: values were clipped; check"
            " the scale before that"
        )
    return warnings


def _check_structure(images: Tensor, real: RealImages) -> list[str]:
    """How neighbouring values and channels differ."""
    name = real.spec.name
    some, as_many = (x[evenly_spaced_indices(len(x), MAX_CONVERTED)] for x in (images, real.images))
    warnings = []
    blank, usual = (
        float((x.flatten(2).amax(2) == x.flatten(2).amin(2)).all(1).double().mean()) for x in (images, real.images)
    )
    if blank - usual > REPEATED:
        warnings.append(f"{blank:.0%} of the samples are blank: each has one colour only")
    rough, usual = (float(x.float().diff(dim=3).abs().mean()) for x in (some, as_many))
    (ratio, circular), (of_real, _) = wrap_ratio(some), wrap_ratio(as_many)
    if rough > max(RELATED, 2 * usual) and images.shape[3] > GRID:
        warnings.append(
            f"neighbouring values differ by {rough:.0f} on average, and by {usual:.0f} in images of {name}: samples are"
            " noise, or their pixels are in a wrong order"
        )
    elif ratio - 1 > 2 * (of_real - 1) + WRAPPED and circular < RELATED:
        warnings.append(
            "neighbouring values jump from one end of the range to the other: values overflowed 0 to 255; clip them"
            " before converting to uint8"
        )
    if images.shape[1] > 1:
        grey, usual = (bool((x == x[:, :1]).all()) for x in (images, real.images))
        if grey and not usual:
            warnings.append(f"all samples are grey, and images of {name} have colour: save all channels")
    return warnings


def _check_duplicates(images: Tensor, real: RealImages) -> list[str]:
    share = share_of_copies(images)
    if share - share_of_copies(real.images) <= REPEATED:
        return []
    return [
        f"{share:.0%} of the samples are exact copies of others: neighbour radii may be 0, so do not rely on precision,"
        " recall, density and coverage; remove repeated images, or the model has collapsed to few images"
    ]
