"""The training stream: what is learned at a step depends on neither the processes nor on where a run began."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from gencompare.data.datamodule import ImageData, Split, TrainStream
from gencompare.errors import UserError
from gencompare.generative_model import DataSpec

SIZE = 22


class Numbered(ImageData):
    """Image k is (k, 100 + k): its place and its side can be read off."""

    spec = DataSpec(name="numbered", shape=(1, 1, 2), num_classes=SIZE, num_levels=256)

    def load(self) -> dict[str, Split]:
        k = torch.arange(SIZE, dtype=torch.uint8)
        whole = Split(torch.stack([k, 100 + k], -1)[:, None, None], k.long())
        return {"train": whole, "val": whole, "test": whole}


def run(steps: int, *, start: int = 0, rank: int = 0, world: int = 1, seed: int = 0, flip: bool = True):
    """(images, labels) of some steps of one process."""
    data = Numbered(batch_size=8, flip=flip, seed=seed)
    stream = TrainStream(data, start_step=start, rank=rank, world=world, device=torch.device("cpu"))
    return [(x, cond["label"]) for x, cond in islice(stream, steps)]


def test_each_image_once_an_epoch() -> None:
    labels = torch.cat([label for _, label in run(11)])  # 88 = 4 epochs of 22, no multiple of the batch
    epochs = labels.reshape(4, SIZE)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(SIZE))
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 4, "each epoch in an order of its own"


def test_a_batch_larger_than_the_data_set() -> None:
    data = Numbered(batch_size=3 * SIZE + 5)
    stream = TrainStream(data, start_step=1, rank=0, world=1, device=torch.device("cpu"))
    counts = torch.bincount(stream.rows(1), minlength=SIZE)
    assert set(counts.tolist()) <= {2, 3, 4} and counts.sum() == 3 * SIZE + 5


def test_flips_mirror_half_of_the_images_and_nothing_else() -> None:
    steps = 500
    images = torch.cat([x for x, _ in run(steps)])
    labels = torch.cat([label for _, label in run(steps)])
    levels = ((images + 1) / 2 * 255).round().long().squeeze(1).squeeze(1)
    plain = torch.stack([labels, 100 + labels], -1)
    flipped = (levels == plain.flip(-1)).all(-1)
    assert ((levels == plain).all(-1) | flipped).all(), "an image goes with its own label, as it is or mirrored"
    assert abs(float(flipped.double().mean()) - 0.5) < 5 * 0.5 / (8 * steps) ** 0.5
    by_row = flipped.reshape(steps, 8).double().mean(0)
    assert ((by_row - 0.5).abs() < 5 * 0.5 / steps**0.5).all(), "in each row of the batch"
    unflipped = torch.cat([x for x, _ in run(steps, flip=False)])
    assert torch.equal(torch.where(flipped[:, None, None, None], unflipped.flip(-1), unflipped), images)


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_same_global_batch(world: int) -> None:
    whole = run(9)
    parts = [run(9, rank=rank, world=world) for rank in range(world)]
    for step, (x, label) in enumerate(whole):
        assert torch.equal(torch.cat([part[step][0] for part in parts]), x), "images, flips included"
        assert torch.equal(torch.cat([part[step][1] for part in parts]), label)


@pytest.mark.parametrize("start", [1, 2, 3, 7])
def test_a_later_start_gives_the_same_batches(start: int) -> None:
    for (x, label), (y, other) in zip(run(10)[start:], run(10 - start, start=start), strict=True):
        assert torch.equal(x, y) and torch.equal(label, other)


def test_the_seed_decides_the_order() -> None:
    labels = [torch.cat([label for _, label in run(5, seed=seed)]) for seed in (0, 0, 1)]
    assert torch.equal(labels[0], labels[1]) and not torch.equal(labels[0], labels[2])


def test_a_batch_that_cannot_be_shared_out_is_refused() -> None:
    with pytest.raises(UserError, match=r"global_batch_size=8 .* 3 processes: choose a multiple of 3"):
        run(1, world=3)
