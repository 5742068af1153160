"""Degradations of known kind and strength, which an image quality metric must detect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from gencompare.rng import generator

Degrade = Callable[[Tensor, float, torch.Generator], Tensor]


@dataclass(frozen=True)
class Degradation:
    """One kind of degradation at increasing strengths.

    ``apply`` maps uint8 images (n, C, H, W), a strength and a random generator to uint8 images of the same shape.
    """

    name: str
    unit: str
    strengths: tuple[float, ...]
    """The strengths in increasing order, in ``unit``."""
    apply: Degrade
    channels: tuple[int, ...] = (1, 3)
    """Supported numbers of channels."""

    def __call__(self, images: Tensor, strength: float, seed: int = 0) -> Tensor:
        """Degrade images. Random numbers depend only on seed and kind, so all strengths use the same ones."""
        return self.apply(images, strength, generator("cpu", seed, "degradation", self.name))


def _to_uint8(x: Tensor) -> Tensor:
    """Round pixel values, clamp them to [0, 255] and convert them to uint8."""
    return x.round().clamp(0, 255).to(torch.uint8)


def blur(images: Tensor, sigma: float, source: torch.Generator) -> Tensor:
    """Apply a Gaussian blur with a standard deviation of ``sigma`` pixels."""
    size = 2 * max(1, round(3 * sigma)) + 1
    x = images.float()
    # Reflection padding must be narrower than the image, so tiny images get a smaller kernel.
    size = min(size, 2 * (min(x.shape[2:]) - 1) + 1)
    return _to_uint8(tv.gaussian_blur(x, [size, size], [sigma, sigma]))


def noise(images: Tensor, std: float, source: torch.Generator) -> Tensor:
    """Add Gaussian noise with standard deviation ``std``, for pixel values in [0, 255]."""
    return _to_uint8(images + std * torch.randn(images.shape, generator=source))


def jpeg(images: Tensor, compression: float, source: torch.Generator) -> Tensor:
    """Compress as JPEG at quality 100 - ``compression``."""
    return torch.stack([tv.jpeg(image, quality=round(100 - compression)) for image in images])


def downscale(images: Tensor, factor: float, source: torch.Generator) -> Tensor:
    """Downscale with antialiasing and upscale again, both bicubic."""
    height, width = images.shape[2:]
    small = (max(1, round(height / factor)), max(1, round(width / factor)))
    x = F.interpolate(images.float(), small, mode="bicubic", antialias=True)
    return _to_uint8(F.interpolate(x, (height, width), mode="bicubic"))


def pixelate(images: Tensor, factor: float, source: torch.Generator) -> Tensor:
    """Replace blocks of pixels by their mean."""
    height, width = images.shape[2:]
    small = (max(1, round(height / factor)), max(1, round(width / factor)))
    return _to_uint8(F.interpolate(F.adaptive_avg_pool2d(images.float(), small), (height, width), mode="nearest"))


def colour_cast(images: Tensor, levels: float, source: torch.Generator) -> Tensor:
    """Shift each image by ``levels`` (root mean square over channels) in a random direction of colour space."""
    direction = torch.randn(len(images), images.shape[1], 1, 1, generator=source)
    direction = direction / direction.square().mean(1, keepdim=True).sqrt()
    return _to_uint8(images + levels * direction)


def contrast_loss(images: Tensor, share: float, source: torch.Generator) -> Tensor:
    """Interpolate each pixel towards the mean of its image by a fraction ``share``."""
    x = images.float()
    return _to_uint8(x.lerp(x.mean((1, 2, 3), keepdim=True).expand_as(x), share))


def shuffle_patches(images: Tensor, grid: float, source: torch.Generator) -> Tensor:
    """Permute ``grid`` x ``grid`` patches of each image at random. Pixels that do not fill a patch stay in place."""
    n, channels, height, width = images.shape
    k = round(grid)
    h, w = height // k, width // k
    if not h or not w:
        return images.clone()
    part = images[:, :, : h * k, : w * k]
    patches = part.reshape(n, channels, k, h, k, w).permute(0, 2, 4, 1, 3, 5).reshape(n, k * k, channels, h, w)
    order = torch.rand(n, k * k, generator=source).argsort(1)
    # With few patches a random permutation may be the identity; if so, roll it by one.
    identity = (order == torch.arange(k * k)).all(1)
    order[identity] = order[identity].roll(1, 1)
    patches = patches[torch.arange(n)[:, None], order]
    out = images.clone()
    out[:, :, : h * k, : w * k] = (
        patches.reshape(n, k, k, channels, h, w).permute(0, 3, 1, 4, 2, 5).reshape(n, channels, h * k, w * k)
    )
    return out


def warp(images: Tensor, flow: Tensor) -> Tensor:
    """Resample images at positions displaced by ``flow`` (n, 2, H, W), in pixels; bilinear, with border padding."""
    height, width = images.shape[2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x, y = x + flow[:, 0], y + flow[:, 1]
    grid = torch.stack([2 * (x + 0.5) / width - 1, 2 * (y + 0.5) / height - 1], 3)
    return _to_uint8(F.grid_sample(images.float(), grid.float(), padding_mode="border", align_corners=False))


def smooth_field(n: int, height: int, width: int, cells: int, source: torch.Generator) -> Tensor:
    """Draw random displacements (n, 2, H, W) with unit standard deviation that vary smoothly over 1 / ``cells`` of the
    image."""
    coarse = torch.randn(n, 2, cells + 1, cells + 1, generator=source)
    field = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)
    return field / field.std((1, 2, 3), keepdim=True)


def elastic(images: Tensor, std: float, source: torch.Generator) -> Tensor:
    """Apply smooth random displacements with a standard deviation of ``std`` percent of the image width."""
    n, _, height, width = images.shape
    return warp(images, std / 100 * width * smooth_field(n, height, width, 4, source))


def jitter(images: Tensor, std: float, source: torch.Generator) -> Tensor:
    """Displace each pixel independently, with a standard deviation of ``std`` pixels."""
    n, _, height, width = images.shape
    return warp(images, std * torch.randn(n, 2, height, width, generator=source))


def mix(images: Tensor, share: float, source: torch.Generator) -> Tensor:
    """Blend each image with a random image of the set, which has weight ``share``."""
    other = torch.randperm(len(images), generator=source).roll(1)
    return _to_uint8(images.float().lerp(images[other].float(), share))


def checkerboard(images: Tensor, amplitude: float, source: torch.Generator) -> Tensor:
    """Alternately brighten and darken adjacent pixels, an artefact of transposed convolutions and dithering."""
    height, width = images.shape[2:]
    sign = 1 - 2 * ((torch.arange(height)[:, None] + torch.arange(width)) % 2)
    return _to_uint8(images + amplitude * sign)


def permute_channels(images: Tensor, share: float, source: torch.Generator) -> Tensor:
    """Cyclically permute the channels of about a fraction ``share`` of the images."""
    out = images.clone()
    rows = torch.rand(len(images), generator=source) < share
    out[rows] = images[rows].roll(1, 1)
    return out


DEGRADATIONS = (
    Degradation("blur", "sigma, pixels", (0.4, 0.6, 1.0, 1.5, 2.0, 3.0), blur),
    Degradation("noise", "std, grey levels", (5, 10, 25, 40, 60), noise),
    Degradation("jpeg", "100 - quality", (10, 50, 70, 85, 95), jpeg),
    Degradation("downscale", "factor", (1.25, 1.5, 2, 3, 4), downscale),
    Degradation("pixelate", "factor", (1.25, 1.5, 2, 3, 4), pixelate),
    Degradation("colour cast", "grey levels", (5, 10, 20, 40, 60), colour_cast, channels=(3,)),
    Degradation("brightness", "grey levels", (5, 10, 20, 40, 60), colour_cast, channels=(1,)),
    Degradation("contrast", "fraction lost", (0.1, 0.25, 0.4, 0.6, 0.8), contrast_loss),
    Degradation("patch shuffle", "grid", (2, 4, 7, 14, 28), shuffle_patches),
    Degradation("elastic", "std, % of width", (1.5, 3, 5, 8, 12), elastic),
    Degradation("local translation", "std, pixels", (0.3, 0.6, 1, 1.5, 2.5), jitter),
    Degradation("mixing", "fraction of another image", (0.1, 0.2, 0.3, 0.4, 0.5), mix),
    Degradation("checkerboard", "amplitude, grey levels", (2, 5, 10, 20, 40), checkerboard),
    Degradation("permuted channels", "fraction of images", (0.1, 0.25, 0.5, 0.75, 1), permute_channels, channels=(3,)),
)
"""Degradations that keep the number of images. Among patch shuffles, 2 x 2 is the mildest: each quadrant is intact."""


def dropped_classes(labels: Tensor, count: float, source: torch.Generator) -> Tensor:
    """Return the indices of all images except those of ``count`` random classes."""
    classes = labels.unique()
    kept = classes[torch.randperm(len(classes), generator=source)][round(count) :]
    return torch.isin(labels, kept).nonzero()[:, 0]


def unequal_classes(labels: Tensor, ratio: float, source: torch.Generator) -> Tensor:
    """Return the indices of a random subset whose class fractions decrease geometrically from 1 to 1 / ``ratio``."""
    classes = labels.unique()
    order = torch.randperm(len(classes), generator=source)
    share = torch.zeros(int(labels.max()) + 1)
    share[classes[order]] = ratio ** -torch.linspace(0, 1, len(classes))
    return (torch.rand(len(labels), generator=source) < share[labels]).nonzero()[:, 0]


def repeated(n: int, times: float, source: torch.Generator) -> Tensor:
    """Return n indices, each of which occurs about ``times`` times."""
    distinct = torch.randperm(n, generator=source)[: max(1, round(n / times))]
    return distinct[torch.arange(n) % len(distinct)]
