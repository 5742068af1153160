"""Muon with AdamW: exact updates, resuming, memory formats and refusals."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from gencompare.errors import UserError
from gencompare.training.optimizers import Muon, match_memory_format

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon")

LR = 1e-2


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 16, 3), nn.SiLU(), nn.Conv2d(16, 16, 3), nn.GroupNorm(4, 16), nn.Conv2d(16, 1, 3))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterator[int] | range) -> None:
    for step in steps:
        x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_update_of_a_hidden_matrix_is_semi_orthogonal() -> None:
    """The first step is the orthogonalised gradient; Newton-Schulz leaves singular values between about 0.7 and 1.2."""
    model = network()
    before = model[2].weight.detach().clone()
    train(model, Muon(model.parameters(), lr=LR), range(1))
    update = (before - model[2].weight.detach()).flatten(1) / (LR * 0.2 * math.sqrt(144))
    assert ((values := torch.linalg.svdvals(update)) > 0.5).all() and (values < 1.5).all()
    gradient = model[2].weight.grad.flatten(1)
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    cosine = torch.sum(update * (left @ right)) / (update.norm() * (left @ right).norm())
    assert cosine > 0.97


def test_parameters_that_are_not_hidden_matrices_take_steps_of_adamw() -> None:
    """Biases, normalisations, and the layers that read and write images."""
    ours, theirs = network(), network()
    train(ours, Muon(ours.parameters(), lr=LR, weight_decay=0.1), range(1))
    train(theirs, torch.optim.AdamW(theirs.parameters(), lr=LR, weight_decay=0.1), range(1))
    same = [name for name, p in ours.named_parameters() if torch.equal(p, theirs.get_parameter(name))]
    assert same == [name for name, _ in ours.named_parameters() if name != "2.weight"]


def test_training_continues_from_a_saved_state() -> None:
    straight, resumed = network(), network()
    train(straight, Muon(straight.parameters(), lr=LR), range(6))
    first = Muon(resumed.parameters(), lr=LR)
    train(resumed, first, range(3))
    again = network()
    again.load_state_dict(resumed.state_dict())
    second = Muon(again.parameters(), lr=1.0)
    second.load_state_dict(first.state_dict())
    train(again, second, range(3, 6))
    assert torch.equal(weights(straight), weights(again))


@pytest.mark.parametrize("formats", [("channels_last",) * 4, ("contiguous_format", "channels_last") * 2])
def test_the_memory_format_of_the_weights_does_not_matter(formats: tuple[str, ...]) -> None:
    """It may even change between steps, as it does when a run is resumed with other settings."""
    plain, other = network().double(), network().double()
    optimizers = [Muon(model.parameters(), lr=LR) for model in (plain, other)]
    for step, memory_format in enumerate(formats):
        other.to(memory_format=getattr(torch, memory_format))
        for model, optimizer in zip((plain, other), optimizers, strict=True):
            train(model, optimizer, range(step, step + 1))
    assert other[2].weight.is_contiguous(memory_format=torch.channels_last)
    for (name, p), q in zip(plain.named_parameters(), other.parameters(), strict=True):
        # Newton-Schulz iterates in bfloat16.
        torch.testing.assert_close(p, q.contiguous(), rtol=0, atol=2e-2 * LR, msg=name)


def test_a_fused_optimiser_continues_in_another_memory_format() -> None:
    """Its kernel reads weights and state in the order of memory."""
    results = []
    for fused, change in ((False, False), (True, True)):
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=fused)
        train(model, optimizer, range(2))
        if change:
            model.to(memory_format=torch.channels_last)
            resumed = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
            resumed.load_state_dict(optimizer.state_dict())
            match_memory_format(resumed)
            optimizer = resumed
        train(model, optimizer, range(2, 4))
        results.append(model[2].weight.detach().contiguous())
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)


def test_groups_of_parameters_are_refused() -> None:
    with pytest.raises(UserError, match="no groups"):
        Muon([{"params": list(network().parameters())}])


def test_a_torch_without_muon_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(UserError, match=r"torch 2\.9 or later"):
        Muon(network().parameters())
