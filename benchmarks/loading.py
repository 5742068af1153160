"""Compare the training stream with torchvision and DataLoader, and measure how a folder of images costs with its size.

    GENCOMPARE_DATA=DIR python benchmarks/loading.py [--threads 2] [--rounds 60] [--repeats 3] [--parts batches folders]

- batches: batches of 64 of the training images of CIFAR-10, float32 in [-1, 1], with their labels, from the training
  stream with images in memory and memory-mapped, and from torchvision's data set (ToTensor, Normalize) through a
  DataLoader with 0 and 2 workers, which take turns; then our two and a training step of the U-Net with 32 channels on
  such a batch. The processor time of workers is not counted.
- folders: 5,000, 15,000 and 50,000 JPEG files of 32x32, which are memory-mapped regardless of their size, in shards of
  8 MiB instead of 128 MiB, so that even the smallest folder has several: seconds until the files are listed and
  hashed, decoded, and opened again; and the memory of the process while it decodes and while it reads one epoch. Each
  run is a new process. Pages of the memory-mapped files are counted separately, since the system frees them when other
  programs need the memory. TMPDIR=/dev/shm keeps the files in memory, if deleting them from the disk takes long.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from memory import peak_mib
from paired import Laps, compare, machine, median_interval, table, take_turns
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from torchvision import datasets, transforms
from train_step import PlainLoop

from gencompare.cache import cached_shards
from gencompare.data import file_formats
from gencompare.data.archives import open_archive
from gencompare.data.cifar10 import CIFAR10
from gencompare.data.datamodule import ImageData, Split
from gencompare.data.image_folder import ImageFolder
from gencompare.data.mapped_images import MappedImages
from gencompare.files import write_json
from gencompare.generative_model import DataSpec
from gencompare.networks.unet import UNet

RESULT = Path(__file__).parent / "results" / "loading.json"
PARTS = ["batches", "folders"]
BATCH, BATCHES_PER_LAP, CHANNELS, STEPS = 64, 20, 32, 8
SHARD_IMAGES = 8192
SIZES, SIDE, SHARD_BYTES = (5_000, 15_000, 50_000), 32, 1 << 23
PREDICTED = 1_000_000
MIB = 2**20


# Batches


class Given(ImageData):
    """A data set of given splits."""

    def __init__(self, spec: DataSpec, splits: dict[str, Split]) -> None:
        super().__init__(batch_size=BATCH)
        self.spec, self.given = spec, splits

    def load(self) -> dict[str, Split]:
        return self.given


class InMemoryCIFAR10(datasets.CIFAR10):
    """torchvision's data set, with given images and labels instead of files."""

    def __init__(self, split: Split, transform: Callable[[Any], Tensor]) -> None:
        assert split.labels is not None
        self.data, self.targets = split.images.permute(0, 2, 3, 1).numpy(), split.labels.tolist()
        self.transform, self.target_transform = transform, None


def dataloader(split: Split, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over batches of torchvision's data set without an end."""
    to_input = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)])
    data = InMemoryCIFAR10(split, to_input)
    sampler = RandomSampler(data, num_samples=len(data) * 1_000)  # permutations, one after the other
    return iter(DataLoader(data, BATCH, sampler=sampler, num_workers=workers))


def mapped_copy(split: Split, folder: Path, name: str) -> Split:
    """Store the images of a split in ``folder``, and return the split with its images memory-mapped."""
    parts = split.images.split(SHARD_IMAGES)
    return Split(MappedImages(cached_shards(folder, name, [lambda part=part: part for part in parts])), split.labels)


def compare_batches(root: str, cache: str | None, rounds: int) -> dict[str, Any]:
    """Return the times of laps of 20 batches, and how many batches are read in the time of a training step."""
    data = CIFAR10(root, cache=cache, batch_size=BATCH)
    with tempfile.TemporaryDirectory() as name:
        mapped = Given(data.spec, {key: mapped_copy(split, Path(name), key) for key, split in data.splits.items()})
        train = data.split("train")
        streams: dict[str, Iterator[tuple[Tensor, Any]]] = {
            "in memory": iter(data.train_dataloader()),
            "memory-mapped": iter(mapped.train_dataloader()),
            "torchvision, 0 workers": dataloader(train, 0),
            "torchvision, 2 workers": dataloader(train, 2),
        }
        check_same_work(data, train, streams)
        network = UNet(data.spec.shape, data.spec.shape[0], channels=CHANNELS, dropout=0.0)
        t = torch.randint(1000, (BATCH,)).float()

        def loss(x: Tensor, noise: Tensor) -> Tensor:
            return F.mse_loss(network(x, t, {}), noise)

        step, (x, noise) = PlainLoop(network, loss), torch.randn(2, BATCH, *data.spec.shape)

        def lap(batches: Iterator[Any]) -> None:
            for _ in islice(batches, BATCHES_PER_LAP):
                pass

        variants = {key: lambda batches=batches: lap(batches) for key, batches in streams.items()}
        laps = take_turns(variants, rounds)
        ours = {key: variants[key] for key in ("in memory", "memory-mapped")}
        of_step = take_turns({**ours, "training step": lambda: step.step(x, noise)}, STEPS)
    return {
        "setting": f"{BATCHES_PER_LAP} batches of {BATCH} images 3x32x32",
        "variants": compare(laps, base="torchvision, 0 workers"),
        "batches_per_second": {
            key: round(BATCHES_PER_LAP / statistics.median(lap.wall), 1) for key, lap in laps.items()
        },
        "step": {
            "setting": f"{BATCHES_PER_LAP} batches, and a step of the U-Net with {CHANNELS} channels",
            "variants": compare(of_step, base="training step"),
            "batches_per_step": {key: batches_per_step(of_step[key], of_step["training step"]) for key in ours},
        },
    }


def batches_per_step(loader: Laps, step: Laps) -> dict[str, list[float]]:
    """Return how many batches are read in the time of a training step: median and interval, wall and processor time."""
    pairs = {"wall": zip(step.wall, loader.wall, strict=True), "cpu": zip(step.cpu, loader.cpu, strict=True)}
    return {
        key: [round(value, 1) for value in median_interval([BATCHES_PER_LAP * a / b for a, b in found])]
        for key, found in pairs.items()
    }


def check_same_work(data: ImageData, train: Split, streams: Mapping[str, Iterator[tuple[Tensor, Any]]]) -> None:
    """Check that torchvision's pixels are ours, and that all batches have the same form."""
    for images, _ in (next(stream) for stream in streams.values()):
        assert (tuple(images.shape), images.dtype) == ((BATCH, *data.spec.shape), torch.float32)
        assert -1 <= float(images.min()) < -0.9 and 0.9 < float(images.max()) <= 1
    to_input = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)])
    theirs = torch.stack([InMemoryCIFAR10(train, to_input)[k][0] for k in range(8)])
    assert torch.allclose(theirs, data.normalize(train[slice(8)].images), atol=1e-6)


# Folders


def write_jpegs(folder: Path) -> dict[int, Path]:
    """Write the files of the largest folder, and return a folder for each size that links to the first files."""
    random, start = np.random.default_rng(0), 0
    found: dict[int, Path] = {}
    for size in SIZES:
        part = folder / f"files_{start}"
        part.mkdir()
        for k in range(start, size):
            coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(part / f"{k:06}.jpg", quality=90)
        found[size] = folder / str(size)
        found[size].mkdir()
        for linked in sorted(folder.glob("files_*")):
            (found[size] / linked.name).symlink_to(linked)
        start = size
    return found


class Memory:
    """The memory of this process in MiB: its own (anonymous) pages, and pages of memory-mapped files.

    A thread reads it every few milliseconds, since Linux keeps no peak of the two parts.
    """

    def __init__(self) -> None:
        self.anonymous = self.mapped = 0.0

    @staticmethod
    def read() -> tuple[float, float]:
        with open("/proc/self/status") as file:
            status = dict(line.split(":", 1) for line in file)
        anonymous, mapped, in_memory = (
            int(status[f"Rss{kind}"].split()[0]) / 1024 for kind in ("Anon", "File", "Shmem")
        )
        return anonymous, mapped + in_memory  # files of a temporary folder in memory count as shared memory

    def update(self) -> None:
        anonymous, mapped = self.read()
        self.anonymous, self.mapped = max(self.anonymous, anonymous), max(self.mapped, mapped)

    @contextmanager
    def watched(self) -> Iterator[Memory]:
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.005):
                self.update()

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield self
        finally:
            done.set()
            thread.join()
            self.update()


def measure_folder(root: Path, cache: Path) -> dict[str, float]:
    """Index, decode, open again, and read one epoch in this process, and return seconds and MiB."""
    file_formats.MAX_IN_MEMORY_BYTES, file_formats.SHARD_BYTES = 0, SHARD_BYTES
    result: dict[str, float] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        result[f"{name}_seconds"] = time.perf_counter() - wall
        result[f"{name}_processor_seconds"] = time.process_time() - cpu

    warm_up = np.zeros((SIDE, SIDE, 3), np.uint8)
    Image.fromarray(warm_up).save(cache / "warm_up.jpg")
    file_formats.decode(open_archive(cache), ["warm_up.jpg"])  # imports the decoders
    anonymous, mapped = Memory.read()
    with Memory().watched() as memory:
        with timed("index"):
            archive = open_archive(root)
            archive.fingerprint(archive.names)
        with timed("index_and_decode"):
            ImageFolder(root, cache=cache).split("train")
        result["decode_added_mib"] = memory.anonymous - anonymous
    with Memory().watched() as memory:
        with timed("open"):
            data = ImageFolder(root, cache=cache, batch_size=BATCH)
            data.hash("train")
        with timed("epoch"):
            for _ in islice(data.train_dataloader(), len(data.split("train")) // BATCH):
                pass
        result["train_added_mib"], result["train_mapped_mib"] = memory.anonymous - anonymous, memory.mapped - mapped
    for kind in ("seconds", "processor_seconds"):
        result[f"decode_{kind}"] = result[f"index_and_decode_{kind}"] - result[f"index_{kind}"]
        del result[f"index_and_decode_{kind}"]
    return {"imported_mib": anonymous, **result, "peak_mib": peak_mib()}


def power_law(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Fit log(value) = log(a) + b log(size) by least squares, and return (a, b)."""
    b, log_a = np.polyfit(np.log(sizes), np.log(values), 1)
    return math.exp(log_a), float(b)


def measure_folders(repeats: int) -> dict[str, Any]:
    """Return the fastest of ``repeats`` runs for each size, the fitted growth, and what it predicts."""
    runs: dict[int, list[dict[str, float]]] = {size: [] for size in SIZES}
    with tempfile.TemporaryDirectory() as name:
        folders = write_jpegs(Path(name))
        file_bytes = np.mean([path.stat().st_size for path in folders[SIZES[0]].glob("*/*.jpg")])
        for _ in range(repeats):
            for size, folder in folders.items():
                with tempfile.TemporaryDirectory() as cache:
                    threads = ["--threads", str(torch.get_num_threads())]
                    command = [sys.executable, __file__, "--measure", str(folder), cache, *threads]
                    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                runs[size].append(json.loads(output.splitlines()[-1]))
    best = {size: {key: min(run[key] for run in found) for key in found[0]} for size, found in runs.items()}
    fits = {}
    for key in best[SIZES[0]]:
        if key not in ("imported_mib", "peak_mib"):
            values = [max(best[size][key], 1e-3) for size in SIZES]
            factor, exponent = power_law(SIZES, values)
            fits[key] = {"exponent": round(exponent, 3), f"at_{PREDICTED}": round(factor * PREDICTED**exponent, 2)}
    for key in ("decode_added_mib", "train_added_mib"):
        # A buffer of constant size and the names of the files add up, so a straight line predicts more than a power.
        slope, intercept = np.polyfit(SIZES, [best[size][key] for size in SIZES], 1)
        fits[key] |= {
            "bytes_per_file": round(slope * MIB, 1),
            f"line_at_{PREDICTED}": round(intercept + slope * PREDICTED),
        }
    return {
        "setting": f"JPEG files of 3x{SIDE}x{SIDE}, shards of {SHARD_BYTES / MIB:.0f} MiB, the best of {repeats} runs",
        "bytes_per_jpeg": round(float(file_bytes)),
        "sizes": {str(size): {key: round(value, 4) for key, value in row.items()} for size, row in best.items()},
        "growth": fits,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the loading of images.")
    parser.add_argument("--rounds", type=int, default=60, help="laps of each variant")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3, help="runs of each folder size")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--measure", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.measure:
        print(json.dumps(measure_folder(*options.measure)))
        return
    torch.manual_seed(0)
    result: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    result |= machine()
    if "batches" in options.parts:
        root = os.environ.get("GENCOMPARE_DATA", "data")
        part = result["batches"] = compare_batches(root, os.environ.get("GENCOMPARE_CACHE"), options.rounds)
        print(table(part["setting"], part["variants"]), flush=True)
        for name, ratios in part["step"]["batches_per_step"].items():
            median, low, high = ratios["wall"]
            print(f"  {name:24}{median:9,.0f} [{low:,.0f}, {high:,.0f}] batches in the time of a training step")
    if "folders" in options.parts:
        part = result["folders"] = measure_folders(options.repeats)
        print(part["setting"])
        for key, growth in part["growth"].items():
            values = "".join(f"{row[key]:12,.2f}" for row in part["sizes"].values())
            print(f"  {key:28}{values}  n^{growth['exponent']:.2f}, {growth[f'at_{PREDICTED}']:,.0f} at {PREDICTED:,}")
    write_json(options.out, result)
    print(f"Written to {options.out}.")


if __name__ == "__main__":
    main()
