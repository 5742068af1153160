# %% [markdown]
# # One to four network calls
#
# A diffusion model follows a trajectory from noise to an image in many small steps, each with a
# call of the network. Consistency models and MeanFlow learn to jump along it. This notebook first
# jumps with the exact functions of a known distribution, and then trains both.
#
# You learn
#
# - why a few steps of Euler's method miss, even with the exact velocity;
# - that a consistency function maps every point of a trajectory to the same end;
# - that the average velocity jumps exactly, and which identity allows to learn it;
# - how MeanFlow and flow matching compare at 1, 2 and 4 calls;
# - how consistency training approaches the function in stages;
# - what the records of longer runs say about quality against network calls.

# %% tags=["install"]
# Only needed outside of a checkout, for example in Colab.
# %pip install -q git+{REPOSITORY}

# %%
import logging
import warnings
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pytorch_lightning as pl
import torch
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

import gencompare
from gencompare.comparison.formatting import total_nfe
from gencompare.diffusion.consistency import ConsistencyTraining, MultistepConsistency
from gencompare.diffusion.denoiser import Denoiser
from gencompare.diffusion.meanflow import MeanFlowSampler
from gencompare.diffusion.ode_samplers import Euler, Heun
from gencompare.diffusion.parameterizations import Prediction, TimeConditioning, Velocity
from gencompare.diffusion.schedules import RectifiedFlow
from gencompare.diffusion.times import EqualStepsGrid, LogSNRGrid
from gencompare.evaluation.metrics.kernel import GaussianKernel, KernelReference, mmd
from gencompare.rng import generator

torch.manual_seed(0)
for name in ("pytorch_lightning", "lightning.pytorch"):
    logging.getLogger(name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore")
plt.rcParams.update({"figure.facecolor": "white", "axes.grid": True, "grid.alpha": 0.3, "font.size": 9})

# %% [markdown]
# ## Exact trajectories
#
# Straight paths connect data and noise, $x_t = (1 - t)\, x_0 + t\, \epsilon$. The trajectories of the
# probability-flow ODE have the velocity ([Lipman et al. 2023](https://arxiv.org/abs/2210.02747))
#
# $$v(x, t) = E[\epsilon - x_0 \mid x_t = x] .$$
#
# The data are numbers from a mixture of two Gaussians. At each time $x_t$ is a mixture of two
# Gaussians, too, with a known distribution function $F_t$. Trajectories on a line never cross, so
# the same fraction of the probability stays below each of them: $F_t(x_t)$ is constant. So the
# trajectory through $x_t$ is known at all other times,
#
# $$x_r = F_r^{-1}(F_t(x_t)) .$$
#
# The cell checks this against Euler's method with 4,000 short steps of the exact velocity.

# %%
WEIGHTS = torch.tensor([0.35, 0.65], dtype=torch.float64)
MEANS = torch.tensor([-0.7, 0.6], dtype=torch.float64)
STD = 0.12
schedule = RectifiedFlow()
T = torch.tensor(schedule.t_max, dtype=torch.float64)


def components(t):
    """Means and standard deviations of the components of x_t; t is () or (n, 1)."""
    return (1 - t) * MEANS, (((1 - t) * STD) ** 2 + t**2).sqrt()


def distribution_function(x, t):
    mean, std = components(t)
    return (WEIGHTS * torch.special.ndtr((x[:, None] - mean) / std)).sum(1)


def density(x, t):
    mean, std = components(t)
    return (WEIGHTS * torch.exp(-0.5 * ((x[:, None] - mean) / std) ** 2) / (2.5066283 * std)).sum(1)


def quantile(u, t):
    """Solve F_t(x) = u by bisection."""
    low, high = torch.full_like(u, -8), torch.full_like(u, 8)
    for _ in range(60):
        middle = (low + high) / 2
        below = distribution_function(middle, t) < u
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def move(x, t, r):
    """The point at time r of the trajectory through x at time t."""
    return quantile(distribution_function(x, t), r)


def velocity(x, t):
    """E[eps - x_0 | x_t]: each component k has E[x_0 | x_t, k] = m_k + (1 - t) s^2 / std_k^2 (x - mean_k)."""
    mean, std = components(t)
    offset = x[:, None] - mean
    weight = (WEIGHTS.log() - std.log() - 0.5 * (offset / std) ** 2).softmax(1)
    x0 = (weight * (MEANS + (1 - t) * STD**2 / std**2 * offset)).sum(1)
    eps = (weight * t / std**2 * offset).sum(1)
    return eps - x0


def euler(x, times):
    states = [x]
    for t, s in zip(times[:-1], times[1:]):
        states.append(states[-1] - (t - s) * velocity(states[-1], t))
    return torch.stack(states)


start = quantile(torch.linspace(0.03, 0.97, 16, dtype=torch.float64), T)
end = move(start, T, 0 * T)
fine = euler(start, torch.linspace(1, 0, 4001, dtype=torch.float64) * T)[-1]
print(f"largest difference from 4,000 steps of Euler's method: {(fine - end).abs().max():.1e}")
assert (fine - end).abs().max() < 2e-3

# %% [markdown]
# ## Euler, the average velocity and the consistency function
#
# Three ways to use a trajectory with one network call per step:
#
# - **Euler's method**: $x_s = x_t - (t - s)\, v(x_t, t)$, as if the velocity stayed what it is at the
#   start of the step.
# - **Average velocity** ([Geng et al. 2025](https://arxiv.org/abs/2505.13447), eq. 3):
#   $x_s = x_t - (t - s)\, u(x_t, s, t)$ with $u = (x_t - x_s) / (t - s)$. The step ends on the
#   trajectory, however long it is.
# - **Consistency function** ([Song et al. 2023](https://arxiv.org/abs/2303.01469)): $f(x_t, t) = x_0$,
#   the end of the trajectory, from any of its points.
#
# The chart on the right compares $f(x_t, t)$ along five trajectories with the denoiser
# $E[x_0 \mid x_t]$, which an ordinary diffusion model predicts.

# %%
figure, axes = plt.subplots(1, 3, figsize=(9.5, 3.2), layout="constrained")
times = torch.linspace(1, 0, 101, dtype=torch.float64) * T
paths = torch.stack([move(start, T, t) for t in times])
for ax in axes[:2]:
    ax.plot(times, paths, color="0.75", lw=0.8)
    ax.set(xlabel="t (noise at 1, data at 0)", xlim=(1.02, -0.02), ylim=(-2.1, 2.1))
grid = torch.tensor([1, 0.5, 0], dtype=torch.float64) * T
axes[0].plot(grid, euler(start, grid)[:, ::3], "o-", ms=3, lw=1.2, color="C3")
axes[0].set(title="Euler, 2 steps", ylabel="$x_t$")
jumps = torch.stack([move(start, T, t) for t in grid])
axes[1].plot(grid, jumps[:, ::3], "o-", ms=3, lw=1.2, color="C0")
axes[1].set(title="Average velocity, 2 steps")
for k in range(1, 16, 3):
    along = torch.stack([move(x, t, 0 * t) for x, t in zip(paths[:-1, k, None], times[:-1])])
    guess = torch.stack([x - t * velocity(x, t) for x, t in zip(paths[:-1, k, None], times[:-1])])
    axes[2].plot(times[:-1], along, color="C0", label="consistency function" if k == 1 else None)
    axes[2].plot(times[:-1], guess, "--", lw=1, color="C3", label="denoiser" if k == 1 else None)
    assert (along - end[k]).abs().max() < 1e-6
axes[2].set(xlabel="t", xlim=(1.02, -0.02), ylim=(-1.1, 1.6), title="Predicted end of a trajectory")
axes[2].legend(fontsize=8, loc="upper left")
plt.show()

# %% [markdown]
# The lines from the exact velocity leave their trajectories at once, because the trajectories
# bend. The average velocity cuts the corner and lands on the same trajectory (the line of a jump
# need not follow it in between). The consistency function is constant along each trajectory. The
# denoiser begins at the mean of the data for all of them, and decides late.
#
# The samplers of the package take these functions in place of a network. `Denoiser` joins a
# network, a schedule and a parameterisation; a network that receives `cond["interval"]` returns
# the average velocity over it.


# %%
def exact_network(x, t, cond):
    """v(x, t), or u(x, t - interval, t)."""
    x, t = x.flatten(), t.flatten()[:, None]
    if "interval" not in cond:
        return velocity(x, t).view(-1, 1, 1, 1)
    interval = cond["interval"][:, None]
    return ((x - move(x, t, t - interval)) / interval[:, 0]).view(-1, 1, 1, 1)


class ExactConsistency:
    schedule = schedule

    def __call__(self, x_t, t, cond):
        x0 = move(x_t.flatten(), t, 0 * t).view_as(x_t)
        return Prediction(x0=x0, eps=(x_t - (1 - t) * x0) / t)


exact = Denoiser(exact_network, schedule, Velocity(TimeConditioning(1.0)))
noise = quantile((torch.arange(8000, dtype=torch.float64) + 0.5) / 8000, T).view(-1, 1, 1, 1)
truth = move(noise.flatten(), T, 0 * T)
equal = EqualStepsGrid()
error, samples = {}, {}
for calls in (1, 2, 4, 8, 16, 32):
    for name, sampler in (
        ("Euler", Euler(num_steps=calls, grid=equal)),
        ("average velocity", MeanFlowSampler(num_steps=calls, grid=equal)),
    ):
        found = sampler.sample(exact, noise, generator=generator("cpu", 0)).flatten()
        samples[name, calls] = found
        error[name, calls] = float((found - truth).abs().mean())
one_call = MultistepConsistency(num_steps=1, grid=LogSNRGrid())
samples["consistency", 1] = one_call.sample(ExactConsistency(), noise, generator=generator("cpu", 0)).flatten()
for calls in (1, 2, 4, 32):
    print(f"{calls:2d} calls: mean error of Euler {error['Euler', calls]:.4f},", end=" ")
    print(f"average velocity {error['average velocity', calls]:.1e}")
assert max(error["average velocity", calls] for calls in (1, 2, 4, 32)) < 1e-4
assert (samples["consistency", 1] - truth).abs().mean() < 1e-4
assert error["Euler", 4] > 0.01 and 1.7 < error["Euler", 16] / error["Euler", 32] < 2.3

figure, axes = plt.subplots(1, 5, figsize=(9.5, 2.4), sharey=True, layout="constrained")
x = torch.linspace(-1.3, 1.3, 400, dtype=torch.float64)
shown = [("Euler", 1), ("Euler", 2), ("Euler", 4), ("average velocity", 1), ("consistency", 1)]
for ax, key in zip(axes, shown):
    colour = "C3" if key[0] == "Euler" else "C0"
    ax.hist(samples[key].numpy(), bins=80, range=(-1.3, 1.3), density=True, color=colour, alpha=0.6)
    ax.plot(x, density(x, 0 * T), color="k", lw=1)
    ax.set(title=f"{key[0]}, {key[1]} call{'s' if key[1] > 1 else ''}", ylim=(0, 4), xlabel="x")
axes[0].set_ylabel("density")
plt.show()

# %% [markdown]
# The black line is the density of the data. One step of Euler from pure noise ends at the mean of
# the data, for every start: the velocity there is $\epsilon - E[x_0]$. Two steps give one broad hump,
# and after four the modes appear, too narrow and with points between them. The error falls in proportion to the step length, from 16
# to 32 calls by about half. The two other functions are exact in one call.
#
# ## What there is to learn from
#
# Nobody knows $u$ for real data, but it satisfies an identity with the velocity alone (Geng et al.
# 2025, eq. 6):
#
# $$u(x_t, r, t) = v(x_t, t) - (t - r)\, \frac{d}{dt} u(x_t, r, t),$$
#
# with the derivative along the trajectory. It follows from differentiating
# $(t - r)\, u = x_t - x_r$ in $t$. MeanFlow makes the network satisfy it; in a fraction of the batch
# $r = t$, and the loss is that of flow matching. The cell checks the identity with finite
# differences.

# %%
t, r, h = torch.tensor(0.7).double(), torch.tensor(0.2).double(), 1e-5
x_t = move(start, T, t)


def average(x, r, t):
    return (x - move(x, t, r)) / (t - r)


du_dt = (average(move(x_t, t, t + h), r, t + h) - average(move(x_t, t, t - h), r, t - h)) / (2 * h)
gap = average(x_t, r, t) - (velocity(x_t, t) - (t - r) * du_dt)
print(f"largest gap of the identity: {gap.abs().max():.1e}")
print(f"without the derivative:      {(average(x_t, r, t) - velocity(x_t, t)).abs().max():.2f}")
assert gap.abs().max() < 1e-4

# %% [markdown]
# ## MeanFlow against flow matching
#
# Now both are trained, on eight Gaussians in the plane, with the same network and the same number
# of training steps. Each is sampled with 1, 2 and 4 calls from the same noise.

# %%
POINTS = [
    "data=toy2d",
    "model/network=mlp",
    "model.network.depth=2",
    "model.optimizer.lr=4e-3",
    "+model.optimizer.fused=true",
    "trainer.global_batch_size=256",
]


def train(steps, *overrides, callbacks=()):
    """The data and a trained model."""
    data, model = gencompare.build(gencompare.compose(*POINTS, *overrides))
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(model, data)
    return data, model.eval()


def sample_points(model, calls, n=2000):
    model.sampler = replace(model.sampler, num_steps=calls)
    return model.sample(n, generator=generator("cpu", 1)).flatten(1)


data, flow = train(
    800,
    "model=flow",
    "model/sampler/grid=equal_steps",
    "+model.parameterization.noise_conditioning.factor=1.0",
)
_, meanflow = train(800, "model=meanflow", "model.objective.ratio=0.75")

# %%
centres = torch.tensor(data.distribution.means)
real = data.split("test").images.flatten(1)
reference = KernelReference.from_features(real[:4000], GaussianKernel(bandwidth=0.1))


def describe(x):
    """1000 x MMD^2 with a kernel as wide as two standard deviations of a mode, and points on a mode."""
    on_mode = torch.cdist(x, centres).min(1).values < 4 * data.distribution.std
    return mmd(x, reference).value, float(on_mode.float().mean())


def draw_points(ax, x, title):
    ax.plot(*x.T, ".", ms=1.5, alpha=0.6)
    ax.plot(*centres.T, "x", color="k", ms=4)
    distance, on_mode = describe(x)
    ax.set_title(f"{title}\nMMD {distance:.1f}, {on_mode:.0%} on a mode", fontsize=8)
    ax.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), xticks=[], yticks=[], aspect="equal")


print(f"real points: MMD {describe(real[4000:6000])[0]:.1f}, on a mode", end=" ")
print(f"{describe(real[4000:6000])[1]:.0%}")
figure, axes = plt.subplots(2, 4, figsize=(9, 5.2), layout="constrained")
results = {}
for row, (name, model, counts) in enumerate(
    (("flow matching", flow, (1, 2, 4, 50)), ("MeanFlow", meanflow, (1, 2, 4)))
):
    axes[row, 0].set_ylabel(name)
    for ax, calls in zip(axes[row], counts):
        x = sample_points(model, calls)
        results[name, calls] = describe(x)
        draw_points(ax, x, f"{calls} call{'s' if calls > 1 else ''}")
draw_points(axes[1, 3], real[4000:6000], "real points")
plt.show()
assert results["MeanFlow", 1][0] < results["flow matching", 2][0] / 2
assert results["flow matching", 50][0] < results["flow matching", 4][0]

# %% [markdown]
# With one call, flow matching ends near the mean of the data, as the exact velocity does. It needs
# tens of calls for the ring. MeanFlow has the ring after one, and its distance is below that of
# flow matching with four. But it also has an error that more calls hardly reduce, that of its
# network, and flow matching with 50 calls is closer to the data. After so short a training, neither
# separates the eight modes as clearly as the real points do. Each is one training with one seed.
# (`ratio=0.75`, the fraction of points with an interval, was the best of three values for these
# points; the default for images is 0.25. Nothing was tuned for flow matching.)
#
# ## Consistency training in stages
#
# A consistency model is trained without any trajectory. Two noise levels $s_t > s_r$ of the *same*
# image and noise are close to one trajectory, if they are close to each other, and their
# predictions are made equal ([Geng et al. 2024](https://arxiv.org/abs/2406.14548)):
#
# $$L = E\, d(f(x_t), \mathrm{sg}\, f(x_r)) / (s_t - s_r), \qquad s_r = s_t \max(0, 1 - n(s_t) / q^a).$$
#
# At $s_r = 0$ the target is the image itself, and the loss that of a diffusion model. Stage after
# stage ($a = 1, 2, \dots$) the levels approach each other. The left chart shows the ratio of the two
# levels. The training below has four stages; after each, samples with a single call are drawn.

# %%
STAGES, STEPS = 4, 1200


class AfterEachStage(pl.Callback):
    """Samples with one call at the end of each stage."""

    def __init__(self):
        self.points = []

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        if trainer.global_step % (STEPS // STAGES) == 0:
            self.points.append(sample_points(model, 1))


stages = AfterEachStage()
_, consistency = train(STEPS, "model=consistency", f"model.objective.num_stages={STAGES}", callbacks=[stages])

figure, axes = plt.subplots(1, 6, figsize=(12, 2.5), layout="constrained")
levels = torch.logspace(-2, 1.9, 300)
for stage in range(STAGES):
    objective = ConsistencyTraining(num_stages=STAGES, progress=(stage + 0.5) / STAGES)
    ratio = objective.lower_level(levels) / levels
    axes[0].semilogx(levels, ratio, label=f"stage {stage + 1}")
    draw_points(axes[stage + 1], stages.points[stage], f"after stage {stage + 1}, 1 call")
    print(f"after stage {stage + 1}, 1 call: MMD {describe(stages.points[stage])[0]:.0f}")
axes[0].set(xlabel="$s_t$", title="$s_r / s_t$", ylim=(-0.05, 1))
axes[0].legend(fontsize=7)
two_calls = sample_points(consistency, 2)
draw_points(axes[5], two_calls, "end, 2 calls")
plt.show()

# %% [markdown]
# The ratio of the levels rises from stage to stage, at low noise from 0. After the first stage, a
# call predicts a mean over many points, and the ring is too small. It grows with each stage, and
# the distance falls. The second call adds noise and predicts once more. It more than halves the distance,
# since the prediction from less noise is easier, and shows the modes.
#
# ## Quality against network calls
#
# A checkout of the repository contains records of longer runs on digits: all families, each
# with its own number of network calls, and diffusion models that were sampled with DDIM and other
# solvers at 50 and 10 calls. Each chart is one protocol; values of different charts are not
# comparable.

# %%
folders = [path for path in (Path("../docs/results"), Path("docs/results")) if path.is_dir()]
if folders:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for row in gencompare.compare(f"{folders[0]}/digits/*").tables[0].rows:
        calls = total_nfe(row.result.generation.nfe)
        if calls:
            few = row.run.record.family in ("meanflow", "consistency")
            axes[0].plot(calls, row.metric.value, "o", ms=5, color="C3" if few else "C0")
            above = {"gan": 2, "vae": -6}.get(row.run.record.family, -2)
            label = {"textcoords": "offset points", "fontsize": 7}
            axes[0].annotate(row.run.record.family, (calls, row.metric.value), (5, above), **label)
    lines = {}
    for row in gencompare.compare(f"{folders[0]}/few_calls/*").tables[0].rows:
        sampler = row.result.generation.sampler
        if sampler.startswith("DDIM") and "times" not in sampler:
            point = total_nfe(row.result.generation.nfe), row.metric.value
            lines.setdefault(row.run.record.family, []).append(point)
    for name, found in lines.items():
        axes[1].plot(*zip(*sorted(found)), "o-", ms=4, label=name)
    print({name: [round(value, 1) for _, value in sorted(found)] for name, found in lines.items()})
    axes[0].set(title="All families, 500 samples", ylabel="1000 x MMD$^2$ (lower is better)")
    axes[1].set(title="DDIM, 1,000 samples")
    axes[1].legend(fontsize=7)
    for ax in axes:
        ax.set(xlabel="network calls per sample", xscale="log", yscale="log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.set_minor_formatter(NullFormatter())
        ax.margins(x=0.15)
    axes[1].set_xticks([10, 50])
    plt.show()
else:
    print("This part needs the folder docs/results of a checkout of the repository.")

# %% [markdown]
# On the left, at the small budget of these records, the two models for few calls (red) are far from
# the diffusion models with 35 calls and more: MeanFlow is the worst of all families, and the
# consistency model with two calls is close to Glow. Of the families with one call, a hierarchical
# VAE, a VAE and a GAN do better. On the right, every diffusion model with two points loses with 10
# instead of 50 calls. Published few-step models are trained far longer, so this
# chart says what a short run reaches, and nothing about their limit.
#
# ## Questions
#
# ### 1. Does a second call help an exact function?
#
# Average velocity and consistency function are exact in one call. What do two calls do, and what
# happens if the consistency sampler receives an ordinary denoiser?


# %%
class ExactDenoiser:
    schedule = schedule

    def __call__(self, x_t, t, cond):
        v = velocity(x_t.flatten(), t).view_as(x_t)
        return Prediction(x0=x_t - t * v, eps=x_t + (1 - t) * v)


grid = LogSNRGrid(log_snr_end=0.394)
spread = {}
for name, function in (("consistency", ExactConsistency()), ("denoiser", ExactDenoiser())):
    for calls in (1, 2, 4):
        sampler = MultistepConsistency(num_steps=calls, grid=grid)
        x = sampler.sample(function, noise, generator=generator("cpu", 0)).flatten()
        spread[name, calls] = float(x.std())
        print(f"{name:12s} {calls} calls: standard deviation {x.std():.3f}, data {truth.std():.3f}")
assert all(abs(spread["consistency", n] / float(truth.std()) - 1) < 0.03 for n in (1, 2, 4))
assert spread["denoiser", 1] < 0.01 and spread["denoiser", 4] < 0.95 * float(truth.std())

# %% [markdown]
# More calls leave the distribution of the exact function as it is: each call starts from
# new noise. They help a trained network, which is not exact, since the last call begins at less
# noise. A denoiser predicts a mean of many images, so its samples are too narrow.
#
# ### 2. Would a better solver do?
#
# Heun's method calls the network twice per step, and its error falls with the square of the step
# length. How far does it get in the same number of calls?

# %%
for calls in (2, 4, 8, 16, 32):
    x = Heun(num_steps=calls // 2, grid=equal).sample(exact, noise, generator=generator("cpu", 0))
    print(f"{calls:2d} calls: Euler {error['Euler', calls]:.4f},", end=" ")
    print(f"Heun {(x.flatten() - truth).abs().mean():.4f}")

# %% [markdown]
# Not at so few calls. Heun's method is ahead only at 32: a high order describes the limit of short
# steps. The average velocity needs no such limit.
