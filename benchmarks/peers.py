"""Training steps of this project and of other libraries, with networks of the same shape on the same work.

A `Contest` makes the contestants anew for each variant that is timed, all from the same seed. The peers are

- diffusers: `UNet2DModel` with the shapes of the DDPM and EDM networks, and `DiTTransformer2DModel`;
- denoising-diffusion-pytorch: its `Unet` and the loss of its `GaussianDiffusion`;
- pythae: its `VAE` with its default networks;
- SNGAN in plain PyTorch: `PlainGenerator` and `PlainDiscriminator`.

Where no equal shape exists, the docstring of the contest says what differs; parameters and FLOPs are counted for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from gencompare.command_line import conf_dir
from gencompare.data.datamodule import ImageData, Split
from gencompare.generative_model import DataSpec
from gencompare.models.gan import GAN
from gencompare.networks.dit import DiT
from gencompare.networks.unet import UNet
from gencompare.rng import RandomSource
from gencompare.tasks.runs.build import build_model

SHAPE = (3, 32, 32)
CHANNELS_LAST = "gencompare, channels_last"
"""Variant of our U-Net that is timed in float32 only: with bfloat16, GroupNorm is slow in this format."""
Step = Callable[[], None]


@dataclass(frozen=True)
class Contestant:
    """A network and its loss on one batch."""

    network: nn.Module
    loss: Callable[[], Tensor]


@dataclass(frozen=True)
class Contest:
    """Contestants by name; the first is the peer that the others are compared with."""

    setting: str
    batch: int
    make: Mapping[str, Callable[[], Contestant]]
    package: str = "diffusers"
    with_bf16: bool = True

    @property
    def available(self) -> bool:
        return find_spec(self.package) is not None


def predicts_noise(network: nn.Module, batch: int, predict: Callable[[Tensor, Tensor], Tensor]) -> Contestant:
    """Train a network to predict noise, with the loss of DDPM; ``predict`` calls it with images and time steps."""
    x, noise = torch.randn(2, batch, *SHAPE)
    t = torch.randint(1000, (batch,))
    return Contestant(network, lambda: F.mse_loss(predict(x, t).float(), noise))


def noise_contest(setting: str, batch: int, networks: Callable[[], tuple[nn.Module, Any]], **classes: Any) -> Contest:
    """Compare our network with that of diffusers, both with class labels if ``classes`` has them."""

    def ours() -> Contestant:
        network = networks()[0]
        cond = {"label": classes["class_labels"]} if classes else {}
        return predicts_noise(network, batch, lambda x, t: network(x, t.float(), cond))

    def theirs() -> Contestant:
        network = networks()[1]
        return predicts_noise(network, batch, lambda x, t: network(x, timestep=t, **classes).sample)

    def channels_last() -> Contestant:
        network = networks()[0].to(memory_format=torch.channels_last)  # trainer.memory_format=channels_last
        layout = partial(torch.Tensor.contiguous, memory_format=torch.channels_last)
        return predicts_noise(network, batch, lambda x, t: network(layout(x), t.float(), {}))

    make = {"diffusers": theirs, "gencompare": ours, **({} if classes else {CHANNELS_LAST: channels_last})}
    return Contest(f"3x32x32, batch {batch}, {setting}", batch, make)


def unet2d(widths: tuple[int, ...], **options: Any) -> Any:
    """Return a `UNet2DModel` of diffusers with the details of the published DDPMs."""
    from diffusers import UNet2DModel  # type: ignore[attr-defined]

    return UNet2DModel(
        sample_size=32, block_out_channels=widths, attention_head_dim=None, downsample_padding=0,
        flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6, **options,
    )  # fmt: skip


def same_networks(channels: int) -> tuple[UNet, Any]:
    """Return our U-Net and that of diffusers with the same shape."""
    theirs = unet2d(
        (channels, 2 * channels, 2 * channels, 2 * channels),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    return of_equal_size(UNet(SHAPE, SHAPE[0], channels=channels, dropout=0.0), theirs)


def edm_networks() -> tuple[UNet, Any]:
    """Return EDM's variant of DDPM++ with a width of 64 instead of 256, and the same network of diffusers.

    diffusers can neither leave out attention in a part of a decoder level nor put a convolution on the shortcut of a
    resampling block, so both networks have attention after every block at 16x16, and no such convolution.
    """
    ours = UNet(
        SHAPE, SHAPE[0], channels=64, channel_mult=(1, 1, 1), num_blocks=4, dropout=0.0, resample_filter=(1, 1),
        resample_proj=False, skip_rescale=True,
    )  # fmt: skip
    theirs = unet2d(
        (64, 64, 64),
        layers_per_block=4,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("ResnetUpsampleBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        downsample_type="resnet",
        upsample_type="resnet",
    )
    return of_equal_size(ours, theirs)


def of_equal_size(ours: UNet, theirs: Any) -> tuple[UNet, Any]:
    assert parameters(ours) == parameters(theirs)
    return ours, theirs


def dit_networks() -> tuple[DiT, Any]:
    """Return our default DiT and that of diffusers, whose blocks are equal.

    diffusers embeds time step and class in each block anew, so it has more parameters.
    """
    from diffusers import DiTTransformer2DModel  # type: ignore[attr-defined]

    ours = DiT(SHAPE, SHAPE[0], num_classes=10, patch_size=2, hidden_size=96, depth=4, num_heads=3)
    theirs = DiTTransformer2DModel(
        num_attention_heads=3, attention_head_dim=32, in_channels=3, out_channels=3, num_layers=4, sample_size=32,
        patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    return ours, theirs


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


# Whole models


class RandomImages(ImageData):
    """Random images in place of a data set."""

    def __init__(self, shape: tuple[int, int, int] = SHAPE, batch: int = 64) -> None:
        super().__init__(batch_size=batch)
        self.spec = DataSpec(name="random", shape=shape)

    def load(self) -> dict[str, Split]:
        return {name: Split(torch.randint(256, (512, *self.spec.shape)).byte()) for name in ("train", "val", "test")}


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose(
            "config",
            [
                "model.optimizer._target_=torch.optim.AdamW",
                "trainer=cpu",
                "trainer.precision=32-true",
                "budget.images=null",
                "callbacks.evaluation.num_evaluations=0",
                "callbacks.metric_logger.log_every_n_steps=1",
                *overrides,
            ],
        )


SMALL_CIFAR10 = [
    "model=ddpm", "model/network=unet_ddpm_cifar10", "model.network.channels=32", "model.network.dropout=0",
]  # fmt: skip


def random_images(batch: int) -> tuple[Tensor, RandomSource]:
    """Return images in [-1, 1], and a source of random numbers for their batch."""
    return 2 * torch.rand(batch, *SHAPE) - 1, RandomSource.for_batch(torch.Generator().manual_seed(0), batch)


def our_model(batch: int, *overrides: str, num_bins: int | None = 256) -> Contestant:
    """Train a model of this project, with its own loss. ``num_bins=None`` makes the data continuous."""
    data = RandomImages()
    data.spec = replace(data.spec, num_bins=num_bins)
    model: Any = build_model(config(*overrides), data)
    x, rng = random_images(batch)
    return Contestant(model, lambda: model.losses(x, {}, rng)["loss"].mean())


def denoising_diffusion(batch: int) -> Contestant:
    """The nearest shape of denoising-diffusion-pytorch to the DDPM with 32 channels.

    It has the same widths, resolutions, and attention at 16x16, but one block fewer in each decoder level, linear
    attention at the other resolutions, RMS norm, and a scale and shift by the time step. In sum it does less work.
    """
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    network = Unet(
        32, dim_mults=(1, 2, 2, 2), full_attn=(False, True, False, False), attn_heads=1, attn_dim_head=64
    )  # fmt: skip
    model = GaussianDiffusion(network, image_size=32, objective="pred_noise", beta_schedule="linear")
    x = random_images(batch)[0].add(1).div(2)
    return Contestant(network, lambda: model(x))


def pythae_vae(batch: int) -> Contestant:
    """The VAE of pythae with its default networks: MLPs with one hidden layer of 512.

    Its loss is the squared error. Ours is a Gaussian density with a learned standard deviation, without the
    probabilities of discrete pixels, which take longer than these networks.
    """
    from pythae.models import VAE, VAEConfig  # type: ignore[import-not-found]

    model = VAE(VAEConfig(input_dim=SHAPE, latent_dim=32))
    x = random_images(batch)[0]
    return Contestant(model, lambda: model({"data": x}).loss)


VAE_OVERRIDES = [
    "model=vae", "model/encoder=mlp", "model/decoder=mlp", "model/likelihood=gaussian", "model.latent_dim=32",
    *(f"model.{part}.{name}" for part in ("encoder", "decoder") for name in ("width=512", "depth=1")),
]  # fmt: skip

CONTESTS = {
    "network_32": noise_contest("32 channels", 64, lambda: same_networks(32)),
    "network_64": noise_contest("64 channels", 64, lambda: same_networks(64)),
    "edm": noise_contest("EDM's network with 64 channels", 16, edm_networks),
    "dit": noise_contest("DiT of width 96, 4 blocks", 64, dit_networks, class_labels=torch.arange(64) % 10),
    "ddpm": Contest(
        "3x32x32, batch 64, DDPM with 32 channels",
        64,
        {
            "denoising-diffusion-pytorch": lambda: denoising_diffusion(64),
            "gencompare": lambda: our_model(64, *SMALL_CIFAR10),
        },
        package="denoising_diffusion_pytorch",
        with_bf16=False,
    ),
    "vae": Contest(
        "3x32x32, batch 64, VAE with MLPs of width 512",
        64,
        {"pythae": lambda: pythae_vae(64), "gencompare": lambda: our_model(64, *VAE_OVERRIDES, num_bins=None)},
        package="pythae",
        with_bf16=False,
    ),
}


# SNGAN


class PlainUpBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.skip = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.interpolate(F.relu(self.norm1(x)), scale_factor=2))
        return self.conv2(F.relu(self.norm2(h))) + self.skip(F.interpolate(x, scale_factor=2))


class PlainDownBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int, downsample: bool, first: bool = False) -> None:
        super().__init__()
        self.downsample, self.first = downsample, first
        self.conv1 = spectral_norm(nn.Conv2d(channels_in, channels, 3, padding=1))
        self.conv2 = spectral_norm(nn.Conv2d(channels, channels, 3, padding=1))
        self.skip = spectral_norm(nn.Conv2d(channels_in, channels, 1)) if downsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.conv1(x if self.first else F.relu(x))))
        s = self.skip(x)
        return F.avg_pool2d(h, 2) + F.avg_pool2d(s, 2) if self.downsample else h + s


class PlainGenerator(nn.Module):
    """Table 4 (a) of Miyato et al. (2018), https://arxiv.org/abs/1802.05957."""

    def __init__(self, latent_dim: int, channels: int) -> None:
        super().__init__()
        self.channels, self.root = channels, nn.Linear(latent_dim, channels * 16)
        self.blocks = nn.Sequential(*(PlainUpBlock(channels) for _ in range(3)))
        self.norm, self.out = nn.BatchNorm2d(channels), nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.blocks(self.root(z).unflatten(1, (self.channels, 4, 4)))
        return torch.tanh(self.out(F.relu(self.norm(h))))


class PlainDiscriminator(nn.Module):
    """Table 4 (b) of the same paper."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            PlainDownBlock(3, channels, downsample=True, first=True),
            *(PlainDownBlock(channels, channels, downsample=k == 0) for k in range(3)),
        )
        self.score = spectral_norm(nn.Linear(channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.score(F.relu(self.blocks(x)).sum((2, 3))).squeeze(1)


GAN_BATCH, GAN_CHANNELS, GAN_LATENTS = 64, 64, 128
GAN_SETTING = f"3x32x32, batch {GAN_BATCH}, SNGAN with {GAN_CHANNELS} channels"
GAN_OVERRIDES = [
    "model=gan", "model/generator=sngan", "model/discriminator=sngan", "model/adversarial=hinge", "model.penalty=null",
    "model.spectral_norm=true", f"model.latent_dim={GAN_LATENTS}", f"model.generator.channels={GAN_CHANNELS}",
    f"model.discriminator.channels={GAN_CHANNELS}",
]  # fmt: skip


def plain_gan() -> tuple[nn.ModuleList, Step]:
    """Return SNGAN's networks, and a training step of one discriminator and one generator update."""
    generator, discriminator = PlainGenerator(GAN_LATENTS, GAN_CHANNELS), PlainDiscriminator(GAN_CHANNELS)
    g, d = (torch.optim.AdamW(network.parameters(), lr=2e-4) for network in (generator, discriminator))
    x, _ = random_images(GAN_BATCH)

    def step() -> None:
        with torch.no_grad():
            fake = generator(torch.randn(GAN_BATCH, GAN_LATENTS))
        d.zero_grad()
        (F.relu(1 - discriminator(x)).mean() + F.relu(1 + discriminator(fake)).mean()).backward()
        d.step()
        discriminator.requires_grad_(False)
        g.zero_grad()
        (-discriminator(generator(torch.randn(GAN_BATCH, GAN_LATENTS))).mean()).backward()
        g.step()
        discriminator.requires_grad_(True)

    return nn.ModuleList([generator, discriminator]), step


def our_gan() -> tuple[nn.ModuleList, Step]:
    """Return the networks and the training step of our GAN, without a Trainer."""
    model = build_model(config(*GAN_OVERRIDES), RandomImages())
    assert isinstance(model, GAN)
    optimizers = model.build_optimizers()
    x, rng = random_images(GAN_BATCH)
    # What a Trainer provides.
    vars(model).update(optimizers=lambda: optimizers, manual_backward=lambda loss: loss.backward())
    return nn.ModuleList([model.generator, model.discriminator]), lambda: void(model.fit_batch(x, {}, rng))


def void(result: object) -> None:
    pass


GANS = {"plain SNGAN": plain_gan, "gencompare": our_gan}
