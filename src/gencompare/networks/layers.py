"""Layers shared by several networks: residual blocks, normalisation, and resampling with a low-pass filter."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.distributed import all_reduce_sum, differentiable_sum, world_size
from gencompare.errors import UserError

INSTANCE_NORM_EPS = 1e-5
"""Added to the variances in `InstanceNormPlus`, to avoid division by zero."""


def at_least_float32(x: Tensor) -> Tensor:
    """Cast 16-bit activations, as under autocast, to float32. float32 and float64 stay unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# Attention

FUSED_ATTENTION_MIN_TOKENS = 1024
"""From this many tokens, torch's kernel is as fast in 16 bits on a CPU as explicit products."""


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    r"""Compute :math:`\mathrm{softmax}(q k^T / \sqrt d)\, v` (Vaswani et al. 2017, "Attention is all you need", eq. 1,
    https://arxiv.org/abs/1706.03762).

    If ``causal``, query i sees keys 0 to i only. In 16 bits on a CPU these are explicit products, since the kernel of
    torch computes them in 32 bits there.

    Shapes: q, k, v (n, heads, tokens, d) -> (n, heads, tokens, d).
    """
    explicit = q.device.type == "cpu" and q.element_size() == 2 and k.shape[2] < FUSED_ATTENTION_MIN_TOKENS
    if not explicit:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    with torch.autocast("cpu", enabled=False):
        scores = (q * q.shape[-1] ** -0.5) @ k.mT
        if causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        return scores.softmax(-1) @ v


# Normalisation


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` with the statistics of the global batch in training.

    So training does not depend on the number of processes. (`torch.nn.SyncBatchNorm` needs GPUs.) Weights, buffers and,
    with a single process, results are those of `torch.nn.BatchNorm2d`.

    Shapes: (n, channels, H, W) -> (n, channels, H, W).
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        h = at_least_float32(x)
        count = all_reduce_sum(h.new_full((), h.numel() // h.shape[1]))
        mean = differentiable_sum(h.sum((0, 2, 3))) / count
        centred = h - mean[:, None, None]
        variance = differentiable_sum(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            assert self.momentum is not None
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class AdaptiveGroupNorm(nn.Module):
    r"""GroupNorm with a scale and shift that may depend on an embedding.

    .. math:: y = (1 + a(e)) \hat x + b(e)

    with :math:`a` and :math:`b` linear in :math:`e` and initialised to zero (Perez et al. 2018, "FiLM", eq. 1,
    https://arxiv.org/abs/1709.07871). If :math:`e` is the latent of a generator, this is Chen et al. 2019, "On Self
    Modulation for GANs" (https://arxiv.org/abs/1810.01365), eq. 2, with GroupNorm. No batch statistics are used, so the
    output for an image does not depend on the rest of the batch.

    Shapes: x (n, channels, H, W), e (n, embed_dim) -> (n, channels, H, W).

    Args:
        channels: number of channels.
        embed_dim: dimension of e; 0 gives a plain GroupNorm that ignores e.
    """

    def __init__(self, channels: int, embed_dim: int = 0) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(math.gcd(8, channels), channels)
        self.modulation = nn.Linear(embed_dim, 2 * channels) if embed_dim else None
        if self.modulation is not None:
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, e: Tensor | None = None) -> Tensor:
        x = self.norm(x)
        if self.modulation is None:
            return x
        scale, shift = self.modulation(e)[:, :, None, None].chunk(2, dim=1)
        return x * (1 + scale) + shift


class ClassConditionalGroupNorm(nn.Module):
    r"""GroupNorm with a scale and a shift per class, which replaces (class-conditional) batch norm in GANs.

    .. math:: y = a_c \hat x + b_c

    for class :math:`c` (Dumoulin et al. 2017, "A learned representation for artistic style", eq. 5,
    https://arxiv.org/abs/1610.07629). Unlike with batch norm, the output for an image does not depend on the rest of
    the batch. As in batch norm, there are 2 ``channels`` parameters (per class, if there are classes).

    Shapes: x (n, channels, H, W), label (n,) -> (n, channels, H, W).
    """

    def __init__(self, channels: int, num_classes: int = 0) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(math.gcd(8, channels), channels, affine=not num_classes)
        self.classes = nn.Embedding(num_classes, 2 * channels) if num_classes else None
        if self.classes is not None:
            nn.init.ones_(self.classes.weight[:, :channels])
            nn.init.zeros_(self.classes.weight[:, channels:])

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        x = self.norm(x)
        if self.classes is None:
            return x
        scale, shift = self.classes(label)[:, :, None, None].chunk(2, dim=1)
        return scale * x + shift


class InstanceNormPlus(nn.Module):
    r"""InstanceNorm++: instance normalisation that keeps the differences between the means of the channels.

    Channel :math:`k` of an image, with mean :math:`\mu_k` and standard deviation :math:`\sigma_k` over its pixels,
    becomes

    .. math:: \gamma_k \frac{h_k - \mu_k}{\sigma_k} + \alpha_k \frac{\mu_k - m}{v} + \beta_k

    where :math:`m` and :math:`v` are the mean and standard deviation of the :math:`\mu_k` over the channels.
    :math:`\gamma`, :math:`\alpha` and :math:`\beta` are linear in the condition vector :math:`c`. If :math:`c` is the
    one-hot noise level, each level has its own parameters: CondInstanceNorm++ (Song and Ermon 2019, "Generative
    modeling by estimating gradients of the data distribution", appendix A.1, https://arxiv.org/abs/1907.05600). With
    one level there is one set of parameters (Song and Ermon 2020, "Improved techniques for training score-based
    generative models", section 3.3, https://arxiv.org/abs/2006.09011).

    Shapes: h (n, channels, H, W), c (n, num_levels + emb_dim) -> (n, channels, H, W).

    Args:
        channels: number of channels, at least 2.
        num_levels: length of the one-hot noise level, the first entries of c. Its weights for gamma and alpha are
            initialised from N(1, 0.02^2), and those for beta to 0.
        emb_dim: length of the embedding of other conditions, the remaining entries of c.
    """

    def __init__(self, channels: int, num_levels: int = 1, emb_dim: int = 0) -> None:
        super().__init__()
        self.channels, self.num_levels = channels, num_levels
        self.level = nn.Linear(num_levels, 3 * channels, bias=False)
        nn.init.normal_(self.level.weight[: 2 * channels], 1, 0.02)
        nn.init.zeros_(self.level.weight[2 * channels :])
        self.conditions = nn.Linear(emb_dim, 3 * channels, bias=False) if emb_dim else None
        if self.conditions is not None:
            nn.init.normal_(self.conditions.weight, std=emb_dim**-0.5)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        modulation = self.level(c[:, : self.num_levels])
        if self.conditions is not None:
            modulation = modulation + self.conditions(c[:, self.num_levels :])
        gamma, alpha, beta = modulation[:, :, None, None].chunk(3, dim=1)
        mu = h.mean(dim=(2, 3), keepdim=True)
        v2, m = torch.var_mean(mu, dim=1, keepdim=True)
        normalized = F.group_norm(h, self.channels, eps=INSTANCE_NORM_EPS)  # one group per channel
        return gamma * normalized + alpha * (mu - m) * torch.rsqrt(v2 + INSTANCE_NORM_EPS) + beta


class NoNorm(nn.Module):
    """The identity, with the signature of `InstanceNormPlus`."""

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        return h


# Activations and residual blocks


class NormActivation(nn.Module):
    """`AdaptiveGroupNorm` followed by SiLU."""

    def __init__(self, channels: int, embed_dim: int = 0) -> None:
        super().__init__()
        self.norm = AdaptiveGroupNorm(channels, embed_dim)

    def forward(self, x: Tensor, e: Tensor | None = None) -> Tensor:
        return F.silu(self.norm(x, e))


class Activation(nn.Module):
    """Leaky ReLU without normalisation, for discriminators. It ignores the embedding e."""

    def forward(self, x: Tensor, e: Tensor | None = None) -> Tensor:
        return F.leaky_relu(x, 0.2)


def make_activation(channels: int, embed_dim: int, normalize: bool) -> nn.Module:
    """Return `NormActivation` if ``normalize``, otherwise `Activation`."""
    return NormActivation(channels, embed_dim) if normalize else Activation()


def he_normal_(layer: nn.Conv2d, scale: float = 1.0) -> None:
    r"""Initialise weights from :math:`N(0, \mathrm{scale}^2 \cdot 2 / ((1 + 0.2^2) \cdot \mathrm{fan\_in}))`, biases to
    zero.

    This preserves the variance of activations through leaky ReLUs of slope 0.2 (He et al. 2015, "Delving deep into
    rectifiers", eq. 15, https://arxiv.org/abs/1502.01852). A ``scale`` well below 1 for the last layer of a residual
    branch makes a block start close to its shortcut (Zhang et al. 2019, "Fixup initialization",
    https://arxiv.org/abs/1901.09321).
    """
    nn.init.kaiming_normal_(layer.weight, a=0.2)
    layer.weight.data.mul_(scale)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]


class ResBlock(nn.Module):
    r"""Pre-activation residual block, skip(x) + f(x), with optional resampling.

    f is activation, [nearest-neighbour upsampling], 3x3 convolution, activation, [2x2 average pooling], 3x3
    convolution. This is the block of Miyato et al. 2018, "Spectral normalization for GANs", figure 8
    (https://arxiv.org/abs/1802.05957), except that pooling comes before the last convolution, which is then four times
    cheaper.

    Shapes: x (n, channels_in, H, W), e (n, embed_dim) -> (n, channels_out, H', W').

    Args:
        channels_in: channels of the input.
        channels_out: channels of the output.
        embed_dim: dimension of the embedding e that modulates the normalisation; 0 for none.
        resample: ``up`` doubles the resolution, ``down`` halves it, ``none`` keeps it.
        normalize: use GroupNorm and SiLU instead of a leaky ReLU alone.
    """

    def __init__(
        self, channels_in: int, channels_out: int, embed_dim: int = 0, *, resample: str = "none", normalize: bool = True
    ) -> None:
        super().__init__()
        self.resample = resample
        self.act1 = make_activation(channels_in, embed_dim, normalize)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.act2 = make_activation(channels_out, embed_dim, normalize)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        has_projection = channels_in != channels_out
        self.skip = nn.Conv2d(channels_in, channels_out, 1, bias=False) if has_projection else nn.Identity()
        if not normalize:
            # With PyTorch's default initialisation the signal would shrink in every layer.
            he_normal_(self.conv1)
            he_normal_(self.conv2, scale=0.1)
            if has_projection:
                nn.init.kaiming_normal_(self.skip.weight, nonlinearity="linear")  # type: ignore[arg-type]

    def forward(self, x: Tensor, e: Tensor | None = None) -> Tensor:
        h = self.act1(x, e)
        if self.resample == "up":
            h, x = upsample_nearest(h), upsample_nearest(x)
        h = self.act2(self.conv1(h), e)
        if self.resample == "down":
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        return self.skip(x) + self.conv2(h)


def upsample_nearest(x: Tensor) -> Tensor:
    """Double the resolution by repeating pixels."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


# Resampling with a FIR filter


class FIRFilter(nn.Module):
    """Base class for resampling with the separable filter k k^T / sum(k)^2, given its taps k."""

    kernel: Tensor

    def __init__(self, taps: Sequence[float]) -> None:
        super().__init__()
        if len(taps) < 2 or len(taps) % 2 or list(taps) != list(taps)[::-1] or not sum(taps) > 0:
            raise UserError(
                f"A resampling filter must be an even number of symmetric taps with a positive sum, such as [1, 1] or"
                f" [1, 3, 3, 1], not {list(taps)}."
            )
        k = torch.tensor([float(tap) for tap in taps])
        self.register_buffer("kernel", (torch.outer(k, k) / k.sum() ** 2)[None, None], persistent=False)
        self.padding = len(taps) // 2 - 1

    def depthwise(self, channels: int) -> Tensor:
        """Return the kernel of a depthwise convolution, (channels, 1, k, k)."""
        return self.kernel.expand(channels, -1, -1, -1)


class FIRDownsample(FIRFilter):
    """Filter, then keep every second pixel: (n, C, H, W) -> (n, C, H/2, W/2), with zero padding.

    Constant images keep their value away from the border.
    """

    def forward(self, x: Tensor) -> Tensor:
        c = x.shape[1]
        return F.conv2d(x, self.depthwise(c), stride=2, padding=self.padding, groups=c)


class FIRUpsample(FIRFilter):
    """Insert zeros between the pixels, filter, and multiply by 4: (n, C, H, W) -> (n, C, 2 H, 2 W).

    This is 4 times the transpose of `FIRDownsample`. Constant images keep their value away from the border.
    """

    def forward(self, x: Tensor) -> Tensor:
        c = x.shape[1]
        return F.conv_transpose2d(x, 4 * self.depthwise(c), stride=2, padding=self.padding, groups=c)


class FIRConvDownsample(FIRFilter):
    """Filter, then apply a 3x3 convolution with stride 2: (n, C, H, W) -> (n, channels_out, H/2, W/2).

    The image is padded once, before the filter, as in StyleGAN2's ``conv_downsample_2d`` (Karras et al. 2020).
    """

    def __init__(self, channels_in: int, channels_out: int, taps: Sequence[float]) -> None:
        super().__init__(taps)
        self.conv = nn.Conv2d(channels_in, channels_out, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        c = x.shape[1]
        return self.conv(F.conv2d(x, self.depthwise(c), padding=self.padding + 1, groups=c))
