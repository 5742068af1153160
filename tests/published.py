"""What papers and the code published with them state of the models that conf/experiment/cifar10_*.yaml follow."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import counted

# Noise levels: sigma / alpha where there is least and most noise, for data in [-1, 1].

Levels = tuple[float, float]


def of_steps(kept: Callable[[int], float], steps: int) -> Levels:
    """x_i = sqrt(kept_i) x_{i-1} + sqrt(1 - kept_i) z for i = 1, ..., steps."""
    last = math.prod(kept(i) for i in range(1, steps + 1))
    return math.sqrt(1 / kept(1) - 1), math.sqrt(1 / last - 1)


def linear(i: int) -> float:
    """Ho et al. (2020), section 4: 1 - beta_i, beta from 1e-4 to 0.02 in 1000 steps."""
    return 1 - (1e-4 + (0.02 - 1e-4) * (i - 1) / 999)


def cosine(i: int, steps: int = 4000) -> float:
    """Nichol and Dhariwal (2021), eq. 17: no beta over 0.999."""
    squared = [math.cos(math.pi / 2 * (j / steps + 0.008) / 1.008) ** 2 for j in (i - 1, i)]
    return max(squared[1] / squared[0], 0.001)


def integral(t: float) -> float:
    """Song et al. (2021), appendix C: of beta over time, beta from 0.1 to 20."""
    return 0.1 * t + 19.9 * t**2 / 2


def vp(t: float) -> float:
    return math.sqrt(math.expm1(integral(t)))


def subvp(t: float) -> float:
    return -math.expm1(-integral(t)) / math.exp(-integral(t) / 2)


# What is published. Three dots: the source says nothing.

PLAIN = {"betas": (0.9, 0.999), "weight_decay": 0.0, "rate_falls": "constant", "warmup": 0, "clip": None}
"""Adam as it is."""
HO = {**PLAIN, "rate": 2e-4, "batch": 128, "warmup": 5000, "clip": 1.0, "ema": 0.9999, "dropout": 0.1, "flip": True}
"""Ho et al. (2020), appendix B, whose settings many took over."""
GAN = {**PLAIN, "rate": 2e-4, "ema": 0.0, "dropout": 0.0, "flip": False, "table": None, "noise": None, "sampler": None}

PUBLISHED: dict[str, dict[str, Any]] = {
    # Ho et al. (2020), appendix B, "35.7 million parameters"; hojonathanho/diffusion, scripts/run_cifar.py. By hand
    # 35,746,307, and so many has google/ddpm-cifar10-32, counted in diffusers' UNet2DModel.
    "cifar10_ddpm": {
        **HO,
        "parameters": {"network": counted.unet(blocks=2, attention=(16,), told=1, out=3)},
        "steps": 800_000,
        "table": 1000,
        "noise": of_steps(linear, 1000),
        "sampler": {"is": "Ancestral", "num_steps": 1000, "variance": 1.0},  # "fixedlarge"
    },
    # Nichol and Dhariwal (2021), table 2; the flags of openai/improved-diffusion, README.md and scripts/image_train.py.
    # By hand 52,546,438 ("50M" in the name of its checkpoint), and so many has its UNetModel.
    "cifar10_iddpm": {
        **PLAIN,
        "parameters": {"network": counted.unet(blocks=3, attention=(16, 8), told=2, out=6)},
        "rate": 1e-4,
        "batch": 128,
        "steps": 500_000,
        "ema": 0.9999,
        "dropout": 0.3,
        "flip": False,
        "table": 4000,
        "noise": of_steps(cosine, 4000),
        "sampler": {"is": "Ancestral", "num_steps": 4000},
        "model.network.heads": 4,
        "model.objective.vlb": 0.001,  # of their eq. 16; in the code T / 1000 of one of the T terms
    },
    # Song and Ermon (2019), section 5; ermongroup/ncsn, configs/anneal.yml, whose CondRefineNetDilated has as many
    # parameters. Twice the sigmas, which are for data in [0, 1]; Langevin steps in units of the last one's square.
    "cifar10_ncsn": {
        **PLAIN,
        "parameters": {"network": 30_117_635},
        "rate": 1e-3,
        "batch": 128,
        "steps": 200_000,
        "ema": 0.0,
        "dropout": 0.0,
        "flip": True,
        "table": 10,
        "noise": (2 * 0.01, 2 * 1.0),
        "sampler": {
            "is": "AnnealedLangevin",
            "num_steps": 10,
            "num_langevin_steps": 100,
            "step_size": 2e-5 / 0.01**2,
            "denoise": False,
        },
    },
    # Song and Ermon (2020), section 5; ermongroup/ncsnv2, configs/cifar10.yml, whose NCSNv2 has as many parameters.
    "cifar10_ncsnv2": {
        **PLAIN,
        "parameters": {"network": 29_694_083},
        "rate": 1e-4,
        "batch": 128,
        "steps": 300_000,
        "ema": 0.999,
        "dropout": 0.0,
        "flip": True,
        "table": 232,
        "noise": (2 * 0.01, 2 * 50.0),
        "sampler": {
            "is": "AnnealedLangevin",
            "num_steps": 232,
            "num_langevin_steps": 5,
            "step_size": 2 * 6.2e-6 / 0.01**2,
            "denoise": True,
        },
    },
    # Song et al. (2021), appendices C, G and H; yang-song/score_sde_pytorch, configs/default_cifar10_configs.py and
    # configs/{vp,subvp,ve}/cifar10_*_continuous.py. Counted in NVlabs/edm's SongUNet, which is made to be equal.
    "cifar10_sde_vp": {
        **HO,
        "parameters": {"network": 61_804_419},
        "steps": 1_300_000,
        "table": None,
        "noise": (vp(1e-5), vp(1.0)),
        "sampler": {"is": "EulerMaruyama", "num_steps": 1000},
    },
    "cifar10_sde_subvp": {
        **HO,
        "parameters": {"network": 61_804_419},
        "steps": 1_300_000,
        "table": None,
        "noise": (subvp(1e-5), subvp(1.0)),
        "sampler": {"is": "EulerMaruyama", "num_steps": 1000},
    },
    "cifar10_sde_ve": {
        **HO,
        "parameters": {"network": 62_758_787},
        "steps": 1_300_000,
        "ema": 0.999,
        "table": None,
        "noise": (2 * 0.01, 2 * 50.0),
        "sampler": {"is": "PredictorCorrector", "num_steps": 1000, "num_corrector_steps": 1, "snr": 0.16},
    },
    # Karras et al. (2022), tables 1 and 7, appendix F; NVlabs/edm, train.py, whose network has as many parameters.
    "cifar10_edm": {
        **PLAIN,
        "parameters": {"network": 55_733_891},
        "rate": 1e-3,
        "batch": 512,
        "steps": 200_000_000 // 512,
        "warmup": 10_000_000 // 512,
        "ema": 0.5 ** (512 / 500_000),
        "dropout": 0.13,
        "flip": False,  # the augmentation mirrors
        "table": None,
        "noise": (0.002, 80.0),
        "sampler": {"is": "Heun", "num_steps": 18, "s_churn": 0.0},
        "model.schedule.rho": 7.0,
        "model.objective.times.mean": -1.2,
        "model.objective.times.std": 1.2,
        "model.parameterization.sigma_data": 0.5,
        "model.augmentation.p": 0.12,
    },
    # Kingma et al. (2021), appendix B; google-research/vdm, configs/cifar10.py ("learnable_scalar": two numbers).
    "cifar10_vdm": {
        **PLAIN,
        "parameters": {"network": counted.vdm(), "schedule": 2},
        "rate": 2e-4,
        "betas": (0.9, 0.99),
        "weight_decay": 0.01,
        "batch": 128,
        "steps": 10_000_000,
        "warmup": 100,
        "ema": 0.9999,
        "dropout": 0.1,
        "flip": False,
        "table": None,
        "noise": (math.exp(-13.3 / 2), math.exp(5 / 2)),
        "sampler": {"is": "Ancestral", "num_steps": 1000, "variance": 0.0},
    },
    # Tong et al. (2024); atong01/conditional-flow-matching, train_cifar10.py and compute_fid.py.
    "cifar10_flow": {
        **HO,
        "parameters": {"network": counted.unet(blocks=2, attention=(16,), told=1, out=3)},
        "steps": 400_000,
        "table": None,
        "noise": (0.0, math.inf),
        "sampler": {"is": "RK45", "rtol": 1e-5, "atol": 1e-5},
        "model.network.head_channels": 64,
    },
    # Child (2021), "39M"; openai/vdvae, hps.py and README.md (2 processes of 16 images). Its VAE has as many.
    "cifar10_hvae": {
        **PLAIN,
        "parameters": {"ladder": counted.vdvae()},
        "rate": 2e-4,
        "betas": (0.9, 0.9),
        "weight_decay": 0.01,
        "batch": 32,
        "steps": ...,  # the code names 10,000 epochs as the longest
        "warmup": 100,
        "clip": 200.0,
        "ema": 0.9999,
        "dropout": 0.0,
        "flip": False,
        "table": None,
        "noise": None,
        "sampler": None,
        "model.grad_skip": 400.0,
        "model.likelihood.components": 10,
        "model.temperature": 1.0,
    },
    # Du and Mordatch (2019); openai/ebm_code_release, README.md and train.py. Lengths are twice those for images
    # in [0, 1], steps four times, as gradients are half as long.
    "cifar10_ebm": {
        **PLAIN,
        "parameters": {"network": counted.igebm()},
        "rate": 3e-4,
        "betas": (0.0, 0.999),
        "batch": 128,
        "steps": 121_200,  # of the published weights
        "ema": 0.0,
        "dropout": ...,
        "flip": False,
        "table": None,
        "noise": None,
        "sampler": None,
        "model.langevin.step": 4 * 10.0,
        "model.langevin.noise": 2 * 0.005,
        "model.langevin.clip": 0.01 / 2,
        "model.steps": 60,
        "model.buffer_size": 10_000,
        "model.restarts": 0.05,
        "model.energy_l2": 1.0,
    },
    # Miyato et al. (2018), tables 1 (settings C) and 3.
    "cifar10_dcgan": {
        **GAN,
        "parameters": counted.dcgan(),
        "betas": (0.5, 0.999),
        "batch": 64,
        "steps": 100_000,
        "model.d_steps": 1,
        "model.latent_dim": 128,
        "model.adversarial._target_": "gencompare.models.adversarial.NonSaturating",
    },
    # Miyato et al. (2018), table 4; pfnet-research/sngan_projection, configs/sn_cifar10_unconditional.yml.
    "cifar10_sngan": {
        **GAN,
        "parameters": counted.sngan(),
        "betas": (0.0, 0.9),
        "rate_falls": "linear",
        "batch": 64,
        "steps": 50_000,
        "model.d_steps": 5,
        "model.latent_dim": 128,
        "model.adversarial._target_": "gencompare.models.adversarial.Hinge",
    },
    # Huang et al. (2024); brownvc/R3GAN, README.md and train.py, preset CIFAR10. It trains until it is stopped.
    "cifar10_r3gan": {
        **GAN,
        "parameters": counted.r3gan(),
        "betas": (0.0, 0.99),
        "rate_falls": "cosine",
        "batch": 512,
        "steps": ...,
        "ema": 0.5 ** (512 / 5_000_000),
        "flip": True,
        "model.conditional": True,
        "model.d_steps": 1,
        "model.latent_dim": 64,
        "model.adversarial._target_": "gencompare.models.adversarial.Relativistic",
        "model.lr_schedule.last": 5e-5 / 2e-4,
        "model.lr_schedule.decay_steps": math.ceil(20_000_000 / 512),
        **{f"model.penalty.{r}.weight.start": 0.05 for r in ("r1", "r2")},
        **{f"model.penalty.{r}.weight.end": 0.005 for r in ("r1", "r2")},
        **{f"model.penalty.{r}.weight.num_images": 20_000_000 for r in ("r1", "r2")},
    },
}

HERE: dict[str, dict[str, tuple[Any, str]]] = {
    "cifar10_sde_subvp": {"noise": ((subvp(1e-3), subvp(1.0)), "Time starts at 1e-3 here, at 1e-5 there")},
    "cifar10_vdm": {
        "parameters": (
            {"network": counted.vdm(step_bias=True, told=128), "schedule": 3 + 3 * 1024},
            "the schedule is the monotone network of their appendix H, where the code has a line; maps of the noise"
            " level have a bias, and see no column of zeros beside it",
        )
    },
    "cifar10_flow": {"noise": ((1e-4 / (1 - 1e-4), (1 - 1e-4) / 1e-4), "Time keeps 1e-4 off its ends")},
    "cifar10_ebm": {"parameters": ({"network": counted.igebm(bias=True)}, "Biases of convolutions are added")},
    "cifar10_sngan": {
        "parameters": (counted.sngan(last_bias=True), "a last layer of the discriminator without bias"),
    },
}
"""Where a preset differs: what it has, and the words of its file that say so."""
