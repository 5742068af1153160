"""Augmentation: the conditioning vector describes the transform, and is 0 for unchanged images and for samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gencompare.diffusion.augmentation import Augmentation, augment, condition_vector
from gencompare.errors import UserError
from gencompare.generative_model import DataSpec
from gencompare.models.diffusion import Diffusion
from gencompare.networks.unet import UNet
from gencompare.rng import RandomSource, generator
from parts import part

NAMES = ("x_flip", "y_flip", "zoom", "turn", "axis", "stretch", "right", "down")


def images(n: int = 4, shape: tuple[int, ...] = (3, 8, 8), dtype: torch.dtype = torch.float32) -> Tensor:
    return 2 * torch.rand(n, *shape, generator=torch.Generator().manual_seed(3), dtype=dtype) - 1


def a(n: int = 4, dtype: torch.dtype = torch.float64, **values: float) -> Tensor:
    """Return parameters with the same a_0 to a_7 for each image."""
    return torch.tensor([values.get(name, 0.0) for name in NAMES], dtype=dtype).expand(n, -1)


def drawn(augmentation: Augmentation, n: int, seed: int = 0) -> Tensor:
    return augmentation.sample_params(RandomSource.for_batch(generator("cpu", seed), n))


# The transforms


def test_probability_zero_changes_nothing() -> None:
    x = images(100)
    got, vector = Augmentation(p=0.0, x_flip=0.0)(x, RandomSource.for_batch(generator("cpu", 0), 100))
    assert torch.equal(got, x) and torch.equal(vector, torch.zeros(100, 9))


def test_condition_vector_is_zero_only_for_unchanged_images() -> None:
    x = images(2000)
    got, vector = Augmentation(p=0.12, x_flip=0.5)(x, RandomSource.for_batch(generator("cpu", 0), 2000))
    untold = ~vector.any(dim=1)
    assert 400 < int(untold.sum()) < 1600
    assert torch.equal(got[untold], x[untold])
    assert (got - x)[~untold].flatten(1).any(dim=1).all()


def test_flips() -> None:
    x = images()
    assert torch.equal(augment(x, a(x_flip=1.0)), x.flip(3))
    assert torch.equal(augment(x, a(y_flip=1.0)), x.flip(2))
    assert torch.equal(augment(x, a(x_flip=1.0, y_flip=1.0)), x.flip(2, 3))


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 7, 9)], ids=str)
def test_half_a_turn_equals_both_flips(shape: tuple[int, ...]) -> None:
    x = images(shape=shape, dtype=torch.float64)
    assert torch.allclose(augment(x, a(turn=math.pi)), x.flip(2, 3), atol=1e-9)
    assert torch.allclose(augment(x, a(turn=-math.pi)), x.flip(2, 3), atol=1e-9)


def test_rotation_is_counterclockwise() -> None:
    x = images(dtype=torch.float64)
    assert torch.allclose(augment(x, a(turn=math.pi / 2)), x.rot90(1, (2, 3)), atol=1e-9)


@pytest.mark.parametrize(("right", "down"), [(1, 0), (0, 1), (-3, 2), (5, -7), (8, 0)])
def test_shift_by_whole_pixels_reflects_at_the_border(right: int, down: int) -> None:
    x = images(shape=(2, 8, 16), dtype=torch.float64)
    got = augment(x, a(right=right / 2, down=down))  # an eighth of 16 pixels and of 8
    around = torch.nn.functional.pad(x, (15, 15, 7, 7), mode="reflect")
    far = torch.nn.functional.pad(around, (15, 15, 7, 7), mode="reflect")
    top, left = 14 - down, 30 - right
    assert torch.allclose(got, far[:, :, top : top + 8, left : left + 16], atol=1e-9)


@pytest.mark.parametrize(
    ("values", "matrix"),
    [
        ({"zoom": 5.0}, [[2, 0], [0, 2]]),
        ({"stretch": 5.0}, [[2, 0], [0, 0.5]]),
        ({"stretch": 5.0, "axis": math.pi / 2}, [[0.5, 0], [0, 2]]),
        # The axis rises to the right. Rows count downwards, so the vector (r, -r) is stretched to (2 r, -2 r).
        ({"stretch": 5.0, "axis": math.pi / 4}, [[1.25, -0.75], [-0.75, 1.25]]),
        ({"turn": math.pi / 6}, [[0.75**0.5, 0.5], [-0.5, 0.75**0.5]]),
        # In this order: flip, scale, rotate, stretch, shift.
        ({"zoom": 5.0, "turn": math.pi / 2, "stretch": 5.0, "x_flip": 1.0}, [[0, 4], [1, 0]]),
    ],
)
def test_each_transform_is_its_matrix(values: dict[str, float], matrix: list[list[float]]) -> None:
    """A plane wave of low frequency, f(x) = cos(k . x + c), becomes f at the source position of each pixel."""
    back = torch.tensor(matrix, dtype=torch.float64).inverse()
    place = torch.arange(64, dtype=torch.float64) - 31.5

    def wave(through: Tensor) -> Tensor:
        down, right = torch.meshgrid(place, place, indexing="ij")
        x, y = torch.einsum("ij,jhw->ihw", through, torch.stack([right, down]))
        return 0.9 * torch.cos(0.05 * x + 0.03 * y + 0.4)[None, None]

    got, expected = augment(wave(torch.eye(2, dtype=torch.float64)), a(1, **values)), wave(back)
    inner = slice(28, 36)  # all source positions are inside the image
    assert torch.allclose(got[..., inner, inner], expected[..., inner, inner], atol=5e-3)


def test_shifts_are_applied_last() -> None:
    x = images(dtype=torch.float64)
    turned = augment(x, a(turn=math.pi / 2, x_flip=1.0))
    both = augment(x, a(turn=math.pi / 2, x_flip=1.0, right=2.0))
    assert torch.allclose(both[..., 2:], turned[..., :-2], atol=1e-9)


def test_augmented_images_stay_in_range_and_rows_are_independent() -> None:
    x = images(200).sign()
    parameters = drawn(Augmentation(p=0.9), 200)
    got = augment(x, parameters)
    assert got.min() >= -1 and got.max() <= 1 and got.isfinite().all()
    alone = torch.cat([augment(x[i : i + 1], parameters[i : i + 1]) for i in range(5)])
    assert torch.allclose(got[:5], alone, atol=1e-6)


def test_mixed_precision_does_not_round_positions() -> None:
    x, parameters = images(20), drawn(Augmentation(p=0.9), 20)
    expected = augment(x, parameters)
    with torch.autocast("cpu", torch.bfloat16):
        got = augment(x, parameters)
    assert got.dtype == torch.float32 and torch.equal(got, expected)


# Parameters and conditioning vector


def test_each_transform_has_its_probability() -> None:
    n, p, x_flip = 40_000, 0.12, 0.6
    parameters = drawn(Augmentation(p=p, x_flip=x_flip), n)
    shares = (parameters != 0).double().mean(0)
    expected = torch.tensor([x_flip / 2, p / 2, p, p, p / 2, p, p, p], dtype=torch.float64)
    error = (expected * (1 - expected) / n).sqrt()
    assert ((shares - expected).abs() < 4 * error).all(), shares
    done = (parameters[:, [0, 1, 2, 3, 5, 6]] != 0).double()
    together = torch.corrcoef(done.T) - torch.eye(6, dtype=torch.float64)
    assert together.abs().max() < 5 / math.sqrt(n), "transforms are independent"
    assert torch.equal(parameters[:, 6] != 0, parameters[:, 7] != 0), "shifts have both components"
    for column in (2, 5, 6, 7):
        values = parameters[parameters[:, column] != 0, column]
        assert abs(float(values.mean())) < 4 / math.sqrt(n * p) and abs(float(values.std()) - 1) < 0.05
    turns = parameters[parameters[:, 3] != 0, 3]
    assert abs(float(turns.square().mean()) / (math.pi**2 / 3) - 1) < 0.06 and turns.abs().max() <= math.pi


def test_condition_vector_is_that_of_the_paper() -> None:
    vector = condition_vector(a(1, x_flip=1.0, zoom=0.3, turn=2.0, axis=0.7, stretch=-1.5, right=0.2, down=-0.4))[0]
    expected = [1, 0, 0.3, math.cos(2) - 1, math.sin(2), -1.5 * math.cos(0.7), -1.5 * math.sin(0.7), 0.2, -0.4]
    assert vector.tolist() == pytest.approx(expected) and len(vector) == Augmentation.dim


def test_augmentation_does_not_depend_on_the_number_of_processes() -> None:
    x, augmentation = images(10), Augmentation(p=0.5)
    whole = augmentation(x, RandomSource.for_batch(generator("cpu", 5), 10))
    parts = [augmentation(x[i : i + 5], RandomSource(generator("cpu", 5), i, i + 5, 10)) for i in (0, 5)]
    for one, two in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(one, torch.cat(two))


@pytest.mark.parametrize(("changes", "words"), [({"p": 1.2}, r"p=1\.2"), ({"x_flip": -0.1}, r"x_flip=-0\.1")])
def test_invalid_probabilities_are_rejected(changes: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=rf"augmentation\.{words}.*must be in \[0, 1\]"):
        Augmentation(**changes)


# In the model


class Watches(nn.Module):
    """Records its inputs."""

    def __init__(self, **made_for: Any) -> None:
        super().__init__()
        self.made_for, self.seen = made_for, []
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, noise_cond: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        self.seen.append((x.detach(), dict(cond)))
        return x * self.weight


def model(network: Any = Watches, spec: DataSpec | None = None, **changes: Any) -> Diffusion:
    torch.manual_seed(0)
    parts: dict[str, Any] = {
        "schedule": part("schedule", "karras"),
        "parameterization": part("parameterization", "karras"),
        "objective": part("objective", "edm"),
        "sampler": part("sampler", "heun", num_steps=2),
        "augmentation": part("augmentation", "edm", p=0.5),
    }
    spec = spec or DataSpec(name="x", shape=(1, 8, 8), num_classes=3)
    return Diffusion(spec, network=network, clip_x0=False, **(parts | changes))


def rng(n: int, start: int = 0, stop: int | None = None) -> RandomSource:
    return RandomSource(generator("cpu", 1), start, n if stop is None else stop, n)


def test_only_training_augments_and_conditions() -> None:
    diffusion = model()
    net: Any = diffusion.network
    assert net.made_for["augment_dim"] == 9
    diffusion.losses(images(6, (1, 8, 8)), {}, rng(6))
    vector = net.seen[-1][1]["augment"]
    assert vector.shape == (6, 9) and vector.any()
    diffusion.eval()
    seen = len(net.seen)
    diffusion.losses(images(6, (1, 8, 8)), {}, rng(6))
    diffusion.sample(2, generator=generator("cpu", 0))
    assert len(net.seen) > seen + 2
    assert not any("augment" in cond for _, cond in net.seen[seen:])


def test_no_augmentation_leaves_network_and_noise_unchanged() -> None:
    diffusion = model(augmentation=None)
    net: Any = diffusion.network
    assert "augment_dim" not in net.made_for
    x = images(6, (1, 8, 8))
    plain = diffusion.losses(x, {}, rng(6))["loss"]
    diffusion.eval()
    assert torch.equal(plain, diffusion.losses(x, {}, rng(6))["loss"])


def test_padding_is_not_augmented() -> None:
    spec = DataSpec(name="x", shape=(1, 8, 8), padding=2)
    schedule = part("schedule", "karras", sigma_min=1e-6, sigma_max=2e-6)
    diffusion = model(
        spec=spec,
        schedule=schedule,
        parameterization=part("parameterization", "eps"),
        objective=part("objective", "simple"),
        augmentation=Augmentation(p=1.0),
    )
    real = images(50, (1, 4, 4))
    x = torch.nn.functional.pad(real, (2,) * 4, value=-1.0)
    diffusion.losses(x, {}, rng(50))
    net: Any = diffusion.network
    shown, cond = net.seen[-1]
    expected, vector = Augmentation(p=1.0)(real, rng(50))
    assert torch.equal(cond["augment"], vector)
    assert torch.allclose(shown[:, :, 2:-2, 2:-2], expected, atol=1e-4)
    border = spec.mask() == 0
    assert (shown[:, :, border[0]] + 1).abs().max() < 1e-4


UNET = partial(
    UNet, channels=8, channel_mult=(1, 2), num_blocks=1, attention_resolutions=(4,), dropout=0.0, num_groups=4
)


def shaken(diffusion: Diffusion) -> Diffusion:
    torch.manual_seed(1)
    with torch.no_grad():
        for p in diffusion.network.parameters():
            p.normal_(std=0.2)
    return diffusion


def test_losses_do_not_depend_on_the_number_of_processes() -> None:
    diffusion, x = shaken(model(UNET, augmentation=Augmentation(p=0.5))), images(8, (1, 8, 8))
    whole = diffusion.losses(x, {}, rng(8))["loss"]
    halves = [diffusion.losses(x[i : i + 4], {}, rng(8, i, i + 4))["loss"] for i in (0, 4)]
    assert torch.allclose(whole, torch.cat(halves), rtol=1e-4)


def test_samples_use_a_condition_vector_of_zero() -> None:
    """A model without the embedding of the vector, but with the same weights, gives the same samples and losses."""
    one, two = shaken(model(UNET)).eval(), model(UNET, augmentation=None).eval()
    state = one.network.state_dict()
    two.network.load_state_dict({name: value for name, value in state.items() if "augment" not in name})
    assert len(state) == len(two.network.state_dict()) + 1
    assert torch.equal(one.sample(3, generator=generator("cpu", 2)), two.sample(3, generator=generator("cpu", 2)))
    x = images(3, (1, 8, 8))
    assert torch.equal(one.losses(x, {}, rng(3))["loss"], two.losses(x, {}, rng(3))["loss"])


def test_label_dropout_keeps_the_condition_vector() -> None:
    diffusion = model(conditional=True, label_dropout=1.0)
    diffusion.losses(images(6, (1, 8, 8)), {"label": torch.zeros(6, dtype=torch.int64)}, rng(6))
    net: Any = diffusion.network
    cond = net.seen[-1][1]
    assert (cond["label"] == 3).all() and cond["augment"].any()


def test_gradient_reaches_the_embedding_of_the_vector() -> None:
    diffusion = shaken(model(UNET))
    diffusion.losses(images(40, (1, 8, 8)), {}, rng(40))["loss"].mean().backward()
    net: Any = diffusion.network
    assert net.conditions.augment.weight.grad.abs().sum(0).gt(0).all()


def test_images_that_cannot_be_augmented_are_rejected() -> None:
    spec = DataSpec(name="x", shape=(1, 8, 8), conditions={"low_res": (1, 4, 4)})
    with pytest.raises(UserError, match=r"not their low-resolution images.*model/augmentation=null"):
        model(spec=spec)
    with pytest.raises(UserError, match=r"at least 2x2 pixels, but these are 1x1"):
        Augmentation()(torch.zeros(2, 2, 1, 1), rng(2))
