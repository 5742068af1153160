# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # VAE, hierarchical VAE and VDM: one family
#
# Three models maximise the same bound: a VAE with one latent vector, a hierarchical VAE with
# several, and a variational diffusion model, whose latents are the image with more and more
# noise. The notebook takes the bound apart on data with a known likelihood, then trains all three
# on 8x8 digits.
#
# - The reparameterisation trick and the score-function estimator have the same mean and very
#   different variances.
# - The KL term keeps posterior variances from collapsing to zero.
# - The gap between the bound and the exact likelihood is a KL divergence, and closes with a rich
#   enough encoder.
# - A diffusion model is a hierarchical VAE whose encoder is fixed; its layers only need a network
#   on the way back.
# - In continuous time the bound does not depend on the shape of the noise schedule, and a learned
#   schedule lowers its variance.

# %% tags=["install"]
# Only needed outside of a checkout, for example in Colab.
# %pip install -q git+{REPOSITORY}

# %%
import dataclasses
import logging
import math
import warnings
from functools import partial

import matplotlib.pyplot as plt
import pytorch_lightning as pl
import torch

import gencompare
from gencompare.diffusion.data_likelihood import DataLikelihood
from gencompare.diffusion.denoiser import Denoiser
from gencompare.diffusion.learned_schedule import LearnedSchedule
from gencompare.diffusion.likelihoods import VLBLikelihood
from gencompare.diffusion.parameterizations import Eps, LogSNRConditioning
from gencompare.generative_model import DataSpec
from gencompare.models.elbo import kl_from_standard_normal
from gencompare.models.pixel_likelihoods import GaussianLikelihood
from gencompare.models.vae import VAE
from gencompare.networks.mlp import MLPDecoder, MLPEncoder
from gencompare.rng import RandomSource

torch.manual_seed(0)
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
warnings.filterwarnings("ignore")
plt.rcParams.update({"figure.facecolor": "white", "savefig.facecolor": "white"})

# %% [markdown]
# ## A VAE with a known likelihood
#
# The encoder of a VAE outputs $\mu(x)$ and $\log \sigma^2(x)$ of $q(z \mid x) = N(\mu,
# \sigma^2)$, and the decoder the mean of $p(x \mid z)$. If the decoder is linear, the model is
# probabilistic PCA, and everything has a closed form:
#
# $$z \sim N(0, I), \quad x = W z + s\, \epsilon, \qquad p(x) = N(0, W W^T + s^2 I), \qquad
#   p(z \mid x) = N(\Lambda^{-1} W^T x / s^2, \Lambda^{-1}), \quad \Lambda = I + W^T W / s^2 .$$
#
# Networks of depth 0 are linear layers, so the package's `VAE` becomes this model.

# %%
d, k, s = 5, 2, 0.5
torch.manual_seed(1)
W = torch.randn(d, k)
W[:, 1] += W[:, 0]  # the columns are correlated
x = torch.randn(4000, k) @ W.T + s * torch.randn(4000, d)
images = x[:, :, None, None]
precision = torch.eye(k) + W.T @ W / s**2
posterior = torch.distributions.MultivariateNormal(
    x @ W / s**2 @ precision.inverse(), precision_matrix=precision
)
marginal = torch.distributions.MultivariateNormal(torch.zeros(d), W @ W.T + s**2 * torch.eye(d))
log_p = marginal.log_prob(x)


def linear_vae(weight, beta=1.0):
    """A VAE with the true decoder, which stays fixed, and a linear encoder."""
    torch.manual_seed(0)
    model = VAE(
        DataSpec("ppca", (d, 1, 1), num_bins=None), latent_dim=k, beta=beta, likelihood=GaussianLikelihood,
        encoder=partial(MLPEncoder, depth=0), decoder=partial(MLPDecoder, depth=0),
    )  # fmt: skip
    model.decoder.net[0].weight.data.copy_(weight)
    model.decoder.net[0].bias.data.zero_()
    model.likelihood.weight.data.fill_(math.log(s) / GaussianLikelihood.GAIN)
    model.decoder.requires_grad_(False)
    model.likelihood.requires_grad_(False)
    return model


model = linear_vae(W)
print(
    f"mean log p(x) = {float(log_p.mean()):.3f} nats, entropy of the marginal {float(marginal.entropy()):.3f}"
)

# %% [markdown]
# ## The reparameterisation trick
#
# Training needs the gradient of $E_q[f(z)]$, with $f(z) = -\log p(x \mid z)$, with respect to the
# parameters of $q$. There are two unbiased estimators. With $z = \mu + \sigma \epsilon$ the
# gradient goes through the sample ([Kingma and Welling 2014](https://arxiv.org/abs/1312.6114),
# section 2.4); the score-function estimator only needs values of $f$:
#
# $$\nabla_\mu E_q[f(z)] = E_\epsilon\big[\nabla_z f(\mu + \sigma \epsilon)\big]
#   = E_q\big[f(z)\, \nabla_\mu \log q(z)\big] = E_q\big[f(z)\, \epsilon / \sigma\big] .$$
#
# The cell computes both for one data point, with 20,000 samples. The exact gradient is $W^T (W
# \mu - x) / s^2$.

# %%
n = 20_000
point = images[:1].expand(n, -1, -1, -1)
mu, sigma, epsilon = torch.tensor([0.5, -0.5]), torch.tensor([0.4, 0.4]), torch.randn(n, k)
z = (mu + sigma * epsilon).requires_grad_()
f = -model.likelihood.log_prob(model.decode(z, {}), point)
(reparameterised,) = torch.autograd.grad(f.sum(), z)
score_function = f.detach()[:, None] * epsilon / sigma
exact = W.T @ (W @ mu - x[0]) / s**2

for name, g in (("reparameterised", reparameterised), ("score function", score_function)):
    error = 5 * g.std(0) / math.sqrt(n)
    print(f"{name:16s} mean {g.mean(0).tolist()}, standard deviation {g.std(0).tolist()}")
    assert ((g.mean(0) - exact).abs() < error).all()
print(f"{'exact':16s} mean {exact.tolist()}")
variance_ratio = score_function.var(0) / reparameterised.var(0)
print("ratio of the variances:", variance_ratio.tolist())
assert (variance_ratio > 2).all()

# %%
fig, ax = plt.subplots(figsize=(7, 3))
bins = torch.linspace(-500, 500, 101).tolist()
ax.hist(score_function[:, 0], bins=bins, alpha=0.6, label="score function", density=True)
ax.hist(reparameterised[:, 0], bins=bins, alpha=0.6, label="reparameterised", density=True)
ax.axvline(float(exact[0]), color="black", ls="--", label="exact gradient")
ax.set(
    xlabel="gradient with respect to $\\mu_1$ from one sample",
    ylabel="density",
    title="two unbiased estimators",
)
ax.legend()
plt.show()

# %% [markdown]
# ## Why the KL keeps the variance from collapsing
#
# The loss of the VAE is (`VAE.terms` returns both parts)
#
# $$-E_q[\log p(x \mid z)] + \beta\, KL(q(z \mid x) \,\|\, p(z)), \qquad
#   KL = \sum_j \tfrac12 (\mu_j^2 + \sigma_j^2 - 1 - \log \sigma_j^2) .$$
#
# For a linear decoder the first part grows like $\sum_j \sigma_j^2 \lVert w_j \rVert^2 / (2
# s^2)$, with the column $w_j$ of $W$. It pulls every $\sigma_j$ to zero. The term $-\log
# \sigma_j^2$ is the only one that resists, and the balance is
#
# $$\sigma_j^2 = \frac{\beta}{\beta + \lVert w_j \rVert^2 / s^2} .$$


# %%
def fit(model, steps, watch, lr=5e-2):
    """Train the encoder; returns the steps 0, 10, 20, ... and watch(model) at each."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    generator, seen = torch.Generator().manual_seed(0), []
    for step in range(steps):
        if step % 10 == 0:
            with torch.no_grad():
                seen.append((step, watch(model)))
        rows = torch.randint(len(images), (256,), generator=generator)
        loss = model.losses(images[rows], {}, RandomSource.for_batch(generator, 256))["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return torch.tensor(seen).T


def posterior_std(model):
    _, log_var = model.posterior(images[:500], {})
    return float((0.5 * log_var[:, 0]).exp().mean())


fig, ax = plt.subplots(figsize=(7, 3))
for beta, color in ((1.0, "tab:blue"), (0.25, "tab:orange"), (0.0, "tab:red")):
    steps, stds = fit(linear_vae(W, beta), 900, posterior_std)
    predicted = math.sqrt(beta / (beta + float(W[:, 0].square().sum()) / s**2))
    ax.plot(steps, stds, color=color, label=f"$\\beta$ = {beta}")
    if beta:
        ax.axhline(predicted, color=color, ls="--", lw=1)
    print(f"beta {beta}: posterior std of z_1 {float(stds[-1]):.4f}, predicted {predicted:.4f}")
    assert abs(float(stds[-1]) - predicted) < 0.02 or (beta == 0 and stds[-1] < 0.8 * stds[20])
ax.set(
    xlabel="training step",
    ylabel="posterior std of $z_1$",
    xscale="log",
    yscale="log",
    title="dashed: prediction",
)
ax.legend()
plt.show()

# %% [markdown]
# With $\beta = 0$ nothing stops the posterior standard deviation: it is lowest, and still falling
# at the end.
#
# The same on digits: two VAEs that differ in $\beta$ alone. Without the KL the reconstruction is
# better, but nothing makes the posteriors fill the prior: they are narrow spikes, and most $z
# \sim N(0, I)$ lie between them, where the decoder was never trained.


# %%
class History(pl.Callback):
    """Keeps the metrics of every training step."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        self.rows.append({name: float(value) for name, value in outputs.items()})


def train(steps, *overrides):
    """The data, a trained model and its metrics."""
    data, model = gencompare.build(gencompare.compose("data=digits", *overrides))
    history = History()
    trainer = pl.Trainer(
        max_epochs=1, limit_train_batches=steps, limit_val_batches=0, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[history],
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    return data, model.eval(), history.rows


vae_settings = (
    "model=vae", "model/encoder=mlp", "model/decoder=mlp", "model.encoder.depth=2", "model.decoder.depth=2",
    "model.latent_dim=8", "model.optimizer.lr=3e-3", "model.lr_schedule.warmup_steps=20",
    "trainer.global_batch_size=64",
)  # fmt: skip
data, vae, _ = train(300, *vae_settings)
_, without_kl, _ = train(300, *vae_settings, "model.beta=0")

val_x, val_cond = next(iter(data.batches("val")))
with torch.no_grad():
    for name, each in (("beta = 1", vae), ("beta = 0", without_kl)):
        mean, log_var = each.posterior(val_x, {})
        reconstruction = float(
            each.likelihoods()["elbo"].terms(val_x, {}, torch.Generator())["reconstruction"].mean()
        )
        print(
            f"{name}: reconstruction {reconstruction:.2f} bits/dim, mean posterior std"
            f" {float((0.5 * log_var).exp().mean()):.3f}, std of posterior means {float(mean.std()):.2f}"
        )

fig, axes = plt.subplots(1, 2, figsize=(9, 2.6))
for ax, each, name in zip(axes, (vae, without_kl), ("$\\beta = 1$", "$\\beta = 0$")):
    ax.imshow(gencompare.sample(each, 40).grid(10), cmap="gray")
    ax.set(title=f"samples of a VAE with {name}")
    ax.axis("off")
plt.tight_layout()
plt.show()

# %% [markdown]
# ## The gap of the bound
#
# The bound misses the exact log-likelihood by a KL divergence, for every $x$ and every encoder:
#
# $$\log p(x) - ELBO(x) = KL(q(z \mid x) \,\|\, p(z \mid x)) .$$
#
# The cell trains three encoders of the same decoder. The first ignores $x$ (its weights are fixed
# to zero). The second is linear, like the exact posterior, but has a diagonal covariance, while
# $\Lambda^{-1}$ is not diagonal: its smallest gap is $\frac12 (\sum_j \log \Lambda_{jj} - \log
# \det \Lambda)$. The third uses the basis of the principal axes, $W V$ with the right singular
# vectors $V$: $p(x)$ is the same, and $\Lambda$ becomes diagonal.


# %%
def posterior_gap(model):
    """Mean KL(q(z | x) || p(z | x)), with the exact posterior of the model's own basis."""
    weight = model.decoder.net[0].weight
    exact_precision = torch.eye(k) + weight.T @ weight / s**2
    mean, log_var = model.posterior(images[:500], {})
    q = torch.distributions.MultivariateNormal(mean, torch.diag_embed(log_var.exp()))
    exact_mean = x[:500] @ weight / s**2 @ exact_precision.inverse()
    p = torch.distributions.MultivariateNormal(exact_mean, precision_matrix=exact_precision)
    return float(torch.distributions.kl_divergence(q, p).mean())


def elbo(model, repeats=100):
    noise = torch.randn(repeats * 500, k, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        reconstruction, kl = model.terms(images[:500].repeat(repeats, 1, 1, 1), {}, noise)
    return -float((reconstruction + kl.sum(1)).mean())


V = torch.linalg.svd(W).Vh.T
assert torch.allclose((W @ V) @ (W @ V).T, W @ W.T, atol=1e-5)
blind, diagonal, principal = linear_vae(W), linear_vae(W), linear_vae(W @ V)
blind.encoder.net[0].weight.data.zero_()
blind.encoder.net[0].weight.requires_grad_(False)
smallest = 0.5 * float(precision.diagonal().log().sum() - torch.logdet(precision))

fig, ax = plt.subplots(figsize=(7, 3))
for each, name in (
    (blind, "ignores x"),
    (diagonal, "diagonal"),
    (principal, "diagonal, principal axes"),
):
    ax.plot(*fit(each, 600, posterior_gap), label=name)
    gap = float(log_p[:500].mean()) - elbo(each)
    with torch.no_grad():
        divergence = posterior_gap(each)
    print(f"{name:25s} log p - ELBO = {gap:7.3f} nats, KL to the exact posterior {divergence:7.3f}")
    assert abs(gap - divergence) < 0.02 * max(1, divergence)
    if name == "diagonal":
        assert abs(divergence - smallest) < 0.05
ax.axhline(smallest, color="black", ls="--", lw=1, label="smallest diagonal gap")
ax.set(
    xlabel="training step",
    ylabel="gap in nats",
    yscale="log",
    title="$KL(q(z \\mid x) \\| p(z \\mid x))$",
)
ax.legend(fontsize=8)
plt.show()
assert divergence < 0.01

# %% [markdown]
# ## A hierarchical VAE on digits
#
# A hierarchical VAE has latents $z_1, \dots, z_L$, from coarse to fine, and one KL for each
# ([Sonderby et al. 2016](https://arxiv.org/abs/1602.02282); the network is that of [Child
# 2021](https://arxiv.org/abs/2011.10650)):
#
# $$\log p(x) \ge E_q[\log p(x \mid z)] - \sum_l E_q\, KL(q(z_l \mid z_{<l}, x) \,\|\, p(z_l \mid z_{<l})) .$$
#
# Prior and posterior of a layer share the state that the coarser latents have produced. This
# small one has latents of 4x4 and 1x1, and a KL warm-up that increases the weight of the KL over
# the first 200 steps.

# %%
_, hvae, hvae_history = train(
    250, "model=hvae", "model.decoder.num_decoder_blocks=[0,1,1]", "model.decoder.channels=16",
    "model.decoder.max_channels=32", "model.decoder.latent_channels=2", "model.decoder.bottleneck_ratio=0.5",
    "model.kl_warmup_steps=200", "model.optimizer.lr=4e-3", "trainer.global_batch_size=32",
)  # fmt: skip
kl_names = [name for name in hvae_history[0] if name.startswith("kl_")]
with torch.no_grad():
    terms = hvae.terms(
        val_x, {}, RandomSource.for_batch(torch.Generator().manual_seed(0), len(val_x))
    )
    losses = hvae.losses(
        val_x, {}, RandomSource.for_batch(torch.Generator().manual_seed(0), len(val_x))
    )
total = sum(terms.values()) / (hvae.spec.num_values * math.log(2))
assert torch.allclose(total, losses["bits_per_dim"], atol=1e-5)
print({name: round(float(value.mean()), 2) for name, value in terms.items()}, "nats per image")

fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), width_ratios=(1.3, 1))
for name in (*kl_names, "reconstruction"):
    axes[0].plot([row[name] for row in hvae_history], label=name)
axes[0].set(xlabel="training step", ylabel="bits per dimension", title="terms of the bound")
axes[0].legend()
kept = hvae.visualize(val_x[:8], val_cond, generator=torch.Generator().manual_seed(0))[
    "kept_latents"
]
rows = kept.transpose(0, 1).squeeze(2)  # (3, 8, 8, 8)
axes[1].imshow(torch.cat([torch.cat(list(row), 1) for row in rows]), cmap="gray")
axes[1].set(
    yticks=(4, 12, 20),
    yticklabels=("image", "keep 1x1", "keep all"),
    xticks=(),
    title="latents kept",
)
plt.tight_layout()
plt.show()

# %% [markdown]
# The terms show which latents the model uses. In this run the 4x4 latents carry almost all of the
# information: digits that keep only the 1x1 latent are unrelated to the image, and those that
# keep all latents are reconstructions.
#
# ## A diffusion model is a hierarchical VAE
#
# Let $z_1, \dots, z_T$ be the image with decreasing noise, $z_t = \alpha_t x + \sigma_t
# \epsilon$. The encoder is fixed, so only the way back is learned. With $SNR_t = \alpha_t^2 /
# \sigma_t^2$ each KL of the hierarchical bound becomes a squared error ([Kingma et al.
# 2021](https://arxiv.org/abs/2107.00630), eq. 13 and 14):
#
# $$KL(q(z_s \mid z_t, x) \,\|\, p(z_s \mid z_t)) = \tfrac12 \Big(\frac{SNR_s}{SNR_t} - 1\Big)\, \lVert \epsilon - \hat\epsilon(z_t) \rVert^2, \qquad s < t .$$
#
# For the Gaussian data above the best $\hat\epsilon$ is linear in $z_t$, and the exact likelihood
# is known. `VLBLikelihood` evaluates the bound of a model of $T$ layers. The layers of the model
# are diagonal Gaussians with the variance of $q$; the more layers there are, the closer each true
# reverse step is to such a Gaussian.

# %%
variances, axes = torch.linalg.eigh(marginal.covariance_matrix)


class ExactNoise(torch.nn.Module):
    """The best prediction of the noise for this data: sigma (alpha^2 C + sigma^2 I)^-1 z_t."""

    def forward(self, z_t, noise_cond, cond):
        log_snr = noise_cond * (LogSNRConditioning().limit / 500) - LogSNRConditioning().limit
        alpha2, sigma2 = torch.sigmoid(log_snr)[:, None], torch.sigmoid(-log_snr)[:, None]
        along_axes = z_t.flatten(1) @ axes / (alpha2 * variances + sigma2)
        return (sigma2.sqrt() * along_axes @ axes.T)[:, :, None, None]


fixed_encoder = LearnedSchedule(gamma_min=-7.0, gamma_max=7.0, num_features=16).requires_grad_(
    False
)
exact_denoiser = Denoiser(ExactNoise(), fixed_encoder, Eps(LogSNRConditioning()))
continuous = DataLikelihood(None, torch.ones(1, 1, 1), d)
layers = (5, 10, 20, 50, 100, 200, 500)


def gap_of(method):
    """Mean of log p - bound over 2000 points, and its standard error."""
    bits = method(exact_denoiser, images[:2000], {}, continuous, torch.Generator().manual_seed(0))
    difference = log_p[:2000] + bits * d * math.log(2)
    return float(difference.mean()), float(difference.std()) / math.sqrt(2000)


gaps = []
for T in layers:
    gap, error = gap_of(VLBLikelihood(num_samples=None, num_timesteps=T))
    gaps.append(gap)
    print(f"T = {T:3d}: log p - bound = {gap:.3f} +- {error:.3f} nats")
limit, error = gap_of(VLBLikelihood(num_samples=64))
print(f"continuous time: {limit:.3f} +- {error:.3f} nats")
assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 0.3 and abs(limit) < 4 * error

fig, ax = plt.subplots(figsize=(6, 3))
ax.loglog(layers, gaps, "o-", label="gap of T layers")
ax.loglog(
    layers, [gaps[-1] * layers[-1] / T for T in layers], "k--", lw=1, label="proportional to 1 / T"
)
ax.set(xlabel="layers T", ylabel="gap in nats", title="more layers close the gap")
ax.legend()
plt.show()

# %% [markdown]
# ## VDM: continuous time, and a learned log-SNR
#
# For $T \to \infty$ the sum becomes an integral over the log-SNR $\lambda$, and time disappears
# (Kingma et al. 2021, eq. 17 and 18):
#
# $$L_{diffusion} = -\tfrac12 \int_0^1 \lambda'(t)\, E\lVert \epsilon - \hat\epsilon(z_t) \rVert^2\, dt
#   = \tfrac12 \int_{\lambda(1)}^{\lambda(0)} E\lVert \epsilon - \hat\epsilon(z_\lambda) \rVert^2\, d\lambda .$$
#
# The shape of $\lambda(t)$ between its ends drops out of the mean, but not out of the variance of
# a random $t$. `LearnedSchedule` is a monotone network for $-\lambda(t)$: its ends are trained to
# lower the bound, and its shape to lower the variance. The cell trains a VDM on digits with it.

# %%
_, vdm, _ = train(
    300, "model=vdm", "model/network=mlp", "model.network.depth=2", "model.schedule.gamma_min=-7.8",
    "model.schedule.num_features=32", "model.optimizer.lr=5e-3", "model.lr_schedule.warmup_steps=30",
    "trainer.global_batch_size=64",
)  # fmt: skip
straight = LearnedSchedule(
    -float(vdm.schedule.log_snr(torch.tensor(0.0))),
    -float(vdm.schedule.log_snr(torch.tensor(1.0))),
    32,
)
bent = LearnedSchedule(float(straight.gamma_min), float(straight.gamma_max), 32)
bent.height.data[4] += 120.0
schedules = {"learned": vdm.schedule, "straight": straight, "bent": bent}

results = {}
x_train, _ = next(iter(data.batches("train", 1000)))
objective = vdm.objective.with_likelihood(vdm.data_likelihood)
for name, schedule in schedules.items():
    denoiser = dataclasses.replace(vdm.denoiser, schedule=schedule.requires_grad_(False))
    with torch.no_grad():
        rng = RandomSource.for_batch(torch.Generator().manual_seed(0), 10_000)
        results[name] = objective(denoiser, x_train.repeat(10, 1, 1, 1), {}, rng)["diffusion"]
    value = results[name]
    print(
        f"{name:9s} diffusion loss {float(value.mean()):.3f} +- {float(value.std()) / 100:.3f} bits/dim,"
        f" standard deviation of one image {float(value.std()):.2f}"
    )
means = torch.stack([value.mean() for value in results.values()])
ends = torch.tensor([0.0, 1.0])
assert torch.allclose(straight.log_snr(ends), vdm.schedule.log_snr(ends), atol=1e-4)
assert means.max() - means.min() < 0.1
assert results["learned"].std() < results["straight"].std() < results["bent"].std()

# %%
t = torch.linspace(0, 1, 101)
fig, axes = plt.subplots(1, 3, figsize=(11, 3))
for name, schedule in schedules.items():
    axes[0].plot(t, schedule.log_snr(t), label=name)
axes[0].set(xlabel="time t", ylabel="log-SNR $\\lambda(t)$", title="same ends, three shapes")
axes[0].legend()
for position, value in enumerate(results.values()):
    axes[1].errorbar(
        position, float(value.mean()), float(value.std()) / 100 * 3, fmt="o", capsize=4
    )
    axes[2].bar(position, float(value.std()))
axes[1].set(
    ylim=(0, 2 * float(means.max())), ylabel="bits/dim", title="mean of the loss ($\\pm 3$ errors)"
)
axes[2].set(ylabel="bits/dim", title="standard deviation")
for ax in axes[1:]:
    ax.set_xticks(range(3), results)
plt.tight_layout()
plt.show()

# %% [markdown]
# All three shapes have the same mean loss within the error bars, and the learned one has the
# lowest standard deviation. It is flatter at high log-SNR, so more
# training times fall there.
#
# ## Three models, one bound
#
# All three report the same quantity: an upper bound on bits per dimension that is a sum of a
# reconstruction term and KL terms. The figure shows these terms on 150 validation images. All
# three runs are far too short to compare the families; the figure compares the parts of the
# bound.

# %%
decompositions = {}
for name, each, method in (
    ("VAE", vae, "elbo"),
    ("hierarchical VAE", hvae, "elbo"),
    ("VDM", vdm, "vlb"),
):
    terms = each.likelihoods()[method].terms(val_x, {}, torch.Generator().manual_seed(0))
    decompositions[name] = {term: float(value.mean()) for term, value in terms.items()}
    print(
        name,
        {term: round(value, 3) for term, value in decompositions[name].items()},
        f"sum {sum(decompositions[name].values()):.3f} bits/dim",
    )

fig, axes = plt.subplots(1, 4, figsize=(12, 2.8), width_ratios=(1.6, 1, 1, 1))
colors = {"reconstruction": "tab:grey", "kl": "tab:blue", "kl_4x4": "tab:blue", "kl_1x1": "tab:cyan",
          "diffusion": "tab:blue", "prior": "tab:cyan"}  # fmt: skip
for position, terms in enumerate(decompositions.values()):
    left = 0.0
    for term, value in terms.items():
        axes[0].barh(position, value, left=left, color=colors[term])
        if value > 0.15:
            axes[0].text(
                left + value / 2,
                position,
                term,
                ha="center",
                va="center",
                fontsize=7,
                color="white",
            )
        left += value
axes[0].set_yticks(range(3), decompositions)
axes[0].set(xlabel="bits per dimension", title="terms of the bound")
for ax, each, name in zip(axes[1:], (vae, hvae, vdm), decompositions):
    ax.imshow(gencompare.sample(each, 25).grid(5), cmap="gray")
    ax.set(title=f"{name}: samples")
    ax.axis("off")
plt.tight_layout()
plt.show()

# %% [markdown]
# ## Questions
#
# **1. Does subtracting a baseline rescue the score-function estimator?** It helps: $E[b\,
# \epsilon / \sigma] = 0$ for a constant $b$, so the mean stays, and the variance falls. The
# reparameterised gradient still has the lower variance here.

# %%
with_baseline = (f.detach() - f.detach().mean())[:, None] * epsilon / sigma
for name, g in (
    ("score function", score_function),
    ("with baseline", with_baseline),
    ("reparam.", reparameterised),
):
    print(f"{name:15s} standard deviation {g.std(0).tolist()}")
assert (with_baseline.std(0) < score_function.std(0)).all()
assert (reparameterised.std(0) < with_baseline.std(0)).all()

# %% [markdown]
# **2. Can a better bound be had without a better encoder?** Yes: the importance-weighted bound
# with $K$ samples ([Burda et al. 2016](https://arxiv.org/abs/1509.00519), section 3) approaches
# $\log p(x)$ as $K$ grows, here for the diagonal encoder.

# %%
for K in (1, 4, 16, 64):
    diagonal.importance_samples = K
    bits = diagonal.likelihoods()[f"iwae_{K}"].bits_per_dim(
        images[:500], {}, torch.Generator().manual_seed(0)
    )
    iwae = -float(bits.mean()) * d * math.log(2)
    gap = float(log_p[:500].mean()) - iwae
    print(f"K = {K:2d}: log p - bound = {gap:.3f} nats")
assert gap < 0.4 * smallest

# %% [markdown]
# **3. Which posterior costs no bits?** The prior itself: `kl_from_standard_normal` is zero only
# at $\mu = 0$, $\sigma = 1$, and then $z$ carries no information. A small $\sigma$ costs $-\log
# \sigma$ nats.

# %%
log_std = torch.tensor([0.0, -1.0, -2.0, -4.0])
cost = kl_from_standard_normal(torch.zeros(4), 2 * log_std)
print({float(a): round(float(b), 3) for a, b in zip(log_std.exp(), cost)}, "nats by posterior std")
assert float(cost[0]) == 0 and torch.allclose(
    cost, -log_std - 0.5 + (2 * log_std).exp() / 2, atol=1e-6
)
