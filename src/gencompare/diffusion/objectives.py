r"""Training objectives: per-sample losses for a denoiser.

`WeightedMSE` is the loss of most diffusion models; its docstring states the equation and which part computes each
factor. The variational bounds are in `variational_objectives`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from gencompare.diffusion.data_likelihood import DataLikelihood
from gencompare.diffusion.denoiser import Cond, Denoiser
from gencompare.diffusion.parameterizations import Parameterization
from gencompare.diffusion.schedules import NoiseSchedule, ScheduleValues
from gencompare.diffusion.times import LogNormalTimes, TimeDistribution, UniformTimes
from gencompare.distributed import gather_global_batch
from gencompare.errors import UserError, check_non_negative, check_positive
from gencompare.rng import RandomSource


class Objective(ABC):
    """Base class of training losses."""

    trains_schedule: ClassVar[bool] = False
    """Whether the loss may train a learned schedule. Only bounds on the likelihood can do so: other losses are
    minimised by a degenerate schedule with almost no noise or almost only noise."""
    trains_variance: ClassVar[bool] = False
    """Whether the loss trains a learned reverse variance. A squared error does not depend on the variance."""
    trains_denoiser: ClassVar[bool] = True
    """Whether the prediction becomes that of a denoiser, :math:`E[x_0 | x_t]`, which gives the score of p(x_t)."""
    needs_interval: ClassVar[bool] = False
    """Whether the network receives a time interval, ``cond["interval"]``."""

    def check(self, schedule: NoiseSchedule, parameterization: Parameterization) -> None:  # noqa: B027
        """Raise `UserError` if the objective cannot train ``parameterization`` under ``schedule``."""

    def check_patches(self) -> None:
        """Raise `UserError` unless the loss of a crop is an estimate of the loss of these pixels in a whole image."""
        raise UserError(
            f"model.patches trains on crops, but {type(self).__name__} is a loss of whole images: use"
            " model/objective=simple, or model/patches=null."
        )

    @abstractmethod
    def __call__(self, denoiser: Denoiser, x0: Tensor, cond: Cond, rng: RandomSource) -> dict[str, Tensor]:
        """Compute per-image metrics, including the ``loss`` to minimise.

        Args:
            denoiser: the model to train.
            x0: images, (n, C, H, W).
            cond: conditions passed to the network.
            rng: source of all random numbers.

        Returns:
            Metrics by name, including ``loss``, each (n,).
        """

    def check_likelihood(self, likelihood: DataLikelihood, schedule: NoiseSchedule) -> None:  # noqa: B027
        """Raise `UserError` if the objective cannot train with the decoder of ``likelihood``."""

    def check_conditions(self, *, is_conditional: bool, has_null_cond: bool) -> None:  # noqa: B027
        """Raise `UserError` if the objective needs other conditions.

        Args:
            is_conditional: whether the network receives a class or an embedding.
            has_null_cond: whether it is also trained without them (label dropout).
        """

    def with_drop_cond(self, drop_cond: Callable[[Cond], Cond]) -> Objective:
        """Return this objective with the function that replaces classes and embeddings with their null values, which
        only guidance in the target uses."""
        return self

    def with_likelihood(self, likelihood: DataLikelihood) -> Objective:
        """Return this objective with the data and their decoder set, which only bounds on the likelihood use."""
        return self

    def at_progress(self, progress: float) -> Objective:
        """Return this objective after a fraction ``progress`` of training, in [0, 1], if it changes over training."""
        return self


class Weighting(ABC):
    r"""Base class of weights :math:`w(\lambda) \ge 0` on the squared error *in eps*, for any network output.

    Since :math:`SNR\, \|x_0 - \hat x_0\|^2 = \|\epsilon - \hat\epsilon\|^2`, the weight on the error in x_0 is w SNR
    and, if alpha^2 + sigma^2 = 1, the weight on the error in v is w SNR / (1 + SNR). Changing only the parameterisation
    therefore never changes the loss.
    """

    @abstractmethod
    def __call__(self, at: ScheduleValues) -> Tensor:
        r"""Compute the weight :math:`w(\lambda)`.

        Args:
            at: the schedule values at the time of each image.

        Returns:
            The weight, shaped like ``at.log_snr``.
        """


@dataclass(frozen=True)
class SimpleWeighting(Weighting):
    r""":math:`w = 1`: L_simple (Ho et al. 2020, eq. 14, https://arxiv.org/abs/2006.11239)."""

    def __call__(self, at: ScheduleValues) -> Tensor:
        return torch.ones_like(at.log_snr)


@dataclass(frozen=True)
class UniformVWeighting(Weighting):
    r""":math:`w = 1 + 1 / SNR`: the unweighted squared error in v.

    This is the "SNR + 1" weighting of the error in x_0 (Salimans and Ho 2022, section 4,
    https://arxiv.org/abs/2202.00512).
    """

    def __call__(self, at: ScheduleValues) -> Tensor:
        return 1 + torch.exp(-at.log_snr)


@dataclass(frozen=True)
class MinSNRWeighting(Weighting):
    r"""Min-SNR: :math:`w = \min(1, \gamma / SNR)`, which weights the error in x_0 by :math:`\min(SNR, \gamma)`.

    Hang et al. (2023), "Efficient Diffusion Training via Min-SNR Weighting Strategy", section 3.4,
    https://arxiv.org/abs/2303.09556.

    Args:
        gamma: SNR above which the weight decreases (5 in the paper).
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        check_positive("weighting.gamma", self.gamma)

    def __call__(self, at: ScheduleValues) -> Tensor:
        return (self.gamma * torch.exp(-at.log_snr)).clamp(max=1.0)


@dataclass(frozen=True)
class EDMWeighting(Weighting):
    r""":math:`w = 1 + 1 / (d^2 SNR)` with d = ``sigma_data``.

    If alpha = 1, the weight on the error in x_0 is :math:`(\sigma^2 + d^2) / (\sigma d)^2`, which gives the unweighted
    squared error of a network with EDM's preconditioning. With d = 1, this is `UniformVWeighting`. Karras et al.
    (2022), "Elucidating the Design Space", table 1, https://arxiv.org/abs/2206.00364.

    Args:
        sigma_data: d, the standard deviation of the data.
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        check_positive("weighting.sigma_data", self.sigma_data)

    def __call__(self, at: ScheduleValues) -> Tensor:
        return 1 + torch.exp(-at.log_snr) / self.sigma_data**2


@dataclass(frozen=True)
class P2Weighting(Weighting):
    r""":math:`w = 1 / (k + SNR)^\gamma`.

    Choi et al. (2022), "Perception Prioritized Training of Diffusion Models", eq. 8, https://arxiv.org/abs/2204.00227.

    Args:
        gamma: how strongly high SNRs are down-weighted; 0 gives `SimpleWeighting`.
        k: bounds the weight at low SNR by :math:`k^{-\gamma}`.
    """

    gamma: float = 1.0
    k: float = 1.0

    def __post_init__(self) -> None:
        check_non_negative("weighting.gamma", self.gamma)
        check_positive("weighting.k", self.k)

    def __call__(self, at: ScheduleValues) -> Tensor:
        return (self.k + torch.exp(at.log_snr)) ** -self.gamma


@dataclass(frozen=True)
class UniformVelocityWeighting(Weighting):
    r""":math:`w = (\sigma \lambda' / 2)^2`: the unweighted squared error in the velocity.

    The velocity is :math:`\alpha' x_0 + \sigma' \epsilon`. For rectified flow, the weight is
    :math:`(1 + \sigma / \alpha)^2`. Lipman et al. (2023), "Flow Matching", eq. 9, https://arxiv.org/abs/2210.02747.
    """

    def __call__(self, at: ScheduleValues) -> Tensor:
        return (0.5 * at.sigma * at.dlog_snr_dt) ** 2


@dataclass(frozen=True)
class LikelihoodWeighting(Weighting):
    r""":math:`w = g^2 / \sigma^2 = -\lambda'`: a bound on the likelihood with uniform times.

    This weights the squared error of the score by g^2. The weight is large near t_min, so the loss has a higher
    variance than with other weightings. Song et al. (2021), "Maximum Likelihood Training of Score-Based Diffusion
    Models", eq. 7 and theorem 1, https://arxiv.org/abs/2101.09258.
    """

    def __call__(self, at: ScheduleValues) -> Tensor:
        return -at.dlog_snr_dt


def check_trains_last_step(weighting: Weighting, schedule: NoiseSchedule, parameterization: Parameterization) -> None:
    """Raise `UserError` if ``weighting`` gives no weight to the network output at a last step of pure noise.

    Sampling starts from this step. Its error in eps is 0 whatever the network predicts, so only a weighting that grows
    like 1 / SNR trains it.
    """
    if not schedule.ends_in_pure_noise:
        return
    at = schedule.at(torch.tensor(schedule.t_max, device=schedule.device, dtype=schedule.dtype))
    if not float(weighting(at) * parameterization.eps_jacobian(at).square()) > 1e-6:
        raise UserError(
            f"{type(schedule).__name__} ends in pure noise (zero terminal SNR), where {type(weighting).__name__} has no"
            " weight, so the step that sampling starts with would never be trained: use model/objective=uniform_v."
        )


class Coupling(ABC):
    """Base class of couplings, which pair a batch of images with noise."""

    @abstractmethod
    def __call__(self, x0: Tensor, eps: Tensor) -> Tensor:
        """Permute ``eps`` to pair it with ``x0``.

        Args:
            x0: images, (n, C, H, W).
            eps: noise, (n, C, H, W).

        Returns:
            The permuted noise, (n, C, H, W).
        """

    @torch.no_grad()
    def draw(self, x0: Tensor, rng: RandomSource) -> Tensor:
        """Draw the noise of the images ``x0`` (n, C, H, W) on this process, paired over the global batch.

        All processes pair the same global batch, and each keeps its rows. If ``rng`` is not divided among processes, as
        under a plain Trainer, each process pairs its own batch.
        """
        eps = rng.whole_batch().normal(x0.shape[1:]).to(x0.dtype)
        paired = self(gather_global_batch(x0, rng.start, rng.total), eps)
        return paired[rng.start : rng.stop]


@dataclass(frozen=True)
class IndependentCoupling(Coupling):
    r"""Images and noise are independent: :math:`q(x_0)\, N(\epsilon; 0, I)`."""

    def __call__(self, x0: Tensor, eps: Tensor) -> Tensor:
        return eps

    def draw(self, x0: Tensor, rng: RandomSource) -> Tensor:
        return rng.normal(x0.shape[1:]).to(x0.dtype)


@dataclass(frozen=True)
class MinibatchOT(Coupling):
    r"""Minibatch optimal transport: the pairing that minimises :math:`\sum \|x_0 - \epsilon\|^2`, exactly.

    Paths from noise to image cross less, so fewer sampling steps suffice. The network no longer estimates the score of
    p(x_t), so use deterministic samplers. The global batch is paired, on every process, so training does not depend on
    the number of processes. The cost is O(n^3) on the CPU, about 10 ms for 256 images. Tong et al. (2023), "Improving
    and Generalizing Flow-Based Generative Models with Minibatch Optimal Transport", section 3.2,
    https://arxiv.org/abs/2302.00482. (Their code draws pairs of the optimal plan with replacement, so that a batch
    contains some images twice.)
    """

    @torch.no_grad()
    def __call__(self, x0: Tensor, eps: Tensor) -> Tensor:
        # ||x_0||^2 and ||eps||^2 have the same sum for every pairing.
        cost = -(x0.flatten(1).double() @ eps.flatten(1).double().T)
        _, column = linear_sum_assignment(cost.cpu().numpy())
        return eps[torch.as_tensor(column, device=eps.device)]


@dataclass(frozen=True)
class NoisyBatch:
    r""":math:`x_t = \alpha_t x_0 + \sigma_t \epsilon` and its terms."""

    x0: Tensor
    eps: Tensor
    t: Tensor
    at: ScheduleValues
    x_t: Tensor

    @classmethod
    def make(cls, x0: Tensor, eps: Tensor, t: Tensor, at: ScheduleValues) -> NoisyBatch:
        return cls(x0, eps, t, at, at.alpha * x0 + at.sigma * eps)

    def squared_eps_error(self, denoiser: Denoiser, out: Tensor) -> Tensor:
        r"""Compute :math:`(\epsilon - \epsilon_\theta)^2` elementwise from the network output.

        The error in the output is multiplied by :math:`|d\epsilon / d\,out|`, which is better conditioned than
        subtracting two eps.
        """
        parameterization = denoiser.parameterization
        error = parameterization.target_channels(out) - parameterization.target(self.x0, self.eps, self.at)
        return (error * parameterization.eps_jacobian(self.at)).square()


@dataclass(frozen=True)
class WeightedMSE(Objective):
    r"""The weighted denoising loss

    .. math::
        L = E_{t, x_0, \epsilon}\, w(\lambda_t)\, \|\epsilon - \epsilon_\theta(x_t, t)\|^2 / D, \qquad
        x_t = \alpha_t x_0 + \sigma_t \epsilon,

    averaged over the D values of an image. Each factor comes from a separate part:

    - :math:`t \sim` ``times``: the distribution of training times;
    - :math:`\epsilon \sim N(0, I)`, paired with :math:`x_0` by ``coupling``;
    - :math:`\alpha_t, \sigma_t`, and the log-SNR :math:`\lambda_t`: the noise schedule of the denoiser;
    - :math:`\epsilon_\theta`: the network and its parameterisation. The error is taken in the quantity that the network
      predicts, where it is well conditioned, and converted to eps by :math:`|d\epsilon / d\,out|` (`NoisyBatch`);
    - :math:`w`: ``weighting``.

    Args:
        weighting: w, the weight of the squared error in eps.
        times: distribution of t.
        coupling: joint distribution of images and noise.
    """

    weighting: Weighting = field(default_factory=SimpleWeighting)
    times: TimeDistribution = field(default_factory=UniformTimes)
    coupling: Coupling = field(default_factory=IndependentCoupling)

    def check(self, schedule: NoiseSchedule, parameterization: Parameterization) -> None:
        check_trains_last_step(self.weighting, schedule, parameterization)
        if schedule.ends_in_pure_noise and isinstance(self.times, LogNormalTimes):
            raise UserError(
                f"{type(schedule).__name__} ends in pure noise (zero terminal SNR), which LogNormalTimes never draws:"
                " use model/objective=uniform_v."
            )

    def check_patches(self) -> None:
        # The noise that is paired with crops at one position would not be that of these pixels in a whole image.
        if not isinstance(self.coupling, IndependentCoupling):
            raise UserError(
                f"model.patches trains on crops, but {type(self.coupling).__name__} pairs whole images with noise: use"
                " model/objective=flow, or model/patches=null."
            )

    def __call__(self, denoiser: Denoiser, x0: Tensor, cond: Cond, rng: RandomSource) -> dict[str, Tensor]:
        t = self.times(denoiser.schedule, rng)
        eps = self.coupling.draw(x0, rng)
        batch = NoisyBatch.make(x0, eps, t, denoiser.schedule.at(t, x0))
        out = denoiser.output(batch.x_t, t, batch.at, cond)
        eps_mse = batch.squared_eps_error(denoiser, out).flatten(1).mean(1)
        return {"loss": self.weighting(batch.at).flatten() * eps_mse, "eps_mse": eps_mse.detach()}
