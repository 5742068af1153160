"""CIFAR-10 (Krizhevsky 2009): 32x32 RGB photographs in ten classes, 50,000 for training and 10,000 for testing."""

from __future__ import annotations

import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gencompare.data.archives import candidate_paths, find_or_download, open_archive
from gencompare.data.datamodule import ImageData, Split, hold_out, shuffle
from gencompare.data.file_formats import decode_cached, read_cifar_batch
from gencompare.errors import UserError
from gencompare.generative_model import DataSpec

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGES_PER_CLASS = {"train": 5000, "test": 1000}
VAL_SIZE = 5000
BATCH_FILES = {"train": tuple(f"data_batch_{k}" for k in range(1, 6)), "test": ("test_batch",)}
PNG_PATH = re.compile(rf"(?:.*/)?(train|test)/({'|'.join(CLASSES)})/([^/]+\.png)")

CIFARSplit = tuple[Tensor, list[int], list[str]]
"""Images (n, 3, 32, 32), labels and file names of one official split."""


class CIFAR10(ImageData):
    """CIFAR-10, with 5,000 of the training images held out for validation.

    ``root`` or ``root/cifar10`` contains either the Python release in torchvision's folder ``cifar-10-batches-py``, or
    PNG files such as ``train/airplane/aeroplane_s_000004.png`` in a folder or in ``cifar10.zip``. ``root`` may also be
    the zip file itself. Images are sorted by class and original file name before they are shuffled, so all formats give
    the same splits and hashes.

    Args:
        root: folder with the files.
        cache: folder for the decoded PNG files; None decodes them at every start.
        download: download missing files into ``root`` (in torchvision's layout, 170 MB).
        common: arguments of `ImageData`.
    """

    spec = DataSpec(name="cifar10", shape=(3, 32, 32), num_classes=10)

    def __init__(
        self, root: str | Path, *, cache: str | Path | None = None, download: bool = False, **common: Any
    ) -> None:
        super().__init__(**common)
        self.root, self.download = Path(root).expanduser(), download
        self.cache = None if cache is None else Path(cache).expanduser()

    def load(self) -> dict[str, Split]:
        read = find_or_download(
            self._find_reader,
            name=self.spec.name,
            root=self.root,
            expected_files="cifar-10-batches-py/ or cifar10.zip",
            torchvision_class="CIFAR10" if self.download else None,
        )
        train, test = (_sorted_split(part, name, self.root) for name, part in read().items())
        train, val = hold_out(train, VAL_SIZE, "cifar10", "split")
        return {"train": train, "val": val, "test": shuffle(test, "cifar10", "test")}

    def _find_reader(self) -> partial[dict[str, CIFARSplit]] | None:
        """Return a function that reads the files, or None if there are none."""
        for folder in candidate_paths(self.root, "cifar10", ("cifar-10-batches-py", "")):
            if all((folder / name).is_file() for names in BATCH_FILES.values() for name in names):
                return partial(_read_python_release, folder)
        for path in candidate_paths(self.root, "cifar10", ("cifar10.zip", "")):
            if (path.suffix == ".zip" and path.is_file()) or (path / "train" / CLASSES[0]).is_dir():
                return partial(_read_png_files, path, self.cache)
        return None


def _read_python_release(folder: Path) -> dict[str, CIFARSplit]:
    splits = {}
    for split, names in BATCH_FILES.items():
        batches = [read_cifar_batch(folder / name) for name in names]
        try:
            images = torch.cat([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
            labels = [int(label) for batch in batches for label in batch["labels"]]
            splits[split] = images, labels, [str(name) for batch in batches for name in batch["filenames"]]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{folder} does not contain CIFAR-10 ({error!r}): download it again.") from error
    return splits


def _read_png_files(path: Path, cache: Path | None) -> dict[str, CIFARSplit]:
    archive = open_archive(path)
    found = [(name, match) for name in archive.names if (match := PNG_PATH.fullmatch(name))]
    images = decode_cached(archive, [name for name, _ in found], cache=cache, channels=3)
    splits = {}
    for split in BATCH_FILES:
        rows = [k for k, (_, match) in enumerate(found) if match[1] == split]
        splits[split] = images[rows], [CLASSES.index(found[k][1][2]) for k in rows], [found[k][1][3] for k in rows]
    return splits


def _sorted_split(part: CIFARSplit, name: str, root: Path) -> Split:
    """Sort images by class and file name. Raise `UserError` if images are missing or not 32x32."""
    images, labels, file_names = part
    counts = Counter(labels)
    expected = dict.fromkeys(range(10), IMAGES_PER_CLASS[name])
    if not len(images) == len(labels) == len(file_names) or counts != expected:
        raise UserError(
            f"Data set 'cifar10' in {root} is incomplete: its {name} split has {len(images):,} images instead of"
            f" {10 * IMAGES_PER_CLASS[name]:,} in ten equal classes. Download it again."
        )
    if images.shape[1:] != (3, 32, 32):
        raise UserError(f"Data set 'cifar10' in {root} has images that are not 32x32: download it again.")
    order = torch.tensor(sorted(range(len(labels)), key=lambda k: (labels[k], file_names[k])))
    return Split(images, torch.tensor(labels))[order]
