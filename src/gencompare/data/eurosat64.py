"""A fixed subset of EuroSAT RGB (Helber et al. 2019): 64x64 satellite images in ten classes of land use."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from gencompare.data.archives import candidate_paths, find_or_download, open_archive
from gencompare.data.datamodule import ImageData, Split, hold_out, shuffle
from gencompare.data.file_formats import decode_cached
from gencompare.errors import UserError
from gencompare.generative_model import DataSpec

CLASSES = (
    "AnnualCrop",
    "Forest",
    "HerbaceousVegetation",
    "Highway",
    "Industrial",
    "Pasture",
    "PermanentCrop",
    "Residential",
    "River",
    "SeaLake",
)
TRAIN_NUMBERS, TEST_NUMBERS = range(1, 501), range(501, 551)
"""File numbers of each class in the training and test splits. The authors define no official split."""
VAL_SIZE = 500
IMAGE_PATH = re.compile(rf"(?:.*/)?({'|'.join(CLASSES)})_(\d+)\.jpg")
ARCHIVES = ("eurosat64.zip", "EuroSAT_RGB.zip", "EuroSAT.zip")
FOLDERS = ("eurosat/2750", "2750", "EuroSAT_RGB", "")


class EuroSAT64(ImageData):
    """5,000 training images (500 of them held out for validation) and 500 test images, at their original size.

    In each class, the files numbered 1 to 500 are for training and 501 to 550 for testing; the rest of the 27,000
    images are not used. The files are read from ``eurosat64.zip`` (the subset), the official ``EuroSAT_RGB.zip`` or
    ``EuroSAT.zip``, or a folder unpacked from one of these, such as torchvision's ``eurosat/2750``. ``root`` may also
    be the zip file itself. Satellite images have no preferred orientation, so they may be flipped.

    Args:
        root: folder with the files.
        cache: folder for the decoded files; None decodes them at every start.
        common: arguments of `ImageData`.
    """

    spec = DataSpec(name="eurosat64", shape=(3, 64, 64), num_classes=10)

    def __init__(self, root: str | Path, *, cache: str | Path | None = None, **common: Any) -> None:
        super().__init__(**common)
        self.root = Path(root).expanduser()
        self.cache = None if cache is None else Path(cache).expanduser()

    def load(self) -> dict[str, Split]:
        path = find_or_download(
            self._find,
            name=self.spec.name,
            root=self.root,
            expected_files="eurosat64.zip or EuroSAT_RGB.zip (github.com/phelber/EuroSAT)",
            torchvision_class=None,
        )
        archive = open_archive(path)
        files = {}
        for name in archive.names:
            if match := IMAGE_PATH.fullmatch(name):
                files[CLASSES.index(match[1]), int(match[2])] = name
        keys = [(label, number) for label in range(10) for number in (*TRAIN_NUMBERS, *TEST_NUMBERS)]
        if missing := [key for key in keys if key not in files]:
            label, number = missing[0]
            raise UserError(
                f"Data set 'eurosat64' in {path} is incomplete: {len(missing):,} of {len(keys):,} images are missing,"
                f" such as {CLASSES[label]}_{number}.jpg. Download it again."
            )
        images = decode_cached(archive, [files[key] for key in keys], cache=self.cache, channels=3)
        if images.shape[1:] != self.spec.shape:
            raise UserError(f"Data set 'eurosat64' in {path} has images that are not 64x64: download it again.")
        subset = Split(images, torch.tensor([label for label, _ in keys]))
        is_test = torch.tensor([number in TEST_NUMBERS for _, number in keys])
        train, val = hold_out(subset[~is_test], VAL_SIZE, "eurosat64", "split")
        return {"train": train, "val": val, "test": shuffle(subset[is_test], "eurosat64", "test")}

    def _find(self) -> Path | None:
        for path in candidate_paths(self.root, self.spec.name, (*ARCHIVES, *FOLDERS)):
            if path.suffix == ".zip" and path.is_file():
                return path
            if any((path / split / CLASSES[0]).is_dir() for split in ("train", "")):
                return path
        return None
