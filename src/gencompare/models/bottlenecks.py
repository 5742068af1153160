r"""What stands between encoder and decoder of an autoencoder: how its latents are kept simple.

Latents are small images (n, c, h, w). A bottleneck turns what the encoder gives into latents for the decoder, and says
what that costs; without noise, `point` gives the latents that stand for an image, and `settled` what the decoder makes
of latents from elsewhere.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.distributed import all_reduce_sum
from gencompare.errors import TrainingStopped, UserError
from gencompare.rng import RandomSource


class Bottleneck(nn.Module, ABC):
    """Args: channels: c, of the latents."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels < 1:
            raise UserError(f"model.bottleneck.channels={channels}: latents need at least 1 channel.")
        self.channels = channels

    @property
    def encoded_channels(self) -> int:
        """Channels that the encoder gives."""
        return self.channels

    @abstractmethod
    def forward(self, h: Tensor, draws: RandomSource) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents for the decoder (n, c, h, w), and figures (n,), of which ``penalty`` is added to the loss. Where the
        module trains, this may also update what it learns without a gradient."""

    @abstractmethod
    def point(self, h: Tensor) -> Tensor:
        """The latents (n, c, h, w) that stand for an image: a function of what the encoder gives alone."""

    def settled(self, z: Tensor) -> Tensor:
        """What the decoder is given in place of latents ``z`` from elsewhere."""
        return z

    def check(self) -> None:
        """Raises `UserError` where training cannot go on in any sensible way."""

    @property
    def doubtful(self) -> bool:
        """Whether the last step may have been the start of that."""
        return False


class GaussianPosterior(Bottleneck):
    r"""q(z | x) = N(mu, diag sigma^2), held a little towards N(0, I): z = mu + sigma eps.

    penalty = ``weight`` KL(q || N(0, I)), in nats per latent number. Rombach et al. (2022), "High-resolution image
    synthesis with latent diffusion models", appendix G, "KL-reg": a weight so small that the latents keep their
    information, and no more than their scale is bounded.
    """

    LIMITS = (-30.0, 20.0)
    """Bounds of log sigma^2: a sigma of 0 or infinity has no gradient."""

    def __init__(self, channels: int = 4, weight: float = 1e-3) -> None:
        super().__init__(channels)
        if weight < 0:
            raise UserError(f"model.bottleneck.weight={weight}: it cannot be negative.")
        self.weight = weight

    @property
    def encoded_channels(self) -> int:
        return 2 * self.channels

    def forward(self, h: Tensor, draws: RandomSource) -> tuple[Tensor, dict[str, Tensor]]:
        mean, log_var = self._moments(h)
        z = mean + (0.5 * log_var).exp() * draws.normal(tuple(mean.shape[1:])).to(mean)
        kl = 0.5 * (mean.square() + log_var.exp() - log_var - 1).flatten(1).mean(1)
        return z, {"penalty": self.weight * kl, "kl": kl}

    def point(self, h: Tensor) -> Tensor:
        return self._moments(h)[0]

    def _moments(self, h: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_var = h.float().chunk(2, dim=1)
        return mean, log_var.clamp(*self.LIMITS)


class VectorQuantizer(Bottleneck):
    r"""Every latent vector is replaced by the nearest of K codes (van den Oord et al. 2017, "Neural discrete
    representation learning", eq. 1 and 2), whose gradient is that of the vector itself (straight through).

    penalty = ``commitment`` mean (h - sg[e])^2. The codes are no parameters: each is the moving mean of the vectors
    that chose it (their appendix A.1),

        N_k <- decay N_k + (1 - decay) n_k,   m_k <- decay m_k + (1 - decay) sum h,   e_k = m_k / N_k.

    A code that is hardly chosen any more, N_k < ``revive`` (a share of the mean use), is set on a random vector of the
    batch. ``perplexity`` = exp(entropy of the codes' shares in the batch), 1 to K, says how many are in use. All of it
    is of the whole batch, however many processes share it.

    `check` raises `UserError` when the codebook has collapsed: a fiftieth of the codes, or of the batch's vectors where
    these are fewer (at least two; one of fewer than ten codes), had nearly all vectors for so long that the others were
    revived, and for `PATIENCE` steps more. Until then it is `doubtful`.
    """

    PATIENCE = 200
    """Training steps."""
    NEARLY_ALL = 0.98
    """Share of a batch's vectors; revived codes are set on some of them, and may be chosen by these."""

    codebook: Tensor
    counts: Tensor
    sums: Tensor
    started: Tensor
    alone: Tensor

    def __init__(
        self,
        channels: int = 4,
        codes: int = 256,
        commitment: float = 0.25,
        decay: float = 0.99,
        revive: float = 0.03,
    ) -> None:
        super().__init__(channels)
        if codes < 2 or commitment < 0 or not 0 <= decay < 1 or not 0 <= revive < 1:
            raise UserError(
                f"model.bottleneck with codes={codes}, commitment={commitment}, decay={decay}, revive={revive}: at"
                " least 2 codes, no negative weight, and decay and revive in [0, 1)."
            )
        self.codes, self.commitment, self.decay, self.revive = codes, commitment, decay, revive
        self.register_buffer("codebook", torch.randn(codes, channels))
        self.register_buffer("counts", torch.zeros(codes))
        self.register_buffer("sums", torch.zeros(codes, channels))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        self.register_buffer("alone", torch.zeros((), dtype=torch.int64))
        self.few = max(2, codes // 50) if codes >= 10 else 1

    def forward(self, h: Tensor, draws: RandomSource) -> tuple[Tensor, dict[str, Tensor]]:
        h = h.float()
        vectors = h.movedim(1, -1).flatten(0, -2)
        if self.training:
            with torch.no_grad():
                self._start(vectors, draws)
        chosen = self.nearest(vectors)
        quantized = self.codebook[chosen].view(h.movedim(1, -1).shape).movedim(-1, 1)
        commitment = (h - quantized).square().flatten(1).mean(1)
        figures = {"penalty": self.commitment * commitment, "commitment": commitment}
        with torch.no_grad():
            used = all_reduce_sum(F.one_hot(chosen, self.codes).to(h).sum(0))
            figures["perplexity"] = perplexity(used).expand(len(h))
            if self.training:
                self._learn(vectors, chosen, used, draws)
        return h + (quantized - h).detach(), figures

    def point(self, h: Tensor) -> Tensor:
        """The vectors as they are: latents of another model are whitened vectors, and `settled` chooses their codes."""
        return h.float()

    def settled(self, z: Tensor) -> Tensor:
        z = z.float()
        chosen = self.nearest(z.movedim(1, -1).flatten(0, -2))
        return self.codebook[chosen].view(z.movedim(1, -1).shape).movedim(-1, 1)

    def nearest(self, vectors: Tensor) -> Tensor:
        """The index of the nearest code, (m,), to vectors (m, c)."""
        with torch.no_grad():
            return torch.cdist(vectors, self.codebook).argmin(1)

    def check(self) -> None:
        """Raises `UserError` where a few codes have served nearly all images, in spite of revival."""
        if self.alone >= self._enough:
            raise TrainingStopped(
                f"The codebook has collapsed: for {int(self.alone)} steps nearly all images fell on at most"
                f" {self.few} of {self.codes} codes, in spite of revival",
                "Try a lower learning rate (model.optimizer.lr) or a smaller model.bottleneck.commitment.",
            )

    @property
    def doubtful(self) -> bool:
        return bool(0 < self.alone < self._enough)

    @property
    def _enough(self) -> float:
        """Steps on few codes that are a collapse."""
        # From 1, a count falls to `revive` in log(revive) / log(decay) steps.
        revived = math.log(self.revive) / math.log(self.decay) if self.revive and self.decay else 0.0
        return revived + self.PATIENCE

    def _start(self, vectors: Tensor, draws: RandomSource) -> None:
        """The first batch's vectors are the first codes. (Without an `if`: the step need not wait for the device.)"""
        fresh = self._picked(vectors, draws)
        self.codebook.copy_(torch.where(self.started, self.codebook, fresh))
        self.counts.copy_(torch.where(self.started, self.counts, 1.0))
        self.sums.copy_(torch.where(self.started, self.sums, fresh))
        self.started.fill_(True)

    def _learn(self, vectors: Tensor, chosen: Tensor, used: Tensor, draws: RandomSource) -> None:
        total = all_reduce_sum(torch.zeros_like(self.sums).index_add_(0, chosen, vectors))
        # In units of the mean use, so that `revive` means the same for every batch and number of codes.
        unit = used.sum() / self.codes
        self.counts.lerp_(used / unit, 1 - self.decay)
        self.sums.lerp_(total / unit, 1 - self.decay)
        dead = self.counts < self.revive
        fresh = self._picked(vectors, draws)
        self.counts.copy_(torch.where(dead, 1.0, self.counts))
        self.sums.copy_(torch.where(dead[:, None], fresh, self.sums))
        self.codebook.copy_(self.sums / self.counts[:, None])
        few = min(self.few, max(2, len(vectors) // len(draws) * draws.total // 50))
        collapsed = used.topk(few).values.sum() > self.NEARLY_ALL * used.sum()
        self.alone.copy_(torch.where(collapsed, self.alone + 1, 0))

    def _picked(self, vectors: Tensor, draws: RandomSource) -> Tensor:
        """Random vectors of the whole batch, one a code, (K, c): the same for any number of processes."""
        whole = RandomSource.whole(draws.generator, self.codes)
        per_image = len(vectors) // len(draws)
        which = whole.integers(per_image * draws.total).to(vectors.device) - per_image * draws.start
        mine = (which >= 0) & (which < len(vectors))
        found = torch.where(mine[:, None], vectors[which.clamp(0, len(vectors) - 1)], 0.0)
        return all_reduce_sum(found)


def perplexity(used: Tensor) -> Tensor:
    """exp(-sum p log p) of counts: how many codes, evenly used, would be as spread as these."""
    return torch.special.entr(used / used.sum()).sum().exp()
