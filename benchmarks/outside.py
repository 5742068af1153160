"""Train a model of another library on images of this project, in a plain loop, and write samples for task=evaluate.

    python benchmarks/outside.py ddpm --seed 0 --images 40000 --out runs/diffusers_0.npz
    python benchmarks/outside.py ddpm --matched --seed 0 --images 40000 --out runs/diffusers_matched_0.npz
    python benchmarks/outside.py vae --seed 0 --images 200000 --out runs/pythae_0.npz
    python run.py task=evaluate samples=runs/diffusers_0.npz data=fashion_mnist name=diffusers seed=0

Optimiser, learning rates, batches, gradient clipping and EMA are those of this project's counterparts, which are

    python run.py experiment=fashion_mnist_ddpm budget.images=40000
    python run.py model=vae data=fashion_mnist model/encoder=mlp model/decoder=mlp model/likelihood=bernoulli \\
        model.encoder.width=512 model.encoder.depth=1 model.decoder.width=512 model.decoder.depth=1 \\
        budget.images=200000

- ddpm: `UNet2DModel` of diffusers with the shape of the preset's U-Net, `DDPMScheduler` with the cosine schedule,
  prediction of v, and 50 steps with the small variance, and `EMAModel`, as in diffusers' example of unconditional
  training. With ``--matched``, initial weights, times of a batch (stratified) and steps of sampling (including the
  first and the last) are those of this project, too.
- vae: pythae's `VAE` with its default networks, MLPs with one hidden layer of 512, and the cross entropy.

Differences that remain: without ``--matched``, those three; random numbers; and the loss of pythae includes the padding
of images to 32x32.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import unet2d
from torch import Tensor, nn

from gencompare.data.datamodule import ImageData
from gencompare.networks.diffusers_weights import to_diffusers
from gencompare.tasks.python_api import build_data, build_model, compose

NUM_SAMPLES, CHUNK = 500, 250


def batches(data: ImageData, size: int, count: int, seed: int) -> Iterator[Tensor]:
    """Yield batches of normalised training images in shuffled epochs."""
    images = torch.cat([x for x, _ in data.batches("train")])
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(count):
        while len(order) < size:
            order = torch.cat([order, torch.randperm(len(images), generator=generator)])
        yield images[order[:size]]
        order = order[size:]


def train(
    parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, loss: Callable[[Tensor], Tensor],
    data: Iterator[Tensor], steps: int, after: Callable[[], None],
) -> None:  # fmt: skip
    """Minimise a loss with warm-up over 100 steps, cosine decay to 0, and gradients clipped to a norm of 1."""

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for step, x in enumerate(data):
        optimizer.zero_grad()
        value = loss(x)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        after()
        if step % 100 == 0:
            print(f"step {step} of {steps}: loss {float(value.detach()):.4f}", flush=True)


def ddpm(data: ImageData, num_images: int, seed: int, matched: bool) -> Tensor:
    from diffusers import DDPMScheduler  # type: ignore[attr-defined]
    from diffusers.training_utils import EMAModel

    c, side, _ = data.spec.shape
    network: Any = unet2d(
        (16, 32, 64), in_channels=c, out_channels=c, layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", variance_type="fixed_small",
        timestep_spacing="trailing",
    )  # fmt: skip
    if matched:
        own = build_model(compose("experiment=fashion_mnist_ddpm", f"seed={seed}"), data).network
        network.load_state_dict(to_diffusers(own.state_dict(), num_levels=3, num_blocks=1))
    ema = EMAModel(network.parameters(), decay=0.995)
    steps = num_images // 32

    def loss(x: Tensor) -> Tensor:
        noise, t = torch.randn_like(x), torch.randint(1000, (len(x),))
        if matched:
            t = (1000 * ((torch.rand(()) + torch.arange(len(x)) / len(x)) % 1)).long()
        target = scheduler.get_velocity(x, noise, t)  # type: ignore[arg-type]
        return (network(scheduler.add_noise(x, noise, t), t).sample - target).square().mean()  # type: ignore[arg-type]

    parameters = list(network.parameters())
    print(f"{sum(p.numel() for p in parameters):,} parameters")
    optimizer = torch.optim.Adam(parameters, lr=2e-3)
    train(parameters, optimizer, loss, batches(data, 32, steps, seed), steps, lambda: ema.step(parameters))
    ema.copy_to(parameters)
    network.eval()
    if matched:
        scheduler.set_timesteps(timesteps=torch.linspace(999, 0, 50).round().int().tolist())
    else:
        scheduler.set_timesteps(50)
    drawn = []
    with torch.no_grad():
        for _ in range(NUM_SAMPLES // CHUNK):
            x = torch.randn(CHUNK, c, side, side)
            for t in scheduler.timesteps:
                x = scheduler.step(network(x, t).sample, int(t), x).prev_sample  # type: ignore[union-attr]
            drawn.append(x)
    return torch.cat(drawn).clamp(-1, 1)


def vae(data: ImageData, num_images: int, seed: int) -> Tensor:
    from pythae.models import VAE, VAEConfig  # type: ignore[import-not-found]

    model = VAE(VAEConfig(input_dim=data.spec.shape, latent_dim=32, reconstruction_loss="bce"))
    parameters = list(model.parameters())
    print(f"{sum(p.numel() for p in parameters):,} parameters")
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=lambda averages, values, n: _ema(averages, values, int(n))
    )
    steps = num_images // 64
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    bits = 1 / (math.log(2) * math.prod(data.spec.shape))  # the unit of the loss here: it decides what clipping does

    def loss(x: Tensor) -> Tensor:
        return bits * model({"data": (x + 1) / 2}).loss

    train(parameters, optimizer, loss, batches(data, 64, steps, seed), steps, lambda: average.update_parameters(model))
    with torch.no_grad():
        return 2 * average.module.decoder(torch.randn(NUM_SAMPLES, 32))["reconstruction"] - 1


def _ema(averages: Any, values: Any, step: int) -> None:
    decay = min(0.995, (1 + step) / (10 + step))
    for average, value in zip(averages, values, strict=True):
        average.lerp_(value, 1 - decay)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("ddpm", "vae"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=40_000, help="training images seen")
    parser.add_argument("--data", default="fashion_mnist", help="an option of conf/data")
    parser.add_argument("--out", type=Path, required=True, help="npz file of samples")
    parser.add_argument("--matched", action="store_true", help="for ddpm: initial weights and times of this project")
    options = parser.parse_args()
    if options.matched and options.model != "ddpm":
        parser.error("--matched is an option of ddpm")
    torch.manual_seed(options.seed)
    data = build_data(compose(f"data={options.data}"))
    data.setup()
    train_model = partial(ddpm, matched=options.matched) if options.model == "ddpm" else vae
    x = train_model(data, options.images, options.seed)
    pixels = data.spec.crop(x).add(1).mul(127.5).round().clamp(0, 255).byte()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(options.out, arr_0=pixels.permute(0, 2, 3, 1).numpy())
    print(f"Wrote {len(pixels)} images to {options.out}.")


if __name__ == "__main__":
    main()
