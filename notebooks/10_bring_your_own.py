# %% [markdown]
# # Bring your own
#
# Everything in the package can be replaced by your own: images, model, samples, metric, extractor
# and schedule. Each needs one Python object with a small interface, and all results end in the same
# comparison. This notebook brings one of each.
#
# You learn
#
# - how a folder of PNG files becomes a data set with splits and labels;
# - that any object with `sample(n, cond, *, generator)` can be evaluated, for example a plain
#   `LightningModule`;
# - how samples of another program are read, and which mistakes are refused;
# - how a metric is a function of features, and the same one a `torchmetrics.Metric`;
# - how a noise schedule is one class that every sampler and loss accepts.

# %% tags=["install"]
# Only needed outside of a checkout, for example in Colab.
# %pip install -q git+{REPOSITORY}

# %%
import logging
import tempfile
import warnings
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytorch_lightning as pl
import torch
import torchmetrics
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.mixture import GaussianMixture
from torch import nn

import gencompare
from gencompare.data.generated_samples import read_samples
from gencompare.diffusion.discrete_schedules import CosineBetas
from gencompare.diffusion.multistep_samplers import DPMSolverPP2M
from gencompare.diffusion.objectives import UniformVWeighting, WeightedMSE
from gencompare.diffusion.parameterizations import V
from gencompare.diffusion.schedules import VariancePreserving, schedule_curve
from gencompare.errors import UserError
from gencompare.evaluation.evaluate import EvaluationProtocol
from gencompare.evaluation.extractors.efficientnet import efficientnet_lite0
from gencompare.evaluation.extractors.selection import module_extractor
from gencompare.evaluation.reference import quantize_images
from gencompare.models.diffusion import Diffusion
from gencompare.networks.mlp import DenoisingMLP
from gencompare.rng import generator
from gencompare.training.learning_rate import WarmupDecay

torch.manual_seed(0)
for name in ("pytorch_lightning", "lightning.pytorch"):
    logging.getLogger(name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore")
plt.rcParams.update(
    {"figure.facecolor": "white", "axes.grid": True, "grid.alpha": 0.3, "font.size": 9}
)
folder = tempfile.TemporaryDirectory()
root = Path(folder.name)

# %% [markdown]
# ## Your images
#
# `data=image_folder` reads PNG and JPEG files as `split/class/name`, `split/name`, `class/name` or
# `name`. The cell writes 600 digits of four classes into such a folder. Splits without a folder are
# held out from the training images by a fixed permutation.

# %%
bunch = load_digits()
chosen = np.flatnonzero(bunch.target < 4)[:600]
for row in chosen:
    path = root / "images" / f"digit_{bunch.target[row]}" / f"{row:04d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((bunch.images[row] * 255 / 16).round().astype(np.uint8)).save(path)

config = gencompare.compose(
    "data=image_folder",
    f"data.root={root / 'images'}",
    f"data.cache={root / 'cache'}",
    "data.val_fraction=0.1",
    "data.test_fraction=0.2",
    "trainer.global_batch_size=256",
)
data, _ = gencompare.build(config)
print(data.spec)
print({name: len(data.split(name)) for name in ("train", "val", "test")})


def show_rows(rows, title):
    """One row of images per entry of `rows` (name -> uint8 images)."""
    figure, axes = plt.subplots(len(rows), squeeze=False, figsize=(9, 0.75 * len(rows) + 0.4))
    for ax, (name, images) in zip(axes[:, 0], rows.items()):
        tiles = nn.functional.pad(images[:, 0].float(), (1, 1), value=float("nan"))
        ax.imshow(tiles.permute(1, 0, 2).flatten(1), cmap="gray", vmin=0, vmax=255)
        ax.set_ylabel(name, rotation=0, ha="right", va="center")
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        ax.grid(False)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    plt.show()


show_rows({"train": data.split("train").images[:14]}, "The data set, from PNG files")

# %% [markdown]
# ## Your metric
#
# A metric is a function of two sets of features, samples first. An attribute says how to rank it:
# `higher_is_better`, or `target` for an ideal value. The *sliced Wasserstein distance* projects the
# features on random directions $\theta$, where the optimal transport plan simply sorts both sides
# ([Bonneel et al. 2015](https://doi.org/10.1007/s10851-014-0506-3)):
#
# $$SW_2^2 = E_\theta \int_0^1 \left(F_\theta^{-1}(u) - G_\theta^{-1}(u)\right)^2 du .$$
#
# For a shift of all features by a vector $v$ it is $\lVert v \rVert^2 / D$, which the cell checks.


# %%
def sliced_wasserstein(samples, reference, directions=500, quantiles=200):
    theta = torch.randn(samples.shape[1], directions, generator=generator("cpu", 0))
    theta = theta / theta.norm(dim=0)
    u = (torch.arange(quantiles) + 0.5) / quantiles
    f, g = ((side @ theta).quantile(u, dim=0) for side in (samples, reference))
    return (f - g).square().mean().item()


sliced_wasserstein.higher_is_better = False

points, v = torch.randn(1000, 8), torch.arange(8.0)
found = sliced_wasserstein(points + v, points)
print(f"shifted points: {found:.2f}, exact {v.square().sum() / 8:.2f}")
assert abs(found / (v.square().sum() / 8) - 1) < 0.1

# %% [markdown]
# In a training loop, a `torchmetrics.Metric` is more convenient: it collects batches, and works
# on several processes. Its interface here is that of the package's own metrics (`update(images,
# real)`), so the two are interchangeable.


# %%
class SlicedWasserstein(torchmetrics.Metric):
    higher_is_better = False

    def __init__(self, feature):
        super().__init__()
        self.feature = feature
        self.add_state("real", [], dist_reduce_fx="cat")
        self.add_state("generated", [], dist_reduce_fx="cat")

    def update(self, images, real):
        (self.real if real else self.generated).append(self.feature(images))

    def compute(self):
        sides = [torch.cat(list(each)) for each in (self.generated, self.real)]
        return torch.tensor(sliced_wasserstein(*sides))


# %% [markdown]
# ## Your extractor and the protocol
#
# Any module that maps images in [0, 1] to features is an extractor, through `module_extractor`.
# Below it is `Flatten`, so that the features are the pixels. It is the second opinion after the
# default network, whose MMD ranks. A protocol object contains all that determines a value, so
# that every result below is measured in the same way.

# %%
protocol = EvaluationProtocol(
    extractors=[
        efficientnet_lite0,
        partial(module_extractor, network=nn.Flatten(), name="pixels"),
    ],
    metrics={"sliced_wasserstein": sliced_wasserstein},
    num_likelihood_images=20,
)
test_images = quantize_images(data.normalize(data.split("test").images), data.spec)
results = {"held-out images": gencompare.evaluate(test_images, data, protocol)}
found = results["held-out images"]
print(found)

extractor = protocol.build_extractors(data.spec)[0]
metric = SlicedWasserstein(extractor.features)
metric.update(quantize_images(data.normalize(data.split("train").images), data.spec), real=True)
for batch in test_images.split(50):
    metric.update(batch, real=False)
print(f"torchmetrics: {metric.compute():.5f}")
assert abs(metric.compute() - found.metrics["sliced_wasserstein"].value) < 1e-5

# %% [markdown]
# The test images are their own baseline here, so both columns agree, and a metric of memorisation
# is undefined, because their distance to the test images is 0.
#
# ## Your model
#
# `evaluate` accepts any object with `sample(n, cond, *, generator)` that returns images in [-1,
# 1]. The first model is not even trained: it shifts training images by a pixel. The second is a
# plain `LightningModule` that knows nothing of the package, an autoencoder whose latents are
# resampled from a Gaussian.


# %%
class ShiftedCopies:
    """Training images, shifted by one pixel in a random direction."""

    def __init__(self, data):
        self.images = data.normalize(data.split("train").images)

    def sample(self, n, cond=None, *, generator):
        rows = torch.randint(len(self.images), (n,), generator=generator)
        shifts = torch.randint(-1, 2, (n,), generator=generator)
        return torch.stack(
            [self.images[row].roll(int(shift), 2) for row, shift in zip(rows, shifts)]
        )


class TinyAutoencoder(pl.LightningModule):
    def __init__(self, latents=12):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, latents)
        )
        self.decoder = nn.Sequential(
            nn.Linear(latents, 128), nn.SiLU(), nn.Linear(128, 64), nn.Tanh()
        )
        self.register_buffer("mean", torch.zeros(latents))
        self.register_buffer("root", torch.eye(latents))

    def training_step(self, batch, batch_idx):
        x, _ = batch
        z = self.encoder(x)
        z = z + 0.1 * torch.randn_like(z)
        return (self.decoder(z) - x.flatten(1)).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 2e-3)

    @torch.no_grad()
    def fit_latents(self, x):
        z = self.encoder(x)
        self.mean.copy_(z.mean(0))
        self.root.copy_(torch.linalg.cholesky(z.T.cov()))

    def sample(self, n, cond=None, *, generator):
        z = torch.randn(n, len(self.mean), generator=generator) @ self.root.T + self.mean
        return self.decoder(z).view(n, 1, 8, 8)


def fit(model, steps):
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
    return model


autoencoder = fit(TinyAutoencoder(), 400)
autoencoder.fit_latents(data.normalize(data.split("train").images))
models = {"shifted copies": ShiftedCopies(data), "plain LightningModule": autoencoder}
for name, model in models.items():
    results[name] = gencompare.evaluate(model, data, protocol)

# %% [markdown]
# ## Your samples
#
# Samples of another program are a folder of PNG files, or an npz file with `arr_0`, uint8 of shape
# (n, height, width, channels). The other program here is scikit-learn: a mixture of 20 Gaussians.
# `read_samples` checks size and channels, and `evaluate` compares the pixels with those of the data
# before it measures anything: the cell shows what it says of three common
# mistakes, made with real images.

# %%
train_pixels = data.split("train").images.flatten(1).double().numpy()
mixture = GaussianMixture(20, covariance_type="full", reg_covar=30.0, random_state=0)
pixels = mixture.fit(train_pixels).sample(200)[0]
pixels = np.random.default_rng(0).permutation(pixels).clip(0, 255).round().astype(np.uint8)
np.savez(root / "theirs.npz", arr_0=pixels.reshape(-1, 8, 8, 1))

theirs, _ = read_samples(root / "theirs.npz", data.spec)
results["samples of scikit-learn"] = gencompare.evaluate(theirs, data, protocol)

mistakes = {
    "0 to 255 as floats": test_images.float(),
    "0 to 1 as integers": (test_images / 255).round().to(torch.uint8),
    "inverted": 255 - test_images,
}
pixels_only = EvaluationProtocol(extractors=protocol.extractors[1:])
for name, images in mistakes.items():
    try:
        warned = gencompare.evaluate(images, data, pixels_only).details["warnings"]
        print(f"{name}: accepted with a warning: {warned[0]}\n")
    except UserError as error:
        print(f"{name}: refused: {error}\n")

# %% [markdown]
# ## Your schedule
#
# A schedule is one class. For a variance-preserving one, $\alpha^2 + \sigma^2 = 1$, the log-SNR is
# enough; $\alpha$, $\sigma$, the SDE and the inverse follow from it. The cell defines one that is
# linear in time,
#
# $$\lambda_t = \lambda_{max} - t\, (\lambda_{max} - \lambda_{min}), \qquad
# \alpha_t^2 = \frac{1}{1 + e^{-\lambda_t}},$$
#
# which spends equal time at every log-SNR. `check()` tests what every schedule must satisfy.


# %%
class LinearLogSNR(VariancePreserving):
    t_min = 0.0

    def __init__(self, largest=8.0, smallest=-8.0):
        super().__init__()
        self.largest, self.smallest = largest, smallest

    def log_snr(self, t):
        return self.largest - t * (self.largest - self.smallest)


mine = LinearLogSNR()
mine.check()
t = torch.linspace(0, 1, 50)
at = mine.at(t)
assert torch.allclose(at.alpha**2 + at.sigma**2, torch.ones(50), atol=1e-6)
assert torch.allclose(at.alpha**2, torch.sigmoid(mine.log_snr(t)), atol=1e-6)
assert torch.allclose(mine.t_from_log_snr(mine.log_snr(t)), t, atol=1e-4)
f, g_squared = mine.sde(t)
assert torch.allclose(g_squared, -2 * f, rtol=1e-3)  # variance-preserving: f = -g^2 / 2

figure, axes = plt.subplots(1, 2, figsize=(9, 3))
for name, schedule in (("mine", mine), ("cosine", CosineBetas())):
    curve = schedule_curve(schedule, 500)
    axes[0].plot(curve["t"], curve["log_snr"], label=name)
    axes[1].plot(curve["t"], curve["alpha"], label=name)
axes[0].set(xlabel="t", title=r"log-SNR $\lambda_t$", ylim=(-12, 12))
axes[1].set(xlabel="t", title=r"$\alpha_t$")
axes[0].legend(fontsize=8)
figure.tight_layout()
plt.show()

# %% [markdown]
# It goes into a diffusion model like any other part.


# %%
def diffusion(schedule):
    torch.manual_seed(0)
    return Diffusion(
        data.spec,
        network=partial(DenoisingMLP, width=128, depth=2),
        schedule=schedule,
        parameterization=V(),
        objective=WeightedMSE(UniformVWeighting()),
        sampler=DPMSolverPP2M(num_steps=15),
        optimizer=partial(torch.optim.Adam, lr=4e-3, fused=True),
        lr_schedule=WarmupDecay(100, "cosine"),
        grad_clip=1.0,
    )


for name, schedule in (("diffusion, my schedule", mine), ("diffusion, cosine", CosineBetas())):
    models[name] = fit(diffusion(schedule), 400)
    results[name] = gencompare.evaluate(models[name], data, protocol)

rows = {name: gencompare.sample(model, 14, data=data).images for name, model in models.items()}
rows["samples of scikit-learn"] = theirs[:14]
show_rows(rows, "Samples of everything")

# %% [markdown]
# ## The comparison
#
# `compare` takes the results by name and ranks them, one table per extractor. `save` writes the
# page with tables that sort, and the tables as CSV, Markdown and LaTeX.

# %%
gencompare.compare(results)

# %%
page = gencompare.compare(results).save(root / "comparison")
print(sorted(path.name for path in page.parent.iterdir()))
print(f"{page.name}: {page.stat().st_size / 1000:.0f} kB")

# %%
names = list(results)
figure, axes = plt.subplots(1, 3, figsize=(9, 3), sharey=True)
for ax, metric in zip(axes, ("mmd_efficientnet_lite0", "sliced_wasserstein", "coverage")):
    values = [results[name].metrics[metric].value for name in names]
    ax.barh(names, values, color="C0")
    ax.axvline(results[names[0]].metrics[metric].value, color="k", ls=":")
    ax.set(title=metric.replace("_", " "))
axes[0].invert_yaxis()
figure.tight_layout()
plt.show()

# %% [markdown]
# The dotted line is the value of held-out images. The shifted copies come next, then the plain
# LightningModule and the mixture of Gaussians. The two diffusion models are last: 400 steps are
# few for them. Between the two schedules there is one training each, so that their order is not a
# result about schedules.
#
# ## Questions
#
# ### 1. Which metric finds the copies?
#
# The shifted copies contain a third of unchanged training images. Which metrics see that?

# %%
for name in ("shifted copies", "diffusion, my schedule"):
    found = results[name].metrics
    keys = ("precision", "coverage", "memorization", "authenticity")
    print(f"{name}:", ", ".join(f"{key} {found[key].value:.2f}" for key in keys))

# %% [markdown]
# Precision and coverage do not: they are close to those of held-out images. Memorisation (1 for new
# images, 0 for copies) and authenticity (0.55 for held-out images, in the table above) do.
#
# ### 2. Does a metric with a target work, too?
#
# A *two-sample classifier* with one nearest neighbour, left out of the vote itself, should be right
# half of the time ([Lopez-Paz and Oquab 2017](https://arxiv.org/abs/1610.06545), section 3).


# %%
def neighbour_accuracy(samples, reference):
    n = min(len(samples), len(reference))
    both = torch.cat([samples[:n], reference[:n]])
    distance = torch.cdist(both, both).fill_diagonal_(torch.inf)
    label = torch.arange(2 * n) < n
    return (label[distance.argmin(1)] == label).float().mean().item()


neighbour_accuracy.target = 0.5
second = EvaluationProtocol(
    extractors=protocol.extractors[1:], metrics={"neighbour_accuracy": neighbour_accuracy}
)
again = {
    name: gencompare.evaluate(images, data, second)
    for name, images in (("held-out images", test_images), ("scikit-learn", theirs))
}
again["diffusion, cosine"] = gencompare.evaluate(models["diffusion, cosine"], data, second)
for name, result in again.items():
    print(f"{name}: {result.metrics['neighbour_accuracy'].value:.2f}")
ranked = gencompare.compare(again, rank_by="neighbour_accuracy")
print("ranked:", [row["run"] for row in ranked.rows])
folder.cleanup()

# %% [markdown]
# Yes: rows are ranked by the distance from the target, here 0.5. With 240 votes the standard
# error of an accuracy of 0.5 is 0.03. A value below 0.5 means that the nearest neighbours of both
# sets lie mostly in the other set.
