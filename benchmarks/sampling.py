"""Benchmark sampling against diffusers and k-diffusion, on the CPU.

    python benchmarks/sampling.py [network] [dpm_solver] [edm_heun] [overhead] [compiled] [chunk]

- network: 50 steps of DDIM with a U-Net of the same shape (3x32x32, 32 base channels, 4 images): ours with our U-Net,
  `DDIMScheduler` of diffusers with its `UNet2DModel`, and `sample_euler` of k-diffusion, which is DDIM, with our U-Net;
- dpm_solver: the same with 20 steps of DPM-Solver++(2M), `DPMSolverMultistepScheduler` and `sample_dpmpp_2m`;
- edm_heun: the same with 18 steps (35 network calls) of Heun's method on EDM's noise levels, with EDM's
  preconditioning here and in k-diffusion; `HeunDiscreteScheduler` of diffusers has these noise levels, but predicts the
  noise;
- overhead: 50 steps with a network that costs nothing, one image on one core: what the sampler itself costs;
- compiled: 10 steps of DDIM with our U-Net eager and compiled by torch.compile, 4 and 64 images;
- chunk: which share of the time of a chunk of samples is spent after the sampler, in the decoder of latents and the
  conversion to uint8. Computing this beside the next chunk could save no more.

The variants take turns in one process (see paired.py). k-diffusion is optional: pip install -e '.[bench]'.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
import types
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import diffusers
import torch
from paired import Laps, compare, machine, median_interval, table, take_turns
from peers import SHAPE, same_networks, void
from torch import Tensor, nn

import gencompare
from gencompare.compilation import compiled
from gencompare.diffusion.denoiser import Denoiser
from gencompare.diffusion.discrete_schedules import LinearBetas
from gencompare.diffusion.multistep_samplers import DPMSolverPP2M
from gencompare.diffusion.ode_samplers import Euler, Heun
from gencompare.diffusion.parameterizations import EDMPreconditioning, Eps, TimestepConditioning
from gencompare.diffusion.samplers import DDIM, Sampler
from gencompare.diffusion.schedules import EDMSchedule
from gencompare.evaluation.reference import to_uint8
from gencompare.evaluation.sampling import eval_mode
from gencompare.files import write_json
from gencompare.generative_model import GenerativeModel
from gencompare.models.diffusion import Diffusion
from gencompare.models.latents import PixelSpace
from gencompare.rng import generator

RESULT = Path(__file__).parent / "results" / "sampling.json"
STEPS, IMAGES = 50, 4
SIGMA_DATA = 0.5

Network = Callable[[Tensor, Tensor], Tensor]
"""Maps images (n, C, H, W) and a noise level or time step, () or (n,), to an output of the shape of the images."""
Loop = Callable[[], object]


class Free(nn.Module):
    """A network that returns the same tensor at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.output = torch.zeros(1, *SHAPE)

    def forward(self, x: Tensor, noise_cond: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return self.output


def k_diffusion_sampling() -> Any | None:
    """Return the module k_diffusion.sampling, or None if it is not installed.

    The package itself imports CLIP, which fails beside current versions of setuptools.
    """
    if "k_diffusion.sampling" in sys.modules:
        return sys.modules["k_diffusion.sampling"]
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None or not spec.submodule_search_locations:
        return None
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules.setdefault("k_diffusion", package)
    return importlib.import_module("k_diffusion.sampling")


def ours(sampler: Sampler, network: nn.Module, x: Tensor) -> Loop:
    denoiser = Denoiser(network, LinearBetas(), Eps(TimestepConditioning()))
    return lambda: sampler.sample(denoiser, x, generator=torch.Generator())


def diffusers_loop(scheduler: Any, network: Network, x: Tensor, steps: int) -> Loop:
    def sample() -> Tensor:
        scheduler.set_timesteps(steps)
        image = x * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            out = network(scheduler.scale_model_input(image, t), t)
            image = scheduler.step(out, t, image).prev_sample
        return image

    return sample


def k_diffusion_loop(function: Callable[..., Tensor], network: Network, x: Tensor, steps: int) -> Loop:
    """Sample with a function of k-diffusion. Its state is x_t / alpha, and its denoiser returns x_0."""
    schedule = LinearBetas()
    times = DDIM(num_steps=steps).times(schedule)
    at = schedule.at(times)
    sigmas = (at.sigma / at.alpha).float()
    timesteps = (1000 * times - 1).float()

    def denoise(state: Tensor, sigma: Tensor) -> Tensor:
        c_in = (sigma[0] ** 2 + 1).rsqrt()
        t = timesteps[(sigmas - sigma[0]).abs().argmin()]
        return state - sigma[0] * network(state * c_in, t)

    return lambda: function(denoise, x * sigmas[0], sigmas, disable=True)


# With a network


def ddim(our_net: nn.Module, their_net: Network, x: Tensor) -> dict[str, Loop]:
    return discrete(DDIM(num_steps=50), diffusers.DDIMScheduler(), "sample_euler", our_net, their_net, x)


def dpm_solver(our_net: nn.Module, their_net: Network, x: Tensor) -> dict[str, Loop]:
    scheduler = diffusers.DPMSolverMultistepScheduler()
    return discrete(DPMSolverPP2M(num_steps=20), scheduler, "sample_dpmpp_2m", our_net, their_net, x)


def discrete(
    sampler: Sampler, scheduler: Any, function: str, our_net: nn.Module, their_net: Network, x: Tensor
) -> dict[str, Loop]:
    """Return the loops of a model with the discrete schedule of DDPM."""
    steps = sampler.num_steps
    loops = {
        "diffusers": diffusers_loop(scheduler, their_net, x, steps),
        "gencompare": ours(sampler, our_net, x),
    }
    if (sampling := k_diffusion_sampling()) is not None:

        def network(image: Tensor, t: Tensor) -> Tensor:
            return our_net(image, t.expand(len(image)), {})

        loops["k-diffusion"] = k_diffusion_loop(getattr(sampling, function), network, x, steps)
    return loops


def edm_heun(our_net: nn.Module, their_net: Network, x: Tensor) -> dict[str, Loop]:
    """Return the loops of a model with the noise levels of EDM (Karras et al. 2022, table 1)."""
    steps, schedule = 18, EDMSchedule()
    sampler = Heun(num_steps=steps)
    denoiser = Denoiser(our_net, schedule, EDMPreconditioning(sigma_data=SIGMA_DATA))
    scheduler = diffusers.HeunDiscreteScheduler(use_karras_sigmas=True)
    sigmas = schedule.at(sampler.times(schedule)).sigma.float()
    loops: dict[str, Loop] = {
        "diffusers": diffusers_loop(scheduler, their_net, x, steps),
        "gencompare": lambda: sampler.sample(denoiser, x * sigmas[0], generator=torch.Generator()),
    }
    if (sampling := k_diffusion_sampling()) is not None:
        layers = importlib.import_module("k_diffusion.layers")

        class Inner(nn.Module):
            def forward(self, image: Tensor, c_noise: Tensor) -> Tensor:
                return our_net(image, c_noise, {})

        model = layers.Denoiser(Inner(), sigma_data=SIGMA_DATA)
        loops["k-diffusion"] = lambda: sampling.sample_heun(model, x * sigmas[0], sigmas, disable=True)
    return loops


NETWORK_PARTS = {
    "network": ("DDIM, 50 steps", ddim),
    "dpm_solver": ("DPM-Solver++(2M), 20 steps", dpm_solver),
    "edm_heun": ("Heun on EDM's noise levels, 18 steps", edm_heun),
}
MODELS = ["gan", "ddpm", "ldm"]
"""Models whose chunks of samples are timed: one network call, 50 calls, and 50 calls before a decoder."""
CHUNK_IMAGES = 64
CHUNK_DATA = ["data=exact_mixture", "data.side=32", "data.num_images=100"]
PARTS = [*NETWORK_PARTS, "overhead", "compiled", "chunk"]


def compare_networks(loops: Callable[..., dict[str, Loop]], rounds: int) -> dict[str, Any]:
    our_net, their_net = (network.eval() for network in same_networks(32))
    found = loops(our_net, lambda image, t: their_net(image, t).sample, torch.randn(IMAGES, *SHAPE))
    with torch.no_grad():
        laps = take_turns({name: lambda f=f: void(f()) for name, f in found.items()}, rounds, warm_up=1)
    return compare(laps, base="diffusers")


# Without a network


def compare_overhead(rounds: int) -> dict[str, Any]:
    x, free = torch.randn(1, *SHAPE), Free()
    sampling = k_diffusion_sampling()
    samplers = {
        "DDIM": (DDIM, "DDIMScheduler", "sample_euler"),
        "Euler": (Euler, "EulerDiscreteScheduler", "sample_euler"),
        "Heun": (Heun, "HeunDiscreteScheduler", "sample_heun"),
        "DPM-Solver++(2M)": (DPMSolverPP2M, "DPMSolverMultistepScheduler", "sample_dpmpp_2m"),
    }
    results: dict[str, Any] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def network(image: Tensor, t: Tensor) -> Tensor:
        return free.output

    for name, (sampler, scheduler, function) in samplers.items():
        variants = {
            "diffusers": diffusers_loop(getattr(diffusers, scheduler)(), network, x, STEPS),
            "gencompare": ours(sampler(num_steps=STEPS), free, x),
        }
        if sampling is not None:
            variants["k-diffusion"] = k_diffusion_loop(getattr(sampling, function), network, x, STEPS)
        with torch.no_grad():
            laps = take_turns({key: lambda f=f: void(f()) for key, f in variants.items()}, 10 * rounds, warm_up=5)
        rows = compare(laps, base="diffusers")
        for row in rows.values():
            row["microseconds_per_step"] = round(1e3 * row["cpu"]["ms"] / STEPS, 1)
        results[name] = rows
    torch.set_num_threads(threads)
    return results


# Compilation, and what overlap could save


def compare_compiled(rounds: int) -> dict[str, Any]:
    """Return for each number of images the times of 10 steps: eager, compiled, and with each block compiled on its own.

    The first calls, which compile, have their own ``first_call_seconds``.
    """
    results: dict[str, Any] = {}
    for images in (IMAGES, 64):
        torch.compiler.reset()
        networks = {name: same_networks(32)[0].eval() for name in ("eager", "compiled", "blocks compiled")}
        x = torch.randn(images, *SHAPE)
        loops = {name: ours(DDIM(num_steps=10), network, x) for name, network in networks.items()}
        first = {}
        with torch.no_grad(), compiled([networks["compiled"]]), compiled(networks["blocks compiled"].blocks):
            for name, sample in loops.items():
                start = time.perf_counter()
                sample()
                first[name] = {"first_call_seconds": round(time.perf_counter() - start, 1)}
            laps = take_turns({name: lambda f=f: void(f()) for name, f in loops.items()}, rounds, warm_up=1)
        results[str(images)] = {name: row | first[name] for name, row in compare(laps, base="eager").items()}
    return results


def time_chunks(rounds: int) -> dict[str, Any]:
    """Return for each model the seconds of a chunk, and the share of them after the last step of the sampler."""
    results: dict[str, Any] = {}
    for name in MODELS:
        data, model = gencompare.build(gencompare.compose(f"model={name}", *CHUNK_DATA))
        assert isinstance(model, GenerativeModel)
        space = model.space if isinstance(model, Diffusion) else PixelSpace(data.spec)
        latents = torch.randn(CHUNK_IMAGES, *space.latent_shape)
        whole, after = Laps(), Laps()
        with eval_mode(model), torch.no_grad():
            for seed in range(rounds):
                whole.start()
                images = model.sample(CHUNK_IMAGES, generator=generator("cpu", seed))
                to_uint8(images, data.spec)
                whole.stop()
                after.start()
                space.decode(latents)
                to_uint8(images, data.spec)
                after.stop()
        shares = [part / total for part, total in zip(after.wall, whole.wall, strict=True)]
        results[name] = {
            "images": CHUNK_IMAGES,
            "seconds": round(statistics.median(whole.wall), 3),
            "share": [round(value, 4) for value in median_interval(shares)],
        }
        print(f"{name}, {CHUNK_IMAGES} images:", results[name], flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no part {', '.join(unknown)}: choose from {', '.join(PARTS)}")
    torch.manual_seed(0)
    versions = {
        name: metadata.version(name)
        for name in ("diffusers", "k-diffusion")
        if importlib.util.find_spec(name.replace("-", "_"))
    }
    result = json.loads(args.out.read_text()) if args.out.exists() else {}
    result |= machine() | {"peers": versions}
    for part in args.parts or PARTS:
        if part in NETWORK_PARTS:
            title, loops = NETWORK_PARTS[part]
            result[part] = compare_networks(loops, args.rounds)
            print(table(f"{title}, {IMAGES} images", result[part]), flush=True)
        elif part == "overhead":
            result[part] = compare_overhead(args.rounds)
            for name, rows in result[part].items():
                print(table(f"{name}, {STEPS} steps, a network that costs nothing", rows))
                print({name: row["microseconds_per_step"] for name, row in rows.items()}, "microseconds per step")
        elif part == "compiled":
            result[part] = compare_compiled(args.rounds)
            for images, rows in result[part].items():
                print(table(f"DDIM, 10 steps, {images} images", rows), flush=True)
        else:
            result[part] = time_chunks(args.rounds)
        write_json(args.out, result)


if __name__ == "__main__":
    main()
