# %% [markdown]
# # The forward process and noise schedules
#
# A diffusion model learns to undo a process that turns images into noise. This notebook runs that
# process on handwritten digits and measures what a noise schedule changes and what it leaves
# unchanged.
#
# You learn
#
# - how one noising step and a long chain of steps are related by a closed form;
# - why training needs a single random draw per image (the reparameterisation), and what it does for
#   gradients;
# - how the linear and the cosine schedule differ;
# - why schedules are compared in the log-SNR;
# - why a schedule that stops too early changes the brightness of samples.

# %% tags=["install"]
# Only needed outside of a checkout, for example in Colab.
# %pip install -q git+{REPOSITORY}

# %%
import math

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import avg_pool2d, pad

from gencompare.data.digits import Digits
from gencompare.diffusion.discrete_schedules import BetaTable, CosineBetas, LinearBetas
from gencompare.diffusion.multistep_samplers import DPMSolverPP2M
from gencompare.diffusion.objectives import NoisyBatch
from gencompare.diffusion.parameterizations import Prediction
from gencompare.diffusion.schedules import VE, VP, RectifiedFlow, SubVP, schedule_curve
from gencompare.diffusion.times import LogSNRGrid
from gencompare.diffusion.variational_objectives import prior_kl
from gencompare.rng import generator

torch.manual_seed(0)
plt.rcParams.update(
    {"figure.facecolor": "white", "axes.grid": True, "grid.alpha": 0.3, "font.size": 9}
)


def show_rows(rows, columns, title):
    """One row of images per entry of `rows` (name -> images), on a common grey scale."""
    figure, axes = plt.subplots(
        len(rows), squeeze=False, figsize=(9, 9 / len(columns) * len(rows) + 0.5)
    )
    for ax, (name, images) in zip(axes[:, 0], rows.items()):
        width = images.shape[-1]
        tiles = pad(images[:, 0], (0, width // 8), value=math.nan)
        ax.imshow(tiles.permute(1, 0, 2).flatten(1), cmap="gray", vmin=-2, vmax=2)
        ax.set_ylabel(name, rotation=0, ha="right", va="center")
        ax.set(
            xticks=[(width + width // 8) * k + width / 2 for k in range(len(columns))], yticks=[]
        )
        ax.set_xticklabels(columns if ax is axes[0, 0] else [""] * len(columns))
        ax.tick_params(length=0, labelbottom=False, labeltop=True)
        ax.spines[:].set_visible(False)
        ax.grid(False)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    plt.show()


# %% [markdown]
# ## One step of noise
#
# A step of the forward process shrinks the image slightly and adds Gaussian noise ([Ho et al.
# 2020](https://arxiv.org/abs/2006.11239), eq. 2):
#
# $$q(x_t \mid x_{t-1}) = \mathcal N\left(\sqrt{1 - \beta_t}\, x_{t-1},\ \beta_t I\right).$$
#
# The shrinking keeps the variance constant: if the pixels of $x_{t-1}$ have mean 0 and variance 1,
# so have those of $x_t$, because $(1 - \beta_t) + \beta_t = 1$. The digits have 8x8 pixels with
# values in $[-1, 1]$.

# %%
data = Digits()
digits = data.normalize(data.split("test").images)
x0 = digits[2:3]


def forward_step(x, beta):
    return math.sqrt(1 - beta) * x + math.sqrt(beta) * torch.randn_like(x)


standardised = torch.randn(100_000)
for beta in (0.02, 0.2, 0.8):
    print(f"beta {beta}: variance after one step {forward_step(standardised, beta).var():.3f}")
    assert abs(forward_step(standardised, beta).var() - 1) < 0.02
draws = x0.expand(6, -1, -1, -1)
steps = {f"beta {beta}": forward_step(draws, beta) for beta in (0.02, 0.2, 0.8)}
show_rows(
    steps, [f"draw {k + 1}" for k in range(6)], "One step from the same digit, six draws each"
)

# %% [markdown]
# ## Many steps
#
# DDPM takes $T = 1000$ steps with betas that increase linearly from 0.0001 to 0.02. The cell
# follows 500 chains that start at the same digit, and keeps every state of the first chain. A
# single step changes the image little; a thousand steps leave nothing of the digit to see.
#
# ## The closed form
#
# A sum of independent Gaussian terms is Gaussian, so $t$ steps collapse into one (Ho et al. 2020,
# eq. 4):
#
# $$q(x_t \mid x_0) = \mathcal N\left(\alpha_t x_0,\ \sigma_t^2 I\right), \qquad
# \alpha_t^2 = \bar\alpha_t = \prod_{i \le t} (1 - \beta_i), \qquad \sigma_t^2 = 1 - \bar\alpha_t.$$
#
# `BetaTable` turns any list of betas into such a schedule. Step $i$ is time $i / T$, and `at`
# returns alpha and sigma. The chains above have these means and standard deviations at every step:
# in the code, `signal` is the factor that multiplies the digit in the mean of the chains, and
# `noise` is the standard deviation about this mean.

# %%
betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
chains = x0.expand(500, -1, -1, -1)
first_chain, signal, noise = [x0], [], []
for beta in betas.tolist():
    chains = forward_step(chains, beta)
    first_chain.append(chains[:1])
    mean = chains.mean(0)
    signal.append((mean * x0[0]).sum() / x0.square().sum())
    noise.append((chains - mean).square().mean().sqrt())
signal, noise = torch.stack(signal), torch.stack(noise)

shown = [0, 1, 50, 100, 200, 300, 500, 700, 1000]
show_rows(
    {"chain": torch.cat([first_chain[k] for k in shown])},
    [f"step {k}" for k in shown],
    "One chain of 1000 steps",
)

schedule = BetaTable(betas)
t = schedule.discrete_times
at = schedule.at(t)
product = (1 - betas).cumprod(0)
assert torch.allclose(at.alpha.double() ** 2, product, atol=1e-6)
assert torch.allclose(at.sigma.double() ** 2, 1 - product, atol=1e-6)
assert torch.equal(schedule.table, LinearBetas().table)
print(f"largest deviation of the chains: alpha {(signal - at.alpha).abs().max():.4f},", end=" ")
print(f"sigma {(noise - at.sigma).abs().max():.4f}")
assert (signal - at.alpha).abs().max() < 0.03 and (noise - at.sigma).abs().max() < 0.03

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
left.plot(at.alpha, label=r"$\alpha_t$, closed form", color="C0")
left.plot(at.sigma, label=r"$\sigma_t$, closed form", color="C1")
left.plot(range(0, 1000, 50), signal[::50], "o", ms=4, color="C0", label="500 chains")
left.plot(range(0, 1000, 50), noise[::50], "o", ms=4, color="C1", label="500 chains")
left.set(xlabel="step", title="Mean and standard deviation of the chain")
left.legend(fontsize=8)
error = ((chains - at.alpha[-1] * x0) / at.sigma[-1]).flatten()
grid = torch.linspace(-4, 4, 200)
right.hist(
    error.numpy(), bins=60, density=True, color="C2", alpha=0.6, label="last step of 500 chains"
)
right.plot(
    grid, torch.exp(-(grid**2) / 2) / math.sqrt(2 * math.pi), "k", label=r"$\mathcal{N}(0, 1)$"
)
right.set(
    xlabel=r"$(x_T - \alpha_T x_0)\, /\, \sigma_T$",
    ylabel="density",
    title="All pixels at the last step",
)
right.legend(fontsize=8)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## The reparameterisation
#
# The closed form says that $x_t$ is a deterministic function of the image and of noise that does
# not depend on $t$:
#
# $$x_t = \alpha_t x_0 + \sigma_t\, \epsilon, \qquad \epsilon \sim \mathcal N(0, I).$$
#
# Training therefore needs one draw per image instead of a chain, at a different time for each
# image. `NoisyBatch.make` is the function that every loss of the package calls.

# %%
times = torch.tensor([0.001, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0])
eps = torch.randn(len(times), *x0.shape[1:])
batch = NoisyBatch.make(x0.expand_as(eps), eps, times, schedule.at(times, eps))
assert torch.allclose(batch.x_t, batch.at.alpha * x0 + batch.at.sigma * eps)
same_noise = NoisyBatch.make(
    x0.expand_as(eps), eps[:1].expand_as(eps), times, schedule.at(times, eps)
)
show_rows(
    {"new noise": batch.x_t, "same noise": same_noise.x_t},
    [f"t = {value:g}" for value in times.tolist()],
    "One draw per time; with the same noise, the images form a smooth path",
)

# %% [markdown]
# The second use of the reparameterisation is the gradient of an expectation with respect to the
# noise level. For a function $f$,
#
# $$\frac{d}{d\sigma} E[f(x + \sigma \epsilon)] = E[\epsilon\, f'(x + \sigma \epsilon)]
# = E\left[f(x + \sigma \epsilon)\, \frac{\epsilon^2 - 1}{\sigma}\right].$$
#
# The first form differentiates through the noise ([Kingma and Welling
# 2014](https://arxiv.org/abs/1312.6114), section 2.4), the second differentiates the density (the
# score-function estimator). Both have the same mean. Here $f(x) = x^2$, for which the exact value
# is $2\sigma$.

# %%
x, sigma = 1.0, 0.5
e = torch.randn(200_000, dtype=torch.float64)
pathwise = e * 2 * (x + sigma * e)
score_function = (x + sigma * e) ** 2 * (e**2 - 1) / sigma
print(f"exact {2 * sigma:.3f}")
for name, estimate in (("through the noise", pathwise), ("score function", score_function)):
    print(
        f"{name}: mean {estimate.mean():.3f}, standard deviation of one draw {estimate.std():.2f}"
    )
    assert abs(estimate.mean() - 2 * sigma) < 5 * estimate.std() / math.sqrt(len(e))
assert score_function.std() > 2 * pathwise.std()

# %% [markdown]
# ## Linear and cosine
#
# [Nichol and Dhariwal (2021)](https://arxiv.org/abs/2102.09672), eq. 17, observe that the linear
# betas destroy small images too early, and choose $\alpha_t$ to follow a cosine:
#
# $$\bar\alpha_t = \frac{f(t)}{f(0)}, \qquad
# f(t) = \cos^2\left(\frac{\pi}{2}\, \frac{t + s}{1 + s}\right), \qquad s = 0.008.$$
#
# Both rows below use the same noise, and the digit is enlarged to 32x32 pixels so that the eye can
# average over it. At $t = 0.7$ the cosine schedule keeps almost half of the amplitude of the digit,
# the linear one less than a tenth.

# %%
linear, cosine = LinearBetas(), CosineBetas()
f = torch.cos(math.pi / 2 * (torch.tensor([0.0, 0.5]) + 0.008) / 1.008) ** 2
assert torch.allclose(cosine.at(torch.tensor(0.5)).alpha ** 2, f[1] / f[0], atol=1e-5)

times = torch.tensor([0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
x = digits[4:5].repeat_interleave(4, 2).repeat_interleave(4, 3).expand(len(times), -1, -1, -1)
eps = torch.randn_like(x[:1]).expand_as(x)
rows = {
    name: NoisyBatch.make(x, eps, times, each.at(times, x)).x_t
    for name, each in (("linear", linear), ("cosine", cosine))
}
show_rows(
    rows,
    [f"t = {value:g}" for value in times.tolist()],
    "The same digit and the same noise under two schedules",
)
for name, each in (("linear", linear), ("cosine", cosine)):
    print(f"{name}: alpha at t = 0.7 is {each.at(torch.tensor(0.7)).alpha:.2f}")

# %% [markdown]
# ## The log-SNR
#
# The signal-to-noise ratio of a schedule and its logarithm are
#
# $$\mathrm{SNR}_t = \frac{\alpha_t^2}{\sigma_t^2}, \qquad \lambda_t = \log \mathrm{SNR}_t$$
#
# ([Kingma et al. 2021](https://arxiv.org/abs/2107.00630), section 3). Two schedules differ in two
# ways only: by the range of $\lambda$, and by the time they spend at each value. For uniform times
# the second is the density $p(\lambda) = 1 / ((t_{max} - t_{min})\, |d\lambda / dt|)$, which
# `schedule_curve` returns. Training spends its effort on noise levels in this proportion.

# %%
curves = {
    "linear": schedule_curve(linear, 2001),
    "cosine": schedule_curve(cosine, 2001),
    "VE": schedule_curve(VE(), 2001),
    "rectified flow": schedule_curve(RectifiedFlow(), 2001),
}
figure, axes = plt.subplots(1, 3, figsize=(9, 3))
for name, curve in curves.items():
    axes[0].plot(curve["t"], curve["alpha"], label=name)
    axes[1].plot(curve["t"], curve["log_snr"], label=name)
    axes[2].plot(curve["log_snr"], curve["density"], label=name)
axes[0].set(xlabel="t", ylabel=r"$\alpha_t$", title="Fraction of the image")
axes[1].set(xlabel="t", ylabel=r"$\lambda_t$", title="log-SNR")
axes[2].set(
    xlabel=r"$\lambda$", ylabel=r"$p(\lambda)$", title="Density for uniform times", xlim=(-20, 20)
)
axes[0].legend(fontsize=8)
figure.tight_layout()
plt.show()

inner = curves["cosine"]
area = torch.trapezoid(torch.tensor(inner["density"]), -torch.tensor(inner["log_snr"]))
print(f"area under the density of the cosine schedule: {area:.4f}")
assert abs(area - 1) < 0.02

# %% [markdown]
# ## Why the log-SNR and not time
#
# Dividing $x_t$ by $\alpha_t$ loses no information, and what remains depends on the log-SNR alone:
#
# $$\frac{x_t}{\alpha_t} = x_0 + \frac{\sigma_t}{\alpha_t}\, \epsilon
# = x_0 + e^{-\lambda_t / 2}\, \epsilon.$$
#
# So at equal log-SNR, every schedule gives the same denoising problem. The cell finds the time at
# which each of four schedules has $\lambda = -1$: the times differ, the rescaled images do not.

# %%
level = torch.tensor(-1.0)
x = digits[:8]
eps = torch.randn_like(x)
expected = x + torch.exp(-level / 2) * eps
for each in (linear, cosine, VE(), RectifiedFlow()):
    t = each.t_from_log_snr(level)
    at = each.at(t, x)
    x_t = NoisyBatch.make(x, eps, t, at).x_t
    assert torch.allclose(x_t / at.alpha, expected, atol=1e-3)
    print(f"{type(each).__name__:14s} t = {t:.3f}  alpha = {at.alpha:.3f}", end="  ")
    print(f"sigma = {at.sigma:.3f}  standard deviation of x_t {x_t.std():.2f}")

# %% [markdown]
# ## The same log-SNR hides less of a larger image
#
# The log-SNR is a ratio per pixel. Neighbouring pixels of a large image are similar, so the eye and
# the network average over them. Averaging $k \times k$ equal pixels divides the noise by $k$ and
# raises the log-SNR by $2 \log k$ ([Hoogeboom et al. 2023](https://arxiv.org/abs/2301.11093),
# section 3.1). This is why larger images need noisier schedules.

# %%
k = 8
small = digits[10:18]
large = small.repeat_interleave(k, 2).repeat_interleave(k, 3)
t = cosine.t_from_log_snr(torch.tensor(-1.0))
noisy = {
    "8x8": NoisyBatch.make(small, torch.randn_like(small), t, cosine.at(t, small)).x_t,
    "64x64": NoisyBatch.make(large, torch.randn_like(large), t, cosine.at(t, large)).x_t,
}
show_rows(
    {"clean": small, **noisy},
    [""] * 8,
    r"Two resolutions at $\lambda = -1$, the same noise per pixel",
)

at = cosine.at(t, large)
averaged_noise = avg_pool2d(noisy["64x64"], k) - at.alpha * small
raised = 2 * torch.log(at.alpha / averaged_noise.std())
print(
    f"log-SNR per pixel {at.log_snr:.2f}, of averages over {k} x {k} pixels {raised:.2f};", end=" "
)
print(f"rule {at.log_snr + 2 * math.log(k):.2f}")
assert abs(raised - at.log_snr - 2 * math.log(k)) < 0.2

# %% [markdown]
# ## The end of the schedule
#
# Sampling starts from pure noise, which is $x_T$ only if $\alpha_T = 0$. No schedule of betas below
# 1 reaches that. [Lin et al. (2023)](https://arxiv.org/abs/2305.08891), section 3.1, show that
# Stable Diffusion stops at $\alpha_T = 0.068$. The mismatch is the first term of the variational
# bound, $\mathrm{KL}(q(x_T \mid x_0)\, \|\, p(x_T))$, which `prior_kl` computes:
#
# $$\mathrm{KL} = \frac12 \sum_{\text{pixels}}
# \left(\alpha_T^2 x_0^2 + \sigma_T^2 - 1 - \log \sigma_T^2\right).$$

# %%
scaled_linear = LinearBetas(0.00085, 0.012, power=2)
ends = {"scaled linear": scaled_linear, "linear": linear, "cosine": cosine}
for name, each in ends.items():
    at = each.at(torch.tensor(1.0), digits)
    kl = prior_kl(each, digits)
    by_hand = 0.5 * (at.alpha**2 * digits**2 + at.sigma**2 - 1 - 2 * at.sigma.log()).flatten(1).sum(
        1
    )
    assert torch.allclose(kl, by_hand, atol=1e-4)
    print(f"{name:14s} log-SNR {at.log_snr:6.2f}  alpha {at.alpha:.5f}", end="  ")
    print(f"KL per digit {kl.mean():.4f} nats")
print(
    "Starting from pure noise is accepted up to a log-SNR of -4:",
    scaled_linear.prior_mismatch(torch.tensor(1.0)),
)

# %% [markdown]
# 0.1 nats per digit seem negligible. But in a larger image what remains adds up in one direction:
# the mean of all pixels, where averaging removes the noise. The next cell isolates it. The data are
# 64x64 images of a single brightness $b \sim \mathcal N(0, 0.5^2)$. Their optimal denoiser only
# needs the mean $m$ of the $D = 4096$ pixels:
#
# $$E[b \mid x_t] = \frac{\alpha_t\, 0.5^2\, m}{\alpha_t^2\, 0.5^2 + \sigma_t^2 / D}.$$
#
# The exact solution of the probability-flow ODE only rescales the mean, so the standard deviation
# of the sampled brightness is known too:
#
# $$\mathrm{std} = 0.5\, \sqrt{\frac{1 / D}{\alpha_T^2\, 0.5^2 + \sigma_T^2 / D}}.$$
#
# Under the scaled linear schedule no sample is very dark or very bright, although the denoiser is
# optimal: sampling starts from a distribution that no noisy training image has.


# %%
class FlatImageDenoiser:
    """The optimal denoiser of images whose pixels all equal b ~ N(0, std^2)."""

    def __init__(self, schedule, std):
        self.schedule, self.std = schedule, std

    def __call__(self, x_t, t, cond):
        at = self.schedule.at(t, x_t)
        mean = x_t.mean((1, 2, 3), keepdim=True)
        precision = at.alpha**2 * self.std**2 + at.sigma**2 / x_t[0].numel()
        x0 = (at.alpha * self.std**2 * mean / precision).expand_as(x_t)
        return Prediction(x0=x0, eps=(x_t - at.alpha * x0) / at.sigma)


STD, SHAPE = 0.5, (300, 1, 64, 64)
SAMPLER = DPMSolverPP2M(num_steps=40, grid=LogSNRGrid())
brightness = {"data": STD * torch.randn(SHAPE[0])}
for name, each in ends.items():
    start = each.prior(SHAPE, generator("cpu", 0))
    samples = SAMPLER.sample(FlatImageDenoiser(each, STD), start, generator=generator("cpu", 1))
    brightness[name] = samples.mean((1, 2, 3))

figure, axes = plt.subplots(1, 4, figsize=(9, 2.6), sharex=True, sharey=True)
for ax, (name, values) in zip(axes, brightness.items()):
    ax.hist(
        values.numpy(),
        bins=torch.linspace(-1.6, 1.6, 41).numpy(),
        color="C0" if name == "data" else "C1",
    )
    ax.set(title=f"{name}\nstd {values.std():.2f}", xlabel="brightness")
    if name != "data":
        at = ends[name].at(torch.tensor(1.0))
        exact = STD * (1 / 4096 / (at.alpha**2 * STD**2 + at.sigma**2 / 4096)).sqrt()
        print(
            f"{name:14s} std of the brightness: sampled {values.std():.3f}, closed form {exact:.3f}"
        )
        assert abs(values.std() / exact - 1) < 0.15
axes[0].set_ylabel("images")
figure.tight_layout()
plt.show()
assert brightness["scaled linear"].std() < 0.3 < brightness["cosine"].std()

# %% [markdown]
# ## Questions
#
# ### 1. How much of the training time is spent where there is little to learn?
#
# Outside of $-5 \le \lambda \le 5$, the image is nearly clean or nearly pure noise. Which fraction
# of uniform times lies there?

# %%
ends_of_range = torch.tensor([5.0, -5.0])
outside = {}
for name, each in {
    "linear": linear,
    "cosine": cosine,
    "VP": VP(),
    "sub-VP": SubVP(),
    "VE": VE(),
}.items():
    early, late = each.t_from_log_snr(ends_of_range).tolist()
    outside[name] = 1 - (late - early) / (each.t_max - each.t_min)
    print(f"{name:7s} {outside[name]:.0%} of uniform times:", end=" ")
    print(f"lambda is above 5 before t = {early:.2f} and below -5 after t = {late:.2f}")
assert outside["cosine"] < 0.15 < outside["linear"]

# %% [markdown]
# The cosine schedule spends 10% of its times there, the linear one and its continuous limit VP 32%.
# For the linear schedule almost all of that is time at nearly pure noise.
#
# ### 2. What happens with the same betas and only 100 steps?
#
# A shorter chain with unchanged betas multiplies fewer factors $1 - \beta_i$.

# %%
short = LinearBetas(num_train_timesteps=100)
print(f"same betas: alpha at the end {short.at(torch.tensor(1.0)).alpha:.2f}")
print(short.prior_mismatch(torch.tensor(1.0)))
scaled = LinearBetas(1e-3, 0.2, num_train_timesteps=100)
print(f"betas times 10: alpha at the end {scaled.at(torch.tensor(1.0)).alpha:.4f}")
assert short.prior_mismatch(torch.tensor(1.0)) and scaled.prior_mismatch(torch.tensor(1.0)) is None

# %% [markdown]
# 60% of the image remains at the end. With $T$ steps the betas must be $1000 / T$ times as large.
#
# ### 3. Does rescaling the schedule correct the brightness?
#
# Lin et al. (2023), algorithm 1, shift and scale $\alpha$ so that the last value is 0 and the first
# is unchanged: $\alpha_i' = (\alpha_i - \alpha_T)\, \alpha_1 / (\alpha_1 - \alpha_T)$. With
# $\alpha_T = 0$ the log-SNR would be infinite, and a network that predicts noise would have nothing
# to predict. A last beta of 0.999 stops just short of it.

# %%
alpha = scaled_linear.at(scaled_linear.discrete_times).alpha.double()
alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
rescaled = BetaTable((1 - (alpha / torch.cat([torch.ones(1), alpha[:-1]])) ** 2).clamp(max=0.999))
start = rescaled.prior(SHAPE, generator("cpu", 0))
samples = SAMPLER.sample(FlatImageDenoiser(rescaled, STD), start, generator=generator("cpu", 1))
corrected = samples.mean((1, 2, 3)).std()
print(f"log-SNR at the end: {scaled_linear.at(torch.tensor(1.0)).log_snr:.2f}, rescaled", end=" ")
print(f"{rescaled.at(torch.tensor(1.0)).log_snr:.2f}")
print(f"standard deviation of the brightness: {brightness['scaled linear'].std():.3f},", end=" ")
print(f"rescaled {corrected:.3f}, data {STD}")
assert abs(corrected - STD) < 0.06

# %% [markdown]
# Yes: the standard deviation of the brightness is that of the data again, within the sampling error
# of 300 images (0.02).
