"""The training stream: batches depend neither on the number of processes nor on where training was resumed."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch

from gencompare.data.datamodule import ImageData, Split, TrainStream
from gencompare.errors import UserError
from gencompare.generative_model import DataSpec

SIZE = 22


class Numbered(ImageData):
    """Image k has pixels (k, 100 + k), so its index and a flip can be read from them."""

    spec = DataSpec(name="numbered", shape=(1, 1, 2), num_classes=SIZE, num_bins=256)

    def load(self) -> dict[str, Split]:
        k = torch.arange(SIZE, dtype=torch.uint8)
        split = Split(torch.stack([k, 100 + k], -1)[:, None, None], k.long())
        return {"train": split, "val": split, "test": split}


def run(steps: int, *, start: int = 0, rank: int = 0, world_size: int = 1, seed: int = 0, flip: Any = True):
    """Return (images, labels) of the batches of one process."""
    data = Numbered(batch_size=8, random_flip=flip, seed=seed)
    stream = TrainStream(data, start_step=start, rank=rank, world_size=world_size, device=torch.device("cpu"))
    return [(x, cond["label"]) for x, cond in islice(stream, steps)]


def test_each_epoch_visits_every_image_once() -> None:
    labels = torch.cat(
        [label for _, label in run(11)]
    )  # 88 = 4 epochs of 22, which is not a multiple of the batch size
    epochs = labels.reshape(4, SIZE)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(SIZE))
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 4, "each epoch has its own order"


def test_a_batch_may_be_larger_than_the_data_set() -> None:
    data = Numbered(batch_size=3 * SIZE + 5)
    stream = TrainStream(data, start_step=1, rank=0, world_size=1, device=torch.device("cpu"))
    counts = torch.bincount(stream.batch_indices(1), minlength=SIZE)
    assert set(counts.tolist()) <= {2, 3, 4} and counts.sum() == 3 * SIZE + 5


def test_flips_affect_half_of_the_images_and_only_their_orientation() -> None:
    steps = 500
    images = torch.cat([x for x, _ in run(steps)])
    labels = torch.cat([label for _, label in run(steps)])
    levels = ((images + 1) / 2 * 255).round().long().squeeze(1).squeeze(1)
    plain = torch.stack([labels, 100 + labels], -1)
    flipped = (levels == plain.flip(-1)).all(-1)
    assert ((levels == plain).all(-1) | flipped).all(), "each image has its own label, flipped or not"
    assert abs(float(flipped.double().mean()) - 0.5) < 5 * 0.5 / (8 * steps) ** 0.5
    by_row = flipped.reshape(steps, 8).double().mean(0)
    assert ((by_row - 0.5).abs() < 5 * 0.5 / steps**0.5).all(), "images at each batch position are both flipped and not"
    unflipped = torch.cat([x for x, _ in run(steps, flip=False)])
    assert torch.equal(torch.where(flipped[:, None, None, None], unflipped.flip(-1), unflipped), images)


def orientations(epochs: int, seed: int = 0) -> torch.Tensor:
    """Return whether alternating flips flip each image in each epoch, (epochs, SIZE)."""
    batches = run(epochs * SIZE // 8, flip="alternating", seed=seed)
    images, labels = (torch.cat(values) for values in zip(*batches, strict=True))
    flipped = images[:, 0, 0, 0] > images[:, 0, 0, 1]
    epoch_of = torch.arange(len(labels)) // SIZE
    found = torch.zeros(epochs, SIZE, dtype=torch.bool)
    found[epoch_of, labels] = flipped
    return found


def test_two_consecutive_epochs_of_alternating_flips_show_each_image_once_in_each_orientation() -> None:
    found = orientations(epochs=8)
    assert (found[1:] != found[:-1]).all()
    assert 0 < int(found[0].sum()) < SIZE, "each epoch has images of both orientations"
    assert not torch.equal(found[0], orientations(epochs=4, seed=1)[0]), "the first orientation is random"


def test_unknown_flips_are_an_error() -> None:
    with pytest.raises(UserError, match=r"data\.random_flip=always must be true, false or alternating"):
        run(1, flip="always")


@pytest.mark.parametrize("flip", [True, "alternating"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_divide_the_same_global_batch(world_size: int, flip: Any) -> None:
    whole = run(9, flip=flip)
    parts = [run(9, rank=rank, world_size=world_size, flip=flip) for rank in range(world_size)]
    for step, (x, label) in enumerate(whole):
        assert torch.equal(torch.cat([part[step][0] for part in parts]), x), "images, including their flips"
        assert torch.equal(torch.cat([part[step][1] for part in parts]), label)


@pytest.mark.parametrize("flip", [True, "alternating"])
@pytest.mark.parametrize("start", [1, 2, 3, 7])
def test_a_stream_started_later_gives_the_same_batches(start: int, flip: Any) -> None:
    for (x, label), (y, other) in zip(run(10, flip=flip)[start:], run(10 - start, start=start, flip=flip), strict=True):
        assert torch.equal(x, y) and torch.equal(label, other)


def test_the_order_depends_on_the_seed() -> None:
    labels = [torch.cat([label for _, label in run(5, seed=seed)]) for seed in (0, 0, 1)]
    assert torch.equal(labels[0], labels[1]) and not torch.equal(labels[0], labels[2])


def test_indivisible_batch_size_is_an_error() -> None:
    with pytest.raises(UserError, match=r"global_batch_size=8 .* 3 processes: choose a multiple of 3"):
        run(1, world_size=3)
