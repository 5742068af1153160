"""Transformers over tokens: exact probabilities, samples that have them, and both stages of training."""

from __future__ import annotations

import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from composing import compose
from gencompare.errors import UserError
from gencompare.evaluation.sampling import draw_samples
from gencompare.generative_model import DataSpec
from gencompare.models.autoencoder import Autoencoder
from gencompare.models.bottlenecks import Bottleneck, GaussianPosterior, VectorQuantizer
from gencompare.models.latents import Tokens
from gencompare.models.token_transformer import TokenTransformer
from gencompare.networks.conv_autoencoder import LatentDecoder, LatentEncoder
from gencompare.networks.gpt import GPT
from gencompare.tasks.runs.build import build_data, build_model

SPEC = DataSpec("tiny", (1, 1, 3), num_classes=2)
NUM_CODES = 4


def tokens_of(spec: DataSpec, bottleneck: Bottleneck) -> Tokens:
    """Return tokens of an untrained autoencoder without downsampling."""
    sizes: dict[str, Any] = {"channels": 8, "channel_mult": [1], "num_blocks": 1}
    autoencoder = partial(
        Autoencoder,
        encoder=partial(LatentEncoder, **sizes),
        decoder=partial(LatentDecoder, **sizes),
        bottleneck=bottleneck,
    )
    return Tokens(spec, autoencoder=autoencoder)


def model(*, conditional: bool = True, **options: Any) -> TokenTransformer:
    """Return a random model of three tokens."""
    torch.manual_seed(0)
    built = TokenTransformer(
        SPEC,
        network=partial(GPT, hidden_size=8, depth=2, num_heads=2),
        latent=partial(tokens_of, bottleneck=VectorQuantizer(4, NUM_CODES)),
        conditional=conditional,
        **options,
    )
    with torch.no_grad():
        for p in built.network.parameters():
            p.normal_(std=0.5)
        built.network.embedding.weight.mul_(6)  # so that tokens and classes matter
    return built.double().eval()


SEQUENCES = torch.tensor(list(itertools.product(range(NUM_CODES), repeat=3)))


def probabilities(built: TokenTransformer, label: int) -> Tensor:
    with torch.no_grad():
        bits = built.bits_per_token(SEQUENCES, torch.full((len(SEQUENCES),), label) if built.conditional else None)
    return torch.exp2(-3 * bits)


@pytest.mark.parametrize("conditional", [True, False])
def test_probabilities_of_all_sequences_sum_to_one(conditional: bool) -> None:
    built = model(conditional=conditional)
    first, second = (probabilities(built, label) for label in (0, 1))
    assert first.sum().item() == pytest.approx(1, abs=1e-10) and second.sum().item() == pytest.approx(1, abs=1e-10)
    assert ((first - second).abs().max() > 0.01) == conditional


def test_logits_depend_on_exactly_the_inputs_up_to_their_own() -> None:
    net, inputs = model().network, torch.tensor([[5, 1, 3]])
    embedded: list[Tensor] = []
    net.embedding.register_forward_hook(lambda *call: embedded.append(call[2]))
    logits = net(inputs)
    for k in range(3):
        (gradient,) = torch.autograd.grad(logits[0, k].square().sum(), embedded[0], retain_graph=True)
        assert [bool(g.any()) for g in gradient[0]] == [j <= k for j in range(3)]


def test_steps_with_past_keys_and_values_equal_whole_sequences() -> None:
    net, inputs = model().network, torch.tensor([[4, 1, 3], [5, 0, 2]])
    past = net.new_past(2)
    steps = torch.cat([net(inputs[:, k : k + 1], past, k) for k in range(3)], dim=1)
    torch.testing.assert_close(steps, net(inputs), rtol=0, atol=1e-12)


def test_sampling_works_in_mixed_precision() -> None:
    built = model(conditional=False).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = built.sample(3, generator=torch.Generator().manual_seed(0))
    assert x.dtype == torch.float32 and x.isfinite().all()


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.7, 2)])
def test_sampled_tokens_have_the_stated_probabilities(temperature: float, top_k: int | None) -> None:
    built, n = model(temperature=temperature, top_k=top_k), 20_000
    if top_k is None:
        p = probabilities(built, 1).numpy()
    else:  # two codes per position, with sharpened probabilities
        inputs = torch.cat([torch.full((len(SEQUENCES), 1), NUM_CODES + 1), SEQUENCES[:, :-1]], dim=1)
        sharp = torch.softmax(built.network(inputs).detach() / temperature, dim=2)
        kept = sharp * (sharp >= sharp.sort(dim=2).values[..., -2:-1])
        each = (kept / kept.sum(2, keepdim=True)).gather(2, SEQUENCES[..., None])[..., 0]
        p = each.prod(1).numpy()
    drawn = built.sample_tokens(n, torch.ones(n, dtype=torch.int64), torch.Generator().manual_seed(0))
    counts = torch.bincount((drawn * torch.tensor([16, 4, 1])).sum(1), minlength=64).numpy()
    assert (counts[p == 0] == 0).all() and (top_k is None or (p > 0).sum() == 8)
    rare = n * p < 5
    expected = np.append(n * p[~rare], n * p[rare].sum() + 1e-9)
    found = np.append(counts[~rare], counts[rare].sum())
    assert stats.chisquare(found, expected * found.sum() / expected.sum()).pvalue > 0.01
    given = torch.tensor([[2, 3]]).expand(5, -1)
    continued = built.sample_tokens(5, torch.ones(5, dtype=torch.int64), torch.Generator(), given=given)
    assert torch.equal(continued[:, :2], given)


def test_cached_positions_that_are_off_by_one_are_found() -> None:
    """Without the position of each step, samples would not have the probabilities of the model."""
    net, inputs = model().network, torch.tensor([[4, 1, 3]])
    past = net.new_past(1)
    net(inputs[:, :1], past, 0)
    assert not torch.allclose(net(inputs[:, 1:2], past, 2)[:, 0], net(inputs)[:, 1], atol=1e-3)


def test_tokens_are_the_nearest_codes_in_raster_order() -> None:
    space = tokens_of(DataSpec("image", (1, 4, 6)), VectorQuantizer(4, NUM_CODES))
    space.quantizer.codebook.copy_(0.3 * torch.randn(NUM_CODES, 4))
    x = torch.randn(2, 1, 4, 6, generator=torch.Generator().manual_seed(0))
    found, latents = space.encode(x), space.coder.encode(x)
    assert len(found.unique()) > 1
    for row, column in itertools.product(range(4), range(6)):
        distances = (latents[:, None, :, row, column] - space.quantizer.codebook).norm(dim=2)
        assert torch.equal(found[:, 6 * row + column], distances.argmin(1))
    torch.testing.assert_close(space.decode(found), space.coder.decode(latents))


def test_a_collapsed_codebook_and_an_autoencoder_without_one_are_refused() -> None:
    spec = DataSpec("image", (1, 4, 4))
    space = tokens_of(spec, VectorQuantizer(4, 20))
    images = [torch.randn(8, 1, 4, 4) for _ in range(3)]
    space.coder.bottleneck.codebook.copy_(torch.randn(20, 4))  # type: ignore[union-attr,operator]
    space.load_autoencoder(space.coder, images)
    space.quantizer.codebook[2:] += 100
    with pytest.raises(UserError, match=r"codebook .* collapsed: the training images use 2 of 20 codes"):
        space.load_autoencoder(space.coder, images)
    with pytest.raises(UserError, match=r"codebook, not a GaussianPosterior: .*autoencoder=vqvae"):
        tokens_of(spec, GaussianPosterior(4))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=ddpm", "model/latent=tokens"], "not on tokens: use model/latent=autoencoder"),
        (["model=vqtransformer", "model/latent=autoencoder"], "use model/latent=tokens"),
        (["model=vqtransformer", "model.temperature=0"], "model.temperature=0"),
        (["model=vqtransformer", "model.top_k=0"], "model.top_k=0"),
    ],
    ids=str,
)
def test_incompatible_settings_are_refused(overrides: list[str], message: str) -> None:
    cfg = compose(*overrides, "data=digits")
    with pytest.raises(UserError, match=message):
        build_model(cfg, build_data(cfg))


def test_sampling_takes_one_evaluation_per_token() -> None:
    built = model().float()
    assert draw_samples(built, 5).nfe == {"network": 3, "decoder": 1}
    assert built.sampling_description() == "one token after another"
    assert model(temperature=0.9, top_k=3).sampling_description() == "one token after another, temperature 0.9, top 3"


def test_both_stages_run_in_one_command(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = [
        "data=digits", "trainer=cpu", "logger=none", "trainer.global_batch_size=16", "budget.images=null",
        "budget.steps=2", "callbacks.evaluation.num_evaluations=0", "evaluation.num_images=20",
        "evaluation.extractors=[classifier]", "evaluation.protocol.num_likelihood_images=20", "paths.runs=runs",
        "model.latent.budget.images=null", "model.latent.budget.steps=3", "model.latent.autoencoder.encoder.channels=8",
        "model.network.hidden_size=16", "model.network.depth=1", "model.conditional=true",
    ]  # fmt: skip
    assert cli("model=vqtransformer", *words, "hydra.run.dir=run") == 0
    record = json.loads(Path("run/record.json").read_text())
    (stage,) = Path("runs").glob("digits_vqvae_*")
    assert record["model"]["autoencoder"]["run"] == stage.name
    assert [entry["role"] for entry in record["training"]["dependencies"]] == ["autoencoder", "code usage"]
    (result,) = record["results"]
    assert result["generation"]["nfe"] == {"network": 16, "decoder": 1}
    assert result["metrics"]["psnr"]["note"].startswith("reconstruction") and not any(
        name.startswith("bpd") for name in result["metrics"]
    )
    stage.rename("elsewhere")
    assert cli("task=evaluate", "run_dir=run", "model.temperature=0.5") == 0
    assert cli("task=visualize", "run_dir=run") == 0
