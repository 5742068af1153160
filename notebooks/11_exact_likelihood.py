# %% [markdown]
# # Exact likelihoods
#
# Two families know the probability of an image exactly: flows, which transform a Gaussian, and
# autoregressive models, which predict one pixel after another. This notebook checks both against
# sums and integrals, and then asks what the number says about samples.
#
# You learn
#
# - how the density of a flow follows from the determinant of its Jacobian, and that it
#   integrates to 1;
# - what dequantisation is for;
# - how many bits each pixel of a digit costs, and which images cost least;
# - how a model of pixels samples, and completes half an image;
# - which bits/dim are exact, which are bounds and which are estimates;
# - why good bits/dim and good samples are two different things.

# %% tags=["install"]
# Only needed outside of a checkout, for example in Colab.
# %pip install -q git+{REPOSITORY}

# %%
import logging
import lzma
import math
import warnings
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pytorch_lightning as pl
import torch
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from scipy.stats import spearmanr

import gencompare
from gencompare.comparison.bits_per_dim import best_likelihood, likelihood_rows
from gencompare.diffusion.likelihoods import ODELikelihood, VLBLikelihood
from gencompare.models.pixel_likelihoods import DiscretizedLogisticMixture
from gencompare.rng import generator

torch.manual_seed(0)
for name in ("pytorch_lightning", "lightning.pytorch"):
    logging.getLogger(name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore")
plt.rcParams.update({"figure.facecolor": "white", "axes.grid": True, "grid.alpha": 0.3, "font.size": 9})


def train(steps, *overrides):
    """The data and a trained model."""
    data, model = gencompare.build(gencompare.compose(*overrides))
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    return data, model.eval()


# %% [markdown]
# ## A flow and its density
#
# A flow is an invertible network $z = f(x)$. If $z$ is standard normal, the density of $x$ follows
# from the change of variables ([Rezende and Mohamed 2015](https://arxiv.org/abs/1505.05770), eq. 5):
#
# $$\log p(x) = \log \mathcal N(f(x); 0, I) + \log \left| \det \frac{\partial f(x)}{\partial x} \right| .$$
#
# The data are points in the plane, from eight narrow Gaussians, so the true density is known. The
# flow is a small Glow ([Kingma and Dhariwal 2018](https://arxiv.org/abs/1807.03039)), trained for
# a few seconds. Both densities are drawn on a grid, whose sum times the area of a cell is the
# integral.

# %%
points, flow = train(
    600,
    "model=glow",
    "data=toy2d",
    "model.bijection.num_levels=1",
    "model.bijection.depth=16",
    "model.bijection.width=32",
    "trainer.global_batch_size=256",
)
LIMIT, SIDE = 1.5, 401
axis = torch.linspace(-LIMIT, LIMIT, SIDE)
plane = torch.cartesian_prod(axis, axis)
area = float(axis[1] - axis[0]) ** 2
with torch.no_grad():
    log_p = torch.cat([flow.log_prob(part[..., None, None]) for part in plane.split(50_000)])
true_log_p = points.log_density(plane)
for name, values in (("true density", true_log_p), ("flow", log_p)):
    print(f"{name}: integral {float(values.double().exp().sum() * area):.4f}")
    assert abs(float(values.double().exp().sum() * area) - 1) < 0.01

figure, axes = plt.subplots(1, 3, figsize=(9, 3), sharex=True, sharey=True, layout="constrained")
for ax, values, title in zip(axes, (true_log_p, log_p), ("True density", "Density of the flow")):
    shown = ax.imshow(
        values.view(SIDE, SIDE).T / math.log(10),
        origin="lower",
        extent=(-LIMIT, LIMIT, -LIMIT, LIMIT),
        vmin=-4,
        vmax=1,
        cmap="viridis",
    )
    ax.set(title=title, xlabel="$x_1$")
    ax.grid(False)
samples = flow.sample(2000, generator=generator("cpu", 0)).flatten(1)
axes[2].plot(*samples.T, ".", ms=2)
axes[2].set(title="2,000 samples of the flow", xlabel="$x_1$", aspect="equal")
axes[2].set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT))
axes[0].set(ylabel="$x_2$")
figure.colorbar(shown, ax=axes[:2], label=r"$\log_{10} p(x)$", shrink=0.8)
plt.show()

test_points = points.split("test").images
with torch.no_grad():
    flow_nats = -flow.log_prob(test_points).mean()
true_nats = -points.log_density(test_points).mean()
print(f"-log p of test points in nats: truth {true_nats:.3f}, flow {flow_nats:.3f};", end=" ")
print(f"KL divergence {flow_nats - true_nats:.3f}")
assert flow_nats > true_nats

# %% [markdown]
# Both integrate to 1. The flow finds all eight modes, and joins them by thin bridges and a faint
# haze inside the ring: a continuous invertible map deforms the plane, and cannot tear one Gaussian
# into eight separate pieces. The colours are powers of ten, so the bridges hold little
# probability, but some samples lie on them. The difference of the two means of $-\log p$ is an
# estimate of the KL divergence from the truth to the flow.
#
# ## The determinant by hand
#
# Three views of the same number, $\log |\det \partial f / \partial x|$:
#
# 1. the library adds up the layers: an actnorm contributes the logarithms of its scales, a 1x1
#    convolution $\log |\det W|$, a coupling its log-scales;
# 2. autograd gives the full 2x2 Jacobian, whose determinant needs no knowledge of the layers;
# 3. a small parallelogram around $x$ is mapped to another, and the ratio of their areas is the
#    determinant.

# %%
x = test_points[:200]
with torch.no_grad():
    z, log_det = flow.bijection(x)


def flow_of_point(point):
    return flow.bijection(point.view(1, 2, 1, 1))[0][0]


jacobian = torch.func.vmap(torch.func.jacrev(flow_of_point))(x.flatten(1))
by_autograd = torch.linalg.slogdet(jacobian).logabsdet

h = 1e-3
with torch.no_grad():
    right, up = (
        (flow.bijection(x + s)[0] - flow.bijection(x - s)[0]) / (2 * h)
        for s in (torch.tensor([h, 0.0]).view(2, 1, 1), torch.tensor([0.0, h]).view(2, 1, 1))
    )
by_area = (right[:, 0] * up[:, 1] - right[:, 1] * up[:, 0]).abs().log()

print("point:     ", [round(float(v), 3) for v in x[0].flatten()])
print("layers:    ", round(float(log_det[0]), 4))
print("autograd:  ", round(float(by_autograd[0]), 4))
print("areas:     ", round(float(by_area[0]), 4))
print(f"largest difference, autograd: {(by_autograd - log_det).abs().max():.1e},", end=" ")
print(f"median difference, areas: {(by_area - log_det).abs().median():.1e}")
assert (by_autograd - log_det).abs().max() < 1e-3
assert (by_area - log_det).abs().median() < 0.02

by_hand = -0.5 * (z.square() + math.log(2 * math.pi)).sum(1) + by_autograd
with torch.no_grad():
    assert torch.allclose(by_hand, flow.log_prob(x), atol=1e-3)

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
angle = torch.linspace(0, 2 * math.pi, 400)
circle = torch.stack([angle.cos(), angle.sin()], 1)
ray = torch.linspace(0, 3, 400)[:, None]
lines = [radius * circle for radius in (0.5, 1, 1.5, 2, 2.5, 3)]
lines += [ray * circle[k] for k in range(0, 400, 25)]
many, modes = test_points[:1500], points.split("test").labels[:1500]
with torch.no_grad():
    latents = flow.bijection(many)[0]
    for line in lines:
        left.plot(*line.T, color="0.7", lw=0.7)
        right.plot(*flow.bijection.inverse(line).flatten(1).T, color="0.7", lw=0.7)
left.scatter(*latents.T, c=modes, s=3, cmap="tab10")
right.scatter(*many.flatten(1).T, c=modes, s=3, cmap="tab10")
left.set(title="z = f(x): latents of test points", xlabel="$z_1$", ylabel="$z_2$")
right.set(title="x: test points, one colour per mode", xlabel="$x_1$", ylabel="$x_2$")
left.set(xlim=(-3.5, 3.5), ylim=(-3.5, 3.5), aspect="equal")
right.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal")
for ax in (left, right):
    ax.grid(False)
plt.show()

# %% [markdown]
# The grey lines are a polar grid of the latents, and the same grid in the plane of the data. In the
# latents, the eight modes lie side by side like slices of a cake. Between them, the inverse
# stretches the narrow seams over the wide gaps of the data. Where grid lines are crowded in $x$, in
# the modes and on the bridges, the determinant is large, and so is the density.
#
# ## Dequantisation
#
# Pixels are discrete, and a density could be made arbitrarily high by narrow spikes at their few
# values, so each value receives uniform noise as wide as one bin. The density of the noisy images
# then gives, in expectation, an upper bound on the bits of the discrete ones ([Theis et al.
# 2016](https://arxiv.org/abs/1511.01844), section 3.1).
#
# For $d$ values with $K$ levels each, in bits per value (bits/dim),
#
# $$-\log_2 P(x) / d \ \le\ E_u[-\log_2 p(x + u)] / d - \log_2 \delta, \qquad \delta = 2 / (K - 1).$$
#
# A model of the discrete values themselves needs no dequantisation. That is the next model.
#
# ## A model of pixels
#
# PixelCNN++ ([Salimans et al. 2017](https://arxiv.org/abs/1701.05517)) predicts the distribution of
# each pixel from those before it, row by row:
#
# $$\log P(x) = \sum_i \log P(x_i \mid x_1, \dots, x_{i - 1}) .$$
#
# The distribution of a pixel is a mixture of discretised logistics over the 17 grey levels of the
# digits. The cell trains a small network, and checks two properties: a pixel's distribution does
# not depend on later pixels, and its 17 probabilities sum to 1. The pixel-wise terms come from the
# same likelihood, applied to images of a single pixel.

# %%
data, pixels = train(
    400, "model=pixelcnnpp", "data=digits", "trainer.global_batch_size=64", "+model.optimizer.fused=true"
)
LEVELS = data.spec.num_bins
level_values = torch.linspace(-1, 1, LEVELS)
single = DiscretizedLogisticMixture(replace(data.spec, shape=(1, 1, 1)))


def shift_to_pixels(h):
    """Outputs (n, channels, 8, 8) as those of n * 64 images of one pixel."""
    return h.permute(0, 2, 3, 1).reshape(-1, h.shape[1], 1, 1)


@torch.no_grad()
def bits_per_pixel(x):
    """-log2 P(x_i | x_1, ..., x_{i-1}), (n, 8, 8)."""
    log_p = single.log_prob(shift_to_pixels(pixels.network(x)), x.reshape(-1, 1, 1, 1))
    return -log_p.view(-1, 8, 8) / math.log(2)


@torch.no_grad()
def level_probabilities(x):
    """P(x_i = level | x_1, ..., x_{i-1}), (n, 8, 8, 17)."""
    h = shift_to_pixels(pixels.network(x))
    every = [single.log_prob(h, level.expand(len(h), 1, 1, 1)) for level in level_values]
    return torch.stack(every, 1).exp().view(-1, 8, 8, LEVELS)


test = data.normalize(data.split("test").images)
bits = bits_per_pixel(test)
exact = pixels.likelihoods()["pixels"].bits_per_dim(test, {}, generator("cpu", 0))
assert torch.allclose(bits.flatten(1).mean(1), exact, atol=1e-4)

digit = test[3:4]
changed = digit.clone()
changed[..., 4:, :] = -changed[..., 4:, :]
before, after = level_probabilities(digit), level_probabilities(changed)
assert torch.allclose(before[:, :4], after[:, :4], atol=1e-5)
assert torch.allclose(before.sum(-1), torch.ones(1, 8, 8), atol=1e-4)
print(f"{len(test)} held-out digits: {exact.mean():.3f} bits/dim")
print(f"a whole digit: {64 * exact.mean():.0f} bits, P(x) about 2^-{64 * exact.mean():.0f}")

# %% [markdown]
# ## What a pixel costs
#
# A code that knows $P(x_i \mid x_1, \dots, x_{i-1})$ needs $-\log_2 P$ bits for the level that
# occurs. The first row below shows held-out digits, the second the price of each of their pixels.
# The charts show what the model expects at three pixels of the first digit, given all pixels
# before them.

# %%
figure = plt.figure(figsize=(9, 4.6), layout="constrained")
top, bottom = figure.subfigures(2, 1, height_ratios=[1.5, 1])
axes = top.subplots(2, 8)
chosen = [3, *range(10, 17)]
for k, row in enumerate(chosen):
    axes[0, k].imshow(test[row, 0], cmap="gray", vmin=-1, vmax=1)
    shown = axes[1, k].imshow(bits[row], cmap="magma", vmin=0, vmax=8)
    axes[1, k].set_xlabel(f"{bits[row].sum():.0f} bits")
for ax in axes.flat:
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
axes[0, 0].set_ylabel("digit")
axes[1, 0].set_ylabel("cost")
top.colorbar(shown, ax=axes, label="bits of a pixel", shrink=0.8)
dearest = divmod(int(bits[3].argmax()), 8)
for ax, (i, j) in zip(bottom.subplots(1, 3, sharey=True), ((0, 0), (2, 3), dearest)):
    level = int(((digit[0, 0, i, j] + 1) / 2 * (LEVELS - 1)).round())
    probability = before[0, i, j]
    colours = ["C3" if k == level else "C0" for k in range(LEVELS)]
    ax.bar(range(LEVELS), probability, color=colours)
    ax.set(xlabel="grey level", title=f"row {i}, column {j}: {-probability[level].log2():.1f} bits")
bottom.axes[0].set_ylabel("probability")
plt.show()

mean_cost = bits.mean(0)
print("mean cost by row:   ", [round(float(v), 2) for v in mean_cost.mean(1)])
print("mean cost by column:", [round(float(v), 2) for v in mean_cost.mean(0)])

# %% [markdown]
# The empty margins are almost free: the first pixel of a digit is black, and the model knows it.
# Most pixels of a stroke cost two to four bits; a code without a model needs $\log_2 17 = 4.1$ bits
# for every pixel. Light pixels in the pictures of the cost are surprises. The chart on the right
# shows the dearest pixel of the first digit: the model expects white there, and finds grey.
#
# ## Which images are probable?
#
# The same sum prices any image. Below are held-out digits, and seven images that are not digits.

# %%
shuffled = test[3].flatten()[torch.randperm(64, generator=generator("cpu", 1))].view(1, 1, 8, 8)
noise_levels = torch.randint(LEVELS, (1, 1, 8, 8), generator=generator("cpu", 2))
others = {
    "digit": digit,
    "black": torch.full_like(digit, -1),
    "white": torch.ones_like(digit),
    "upside down": digit.flip(2),
    "inverted": -digit,
    "pixels shuffled": shuffled,
    "mean digit": level_values[((test.mean(0, keepdim=True) + 1) * 8).round().long()],
    "noise": level_values[noise_levels],
}
cost = {name: float(bits_per_pixel(x).sum()) for name, x in others.items()}
figure = plt.figure(figsize=(9, 3.4), layout="constrained")
top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.3])
for ax, (name, x) in zip(top.subplots(1, len(others)), others.items()):
    ax.imshow(x[0, 0], cmap="gray", vmin=-1, vmax=1)
    ax.set(xticks=[], yticks=[], title=name, xlabel=f"{cost[name]:.0f} bits")
    ax.grid(False)
ax = bottom.subplots()
ax.hist(bits.sum((1, 2)), bins=40, color="C0", label="held-out digits")
for k, name in enumerate(("black", "mean digit", "shuffled")):
    name = "pixels shuffled" if name == "shuffled" else name
    ax.axvline(cost[name], color=f"C{k + 1}", label=name)
ax.axvline(64 * math.log2(LEVELS), color="k", ls=":", label="equally likely levels")
ax.set(xlabel="bits of the image", ylabel="images", xlim=(0, None))
ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0.64, 1))
plt.show()
dearer = (bits.sum((1, 2)) > cost["black"]).float().mean()
print(f"digits that cost more than the black image: {dearer:.1%}")

# %% [markdown]
# With 17 equally likely levels, every image would cost the same (dotted line). The model saves on
# digits, and pays for it on noise. The mean of all digits is far less probable than any digit of
# the histogram. The black image, in contrast, is more probable than nearly all digits, although no
# digit is black: many different digits share the probability, and the single most
# probable images need not look like any of them.
#
# ## Sampling, one pixel at a time
#
# To sample, draw the first pixel, then the second given the first, and so on. `raster_scan` yields
# the network's output at each pixel, and sees what was written before. The upper half may also be
# given: sampling the rest completes an image, for which nothing has to be trained
# ([van den Oord et al. 2016](https://arxiv.org/abs/1601.06759), figure 1). A digit has $17^{32}$
# lower halves, and the samples below are draws from their exact conditional distribution under the
# model.


# %%
@torch.no_grad()
def complete(x, first_row, source):
    """Images after each sampled row, from images whose rows above `first_row` are given."""
    x, states = x.clone(), []
    for i, j, h in pixels.network.raster_scan(x, first_row=first_row):
        x[:, :, i, j] = pixels.likelihood.sample(h, source)[:, :, 0, 0]
        if j == 7:
            states.append(x.clone())
    return states


def show_rows(rows, title):
    """One row of images per entry of `rows` (name -> images)."""
    figure, axes = plt.subplots(len(rows), squeeze=False, figsize=(9, 0.5 * len(rows) + 0.4))
    for ax, (name, images) in zip(axes[:, 0], rows.items()):
        tiles = torch.nn.functional.pad(images[:, 0], (1, 1), value=math.nan)
        ax.imshow(tiles.permute(1, 0, 2).flatten(1), cmap="gray", vmin=-1, vmax=1)
        ax.set_ylabel(name, rotation=0, ha="right", va="center")
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        ax.grid(False)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    plt.show()


states = complete(torch.full((16, 1, 8, 8), -1.0), 0, generator("cpu", 3))
show_rows({f"{k} rows": states[k - 1] for k in (2, 4, 6, 8)}, "Samples, row by row")

upper = test[3:19].clone()
upper[:, :, 4:] = -1
rows = {"digit": test[3:19], "given": upper}
for k in range(3):
    rows[f"completion {k + 1}"] = complete(upper, 4, generator("cpu", k))[-1]
show_rows(rows, "The lower half, three times")
sampled_bits = bits_per_pixel(states[-1]).sum((1, 2))
print(f"bits of these 16 samples: {sampled_bits.mean():.0f}, of held-out digits", end=" ")
print(f"{bits.sum((1, 2)).mean():.0f}")

# %% [markdown]
# Many samples are legible, and some fall apart, such as the second. By their bits they cannot be
# told from held-out digits, on average. The completions agree where the upper half decides the
# digit, as for the 0 in the eighth column, and differ where it leaves a choice.
#
# ## Exact, bound, estimate
#
# Most families do not know their likelihood, and report something else. On the points in the
# plane, where the truth is known, three kinds of numbers can be compared. A diffusion model (EDM)
# has a variational *bound*, which is larger than $-\log p$ in expectation, and the density of its
# probability-flow ODE, which an ODE solver with finite steps computes: an *estimate*.

# %%
_, edm = train(
    1000,
    "model=edm",
    "data=toy2d",
    "model/network=mlp",
    "model.network.depth=2",
    "model.optimizer.lr=4e-3",
    "+model.optimizer.fused=true",
    "trainer.global_batch_size=256",
)
x = test_points[:1000]
nats = {"truth (entropy)": -points.log_density(x)}
with torch.no_grad():
    nats["flow, exact"] = -flow.log_prob(x)
for name, method in (
    ("EDM, bound", VLBLikelihood(num_samples=32)),
    ("EDM, estimate", ODELikelihood(rtol=1e-4, atol=1e-4, exact_trace=True)),
):
    terms = method.terms(edm.denoiser, x, {}, edm.data_likelihood, generator("cpu", 4))
    nats[name] = sum(terms.values()) * 2 * math.log(2)
for name, values in nats.items():
    print(f"{name:16s} {values.mean():6.3f} +- {values.std() / len(x) ** 0.5:.3f} nats per point")
    assert values.mean() > nats["truth (entropy)"].mean() - 1e-6

# %% [markdown]
# In expectation no model is better than the truth, whose mean is the entropy. The excess of an
# exact value is the KL divergence from the truth; that of a bound also contains its gap. The bound
# of EDM is clearly above the estimate for the same network, and the estimate is near the exact
# value of the flow: judged by its bound, EDM would seem the worse model.
#
# ## The table of a comparison
#
# A checkout of the repository contains records of 21 families on digits. `likelihood_rows` lists
# their bits/dim with their kinds, as the page of a comparison does. Families without a likelihood
# (GANs, energy-based models, consistency models, models of latents or tokens) are missing. No
# family of these records was evaluated with the ODE, so that none has an estimate.

# %%
folders = [path for path in (Path("../docs/results"), Path("docs/results")) if path.is_dir()]
if folders:
    tables = {name: gencompare.compare(f"{folders[0]}/{name}/*").tables[0] for name in ("digits", "fashion_mnist")}
    print(f"{'digits':14s}{'estimator':>10s}{'bits/dim':>10s}{'kind':>8s}{'1000 x MMD^2':>14s}")
    for each in likelihood_rows(tables["digits"]):
        quality = f"{each.row.metric.value:14.2f}"
        print(f"{each.row.title:14s}{each.estimator:>10s}{each.metric.value:10.2f}", end="")
        print(f"{each.kind:>8s}{quality}")
else:
    print("This part needs the folder docs/results of a checkout of the repository.")

# %% [markdown]
# A bound is comparable with an exact value in one direction only. The VAE's bound with 50 importance
# samples (`iwae_50`) is below the exact value of PixelCNN++, so the VAE is the better code on these
# images, whatever its exact value is. The opposite order proves nothing: several bounds are above
# $\log_2 17 = 4.1$ bits, worse than no model at all, while samples of the same models are among the
# best. These are bounds with a large gap.
#
# ## Where likelihood and samples disagree
#
# The chart shows all families with a likelihood on both data sets: the best bits/dim of each
# against the distance of its samples from the training images (MMD, lower is better).

# %%
if folders:
    titles = {"digits": "digits", "fashion_mnist": "Fashion-MNIST"}
    to_the_left = ("vae", "pixelcnnpp", "iddpm")
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for ax, (name, table) in zip(axes, tables.items()):
        every = likelihood_rows(table)
        found = [best_likelihood(row, every) for row in table.rows]
        found = [each for each in found if each is not None]
        for each in found:
            position = each.metric.value, each.row.metric.value
            family = each.row.run.record.family
            left = family in to_the_left
            ax.plot(*position, "o", ms=5, color="C3" if each.kind == "exact" else "C0")
            ax.annotate(
                family,
                position,
                (-5, -2) if left else (5, -2),
                textcoords="offset points",
                ha="right" if left else "left",
                fontsize=7,
            )
        ranks = spearmanr([each.metric.value for each in found], [each.row.metric.value for each in found])
        print(f"{titles[name]}: {len(found)} families, rank correlation {ranks.statistic:.2f}")
        ax.set(xlabel="bits/dim (lower is better)", yscale="log", title=titles[name])
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(ScalarFormatter())
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.margins(x=0.25)
    axes[0].set_ylabel("1000 x MMD$^2$ (lower is better)")
    axes[0].plot([], [], "o", color="C3", label="exact")
    axes[0].plot([], [], "o", color="C0", label="bound")
    axes[0].legend(fontsize=8, loc="lower right")
    plt.show()

# %% [markdown]
# The two flows have lower bits/dim than most diffusion models on digits, and far worse samples.
# PixelCNN++ is good at both there, but on Fashion-MNIST it has the lowest bits/dim of all and the
# worst samples of this chart. There are two reasons. First, bits/dim add up the surprises of all
# pixels, most of which are fine texture between neighbours, while the metric, like the eye, looks
# at whole shapes. Second, a likelihood is computed on real images: each pixel is predicted from
# *correct* earlier pixels. In sampling, the earlier pixels are the model's own, and errors add up.
#
# These are short runs, with one seed per family on digits, and 100 test images for each
# likelihood. They show that the two orders differ, and not which family is best.
#
# ## Questions
#
# ### 1. What do 99 % of noise cost?
#
# A model that outputs noise in 99 of 100 samples, and a sample of PixelCNN++ in the other, has the
# probability $P'(x) = 0.01\, P(x) + 0.99 \cdot 17^{-64}$ (the argument of Theis et al. 2016, section
# 3.2). How many bits/dim does it lose?

# %%
log_p = -bits.sum((1, 2)) * math.log(2)
log_noise = torch.full_like(log_p, -64 * math.log(LEVELS))
mixture = torch.logaddexp(math.log(0.01) + log_p, math.log(0.99) + log_noise)
lost = float(exact.mean())
print(f"PixelCNN++ {lost:.3f} bits/dim,", end=" ")
print(f"99 % noise {float(-mixture.mean()) / 64 / math.log(2):.3f} bits/dim,", end=" ")
print(f"uniform noise {math.log2(LEVELS):.3f}; log2(100) / 64 = {math.log2(100) / 64:.3f}")
assert float(-mixture.mean()) / 64 / math.log(2) - lost <= math.log2(100) / 64 + 1e-6

# %% [markdown]
# At most $\log_2(100) / d$, since $P'(x) \ge 0.01\, P(x)$: a tenth of a bit per value on 64 pixels,
# less than the differences between families above, and a tiny fraction on larger images. The
# samples are almost all noise. In the other direction, a model that repeats the training images
# has perfect samples, and a probability of 0 for a new image.
#
# ### 2. Is it a good code?
#
# Bits/dim are the length of a lossless code. How do they compare with codes that know no digits:
# 17 equally likely levels, the histogram of each pixel on its own, and a general compressor
# (LZMA) on all test images in one file?

# %%
train_levels = data.split("train").images.flatten(1).long()
test_levels = data.split("test").images.flatten(1).long()
counts = torch.nn.functional.one_hot(train_levels, LEVELS).sum(0) + 0.5
histogram = counts / counts.sum(1, keepdim=True)
independent = -histogram[torch.arange(64), test_levels].log2().mean()
compressed = 8 * len(lzma.compress(bytes(test_levels.byte().flatten().tolist()), preset=9))
for name, value in (
    ("equally likely levels", math.log2(LEVELS)),
    ("LZMA", compressed / test_levels.numel()),
    ("histogram of each pixel", float(independent)),
    ("PixelCNN++", float(exact.mean())),
):
    print(f"{name:24s} {value:.2f} bits/dim")
assert exact.mean() < independent < compressed / test_levels.numel() < math.log2(LEVELS)

# %% [markdown]
# The histograms know where the ink is, and PixelCNN++ also knows how pixels depend on each other,
# which saves about a quarter of the bits. Both were fitted to the training images, and the sizes of
# the model and of the histograms are not counted. LZMA needs neither, and has to find all
# structure in the file itself.
