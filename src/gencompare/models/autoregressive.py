"""Autoregressive models of pixels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gencompare.generative_model import Cond, DataSpec, GenerativeModel, LikelihoodEstimate
from gencompare.models import visualization
from gencompare.models.pixel_likelihoods import PixelLikelihood
from gencompare.networks.pixelcnn import PixelCNN
from gencompare.rng import RandomSource


class AutoregressivePixels(GenerativeModel):
    r"""A model that predicts each pixel from the pixels before it in raster order.

    .. math:: \log p(x) = \sum_i \log p(x_i | h_i), \quad h_i = f(x_1, \dots, x_{i - 1}),

    with a causal network f, and a distribution of the channels of a pixel. With `PixelCNN` and
    `DiscretizedLogisticMixture`, this is PixelCNN++: Salimans et al. (2017), https://arxiv.org/abs/1701.05517. The loss
    is :math:`-\log_2 p(x)` per value: exact bits/dim, without a bound and without dequantisation.

    Sampling draws one pixel after another, :math:`x_i \sim p(x_i | h_i)`, and takes one evaluation of the network per
    pixel (`PixelCNN.raster_scan`).

    The model is one of images without the padding of their data set; samples are padded with black.

    Args:
        spec: shape, number of classes and value range of the data.
        network: a factory ``(shape, out_channels, num_classes) -> PixelCNN``; ``num_classes`` is 0 for an unconditional
            model.
        likelihood: a factory ``spec -> PixelLikelihood``.
        kwargs: see `TrainedModel`.
    """

    def __init__(
        self,
        spec: DataSpec,
        *,
        network: Callable[..., PixelCNN],
        likelihood: Callable[..., PixelLikelihood],
        **kwargs: Any,
    ) -> None:
        super().__init__(spec, **kwargs)
        channels, height, width = spec.shape
        self.pixel_shape = (channels, height - 2 * spec.padding, width - 2 * spec.padding)
        """Shape (C, H, W) of images without padding."""
        self.likelihood = likelihood(spec=replace(spec, shape=self.pixel_shape, padding=0))
        self.network = network(
            shape=self.pixel_shape,
            out_channels=self.likelihood.decoder_channels,
            num_classes=spec.num_classes if self.conditional else 0,
        )

    def micro_batched_networks(self) -> list[nn.Module]:
        return [self.network]

    def losses(self, x: Tensor, cond: Cond, rng: RandomSource) -> dict[str, Tensor]:
        """Compute ``loss`` in bits per value, and ``bits_per_dim``, the same number, if the likelihood is that of the
        data."""
        bits = self._bits_per_value(x, cond)
        return {"loss": bits, "bits_per_dim": bits} if self.likelihood.is_data_likelihood else {"loss": bits}

    def _bits_per_value(self, x: Tensor, cond: Cond) -> Tensor:
        x = self.spec.crop(x)
        log_prob = self.likelihood.log_prob(self.network(x, self.label(cond)), x)
        return -log_prob / (self.spec.num_values * math.log(2))

    @torch.no_grad()
    def sample(self, n: int, cond: Cond | None = None, *, generator: torch.Generator) -> Tensor:
        x = torch.full((n, *self.pixel_shape), -1.0, device=self.device, dtype=self.dtype)
        return self.spec.pad(self._complete(x, 0, self.select_conditions(cond), generator))

    def _complete(self, x: Tensor, first_row: int, cond: Cond, generator: torch.Generator) -> Tensor:
        """Sample the rows of images without padding from ``first_row`` on, given those above."""
        x = x.clone()
        for row, column, h in self.network.raster_scan(x, self.label(cond), first_row=first_row):
            x[:, :, row, column] = self.likelihood.sample(h, generator)[:, :, 0, 0].clamp(-1, 1)
        return x

    def sampling_description(self) -> str:
        return "one pixel after another"

    @torch.no_grad()
    def visualize(self, x: Tensor, cond: Cond, *, generator: torch.Generator) -> dict[str, Tensor]:
        """Complete images whose lower half is missing, as in van den Oord et al. (2016), "Pixel recurrent neural
        networks", figure 1 (https://arxiv.org/abs/1601.06759)."""
        cond, height = self.select_conditions(cond), self.pixel_shape[1] // 2

        def complete(x: Tensor, cond: Cond) -> Tensor:
            return self.spec.pad(self._complete(self.spec.crop(x), height, cond, generator))

        return {"completion": visualization.completions(complete, x, cond, self.spec.padding + height)}

    def likelihoods(self) -> dict[str, LikelihoodEstimate]:
        if not self.likelihood.is_data_likelihood:
            return {}
        method = "discrete" if self.spec.num_bins is not None else "continuous"
        return {"pixels": LikelihoodEstimate("exact", self._terms, method)}

    @torch.no_grad()
    def _terms(self, x: Tensor, cond: Cond, generator: torch.Generator) -> dict[str, Tensor]:
        return {"pixels": self._bits_per_value(x, self.select_conditions(cond))}

    def nfe_networks(self) -> dict[str, nn.Module]:
        """Return the two streams of the network: one is called once per row, the other once per pixel."""
        return {"vertical": self.network.vertical, "horizontal": self.network.horizontal}
