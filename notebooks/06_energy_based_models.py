# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Energy-based models
#
# An energy-based model is a density without its normalising constant. This notebook shows what
# can be done without the constant: sample, train, compare two points, and combine models.
#
# - The score $\nabla_x \log p(x)$ is the negative gradient of the energy, and needs no
#   normaliser.
# - Langevin dynamics samples with noise, and only finds modes without it.
# - Maximum likelihood lowers the energy of data and raises that of chains (contrastive
#   divergence).
# - Density ratios of a trained model need no normaliser either.
# - A sum of energies is a product of densities, sampled without any training.

# %% tags=["install"]
# Only needed outside of a checkout, for example in Colab.
# %pip install -q git+{REPOSITORY}

# %%
import logging
import math
import warnings
from functools import partial

import matplotlib.pyplot as plt
import pytorch_lightning as pl
import torch

from gencompare.data.toy2d import DISTRIBUTIONS, GaussianMixture
from gencompare.generative_model import DataSpec
from gencompare.models.energy import EBM
from gencompare.models.langevin import Langevin, input_gradient, last_state
from gencompare.networks.energy_networks import EnergyMLP
from gencompare.training.learning_rate import WarmupDecay

torch.manual_seed(0)
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
warnings.filterwarnings("ignore")
plt.rcParams.update({"figure.facecolor": "white", "savefig.facecolor": "white"})

# %% [markdown]
# ## The unnormalised density
#
# An energy $E$ defines a density at temperature $T$ ([Du and Mordatch
# 2019](https://arxiv.org/abs/1903.08689), section 3, with $T = 1$):
#
# $$p(x) = \frac{e^{-E(x) / T}}{Z}, \qquad Z = \int e^{-E(x) / T}\, dx .$$
#
# The first example has a known density, a mixture of two wide Gaussians, and an energy that
# differs from $-\log p$ by an arbitrary constant. On a grid in the plane $Z$ is a sum, so it can
# be checked: it is $e^{-3}$ here. For the 8x8 digits with 17 grey levels the sum has $17^{64}$
# terms, and $Z$ is out of reach.

# %%
truth = GaussianMixture((0.3, 0.7), ((-0.6, 0.0), (0.6, 0.0)), 0.3)


def energy(x):
    return 3.0 - truth.log_density(x.flatten(1))


axis = torch.linspace(-2, 2, 161)
plane = torch.cartesian_prod(axis, axis)
cell = float(axis[1] - axis[0]) ** 2
Z = float((-energy(plane)).exp().sum() * cell)
print(f"Z = {Z:.5f}, exp(-3) = {math.exp(-3):.5f}")
assert math.isclose(Z, math.exp(-3), rel_tol=1e-3)

# %% [markdown]
# ## The score without the normaliser
#
# $\log Z$ does not depend on $x$, so it has no gradient:
#
# $$\nabla_x \log p(x) = -\tfrac{1}{T} \nabla_x E(x) - \nabla_x \log Z = -\tfrac{1}{T} \nabla_x E(x) .$$
#
# `input_gradient` computes the gradient of an energy for each row of a batch. It equals the score
# of the mixture, $\sum_k p(k \mid x)\, (\mu_k - x) / \sigma^2$, whatever the constant in the
# energy.

# %%
coarse = torch.linspace(-1.4, 1.4, 15)
points = torch.cartesian_prod(coarse, coarse * 0.6)
score = -input_gradient(energy, points)

means, weights = torch.tensor(truth.means), torch.tensor(truth.weights)
offsets = means - points[:, None]
posterior = (weights.log() - offsets.square().sum(-1) / (2 * truth.std**2)).softmax(1)
closed_form = (posterior[..., None] * offsets).sum(1) / truth.std**2
assert torch.allclose(score, closed_form, atol=1e-4)
print("largest difference:", float((score - closed_form).abs().max()))

# %%
image = energy(plane).reshape(161, 161).T
fig, ax = plt.subplots(figsize=(7, 3.6))
shown = ax.contourf(
    axis, axis, image, levels=torch.linspace(2, 16, 15).tolist(), cmap="viridis", extend="max"
)
ax.quiver(*points.T, *score.T, color="white", scale=150, width=0.003)
ax.set(
    xlim=(-1.5, 1.5),
    ylim=(-1, 1),
    xlabel="$x_1$",
    ylabel="$x_2$",
    title="energy, and score (arrows)",
)
fig.colorbar(shown, label="$E(x)$")
plt.show()

# %% [markdown]
# ## Langevin chains with and without noise
#
# A Langevin step goes down the energy and adds noise (`Langevin`; Roberts and Tweedie 1996):
#
# $$x' = x - \eta\, \nabla E(x) + \tau z, \quad z \sim N(0, I), \qquad T = \frac{\tau^2}{2 \eta} .$$
#
# The ratio of $\tau^2$ and $\eta$ sets the temperature. The steps below have $T = 1$. The first
# chains receive zeros instead of $z$: this is gradient descent, and it ends in the two minima of
# the energy. The second chains receive noise.

# %%
langevin = Langevin(step_size=0.01, noise_std=math.sqrt(0.02))
assert math.isclose(langevin.temperature, 1.0)
generator = torch.Generator().manual_seed(0)
start = 3 * torch.rand(4000, 2, generator=generator) - 1.5


def no_noise():
    return torch.zeros(4000, 2)


def noise():
    return torch.randn(4000, 2, generator=generator)


descended = last_state(langevin.trajectory(energy, start, 500, no_noise))
sampled = last_state(langevin.trajectory(energy, start, 500, noise))

nearest = torch.cdist(descended, means).min(1).values
print(f"without noise: largest distance to a mean of the mixture {float(nearest.max()):.4f}")
print(
    f"with noise:    standard deviation of x_2 {float(sampled[:, 1].std()):.3f} (exact: {truth.std})"
)
assert nearest.max() < 0.02 and abs(float(sampled[:, 1].std()) - truth.std) < 0.02

# %% [markdown]
# The histograms of $x_1$ show the difference. Without noise all chains collapse into two spikes,
# which say where the modes are and nothing about their width. With noise the histogram follows
# the density. The fractions on both sides are right too, because chains can cross
# the low barrier between these modes.

# %%
marginal = truth.log_density(plane).exp().reshape(161, 161).sum(1) * (axis[1] - axis[0])
fig, axes = plt.subplots(1, 2, figsize=(9, 3))
for ax, x, title in zip(
    axes, (descended, sampled), ("without noise: modes", "with noise: samples")
):
    ax.hist(
        x[:, 0],
        bins=torch.linspace(-2, 2, 61).tolist(),
        density=True,
        color="tab:blue",
        alpha=0.6,
        label="chains",
    )
    ax.plot(axis, marginal, color="black", label="density")
    ax.set(xlabel="$x_1$", ylabel="density", title=title)
    ax.legend()
plt.tight_layout()
plt.show()
right = float((sampled[:, 0] > 0).float().mean())
exact_right = float(marginal[axis > 0].sum() / marginal.sum())
print(f"fraction of chains with x_1 > 0: {right:.3f}, exact {exact_right:.3f}")
assert abs(right - exact_right) < 0.04

# %% [markdown]
# Langevin steps are exact only for $\eta \to 0$. For the energy $E(x) = \lambda \lVert x \rVert^2
# / 2$ a step is linear in $x$, and the variance of the chains converges to
#
# $$\frac{T}{\lambda} \cdot \frac{1}{1 - \eta \lambda / 2} \qquad \text{instead of} \qquad \frac{T}{\lambda} .$$
#
# The next cell measures this bias at three step sizes.

# %%
curvature = 4.0


def quadratic(x):
    return curvature * x.square().sum(1) / 2


for step_size in (0.02, 0.1, 0.3):
    steps = Langevin(step_size, math.sqrt(2 * step_size))
    chains = last_state(
        steps.trajectory(
            quadratic,
            torch.zeros(20_000, 2),
            120,
            lambda: torch.randn(20_000, 2, generator=generator),
        )
    )
    predicted = 1 / curvature / (1 - step_size * curvature / 2)
    print(
        f"step {step_size:4.2f}: variance {float(chains.var()):.3f}, predicted {predicted:.3f}, exact {1 / curvature}"
    )
    assert math.isclose(float(chains.var()), predicted, rel_tol=0.03)

# %% [markdown]
# ## Training with short chains
#
# The gradient of the negative log-likelihood with respect to the parameters $\theta$ of the
# energy also avoids $Z$ ([Hinton 2002](https://www.cs.toronto.edu/~hinton/absps/nccd.pdf)):
#
# $$-T\, \nabla_\theta\, E_{data}[\log p(x)] = E_{data}[\nabla_\theta E(x)] - E_p[\nabla_\theta E(x)] .$$
#
# The first term lowers the energy of data, and the second one raises the energy of samples of the
# model. Contrastive divergence estimates the second term with short chains. The package's `EBM`
# (`model=ebm`) runs ten steps per batch and keeps the chains in a replay buffer, so that they
# continue in the next batch. The data are three Gaussians with weights 0.5, 0.3 and 0.2. They
# overlap, so that chains can move between them.


# %%
class History(pl.Callback):
    """Keeps the metrics of every training step."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        self.rows.append({name: float(value) for name, value in outputs.items()})


data = GaussianMixture((0.5, 0.3, 0.2), ((0.5, 0.0), (-0.25, 0.43), (-0.25, -0.43)), 0.16)
points = data.sample(20_000, torch.Generator().manual_seed(0))[0].float()[:, :, None, None]
loader = torch.utils.data.DataLoader(points, batch_size=250, shuffle=True)
model = EBM(
    DataSpec("three_gaussians", (2, 1, 1), num_bins=None),
    energy=partial(EnergyMLP, width=64, depth=3),
    langevin=Langevin(step_size=0.005, noise_std=0.1),
    num_langevin_steps=10, num_sampling_steps=200, buffer_size=1000, reinit_prob=0.05, energy_l2=0.0,
    optimizer=partial(torch.optim.Adam, lr=5e-3, betas=(0.0, 0.999)),
    lr_schedule=WarmupDecay(decay="cosine"),
)  # fmt: skip
history = History()
trainer = pl.Trainer(
    max_epochs=6, accelerator="cpu", logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, callbacks=[history],
)  # fmt: skip
trainer.fit(model, loader)
model.eval()
print(f"{len(history.rows)} steps, temperature {model.langevin.temperature:.2f}")

# %% [markdown]
# The loss of an energy-based model is the difference of two mean energies. It is near zero
# whenever chains and data look alike to the network, at the start as well as at the end, so it
# does not measure progress. In the plane there is a better measure: normalise the model on a
# grid, and compute $KL(p \,\|\, p_\theta)$.

# %%
axis = torch.linspace(-1.3, 1.3, 131)
plane = torch.cartesian_prod(axis, axis)
cell = float(axis[1] - axis[0]) ** 2
with torch.no_grad():
    log_model = model.unnormalized_log_density(plane[:, :, None, None])
log_model = log_model - (log_model.logsumexp(0) + math.log(cell))
log_data = data.log_density(plane)
kl = float((log_data.exp() * (log_data - log_model)).sum() * cell)
kl_uniform = float((log_data.exp() * log_data).sum() * cell + math.log(2.6**2))
print(
    f"KL(data || model) = {kl:.3f} nats; KL(data || uniform on this square) = {kl_uniform:.2f} nats"
)
assert kl < 0.1 * kl_uniform

# %%
drawn = model.sample(2000, generator=torch.Generator().manual_seed(0)).flatten(1)
fig, axes = plt.subplots(1, 4, figsize=(12, 3), layout="constrained")
axes[0].plot([row["energy_data"] for row in history.rows], label="data", lw=1)
axes[0].plot([row["energy_chains"] for row in history.rows], label="chains", lw=1, alpha=0.7)
axes[0].set(xlabel="training step", ylabel="mean energy", title="energies in training")
axes[0].legend()
extent = (-1.3, 1.3, -1.3, 1.3)
grids = (
    (axes[1], log_data, "$\\log p$ of the data"),
    (axes[2], log_model, "$\\log p$ of the model"),
)
for ax, values, title in grids:
    shown = ax.imshow(values.reshape(131, 131).T, extent=extent, origin="lower", vmin=-8, vmax=1)
    ax.set(title=title, xlabel="$x_1$")
fig.colorbar(shown, ax=axes[2], shrink=0.8, label="nats")
axes[3].scatter(*drawn.T, s=2)
axes[3].set(
    xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect="equal", title="chains from noise", xlabel="$x_1$"
)
plt.show()

# %% [markdown]
# The model has three wells of different depth where the data are, and chains of 200 steps from
# uniform noise fill them. The fractions below assign each sample to the nearest mean. The model's
# own density is the other test: its mass in each of the three regions, computed on the grid.

# %%
means = torch.tensor(data.means)
by_samples = torch.bincount(torch.cdist(drawn, means).argmin(1), minlength=3) / len(drawn)
region = torch.cdist(plane, means).argmin(1)
by_density, by_data = (
    torch.stack([log.exp()[region == j].sum() * cell for j in range(3)])
    for log in (log_model, log_data)
)
for name, fractions in (
    ("samples", by_samples),
    ("model density", by_density),
    ("data density", by_data),
):
    print(f"{name:14s}", [round(float(value), 3) for value in fractions])
assert (by_density - by_data).abs().max() < 0.08 and (by_samples - by_data).abs().max() < 0.08

# %% [markdown]
# ## Ratios of densities
#
# The constant $Z$ cancels in a ratio (`EBM.log_density_ratio`):
#
# $$\log \frac{p(x)}{p(y)} = \frac{E(y) - E(x)}{T} .$$
#
# A likelihood-ratio question can therefore be answered without $Z$: is this point more plausible
# than that one? The scatter plot compares 500 held-out points $x$ with as many uniform points $y$
# of the square. A constant added to the energy changes nothing. The model is accurate where data
# or chains went in training; far from the data it has the right sign, but hardly any chain was
# there to correct the size.

# %%
x = data.sample(500, torch.Generator().manual_seed(1))[0].float()[:, :, None, None]
y = 2 * torch.rand(x.shape, generator=generator) - 1
with torch.no_grad():
    ratio = model.log_density_ratio(x, y)
    model.network.head.bias += 5.0
    assert torch.allclose(model.log_density_ratio(x, y), ratio, atol=1e-3)
    model.network.head.bias -= 5.0
exact = data.log_density(x.flatten(1)) - data.log_density(y.flatten(1))
near = torch.cdist(y.flatten(1), means).min(1).values < 3 * data.std
fig, ax = plt.subplots(figsize=(5, 3.6))
errors = {}
for rows, label, color in (
    (~near, "y far from the data", "tab:orange"),
    (near, "y near the data", "tab:blue"),
):
    ax.scatter(exact[rows], ratio[rows], s=6, alpha=0.6, label=label, color=color)
    errors[label] = float((ratio - exact)[rows].abs().mean())
    print(f"{label}: {int(rows.sum())} pairs, mean absolute error {errors[label]:.2f} nats")
ax.axline((0, 0), slope=1, color="black", lw=1)
ax.set(
    xlabel="exact $\\log p(x) / p(y)$",
    ylabel="from energies",
    title="log density ratios of 500 pairs",
)
ax.legend()
plt.show()
assert errors["y near the data"] < 1.0 < errors["y far from the data"]

# %% [markdown]
# ## Composition: sums of energies
#
# A sum of energies is the energy of a product of densities, which means "both" ([Du et al.
# 2020](https://arxiv.org/abs/2004.06030)):
#
# $$E(x) = E_1(x) + E_2(x) \quad \Longleftrightarrow \quad p(x) \propto p_1(x)\, p_2(x) .$$
#
# Neither factor nor the product needs to be normalised. Here $E_1$ is the trained model and
# $E_2(x) = T \max(0, -x_1)^2 / (2 s^2)$ is a wall that penalises the left half of the plane.
# Langevin dynamics on the sum samples the right half, without any training.

# %%
T, s = model.langevin.temperature, 0.1


def learned(x):
    return model.energy(x[:, :, None, None])


def wall(x):
    return T * x[:, 0].clamp(max=0).square() / (2 * s**2)


def both(x):
    return learned(x) + wall(x)


start = 2 * torch.rand(1500, 2, generator=generator) - 1
finer = Langevin(0.002, math.sqrt(2 * 0.002 * T))
composed = last_state(
    finer.trajectory(both, start, 300, lambda: torch.randn(1500, 2, generator=generator))
)
with torch.no_grad():
    log_product = -both(plane) / T
log_product = log_product - log_product.logsumexp(0)
left_exact = float(log_product.exp()[plane[:, 0] < -0.2].sum())
left = float((composed[:, 0] < -0.2).float().mean())
print(
    f"mass at x_1 < -0.2: product density {left_exact:.4f}, chains {left:.4f}, model alone "
    f"{float((drawn[:, 0] < -0.2).float().mean()):.2f}"
)
assert left < 0.02 and left_exact < 0.02

fig, axes = plt.subplots(1, 3, figsize=(9, 3), sharex=True, sharey=True)
grids = ((-log_model, "learned energy"), (wall(plane) / T, "wall"), (-log_product, "sum"))
for ax, (values, title) in zip(axes, grids):
    values = (values - values.min()).reshape(131, 131).T
    ax.imshow(values, extent=extent, origin="lower", vmin=0, vmax=12, cmap="viridis_r")
    ax.set(title=title, xlabel="$x_1$")
axes[2].scatter(*composed.T, s=2, color="tab:red", label="chains")
axes[2].set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3))
axes[2].legend(loc="lower left")
plt.tight_layout()
plt.show()

# %% [markdown]
# ## Questions
#
# **1. What does a lower temperature do?** It sharpens the density, $p(x)^{1/T}$ up to a constant:
# chains concentrate near the minima. For one Gaussian the variance is proportional to $T$.

# %%
for temperature in (1.0, 0.5, 0.25):
    colder = Langevin(0.01, math.sqrt(2 * 0.01 * temperature))
    chains = torch.tensor([[0.6, 0.0]]).repeat(4000, 1)
    chains = last_state(colder.trajectory(energy, chains, 300, noise))
    print(
        f"T = {temperature:4.2f}: variance of x_2 {float(chains[:, 1].var()):.4f}, T sigma^2 = {temperature * 0.09:.4f}"
    )
    assert math.isclose(float(chains[:, 1].var()), temperature * truth.std**2, rel_tol=0.15)

# %% [markdown]
# **2. Do Langevin chains find the right weights of distant modes?** No. The two Gaussians of
# `two_gaussians`, with weights 0.2 and 0.8, are fourteen standard deviations apart. Chains from a
# symmetric start are divided evenly, because a chain does not cross the barrier. (Noise levels
# solve this: see `docs/score_matching.md`.)

# %%
two = DISTRIBUTIONS["two_gaussians"]


def far_apart(x):
    return -two.log_density(x)


start = 2 * torch.rand(2000, 2, generator=generator) - 1
small = Langevin(0.001, math.sqrt(0.002))
chains = last_state(
    small.trajectory(far_apart, start, 300, lambda: torch.randn(2000, 2, generator=generator))
)
share = float((chains.sum(1) < 0).float().mean())
print(f"fraction of chains in the smaller mode: {share:.2f}; its weight: {two.weights[0]}")
assert abs(share - 0.5) < 0.1

# %% [markdown]
# **3. Does clipping the gradient keep the density?** No. A clipped step has another stationary
# distribution: for the quadratic energy, clipping below the typical gradient widens the chains
# well beyond $T / \lambda$.

# %%
for clip in (None, 2.0, 0.5):
    steps = Langevin(0.02, math.sqrt(0.04), grad_clip=clip)
    chains = last_state(
        steps.trajectory(
            quadratic, torch.zeros(4000, 2), 400, lambda: torch.randn(4000, 2, generator=generator)
        )
    )
    print(
        f"gradient entries within {clip}: variance {float(chains.var()):.3f} (T / lambda = {1 / curvature})"
    )
assert float(chains.var()) > 2 / curvature
