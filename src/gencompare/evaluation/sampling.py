"""Drawing samples in chunks: the same images for any number of processes."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from gencompare.distributed import distribute, rank_and_world_size
from gencompare.errors import UserError
from gencompare.evaluation import reference
from gencompare.evaluation.reference import EvaluationData, batch_of, to_uint8
from gencompare.files import atomic
from gencompare.generative_model import Cond, DataSpec
from gencompare.resources import flops_per_image, forget_peak, peak_memory_bytes
from gencompare.rng import generator


@dataclass(frozen=True)
class ConditionSource:
    """Sample k gets the conditions of image ``rows[k]`` of the split ``split``."""

    data: EvaluationData
    split: str
    rows: Tensor

    def batch(self, places: slice, device: torch.device | str = "cpu") -> tuple[Tensor, Cond]:
        """The images (n, C, H, W) in [-1, 1] behind samples ``places``, and all that the data tell of them."""
        return batch_of(self.data, self.split, self.rows[places], device)

    @property
    def labels(self) -> Tensor | None:
        labels = self.data.split(self.split).labels
        return None if labels is None else labels[self.rows]

    def describe(self, uses: tuple[str, ...]) -> str:
        """The conditions of a model that uses ``uses``, in words for a `Measurement`: names, shapes, the split.

        Rows that were kept in a file are told apart by the first digits of their SHA-256.
        """
        kept = self.data.split(self.split).kept
        words = ["labels"] if "label" in uses else []
        for name, shape in self.data.spec.conditions.items():
            if name in uses:
                word = f"{name} {'x'.join(map(str, shape))}"
                words.append(f"{word} ({digest(kept[name])[:8]})" if name in kept else word)
        return f"{' and '.join(words)} of {self.split}"


def choose_conditions(model: Any, data: EvaluationData, n: int, *, seed: int, split: str) -> ConditionSource | None:
    """Whose conditions ``n`` samples get; None where nothing but a class steers the model.

    Sample k gets those of place k in an order of all images of ``split``, a function of ``seed``; after the last
    image comes the first one again. So they depend on neither n, nor processes, nor the size of a batch.
    """
    if not set(getattr(model, "uses", ())) - {"label"}:
        return None
    images = len(data.split(split))
    order = torch.randperm(images, generator=generator("cpu", seed, "conditions"))
    return ConditionSource(data, split, order[torch.arange(n) % images])


def digest(rows: Tensor) -> str:
    return hashlib.sha256(rows.contiguous().cpu().numpy().tobytes()).hexdigest()


CHUNK = 250


@dataclass(frozen=True)
class Samples:
    """Drawn images and what they cost."""

    images: Tensor
    """(n, C, H, W) on the CPU, padding cropped: uint8 0 to 255 unless `draw_samples` was told otherwise."""
    labels: Tensor | None
    """(n,) classes that were asked for, or None."""
    asked: ConditionSource | None
    """The held-out images whose conditions were asked for, where more than a class was."""
    nfe: dict[str, float]
    """Rows that went through each counted network, a sample. Guidance with two rows a sample counts two."""
    seconds: float
    """Spent in drawing, over all chunks, divided by the processes that shared them."""
    peak_memory_bytes: int
    """On a GPU the most that torch held while sampling; on a CPU the most that the process ever held."""


@dataclass(frozen=True)
class Chunk:
    """Images of one seed, the rows that passed each network for them, and the seconds it took."""

    images: Tensor
    rows: dict[str, int]
    seconds: float


def write_chunk(path: Path, chunk: Chunk) -> None:
    """Whole or not at all, with a check sum."""
    facts = {"rows": chunk.rows, "seconds": chunk.seconds, "sha256": _sum(chunk.images)}
    payload = save({"images": chunk.images.contiguous()}, {"chunk": json.dumps(facts)})
    with atomic(path) as file:
        file.write(payload)


def read_chunk(path: Path) -> Chunk | None:
    """What was drawn before, or None where nothing whole is there."""
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["chunk"])
            images = file.get_tensor("images")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    return Chunk(images, facts["rows"], facts["seconds"]) if facts["sha256"] == _sum(images) else None


def _sum(images: Tensor) -> str:
    return hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()


def draw_samples(
    model: reference.SupportsSampling,
    n: int,
    *,
    seed: int = 0,
    chunk: int = CHUNK,
    labels: Tensor | None = None,
    asked: ConditionSource | None = None,
    finish: Callable[[Tensor, DataSpec], Tensor] = to_uint8,
    spec: DataSpec | None = None,
    progress: Callable[[int, int], None] | None = None,
    keep: Path | None = None,
) -> Samples:
    """Draw ``n`` images.

    Chunk k holds images k ``chunk`` to (k + 1) ``chunk`` and is drawn from the generator of (seed, "sample", k), so
    the images are a function of seed and chunk size alone; where torch.distributed runs, processes take chunks in turn
    and all of them get all images. The model samples in eval mode, and is put back as it was.

    Args:
        labels: (n,) a class an image; None gives a conditional model the classes in turn, and others none.
        asked: the images whose conditions the samples get, with their classes, in place of ``labels``.
        finish: what is done to each chunk on the way to the CPU.
        spec: of the images; None asks the model.
        progress: called with (images done, n) after each chunk.
        keep: folder in which chunks are kept as they are drawn, and looked for first. It must belong to this model and
            these settings alone.
    """
    if n < 1 or chunk < 1:
        raise UserError(f"Cannot draw {n} samples in chunks of {chunk}: both must be at least 1.")
    spec = spec or getattr(model, "spec", None)
    if spec is None:
        raise UserError("This model says nothing of its images: give draw(..., spec=data.spec).")
    device = torch.device(getattr(model, "device", "cpu"))
    if asked is not None:
        labels = asked.labels
    elif labels is None and getattr(model, "conditional", False):
        labels = torch.arange(n) % spec.num_classes
    networks: Mapping[str, nn.Module] = getattr(model, "counted_networks", dict)()
    processes = rank_and_world_size()[1]

    def one(k: int) -> Chunk:
        size = min(chunk, n - k * chunk)
        path = None if keep is None else keep / f"chunk_{k:05d}_{size}.safetensors"
        if path is not None and (stored := read_chunk(path)) is not None:
            return stored
        began = time.perf_counter()
        places = slice(k * chunk, k * chunk + size)
        cond = conditions(places, labels, asked, device)
        with counted(networks) as rows, torch.no_grad():
            x = model.sample(size, cond, generator=generator(device, seed, "sample", k))
        if len(x) != size:
            raise UserError(f"{type(model).__name__}.sample({size}) gave {len(x)} images.")
        images = finish(x, spec)
        drawn = Chunk(images, dict(rows), time.perf_counter() - began)
        if path is not None:
            write_chunk(path, drawn)
        if progress is not None:
            progress(min(n, (k + processes) * chunk), n)
        return drawn

    forget_peak(device)
    with evaluating(model):
        parts = distribute(-(-n // chunk), one)
    rows = Counter[str]()
    for part in parts:
        rows.update(part.rows)
    return Samples(
        images=torch.cat([part.images for part in parts]),
        labels=labels,
        asked=asked,
        nfe={name: rows[name] / n for name in networks},
        seconds=sum(part.seconds for part in parts) / processes,
        peak_memory_bytes=peak_memory_bytes(device),
    )


def conditions(places: slice, labels: Tensor | None, asked: ConditionSource | None, device: torch.device) -> Cond:
    """What the samples at ``places`` are asked for."""
    if asked is not None:
        return asked.batch(places, device)[1]
    return {} if labels is None else {"label": labels[places].to(device)}


def flops_per_sample(model: reference.SupportsSampling, samples: Samples, *, seed: int = 0) -> float:
    """FLOPs of drawing one of ``samples`` once more, by itself: counted apart, since counting takes time."""
    device = torch.device(getattr(model, "device", "cpu"))
    cond = conditions(slice(0, 1), samples.labels, samples.asked, device)
    with evaluating(model), torch.no_grad():
        return flops_per_image(lambda: model.sample(1, cond, generator=generator(device, seed, "flops")), 1)


def labels_like(reference: Tensor, n: int, seed: int) -> Tensor:
    """``n`` labels in the proportions of ``reference`` (each count right to within one), in an order of ``seed``'s."""
    ranked = reference.cpu().sort().values
    places = (torch.arange(n) * 2 + 1) * len(ranked) // (2 * n)
    return ranked[places][torch.randperm(n, generator=generator("cpu", seed, "labels"))]


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Every module of ``model`` in eval mode; each is put back as it was."""
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
def counted(networks: Mapping[str, nn.Module]) -> Iterator[Counter[str]]:
    """Counts the rows that pass through each network while the block runs."""
    rows = Counter[str]()

    def hook(name: str) -> Callable[..., None]:
        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            # A network that is given no rows (a number of images, say) may well give some.
            passed = [v for v in (*args, *kwargs.values(), output) if isinstance(v, Tensor) and v.ndim]
            if not passed:
                raise UserError(
                    f"Calls of the network '{name}' cannot be counted, since it neither takes nor gives a tensor of"
                    " rows: leave it out of counted_networks()."
                )
            rows[name] += len(passed[0])

        return count

    handles = [network.register_forward_hook(hook(name), with_kwargs=True) for name, network in networks.items()]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()
