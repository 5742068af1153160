# %% [markdown]
# # From the ELBO to the simple loss
#
# The loss of DDPM is one line: predict the noise. This notebook derives it from a bound on the
# likelihood, and checks every step numerically on data whose density is known.
#
# You learn
#
# - why the evidence lower bound (ELBO) is a bound, and how large its gap is;
# - how the KL divergence of two Gaussians compares with its Monte Carlo estimate;
# - what the posterior $q(x_{t-1} \mid x_t, x_0)$ is, and why it makes the bound of a diffusion
#   model easy to estimate;
# - why networks that predict the image, the noise, $v$ or the score are the same model;
# - which weights turn the bound into the simple loss.

# %% tags=["install"]
# Only needed outside of a checkout, for example in Colab.
# %pip install -q git+{REPOSITORY}

# %%
import math
from dataclasses import replace

import matplotlib.pyplot as plt
import torch

from gencompare.data.toy2d import DISTRIBUTIONS
from gencompare.diffusion.data_likelihood import DataLikelihood, normal_log_prob
from gencompare.diffusion.denoiser import Denoiser
from gencompare.diffusion.discrete_schedules import BetaTable, CosineBetas, LinearBetas
from gencompare.diffusion.likelihoods import VLBLikelihood
from gencompare.diffusion.objectives import LikelihoodWeighting, WeightedMSE
from gencompare.diffusion.parameterizations import (
    X0,
    EDMPreconditioning,
    Eps,
    PosteriorMean,
    Prediction,
    Score,
    V,
)
from gencompare.diffusion.samplers import ancestral_step
from gencompare.diffusion.schedules import VE, EDMSchedule, schedule_curve
from gencompare.diffusion.variational_objectives import (
    ContinuousVLB,
    prior_kl,
    reconstruction_nll,
    step_kl,
)
from gencompare.models.elbo import importance_weighted_bound, kl_from_standard_normal
from gencompare.models.priors import StandardNormal
from gencompare.networks.mlp import DenoisingMLP
from gencompare.rng import RandomSource, generator

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)  # so that identities hold to rounding error
plt.rcParams.update(
    {"figure.facecolor": "white", "axes.grid": True, "grid.alpha": 0.3, "font.size": 9}
)

# %% [markdown]
# ## Jensen's inequality
#
# A latent-variable model has a likelihood $p(x) = \int p(x \mid z)\, p(z)\, dz$ that is rarely
# known. For any distribution $q(z)$, the weight $w = p(x, z) / q(z)$ has mean $p(x)$. The logarithm
# is concave, so that
#
# $$\log p(x) = \log E_q[w] \ \ge\ E_q[\log w] = \mathrm{ELBO}$$
#
# ([Kingma and Welling 2014](https://arxiv.org/abs/1312.6114), eq. 2). Here
# $z \sim \mathcal N(0, 1)$ and $x \mid z \sim \mathcal N(1.5 z, 0.5^2)$, so that
# $x \sim \mathcal N(0, 1.5^2 + 0.5^2)$ is known, and so is the posterior.
#
# The logarithm of the mean is the same for every $q$. The mean of the logarithm is not, and it
# reaches $\log p(x)$ only where the weights do not vary: at the posterior. Averaging $K$ weights
# before the logarithm reduces their variance, and closes the gap ([Burda et al.
# 2016](https://arxiv.org/abs/1509.00519), theorem 1); $K = 1$ is the ELBO.

# %%
a, s, x = 1.5, torch.tensor(0.5), torch.tensor(2.0)
prior = StandardNormal(1)
log_p = normal_log_prob(x, torch.tensor(0.0), (a**2 + s**2).sqrt())
post_var = 1 / (1 + a**2 / s**2)
post_mean = post_var * a / s**2 * x


def log_weight(n, mean, std):
    z = mean + std * torch.randn(n)
    return normal_log_prob(x, a * z, s) + prior.log_prob(z[:, None]) - normal_log_prob(z, mean, std)


choices = {
    "far": (torch.tensor(0.7), torch.tensor(0.5)),
    "near": (torch.tensor(1.1), torch.tensor(0.35)),
    "posterior": (post_mean, post_var.sqrt()),
}
log_w = {name: log_weight(100_000, *q) for name, q in choices.items()}
print(f"exact log p(x) = {log_p:.3f}")
for name, values in log_w.items():
    log_mean = values.logsumexp(0) - math.log(len(values))
    print(f"{name:9s}  log of the mean {log_mean:.3f}  mean of the log (ELBO) {values.mean():.3f}")
    assert values.mean() <= log_p + 1e-9 and abs(log_mean - log_p) < 0.03

counts = [1, 2, 4, 8, 16, 32, 64]
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
for name, color in zip(("far", "near"), ("C0", "C1")):
    left.hist(log_w[name].numpy(), bins=150, range=(-8, 0), density=True, alpha=0.5, color=color)
    left.axvline(log_w[name].mean(), color=color, ls="--", label=f"{name}: mean of log w")

    def draw(q=choices[name]):
        return log_weight(4000, *q)

    bounds = [importance_weighted_bound(draw, k).mean() for k in counts]
    right.plot(counts, bounds, "o-", color=color, label=f"q {name}")
left.axvline(log_p, color="k", label=r"$\log p(x)$")
right.axhline(log_p, color="k", label=r"$\log p(x)$")
left.set(xlabel="log w", ylabel="density", title="Log-weights of two choices of q")
right.set(xscale="log", xlabel="K", ylabel="nats", title="The bound with K samples")
left.legend(fontsize=8)
right.legend(fontsize=8)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## The gap, and the Gaussian KL
#
# The gap of the bound is a KL divergence, and so is one of its terms:
#
# $$\log p(x) - \mathrm{ELBO} = \mathrm{KL}(q(z)\, \|\, p(z \mid x)), \qquad
# \mathrm{ELBO} = E_q[\log p(x \mid z)] - \mathrm{KL}(q(z)\, \|\, p(z)).$$
#
# Between Gaussians both are known (Kingma and Welling 2014, appendix B):
#
# $$\mathrm{KL}(\mathcal N(\mu, \sigma^2)\, \|\, \mathcal N(0, 1))
# = \tfrac12 (\mu^2 + \sigma^2 - 1 - \log \sigma^2).$$
#
# For another second Gaussian, shift and scale both so that it becomes $\mathcal N(0, 1)$: the
# divergence does not change.


# %%
def gaussian_kl(mean, std, other_mean, other_std):
    return kl_from_standard_normal((mean - other_mean) / other_std, 2 * (std / other_std).log())


for name, (mean, std) in choices.items():
    expected_log = normal_log_prob(x, a * mean, s) - (a * std / s) ** 2 / 2
    elbo = expected_log - gaussian_kl(mean, std, 0.0, 1.0)
    gap = gaussian_kl(mean, std, post_mean, post_var.sqrt())
    print(f"{name:9s}  ELBO {elbo:.4f}  gap {log_p - elbo:.4f}  KL from the posterior {gap:.4f}")
    assert torch.allclose(log_p - elbo, gap)
    assert abs(log_w[name].mean() - elbo) < 0.05

# %% [markdown]
# A Monte Carlo estimate of the KL averages $\log q - \log p$ over samples of $q$. It is unbiased,
# but its error is large where the two distributions are close: for means that differ by $\delta$
# standard deviations, the divergence is $\delta^2 / 2$, while the standard deviation of one sample
# is $\delta$. A diffusion model compares hundreds of pairs of very similar Gaussians.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
for color, delta in zip(("C0", "C1"), (1.0, 0.1)):
    z = delta + torch.randn(4000)
    ratio = normal_log_prob(z, torch.tensor(delta), torch.tensor(1.0)) - prior.log_prob(z[:, None])
    running = ratio.cumsum(0) / torch.arange(1, 4001)
    exact = gaussian_kl(torch.tensor(delta), torch.tensor(1.0), 0.0, 1.0)
    assert abs(running[-1] - exact) < 4 * delta / math.sqrt(4000)
    left.plot(range(10, 4001), running[9:] / exact, color=color, label=rf"$\delta = {delta}$")
left.axhline(1, color="k", lw=1)
left.set(xscale="log", ylim=(-2, 4), xlabel="samples", ylabel="estimate / exact KL")
left.set_title("Monte Carlo estimate of the KL")
left.legend(fontsize=8)
deltas = torch.tensor([1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01])
z = deltas + torch.randn(20_000, 1)
spread = (normal_log_prob(z, deltas, torch.ones(1)) - normal_log_prob(z, 0.0, torch.ones(1))).std(0)
right.loglog(deltas, gaussian_kl(deltas, torch.ones(1), 0.0, 1.0), "ko-", label="exact KL")
right.loglog(deltas, spread, "C3o-", label="standard deviation of one sample")
right.set(xlabel=r"$\delta$", ylabel="nats", title="Closer distributions, larger relative error")
right.legend(fontsize=8)
figure.tight_layout()
plt.show()
assert torch.allclose(spread, deltas, rtol=0.03)

# %% [markdown]
# ## The posterior of one step
#
# In a diffusion model the latent variables are the noisy images $x_1, \dots, x_T$, and $q$ is the
# fixed forward process. Its reverse step is Gaussian if $x_0$ is known ([Ho et al.
# 2020](https://arxiv.org/abs/2006.11239), eq. 6 and 7):
#
# $$q(x_{t-1} \mid x_t, x_0) = \mathcal N(\tilde\mu_t, \tilde\beta_t I), \qquad
# \tilde\mu_t = \frac{\sqrt{\bar\alpha_{t-1}}\, \beta_t}{1 - \bar\alpha_t} x_0
# + \frac{\sqrt{1 - \beta_t}\, (1 - \bar\alpha_{t-1})}{1 - \bar\alpha_t} x_t, \qquad
# \tilde\beta_t = \frac{1 - \bar\alpha_{t-1}}{1 - \bar\alpha_t} \beta_t.$$
#
# `ancestral_step` returns the coefficients of $x_t$ and $x_0$ and the standard deviation, written
# in the log-SNR. They agree with these equations at all steps, and with the rule for conditioning
# the joint Gaussian of $(x_{t-1}, x_t)$ given $x_0$. With $a = \alpha_t / \alpha_{t-1}$, that joint
# has covariance $a \sigma_{t-1}^2$.
#
# A check without algebra: draw many pairs $(x_{t-1}, x_t)$ from $x_0 = 0.5$, keep those with $x_t$
# in a narrow interval, and look at their $x_{t-1}$.

# %%
schedule = LinearBetas(0.002, 0.4, num_train_timesteps=50)
times = schedule.discrete_times
at_t, at_s = schedule.at(times[1:]), schedule.at(times[:-1])
coef_x_t, coef_x0, std = ancestral_step(at_t, at_s)

beta = 1 - (at_t.alpha / at_s.alpha) ** 2
assert torch.allclose(coef_x0, at_s.alpha * beta / at_t.sigma**2)
assert torch.allclose(coef_x_t, (1 - beta).sqrt() * at_s.sigma**2 / at_t.sigma**2)
assert torch.allclose(std**2, at_s.sigma**2 / at_t.sigma**2 * beta)

covariance = at_t.alpha / at_s.alpha * at_s.sigma**2
gain = covariance / at_t.sigma**2
assert torch.allclose(coef_x_t, gain)
assert torch.allclose(coef_x0, at_s.alpha - gain * at_t.alpha)
assert torch.allclose(std**2, at_s.sigma**2 - gain * covariance)
print(f"log-SNR from {at_s.log_snr[0]:.1f} to {at_t.log_snr[-1]:.1f}, 49 posteriors checked")

k, clean = 8, 0.5
x_s = at_s.alpha[k] * clean + at_s.sigma[k] * torch.randn(400_000)
x_t = (1 - beta[k]).sqrt() * x_s + beta[k].sqrt() * torch.randn(400_000)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
left.plot(x_t[:4000], x_s[:4000], ".", ms=2, color="0.5")
grid = torch.linspace(-0.8, 1.8, 300)
for centre, color in ((0.0, "C0"), (0.8, "C1")):
    kept = x_s[(x_t - centre).abs() < 0.01]
    mean = coef_x_t[k] * centre + coef_x0[k] * clean
    left.axvspan(centre - 0.01, centre + 0.01, color=color)
    label = f"$x_t \\approx {centre}$: {len(kept)} pairs"
    right.hist(kept.numpy(), bins=50, density=True, color=color, alpha=0.5, label=label)
    right.plot(grid, normal_log_prob(grid, mean, std[k]).exp(), color=color)
    print(f"x_t = {centre}: mean {kept.mean():.3f} (formula {mean:.3f}),", end=" ")
    print(f"std {kept.std():.3f} (formula {std[k]:.3f})")
    assert abs(kept.mean() - mean) < 5 * std[k] / math.sqrt(len(kept)) + 0.005
    assert abs(kept.std() / std[k] - 1) < 0.1
left.set(xlabel=r"$x_t$", ylabel=r"$x_{t-1}$", title="Pairs given $x_0$, and two intervals")
right.set(xlabel=r"$x_{t-1}$", ylabel="density", ylim=(0, 2.3))
right.set_title("Kept pairs, and the formula (lines)")
right.legend(fontsize=8)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## The bound of a diffusion model
#
# With these posteriors the negative ELBO becomes a sum of KL divergences (Ho et al. 2020, eq. 5):
#
# $$-\log p(x_0) \le \underbrace{\mathrm{KL}(q(x_T \mid x_0)\, \|\, p(x_T))}_{\text{prior}}
# + \sum_{t > 1}
# \underbrace{E\, \mathrm{KL}(q(x_{t-1} \mid x_t, x_0)\, \|\, p(x_{t-1} \mid x_t))}_{L_t}
# \underbrace{- E \log p(x_0 \mid x_1)}_{\text{reconstruction}}.$$
#
# The data are points in the plane,
# $0.2\, \mathcal N((-0.5, -0.5), 0.1^2 I) + 0.8\, \mathcal N((0.5, 0.5), 0.1^2 I)$. Their density
# is known, and so is the optimal denoiser: each component $k$ has a linear one, and these are
# averaged with the probability that $x_t$ comes from $k$.
#
# The schedule of this section has log-SNRs that fall linearly from 6 to -9 in $T$ steps. Its betas
# follow from $\bar\alpha_t = \mathrm{sigmoid}(\lambda_t)$ and
# $1 - \beta_t = \bar\alpha_t / \bar\alpha_{t-1}$.

# %%
mixture = DISTRIBUTIONS["two_gaussians"]


class ExactDenoiser:
    """E[x_0 | x_t] and E[eps | x_t] for the mixture."""

    def __init__(self, schedule):
        self.schedule = schedule

    def __call__(self, x_t, t, cond):
        at = self.schedule.at(t, x_t)
        means = x_t.new_tensor(mixture.means)[:, None, :, None, None]
        variance = (at.alpha * mixture.std) ** 2 + at.sigma**2
        offset = x_t - at.alpha * means
        exponent = (-offset.square() / (2 * variance)).sum(2, keepdim=True)
        weight = (x_t.new_tensor(mixture.weights).log().view(-1, 1, 1, 1, 1) + exponent).softmax(0)
        x0 = (weight * (means + at.alpha * mixture.std**2 / variance * offset)).sum(0)
        return Prediction(x0=x0, eps=at.sigma / variance * (weight * offset).sum(0))


def draw_points(n, source):
    return mixture.sample(n, source)[0][..., None, None]


points = draw_points(2000, generator("cpu", "test"))


def even_schedule(T):
    alpha_bar = torch.linspace(6, -9, T).sigmoid()
    return BetaTable(1 - alpha_bar / torch.cat([torch.ones(1), alpha_bar[:-1]]))


even = even_schedule(50)
assert torch.allclose(even.log_snr(even.discrete_times), torch.linspace(6, -9, 50))
exact = ExactDenoiser(even)

# %% [markdown]
# A small network is trained with the simple loss, under this schedule. `Denoiser` joins network,
# schedule and parameterisation, so that the exact and the trained denoiser are interchangeable.
#
# The trained network has a larger bound than the exact denoiser, and even that one is above
# $-\log p(x)$: the true reverse step is not Gaussian, and its variance is larger than
# $\tilde\beta_t$. More and shorter steps reduce this gap. `step_kl` returns single terms $L_t$.

# %%
network = DenoisingMLP((2, 1, 1), 2, width=64, depth=2)
trained = Denoiser(network, even, EDMPreconditioning())
simple_loss = WeightedMSE()
optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
source = generator("cpu", "training")
STEPS = 400
for step in range(STEPS):
    rng = RandomSource.for_batch(source, 256)
    loss = simple_loss(trained, draw_points(256, source), {}, rng)["loss"].mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 3e-3 * (1 - (step + 1) / STEPS)

likelihood = DataLikelihood(None, torch.ones(1, 1, 1), 2)  # continuous data with two values
NATS = 2 * math.log(2)  # bits/dim of two values, in nats
every_step = VLBLikelihood(num_samples=None)
entropy = -mixture.log_density(points.flatten(1)).mean()
print(f"exact -log p(x): {entropy:.3f} nats")
bound = {}
for name, denoiser in (("exact", exact), ("trained", trained)):
    terms = every_step.terms(denoiser, points, {}, likelihood, generator("cpu", 0))
    terms = {key: NATS * value.mean() for key, value in terms.items()}
    bound[name] = sum(terms.values())
    print(f"{name:8s}", {key: round(float(v), 3) for key, v in terms.items()}, end=" ")
    print(f"sum {bound[name]:.3f}")
assert entropy < bound["exact"] < bound["trained"]


@torch.no_grad()
def mean_term(denoiser, i):
    at_t = denoiser.schedule.at(denoiser.schedule.discrete_times[i], points)
    eps = torch.randn_like(points)
    prediction = denoiser(at_t.alpha * points + at_t.sigma * eps, times[i], {})
    return step_kl(prediction, eps, at_t, at_t.previous_step).mean()


figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
for name, denoiser in (("trained", trained), ("exact", exact)):
    left.plot(range(2, 51), [mean_term(denoiser, i) for i in range(1, 50)], ".-", label=name)
left.set(xlabel="step t", ylabel="nats", title=r"The terms $L_t$")
left.legend(fontsize=8)
lengths = [10, 25, 50, 100, 200]
totals = []
for T in lengths:
    denoiser = ExactDenoiser(even_schedule(T))
    bits = every_step(denoiser, points, {}, likelihood, generator("cpu", 1))
    totals.append(NATS * bits.mean())
right.plot(lengths, totals, "o-", label="bound, exact denoiser")
right.axhline(entropy, color="k", label=r"exact $-\log p(x)$")
right.set(xscale="log", xlabel="T", ylabel="nats", title="The bound for T steps")
right.legend(fontsize=8)
figure.tight_layout()
plt.show()
print({T: round(float(total), 3) for T, total in zip(lengths, totals)}, f"exact {entropy:.3f}")
assert all(coarse > fine > entropy for coarse, fine in zip(totals, totals[1:]))

# %% [markdown]
# ## The same bound without posteriors
#
# The ELBO can be written down before any of this, as a ratio of each reverse step and its forward
# step (Ho et al. 2020, eq. 3):
#
# $$-\log p(x_0) \le E_q\left[-\log p(x_T)
# - \sum_{t \ge 1} \log \frac{p(x_{t-1} \mid x_t)}{q(x_t \mid x_{t-1})}\right].$$
#
# It needs no posterior, only $p$ and $q$ of single steps. [Sohl-Dickstein et al.
# (2015)](https://arxiv.org/abs/1503.03585), appendix B, rewrite it with Bayes' rule,
# $q(x_t \mid x_{t-1}) = q(x_{t-1} \mid x_t, x_0)\, q(x_t \mid x_0) / q(x_{t-1} \mid x_0)$, after
# which the marginals telescope. The function follows 4000 chains from one point, and evaluates both
# forms on the same chains.


# %%
def log_normal(value, mean, std):
    return normal_log_prob(value, mean, std).flatten(1).sum(1)


n = 4000
x0 = torch.tensor([0.45, 0.6]).view(1, 2, 1, 1).expand(n, -1, -1, -1)


def follow_chains(denoiser):
    """Terms of the bound on n chains from x0: each step, (T, n), and the two ends, (n,)."""
    state, one_step, posterior_ratio, kl = x0, [], [], []
    for i, t in enumerate(denoiser.schedule.discrete_times):
        at_t = denoiser.schedule.at(t, x0)
        at_s = at_t.previous_step
        a = at_t.alpha / at_s.alpha
        new = a * state + (1 - a**2).sqrt() * torch.randn_like(x0)
        prediction = denoiser(new, t, {})
        if i == 0:
            reconstruction = reconstruction_nll(likelihood, x0, new, prediction, at_t)
            log_p_step = -reconstruction
        else:
            coef_x_t, coef_x0, std = ancestral_step(at_t, at_s)
            log_p_step = log_normal(state, coef_x_t * new + coef_x0 * prediction.x0, std)
            log_q_back = log_normal(state, coef_x_t * new + coef_x0 * x0, std)
            posterior_ratio.append(log_q_back - log_p_step)
            kl.append(step_kl(prediction, (new - at_t.alpha * x0) / at_t.sigma, at_t, at_s))
        one_step.append(log_p_step - log_normal(new, a * state, (1 - a**2).sqrt()))
        state = new
    one_step, posterior_ratio, kl = map(torch.stack, (one_step, posterior_ratio, kl))
    log_p_end = log_normal(state, torch.zeros(1), torch.ones(1))
    log_q_end = log_normal(state, at_t.alpha * x0, at_t.sigma)
    return one_step, posterior_ratio, kl, log_p_end, log_q_end, reconstruction


one_step, posterior_ratio, kl, log_p_end, log_q_end, reconstruction = follow_chains(exact)
ratio_form = -log_p_end - one_step.sum(0)
rewritten = log_q_end - log_p_end + posterior_ratio.sum(0) + reconstruction
kl_form = prior_kl(even, x0) + kl.sum(0) + reconstruction
assert torch.allclose(ratio_form, rewritten)
difference = ratio_form - kl_form
assert abs(difference.mean()) < 4 * difference.std() / math.sqrt(n)
for name, values in (("one-step ratios", ratio_form), ("KL divergences", kl_form)):
    print(f"{name}: mean {values.mean():.3f} +- {values.std() / math.sqrt(n):.3f} nats")

# %% [markdown]
# Bayes' rule changes nothing on a single chain: `ratio_form` and `rewritten` agree to rounding
# error. The next step replaces the log ratio of two Gaussians by its exact expectation, the KL, and
# the mean stays the same.
#
# Now compare single terms, since training sees one random step of each image. As in the section on
# the Gaussian KL, a short step has a KL of order $\delta^2$ and a log ratio with a spread of order
# $\delta$. With $T$ steps, $T$ times one random KL keeps its standard deviation, and $T$ times one
# random ratio has one that grows as $\sqrt T$.
#
# Over whole chains the order can be reversed. If the model is exact, the steps are short and
# $p(x_T) = q(x_T)$, then the reversed chain is the forward chain, and the expression in brackets is
# $-\log p(x_0)$ on every chain: like the weight of the first section with $q$ the posterior, it
# does not vary. For this reason its spread is the smallest below. The divergences fluctuate with
# the chain. But they do not need a chain: every term can use its own noise, as `VLBLikelihood`
# does.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
left.semilogy(range(2, 51), one_step[1:].std(1), "C3.-", label="one-step ratio")
left.semilogy(range(2, 51), posterior_ratio.std(1), "C1.-", label="ratio to the posterior")
left.semilogy(range(2, 51), kl.std(1), "C0.-", label="KL")
left.set(xlabel="step t", ylabel="standard deviation (nats)", ylim=(1e-3, 3))
left.set_title("Each term, T = 50")
left.legend(fontsize=8)
single = {"one-step ratio": [], "KL": []}
lengths = [25, 50, 100, 200]
for T in lengths:
    ratios, _, divergences, *_ = follow_chains(ExactDenoiser(even_schedule(T)))
    step, index = torch.randint(1, T, (n,)), torch.arange(n)
    single["one-step ratio"].append(float((T - 1) * ratios[step, index].std()))
    single["KL"].append(float((T - 1) * divergences[step - 1, index].std()))
for color, (name, values) in zip(("C3", "C0"), single.items()):
    right.loglog(lengths, values, "o-", color=color, label=name)
    print(name, {T: round(value, 1) for T, value in zip(lengths, values)})
for T, ratio, divergence in zip(lengths, *single.values()):
    print(f"T = {T}: {(ratio / divergence) ** 2:.0f} times the variance")
right.set_xticks(lengths, lengths)
right.set_yticks([5, 10, 20, 50], [5, 10, 20, 50])
right.minorticks_off()
right.set(xlabel="T", ylabel="standard deviation (nats)", title="T - 1 times one random term")
right.legend(fontsize=8)
figure.tight_layout()
plt.show()
assert torch.all(kl.std(1) < posterior_ratio.std(1))
assert single["one-step ratio"][-1] > 10 * single["KL"][-1]

independent = NATS * every_step(exact, x0, {}, likelihood, generator("cpu", 3))
figure, ax = plt.subplots(figsize=(9, 2.8))
bins = torch.linspace(-6, 6, 121).numpy()
forms = {"ratios": ratio_form, "KL": kl_form, "KL, new noise in every term": independent}
for color, (name, values) in zip(("C3", "C0", "C2"), forms.items()):
    label = f"{name}: std {values.std():.2f}"
    ax.hist(
        values.numpy(), bins=bins, color=color, density=True, histtype="step", lw=2, label=label
    )
    print(f"{name}: mean {values.mean():.3f} +- {values.std() / math.sqrt(n):.3f}")
exact_nll = -mixture.log_density(x0[:1].flatten(1))
ax.axvline(exact_nll, color="k", label=r"exact $-\log p(x_0)$")
ax.set(xlabel="estimate of the bound (nats)", ylabel="density", title="All 50 terms of one point")
ax.legend(fontsize=8)
figure.tight_layout()
plt.show()
assert ratio_form.std() < independent.std() < kl_form.std()

# %% [markdown]
# ## One prediction, many names
#
# Both Gaussians in $L_t$ have the same variance, so only their means matter, and these differ only
# in $x_0$. All that a model has to predict is therefore $E[x_0 \mid x_t]$. Tweedie's formula
# ([Efron 2011](https://doi.org/10.1198/jasa.2011.tm11181)) connects it to the score:
#
# $$E[x_0 \mid x_t] = \frac{x_t + \sigma_t^2\, \nabla \log p(x_t)}{\alpha_t}, \qquad
# E[\epsilon \mid x_t] = -\sigma_t\, \nabla \log p(x_t).$$
#
# The check takes the gradient of the density of $x_t$, a mixture with means $\alpha_t m_k$ and
# variance $\alpha_t^2 0.1^2 + \sigma_t^2$. A second check uses no formula for the denoiser at all:
# the mean of 200,000 data points, weighted by $q(x_t \mid x_0)$.

# %%
i = 17
t, at = even.discrete_times[i], even.at(even.discrete_times[i])
noisy = replace(
    mixture,
    means=tuple((at.alpha * torch.tensor(mixture.means)).tolist()),
    std=float(((at.alpha * mixture.std) ** 2 + at.sigma**2).sqrt()),
)
line = torch.linspace(-1.6, 1.6, 13)
plane = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).reshape(-1, 2)
x_t = plane.clone().requires_grad_()
score = torch.autograd.grad(noisy.log_density(x_t).sum(), x_t)[0]
prediction = exact(plane[..., None, None], t, {})
assert torch.allclose(prediction.x0.flatten(1), (plane + at.sigma**2 * score) / at.alpha)
assert torch.allclose(prediction.eps.flatten(1), -at.sigma * score)

many = draw_points(200_000, generator("cpu", "many")).flatten(1)
for row in (60, 84, 110):
    log_weights = normal_log_prob(plane[row], at.alpha * many, at.sigma).sum(1)
    weighted = log_weights.softmax(0) @ many
    print(
        f"x_t {plane[row].tolist()}: weighted mean {[round(v, 3) for v in weighted.tolist()]},",
        end=" ",
    )
    print(f"formula {[round(v, 3) for v in prediction.x0[row].flatten().tolist()]}")
    assert torch.allclose(weighted, prediction.x0[row].flatten(), atol=0.01)

# %% [markdown]
# A parameterisation chooses which of these the network outputs. `target` computes the output from
# image and noise, `to_prediction` inverts it, and the results are the same. What differs is how an
# error of the network changes the prediction of the noise: `eps_jacobian`.

# %%
at_x = even.at(t, prediction.x0)
x_t = plane[..., None, None]
outputs = {}
for parameterization in (X0(), Eps(), V(), Score(), EDMPreconditioning(), PosteriorMean()):
    name = type(parameterization).__name__
    outputs[name] = parameterization.target(prediction.x0, prediction.eps, at_x)
    back = parameterization.to_prediction(outputs[name], x_t, at_x)
    assert torch.allclose(back.x0, prediction.x0) and torch.allclose(back.eps, prediction.eps)
    factors = [
        float(parameterization.eps_jacobian(even.at(even.discrete_times[k]))) for k in (1, 17, 49)
    ]
    print(f"{name:19s} error of eps per error of the output at steps 2, 18, 50:", end=" ")
    print(", ".join(f"{value:.3g}" for value in factors))

figure, axes = plt.subplots(1, 4, figsize=(9, 2.7), sharey=True)
titles = {"X0": r"$x_0$", "Eps": r"$\epsilon$", "V": r"$v$", "Score": "score"}
for ax, (name, title) in zip(axes, titles.items()):
    arrow = outputs[name].flatten(1)
    ax.quiver(*plane.T, *arrow.T, color="C0", angles="xy")
    ax.plot(*(at.alpha * torch.tensor(mixture.means)).T, "C3o", ms=5)
    ax.set(title=title, aspect="equal", xlim=(-1.9, 1.9), ylim=(-1.9, 1.9))
figure.suptitle(r"Four outputs at one noise level (dots: means of $p(x_t)$)", fontsize=10)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## From the bound to the simple loss
#
# With $x_0$ replaced by the noise, each term is a weighted squared error (Ho et al. 2020, eq. 12;
# `step_kl`):
#
# $$L_t = \frac{\beta_t^2}{2 \tilde\beta_t (1 - \beta_t)(1 - \bar\alpha_t)}
# \|\epsilon - \epsilon_\theta\|^2
# = \frac12 \left(\frac{\mathrm{SNR}_{t-1}}{\mathrm{SNR}_t} - 1\right)
# \|\epsilon - \epsilon_\theta\|^2.$$
#
# The simple loss sets all of these weights to 1 (eq. 14).
#
# For short steps the weight is $-\frac12 \lambda'_t\, dt$, and the sum becomes an integral over the
# log-SNR in which every noise level counts equally ([Kingma et al.
# 2021](https://arxiv.org/abs/2107.00630), eq. 17):
#
# $$\sum_t L_t \ \to\ \tfrac12 \int E\, \|\epsilon - \epsilon_\theta\|^2\, d\lambda
# = -\tfrac12\, (t_{max} - t_{min})\,
# E_t\left[\lambda'_t\, \|\epsilon - \epsilon_\theta\|^2\right].$$
#
# So the weight $-\lambda'_t$ (`LikelihoodWeighting`) gives the bound, and the simple loss weights
# noise levels by the density of $\lambda$ under uniform times: less weight on nearly clean images
# than in the bound (right panel). The network works under any schedule, since its preconditioning
# depends on $\sigma / \alpha$ only; the cell compares both losses under EDM's schedule.

# %%
at_t, at_s = schedule.at(times[1:]), schedule.at(times[:-1])
variance = ancestral_step(at_t, at_s)[2] ** 2
ddpm_weight = beta**2 / (2 * variance * (1 - beta) * at_t.sigma**2)
weight = torch.expm1(at_s.log_snr - at_t.log_snr) / 2
assert torch.allclose(ddpm_weight, weight)

eps, guess = torch.randn(49, 2, 1, 1), torch.randn(49, 2, 1, 1)
at_t, at_s = schedule.at(times[1:], eps), schedule.at(times[:-1], eps)
kl = step_kl(Prediction(x0=guess, eps=guess), eps, at_t, at_s)
assert torch.allclose(kl, weight * (eps - guess).square().flatten(1).sum(1))
print(
    "weights of the bound at steps 2, 10, 25, 50:",
    [round(float(weight[k]), 3) for k in (0, 8, 23, 48)],
)

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
left.semilogy(range(2, 51), weight / weight.mean(), "C0", label="bound")
left.semilogy(range(2, 51), torch.ones(49), "C1", label="simple")
left.set(
    xlabel="step t", ylabel="relative weight", title=r"Weight of $\|\epsilon - \epsilon_\theta\|^2$"
)
left.legend(fontsize=8)
for name, each, style in (("linear", LinearBetas(), "C1-"), ("cosine", CosineBetas(), "C1--")):
    curve = schedule_curve(each, 2001)
    right.plot(curve["log_snr"], curve["density"], style, label=f"simple, {name}")
right.plot([-10, 9], [1 / 19, 1 / 19], "C0", label="bound (ends -10 and 9)")
right.set(xlabel=r"log-SNR $\lambda$", ylabel="weight", title=r"The same per unit of $\lambda$")
right.legend(fontsize=8)
figure.tight_layout()
plt.show()

test_points = draw_points(20_000, generator("cpu", "weights"))
under_edm = Denoiser(network, EDMSchedule(0.05, 50.0), EDMPreconditioning())
under_ve = Denoiser(network, VE(0.05, 50.0), EDMPreconditioning())
bound_loss = ContinuousVLB(likelihood)
with torch.no_grad():
    rng = RandomSource.for_batch(generator("cpu", 1), len(test_points))
    weighted = WeightedMSE(weighting=LikelihoodWeighting())(under_edm, test_points, {}, rng)["loss"]
    diffusion = {}
    for name, denoiser in (("EDM", under_edm), ("VE", under_ve)):
        rng = RandomSource.for_batch(generator("cpu", 2), len(test_points))
        diffusion[name] = NATS * bound_loss(denoiser, test_points, {}, rng)["diffusion"]
weighted = 0.5 * 2 * weighted  # the loss is a mean over two values; times range 1
print(f"weighted squared error {weighted.mean():.3f}, bound {diffusion['EDM'].mean():.3f} nats")
error = (weighted.var() + diffusion["EDM"].var()).sqrt() / math.sqrt(len(test_points))
assert abs(weighted.mean() - diffusion["EDM"].mean()) < 4 * error

# %% [markdown]
# ## Questions
#
# ### 1. Does the bound depend on the schedule between its ends?
#
# The integral over $\lambda$ contains no time. VE and EDM's schedule have the same ends here,
# $\sigma = 0.05$ and 50, and different paths between.

# %%
for name, values in diffusion.items():
    print(
        f"{name:3s} diffusion term {values.mean():.3f} nats, standard deviation {values.std():.2f}"
    )
error = (diffusion["EDM"].var() + diffusion["VE"].var()).sqrt() / math.sqrt(len(test_points))
assert abs(diffusion["EDM"].mean() - diffusion["VE"].mean()) < 4 * error

# %% [markdown]
# No: the means agree within the sampling error. The path changes the variance of the estimate.
# Under VE the log-SNR is linear in time, so that the weight $-\lambda'$ is constant and the simple
# loss *is* the bound up to a constant factor.
#
# ### 2. Which variance should the reverse step have?
#
# DDPM tries $\tilde\beta_t$ and the larger $\beta_t$. `variance_fraction` interpolates between
# them, from 0 to 1, and `step_kl` includes the mismatch of the variances.

# %%
sums = {}
for fraction in (0.0, 0.5, 1.0):
    torch.manual_seed(1)
    total = 0.0
    for i in range(1, 50):
        at_t, at_s = even.at(times[i], points), even.at(times[i - 1], points)
        eps = torch.randn_like(points)
        prediction = exact(at_t.alpha * points + at_t.sigma * eps, times[i], {})
        prediction = prediction._replace(variance_fraction=torch.full_like(points, fraction))
        total += step_kl(prediction, eps, at_t, at_s).mean()
    sums[fraction] = float(total)
    print(f"fraction {fraction}: sum of the terms {sums[fraction]:.3f} nats")
assert sums[0.5] < min(sums[0.0], sums[1.0])

# %% [markdown]
# Neither: a variance between the two gives the smallest bound here. [Nichol and Dhariwal
# (2021)](https://arxiv.org/abs/2102.09672), eq. 15, let the network learn the fraction.
