"""The Gaussian baseline: one Gaussian per class, fitted in closed form."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gencompare.dequantization import UNIFORM_DEQUANTIZATION, bin_width, log_bin_volume
from gencompare.errors import UserError, check_counts
from gencompare.generative_model import Cond, DataSpec, GenerativeModel, LikelihoodEstimate, unpack_batch
from gencompare.rng import RandomSource, draw_normal

RIDGES = (0.0, *(10.0 ** (k / 2) for k in range(-12, 1)))
"""Candidate ridges in units of x^2: 0, and 1e-6 to 1 in steps of half a decade. Validation images select one."""
MIN_VARIANCE = 1e-10
"""Minimum variance in any direction; only continuous data can have directions without variance."""
LOG2 = math.log(2)


class GaussianBaseline(GenerativeModel):
    r"""One Gaussian per class, :math:`p(x) = \sum_k \pi_k N(x; m_k, S_k)`, or :math:`p(x | k)` if conditional.

    The model is fitted to the pixels without padding by maximum likelihood in closed form, after uniform
    dequantisation, which adds :math:`\delta^2 / 12` to each variance (:math:`\delta = 2 / (L - 1)` the distance between
    values), so constant pixels do not make the covariance singular. A ridge common to all classes, selected by the
    likelihood of validation images, is added as well: with fewer images than about twice the number of pixels, the
    smallest eigenvalues are far too small.

    A covariance is stored as :math:`S = W^T W + s I`. The rows of W are scaled leading eigenvectors, and s is the mean
    of the other eigenvalues: the maximum-likelihood solution of probabilistic PCA (Tipping & Bishop 1999, eqs. 7 and
    8). This is the full covariance if W has as many rows as there are pixels, which ``max_parameters`` limits (64 MB by
    default: full for ten classes of 28x28 greyscale images; 546 of 3,072 directions per class for CIFAR-10).

    Args:
        spec: shape, classes and value range of the data.
        conditional: whether to sample and score given the class; otherwise the class is sampled and marginalised.
        per_class: whether to fit one Gaussian per class. If False, or if the data have no labels, one is fitted to all
            images.
        max_parameters: maximum number of entries in all W together.
        kwargs: see `TrainedModel`.
    """

    closed_form = True

    def __init__(
        self,
        spec: DataSpec,
        *,
        conditional: bool = False,
        per_class: bool = True,
        max_parameters: int = 2**24,
        **kwargs: Any,
    ) -> None:
        super().__init__(spec, conditional=conditional, **kwargs)
        if conditional and not per_class:
            raise UserError("model.conditional=true needs model.per_class=true: a single Gaussian has no classes.")
        check_counts("model", max_parameters=max_parameters)
        # The first training step fits everything in closed form.
        self.automatic_optimization = False
        self.num_components = spec.num_classes if per_class and spec.num_classes else 1
        self.rank = max(1, min(spec.num_values, max_parameters // (self.num_components * spec.num_values)))
        self.mean = nn.Parameter(torch.zeros(self.num_components, spec.num_values))
        self.factor = nn.Parameter(torch.zeros(self.num_components, self.rank, spec.num_values))
        """W, with orthogonal rows; zero beyond the rank of the data."""
        self.variance = nn.Parameter(torch.ones(self.num_components))
        """The variance s in directions orthogonal to W."""
        self.weight = nn.Parameter(torch.full((self.num_components,), 1 / self.num_components))

    # Fitting

    def fit_batch(self, x: Tensor, cond: Cond, rng: RandomSource) -> dict[str, Tensor]:
        """Fit to the whole training split in the first step, and end training."""
        self.fit(*self._train_val_batches())
        self.trainer.should_stop = True
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        optimizer.step()
        return {"loss": self.bits_per_dim(x, cond).mean().to(x.dtype)}

    def _train_val_batches(self) -> tuple[Iterable[tuple[Tensor, Cond]], Iterable[tuple[Tensor, Cond]] | None]:
        """Return batches of the training and validation splits, each for one pass (data loaders may be infinite)."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if hasattr(data, "batches"):
            return data.batches("train"), data.batches("val")
        train, val = self.trainer.train_dataloader, self.trainer.val_dataloaders
        assert train is not None
        return (unpack_batch(b, self.spec) for b in train), val and (unpack_batch(b, self.spec) for b in val)

    def build_optimizers(self) -> list[torch.optim.Optimizer]:
        """Create an optimiser with learning rate 0, whose step increments the Trainer's step count."""
        return [torch.optim.SGD(self.parameters(), lr=0.0)]

    def averaged_parameters(self) -> dict[str, nn.Parameter]:
        """Return an empty dictionary, since there are no weights to average after a single step."""
        return {}

    @torch.no_grad()
    def fit(
        self, train: Iterable[tuple[Tensor, Cond]], val: Iterable[tuple[Tensor, Cond]] | None = None
    ) -> GaussianBaseline:
        """Fit to batches (x, cond) in one pass.

        Sums are in float64. All images are kept in memory as float32. If a class has no more images than pixels, the
        Gram matrix of its images is used.

        Args:
            train: training batches.
            val: validation batches that select the ridge; if None, no ridge is used.

        Returns:
            The model itself.
        """
        x, label = self._gather(train)
        counts = torch.bincount(label, minlength=self.num_components)
        if len(x) < 2 or int(counts.min()) < 1:
            raise UserError(f"Data set '{self.spec.name}' has too few training images: each class needs one.")
        spectra = [principal_axes(x[label == k].double(), self.rank) for k in range(self.num_components)]
        del x
        for k, (mean, eigenvalues, axes, rest) in enumerate(spectra):
            self.mean[k] = mean.to(self.mean)
            self.factor[k] = 0
            excess = eigenvalues - rest
            # Axes of eigenvalues that are zero up to rounding are not orthogonal to the others.
            excess[excess <= MIN_VARIANCE * eigenvalues.sum()] = 0
            self.factor[k, : len(axes)] = (axes * excess.sqrt()[:, None]).to(self.factor)
            self.variance[k] = rest + self._noise_variance
        self.weight.copy_(counts / counts.sum())
        ridge = 0.0 if val is None else self._best_ridge(*self._gather(val))
        self.variance.add_(ridge).clamp_min_(MIN_VARIANCE)
        return self

    def _gather(self, batches: Iterable[tuple[Tensor, Cond]]) -> tuple[Tensor, Tensor]:
        """Collect all images (n, d) in float32 and the component of each image (n,), on the CPU."""
        images, labels = [], []
        for x, cond in batches:
            images.append(self._flat(x).cpu())
            labels.append(cond["label"].cpu() if self.num_components > 1 else torch.zeros(len(x), dtype=torch.int64))
        if not images:
            return torch.empty(0, self.spec.num_values), torch.empty(0, dtype=torch.int64)
        return torch.cat(images), torch.cat(labels)

    def _best_ridge(self, x: Tensor, label: Tensor) -> float:
        """Find the ridge that maximises the likelihood of images given their classes."""
        if not len(x):
            return 0.0
        log_likelihoods = []
        for ridge in RIDGES:
            scores = [self._log_density(x[label == k], k, ridge).sum() for k in range(self.num_components)]
            log_likelihoods.append(torch.stack(scores).sum())
        return RIDGES[int(torch.stack(log_likelihoods).argmax())]

    # Density

    @property
    def _noise_variance(self) -> float:
        r""":math:`\delta^2 / 12`, the variance of the dequantisation noise; 0 for continuous data."""
        return bin_width(self.spec.num_bins) ** 2 / 12

    def _flat(self, x: Tensor) -> Tensor:
        """Return the pixels without padding, (n, d)."""
        return self.spec.crop(x).flatten(1)

    def _log_density(self, x: Tensor, k: int, ridge: float = 0.0) -> Tensor:
        r"""Compute the expected log density of dequantised images under component k.

        .. math:: E_u \log N(x + u; m, S) = \log N(x; m, S) - \mathrm{tr}(S^{-1}) \delta^2 / 24

        The dequantisation noise u is uniform in :math:`[-\delta/2, \delta/2]` for each pixel, so its mean is 0 and its
        covariance is :math:`I \delta^2 / 12`. For continuous data :math:`\delta = 0`. The rows of W have squared norms
        :math:`w_i` and orthonormal directions :math:`v_i`, so the inverse of :math:`S = W^T W + s I` is
        :math:`S^{-1} = \sum_i v_i v_i^T / (s + w_i) + (I - \sum_i v_i v_i^T) / s`.

        Args:
            x: pixels without padding, (n, d).
            k: index of the component.
            ridge: number that is added to s.

        Returns:
            The expected log densities in nats, (n,), in float64.
        """
        factor, s = self.factor[k].double(), self.variance[k].double().clamp_min(MIN_VARIANCE) + ridge
        w = factor.square().sum(1)
        factor, w = factor[w > 0], w[w > 0]
        axes = factor / w.sqrt()[:, None]
        centred = x.to(factor) - self.mean[k].double()
        projection = centred @ axes.T
        # Compute the residual vector: a difference of squared norms would lose precision if s is small.
        num_residual = self.spec.num_values - len(w)
        residual = (centred - projection @ axes).square().sum(1) if num_residual else torch.zeros_like(projection[:, 0])
        quadratic = (projection.square() / (s + w)).sum(1) + residual / s
        log_det = (s + w).log().sum() + num_residual * s.log()
        trace = (1 / (s + w)).sum() + num_residual / s
        noise = trace * self._noise_variance
        return -0.5 * (quadratic + log_det + self.spec.num_values * math.log(2 * math.pi) + noise)

    def log_density(self, x: Tensor, cond: Cond) -> Tensor:
        """Compute the expected log density of dequantised images in nats, (n,).

        A conditional model uses the given class; otherwise the density is marginalised over classes. Marginalising the
        expectations over u gives a lower bound, since log-sum-exp is convex.
        """
        flat = self._flat(x)
        components = torch.stack([self._log_density(flat, k) for k in range(self.num_components)], 1)
        if self.conditional:
            return components.gather(1, cond["label"][:, None])[:, 0]
        return (components + self.weight.double().log()).logsumexp(1)

    @torch.no_grad()
    def bits_per_dim(self, x: Tensor, cond: Cond) -> Tensor:
        r"""Compute bits/dim :math:`-\log_2(p(x) \delta^d) / d` of d values with bins of width :math:`\delta`, (n,)."""
        d = self.spec.num_values
        return -(self.log_density(x, cond) + log_bin_volume(self.spec.num_bins, d)) / (d * LOG2)

    def likelihoods(self) -> dict[str, LikelihoodEstimate]:
        """Return the density: exact, unless classes are marginalised after dequantisation, which gives a bound."""
        discrete = self.spec.num_bins is not None
        marginalized = discrete and not self.conditional and self.num_components > 1
        kind, method = "bound" if marginalized else "exact", UNIFORM_DEQUANTIZATION if discrete else "continuous"
        return {"density": LikelihoodEstimate(kind, self._terms, method)}

    def _terms(self, x: Tensor, cond: Cond, generator: torch.Generator) -> dict[str, Tensor]:
        return {"density": self.bits_per_dim(x, cond)}

    def validation_metrics(self, x: Tensor, cond: Cond, rng: RandomSource) -> dict[str, Tensor]:
        return {"bits_per_dim": self.bits_per_dim(x, self.select_conditions(cond)).to(x.dtype)}

    # Sampling

    @torch.no_grad()
    def sample(self, n: int, cond: Cond | None = None, *, generator: torch.Generator) -> Tensor:
        r"""Sample :math:`m + z W + \sqrt{s} \epsilon` with standard normal z and :math:`\epsilon`; clamp to [-1, 1]."""
        component, like = self.label(self.select_conditions(cond)), self.mean
        if component is None:
            component = torch.multinomial(self.weight, n, replacement=True, generator=generator)
        z = draw_normal((n, self.rank), generator, like.device, like.dtype)
        eps = draw_normal((n, self.spec.num_values), generator, like.device, like.dtype)
        x = eps * self.variance[component].sqrt()[:, None]
        x += self.mean[component]
        for k in range(self.num_components):
            rows = component == k
            x[rows] += z[rows] @ self.factor[k]
        padding = self.spec.padding
        c, h, w = self.spec.shape
        return self.spec.pad(x.clamp(-1, 1).view(n, c, h - 2 * padding, w - 2 * padding))

    def sampling_description(self) -> str:
        return "closed form"


def principal_axes(x: Tensor, max_rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the leading eigenvectors of the maximum-likelihood covariance (divided by n) of x, (n, d).

    Returns:
        The mean (d,), the q leading eigenvalues (q,), their eigenvectors (q, d), and the mean of the other d - q
        eigenvalues (0 if q = d); q is at most ``max_rank`` and at most n - 1.
    """
    n, d = x.shape
    mean = x.mean(0)
    centred = x - mean
    if n <= d:
        # The n x n Gram matrix has the same nonzero eigenvalues; one more product gives the eigenvectors.
        values, vectors = torch.linalg.eigh(centred @ centred.T / n)
        q = min(max_rank, n - 1)
        values, vectors = values.flip(0)[:q].clamp_min(0), vectors.flip(1)[:, :q]
        axes = torch.nn.functional.normalize(vectors.T @ centred, dim=1)
    else:
        values, vectors = torch.linalg.eigh(centred.T @ centred / n)
        q = min(max_rank, d)
        values, axes = values.flip(0)[:q].clamp_min(0), vectors.flip(1)[:, :q].T
    total = centred.square().sum() / n
    rest = (total - values.sum()).clamp_min(0) / (d - q) if q < d else total.new_zeros(())
    return mean, values, axes, rest
