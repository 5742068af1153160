"""Token dropping: in training, a random part of the tokens skips the middle blocks of a DiT."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from gencompare.errors import UserError
from gencompare.networks.dit import DiT
from gencompare.resources import flops_per_image
from test_augmentation import images, rng, shaken
from test_patches import model

TOKENS = 16


def dit(token_dropping: float, depth: int = 4, hidden_size: int = 16) -> Any:
    net: Any = DiT(
        (1, 8, 8), 1, hidden_size=hidden_size, depth=depth, num_heads=2, token_dropping=token_dropping
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.2)
    return net


def inputs(n: int = 3) -> tuple[Tensor, Tensor]:
    return images(n, (1, 8, 8)), torch.linspace(0, 1, n)


def scores(n: int = 3) -> Tensor:
    return torch.rand(n, TOKENS, generator=torch.Generator().manual_seed(5))


def test_dropped_tokens_skip_the_middle_blocks_and_join_again() -> None:
    net, seen = dit(0.75), []
    for block in net.blocks:
        block.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    (x, t), selected = inputs(), scores()
    net(x, t, {"token_scores": selected})
    (_, after_first), (middle_in, _), (_, middle_out), (before_last, _) = seen
    assert middle_in.shape == (3, 4, 16)
    for i in range(3):
        order = selected[i].argsort()
        assert torch.equal(middle_in[i], after_first[i, order[:4]])
        assert torch.equal(before_last[i, order[:4]], middle_out[i])
        assert torch.equal(before_last[i, order[4:]], after_first[i, order[4:]])


def test_the_order_of_the_kept_tokens_does_not_matter() -> None:
    net, (x, t), selected = dit(0.5), inputs(), scores()
    kept = selected.argsort(dim=1)[:, :8]
    reversed_order = selected.scatter(1, kept, selected.gather(1, kept.flip(1)))
    out = net(x, t, {"token_scores": selected})
    assert torch.allclose(net(x, t, {"token_scores": reversed_order}), out, atol=1e-5)
    assert not torch.allclose(net(x, t, {"token_scores": 1 - selected}), out, atol=1e-3), "the selection matters"


def test_without_scores_or_at_rate_zero_the_network_is_the_plain_one() -> None:
    plain, dropping, (x, t) = dit(0.0), dit(0.5), inputs()
    expected = plain(x, t, {})
    assert torch.equal(dropping(x, t, {}), expected)
    assert torch.equal(plain(x, t, {"token_scores": scores()}), expected)
    assert not torch.allclose(dropping(x, t, {"token_scores": scores()}), expected, atol=1e-3)


@pytest.mark.parametrize(("depth", "cheap"), [(4, 2), (12, 8), (28, 20)])
def test_dropping_half_of_the_tokens_halves_the_products_of_the_middle_blocks(depth: int, cheap: int) -> None:
    """A block with fewer tokens costs at most in proportion to them; attention falls with their square."""
    (x, t), flops = inputs(), {}
    for rate in (0.0, 0.5):
        with torch.no_grad():
            flops[rate] = flops_per_image(partial(dit(rate, depth, 64), x, t, {"token_scores": scores()}), 3)
    block_without_modulation = 2 * TOKENS * 12 * 64**2 + 4 * TOKENS**2 * 64
    expected = cheap * (TOKENS * 12 * 64**2 + 3 * TOKENS**2 * 64)
    assert block_without_modulation * depth < flops[0.0] and flops[0.0] - flops[0.5] == pytest.approx(expected)


def test_only_training_drops_tokens() -> None:
    """With the same weights, the losses in evaluation are those of the plain network, in training or not."""
    dropping, plain = (shaken(model(partial(DiT, hidden_size=16, depth=4, num_heads=2, token_dropping=rate)))
                       for rate in (0.5, 0.0))  # fmt: skip
    x = images(6, (1, 8, 8))
    in_training = dropping.losses(x, {}, rng(6))["loss"]
    expected = plain.losses(x, {}, rng(6))["loss"]
    assert not torch.allclose(in_training, expected, rtol=1e-3)
    assert torch.equal(dropping.eval().losses(x, {}, rng(6))["loss"], plain.eval().losses(x, {}, rng(6))["loss"])
    assert torch.equal(plain.losses(x, {}, rng(6))["loss"], expected)


def test_losses_do_not_depend_on_the_number_of_processes() -> None:
    diffusion = shaken(model(partial(DiT, hidden_size=16, depth=4, num_heads=2, token_dropping=0.5)))
    x = images(8, (1, 8, 8))
    whole = diffusion.losses(x, {}, rng(8))["loss"]
    halves = [diffusion.losses(x[i : i + 4], {}, rng(8, i, i + 4))["loss"] for i in (0, 4)]
    assert torch.allclose(whole, torch.cat(halves), rtol=1e-4)


@pytest.mark.parametrize(
    ("rate", "depth", "message"),
    [
        (1.0, 4, r"token_dropping=1.0 must be at least 0 and below 1"),
        (-0.1, 4, r"token_dropping=-0.1 must be"),
        (0.5, 2, r"depth of at least 3, not 2: use model\.network\.token_dropping=0"),
    ],
)
def test_invalid_token_dropping_is_an_error(rate: float, depth: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        dit(rate, depth)
