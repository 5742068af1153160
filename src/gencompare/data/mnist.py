"""MNIST and Fashion-MNIST."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from gencompare.data import file_formats
from gencompare.data.archives import candidate_paths, find_or_download
from gencompare.data.datamodule import ImageData, Split, hold_out, shuffle
from gencompare.errors import UserError
from gencompare.generative_model import DataSpec

VAL_SIZE = 5000


class MNIST(ImageData):
    """MNIST from its four IDX files, padded to 32x32, with 5,000 of the training images held out for validation.

    ``root`` or ``root/mnist`` contains the files, gzipped or not, directly or in torchvision's folder ``MNIST/raw``.
    Other data sets use the same file names, so the uncompressed content must have the official SHA-256.

    Args:
        root: folder with the files.
        download: download missing files into ``root`` (in torchvision's layout).
        common: arguments of `ImageData`.
    """

    spec = DataSpec(name="mnist", shape=(1, 32, 32), num_classes=10, padding=2)
    torchvision_class: ClassVar[str] = "MNIST"
    sha256: ClassVar[dict[str, str]] = {
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    }

    def __init__(self, root: str | Path, *, download: bool = False, **common: Any) -> None:
        super().__init__(**common)
        self.root, self.download = Path(root).expanduser(), download

    def load(self) -> dict[str, Split]:
        paths = find_or_download(
            self._find,
            name=self.spec.name,
            root=self.root,
            expected_files=f"{', '.join(self.sha256)} (or .gz)",
            torchvision_class=self.torchvision_class if self.download else None,
        )
        arrays = {
            name: self._read(path, digest) for (name, digest), path in zip(self.sha256.items(), paths, strict=True)
        }
        train, test = (
            Split(arrays[f"{part}-images-idx3-ubyte"][:, None], arrays[f"{part}-labels-idx1-ubyte"].long())
            for part in ("train", "t10k")
        )
        train, val = hold_out(train, VAL_SIZE, self.spec.name, "split")
        return {"train": train, "val": val, "test": shuffle(test, self.spec.name, "test")}

    def _find(self) -> list[Path] | None:
        """Return the four files in the order of ``sha256``, or None if no folder contains all of them."""
        layouts = (f"{self.torchvision_class}/raw", "raw", "")
        for folder in candidate_paths(self.root, self.spec.name, layouts):
            files = [next((p for p in (folder / n, folder / f"{n}.gz") if p.is_file()), None) for n in self.sha256]
            found = [file for file in files if file is not None]
            if len(found) == len(files):
                return found
        return None

    def _read(self, path: Path, digest: str) -> Tensor:
        content = file_formats.decompress(path)
        if hashlib.sha256(content).hexdigest() != digest:
            raise UserError(
                f"{path} is not the official file of data set '{self.spec.name}': download it again, or set"
                " data.root=DIR."
            )
        return file_formats.parse_idx(content, path)


class FashionMNIST(MNIST):
    """Fashion-MNIST, with the same file format and sizes as `MNIST`; torchvision's folder is ``FashionMNIST/raw``.

    The Debian package ``dataset-fashion-mnist`` installs the files in ``/usr/share/datasets/fashion-mnist``. Images are
    not flipped by default: all shoes and boots point to the left, so flipped images are out of distribution.
    """

    spec = DataSpec(name="fashion_mnist", shape=(1, 32, 32), num_classes=10, padding=2)
    torchvision_class: ClassVar[str] = "FashionMNIST"
    sha256: ClassVar[dict[str, str]] = {
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    }
