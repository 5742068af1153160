"""Images that another program drew: a folder or zip of pictures, or the npz layout of guided-diffusion and ADM."""

from __future__ import annotations

import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from gencompare.data.archives import open_archive
from gencompare.data.file_formats import decode_cached
from gencompare.errors import UserError
from gencompare.generative_model import DataSpec

SUFFIXES = {".png", ".jpg", ".jpeg"}


def read_samples(path: Path, spec: DataSpec, *, cache: Path | None = None) -> tuple[Tensor, Tensor | None]:
    """(images, labels): uint8 (n, C, H, W) in the size of ``spec``, padded or not; labels (n,) or None.

    Nothing is resized: images of another size were made for other data. Grey images may have one channel or three equal
    ones, whatever the data; images in colour are refused where the data are grey. Order is that of the file names, or
    of the array. An npz file holds ``arr_0``, uint8 (n, H, W, C) or (n, H, W), and may hold class labels as ``arr_1``.

    Raises:
        UserError: an empty, damaged or truncated archive, a path that leads out of it, mixed sizes, another shape.
    """
    images, labels = _from_array(path) if path.suffix == ".npz" else (_from_pictures(path, cache), None)
    channels, height, width = spec.shape
    images = _in_channels(images, channels, path, spec)
    real = (channels, height - 2 * spec.padding, width - 2 * spec.padding)
    if tuple(images.shape[1:]) not in (real, tuple(spec.shape)):
        raise UserError(
            f"{path} holds images of {_size(images.shape[1:])}, and data '{spec.name}' has {_size(real)}: "
            "samples are measured in the size of the data, and never resized here."
        )
    if labels is not None and len(labels) != len(images):
        raise UserError(f"{path} holds {len(images)} images and {len(labels)} labels: one is wanted for each.")
    if labels is not None and not spec.num_classes:
        raise UserError(f"{path} holds labels (arr_1), and data '{spec.name}' has none: leave arr_1 out.")
    if labels is not None and not (int(labels.min()) >= 0 and int(labels.max()) < spec.num_classes):
        raise UserError(f"{path} holds labels beyond 0 to {spec.num_classes - 1}, the classes of data '{spec.name}'.")
    return images, labels


def _in_channels(images: Tensor, channels: int, path: Path, spec: DataSpec) -> Tensor:
    """Grey images (n, 1 or 3, H, W) in the number of channels of the data; others as they are."""
    if (images.shape[1], channels) == (1, 3):
        return images.repeat(1, 3, 1, 1)
    if (images.shape[1], channels) == (3, 1):
        if bool((images == images[:, :1]).all()):
            return images[:, :1].contiguous()
        raise UserError(
            f"{path} holds images of {_size(images.shape[1:])} that are not grey, and data '{spec.name}' has 1 channel:"
            " convert them to grey before saving."
        )
    return images


def _from_pictures(path: Path, cache: Path | None) -> Tensor:
    if not path.exists():
        raise UserError(f"There is no {path}: samples= names a folder, a zip or an npz file of images.")
    archive = open_archive(path)
    names = [name for name in archive.names if PurePosixPath(name).suffix.lower() in SUFFIXES]
    if not names:
        raise UserError(f"{path} holds no PNG or JPEG images.")
    return decode_cached(archive, names, cache=cache)


def _from_array(path: Path) -> tuple[Tensor, Tensor | None]:
    try:
        with np.load(path, allow_pickle=False) as file:
            if "arr_0" not in file.files:
                raise UserError(f"{path} holds {', '.join(file.files) or 'nothing'}, and no array 'arr_0' of images.")
            array, labels = file["arr_0"], file["arr_1"] if "arr_1" in file.files else None
    except FileNotFoundError as error:
        raise UserError(f"There is no {path}: samples= names a folder, a zip or an npz file of images.") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged, or no npz file of images ({type(error).__name__}).") from error
    if array.ndim == 3:
        array = array[..., None]
    if array.dtype != np.uint8 or array.ndim != 4 or not len(array):
        raise UserError(
            f"{path}: arr_0 is {array.dtype} of shape {array.shape}; images are uint8 (n, height, width, channels)."
        )
    if labels is not None and (labels.ndim != 1 or labels.dtype.kind not in "iu"):
        raise UserError(f"{path}: arr_1 is {labels.dtype} of shape {labels.shape}; labels are whole numbers (n,).")
    images = torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))
    return images, None if labels is None else torch.from_numpy(labels.astype(np.int64))


def _size(shape: tuple[int, ...] | torch.Size) -> str:
    channels, height, width = shape
    return f"{height}x{width} with {channels} channel{'s' if channels > 1 else ''}"
