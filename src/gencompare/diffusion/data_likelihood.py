r"""The decoder :math:`p(x_0 | x_1)` of a diffusion model, the last term of a variational bound.

:math:`x_1` is x_t at the first time, the one with the least noise. The papers use different decoders, and bits/dim
differ accordingly.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gencompare.diffusion.parameterizations import Prediction
from gencompare.diffusion.schedules import ScheduleValues
from gencompare.errors import UserError


class Decoder(ABC):
    """Base class of decoders."""

    name: ClassVar[str]
    """Short name for records and tables."""
    uses_network: ClassVar[bool] = True
    """Whether the decoder uses the image that the network predicts."""
    needs_steps: ClassVar[bool] = False
    """Whether the decoder is defined for a bound of T steps only, and not in continuous time."""
    needs_pixels: ClassVar[bool] = False
    """Whether the decoder is defined for discrete pixels only, and not for latents."""

    @abstractmethod
    def log_prob(
        self,
        x0: Tensor,
        x_1: Tensor,
        prediction: Prediction | None,
        at: ScheduleValues,
        at_second: ScheduleValues | None,
        num_bins: int | None,
    ) -> Tensor:
        """Compute log p(x_0 | x_1) in nats, elementwise, (n, C, H, W).

        Args:
            x0: images, (n, C, H, W).
            x_1: noisy images at the first time.
            prediction: prediction of the network at the first time; None in a bound that has no network call there,
                whose image is :math:`x_1 / \\alpha`.
            at: schedule values at the first time.
            at_second: schedule values at the second time of a bound of T steps, None in continuous time.
            num_bins: number of pixel values, evenly spaced from -1 to 1; None for continuous data, which get a density.
        """


@dataclass(frozen=True)
class GaussianDecoder(Decoder):
    r""":math:`N(\hat x_0, \sigma_1^2)`, integrated over the bin of each pixel.

    :math:`\hat x_0` is the predicted image. The standard deviation is that of the forward process,
    :math:`\sqrt{\beta_1}` in Ho et al. (2020), section 3.3 and eq. 13, https://arxiv.org/abs/2006.11239. (Their code
    has the standard deviation of `PosteriorDecoder`.) Where the bound has no network call at the first time, the
    decoder is :math:`N(x_1 / \alpha_1, \sigma_1^2 / \alpha_1^2)`.
    """

    name: ClassVar[str] = "Gaussian"

    def log_prob(
        self,
        x0: Tensor,
        x_1: Tensor,
        prediction: Prediction | None,
        at: ScheduleValues,
        at_second: ScheduleValues | None,
        num_bins: int | None,
    ) -> Tensor:
        if prediction is None:
            return binned_normal_log_prob(x0, x_1 / at.alpha, at.sigma / at.alpha, num_bins)
        return binned_normal_log_prob(x0, prediction.x0, at.sigma, num_bins)


@dataclass(frozen=True)
class PosteriorDecoder(Decoder):
    r"""The decoder in the code of DDPM and improved DDPM, integrated over the bin of each pixel.

    It is :math:`N(\hat x_0, \tilde\beta_2)`, where :math:`\tilde\beta_2 = \sigma_1^2 (1 - SNR_2 / SNR_1)`, the variance
    of :math:`q(x_1 | x_2, x_0)`, replaces that of the first step, which is 0. With a learned variance it is
    :math:`N(\hat x_0, \beta_1^v \tilde\beta_2^{1 - v})`: the fraction v interpolates to :math:`\beta_1 = \sigma_1^2`,
    as at all other steps, so that the bound trains the variance of the decoder. Nichol and Dhariwal (2021), "Improved
    denoising diffusion probabilistic models", eq. 15, https://arxiv.org/abs/2102.09672, with the clipped variance of
    the code of Ho et al. (2020), https://github.com/hojonathanho/diffusion.
    """

    name: ClassVar[str] = "posterior-variance"
    needs_steps: ClassVar[bool] = True

    def log_prob(
        self,
        x0: Tensor,
        x_1: Tensor,
        prediction: Prediction | None,
        at: ScheduleValues,
        at_second: ScheduleValues | None,
        num_bins: int | None,
    ) -> Tensor:
        assert prediction is not None and at_second is not None
        log_ratio = torch.log(-torch.expm1(at_second.log_snr - at.log_snr))  # of the posterior variance to beta_1
        if prediction.variance_fraction is not None:
            log_ratio = (1 - prediction.variance_fraction) * log_ratio
        return binned_normal_log_prob(x0, prediction.x0, at.sigma * torch.exp(log_ratio / 2), num_bins)


@dataclass(frozen=True)
class SoftmaxDecoder(Decoder):
    r""":math:`p(x_0 | x_1) \propto q(x_1 | x_0)` over the pixel values: the decoder of variational diffusion models.

    .. math::
        p(x_0 = v_k | x_1) = \mathrm{softmax}_k\left(-\frac{(x_1 / \alpha_1 - v_k)^2}{2 \sigma_1^2 / \alpha_1^2}\right)

    for each pixel and the values :math:`v_1, \dots, v_K`. It does not use the network. Kingma et al. (2021),
    "Variational diffusion models", section 3.3 and eq. 8, https://arxiv.org/abs/2107.00630.
    """

    name: ClassVar[str] = "softmax"
    uses_network: ClassVar[bool] = False
    needs_pixels: ClassVar[bool] = True

    def log_prob(
        self,
        x0: Tensor,
        x_1: Tensor,
        prediction: Prediction | None,
        at: ScheduleValues,
        at_second: ScheduleValues | None,
        num_bins: int | None,
    ) -> Tensor:
        assert num_bins is not None
        mean, std = x_1 / at.alpha, (at.sigma / at.alpha).expand_as(x_1)
        # The logits have `num_bins` values per pixel: keep them for a few images at a time, also for the gradient.
        arguments = zip(*(tensor.split(SOFTMAX_CHUNK) for tensor in (x0, mean, std)), strict=True)
        return torch.cat([checkpoint(softmax_log_prob, *each, num_bins, use_reentrant=False) for each in arguments])


SOFTMAX_CHUNK = 8
"""Images whose softmax is computed together."""


def softmax_log_prob(x0: Tensor, mean: Tensor, std: Tensor, num_bins: int) -> Tensor:
    """Compute the log-probability of `SoftmaxDecoder` elementwise."""
    values = torch.linspace(-1, 1, num_bins, device=mean.device, dtype=mean.dtype)
    logits = -0.5 * ((mean[..., None] - values) / std[..., None]).square()
    return -0.5 * ((mean - x0) / std).square() - logits.logsumexp(-1)


@dataclass(frozen=True, eq=False)
class DataLikelihood:
    """What a bound knows about the data: pixel values, padding, number of values, and the decoder."""

    num_bins: int | None
    """Number of values that a pixel can take, evenly spaced from -1 to 1; None for continuous data."""
    mask: Tensor
    """Mask (1, H, W): 1 inside the image, 0 on padding."""
    num_values: int
    """Number of values per image without padding, the divisor in bits/dim."""
    decoder: Decoder = field(default_factory=GaussianDecoder)
    """p(x_0 | x_1)."""

    def log_prob(
        self,
        x0: Tensor,
        x_1: Tensor,
        prediction: Prediction | None,
        at: ScheduleValues,
        at_second: ScheduleValues | None = None,
    ) -> Tensor:
        """Compute log p(x_0 | x_1) in nats, summed over all pixels except padding, (n,).

        Arguments are those of `Decoder.log_prob`.
        """
        log_p = self.decoder.log_prob(x0, x_1, prediction, at, at_second, self.num_bins)
        return (log_p * self.mask.to(x0)).flatten(1).sum(1)

    def bits_per_dim(self, nats: Tensor) -> Tensor:
        """Convert nats per image to bits/dim."""
        return nats / (self.num_values * math.log(2))

    def check_steps(self, num_timesteps: int | None, where: str, remedy: str) -> None:
        """Raise `UserError` unless the decoder suits a bound of ``num_timesteps`` steps; None means continuous time.

        Args:
            num_timesteps: number of steps of the bound.
            where: config key of the bound, for the message.
            remedy: overrides that give the bound steps, for the message.
        """
        if self.decoder.needs_steps and (num_timesteps is None or num_timesteps < 2):
            steps = "is in continuous time" if num_timesteps is None else f"has {num_timesteps} step"
            raise UserError(
                f"The {self.decoder.name} decoder needs a bound of at least two steps, but {where} {steps}: use"
                f" model/pixel_decoder=gaussian or softmax, or {remedy}."
            )


def binned_normal_log_prob(x0: Tensor, mean: Tensor, std: Tensor, num_bins: int | None) -> Tensor:
    """Compute the log-probability of the bin of x0 under N(mean, std^2), or the log-density if ``num_bins`` is None."""
    if num_bins is None:
        return normal_log_prob(x0, mean, std)
    return discretized_normal_log_prob(x0, mean, std, num_bins)


def normal_log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Compute log N(x; mean, std^2) elementwise."""
    return -0.5 * ((x - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)


def discretized_normal_log_prob(x: Tensor, mean: Tensor, std: Tensor, num_bins: int) -> Tensor:
    r"""Compute the log-probability of the bin of x under N(mean, std^2), elementwise.

    .. math:: \log\left[\Phi\left(\frac{x + \Delta / 2 - mean}{std}\right)
        - \Phi\left(\frac{x - \Delta / 2 - mean}{std}\right)\right], \qquad \Delta = \frac{2}{num\_bins - 1}

    x takes ``num_bins`` values from -1 to 1; the lowest bin extends to -inf and the highest to +inf. Ho et al. (2020),
    "Denoising Diffusion Probabilistic Models", eq. 13, https://arxiv.org/abs/2006.11239.
    """
    half, inverse, distance = 1 / (num_bins - 1), 1 / std, x - mean
    # By symmetry, the bin can be mirrored to the left of the mean, where the difference of the CDFs is accurate.
    upper = torch.special.log_ndtr(-(distance.abs() - half) * inverse)
    lower = torch.special.log_ndtr(-(distance.abs() + half) * inverse)
    inner = upper + torch.log(-torch.expm1((lower - upper).clamp(max=-1e-7)))
    lowest, highest = x < -1 + half, x > 1 - half
    outer = torch.special.log_ndtr((half + torch.where(lowest, distance, -distance)) * inverse)
    return torch.where(lowest | highest, outer, inner)
