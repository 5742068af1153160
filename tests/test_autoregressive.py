"""PixelCNN++: causality, exact probabilities, and samples that have them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from gencompare.errors import UserError
from gencompare.evaluation.sampling import draw_samples
from gencompare.generative_model import DataSpec
from gencompare.models.autoregressive import AutoregressivePixels
from gencompare.models.pixel_likelihoods import DiscretizedLogisticMixture
from gencompare.networks.pixelcnn import PixelCNN
from gencompare.rng import RandomSource
from gencompare.training.learning_rate import WarmupDecay


def randomize(module: nn.Module, gain: float = 1.7) -> None:
    """Set random weights, with gates that are open, so that outputs depend clearly on the input."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator) + (gain if name.endswith("gain") else 0))


def network(shape: tuple[int, int, int], num_levels: int, out_channels: int = 3, num_classes: int = 2) -> PixelCNN:
    net = PixelCNN(shape, out_channels, num_classes, channels=4, num_levels=num_levels, num_blocks=1, dropout=0.0)
    randomize(net)
    return net.double()


def model(
    shape: tuple[int, int, int] = (1, 2, 2),
    num_bins: int = 4,
    *,
    num_levels: int = 2,
    padding: int = 0,
    components: int = 2,
    gain: float = 1.7,
    conditional: bool = False,
) -> AutoregressivePixels:
    torch.manual_seed(0)
    built = AutoregressivePixels(
        DataSpec("tiny", shape, num_classes=2, num_bins=num_bins, padding=padding),
        network=partial(PixelCNN, channels=6, num_levels=num_levels, num_blocks=1, dropout=0.0),
        likelihood=partial(DiscretizedLogisticMixture, num_components=components),
        conditional=conditional,
    )
    if gain:
        randomize(built.network, gain)
    return built.double().eval()


def all_images(shape: tuple[int, int, int], num_bins: int) -> Tensor:
    values = itertools.product(range(num_bins), repeat=math.prod(shape))
    return torch.tensor(list(values), dtype=torch.float64).view(-1, *shape) * 2 / (num_bins - 1) - 1


def probabilities(built: AutoregressivePixels, x: Tensor) -> Tensor:
    label = {"label": torch.ones(len(x), dtype=torch.int64)}
    with torch.no_grad():
        bits = built.losses(x, label, RandomSource.for_batch(torch.Generator(), len(x)))["bits_per_dim"]
    return torch.exp2(-bits * built.spec.num_values)


@pytest.mark.parametrize(("shape", "num_levels"), [((3, 3, 4), 1), ((1, 4, 4), 2), ((2, 8, 4), 3)], ids=str)
def test_each_output_depends_on_exactly_the_pixels_before_it(shape: tuple[int, int, int], num_levels: int) -> None:
    net, x = network(shape, num_levels), torch.randn(1, *shape, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: net(x, torch.tensor([1])).square().sum((0, 1)), x)
    d = shape[1] * shape[2]
    seen = jacobian.abs().sum((2, 3)).view(d, d) > 0  # type: ignore[union-attr]
    assert torch.equal(seen, torch.ones(d, d).tril(-1) > 0)


@pytest.mark.parametrize(("shape", "num_levels"), [((2, 3, 3), 1), ((1, 4, 6), 2), ((1, 8, 8), 3)], ids=str)
def test_a_scan_pixel_by_pixel_equals_the_whole_network(shape: tuple[int, int, int], num_levels: int) -> None:
    """While later pixels still have other values."""
    net, x, label = network(shape, num_levels), torch.randn(2, *shape, dtype=torch.float64), torch.tensor([0, 1])
    whole = net(x, label)
    for first_row in (0, 2):
        y, seen = x.clone(), 0
        y[:, :, first_row:] = 7.0
        for row, column, h in net.raster_scan(y, label, first_row=first_row):
            torch.testing.assert_close(h[:, :, 0, 0], whole[:, :, row, column], rtol=0, atol=1e-10)
            y[:, :, row, column] = x[:, :, row, column]
            seen += 1
        assert seen == (shape[1] - first_row) * shape[2]


CASES = {"2x2, 4 levels": ((1, 2, 2), 4, 2), "RGB, 1x2, 3 levels": ((3, 1, 2), 3, 1)}


@pytest.mark.parametrize("case", CASES)
def test_probabilities_of_all_images_sum_to_one(case: str) -> None:
    shape, num_bins, num_levels = CASES[case]
    built = model(shape, num_bins, num_levels=num_levels, conditional=True)
    p = probabilities(built, all_images(shape, num_bins))
    assert p.sum().item() == pytest.approx(1, abs=1e-10) and p.max() < 0.5


def sees_its_own_pixel(net: PixelCNN) -> None:
    net.horizontal.stem[1].columns = (0, 0)  # type: ignore[assignment]


def is_not_shifted_down(net: PixelCNN) -> None:
    net.vertical.stem[0].down, net.vertical.stem[0].rows_above = 0, 1  # type: ignore[assignment]


def looks_to_the_right(net: PixelCNN) -> None:
    net.horizontal.up_blocks[0][1].gated.columns = (0, 1)  # type: ignore[index]


@pytest.mark.parametrize("plant", [sees_its_own_pixel, is_not_shifted_down, looks_to_the_right])
def test_a_network_that_sees_too_much_is_not_a_distribution(plant: Callable[[PixelCNN], None]) -> None:
    """The law of the test above fails for the likely mistakes."""
    built = model()
    plant(built.network)
    assert abs(probabilities(built, all_images((1, 2, 2), 4)).sum().item() - 1) > 0.01


@pytest.mark.parametrize("case", CASES)
def test_samples_have_the_stated_probabilities(case: str) -> None:
    shape, num_bins, num_levels = CASES[case]
    built = model(shape, num_bins, num_levels=num_levels, conditional=True)
    p, n = probabilities(built, all_images(shape, num_bins)).numpy(), 20_000
    label = {"label": torch.ones(n, dtype=torch.int64)}
    x = built.sample(n, label, generator=torch.Generator().manual_seed(0)).flatten(1)
    levels = ((x + 1) * (num_bins - 1) / 2).round().long()
    index = (levels * num_bins ** torch.arange(levels.shape[1]).flip(0)).sum(1)
    counts = torch.bincount(index, minlength=len(p)).numpy()
    rare = n * p < 5
    expected = np.append(n * p[~rare], n * p[rare].sum() + 1e-9)
    found = np.append(counts[~rare], counts[rare].sum())
    assert stats.chisquare(found, expected * found.sum() / expected.sum()).pvalue > 0.01


def test_bits_per_dim_approach_the_entropy_of_the_data_from_above() -> None:
    """Images of 2x2 pixels and 4 levels, where the probability falls with the contrast of neighbours."""
    x = all_images((1, 2, 2), 4)
    p = torch.softmax(-2 * (x.diff(dim=2).abs().sum((1, 2, 3)) + x.diff(dim=3).abs().sum((1, 2, 3))), dim=0)
    entropy = -(p * p.log2()).sum().item() / 4
    built = model(num_levels=1, gain=0.0).train()
    optimizer = torch.optim.Adam(built.parameters(), 0.03)
    found = []
    for _ in range(60):
        bits = (p * built.losses(x, {}, RandomSource.for_batch(torch.Generator(), len(x)))["loss"]).sum()
        optimizer.zero_grad()
        bits.backward()
        optimizer.step()
        found.append(bits.item())
    assert found[0] > entropy + 0.3 and entropy < min(found) and found[-1] < entropy + 0.02


def test_bits_per_dim_restate_the_mixture_of_the_paper() -> None:
    """Salimans et al. (2017), eq. 1 to 3, from the output of the network, with scipy."""
    built, rng = model((3, 2, 2), 256), np.random.default_rng(0)
    x = torch.tensor(rng.integers(0, 256, (2, 3, 2, 2)) * 2 / 255 - 1)
    h, k, half = built.network(x).detach().numpy(), 2, 1 / 255
    lowest = math.log(2 / 255) - 2.15
    total = np.zeros(2)
    for n, i, j in itertools.product(range(2), repeat=3):
        logits, rest = h[n, :k, i, j], h[n, k:, i, j].reshape(k, 9)
        pixel, likelihood = x[n, :, i, j].numpy(), 0.0
        for weight, part, offset in zip(np.exp(logits) / np.exp(logits).sum(), rest, (-0.5, 0.5), strict=True):
            m, a = part[:3] + offset, np.tanh(part[6:])
            means = [m[0], m[1] + a[0] * pixel[0], m[2] + a[1] * pixel[0] + a[2] * pixel[1]]
            capped = 4 - np.logaddexp(0, 10 * (4 - part[3:6])) / 10
            scales = np.exp(lowest + np.logaddexp(0, capped - lowest))
            upper = np.where(pixel > 1 - half, 1, stats.logistic.cdf(pixel + half, means, scales))
            lower = np.where(pixel < -1 + half, 0, stats.logistic.cdf(pixel - half, means, scales))
            likelihood += weight * np.prod(upper - lower)
        total[n] -= math.log2(likelihood)
    (estimate,) = built.likelihoods().values()
    assert estimate.kind == "exact"
    bits = estimate.bits_per_dim(x, {}, torch.Generator())
    np.testing.assert_allclose(bits.numpy(), total / 12, rtol=1e-7)


def test_padding_is_neither_modelled_nor_sampled() -> None:
    built = model((1, 6, 6), padding=2)
    assert built.pixel_shape == (1, 2, 2)
    x = all_images((1, 2, 2), 4)
    padded = nn.functional.pad(x, (2,) * 4, value=-1.0)
    assert probabilities(built, padded).sum().item() == pytest.approx(1, abs=1e-10)
    drawn = built.sample(50, generator=torch.Generator().manual_seed(0))
    inside = built.spec.mask() > 0
    assert (drawn[:, :, ~inside[0]] == -1).all() and drawn[:, :, inside[0]].std() > 0.1
    shown = built.visualize(padded[:3], {}, generator=torch.Generator())["completion"]
    assert torch.equal(shown[:, :, :, :3], padded[:3, None, :, :3].expand(shown[:, :, :, :3].shape)), (
        "rows that are given"
    )
    assert (shown[:, 1, :, 3:] == -1).all() and shown[:, 2:, :, 3:5, 2:4].std() > 0.1


def test_every_block_uses_the_class_and_outputs_depend_on_it() -> None:
    net, x = network((1, 4, 4), 2), torch.randn(2, 1, 4, 4, dtype=torch.float64)
    net(x, torch.tensor([0, 0])).square().sum().backward()
    tables = [p for name, p in net.named_parameters() if name.endswith("labels.weight")]
    assert len(tables) == 2 * (2 + 3)
    assert all((p.grad[0] != 0).any() and (p.grad[1] == 0).all() for p in tables)  # type: ignore[index]


def test_the_streams_are_called_once_per_row_and_once_per_pixel() -> None:
    assert draw_samples(model((1, 4, 4)).float(), 3).nfe == {"vertical": 4, "horizontal": 16}


def test_sizes_that_cannot_be_halved_are_refused() -> None:
    with pytest.raises(UserError, match=r"num_levels=3 .* multiples of 4, not 2x2"):
        model(num_levels=3)
    with pytest.raises(UserError, match=r"dropout=1"):
        PixelCNN((1, 4, 4), 3, dropout=1.0)


def test_an_exponential_decay_has_a_constant_rate() -> None:
    schedule = WarmupDecay(decay="exponential", last=0.999995**1000, decay_steps=1000)
    assert schedule(10, 0.0) == pytest.approx(0.999995**10, rel=1e-12)
    with pytest.raises(UserError, match=r"last=0.* must be positive"):
        WarmupDecay(decay="exponential")
