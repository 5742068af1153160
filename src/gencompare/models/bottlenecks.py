"""Bottlenecks of autoencoders: regularisation or quantisation of the latents.

Latents are small images (n, c, h, w). A bottleneck maps the encoder output to the decoder input and a penalty. `mode`
gives the deterministic latents of an image; `quantize` maps generated latents to decoder input.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from gencompare.distributed import all_reduce_sum
from gencompare.errors import TrainingStopped, UserError, check_non_negative
from gencompare.networks.layers import at_least_float32
from gencompare.rng import RandomSource


class Bottleneck(nn.Module, ABC):
    """Base class of bottlenecks.

    Args:
        channels: number of latent channels c.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels < 1:
            raise UserError(f"model.bottleneck.channels={channels} must be at least 1.")
        self.channels = channels

    @property
    def encoded_channels(self) -> int:
        """Number of channels in the encoder output."""
        return self.channels

    @abstractmethod
    def forward(self, h: Tensor, rng: RandomSource) -> tuple[Tensor, dict[str, Tensor]]:
        """Map the encoder output to the decoder input. In train mode, this may update state that has no gradient.

        Args:
            h: encoder output, (n, encoded_channels, h, w).
            rng: source of random numbers.

        Returns:
            Decoder input (n, c, h, w), and metrics (n,) by name; ``penalty`` is added to the loss.
        """

    @abstractmethod
    def mode(self, h: Tensor) -> Tensor:
        """Return deterministic latents (n, c, h, w) for the encoder output."""

    def quantize(self, z: Tensor) -> Tensor:
        """Map generated latents (n, c, h, w) to decoder input."""
        return z

    def check_collapse(self) -> None:
        """Raise `TrainingStopped` if training has collapsed."""

    @property
    def possibly_collapsed(self) -> bool:
        """Whether the last steps look like the start of a collapse."""
        return False


class GaussianPosterior(Bottleneck):
    r"""A diagonal Gaussian posterior with a small KL penalty: :math:`z = \mu + \sigma \epsilon`.

    The penalty is ``weight`` :math:`KL(q(z | x) \| N(0, I))`, in nats per latent value. This is "KL-reg" of Rombach et
    al. (2022), "High-resolution image synthesis with latent diffusion models", appendix G,
    https://arxiv.org/abs/2112.10752. The weight is small enough for latents to keep their information; the penalty only
    bounds their scale.

    Args:
        channels: number of latent channels c.
        weight: weight of the KL penalty.
    """

    LOG_VAR_RANGE = (-30.0, 20.0)
    r"""Range to which :math:`\log \sigma^2` is clamped."""

    def __init__(self, channels: int = 4, weight: float = 1e-3) -> None:
        super().__init__(channels)
        check_non_negative("model.bottleneck.weight", weight)
        self.weight = weight

    @property
    def encoded_channels(self) -> int:
        return 2 * self.channels

    def forward(self, h: Tensor, rng: RandomSource) -> tuple[Tensor, dict[str, Tensor]]:
        mean, log_var = self._moments(h)
        z = mean + (0.5 * log_var).exp() * rng.normal(tuple(mean.shape[1:])).to(mean)
        kl = 0.5 * (mean.square() + log_var.exp() - log_var - 1).flatten(1).mean(1)
        return z, {"penalty": self.weight * kl, "kl": kl}

    def mode(self, h: Tensor) -> Tensor:
        return self._moments(h)[0]

    def _moments(self, h: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_var = at_least_float32(h).chunk(2, dim=1)
        return mean, log_var.clamp(*self.LOG_VAR_RANGE)


class VectorQuantizer(Bottleneck):
    r"""Vector quantisation: each latent vector is replaced by the nearest of K codes.

    van den Oord et al. (2017), "Neural discrete representation learning", eq. 1 and 2,
    https://arxiv.org/abs/1711.00937; gradients are passed straight through. The penalty is ``commitment``
    :math:`\mathrm{mean}\,(h - \mathrm{sg}[e])^2`. Codes are moving averages of the vectors assigned to them (appendix
    A.1):

    .. math::
        N_k \leftarrow \gamma N_k + (1 - \gamma) n_k, \quad
        m_k \leftarrow \gamma m_k + (1 - \gamma) \sum_i h_i, \quad e_k = m_k / N_k.

    A code whose :math:`N_k` falls below ``revival_threshold``, as a fraction of the mean usage, is reset to a random
    vector of the batch, with a little noise (`NOISE`). The metric ``perplexity``, the exponential of the entropy of
    code usage in the batch (1 to K), measures how many codes are in use. All statistics are computed over the global
    batch.

    The codebook counts as collapsed if nearly all vectors have used only a few codes for as long as it takes to revive
    the others, plus `PATIENCE` steps; `check_collapse` then stops training. "A few" means 1/50 of the codes (or of the
    vectors of the batch, if these are fewer), but at least two, or one if the codebook has fewer than ten. Before that,
    the model is `possibly_collapsed`.

    Args:
        channels: number of latent channels c.
        num_codes: number of codes K.
        commitment: weight of the commitment penalty.
        decay: decay :math:`\gamma` of the moving averages.
        revival_threshold: usage below which a code is reset, as a fraction of the mean usage.
    """

    PATIENCE = 200
    """Number of steps with a collapsed codebook, beyond the time to revive unused codes, after which training stops."""
    COLLAPSE_FRACTION = 0.98
    """Fraction of vectors assigned to a few codes that counts as a collapse; below 1, since revived codes get some
    vectors."""

    NOISE = 0.01
    """Standard deviation of the noise on a reset code, relative to that of the vectors. Without noise, codes that are
    reset to equal vectors would differ by rounding only, and rounding, which depends on the number of processes, would
    decide which of them is nearest. Dhariwal et al. (2020), "Jukebox", add noise of this size in their released code
    (https://arxiv.org/abs/2005.00341)."""

    codebook: Tensor
    counts: Tensor
    sums: Tensor
    started: Tensor
    alone: Tensor
    """Number of consecutive steps, up to now, where nearly all vectors used only a few codes."""

    def __init__(
        self,
        channels: int = 4,
        num_codes: int = 256,
        commitment: float = 0.25,
        decay: float = 0.99,
        revival_threshold: float = 0.03,
    ) -> None:
        super().__init__(channels)
        if num_codes < 2 or not commitment >= 0 or not 0 <= decay < 1 or not 0 <= revival_threshold < 1:
            raise UserError(
                f"model.bottleneck with num_codes={num_codes}, commitment={commitment}, decay={decay},"
                f" revival_threshold={revival_threshold} needs at least 2 codes, a commitment of at least 0, and decay"
                " and revival_threshold in [0, 1)."
            )
        self.num_codes, self.commitment, self.decay = num_codes, commitment, decay
        self.revival_threshold = revival_threshold
        self.register_buffer("codebook", torch.randn(num_codes, channels))
        self.register_buffer("counts", torch.zeros(num_codes))
        self.register_buffer("sums", torch.zeros(num_codes, channels))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        self.register_buffer("alone", torch.zeros((), dtype=torch.int64))
        self.few = max(2, num_codes // 50) if num_codes >= 10 else 1

    def forward(self, h: Tensor, rng: RandomSource) -> tuple[Tensor, dict[str, Tensor]]:
        h = at_least_float32(h)
        vectors = h.movedim(1, -1).flatten(0, -2)
        if self.training:
            with torch.no_grad():
                self._initialize(vectors, rng)
        indices = self.nearest(vectors)
        quantized = self._codes(indices, h)
        commitment = (h - quantized).square().flatten(1).mean(1)
        metrics = {"penalty": self.commitment * commitment, "commitment": commitment}
        with torch.no_grad():
            # Like F.one_hot(indices).sum(0), which reads the indices on the host.
            usage = all_reduce_sum(h.new_zeros(self.num_codes).index_add_(0, indices, h.new_ones(len(indices))))
            metrics["perplexity"] = perplexity(usage).expand(len(h))
            if self.training:
                self._update(vectors, indices, usage, rng)
        return h + (quantized - h).detach(), metrics

    def mode(self, h: Tensor) -> Tensor:
        """Return the vectors before quantisation. `quantize` maps generated vectors to codes later."""
        return at_least_float32(h)

    def quantize(self, z: Tensor) -> Tensor:
        z = at_least_float32(z)
        return self._codes(self.nearest(z.movedim(1, -1).flatten(0, -2)), z)

    def nearest(self, vectors: Tensor) -> Tensor:
        """Find the index of the nearest code, (m,), for each vector (m, c)."""
        with torch.no_grad():
            # Not |h|^2 - 2 h^T e + |e|^2, whose rounding error may exceed the difference of two distances.
            return torch.cdist(vectors, self.codebook, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)

    def _codes(self, indices: Tensor, like: Tensor) -> Tensor:
        """Look up the codes of all positions, shaped like ``like`` (n, c, h, w)."""
        return self.codebook[indices].view(like.movedim(1, -1).shape).movedim(-1, 1)

    def check_collapse(self) -> None:
        if self.alone >= self._max_steps_alone:
            raise TrainingStopped(
                f"The codebook has collapsed: for {int(self.alone)} steps, nearly all vectors used at most"
                f" {self.few} of {self.num_codes} codes, although unused codes were reset",
                "Try a lower learning rate (model.optimizer.lr) or a smaller model.bottleneck.commitment.",
            )

    @property
    def possibly_collapsed(self) -> bool:
        return bool(0 < self.alone < self._max_steps_alone)

    @property
    def _max_steps_alone(self) -> float:
        """Number of consecutive steps with only a few codes in use that counts as a collapse."""
        # Number of steps until a count decays from 1 to the revival threshold.
        threshold = self.revival_threshold
        steps_to_revival = math.log(threshold) / math.log(self.decay) if threshold and self.decay else 0.0
        return steps_to_revival + self.PATIENCE

    def _initialize(self, vectors: Tensor, rng: RandomSource) -> None:
        """Set the codes to vectors of the first batch. There are no branches, to avoid a device synchronisation."""
        fresh = self._random_vectors(vectors, rng)
        self.codebook.copy_(torch.where(self.started, self.codebook, fresh))
        self.counts.copy_(torch.where(self.started, self.counts, 1.0))
        self.sums.copy_(torch.where(self.started, self.sums, fresh))
        self.started.fill_(True)

    def _update(self, vectors: Tensor, indices: Tensor, usage: Tensor, rng: RandomSource) -> None:
        """Update the moving averages, reset unused codes, and detect collapse."""
        sums = all_reduce_sum(torch.zeros_like(self.sums).index_add_(0, indices, vectors))
        # In units of the mean usage, so that `revival_threshold` does not depend on batch size or number of codes.
        mean_usage = usage.sum() / self.num_codes
        self.counts.lerp_(usage / mean_usage, 1 - self.decay)
        self.sums.lerp_(sums / mean_usage, 1 - self.decay)
        dead = self.counts < self.revival_threshold
        fresh = self._random_vectors(vectors, rng)
        self.counts.copy_(torch.where(dead, 1.0, self.counts))
        self.sums.copy_(torch.where(dead[:, None], fresh, self.sums))
        self.codebook.copy_(self.sums / self.counts[:, None])
        few = min(self.few, max(2, len(vectors) // len(rng) * rng.total // 50))
        collapsed = usage.topk(few).values.sum() > self.COLLAPSE_FRACTION * usage.sum()
        self.alone.copy_(torch.where(collapsed, self.alone + 1, 0))

    def _random_vectors(self, vectors: Tensor, rng: RandomSource) -> Tensor:
        """Draw one random vector per code from the global batch, (K, c), and add noise to it.

        All processes draw the same vectors.
        """
        per_code = RandomSource.for_batch(rng.generator, self.num_codes)
        per_image = len(vectors) // len(rng)
        indices = per_code.integers(per_image * rng.total).to(vectors.device) - per_image * rng.start
        local = (indices >= 0) & (indices < len(vectors))
        found = torch.where(local[:, None], vectors[indices.clamp(0, len(vectors) - 1)], 0.0)
        drawn = all_reduce_sum(found)
        return drawn + self.NOISE * drawn.std(0) * per_code.normal((self.channels,)).to(drawn)


def perplexity(usage: Tensor) -> Tensor:
    r"""Compute the perplexity :math:`\exp(-\sum_k p_k \log p_k)` of counts: the effective number of codes in use."""
    return torch.special.entr(usage / usage.sum()).sum().exp()
