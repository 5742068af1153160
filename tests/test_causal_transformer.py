"""The causal transformer: what each token sees, and the cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gencompare.errors import UserError
from gencompare.networks.causal_transformer import CausalTransformer
from gencompare.networks.layers import attention


def transformer(seed: int = 0) -> CausalTransformer:
    torch.manual_seed(seed)
    net = CausalTransformer(8, 3, 2, mlp_ratio=2).double().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(std=0.5)
    return net


def tokens(n: int = 2, length: int = 5) -> Tensor:
    return torch.randn(n, length, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_each_token_sees_itself_and_all_tokens_before_it() -> None:
    h = tokens().requires_grad_()
    for k in range(h.shape[1]):
        (gradient,) = torch.autograd.grad(transformer()(h)[0, k].square().sum(), h)
        seen = gradient.abs().sum(2) > 0
        expected = torch.zeros_like(seen)
        expected[0, : k + 1] = True
        assert torch.equal(seen, expected)


def test_steps_with_a_cache_equal_the_whole_sequence() -> None:
    net, h = transformer(), tokens()
    cache = net.new_cache(len(h), h.shape[1])
    steps = torch.cat([net.step(h[:, k : k + 1], cache) for k in range(h.shape[1])], dim=1)
    torch.testing.assert_close(steps, net(h), rtol=0, atol=1e-12)
    assert cache.length == h.shape[1]


def test_explicit_causal_attention_in_16_bits_equals_that_in_64() -> None:
    q, k, v = torch.randn(3, 2, 2, 7, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = attention(q.double(), k.double(), v.double(), causal=True)
    torch.testing.assert_close(attention(q, k, v, causal=True).double(), exact, rtol=0.03, atol=0.03)


def test_the_output_has_the_scale_of_a_normalised_token_at_initialisation() -> None:
    net = CausalTransformer(64, 12, 4)
    h = net(torch.randn(4, 16, 64))
    assert h.detach().std() == pytest.approx(1, abs=0.02)
    assert {p.abs().max().item() for name, p in net.named_parameters() if name.endswith("bias")} == {0}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((10, 2, 3), "hidden_size=10"), ((8, 0, 2), "depth=0")],
    ids=str,
)
def test_invalid_sizes_are_refused(arguments: tuple[int, int, int], named: str) -> None:
    with pytest.raises(UserError, match=named):
        CausalTransformer(*arguments)
    with pytest.raises(UserError, match="dropout=1"):
        CausalTransformer(8, 1, 2, dropout=1.0)
