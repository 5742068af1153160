"""Benchmark sampling against diffusers and k-diffusion, on the CPU.

    python benchmarks/sampling.py [network] [overhead]

- network: 50 steps of DDIM with a U-Net of the same shape (3x32x32, 32 base channels, 4 images): ours with our U-Net,
  `DDIMScheduler` of diffusers with its `UNet2DModel`, and `sample_euler` of k-diffusion, which is DDIM, with our U-Net;
- overhead: 50 steps with a network that costs nothing, one image on one core: what the sampler itself costs.

The variants take turns in one process (see paired.py). k-diffusion is optional: pip install -e '.[bench]'.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import types
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from paired import compare, table, take_turns
from torch import Tensor, nn
from train_step import same_networks

from gencompare.diffusion.denoiser import Denoiser
from gencompare.diffusion.discrete_schedules import LinearBetas
from gencompare.diffusion.ode_samplers import DPMSolverPP2M, Euler, Heun
from gencompare.diffusion.parameterizations import Eps, TimestepConditioning
from gencompare.diffusion.samplers import DDIM, Sampler
from gencompare.files import write_json
from gencompare.records import now
from gencompare.tasks.runs.environment import environment

RESULT = Path(__file__).parent / "results" / "sampling.json"
STEPS, IMAGES, SHAPE = 50, 4, (3, 32, 32)
PARTS = ["network", "overhead"]


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


def ours(sampler: Sampler, network: nn.Module, x: Tensor) -> Callable[[], None]:
    denoiser = Denoiser(network, LinearBetas(), Eps(TimestepConditioning()))
    return lambda: void(sampler.sample(denoiser, x, generator=torch.Generator()))


def diffusers_loop(scheduler: Any, network: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    def sample() -> None:
        scheduler.set_timesteps(STEPS)
        image = x * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            out = network(scheduler.scale_model_input(image, t), t)
            image = scheduler.step(out, t, image).prev_sample

    return sample


def k_diffusion_loop(function: Callable[..., Tensor], network: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Any:
    """Sample with a function of k-diffusion. Its state is x_t / alpha, and its denoiser returns x_0."""
    schedule = LinearBetas()
    times = DDIM(num_steps=STEPS).times(schedule)
    at = schedule.at(times)
    sigmas = (at.sigma / at.alpha).float()
    timesteps = (1000 * times - 1).float()

    def denoise(state: Tensor, sigma: Tensor) -> Tensor:
        c_in = (sigma[0] ** 2 + 1).rsqrt()
        t = timesteps[(sigmas - sigma[0]).abs().argmin()]
        return state - sigma[0] * network(state * c_in, t)

    return lambda: void(function(denoise, x * sigmas[0], sigmas, disable=True))


def void(result: object) -> None:
    pass


def compare_networks(rounds: int) -> dict[str, Any]:
    from diffusers import DDIMScheduler  # type: ignore[attr-defined]

    our_net, their_net = (network.eval() for network in same_networks(32))
    x = torch.randn(IMAGES, *SHAPE)
    variants = {
        "diffusers": diffusers_loop(DDIMScheduler(), lambda image, t: their_net(image, t).sample, x),
        "gencompare": ours(DDIM(num_steps=STEPS), our_net, x),
    }
    if (sampling := k_diffusion_sampling()) is not None:
        by_k = k_diffusion_loop(sampling.sample_euler, lambda image, t: our_net(image, t.expand(len(image)), {}), x)
        variants["k-diffusion"] = by_k
    with torch.no_grad():
        return compare(take_turns(variants, rounds, warm_up=1), base="diffusers")


def compare_overhead(rounds: int) -> dict[str, Any]:
    import diffusers

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
    for name, (sampler, scheduler, function) in samplers.items():
        variants = {
            "diffusers": diffusers_loop(getattr(diffusers, scheduler)(), lambda image, t: free.output, x),
            "gencompare": ours(sampler(num_steps=STEPS), free, x),
        }
        if sampling is not None:
            variants["k-diffusion"] = k_diffusion_loop(getattr(sampling, function), lambda image, t: free.output, x)
        with torch.no_grad():
            rows = compare(take_turns(variants, 10 * rounds, warm_up=5), base="diffusers")
        for row in rows.values():
            row["microseconds_per_step"] = round(1e3 * row["cpu"]["ms"] / STEPS, 1)
        results[name] = rows
    torch.set_num_threads(threads)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; both by default")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    torch.manual_seed(0)
    versions = {
        name: metadata.version(name)
        for name in ("diffusers", "k-diffusion")
        if importlib.util.find_spec(name.replace("-", "_"))
    }
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    result |= {"time": now(), "environment": environment(torch.device("cpu")), "peers": versions}
    for part in args.parts or PARTS:
        if part == "network":
            result[part] = compare_networks(args.rounds)
            print(table(f"DDIM, {STEPS} steps, {IMAGES} images", result[part]))
        else:
            result[part] = compare_overhead(args.rounds)
            for name, rows in result[part].items():
                print(table(f"{name}, {STEPS} steps, a network that costs nothing", rows))
                print({name: row["microseconds_per_step"] for name, row in rows.items()}, "microseconds per step")
    write_json(RESULT, result)


if __name__ == "__main__":
    main()
