"""EuroSAT (RGB): satellite pictures of land in Europe, 64x64, ten kinds of use (Helber et al. 2019), a fixed subset."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from gencompare.data.archives import candidate_paths, obtain, open_archive
from gencompare.data.datamodule import ImageData, Split, hold_out, shuffled
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
TRAIN, TEST = range(1, 501), range(501, 551)
"""Numbers of a class's files in each split: the authors define no split, so this is the one used here."""
VAL = 500
PICTURE = re.compile(rf"(?:.*/)?({'|'.join(CLASSES)})_(\d+)\.jpg")
ARCHIVES = ("eurosat64.zip", "EuroSAT_RGB.zip", "EuroSAT.zip")
FOLDERS = ("eurosat/2750", "2750", "EuroSAT_RGB", "")


class EuroSAT64(ImageData):
    """5,000 training images (500 of them held out for validation) and 500 for test, in the size they were released in.

    Of each class the files numbered 1 to 500 are for training and 501 to 550 for test, wherever they lie: in
    ``eurosat64.zip`` (these files alone), in the authors' own ``EuroSAT_RGB.zip`` or ``EuroSAT.zip``, or in a folder
    unpacked from one of them, as torchvision's ``eurosat/2750`` is. The full set has 27,000 images; the others are
    left out. ``root`` may be the zip file itself. Land seen from above has no left and right: images may be mirrored.

    Args:
        root: folder in which to look.
        cache: folder for the decoded files; None decodes them at every start.
    """

    spec = DataSpec(name="eurosat64", shape=(3, 64, 64), num_classes=10)

    def __init__(self, root: str | Path, *, cache: str | Path | None = None, **common: Any) -> None:
        super().__init__(**common)
        self.root = Path(root).expanduser()
        self.cache = None if cache is None else Path(cache).expanduser()

    def load(self) -> dict[str, Split]:
        place = obtain(
            self._find,
            name=self.spec.name,
            root=self.root,
            wanted="eurosat64.zip or EuroSAT_RGB.zip (github.com/phelber/EuroSAT)",
            torchvision=None,
        )
        archive = open_archive(place)
        files = {}
        for name in archive.names:
            if match := PICTURE.fullmatch(name):
                files[CLASSES.index(match[1]), int(match[2])] = name
        wanted = [(label, number) for label in range(10) for number in (*TRAIN, *TEST)]
        if lacking := [key for key in wanted if key not in files]:
            label, number = lacking[0]
            raise UserError(
                f"Data 'eurosat64' in {place} is incomplete: {len(lacking):,} of {len(wanted):,} images are missing,"
                f" the first is {CLASSES[label]}_{number}.jpg. Fetch it again."
            )
        images = decode_cached(archive, [files[key] for key in wanted], cache=self.cache, channels=3)
        if images.shape[1:] != self.spec.shape:
            raise UserError(f"Data 'eurosat64' in {place} has images of another size than 64x64: fetch it again.")
        whole = Split(images, torch.tensor([label for label, _ in wanted]))
        is_test = torch.tensor([number in TEST for _, number in wanted])
        train, val = hold_out(whole[~is_test], VAL, "eurosat64", "split")
        return {"train": train, "val": val, "test": shuffled(whole[is_test], "eurosat64", "test")}

    def _find(self) -> Path | None:
        for place in candidate_paths(self.root, self.spec.name, (*ARCHIVES, *FOLDERS)):
            if place.suffix == ".zip" and place.is_file():
                return place
            if any((place / split / CLASSES[0]).is_dir() for split in ("train", "")):
                return place
        return None
