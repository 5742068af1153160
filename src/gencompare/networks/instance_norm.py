"""The normalisation of NCSN."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-5
"""Added to every variance."""


class InstanceNormPlus(nn.Module):
    r"""InstanceNorm++: each feature map normalised by itself, and the shift between maps that this takes away put back.

    Map k of an image, with mean mu_k and standard deviation sigma_k over its pixels, becomes

        gamma_k (h_k - mu_k) / sigma_k + alpha_k (mu_k - m) / v + beta_k,

    where m and v are mean and standard deviation of the mu_k over the maps. gamma, alpha and beta are linear in what
    the network is told. With the noise level as one of ``levels`` unit vectors, each level has its own: this is
    CondInstanceNorm++ (Song and Ermon 2019, "Generative modeling by estimating gradients of the data distribution",
    appendix A.1). With one level there is one set of them (Song and Ermon 2020, "Improved techniques for training
    score-based generative models", section 3.3).

    Shapes: h (n, channels, H, W), told (n, levels + emb_dim) -> (n, channels, H, W).

    Args:
        channels: at least 2.
        levels: unit vectors in the first places of ``told``; gamma and alpha of each start at N(1, 0.02^2), beta at 0.
        emb_dim: further numbers of ``told``: conditions, which add to the three.
    """

    def __init__(self, channels: int, levels: int = 1, emb_dim: int = 0) -> None:
        super().__init__()
        self.channels, self.levels = channels, levels
        self.level = nn.Linear(levels, 3 * channels, bias=False)
        nn.init.normal_(self.level.weight[: 2 * channels], 1, 0.02)
        nn.init.zeros_(self.level.weight[2 * channels :])
        self.conditions = nn.Linear(emb_dim, 3 * channels, bias=False) if emb_dim else None
        if self.conditions is not None:
            nn.init.normal_(self.conditions.weight, std=emb_dim**-0.5)

    def forward(self, h: Tensor, told: Tensor) -> Tensor:
        modulation = self.level(told[:, : self.levels])
        if self.conditions is not None:
            modulation = modulation + self.conditions(told[:, self.levels :])
        gamma, alpha, beta = modulation[:, :, None, None].chunk(3, dim=1)
        means = h.mean(dim=(2, 3), keepdim=True)
        v2, m = torch.var_mean(means, dim=1, keepdim=True)
        normal = F.group_norm(h, self.channels, eps=EPS)  # as many groups as maps: each by itself
        return gamma * normal + alpha * (means - m) * torch.rsqrt(v2 + EPS) + beta


class NoNorm(nn.Module):
    """The identity, in the place of a normalisation."""

    def forward(self, h: Tensor, told: Tensor) -> Tensor:
        return h
