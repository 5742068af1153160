"""CIFAR-10: photographs of ten kinds of things, 50,000 to train on and 10,000 for test, 32x32 RGB (Krizhevsky 2009)."""

from __future__ import annotations

import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gencompare.data.archives import candidate_paths, obtain, open_archive
from gencompare.data.datamodule import ImageData, Split, hold_out, shuffled
from gencompare.data.file_formats import decode_cached, read_batch
from gencompare.errors import UserError
from gencompare.generative_model import DataSpec

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PER_CLASS = {"train": 5000, "test": 1000}
VAL = 5000
BATCHES = {"train": tuple(f"data_batch_{k}" for k in range(1, 6)), "test": ("test_batch",)}
PICTURE = re.compile(rf"(?:.*/)?(train|test)/({'|'.join(CLASSES)})/([^/]+\.png)")

CIFARSplit = tuple[Tensor, list[int], list[str]]
"""Images (n, 3, 32, 32), labels and file names of one official split."""


class CIFAR10(ImageData):
    """CIFAR-10; 5,000 of the training images are held out for validation.

    Read from the Python release as torchvision keeps it (``cifar-10-batches-py``), or from PNG files as
    ``train/airplane/aeroplane_s_000004.png`` in a folder or in ``cifar10.zip``; in ``root`` or ``root/cifar10``, which
    may also be the zip file itself. Images are put in the order of class and original file name before they are
    shuffled, so each form gives the same splits, with the same hash.

    Args:
        root: folder in which to look.
        cache: folder for the decoded PNG files; None decodes them at every start.
        download: fetch missing files into ``root`` (in torchvision's layout, 170 MB).
    """

    spec = DataSpec(name="cifar10", shape=(3, 32, 32), num_classes=10)

    def __init__(
        self, root: str | Path, *, cache: str | Path | None = None, download: bool = False, **common: Any
    ) -> None:
        super().__init__(**common)
        self.root, self.download = Path(root).expanduser(), download
        self.cache = None if cache is None else Path(cache).expanduser()

    def load(self) -> dict[str, Split]:
        read = obtain(
            self._find,
            name=self.spec.name,
            root=self.root,
            wanted="cifar-10-batches-py/ or cifar10.zip",
            torchvision="CIFAR10" if self.download else None,
        )
        train, test = (_canonical(part, name, self.root) for name, part in read().items())
        train, val = hold_out(train, VAL, "cifar10", "split")
        return {"train": train, "val": val, "test": shuffled(test, "cifar10", "test")}

    def _find(self) -> partial[dict[str, CIFARSplit]] | None:
        """How to read what is there."""
        for folder in candidate_paths(self.root, "cifar10", ("cifar-10-batches-py", "")):
            if all((folder / name).is_file() for names in BATCHES.values() for name in names):
                return partial(_from_pickles, folder)
        for place in candidate_paths(self.root, "cifar10", ("cifar10.zip", "")):
            if (place.suffix == ".zip" and place.is_file()) or (place / "train" / CLASSES[0]).is_dir():
                return partial(_from_pictures, place, self.cache)
        return None


def _from_pickles(folder: Path) -> dict[str, CIFARSplit]:
    parts = {}
    for split, names in BATCHES.items():
        batches = [read_batch(folder / name) for name in names]
        try:
            images = torch.cat([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
            labels = [int(label) for batch in batches for label in batch["labels"]]
            parts[split] = images, labels, [str(name) for batch in batches for name in batch["filenames"]]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{folder} holds no CIFAR-10 ({error!r}): fetch it again.") from error
    return parts


def _from_pictures(place: Path, cache: Path | None) -> dict[str, CIFARSplit]:
    archive = open_archive(place)
    found = [(name, match) for name in archive.names if (match := PICTURE.fullmatch(name))]
    images = decode_cached(archive, [name for name, _ in found], cache=cache, channels=3)
    parts = {}
    for split in BATCHES:
        rows = [k for k, (_, match) in enumerate(found) if match[1] == split]
        parts[split] = images[rows], [CLASSES.index(found[k][1][2]) for k in rows], [found[k][1][3] for k in rows]
    return parts


def _canonical(part: CIFARSplit, split: str, root: Path) -> Split:
    """The images in the order of class and file name. Raises `UserError` where some are missing."""
    images, labels, names = part
    counts = Counter(labels)
    if not len(images) == len(labels) == len(names) or counts != dict.fromkeys(range(10), PER_CLASS[split]):
        raise UserError(
            f"Data 'cifar10' in {root} is incomplete: its {split} split has {len(images):,} images, not"
            f" {10 * PER_CLASS[split]:,} in ten equal classes. Fetch it again."
        )
    if images.shape[1:] != (3, 32, 32):
        raise UserError(f"Data 'cifar10' in {root} has images of another size than 32x32: fetch it again.")
    order = torch.tensor(sorted(range(len(labels)), key=lambda k: (labels[k], names[k])))
    return Split(images, torch.tensor(labels))[order]
