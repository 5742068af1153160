"""Glow: a multi-scale flow of affine couplings and invertible 1x1 convolutions. RealNVP is an option of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.distributed import all_reduce_sum
from gencompare.errors import UserError, check_counts
from gencompare.networks.bijection import Bijection, check_inverse
from gencompare.networks.layers import at_least_float32

PERMUTATIONS = ("conv1x1", "reverse")
COUPLING_SCALES = ("tanh", "sigmoid")


class Glow(Bijection):
    r"""The flow of Kingma and Dhariwal (2018), "Glow: generative flow with invertible 1x1 convolutions", section 3 and
    figure 2 (https://arxiv.org/abs/1807.03039).

    Each of L levels halves the resolution by `torch.nn.functional.pixel_unshuffle`, (c, h, w) -> (4c, h/2, w/2), and
    applies K steps: `ActNorm`, a mixing of channels, and `AffineCoupling`. After each level but the last, half of the
    channels become latents, standardised by a Gaussian whose mean and standard deviation are computed from the other
    half; the rest is standardised by learned means and standard deviations of its channels. So the prior of all latents
    together is N(0, I), and the learned Gaussians of the paper are part of f.

    With ``permutation="reverse"``, the order of channels is reversed instead of mixed, as in RealNVP (Dinh et al. 2017,
    "Density estimation using Real NVP", https://arxiv.org/abs/1605.08803); the paper compares both in section 5.1.

    Classes select the means and standard deviations of the last latents, as in the published code
    (https://github.com/openai/glow), and also the biases of the first layer of each coupling.

    An image of a single pixel (a point) is not squeezed; it needs ``num_levels=1``.

    Args:
        shape: (C, H, W) of x; H and W must be multiples of :math:`2^L`.
        num_classes: number of classes, 0 for none.
        num_levels: L.
        depth: K, steps per level.
        width: channels of the hidden layers of a coupling.
        permutation: ``conv1x1`` (an invertible 1x1 convolution) or ``reverse``.
        coupling_scale: ``tanh`` or ``sigmoid``, see `AffineCoupling`.
    """

    maps_each_sample = False  # the first training step computes statistics of the batch

    def __init__(
        self,
        shape: Sequence[int],
        num_classes: int = 0,
        *,
        num_levels: int = 2,
        depth: int = 8,
        width: int = 64,
        permutation: str = "conv1x1",
        coupling_scale: str = "tanh",
    ) -> None:
        super().__init__()
        _check(shape, num_levels, depth, width)
        _check_choice("permutation", permutation, PERMUTATIONS)
        _check_choice("coupling_scale", coupling_scale, COUPLING_SCALES)
        self.levels = nn.ModuleList()
        self.splits = nn.ModuleList()
        self.latent_shapes: list[tuple[int, ...]] = []
        channels, height, side = shape
        self.squeezes = (height, side) != (1, 1)
        for level in range(num_levels):
            if self.squeezes:
                channels, height, side = 4 * channels, height // 2, side // 2
            steps = (GlowStep(channels, num_classes, width, permutation, coupling_scale) for _ in range(depth))
            self.levels.append(nn.ModuleList(steps))
            if level < num_levels - 1:
                channels //= 2
                self.splits.append(ZeroConv2d(channels, 2 * channels))
                self.latent_shapes.append((channels, height, side))
        self.latent_shapes.append((channels, height, side))
        self.prior = nn.Embedding(max(1, num_classes), 2 * channels)
        """Mean and log standard deviation of each channel of the last latents, per class."""
        nn.init.zeros_(self.prior.weight)

    def forward(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        h, log_det, latents = x, x.new_zeros(len(x)), []
        for level, steps in enumerate(self._steps()):
            h = F.pixel_unshuffle(h, 2) if self.squeezes else h
            for step in steps:
                h, log_det_step = step(h, label)
                log_det = log_det + log_det_step
            if level < len(self.splits):
                h, split_off = h.chunk(2, dim=1)
                latent, log_det_split = standardize(split_off, self._split_prior(level, h))
            else:
                latent, log_det_split = standardize(h, self._last_prior(label, h))
            latents.append(latent.flatten(1))
            log_det = log_det + log_det_split
        return torch.cat(latents, dim=1), log_det

    def inverse(self, z: Tensor, label: Tensor | None = None, guidance_scale: float = 1.0) -> Tensor:
        sizes = [math.prod(shape) for shape in self.latent_shapes]
        latents = [part.unflatten(1, s) for part, s in zip(z.split(sizes, dim=1), self.latent_shapes, strict=True)]
        h = unstandardize(latents[-1], self._last_prior(label, latents[-1]))
        for level, steps in reversed(list(enumerate(self._steps()))):
            if level < len(self.splits):
                h = torch.cat([h, unstandardize(latents[level], self._split_prior(level, h))], dim=1)
            for step in reversed(steps):
                h = step.inverse(h, label)
            h = check_inverse(F.pixel_shuffle(h, 2) if self.squeezes else h, f"level {level + 1} of Glow")
        return h

    def nfe_networks(self) -> dict[str, nn.Module]:
        """Return the network of one coupling, which each pass through the flow calls once."""
        return {"flow": self._first_step().coupling.network}

    def _first_step(self) -> GlowStep:
        return next(self._steps())[0]

    def _steps(self) -> Iterator[list[GlowStep]]:
        """Yield the steps of each level."""
        for level in self.levels:
            yield list(level)  # type: ignore[arg-type]

    def _split_prior(self, level: int, h: Tensor) -> Tensor:
        """Compute mean and log standard deviation of split-off channels from the others, (n, 2c, h, w)."""
        return at_least_float32(self.splits[level](h))

    def _last_prior(self, label: Tensor | None, h: Tensor) -> Tensor:
        """Return mean and log standard deviation of the last latents, (n, 2c, h, w)."""
        rows = torch.zeros(len(h), dtype=torch.int64, device=h.device) if label is None else label
        return self.prior(rows)[:, :, None, None].expand(-1, -1, *h.shape[2:])


def standardize(x: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
    """Subtract the mean and divide by the standard deviation. Return the result and its log-determinant (n,).

    Shapes: x (n, c, h, w), ``moments`` (mean and log standard deviation) (n, 2c, h, w).
    """
    mean, log_std = moments.chunk(2, dim=1)
    return (x - mean) * torch.exp(-log_std), -log_std.flatten(1).sum(1)


def unstandardize(latent: Tensor, moments: Tensor) -> Tensor:
    """Invert `standardize`."""
    mean, log_std = moments.chunk(2, dim=1)
    return latent * torch.exp(log_std) + mean


class GlowStep(nn.Module):
    """One step of flow: actnorm, mixing of channels, affine coupling (Kingma and Dhariwal 2018, table 1).

    Shapes: (n, channels, h, w) -> (n, channels, h, w), and the log-determinant (n,).
    """

    def __init__(self, channels: int, num_classes: int, width: int, permutation: str, scale: str) -> None:
        super().__init__()
        self.norm = ActNorm(channels)
        self.mix = InvertibleConv1x1(channels) if permutation == "conv1x1" else ReverseChannels()
        self.coupling = AffineCoupling(channels, num_classes, width, scale)

    def forward(self, x: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
        x, log_det_norm = self.norm(x)
        x, log_det_mix = self.mix(x)
        x, log_det_coupling = self.coupling(x, label)
        return x, log_det_norm + log_det_mix + log_det_coupling

    def inverse(self, y: Tensor, label: Tensor | None) -> Tensor:
        return self.norm.inverse(self.mix.inverse(self.coupling.inverse(y, label)))


class ActNorm(nn.Module):
    r"""Scale and shift of each channel, :math:`y = e^s (x + b)`.

    The first forward pass in train mode sets :math:`s` and :math:`b` so that each channel of its batch has zero mean
    and unit variance (Kingma and Dhariwal 2018, section 3.1). The statistics are those of the global batch, so they do
    not depend on the number of processes.

    Shapes: (n, channels, h, w) -> (n, channels, h, w), and the log-determinant ().
    """

    EPS = 1e-6
    """Added to the standard deviations."""

    initialized: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))
        self.log_scale = nn.Parameter(torch.zeros(channels, 1, 1))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))
        self._known_to_be_initialized = False
        """Whether the host knows that ``initialized`` is true, so that later steps do not wait for the device."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = at_least_float32(x)
        if self.training and not self._known_to_be_initialized:
            self._initialize(x)
        return torch.exp(self.log_scale) * (x + self.bias), x.shape[2] * x.shape[3] * self.log_scale.sum()

    def inverse(self, y: Tensor) -> Tensor:
        return torch.exp(-self.log_scale) * y - self.bias

    @torch.no_grad()
    def _initialize(self, x: Tensor) -> None:
        if not self.initialized:
            count = all_reduce_sum(x.new_full((), x.numel() / x.shape[1]))
            mean = (all_reduce_sum(x.sum((0, 2, 3))) / count)[:, None, None]
            variance = all_reduce_sum((x - mean).square().sum((0, 2, 3))) / count
            self.bias.copy_(-mean)
            self.log_scale.copy_(-torch.log(variance.sqrt() + self.EPS)[:, None, None])
            self.initialized.fill_(True)
        self._known_to_be_initialized = True

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[arg-type]
        self._known_to_be_initialized = False


class InvertibleConv1x1(nn.Module):
    r"""An invertible 1x1 convolution, y = W x at each pixel, with

    .. math:: W = P L (U + \mathrm{diag}(s)), \quad \log |\det \partial y / \partial x| = h w \sum_i \log |s_i|.

    P is a fixed permutation, L is unit lower triangular and U strictly upper triangular, and the signs of s are fixed
    (Kingma and Dhariwal 2018, section 3.2, eqs. 10 and 11). W is initialised as a random rotation. L, U and log|s| are
    the parts of one matrix. Everything is computed in the precision of the weights, even under autocast, because a
    product in 16 bits would not be the inverse of `inverse`.

    Shapes: (n, channels, h, w) -> (n, channels, h, w), and the log-determinant ().
    """

    permutation: Tensor
    sign: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        rotation, _ = torch.linalg.qr(torch.randn(channels, channels))
        permutation, lower, upper = torch.linalg.lu(rotation)
        self.register_buffer("permutation", permutation)
        self.register_buffer("sign", upper.diagonal().sign())
        log_abs = upper.diagonal().abs().log()
        self.lu = nn.Parameter(lower.tril(-1) + upper.triu(1) + log_abs.diag())
        """L below the diagonal, log|s| on it, and U above it."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            lower, upper = self._factors()
            y = (self.permutation @ lower @ upper) @ x.flatten(2)
        return y.view_as(x), x.shape[2] * x.shape[3] * self.lu.diagonal().sum()

    def inverse(self, y: Tensor) -> Tensor:
        with torch.autocast(y.device.type, enabled=False):
            lower, upper = (factor.double() for factor in self._factors())
            half = torch.linalg.solve_triangular(lower, self.permutation.double().mT, upper=False, unitriangular=True)
            inverse = torch.linalg.solve_triangular(upper, half, upper=True).to(y.dtype)
            return (inverse @ y.flatten(2)).view_as(y)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Return L and U + diag(s)."""
        s = self.sign * self.lu.diagonal().exp()
        return self.lu.tril(-1) + torch.eye(len(s), dtype=s.dtype, device=s.device), self.lu.triu(1) + s.diag()


class ReverseChannels(nn.Module):
    """Reverses the order of the channels. The log-determinant is 0."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.flip(1), x.new_zeros(())

    def inverse(self, y: Tensor) -> Tensor:
        return y.flip(1)


class AffineCoupling(nn.Module):
    r"""Scales and shifts half of the channels, depending on the other half.

    .. math:: y_1 = x_1, \quad y_2 = s(a) \, (x_2 + t), \quad (a, t) = \mathrm{network}(x_1)

    (Kingma and Dhariwal 2018, table 1). The scale is :math:`s = e^{\tanh a}`, as in RealNVP (Dinh et al. 2017, whose
    tanh has a learned factor), or :math:`s = \sigma(a + 2)`, as in the published code of Glow. The sigmoid only
    contracts, and has no lower bound, so `inverse`, which divides by it, overflows more easily. The last layer of the
    network is zero at initialisation.

    Shapes: (n, channels, h, w) -> (n, channels, h, w), and the log-determinant (n,).
    """

    def __init__(self, channels: int, num_classes: int, width: int, scale: str) -> None:
        super().__init__()
        self.num_kept, self.scale = channels // 2, scale
        self.network = CouplingNetwork(self.num_kept, 2 * (channels - self.num_kept), num_classes, width)

    def forward(self, x: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
        kept, changed = x.tensor_split([self.num_kept], dim=1)
        log_scale, shift = self._log_scale_and_shift(kept, label)
        changed = torch.exp(log_scale) * (changed + shift)
        return torch.cat([kept, changed], dim=1), log_scale.flatten(1).sum(1)

    def inverse(self, y: Tensor, label: Tensor | None) -> Tensor:
        kept, changed = y.tensor_split([self.num_kept], dim=1)
        log_scale, shift = self._log_scale_and_shift(kept, label)
        return torch.cat([kept, torch.exp(-log_scale) * changed - shift], dim=1)

    def _log_scale_and_shift(self, kept: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
        a, shift = at_least_float32(self.network(kept, label)).chunk(2, dim=1)
        return torch.tanh(a) if self.scale == "tanh" else F.logsigmoid(a + 2), shift


class CouplingNetwork(nn.Module):
    """Three convolutions (3x3, 1x1, 3x3), the first two with actnorm and ReLU (Kingma and Dhariwal 2018, section 5).

    Shapes: x (n, channels_in, h, w), label (n,) -> (n, channels_out, h, w).
    """

    def __init__(self, channels_in: int, channels_out: int, num_classes: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 1, bias=False)
        for conv in (self.conv1, self.conv2):
            nn.init.normal_(conv.weight, std=0.05)  # actnorm sets the scale
        self.norm1, self.norm2 = ActNorm(width), ActNorm(width)
        self.out = ZeroConv2d(width, channels_out)
        self.classes = nn.Embedding(num_classes, width) if num_classes else None
        if self.classes is not None:
            nn.init.zeros_(self.classes.weight)

    def forward(self, x: Tensor, label: Tensor | None) -> Tensor:
        h, _ = self.norm1(self.conv1(x))
        if self.classes is not None:
            h = h + self.classes(label)[:, :, None, None]
        h, _ = self.norm2(self.conv2(F.relu(h)))
        return self.out(F.relu(h))


class ZeroConv2d(nn.Conv2d):
    """A 3x3 convolution whose weights and biases are zero at initialisation."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 3, padding=1)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        assert self.bias is not None
        nn.init.zeros_(self.bias)


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f"model.bijection.{name}={value}: choose {' or '.join(choices)}.")


def _check(shape: Sequence[int], num_levels: int, depth: int, width: int) -> None:
    """Raise `UserError` for invalid sizes."""
    check_counts("model.bijection", num_levels=num_levels, depth=depth, width=width)
    channels, height, width_of_image = shape
    if (height, width_of_image) == (1, 1):
        if num_levels > 1 or channels < 2:
            raise UserError(
                f"Glow cannot halve points ({channels} values) with model.bijection.num_levels={num_levels}: use"
                " model.bijection.num_levels=1, and points with at least two values."
            )
        return
    most = min((side & -side).bit_length() - 1 for side in (height, width_of_image))
    if most == 0:
        raise UserError(f"Glow halves images, but {height}x{width_of_image} is not even: use model=tarflow.")
    if num_levels > most:
        raise UserError(
            f"Glow with model.bijection.num_levels={num_levels} halves images {num_levels} times, but"
            f" {height}x{width_of_image} images only {most} times: use model.bijection.num_levels={most}."
        )
