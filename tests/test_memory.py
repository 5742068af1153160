"""Out of memory: sampling splits the network calls, and every other case gets one line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gencompare.batch_splitting import split_when_out_of_memory
from gencompare.evaluation.sampling import draw_samples
from gencompare.generative_model import DataSpec
from gencompare.tasks.runs.error_reports import print_error


class Limited(nn.Module):
    """A network that runs out of memory above ``limit`` samples."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.sizes = limit, list[int]()
        self.layer = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor, cond: dict[str, Tensor], scale: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        self.sizes.append(len(x))
        if len(x) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.layer(x).tanh() * scale, {"label": cond["label"] + 1}


class Model:
    """A model that samples in two network calls."""

    spec = DataSpec("tiny", (1, 4, 4), 3)

    def __init__(self, limit: int) -> None:
        torch.manual_seed(0)
        self.network = Limited(limit)

    def nfe_networks(self) -> dict[str, nn.Module]:
        return {"network": self.network}

    def sample(self, n: int, cond: Any = None, *, generator: torch.Generator) -> Tensor:
        x = torch.randn(n, 1, 4, 4, generator=generator)
        cond = {"label": torch.arange(n)}
        for _ in range(2):
            x, out = self.network(x, cond, scale=torch.tensor(0.5))
            assert torch.equal(out["label"], torch.arange(n) + 1), "the parts are joined in order"
        return x


@pytest.mark.parametrize("limit", [1, 3, 7, 20])
def test_sampling_with_less_memory_gives_the_same_images(limit: int) -> None:
    enough, limited = Model(100), Model(limit)
    expected = draw_samples(enough, 20, chunk_size=20, postprocess=lambda x, spec: x)
    samples = draw_samples(limited, 20, chunk_size=20, postprocess=lambda x, spec: x)
    assert torch.allclose(samples.images, expected.images, atol=1e-6)
    assert samples.nfe == expected.nfe == {"network": 2}, "parts of a call do not count as calls"
    assert limited.network.forward == Limited.forward.__get__(limited.network), "the network is unchanged afterwards"


def test_the_number_of_parts_stays_for_later_calls() -> None:
    model = Model(5)
    draw_samples(model, 20, chunk_size=20, postprocess=lambda x, spec: x)
    assert model.network.sizes == [20, 10, *[5] * 4, *[5] * 4]


def test_a_single_sample_that_does_not_fit_is_an_error() -> None:
    model = Model(0)
    with pytest.raises(torch.OutOfMemoryError), split_when_out_of_memory([model.network]):
        model.network(torch.zeros(4, 1, 4, 4), {"label": torch.arange(4)}, torch.tensor(1.0))
    assert model.network.sizes == [4, 2, 1]


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried ...")])
def test_out_of_memory_is_explained_in_one_line(error: BaseException, capsys: Any) -> None:
    assert print_error(error) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Error: Out of memory.") and "trainer.num_micro_batches=2" in line and "chunk_size" in line
