"""Fashion-MNIST: pictures of clothes, 60,000 for training and 10,000 for test, 28x28 grey (Xiao et al. 2017)."""

from __future__ import annotations

from typing import ClassVar

from gencompare.contract import DataSpec
from gencompare.data.mnist import MNIST


class FashionMNIST(MNIST):
    """As `MNIST`, whose file format and numbers it shares; torchvision's folder is ``FashionMNIST/raw``.

    Debian's package ``dataset-fashion-mnist`` puts the files in ``/usr/share/datasets/fashion-mnist``. Images are not
    mirrored by default: all shoes and boots point to the left, and a mirrored one is no image of this set.
    """

    spec = DataSpec(name="fashion_mnist", shape=(1, 32, 32), num_classes=10, padding=2)
    torchvision: ClassVar[str] = "FashionMNIST"
    sha256: ClassVar[dict[str, str]] = {
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    }
