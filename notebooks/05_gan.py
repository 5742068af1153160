# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # GAN: the two-player game
#
# A generative adversarial network learns a density ratio instead of a density: a discriminator
# estimates it, and a generator follows its gradient. All examples are in the plane or on a line,
# where the truth is known.
#
# - Why the non-saturating loss replaces the original one.
# - The optimal discriminator is a log density ratio, and its loss measures the Jensen-Shannon
#   divergence.
# - Why alternating gradient steps circle around the solution, and how a gradient penalty (R1)
#   stops that.
# - Mode collapse, produced on purpose and counted.
# - Memorised training points fool the discriminator. Coverage, recall and memorisation metrics
#   tell what it cannot.

# %% tags=["install"]
# Only needed outside of a checkout, for example in Colab.
# %pip install -q git+{REPOSITORY}

# %%
import logging
import math
import warnings

import matplotlib.pyplot as plt
import pytorch_lightning as pl
import torch

import gencompare
from gencompare.data.toy2d import DISTRIBUTIONS, GaussianMixture
from gencompare.evaluation.metrics.neighbors import authenticity, compute_prdc, memorization_ratio
from gencompare.models.adversarial import Hinge, NonSaturating, Wasserstein
from gencompare.models.gan_penalties import R1, DiscriminatorStep
from gencompare.networks.gan_networks import MLPDiscriminator
from gencompare.rng import RandomSource

torch.manual_seed(0)
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
warnings.filterwarnings("ignore")
plt.rcParams.update({"figure.facecolor": "white", "savefig.facecolor": "white"})

# %% [markdown]
# ## The loss
#
# The discriminator outputs a score $D(x)$; $S(D(x))$, with the logistic function $S$, is its
# probability that $x$ is real. It minimises ([Goodfellow et al.
# 2014](https://arxiv.org/abs/1406.2661), eq. 1)
#
# $$L_D = -\log S(D(x)) - \log(1 - S(D(G(z)))) .$$
#
# In the two-player game of the paper the generator minimises $-L_D$, of which only $\log(1 -
# S(D(G(z))))$ depends on it. In practice it minimises $L_G = -\log S(D(G(z)))$, the
# *non-saturating* loss. Their derivatives with respect to the score $s = D(G(z))$ are
#
# $$\frac{d(-L_D)}{ds} = -S(s), \qquad \frac{dL_G}{ds} = -S(-s) .$$

# %%
s = torch.linspace(-8, 8, 201, requires_grad=True)
loss = NonSaturating()
(saturating,) = torch.autograd.grad(-loss.discriminator_loss(torch.zeros_like(s), s).sum(), s)
(non_saturating,) = torch.autograd.grad(loss.generator_loss(None, s).sum(), s)
assert torch.allclose(saturating, -torch.sigmoid(s.detach()), atol=1e-6)
assert torch.allclose(non_saturating, -torch.sigmoid(-s.detach()), atol=1e-6)

fig, ax = plt.subplots(figsize=(6, 3))
ax.plot(s.detach(), -saturating, label="saturating")
ax.plot(s.detach(), -non_saturating, label="non-saturating")
for other in (Hinge(), Wasserstein()):
    (gradient,) = torch.autograd.grad(other.generator_loss(None, s).sum(), s)
    ax.plot(
        s.detach(),
        -gradient,
        ls="--" if isinstance(other, Hinge) else ":",
        label=type(other).__name__,
    )
ax.axvspan(-8, -2, color="grey", alpha=0.15)
ax.set(
    xlabel="score of a fake, $s = D(G(z))$",
    ylabel="$-dL/ds$",
    title="gradient that a fake sends to the generator",
)
ax.legend()
plt.show()

# %% [markdown]
# Early in training fakes are easy to recognise, so their scores are negative (grey area). The
# saturating loss sends almost no gradient exactly there, and the non-saturating loss sends its
# largest one. Both have the same sign everywhere: they differ in the weight of each fake, not in
# the direction in which it moves.
#
# ## The optimal discriminator
#
# For a fixed generator with density $q$ and data with density $p$, the best discriminator has the
# score (Goodfellow et al. 2014, proposition 1, as a logit)
#
# $$D^*(x) = \log \frac{p(x)}{q(x)}, \qquad E[L_D(D^*)] = 2 \log 2 - 2\, JSD(p, q),$$
#
# with the Jensen-Shannon divergence $JSD$. The cell trains a small network on samples of two
# known densities with the package's loss, and with a penalty in the sections below. It receives
# no density.


# %%
def train_discriminator(real, fake, steps, penalty=None, batch=256, lr=3e-3):
    """Train a discriminator; real and fake are functions (n, generator) -> points (n, 2)."""
    torch.manual_seed(0)
    network = MLPDiscriminator((2, 1, 1), width=64, depth=2, num_features=64)
    optimizer = torch.optim.Adam(network.parameters(), lr)
    generator = torch.Generator().manual_seed(0)
    history = []
    for _ in range(steps):
        x, y = (
            points(batch, generator).float()[:, :, None, None].requires_grad_()
            for points in (real, fake)
        )
        rng = RandomSource.for_batch(generator, batch)
        step = DiscriminatorStep(x, y, network(x), network(y), network, rng)
        d_loss = NonSaturating().discriminator_loss(step.real_scores, step.fake_scores).mean()
        squared_slope = R1(1.0)(step).mean()
        total = (
            d_loss
            if penalty is None
            else d_loss + penalty.scale * penalty.weight * penalty(step).mean()
        )
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append((float(d_loss), squared_slope))
    return network, torch.tensor(history)


def sampler(distribution):
    """A function (n, generator) -> points (n, 2)."""
    return lambda n, generator: distribution.sample(n, generator)[0]


p = GaussianMixture((0.5, 0.5), ((-0.5, 0.0), (0.5, 0.0)), 0.25)
q = GaussianMixture((1.0,), ((0.0, 0.0),), 0.4)
network, history = train_discriminator(sampler(p), sampler(q), 700)

axis = torch.linspace(-1.2, 1.2, 81)
plane = torch.cartesian_prod(axis, axis)
cell = float(axis[1] - axis[0]) ** 2
ratio = p.log_density(plane) - q.log_density(plane)
with torch.no_grad():
    learned = network(plane[:, :, None, None])
weight = (p.log_density(plane).exp() + q.log_density(plane).exp()) * cell / 2
error = float((weight * (learned - ratio).abs()).sum())
print(f"mean absolute error of D under the mixture of p and q: {error:.3f}")
assert error < 0.25

# %%
log_p, log_q = p.log_density(plane), q.log_density(plane)
log_m = torch.logaddexp(log_p, log_q) - math.log(2)
jsd = float((log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum() * cell / 2)
predicted = 2 * math.log(2) - 2 * jsd
measured = float(history[-300:, 0].mean())
print(
    f"JSD {jsd:.3f}, so the smallest loss is {predicted:.3f}; loss at the end of training {measured:.3f}"
)
assert abs(predicted - measured) < 0.03

fig, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
levels = torch.linspace(-4, 4, 17).tolist()
for ax, values, title in zip(
    axes, (ratio, learned), ("$\\log p(x) / q(x)$", "discriminator $D(x)$")
):
    shown = ax.contourf(
        axis, axis, values.reshape(81, 81).T, levels=levels, cmap="RdBu_r", extend="both"
    )
    ax.set(title=title, xlabel="$x_1$")
fig.colorbar(shown, ax=axes[1])
axes[2].plot(history[:, 0], lw=0.5, label="loss")
axes[2].axhline(predicted, color="black", ls="--", label="$2 \\log 2 - 2\\, JSD$")
axes[2].axhline(2 * math.log(2), color="grey", ls=":", label="$2 \\log 2$, $p = q$")
axes[2].set(xlabel="step", title="discriminator loss", ylim=(0.8, 1.6))
axes[2].legend(fontsize=8)
plt.show()

# %% [markdown]
# ## The game on a line
#
# [Mescheder et al. (2018)](https://arxiv.org/abs/1801.04406), section 2, reduce the game to two
# numbers: the data are the point 0, the generator is the point $\theta$, and the discriminator is
# $D(x) = \psi x$. The equilibrium is $\theta = \psi = 0$. In the two-player game ($G$ minimises
# $-L_D$) alternating gradient steps circle around it. R1 adds
#
# $$\frac{w}{2}\, E_{p}\, \lVert \nabla_x D(x) \rVert^2 = \frac{w}{2} \psi^2 \qquad \text{(eq. 9)}$$
#
# to the loss of the discriminator, which pulls the slope at the data to zero and turns the circle
# into a spiral.


# %%
def dirac_game(weight, steps=1000, lr=0.05):
    """The path of (theta, psi) from (1, 1)."""
    theta, psi = torch.tensor(1.0), torch.tensor(1.0)
    zero = torch.zeros(1, 1, 1, 1)
    path = []
    for _ in range(steps):
        psi = psi.detach().requires_grad_()
        x, y = zero.clone().requires_grad_(), theta.detach().reshape(1, 1, 1, 1)
        step = DiscriminatorStep(x, y, (psi * x).flatten(), (psi * y).flatten(), None, None)
        penalty = R1(weight)
        d_loss = loss.discriminator_loss(step.real_scores, step.fake_scores).mean()
        d_loss = d_loss + penalty.scale * penalty.weight * penalty(step).mean()
        psi = (psi - lr * torch.autograd.grad(d_loss, psi)[0]).detach()
        theta = theta.detach().requires_grad_()
        g_loss = -loss.discriminator_loss(psi * 0, psi * theta)
        theta = (theta - lr * torch.autograd.grad(g_loss, theta)[0]).detach()
        path.append((float(theta), float(psi)))
    return torch.tensor(path)


fig, ax = plt.subplots(figsize=(6, 3.4))
ends = {}
for weight in (0.0, 0.1, 0.5):
    path = dirac_game(weight)
    ends[weight] = float(path[-1].norm())
    ax.plot(*path.T, lw=1, label=f"w = {weight}")
    print(
        f"w = {weight}: distance from the equilibrium after 1000 steps {ends[weight]:.4f} (start {math.sqrt(2):.2f})"
    )
ax.plot(0, 0, "k*", label="equilibrium")
ax.set(
    xlabel="generator $\\theta$", ylabel="discriminator $\\psi$", title="alternating gradient steps"
)
ax.set_aspect("equal")
ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
plt.show()
assert ends[0.0] > 1 and ends[0.5] < 0.01

# %% [markdown]
# ## Mode collapse on eight Gaussians
#
# Nothing in the generator's loss asks for diversity: a generator that produces only the points
# with the highest score is doing well until the discriminator reacts. Momentum makes the
# generator run past that reaction. The two models below differ in one number, $\beta_1$ of Adam:
# 0.9 is PyTorch's default, 0 is the package's default for GANs.

# %%
modes = torch.tensor(DISTRIBUTIONS["gaussians8"].means)
settings = (
    "model=gan", "data=toy2d", "model/generator=mlp", "model/discriminator=mlp", "trainer.global_batch_size=256",
    "model.generator.width=64", "model.generator.depth=2", "model.discriminator.width=64",
    "model.discriminator.depth=2", "model.discriminator.num_features=64", "model.latent_dim=4",
    "model.optimizer.lr=2e-3", "model.lr_schedule.decay=constant",
    "model.lr_schedule.warmup_steps=0",
)  # fmt: skip
STEPS = 600


class Snapshots(pl.Callback):
    """Keeps samples of the generator at the given steps."""

    def __init__(self, *steps):
        self.steps, self.samples = steps, {}

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        if batch_idx + 1 in self.steps:
            x = model.sample(1000, generator=torch.Generator().manual_seed(0))
            self.samples[batch_idx + 1] = x.flatten(1)


def train_gan(*overrides):
    data, model = gencompare.build(gencompare.compose(*settings, *overrides))
    snapshots = Snapshots(150, 300, 450, STEPS)
    trainer = pl.Trainer(
        max_epochs=1, limit_train_batches=STEPS, limit_val_batches=0, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[snapshots],
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    return data, model.eval(), snapshots.samples


def count_modes(x):
    """Samples within three standard deviations (0.15) of each mode."""
    distance = torch.cdist(x, modes)
    return torch.bincount(distance.argmin(1)[distance.min(1).values < 0.15], minlength=8)


NO_PENALTY = "model/penalty=[]"
data, collapsed_gan, collapsed = train_gan(NO_PENALTY, "model.optimizer.betas=[0.9,0.999]")
_, covering_gan, covering = train_gan(NO_PENALTY, "model.optimizer.betas=[0.0,0.999]")
_, regularised_gan, regularised = train_gan(
    "model.penalty.r1.weight=0.02", "model.optimizer.betas=[0.0,0.999]"
)

# %%
runs = {
    "$\\beta_1 = 0.9$": collapsed,
    "$\\beta_1 = 0$": covering,
    "$\\beta_1 = 0$, R1": regularised,
}
fig, axes = plt.subplots(3, 4, figsize=(9, 7), sharex=True, sharey=True)
for row, (name, samples) in zip(axes, runs.items()):
    for ax, (step, x) in zip(row, samples.items()):
        ax.scatter(*modes.T, s=60, color="lightgrey")
        ax.scatter(*x.T, s=2, color="tab:blue")
        found = int((count_modes(x) >= 10).sum())
        ax.set(
            xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), aspect="equal", title=f"step {step}: {found} modes"
        )
    row[0].set_ylabel(name)
plt.tight_layout()
plt.show()

# %%
real = data.split("test").images.flatten(1)[:1000]
reports = {
    name: (count_modes(samples[STEPS]), compute_prdc(samples[STEPS], real))
    for name, samples in runs.items()
}
for name, (counts, prdc) in reports.items():
    print(f"{name:16s} per mode {counts.tolist()}")
    print(
        f"  coverage {prdc.coverage:.2f}, recall {prdc.recall:.2f}, precision {prdc.precision:.2f}"
    )
fresh = compute_prdc(data.split("val").images.flatten(1)[:1000], real)
print(f"real points: coverage {fresh.coverage:.2f}, precision {fresh.precision:.2f}")
assert (
    (reports["$\\beta_1 = 0.9$"][0] >= 10).sum() < 6 <= (reports["$\\beta_1 = 0$"][0] >= 10).sum()
)
assert reports["$\\beta_1 = 0.9$"][1].coverage < 0.5 * reports["$\\beta_1 = 0$"][1].coverage

# %% [markdown]
# With momentum the samples are a blob that moves from one place to another: the generator runs
# past the discriminator's reaction, and covers few modes at any time. Without momentum all eight
# modes are covered in these runs. A small generator is a smooth map, so it also fills the gaps
# between neighbouring modes: precision is far below that of real points.
#
# ## What R1 does to the landscape
#
# The generator follows $\nabla_x D$. If real points and fakes do not overlap, the optimal score
# is infinite: the loss has no minimum, and the discriminator keeps getting steeper. The cell
# trains discriminators on the eight Gaussians against a generator that produces points at the
# centre only, with three weights of R1.

# %%
eight = DISTRIBUTIONS["gaussians8"]
centre = GaussianMixture((1.0,), ((0.0, 0.0),), eight.std)
weights = (0.0, 0.02, 0.2)
trained = {w: train_discriminator(sampler(eight), sampler(centre), 250, R1(w)) for w in weights}

fig, axes = plt.subplots(1, 4, figsize=(12, 3), layout="constrained")
for ax, w in zip(axes, weights):
    with torch.no_grad():
        values = trained[w][0](plane[:, :, None, None]).reshape(81, 81).T
    shown = ax.contourf(
        axis,
        axis,
        values,
        levels=torch.linspace(-10, 10, 21).tolist(),
        cmap="RdBu_r",
        extend="both",
    )
    ax.scatter(*modes.T, s=14, facecolor="none", edgecolor="black")
    ax.scatter(0, 0, s=40, marker="x", color="black")
    ax.set(title=f"D(x), w = {w}", xlabel="$x_1$")
fig.colorbar(shown, ax=axes[2])
for w in weights:
    axes[3].plot(trained[w][1][:, 1].sqrt(), label=f"w = {w}", lw=1)
axes[3].set(
    xlabel="step", yscale="log", title="$|\\nabla_x D|$ at real points (rms)", ylim=(0.05, 100)
)
axes[3].legend(fontsize=8)
plt.show()
slopes = {w: float(trained[w][1][-50:, 1].mean().sqrt()) for w in weights}
print({w: round(slope, 2) for w, slope in slopes.items()})
assert slopes[0.0] > 10 * max(slopes[0.02], slopes[0.2])

# %% [markdown]
# Circles are the modes of the data, and the cross is the place of the fakes. Without the penalty
# the scores saturate the colour scale. With R1 the scores stay small, and the slope at the real
# points is at least ten times smaller.
#
# ## What a discriminator cannot tell
#
# The best possible generator by the discriminator's judgement reproduces the *training points*:
# then $p = q$ for the empirical distribution, and no discriminator beats the loss $2 \log 2 =
# 1.386$. The table compares four imitations of 400 training points by that loss and by the
# package's metrics: coverage and recall against test points, the memorisation ratio (1 without
# memorisation, 0 for copies), and authenticity (0 for copies).

# %%
generator = torch.Generator().manual_seed(1)
train, val, test = (eight.sample(400, generator)[0].float() for _ in range(3))


def resample(points, noise):
    """Draw from given points, with a little noise."""

    def draw(n, generator):
        rows = torch.randint(len(points), (n,), generator=generator)
        return points[rows] + noise * torch.randn(n, 2, generator=generator)

    return draw


one = GaussianMixture((1.0,), (eight.means[0],), eight.std)

candidates = {
    "fresh samples": sampler(eight),
    "memorised": resample(train, 0.001),
    "one mode": sampler(one),
    "too wide": resample(train, 0.1),
}
table = {}
print(
    f"{'':14s} {'D loss':>7s} {'coverage':>9s} {'recall':>7s} {'memorisation':>13s} {'authenticity':>13s}"
)
for name, draw in candidates.items():
    _, history = train_discriminator(resample(train, 0.0), draw, 300)
    x = draw(400, generator).float()
    prdc = compute_prdc(x, test)
    row = (
        float(history[-150:, 0].mean()), prdc.coverage, prdc.recall,
        memorization_ratio(x, train, test, val), authenticity(x, train),
    )  # fmt: skip
    table[name] = row
    print(f"{name:14s} {row[0]:7.3f} {row[1]:9.2f} {row[2]:7.2f} {row[3]:13.2f} {row[4]:13.2f}")

assert table["memorised"][0] > 1.37 and table["memorised"][3] < 0.2 and table["memorised"][4] < 0.1
assert table["one mode"][1] < 0.3 and table["fresh samples"][3] > 0.8

# %%
fig, axes = plt.subplots(1, 4, figsize=(12, 3), sharex=True, sharey=True)
for ax, (name, draw) in zip(axes, candidates.items()):
    ax.scatter(*draw(400, generator).T, s=22, alpha=0.5, label="samples")
    ax.scatter(*train.T, s=4, color="black", label="training points")
    ax.set(xlim=(0.15, 0.95), ylim=(-0.2, 0.8), title=f"{name}: D loss {table[name][0]:.2f}")
axes[0].legend(loc="lower left", fontsize=8)
plt.tight_layout()
plt.show()

# %% [markdown]
# The discriminator gives fresh samples and copies the same verdict, the loss $2 \log 2$. Coverage
# cannot object to copies either: it measures diversity, and copies of all training points are
# diverse. The memorisation ratio and authenticity do object, because they compare distances to
# training points with distances to held-out ones. Each metric answers one question, and a GAN
# needs several: its own loss answers none of them.
#
# ## Questions
#
# **1. Is a discriminator trained to the end a good signal?** Not for the original loss. As the
# discriminator separates fakes better, the saturating gradient that reaches a fake vanishes, and
# the non-saturating one grows.

# %%
for steps in (10, 40, 160):
    network, _ = train_discriminator(sampler(eight), sampler(centre), steps)
    y = sampler(centre)(500, generator).float()[:, :, None, None].requires_grad_()
    scores = network(y)
    norms = {}
    for name, g_loss in (
        ("saturating", -loss.discriminator_loss(torch.zeros_like(scores), scores)),
        ("non-saturating", loss.generator_loss(None, scores)),
    ):
        (gradient,) = torch.autograd.grad(g_loss.sum(), y, retain_graph=True)
        norms[name] = float(gradient.flatten(1).norm(dim=1).mean())
    print(f"after {steps:3d} steps:", {name: round(norm, 3) for name, norm in norms.items()})
assert norms["non-saturating"] > 20 * norms["saturating"]

# %% [markdown]
# **2. Does R1 change the optimal discriminator?** Yes: it flattens it, so that its score
# underestimates the log density ratio.

# %%
for w in (0.0, 0.2):
    network, _ = train_discriminator(sampler(p), sampler(q), 250, R1(w))
    with torch.no_grad():
        learned = network(plane[:, :, None, None])
    slope = float((weight * learned * ratio).sum() / (weight * ratio.square()).sum())
    print(f"w = {w}: D is {slope:.2f} times the log ratio (least squares)")
assert slope < 0.5

# %% [markdown]
# **3. How many samples does it take to see a missing mode?** Few. Samples of seven modes of eight
# miss an eighth of the real points, and coverage shows it with 100 samples.

# %%
seven = GaussianMixture((1 / 7,) * 7, eight.means[:7], eight.std)
for n in (100, 400, 1600):
    real = eight.sample(n, generator)[0]
    full, missing = (
        compute_prdc(each.sample(n, generator)[0], real).coverage for each in (eight, seven)
    )
    print(f"n = {n:4d}: coverage {full:.3f} with eight modes, {missing:.3f} with seven")
    assert missing < full
