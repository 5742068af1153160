r"""Distributions of pixels given a decoder's output: p(x | h), with the places of an image independent.

Images are in [-1, 1]. With ``num_levels`` = L they take the values -1 + k Delta, Delta = 2 / (L - 1), and a likelihood
is the probability of exactly that value: at most 1, so that bits/dim are those of a lossless code. With ``num_levels``
None the data are continuous and it is a density. (`Bernoulli` on grey levels is the exception, and says so.)
"""

from __future__ import annotations

from gencompare.models.likelihoods.base import PixelLikelihood
from gencompare.models.likelihoods.bernoulli import Bernoulli
from gencompare.models.likelihoods.gaussian import Gaussian
from gencompare.models.likelihoods.logistic import DiscretizedLogistic
from gencompare.models.likelihoods.mixture import DiscretizedLogisticMixture

__all__ = ["Bernoulli", "DiscretizedLogistic", "DiscretizedLogisticMixture", "Gaussian", "PixelLikelihood"]
