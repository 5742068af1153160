"""The baseline: one Gaussian a class, with full covariance, fitted in closed form."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gencompare.errors import UserError
from gencompare.generative_model import Cond, DataSpec, GenerativeModel, LikelihoodEstimate, unpack_batch
from gencompare.rng import RandomSource

RIDGES = (0.0, *(10.0 ** (k / 2) for k in range(-12, 1)))
"""Ridges that the validation images choose from: 0 and 1e-6 to 1, half a decade apart, in units of x^2."""
SMALLEST = 1e-10
"""Variance of a direction in which the data have none (continuous data alone can have one)."""
LOG2 = math.log(2)


class GaussianBaseline(GenerativeModel):
    """p(x) = sum_k pi_k N(x; m_k, S_k) over the real pixels, or p(x | k) = N(x; m_k, S_k) where labels are given.

    Fitted by maximum likelihood to the uniformly dequantised images, in closed form. Dequantisation adds
    delta^2 / 12 to each variance (delta = 2 / (L - 1), the step between levels), so pixels that never change are no
    trouble. One ridge for all classes is added on top, the one under which validation images are likeliest: with fewer
    images than twice the pixels the smallest eigenvalues come out far too small.

    A covariance is kept as S = W^T W + s I, whose rows of W are the leading eigenvectors, scaled, and s the mean of
    what is left: the maximum likelihood of probabilistic PCA (Tipping & Bishop 1999, eqs. 7 and 8). It is the full
    covariance as long as W has as many rows as there are pixels; ``max_parameters`` bounds that (64 MB by default: full
    for grey images of 28 x 28 in ten classes; 546 directions of 3,072 a class for CIFAR-10).

    Args:
        spec: of the data.
        conditional: draw and score by the given class; otherwise the class is drawn, and summed over.
        per_class: one Gaussian a class where the data have labels; False fits one to all images.
        max_parameters: numbers that the matrices W may hold together.
    """

    closed_form = True

    def __init__(
        self,
        spec: DataSpec,
        *,
        conditional: bool = False,
        per_class: bool = True,
        max_parameters: int = 2**24,
        **common: Any,
    ) -> None:
        super().__init__(spec, conditional=conditional, **common)
        if conditional and not per_class:
            raise UserError("model.conditional=true needs model.per_class=true: one Gaussian knows no classes.")
        # There is nothing to step: the first batch fits everything.
        self.automatic_optimization = False
        self.parts = spec.num_classes if per_class and spec.num_classes else 1
        self.rank_kept = max(1, min(spec.dims, max_parameters // (self.parts * spec.dims)))
        self.mean = nn.Parameter(torch.zeros(self.parts, spec.dims))
        self.factor = nn.Parameter(torch.zeros(self.parts, self.rank_kept, spec.dims))
        """W: rows are orthogonal, and zero beyond the rank of the data."""
        self.variance = nn.Parameter(torch.ones(self.parts))
        """s, the variance in every direction that W does not hold."""
        self.weight = nn.Parameter(torch.full((self.parts,), 1 / self.parts))

    @property
    def step(self) -> float:
        """delta, the distance between two grey levels; 0 for continuous data."""
        return 0.0 if self.spec.num_levels is None else 2 / (self.spec.num_levels - 1)

    # Fitting

    def fit_batch(self, x: Tensor, cond: Cond, draws: RandomSource) -> dict[str, Tensor]:
        """The first step, which is the only one, fits the whole training split and ends training."""
        self.fit_to(*self._whole_splits())
        self.trainer.should_stop = True
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        optimizer.step()
        return {"loss": self.bits_per_dim(x, cond).mean().float()}

    def _whole_splits(self) -> tuple[Iterable[tuple[Tensor, Cond]], Iterable[tuple[Tensor, Cond]] | None]:
        """The batches of the training and the validation split, each once: training batches may have no end."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if hasattr(data, "batches"):
            return data.batches("train"), data.batches("val")
        train, val = self.trainer.train_dataloader, self.trainer.val_dataloaders
        assert train is not None
        return (unpack_batch(b, self.spec) for b in train), val and (unpack_batch(b, self.spec) for b in val)

    def build_optimizers(self) -> list[torch.optim.Optimizer]:
        """One that changes nothing: its step tells the Trainer that there was one."""
        return [torch.optim.SGD(self.parameters(), lr=0.0)]

    def averaged_parameters(self) -> dict[str, nn.Parameter]:
        """None: what was fitted in one step has no past to average."""
        return {}

    @torch.no_grad()
    def fit_to(
        self, train: Iterable[tuple[Tensor, Cond]], val: Iterable[tuple[Tensor, Cond]] | None = None
    ) -> GaussianBaseline:
        """Fit to batches (x, cond), one pass; ``val`` chooses the ridge (without it: none). Returns the model.

        Sums are in float64. The images are held in memory as float32 (4 bytes a value); a class with fewer images than
        pixels goes by the small matrix of products between images.
        """
        x, label = self._gathered(train)
        counts = torch.bincount(label, minlength=self.parts)
        if len(x) < 2 or int(counts.min()) < 1:
            raise UserError(f"Data '{self.spec.name}' has too few training images for a Gaussian a class.")
        spectra = [principal_axes(x[label == k].double(), self.rank_kept) for k in range(self.parts)]
        del x
        floor = self.step**2 / 12
        for k, (mean, eigenvalues, axes, rest) in enumerate(spectra):
            self.mean[k] = mean.to(self.mean)
            self.factor[k] = 0
            above = eigenvalues - rest
            # What rounding leaves of a zero eigenvalue has an axis that is orthogonal to nothing.
            above[above <= SMALLEST * eigenvalues.sum()] = 0
            self.factor[k, : len(axes)] = (axes * above.sqrt()[:, None]).to(self.factor)
            self.variance[k] = rest + floor
        self.weight.copy_(counts / counts.sum())
        ridge = 0.0 if val is None else self._best_ridge(*self._gathered(val))
        self.variance.add_(ridge).clamp_min_(SMALLEST)
        return self

    def _gathered(self, batches: Iterable[tuple[Tensor, Cond]]) -> tuple[Tensor, Tensor]:
        """All images (n, d) float32 and the part that each belongs to (n,), on the CPU."""
        images, labels = [], []
        for x, cond in batches:
            images.append(self._flat(x).cpu())
            labels.append(cond["label"].cpu() if self.parts > 1 else torch.zeros(len(x), dtype=torch.int64))
        if not images:
            return torch.empty(0, self.spec.dims), torch.empty(0, dtype=torch.int64)
        return torch.cat(images), torch.cat(labels)

    def _best_ridge(self, x: Tensor, label: Tensor) -> float:
        """The ridge under which the images are likeliest, given their classes."""
        if not len(x):
            return 0.0
        figures = []
        for ridge in RIDGES:
            scores = [self._log_density(x[label == k], k, ridge).sum() for k in range(self.parts)]
            figures.append(torch.stack(scores).sum())
        return RIDGES[int(torch.stack(figures).argmax())]

    # Density

    def _flat(self, x: Tensor) -> Tensor:
        """(n, d): the real pixels."""
        return self.spec.crop(x).flatten(1)

    def _log_density(self, x: Tensor, part: int, ridge: float = 0.0) -> Tensor:
        """E_u log N(x + u; m, S) for x (n, d), in nats, float64; u uniform within half a step either way.

        = log N(x; m, S) - tr(S^-1) delta^2 / 24, since u has mean 0 and covariance delta^2 / 12. For continuous data it
        is log N(x; m, S). With w_i the squared norms of the rows of W and v_i their directions, which are orthogonal,
        S^-1 = sum_i v_i v_i^T / (s + w_i) + (I - sum_i v_i v_i^T) / s.
        """
        factor, s = self.factor[part].double(), self.variance[part].double().clamp_min(SMALLEST) + ridge
        w = factor.square().sum(1)
        factor, w = factor[w > 0], w[w > 0]
        axes = factor / w.sqrt()[:, None]
        centred = x.to(factor) - self.mean[part].double()
        along = centred @ axes.T
        # The remainder as a vector: from the difference of squared norms, rounding would outweigh a small s.
        idle = self.spec.dims - len(w)
        beside = (centred - along @ axes).square().sum(1) if idle else torch.zeros_like(along[:, 0])
        quadratic = (along.square() / (s + w)).sum(1) + beside / s
        log_det = (s + w).log().sum() + idle * s.log()
        trace = (1 / (s + w)).sum() + idle / s
        return -0.5 * (quadratic + log_det + self.spec.dims * math.log(2 * math.pi) + trace * self.step**2 / 12)

    def log_density(self, x: Tensor, cond: Cond) -> Tensor:
        """(n,) nats: by the class in ``cond``, or summed over classes.

        The sum over classes is taken of the averages over u, which is a bound again: log-sum-exp is convex.
        """
        flat = self._flat(x)
        parts = torch.stack([self._log_density(flat, k) for k in range(self.parts)], 1)
        if self.conditional:
            return parts.gather(1, cond["label"][:, None])[:, 0]
        return (parts + self.weight.double().log()).logsumexp(1)

    @torch.no_grad()
    def bits_per_dim(self, x: Tensor, cond: Cond) -> Tensor:
        """-log2 of (density times the width delta of a level) a dimension, (n,)."""
        width = math.log(self.step) if self.step else 0.0
        return -(self.log_density(x, cond) / self.spec.dims + width) / LOG2

    def likelihoods(self) -> dict[str, LikelihoodEstimate]:
        """The density is exact; of discrete images it gives a bound, through uniform dequantisation (Theis 2016)."""
        return {"density": LikelihoodEstimate("bound" if self.step else "exact", self._terms)}

    def _terms(self, x: Tensor, cond: Cond, generator: torch.Generator) -> dict[str, Tensor]:
        return {"density": self.bits_per_dim(x, cond)}

    def validation_figures(self, x: Tensor, cond: Cond, draws: RandomSource) -> dict[str, Tensor]:
        return {"bits_per_dim": self.bits_per_dim(x, self.used(cond)).float()}

    # Samples

    @torch.no_grad()
    def sample(self, n: int, cond: Cond | None = None, *, generator: torch.Generator) -> Tensor:
        """m + z W + sqrt(s) e, with z and e standard normal; held within [-1, 1]."""
        part, device = self.label(self.used(cond)), self.mean.device
        if part is None:
            part = torch.multinomial(self.weight, n, replacement=True, generator=generator)
        z = torch.randn(n, self.rank_kept, generator=generator, device=device)
        x = torch.randn(n, self.spec.dims, generator=generator, device=device) * self.variance[part].sqrt()[:, None]
        x += self.mean[part]
        for k in range(self.parts):
            rows = part == k
            x[rows] += z[rows] @ self.factor[k]
        padding = self.spec.padding
        c, h, w = self.spec.shape
        images = x.clamp(-1, 1).view(n, c, h - 2 * padding, w - 2 * padding)
        return nn.functional.pad(images, (padding,) * 4, value=-1.0)

    def sampling_description(self) -> str:
        return "closed form"


def principal_axes(x: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(mean (d,), eigenvalues (q,), axes (q, d), rest): the leading eigenvectors of the covariance of x (n, d).

    ``q`` is at most ``most`` and at most n - 1; ``rest`` is the mean of the d - q eigenvalues left out (0 when q = d).
    Covariance with 1/n, as maximum likelihood has it.
    """
    n, d = x.shape
    mean = x.mean(0)
    centred = x - mean
    if n <= d:
        # The n x n products between images have the same eigenvalues, and axes by one product more.
        values, vectors = torch.linalg.eigh(centred @ centred.T / n)
        q = min(most, n - 1)
        values, vectors = values.flip(0)[:q].clamp_min(0), vectors.flip(1)[:, :q]
        axes = torch.nn.functional.normalize(vectors.T @ centred, dim=1)
    else:
        values, vectors = torch.linalg.eigh(centred.T @ centred / n)
        q = min(most, d)
        values, axes = values.flip(0)[:q].clamp_min(0), vectors.flip(1)[:, :q].T
    total = centred.square().sum() / n
    rest = (total - values.sum()).clamp_min(0) / (d - q) if q < d else total.new_zeros(())
    return mean, values, axes, rest
