# %% [markdown]
# # Scores, Langevin and SDEs
#
# The score of a distribution is enough to sample from it, but with a single noise level this fails
# in three ways. This notebook shows each failure on points in the plane, adds noise to fix them,
# and ends at the stochastic and the ordinary differential equation of diffusion models.
#
# You learn
#
# - what the score is, and why it does not exist for data on a manifold;
# - why a learned score is wrong where data are rare, and why Langevin dynamics loses the weights of
#   the modes;
# - how several noise levels solve these problems (annealed Langevin dynamics);
# - what VE and VP SDEs are, and how the reverse SDE differs from the probability-flow ODE;
# - how the ODE computes log-likelihoods.

# %% tags=["install"]
# Only needed outside of a checkout, for example in Colab.
# %pip install -q git+{REPOSITORY}

# %%
import math
from dataclasses import replace

import matplotlib.pyplot as plt
import torch

from gencompare.data.toy2d import DISTRIBUTIONS
from gencompare.diffusion.denoiser import Denoiser
from gencompare.diffusion.editing import trajectory
from gencompare.diffusion.likelihoods import ODELikelihood
from gencompare.diffusion.objectives import EDMWeighting, WeightedMSE
from gencompare.diffusion.ode_samplers import Heun
from gencompare.diffusion.parameterizations import EDMPreconditioning, Prediction
from gencompare.diffusion.samplers import DDIM, Ancestral
from gencompare.diffusion.schedules import CLEAN, VE, VP
from gencompare.diffusion.sde_samplers import AnnealedLangevin, EulerMaruyama
from gencompare.diffusion.times import LogNormalTimes, LogSNRGrid, UniformTimes
from gencompare.networks.mlp import DenoisingMLP
from gencompare.rng import RandomSource, generator

torch.manual_seed(0)
plt.rcParams.update({"figure.facecolor": "white", "axes.grid": False, "font.size": 9})

# %% [markdown]
# ## The score
#
# The score of a density is the gradient of its logarithm. It needs no normalising constant, and
# Langevin dynamics samples with it:
#
# $$s(x) = \nabla \log p(x), \qquad
# x \leftarrow x + k\, s(x) + \sqrt{2 k}\, z, \quad z \sim \mathcal N(0, I).$$
#
# The data are the example of [Song and Ermon (2019)](https://arxiv.org/abs/1907.05600), section
# 3.2.2, divided by 10:
# $0.2\, \mathcal N((-0.5, -0.5), 0.1^2 I) + 0.8\, \mathcal N((0.5, 0.5), 0.1^2 I)$. With noise,
# $x_t = \alpha_t x_0 + \sigma_t \epsilon$, they remain a mixture, and the optimal denoiser is
# known. The package works with denoisers, and the score of $p(x_t)$ is
# $-E[\epsilon \mid x_t] / \sigma_t$.

# %%
mixture = DISTRIBUTIONS["two_gaussians"]


class ExactDenoiser:
    """E[x_0 | x_t] and E[eps | x_t] for a mixture of Gaussians."""

    def __init__(self, schedule, mixture=mixture):
        self.schedule, self.mixture = schedule, mixture

    def __call__(self, x_t, t, cond):
        at, std = self.schedule.at(t, x_t), self.mixture.std
        means = x_t.new_tensor(self.mixture.means)[:, None, :, None, None]
        log_weight = x_t.new_tensor(self.mixture.weights).log().view(-1, 1, 1, 1, 1)
        variance = (at.alpha * std) ** 2 + at.sigma**2
        offset = x_t - at.alpha * means
        exponent = (-offset.square() / (2 * variance)).sum(2, keepdim=True)
        weight = (log_weight + exponent).softmax(0)
        x0 = (weight * (means + at.alpha * std**2 / variance * offset)).sum(0)
        return Prediction(x0=x0, eps=at.sigma / variance * (weight * offset).sum(0))


ve = VE(sigma_min=0.02, sigma_max=10.0)
exact = ExactDenoiser(ve)


def time_of(sigma):
    return ve.t_from_log_snr(torch.tensor(-2 * math.log(sigma)))


@torch.no_grad()
def score(denoiser, points, sigma):
    """The score of p_sigma at points (n, 2)."""
    t = time_of(sigma).expand(len(points))
    return -denoiser(points[..., None, None], t, {}).eps.flatten(1) / sigma


def draw_points(n, source):
    return mixture.sample(n, source)[0].float()[..., None, None]


def square(n, name):
    """Uniform points in [-1, 1]^2."""
    return 2 * torch.rand(n, 2, generator=generator("cpu", name)) - 1


line = torch.linspace(-1, 1, 21)
plane = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).reshape(-1, 2)
figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), sharey=True)
for ax, sigma in zip(axes, (0.05, 0.3, 1.0)):
    noisy = replace(mixture, std=math.hypot(mixture.std, sigma))
    x = plane.double().requires_grad_()
    log_p = noisy.log_density(x)
    gradient = torch.autograd.grad(log_p.sum(), x)[0].float()
    arrows = score(exact, plane, sigma)
    assert torch.allclose(arrows, gradient, rtol=1e-3, atol=1e-3)
    density = log_p.detach().exp().view(21, 21)
    ax.contourf(line, line, density, levels=12, cmap="Blues")
    direction = arrows / arrows.norm(dim=1, keepdim=True)
    ax.quiver(*plane.T, *direction.T, color="0.3", scale=28, width=0.004)
    size = arrows.norm(dim=1).median()
    ax.set(title=f"$\\sigma$ = {sigma}, median length {size:.3g}", aspect="equal", xlabel="$x_1$")
axes[0].set_ylabel("$x_2$")
figure.suptitle("Density with noise, and the direction of its score", fontsize=10)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Failure 1: data on a manifold have no score
#
# Score matching needs samples only. [Hyvarinen
# (2005)](https://jmlr.org/papers/v6/hyvarinen05a.html), theorem 1, shows that
#
# $$\tfrac12 E\|s(x) - \nabla \log p(x)\|^2
# = E\left[\tfrac12 \|s(x)\|^2 + \nabla \cdot s(x)\right] + \text{const},$$
#
# *if $p$ is a density*. Points on a line are not, and the right side has no minimum. The cell takes
# scores that point to the line, $s_v(x) = -d(x)\, n / v$ with unit normal $n$ and signed distance
# $d(x) = n \cdot x$. On the line the first term is 0 and the second $-1 / v$, so the loss falls
# without bound as $v \to 0$. With noise $\sigma$ it is $\sigma^2 / (2 v^2) - 1 / v$, with a minimum
# at $v = \sigma^2$.

# %%
normal = torch.tensor([1.0, -1.0]) / math.sqrt(2)


def score_matching_loss(s, x):
    x = x.clone().requires_grad_()
    value = s(x)
    rows = [torch.autograd.grad(value[:, k].sum(), x, retain_graph=True)[0][:, k] for k in (0, 1)]
    return (value.square().sum(1) / 2 + sum(rows)).mean().detach()


def towards_line(v):
    return lambda x: -(x @ normal)[:, None] * normal / v


along = 0.5 * torch.randn(4000, 1)
on_line = along * torch.tensor([1.0, 1.0]) / math.sqrt(2)
variances = torch.logspace(-4, 0, 41)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
for color, sigma in zip(("C3", "C0", "C2"), (0.0, 0.1, 0.3)):
    x = on_line + sigma * torch.randn(4000, 2)
    losses = torch.stack([score_matching_loss(towards_line(v), x) for v in variances])
    left.plot(variances, losses, color=color, label=rf"$\sigma = {sigma}$")
    if sigma:
        best = float(variances[losses.argmin()])
        left.plot(best, losses.min(), "o", color=color)
        print(f"sigma {sigma}: minimum at v = {best:.4f}, sigma^2 = {sigma**2:.4f}")
        assert 0.75 < best / sigma**2 < 1.33
    else:
        assert torch.allclose(losses, -1 / variances, rtol=1e-3, atol=1e-3)
left.set_yscale("symlog", linthresh=10)
left.set(xscale="log", xlabel="v", ylabel="loss", ylim=(-2e4, 2e4), title="Score matching loss")
left.legend(fontsize=8)
sigmas = torch.logspace(-2, 1, 31)
right.loglog(sigmas, 0.1 / sigmas**2, "C3", label="0.1 from the line")
typical = [(sigma * torch.randn(4000) / sigma**2).square().mean().sqrt() for sigma in sigmas]
right.loglog(sigmas, typical, "C0", label="at noisy data (RMS)")
right.set(xlabel=r"noise level $\sigma$", ylabel=r"$|s|$", title="Exact score normal to the line")
right.legend(fontsize=8)
figure.tight_layout()
plt.show()

# %% [markdown]
# With noise the score exists. At a fixed distance it grows as $1 / \sigma^2$, but noisy data lie
# only about $\sigma$ from the line, where it is of size $1 / \sigma$ (right panel). Predicting
# $\epsilon = -\sigma s$ makes the size the same at every level.
#
# ## Failure 2: the score is inaccurate where data are rare
#
# Denoising score matching ([Vincent 2011](https://doi.org/10.1162/NECO_a_00142)) learns the score
# of $p_\sigma$ by predicting noise. The loss only sees noisy data. Two networks are trained with it
# under the VE schedule: one at $\sigma = 0.05$, one at all levels from 0.02 to 10. Every batch
# contains new points, so overfitting is not the cause of what follows.


# %%
def train(times, steps=500):
    torch.manual_seed(0)
    source = generator("cpu", "training")
    denoiser = Denoiser(DenoisingMLP((2, 1, 1), 2, width=64, depth=2), ve, EDMPreconditioning())
    objective = WeightedMSE(weighting=EDMWeighting(), times=times)
    optimizer = torch.optim.Adam(denoiser.network.parameters(), lr=3e-3)
    for step in range(steps):
        rng = RandomSource.for_batch(source, 256)
        loss = objective(denoiser, draw_points(256, source), {}, rng)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - (step + 1) / steps)
    return denoiser


one_level = train(LogNormalTimes(mean=math.log(0.05), std=1e-4))
many_levels = train(UniformTimes())

# %% [markdown]
# The relative error below is
# $\sqrt{E\|s - \nabla \log p_\sigma\|^2 / E\|\nabla \log p_\sigma\|^2}$; a score of 0 has an error
# of 1.

# %%
line = torch.linspace(-1, 1, 61)
plane = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).reshape(-1, 2)
clean = draw_points(2000, generator("cpu", "points")).flatten(1)
cases = {"one level": (one_level, 0.05), "many levels": (many_levels, 0.05)}
cases["many levels, more noise"] = (many_levels, 1.0)
errors = {}
figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), sharey=True, layout="constrained")
for ax, (name, (denoiser, sigma)) in zip(axes, cases.items()):
    on_data = clean + sigma * torch.randn_like(clean)
    for where, x in (("noisy data", on_data), ("square", square(4000, "square"))):
        truth = score(exact, x, sigma)
        error = (score(denoiser, x, sigma) - truth).square().sum() / truth.square().sum()
        errors[name, where] = float(error.sqrt())
    truth = score(exact, plane, sigma)
    error = (score(denoiser, plane, sigma) - truth).norm(dim=1) / truth.norm(dim=1)
    image = ax.imshow(
        error.view(61, 61), extent=(-1, 1, -1, 1), origin="lower", vmin=0, vmax=1, cmap="magma"
    )
    ax.plot(*on_data[:300].T, ".", color="cyan", ms=1.5)
    ax.set(title=f"{name}\n$\\sigma$ = {sigma}", xlabel="$x_1$", xlim=(-1, 1), ylim=(-1, 1))
    print(
        f"{name}, sigma {sigma}: relative error {errors[name, 'noisy data']:.2f} at noisy data,",
        end=" ",
    )
    print(f"{errors[name, 'square']:.2f} over the square")
axes[0].set_ylabel("$x_2$")
figure.colorbar(image, ax=axes, label="relative error")
plt.show()
assert errors["one level", "square"] > 2 * errors["one level", "noisy data"]
assert errors["many levels", "square"] > 0.3 > 0.1 > errors["many levels, more noise", "square"]

# %% [markdown]
# Where there are no noisy data (cyan), the score at $\sigma = 0.05$ is wrong, whether or not the
# network has seen other levels. More noise leaves no empty region: at $\sigma = 1$ the score is
# accurate over the whole square. (The bright dot is the point where the exact score is 0, so that
# every error is relatively large.) A sampler should therefore start with much noise.
#
# ## Failure 3: Langevin dynamics loses the weights of the modes
#
# Where two modes do not overlap, $\nabla \log (w_k\, p_k(x)) = \nabla \log p_k(x)$: the score does
# not contain the weights. The sampler takes 1000 Langevin steps at one level, with the *exact*
# score, from points that are uniform over the square. Annealed Langevin dynamics (Song and Ermon
# 2019, algorithm 1) takes as many steps, 50 at each of 20 levels from 10 to 0.02.


# %%
def small_mode_weight(x):
    """The fraction of points nearer to the small mode; exactly 0.2."""
    return float((x.flatten(1).sum(1) < 0).float().mean())


def mode_std(x):
    """The standard deviation per coordinate about the nearer mode; exactly 0.1."""
    centre = x.flatten(1).sum(1, keepdim=True).sign() / 2
    return float((x.flatten(1) - centre).square().mean().sqrt())


def langevin(sigma, n=1000, denoise=False):
    sampler = AnnealedLangevin(num_steps=1, num_langevin_steps=1000, denoise=denoise)
    times = torch.stack([time_of(sigma), torch.tensor(CLEAN)])
    start = square(n, "start")[..., None, None]
    return sampler.sample(exact, start, generator=generator("cpu", 0), times=times)


n = 2000
annealed = AnnealedLangevin(num_steps=20, num_langevin_steps=50)
start = ve.prior((n, 2, 1, 1), generator("cpu", "prior"))
results = {
    "data": draw_points(n, generator("cpu", "data")),
    r"Langevin, $\sigma$ = 0.02": langevin(0.02, denoise=True),
    "annealed, exact": annealed.sample(exact, start, generator=generator("cpu", 1)),
}
with torch.no_grad():
    results["annealed, learned"] = annealed.sample(
        many_levels, start[:1000], generator=generator("cpu", 1)
    )
figure, axes = plt.subplots(1, 4, figsize=(9, 2.8), sharey=True)
for ax, (name, x) in zip(axes, results.items()):
    ax.plot(*x.flatten(1)[:1000].T, ".", ms=2, alpha=0.5)
    weight = small_mode_weight(x)
    ax.set(title=f"{name}\nweight {weight:.2f}, std {mode_std(x):.3f}", aspect="equal")
    ax.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), xlabel="$x_1$")
axes[0].set_ylabel("$x_2$")
figure.tight_layout()
plt.show()
assert small_mode_weight(results[r"Langevin, $\sigma$ = 0.02"]) > 0.4
assert abs(small_mode_weight(results["annealed, exact"]) - 0.2) < 0.04
assert small_mode_weight(results["annealed, learned"]) < 0.35

# %% [markdown]
# Could a single, larger level do? Noise connects the modes, but it also blurs the samples. Below,
# the noise of the level is left in.

# %%
levels = (0.02, 0.1, 0.15, 0.2, 0.3)
singles = {sigma: langevin(sigma) for sigma in levels}
figure, ax = plt.subplots(figsize=(6, 3))
spreads = [mode_std(x) for x in singles.values()]
weights = [small_mode_weight(x) for x in singles.values()]
ax.plot(spreads, weights, "C3o-", label=r"one level (labels: $\sigma$)")
for sigma, spread, weight in zip(levels, spreads, weights):
    ax.annotate(f"{sigma}", (spread, weight), (4, 4), textcoords="offset points", color="C3")
    print(f"sigma {sigma}: weight {weight:.2f}, standard deviation of a mode {spread:.3f}")
x = results["annealed, exact"]
ax.plot(mode_std(x), small_mode_weight(x), "C0s", label="annealed, 20 levels")
ax.plot(0.1, 0.2, "k+", ms=16, label="data")
ax.set(xlabel="standard deviation of a mode", ylabel="weight of the small mode", ylim=(0.1, 0.6))
ax.set_xlim(0.08, 0.34)
ax.set_title("Langevin dynamics with the exact score, 1000 steps")
ax.legend(fontsize=8)
figure.tight_layout()
plt.show()
assert all(weight > 0.25 or spread > 0.15 for weight, spread in zip(weights, spreads))

# %% [markdown]
# No single level gives both numbers. The annealed sampler does with the exact score. With the
# learned score (last panel of the previous figure) its weight is still too large after this short
# training, but far from the one half of a single level.
#
# ## Infinitely many levels: VE and VP SDEs
#
# With ever more levels, adding noise becomes a stochastic differential equation ([Song et al.
# 2021](https://arxiv.org/abs/2011.13456), eq. 5):
#
# $$dx = f(t)\, x\, dt + g(t)\, dw, \qquad
# f = \frac{d \log \alpha}{dt}, \qquad g^2 = -\sigma^2 \frac{d \lambda}{dt}.$$
#
# The variance-exploding SDE (VE, eq. 9) has $f = 0$ and a growing $\sigma$; the variance-preserving
# one (VP, eq. 11) has $f = -\beta / 2$ and $g^2 = \beta$, the limit of DDPM's chain.
# `schedule.sde(t)` returns $f$ and $g^2$. The cell simulates both from data in 1000 small steps,
# and compares the result with $\alpha_t x_0 + \sigma_t \epsilon$.

# %%
vp = VP()
t = torch.tensor([0.4])
beta = vp.beta_min + t * (vp.beta_max - vp.beta_min)
f, g2 = vp.sde(t)
assert torch.allclose(f, -beta / 2) and torch.allclose(g2, beta)
f, g2 = ve.sde(t)
assert f == 0 and torch.allclose(g2, 2 * ve.at(t).sigma ** 2 * math.log(10.0 / 0.02), rtol=1e-4)

figure, axes = plt.subplots(1, 2, figsize=(9, 3))
x0 = torch.where(torch.arange(2000) % 5 == 0, -0.5, 0.5)
for ax, name, schedule in zip(axes, ("VE", "VP"), (ve, vp)):
    times = torch.linspace(schedule.t_min, schedule.t_max, 1001)
    x, paths = x0 + schedule.at(times[0]).sigma * torch.randn(2000), []
    for f, g2, dt in zip(*schedule.sde(times), times.diff()):
        paths.append(x)
        x = x + f * x * dt + (g2 * dt).sqrt() * torch.randn(2000)
    paths = torch.stack([*paths, x])
    at = schedule.at(times)
    spread = (paths - at.alpha[:, None] * x0).std(1)
    print(f"{name}: largest relative deviation of sigma {(spread / at.sigma - 1).abs().max():.3f}")
    assert (spread / at.sigma - 1).abs().max() < 0.12
    ax.plot(times, paths[:, :25], lw=0.5, alpha=0.7)
    for sign in (-2, 2):
        ax.plot(times, 0.3 * at.alpha + sign * (0.16 * at.alpha**2 + at.sigma**2).sqrt(), "k--")
    ax.set(xlabel="t", ylabel="x", title=f"{name}: 25 paths, mean $\\pm$ 2 std (dashed)")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Two ways back
#
# The SDE can be reversed in time, given the score (Song et al. 2021, eq. 6), and there is an ODE
# with the same marginal distributions (eq. 13), the probability-flow ODE:
#
# $$dx = \left(f x - g^2\, \nabla \log p(x)\right) dt + g\, d\bar w, \qquad
# \frac{dx}{dt} = f x - \tfrac12 g^2\, \nabla \log p(x).$$
#
# `EulerMaruyama` solves the first and `Heun` the second. Both start from the same 2000 noise
# vectors, under VP, with the exact score.

# %%
noise = vp.prior((2000, 2, 1, 1), generator("cpu", "noise"))
under_vp = ExactDenoiser(vp)
solvers = {
    "reverse SDE": EulerMaruyama(num_steps=300),
    "probability-flow ODE": Heun(num_steps=100),
}
solved = {
    name: trajectory(solver, under_vp, noise, count=300, generator=generator("cpu", 5))
    for name, solver in solvers.items()
}
figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True)
for ax, (name, path) in zip(axes, solved.items()):
    x = path.states.flatten(2)
    ax.plot(*x[-1].T, ".", color="0.8", ms=2)
    for k in range(4):
        start = noise[k].flatten()
        ax.plot([start[0], *x[:, k, 0]], [start[1], *x[:, k, 1]], lw=0.8, color=f"C{k}")
        ax.plot(*start, "o", color=f"C{k}", mec="k", ms=7, zorder=3)
    ax.set(title=name, xlabel="$x_1$", aspect="equal", xlim=(-2.6, 2.6), ylim=(-2.6, 2.6))
axes[0].set_ylabel("$x_2$")
figure.suptitle(
    "Four trajectories from the same noise (dots), and 2000 samples (grey)", fontsize=10
)
figure.tight_layout()
plt.show()

# %% [markdown]
# The trajectories of the ODE do not cross at equal times, and each noise vector has one image.
# Those of the SDE forget where they start: the correlation between their two ends is close to 0.
# The distribution over all trajectories is nevertheless the same at every time: the figure follows
# $u = (x_1 + x_2) / \sqrt 2$, the coordinate along the two modes, whose exact standard deviation is
# $\sqrt{\alpha_t^2\, (0.1^2 + 0.32) + \sigma_t^2}$.

# %%
memory = {}
figure, axes = plt.subplots(1, 3, figsize=(9, 3))
for ax, (name, path) in zip(axes, solved.items()):
    u = path.states.flatten(2).sum(2) / math.sqrt(2)
    times = path.times.clamp(min=0)  # the last state is clean data
    ax.plot(times, u[:, :40], lw=0.5, alpha=0.8)
    ax.set(title=name, xlabel="t", ylabel="u", xlim=(1, 0))
    at = vp.at(path.times)
    exact_std = (at.alpha**2 * (0.01 + 0.32) + at.sigma**2).sqrt()
    axes[2].plot(times, u.std(1), label=name)
    deviation = (u.std(1) / exact_std - 1).abs().max()
    ends = torch.stack([noise.flatten(1).sum(1), u[-1]])
    memory[name] = float(torch.corrcoef(ends)[0, 1])
    print(f"{name}: correlation of u at both ends {memory[name]:.2f},", end=" ")
    print(f"weight {small_mode_weight(path.states[-1]):.3f},", end=" ")
    print(f"std of a mode {mode_std(path.states[-1]):.3f},", end=" ")
    print(f"largest relative deviation of std(u) {deviation:.3f}")
    assert deviation < 0.08
assert memory["probability-flow ODE"] > 0.5 > 0.1 > abs(memory["reverse SDE"])
axes[2].plot(times, exact_std, "k--", label="exact")
axes[2].set(title="Standard deviation of u", xlabel="t", xlim=(1, 0), ylim=(0, 1.2))
axes[2].legend(fontsize=8)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Log-likelihood by the ODE
#
# The ODE is an invertible map from data to noise, so the change of variables gives a density (Song
# et al. 2021, eq. 39):
#
# $$\log p(x_0) = \log p_T(x_T) + \int_0^T \nabla \cdot h(x_t, t)\, dt, \qquad
# \frac{dx}{dt} = h(x, t).$$
#
# `ODELikelihood` integrates this from the data, taken as $x_t / \alpha_t$ at $t_{min}$. Under VP
# the noise at $t_{min}$ is 0.001 and negligible. The learned score needs its VE schedule, which
# starts at a noise of 0.02, so that its values are compared with the density of the data with this
# noise.

# %%
method = ODELikelihood(rtol=1e-4, atol=1e-4, exact_trace=True)
points = draw_points(500, generator("cpu", "test"))
noisy = replace(mixture, std=math.hypot(mixture.std, 0.02))
true_log_p = mixture.log_density(points.flatten(1).double()).float()
true_noisy = noisy.log_density(points.flatten(1).double()).float()
comparisons = {
    "VP, exact score": (under_vp, true_log_p),
    "VE, exact score": (exact, true_noisy),
    "VE, learned score": (many_levels, true_noisy),
}
found = {}
for name, (denoiser, truth) in comparisons.items():
    found[name] = method.log_density(denoiser, points, {}, generator("cpu", 0))
    print(f"{name}: mean log p {found[name].mean():.3f}, true {truth.mean():.3f},", end=" ")
    print(f"mean absolute error {(found[name] - truth).abs().mean():.4f}")
assert (found["VP, exact score"] - true_log_p).abs().mean() < 0.02
assert (found["VE, exact score"] - true_noisy).abs().mean() < 0.06
assert found["VE, learned score"].mean() < true_noisy.mean() + 0.05

line = torch.linspace(-1, 1, 31)
plane = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).reshape(-1, 2)
maps = {
    "true": noisy.log_density(plane.double()).float(),
    "ODE, learned score": method.log_density(
        many_levels, plane[..., None, None], {}, generator("cpu", 0)
    ),
}
corner = 30  # the point (1, -1)
for name, values in maps.items():
    print(f"log p at {plane[corner].tolist()}, {name}: {values[corner]:.0f}")
figure, axes = plt.subplots(1, 3, figsize=(9, 3))
for ax, (name, values) in zip(axes, maps.items()):
    image = ax.imshow(
        values.view(31, 31), extent=(-1, 1, -1, 1), origin="lower", vmin=-30, vmax=3, cmap="viridis"
    )
    ax.set(title=f"log p: {name}", xlabel="$x_1$", ylabel="$x_2$")
    figure.colorbar(image, ax=ax, shrink=0.75)
for name, (_, truth) in reversed(comparisons.items()):
    axes[2].plot(truth, found[name], ".", ms=3, label=name)
axes[2].plot([-5, 3], [-5, 3], "k", lw=1)
axes[2].set(xlabel="true log p", ylabel="log p by the ODE", title="500 data points")
axes[2].legend(fontsize=8)
figure.tight_layout()
plt.show()

# %% [markdown]
# With the exact score under VP the error is that of the solver. Under VE the start of sampling,
# $\mathcal N(0, 10^2 I)$, ignores the mean $(0.3, 0.3)$ of the data, and this mismatch alone costs
# a few hundredths of a nat. The learned score adds its own error, which is small at data and large
# in the empty corners: the second failure again.
#
# ## Questions
#
# ### 1. At which noise level does the score know the weights?
#
# Swap the weights of the two modes, and compare the scores at noisy data of each level.

# %%
swapped = ExactDenoiser(ve, replace(mixture, weights=(0.8, 0.2)))
changes = {}
for sigma in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0):
    x = clean + sigma * torch.randn_like(clean)
    truth_at_x = score(exact, x, sigma)
    change = (score(swapped, x, sigma) - truth_at_x).square().sum() / truth_at_x.square().sum()
    changes[sigma] = float(change.sqrt())
    print(f"sigma {sigma}: relative change of the score {changes[sigma]:.1e}")
assert changes[0.1] < 1e-5 and changes[0.5] > 0.4

# %% [markdown]
# At 0.1 and below the relative change is less than 0.001%, so no sampler can tell the two
# distributions apart. At 0.5 they differ by half of their size: this is where the weights are
# learned, and where an annealed sampler decides on a mode.
#
# ### 2. How many steps do the SDE and the ODE need?
#
# The exact values are 0.2 for the weight of the small mode and 0.1 for its standard deviation.
# `Ancestral` samples the reverse SDE, `DDIM` and `Heun` solve the ODE. All steps are evenly spaced
# in log-SNR, and a step of `Heun` takes two network calls.


# %%
def weight_and_std(solver):
    x = solver.sample(under_vp, noise, generator=generator("cpu", 7))
    return round(small_mode_weight(x), 3), round(mode_std(x), 3)


table = {
    sampler.__name__: {
        steps: weight_and_std(sampler(num_steps=steps, grid=LogSNRGrid()))
        for steps in (10, 20, 40, 80, 160)
    }
    for sampler in (Ancestral, DDIM, Heun)
}
for name, values in table.items():
    print(f"{name:10s}", values)
for steps in (20, 40, 80):
    assert abs(table["DDIM"][steps][1] - 0.1) < abs(table["Ancestral"][steps][1] - 0.1)
assert abs(table["Heun"][20][0] - 0.2) < abs(table["Ancestral"][40][0] - 0.2)

# %% [markdown]
# The ODE needs fewer steps. DDIM has the right standard deviation after 20 steps, the reverse SDE
# is not there after 80. Twenty steps of Heun, 40 network calls, give a better weight than 40 steps
# of the SDE. (The sampling error of a weight is 0.009.)
#
# ### 3. Does the log-likelihood need the exact trace?
#
# The trace of a large network is estimated with one random vector per image (Song et al. 2021,
# appendix D.2). Here it is repeated 200 times for a single point.

# %%
point = points[:1]
estimates = ODELikelihood(rtol=1e-4, atol=1e-4).log_density(
    many_levels, point.expand(200, -1, -1, -1), {}, generator("cpu", 9)
)
print(f"exact trace {found['VE, learned score'][0]:.3f}; random vectors: mean", end=" ")
print(f"{estimates.mean():.3f}, standard deviation of one estimate {estimates.std():.3f}")
print(f"standard deviation of one estimate {estimates.std():.3f}")
error = estimates.std() / math.sqrt(len(estimates))
assert abs(estimates.mean() - found["VE, learned score"][0]) < 4 * error + 0.01

# %% [markdown]
# No: the estimate is unbiased, and its mean agrees with the exact trace. A single estimate of this
# point varies by a few hundredths of a nat.
