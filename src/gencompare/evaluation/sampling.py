"""Sampling in chunks, each with its own seed, so the images do not depend on the number of processes."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from gencompare.batch_splitting import split_when_out_of_memory
from gencompare.compilation import compiled
from gencompare.distributed import distributed_map, rank_and_world_size
from gencompare.errors import UserError
from gencompare.evaluation.reference import EvaluationData, SupportsSampling, split_batch, to_uint8
from gencompare.files import atomic_write
from gencompare.generative_model import Cond, DataSpec
from gencompare.image_grid import grid
from gencompare.resources import flops_per_image, peak_memory_bytes, reset_peak_memory
from gencompare.rng import generator

CHUNK_SIZE = 250


@dataclass(frozen=True)
class ConditionSource:
    """The held-out images that provide conditions. Sample k gets the conditions of image ``rows[k]`` of ``split``."""

    data: EvaluationData
    split: str
    rows: Tensor

    def batch(self, samples: slice, device: torch.device | str = "cpu") -> tuple[Tensor, Cond]:
        """Return the images (n, C, H, W) in [-1, 1] that these samples are conditioned on, and all their conditions."""
        return split_batch(self.data, self.split, self.rows[samples], device)

    @property
    def labels(self) -> Tensor | None:
        labels = self.data.split(self.split).labels
        return None if labels is None else labels[self.rows]

    def describe(self, condition_names: tuple[str, ...]) -> str:
        """Describe the conditions that a model uses, for a `Measurement`: names, shapes and split.

        Conditions that are read from a file are identified by the first digits of their SHA-256.
        """
        stored = self.data.split(self.split).extra_conditions
        parts = ["labels"] if "label" in condition_names else []
        for name, shape in self.data.spec.conditions.items():
            if name in condition_names:
                part = f"{name} {'x'.join(map(str, shape))}"
                parts.append(f"{part} ({tensor_sha256(stored[name])[:8]})" if name in stored else part)
        return f"{' and '.join(parts)} of {self.split}"


def choose_conditions(model: Any, data: EvaluationData, n: int, *, seed: int, split: str) -> ConditionSource | None:
    """Choose the images that provide the conditions of ``n`` samples.

    Return None for a model that is unconditional or uses only the class.

    Sample k gets the conditions of image k of a random permutation of ``split``, which depends only on ``seed`` and
    repeats after the last image. The conditions do not depend on n, the number of processes or the chunk size.
    """
    if not set(getattr(model, "condition_names", ())) - {"label"}:
        return None
    total = len(data.split(split))
    order = torch.randperm(total, generator=generator("cpu", seed, "conditions"))
    return ConditionSource(data, split, order[torch.arange(n) % total])


def labels_like(reference: Tensor, n: int, seed: int) -> Tensor:
    """Return ``n`` shuffled labels in the same proportions as ``reference``; each count is exact to within one."""
    ranked = reference.cpu().sort().values
    places = (torch.arange(n) * 2 + 1) * len(ranked) // (2 * n)
    return ranked[places][torch.randperm(n, generator=generator("cpu", seed, "labels"))]


@dataclass(frozen=True)
class Samples:
    """Generated images and their cost."""

    images: Tensor
    """Images (n, C, H, W) on the CPU without padding; uint8 in [0, 255] with the default ``postprocess``."""
    labels: Tensor | None
    """Classes that the model was given, (n,), or None."""
    condition_source: ConditionSource | None
    """The images whose conditions the model was given, if it uses more than the class."""
    nfe: dict[str, float]
    """Network evaluations per sample, by network name. Guidance with two batch entries per sample counts as two."""
    seconds: float
    """Sampling time summed over all chunks, divided by the number of processes."""
    peak_memory_bytes: int
    """Peak memory of torch during sampling on a GPU; peak memory of the process on a CPU."""

    def grid(self, columns: int | None = None) -> Image:
        """Return the images as one picture, with ``columns`` images per row. None makes it approximately square."""
        return grid(self.images.numpy(), columns)

    def _repr_png_(self) -> bytes:
        png = io.BytesIO()
        self.grid().save(png, "PNG")
        return png.getvalue()


def draw_samples(
    model: SupportsSampling,
    n: int,
    *,
    seed: int = 0,
    chunk_size: int = CHUNK_SIZE,
    compile: bool = False,
    labels: Tensor | None = None,
    condition_source: ConditionSource | None = None,
    postprocess: Callable[[Tensor, DataSpec], Tensor] = to_uint8,
    spec: DataSpec | None = None,
    progress: Callable[[int, int], None] | None = None,
    chunk_dir: Path | None = None,
) -> Samples:
    """Draw ``n`` images.

    Chunk k contains images k ``chunk_size`` to (k + 1) ``chunk_size`` - 1 and uses the random generator of
    (seed, "sample", k), so the images depend only on seed and chunk size. Under torch.distributed, the chunks are split
    between the ranks, and all ranks return all images. The model is in eval mode while sampling; its mode is restored
    afterwards.

    Args:
        compile: compile the model's ``nfe_networks()`` with ``torch.compile`` while sampling.
        labels: (n,) the class of each image. None cycles through the classes for a conditional model.
        condition_source: images that provide the conditions, and the labels in place of ``labels``.
        postprocess: maps each chunk to images on the CPU.
        spec: shape and value range of the images; None uses those of the model.
        progress: called with (images done, n) after each chunk.
        chunk_dir: folder where chunks are stored and read back. Use a separate folder for each model and its settings.

    Raises:
        UserError: an argument is invalid, the images are not finite or exceed [-1, 1], or the network evaluations
            cannot be counted.
    """
    if n < 1 or chunk_size < 1:
        raise UserError(f"Cannot draw {n} samples in chunks of {chunk_size}: both must be at least 1.")
    spec = spec or getattr(model, "spec", None)
    if spec is None:
        raise UserError("This model has no attribute 'spec': call draw_samples(..., spec=data.spec).")
    device = _device_of(model)
    if condition_source is not None:
        labels = condition_source.labels
    elif labels is None and getattr(model, "conditional", False):
        labels = torch.arange(n) % spec.num_classes
    networks: Mapping[str, nn.Module] = getattr(model, "nfe_networks", dict)()
    world_size = rank_and_world_size()[1]

    def draw_chunk(k: int) -> _Chunk:
        size = min(chunk_size, n - k * chunk_size)
        path = None if chunk_dir is None else chunk_dir / f"chunk_{k:05d}_{size}.safetensors"
        if path is not None and (stored := _read_chunk(path)) is not None:
            return stored
        start = time.perf_counter()
        cond = _conditions(slice(k * chunk_size, k * chunk_size + size), labels, condition_source, device)
        with count_rows(networks) as rows, split_when_out_of_memory(networks.values()), torch.no_grad():
            x = model.sample(size, cond, generator=generator(device, seed, "sample", k))
        if len(x) != size:
            raise UserError(f"{type(model).__name__}.sample({size}) returned {len(x)} images.")
        chunk = _Chunk(postprocess(x, spec), dict(rows), time.perf_counter() - start)
        if path is not None:
            _write_chunk(path, chunk)
        if progress is not None:
            progress(min(n, (k + world_size) * chunk_size), n)
        return chunk

    reset_peak_memory(device)
    with eval_mode(model), compiled(networks.values()) if compile else nullcontext():
        chunks = distributed_map(draw_chunk, -(-n // chunk_size))
    rows = Counter[str]()
    for chunk in chunks:
        rows.update(chunk.rows)
    return Samples(
        images=torch.cat([chunk.images for chunk in chunks]),
        labels=labels,
        condition_source=condition_source,
        nfe={name: rows[name] / n for name in networks},
        seconds=sum(chunk.seconds for chunk in chunks) / world_size,
        peak_memory_bytes=peak_memory_bytes(device),
    )


def flops_per_sample(model: SupportsSampling, samples: Samples, *, seed: int = 0) -> float:
    """Count the FLOPs per sample by drawing one extra sample, since counting slows down sampling."""
    device = _device_of(model)
    cond = _conditions(slice(0, 1), samples.labels, samples.condition_source, device)
    with eval_mode(model), torch.no_grad():
        return flops_per_image(lambda: model.sample(1, cond, generator=generator(device, seed, "flops")), 1)


def _device_of(model: object) -> torch.device:
    return torch.device(getattr(model, "device", "cpu"))


def _conditions(samples: slice, labels: Tensor | None, source: ConditionSource | None, device: torch.device) -> Cond:
    """Return the conditions of these samples."""
    if source is not None:
        return source.batch(samples, device)[1]
    return {} if labels is None else {"label": labels[samples].to(device)}


@dataclass(frozen=True)
class _Chunk:
    """Images drawn with one seed, the number of inputs evaluated by each network, and the time in seconds."""

    images: Tensor
    rows: dict[str, int]
    seconds: float


def _write_chunk(path: Path, chunk: _Chunk) -> None:
    """Write a chunk atomically, with a checksum."""
    facts = {"rows": chunk.rows, "seconds": chunk.seconds, "sha256": tensor_sha256(chunk.images)}
    payload = save({"images": chunk.images.contiguous()}, {"chunk": json.dumps(facts)})
    with atomic_write(path) as file:
        file.write(payload)


def _read_chunk(path: Path) -> _Chunk | None:
    """Read a stored chunk. Return None if it is missing or corrupted."""
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["chunk"])
            images = file.get_tensor("images")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return _Chunk(images, facts["rows"], facts["seconds"]) if facts["sha256"] == tensor_sha256(images) else None


def tensor_sha256(values: Tensor) -> str:
    """Return the SHA-256 of the values of a tensor."""
    return hashlib.sha256(values.contiguous().cpu().numpy().tobytes()).hexdigest()


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """Put every module of ``model`` into eval mode, and restore the mode of each at the end."""
    if not isinstance(model, nn.Module):
        yield
        return
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def count_rows(networks: Mapping[str, nn.Module]) -> Iterator[Counter[str]]:
    """Count the batch entries that each network evaluates inside the block."""
    rows = Counter[str]()

    def hook(name: str) -> Callable[..., None]:
        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            # A network whose inputs are not batched (such as a number of images) may return a batch.
            tensors = [v for v in (*args, *kwargs.values(), output) if isinstance(v, Tensor) and v.ndim]
            if not tensors:
                raise UserError(
                    f"Evaluations of the network '{name}' cannot be counted: neither its inputs nor its output is a"
                    " batched tensor. Remove it from nfe_networks()."
                )
            rows[name] += len(tensors[0])

        return count

    handles = [network.register_forward_hook(hook(name), with_kwargs=True) for name, network in networks.items()]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()
