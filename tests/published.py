"""Settings from the papers and published code that conf/experiment/cifar10_*.yaml reproduce."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import counted

# The lowest and highest noise of a schedule, as sigma / alpha for data in [-1, 1].

NoiseRange = tuple[float, float]


def discrete_noise_range(alpha: Callable[[int], float], num_steps: int) -> NoiseRange:
    """Return the noise range of x_i = sqrt(alpha_i) x_{i-1} + sqrt(1 - alpha_i) z for i = 1, ..., num_steps."""
    alpha_bar = math.prod(alpha(i) for i in range(1, num_steps + 1))
    return math.sqrt(1 / alpha(1) - 1), math.sqrt(1 / alpha_bar - 1)


def linear_alpha(i: int) -> float:
    """Return 1 - beta_i of Ho et al. (2020), section 4: beta from 1e-4 to 0.02 in 1000 steps."""
    return 1 - (1e-4 + (0.02 - 1e-4) * (i - 1) / 999)


def cosine_alpha(i: int, num_steps: int = 4000) -> float:
    """Return 1 - beta_i of Nichol and Dhariwal (2021), eq. 17, with beta of at most 0.999."""
    alpha_bar = [math.cos(math.pi / 2 * (j / num_steps + 0.008) / 1.008) ** 2 for j in (i - 1, i)]
    return max(alpha_bar[1] / alpha_bar[0], 0.001)


def beta_integral(t: float) -> float:
    """Return the integral from 0 to t of beta(t) = 0.1 + 19.9 t (Song et al. 2021, appendix C)."""
    return 0.1 * t + 19.9 * t**2 / 2


def vp_noise(t: float) -> float:
    return math.sqrt(math.expm1(beta_integral(t)))


def subvp_noise(t: float) -> float:
    return -math.expm1(-beta_integral(t)) / math.exp(-beta_integral(t) / 2)


# Published settings. An ellipsis means that the source does not state the value.

ADAM_DEFAULTS = {
    "betas": (0.9, 0.999),
    "weight_decay": 0.0,
    "lr_decay": "constant",
    "warmup_steps": 0,
    "grad_clip": None,
}
"""Adam with its default betas, a constant learning rate and no gradient clipping."""
DDPM = {
    **ADAM_DEFAULTS,
    "lr": 2e-4,
    "batch_size": 128,
    "warmup_steps": 5000,
    "grad_clip": 1.0,
    "ema": 0.9999,
    "dropout": 0.1,
    "random_flip": True,
}
"""Ho et al. (2020), appendix B; many later papers use the same settings."""
GAN = {
    **ADAM_DEFAULTS,
    "lr": 2e-4,
    "ema": 0.0,
    "dropout": 0.0,
    "random_flip": False,
    "num_discrete_times": None,
    "noise_range": None,
    "sampler": None,
}

PUBLISHED: dict[str, dict[str, Any]] = {
    # Ho et al. (2020), appendix B, "35.7 million parameters"; hojonathanho/diffusion, scripts/run_cifar.py. Count by
    # hand: 35,746,307, as in diffusers' UNet2DModel for google/ddpm-cifar10-32.
    "cifar10_ddpm": {
        **DDPM,
        "parameters": {
            "network": counted.unet(num_blocks=2, attention_resolutions=(16,), emb_outputs=1, out_channels=3)
        },
        "steps": 800_000,
        "num_discrete_times": 1000,
        "noise_range": discrete_noise_range(linear_alpha, 1000),
        "sampler": {"class": "Ancestral", "num_steps": 1000, "variance": 1.0},  # "fixedlarge"
    },
    # Nichol and Dhariwal (2021), table 2; the flags of openai/improved-diffusion, README.md and scripts/image_train.py.
    # Count by hand: 52,546,438, as in its UNetModel ("50M" in the name of its checkpoint).
    "cifar10_iddpm": {
        **ADAM_DEFAULTS,
        "parameters": {
            "network": counted.unet(num_blocks=3, attention_resolutions=(16, 8), emb_outputs=2, out_channels=6)
        },
        "lr": 1e-4,
        "batch_size": 128,
        "steps": 500_000,
        "ema": 0.9999,
        "dropout": 0.3,
        "random_flip": False,
        "num_discrete_times": 4000,
        "noise_range": discrete_noise_range(cosine_alpha, 4000),
        "sampler": {"class": "Ancestral", "num_steps": 4000},
        "model.network.num_heads": 4,
        "model.objective.vlb_weight": 0.001,  # lambda in eq. 16; the code samples one of T terms, scaled by T / 1000
    },
    # Song and Ermon (2019), section 5; ermongroup/ncsn, configs/anneal.yml, parameter count of CondRefineNetDilated.
    # The sigmas are doubled, because theirs are for data in [0, 1]; step sizes are relative to the last sigma squared.
    "cifar10_ncsn": {
        **ADAM_DEFAULTS,
        "parameters": {"network": 30_117_635},
        "lr": 1e-3,
        "batch_size": 128,
        "steps": 200_000,
        "ema": 0.0,
        "dropout": 0.0,
        "random_flip": True,
        "num_discrete_times": 10,
        "noise_range": (2 * 0.01, 2 * 1.0),
        "sampler": {
            "class": "AnnealedLangevin",
            "num_steps": 10,
            "num_langevin_steps": 100,
            "step_size": 2e-5 / 0.01**2,
            "denoise": False,
        },
    },
    # Song and Ermon (2020), section 5; ermongroup/ncsnv2, configs/cifar10.yml, parameter count of its NCSNv2.
    "cifar10_ncsnv2": {
        **ADAM_DEFAULTS,
        "parameters": {"network": 29_694_083},
        "lr": 1e-4,
        "batch_size": 128,
        "steps": 300_000,
        "ema": 0.999,
        "dropout": 0.0,
        "random_flip": True,
        "num_discrete_times": 232,
        "noise_range": (2 * 0.01, 2 * 50.0),
        "sampler": {
            "class": "AnnealedLangevin",
            "num_steps": 232,
            "num_langevin_steps": 5,
            "step_size": 2 * 6.2e-6 / 0.01**2,
            "denoise": True,
        },
    },
    # Song et al. (2021), appendices C, G and H; yang-song/score_sde_pytorch, configs/default_cifar10_configs.py and
    # configs/{vp,subvp,ve}/cifar10_*_continuous.py. Counted in NVlabs/edm's SongUNet, which reproduces theirs.
    "cifar10_sde_vp": {
        **DDPM,
        "parameters": {"network": 61_804_419},
        "steps": 1_300_000,
        "num_discrete_times": None,
        "noise_range": (vp_noise(1e-5), vp_noise(1.0)),
        "sampler": {"class": "EulerMaruyama", "num_steps": 1000},
    },
    "cifar10_sde_subvp": {
        **DDPM,
        "parameters": {"network": 61_804_419},
        "steps": 1_300_000,
        "num_discrete_times": None,
        "noise_range": (subvp_noise(1e-5), subvp_noise(1.0)),
        "sampler": {"class": "EulerMaruyama", "num_steps": 1000},
    },
    "cifar10_sde_ve": {
        **DDPM,
        "parameters": {"network": 62_758_787},
        "steps": 1_300_000,
        "ema": 0.999,
        "num_discrete_times": None,
        "noise_range": (2 * 0.01, 2 * 50.0),
        "sampler": {"class": "PredictorCorrector", "num_steps": 1000, "num_corrector_steps": 1, "snr": 0.16},
    },
    # Karras et al. (2022), tables 1 and 7, appendix F; NVlabs/edm, train.py, parameter count of its network.
    "cifar10_edm": {
        **ADAM_DEFAULTS,
        "parameters": {"network": 55_733_891},
        "lr": 1e-3,
        "batch_size": 512,
        "steps": 200_000_000 // 512,
        "warmup_steps": 10_000_000 // 512,
        "ema": 0.5 ** (512 / 500_000),
        "dropout": 0.13,
        "random_flip": False,  # the augmentation flips images
        "num_discrete_times": None,
        "noise_range": (0.002, 80.0),
        "sampler": {"class": "Heun", "num_steps": 18, "s_churn": 0.0},
        "model.schedule.rho": 7.0,
        "model.objective.times.mean": -1.2,
        "model.objective.times.std": 1.2,
        "model.parameterization.sigma_data": 0.5,
        "model.augmentation.p": 0.12,
    },
    # Kingma et al. (2021), appendix B; google-research/vdm, configs/cifar10.py ("learnable_scalar": 2 parameters).
    "cifar10_vdm": {
        **ADAM_DEFAULTS,
        "parameters": {"network": counted.vdm(), "schedule": 2},
        "lr": 2e-4,
        "betas": (0.9, 0.99),
        "weight_decay": 0.01,
        "batch_size": 128,
        "steps": 10_000_000,
        "warmup_steps": 100,
        "ema": 0.9999,
        "dropout": 0.1,
        "random_flip": False,
        "num_discrete_times": None,
        "noise_range": (math.exp(-13.3 / 2), math.exp(5 / 2)),
        "sampler": {"class": "Ancestral", "num_steps": 1000, "variance": 0.0},
    },
    # Tong et al. (2024); atong01/conditional-flow-matching, train_cifar10.py and compute_fid.py.
    "cifar10_flow": {
        **DDPM,
        "parameters": {
            "network": counted.unet(num_blocks=2, attention_resolutions=(16,), emb_outputs=1, out_channels=3)
        },
        "steps": 400_000,
        "num_discrete_times": None,
        "noise_range": (0.0, math.inf),
        "sampler": {"class": "RK45", "rtol": 1e-5, "atol": 1e-5},
        "model.network.head_channels": 64,
    },
    # Geng et al. (2024); locuslab/ect, run_ecm.sh, ct_train.py and training/loss.py, parameter count of EDM's network.
    "cifar10_consistency": {
        **ADAM_DEFAULTS,
        "parameters": {"network": 55_733_891 - 9 * 128},  # without augmentation
        "lr": 1e-4,
        "batch_size": 128,
        "steps": 25_600_000 // 128,
        "ema": 0.9999,
        "dropout": 0.2,
        "random_flip": False,
        "num_discrete_times": None,
        "noise_range": (0.002, 80.0),
        "sampler": {"class": "MultistepConsistency", "num_steps": 2},
        "model.optimizer._target_": "torch.optim.RAdam",
        "model.objective.times.mean": -1.1,
        "model.objective.times.std": 2.0,
        "model.objective.q": 2.0,
        "model.objective.num_stages": 25_600 // 3_200,  # the distance is halved every 250 ticks of 12,800 images
        "model.objective.k": 8.0,
        "model.objective.b": 1.0,
        "model.objective.c": 0.0,
        "model.parameterization.sigma_data": 0.5,
    },
    # Geng et al. (2025), appendix A; Gsunshine/py-meanflow, scripts/cifar10_v0.sh, train_arg_parser.py, models/unet.py:
    # EDM's network with embeddings of two times, of 256 features each, and 6 augmentation parameters.
    "cifar10_meanflow": {
        **ADAM_DEFAULTS,
        "parameters": {"network": 55_733_891 - 9 * 128 + 6 * 512 + (512 - 128) * 512},
        "lr": 6e-4,
        "batch_size": 1024,
        "steps": 800_000,
        "warmup_steps": 10_000,
        "ema": 0.99995,
        "dropout": 0.2,
        "random_flip": False,  # the augmentation flips images
        "num_discrete_times": None,
        "noise_range": (0.0, math.inf),
        "sampler": {"class": "MeanFlowSampler", "num_steps": 1},
        "model.objective.ratio": 0.75,
        "model.objective.p": 0.75,
        "model.objective.times.mean": -2.0,
        "model.objective.times.std": 2.0,
        "model.parameterization.noise_conditioning.factor": 1.0,
        "model.augmentation.p": 0.12,
    },
    # Child (2021), "39M"; openai/vdvae, hps.py and README.md (2 processes of 16 images), parameter count of its VAE.
    "cifar10_hvae": {
        **ADAM_DEFAULTS,
        "parameters": {"ladder": counted.vdvae()},
        "lr": 2e-4,
        "betas": (0.9, 0.9),
        "weight_decay": 0.01,
        "batch_size": 32,
        "steps": ...,  # the code has a maximum of 10,000 epochs
        "warmup_steps": 100,
        "grad_clip": 200.0,
        "ema": 0.9999,
        "dropout": 0.0,
        "random_flip": False,
        "num_discrete_times": None,
        "noise_range": None,
        "sampler": None,
        "model.grad_skip": 400.0,
        "model.likelihood.num_components": 10,
        "model.temperature": 1.0,
    },
    # Salimans et al. (2017); openai/pixel-cnn, train.py with the default of 8 GPUs, and model.py.
    "cifar10_pixelcnnpp": {
        **ADAM_DEFAULTS,
        "parameters": {"network": counted.pixelcnnpp()},
        "lr": 1e-3,
        "betas": (0.95, 0.9995),
        "batch_size": 8 * 16,
        "steps": ...,  # the code has a maximum of 5,000 epochs
        "lr_decay": "exponential",
        "ema": 0.9995,
        "dropout": 0.5,
        "random_flip": False,
        "num_discrete_times": None,
        "noise_range": None,
        "sampler": None,
        "model.likelihood.num_components": 10,
        "model.lr_schedule.last": 0.999995 ** (250_000_000 // 128),
    },
    # Kingma and Dhariwal (2018), appendix; openai/glow, README.md and train.py: 8 processes of 64 images, and a warm-up
    # of 10 epochs of 50,000 images. The code trains until it is stopped.
    "cifar10_glow": {
        **ADAM_DEFAULTS,
        "parameters": counted.glow(),
        "lr": 1e-3,
        "batch_size": 512,
        "steps": ...,
        "warmup_steps": 977,
        "ema": 0.0,
        "dropout": 0.0,
        "random_flip": False,
        "num_discrete_times": None,
        "noise_range": None,
        "sampler": None,
        "model.bijection.coupling_scale": "sigmoid",
        "model.noise_std": None,
        "model.temperature": 1.0,
    },
    # Du and Mordatch (2019); openai/ebm_code_release, README.md and train.py. Noise is doubled and step sizes are
    # quadrupled relative to theirs for images in [0, 1], because gradients are half as large.
    "cifar10_ebm": {
        **ADAM_DEFAULTS,
        "parameters": {"network": counted.igebm()},
        "lr": 3e-4,
        "betas": (0.0, 0.999),
        "batch_size": 128,
        "steps": 121_200,  # training steps of the published weights
        "ema": 0.0,
        "dropout": ...,
        "random_flip": False,
        "num_discrete_times": None,
        "noise_range": None,
        "sampler": None,
        "model.langevin.step_size": 4 * 10.0,
        "model.langevin.noise_std": 2 * 0.005,
        "model.langevin.grad_clip": 0.01 / 2,
        "model.num_langevin_steps": 60,
        "model.buffer_size": 10_000,
        "model.reinit_prob": 0.05,
        "model.energy_l2": 1.0,
    },
    # Miyato et al. (2018), tables 1 (settings C) and 3.
    "cifar10_dcgan": {
        **GAN,
        "parameters": counted.dcgan(),
        "betas": (0.5, 0.999),
        "batch_size": 64,
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
        "lr_decay": "linear",
        "batch_size": 64,
        "steps": 50_000,
        "model.d_steps": 5,
        "model.latent_dim": 128,
        "model.adversarial._target_": "gencompare.models.adversarial.Hinge",
    },
    # Huang et al. (2024); brownvc/R3GAN, README.md and train.py, preset CIFAR10, which states no number of steps.
    "cifar10_r3gan": {
        **GAN,
        "parameters": counted.r3gan(),
        "betas": (0.0, 0.99),
        "lr_decay": "cosine",
        "batch_size": 512,
        "steps": ...,
        "ema": 0.5 ** (512 / 5_000_000),
        "random_flip": True,
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

DIFFERENCES: dict[str, dict[str, tuple[Any, str]]] = {
    "cifar10_sde_subvp": {
        "noise_range": ((subvp_noise(1e-3), subvp_noise(1.0)), "Time starts at 1e-3 instead of 1e-5")
    },
    "cifar10_vdm": {
        "parameters": (
            {"network": counted.vdm(emb_bias=True, noise_dim=128), "schedule": 3 + 3 * 1024},
            "the schedule is the monotone network of appendix H instead of a linear one; projections of the noise level"
            " have a bias and no extra column of zeros",
        )
    },
    "cifar10_flow": {"noise_range": ((1e-4 / (1 - 1e-4), (1 - 1e-4) / 1e-4), "excludes 1e-4 at both ends")},
    "cifar10_consistency": {"model.objective.c": (0.00054, "c = 0.00054, where the code has 0")},
    "cifar10_meanflow": {
        "noise_range": ((1e-4 / (1 - 1e-4), (1 - 1e-4) / 1e-4), "times exclude 1e-4 at both ends"),
        "parameters": ({"network": 55_733_891 + 64 * 128}, "concatenates them, and has fewer parameters"),
    },
    "cifar10_glow": {
        "parameters": (
            counted.glow(of_code=False),
            "the last convolution of a coupling has no scale, 3x3 convolutions have no channel that marks the border,"
            " and the last latents have one mean and scale per channel instead of a convolution of zeros",
        )
    },
    "cifar10_ebm": {"parameters": ({"network": counted.igebm(bias=True)}, "the last layer have biases")},
    "cifar10_sngan": {
        "parameters": (counted.sngan(last_bias=True), "the last layer of the discriminator has a bias"),
    },
}
"""Settings where a preset differs: the value used here, and the text in the preset's file that says so."""
