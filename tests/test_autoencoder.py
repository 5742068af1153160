"""Autoencoders: bottlenecks, perceptual distance, the adaptive weight of the adversarial loss, and whitened latents."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from composing import compose
from forking import in_processes, needs_fork
from gencompare.data.digits import Digits
from gencompare.errors import TrainingStopped, UserError
from gencompare.generative_model import DataSpec, LatentSpace, SupportsReconstruction
from gencompare.models.autoencoder import Autoencoder
from gencompare.models.autoencoder_core import AutoencoderCore
from gencompare.models.bottlenecks import Bottleneck, GaussianPosterior, VectorQuantizer
from gencompare.models.latents import Latents
from gencompare.networks.conv_autoencoder import LatentDecoder, LatentEncoder
from gencompare.networks.gan_networks import PatchDiscriminator
from gencompare.networks.perceptual import VGG, PerceptualNetwork, perceptual_network
from gencompare.rng import RandomSource
from gencompare.tasks.runs.build import build_data

NARROW = {"channels": 8, "channel_mult": (1, 2), "mid_attention": False}


def source(n: int, seed: int = 0) -> RandomSource:
    return RandomSource.for_batch(torch.Generator().manual_seed(seed), n)


def autoencoder(spec: DataSpec = Digits.spec, bottleneck: Bottleneck | None = None, **options: Any) -> Autoencoder:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "encoder": partial(LatentEncoder, **NARROW),
        "decoder": partial(LatentDecoder, **NARROW),
        "bottleneck": bottleneck or GaussianPosterior(channels=3),
        "optimizer": partial(torch.optim.Adam, lr=3e-3),
    }
    return Autoencoder(spec, **(settings | options))


def without_trainer(model: Autoencoder) -> Autoencoder:
    """Make the model able to take training steps without a Trainer."""
    optimizers = model.configure_optimizers()
    model.optimizers = lambda: optimizers  # type: ignore[method-assign,assignment]
    model.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign,assignment]
    return model


def digits(n: int) -> Tensor:
    return next(iter(Digits().batches("train", n)))[0]


def test_the_kl_bottleneck_samples_its_posterior_and_penalises_its_kl() -> None:
    h = torch.randn(5, 6, 2, 2)
    bottleneck = GaussianPosterior(channels=3, weight=0.2)
    _, metrics = bottleneck(h, source(5))
    mean, std = h[:, :3], (0.5 * h[:, 3:]).exp()
    q = torch.distributions.Normal(mean, std)
    divergence = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).flatten(1).mean(1)
    assert torch.allclose(metrics["kl"], divergence, atol=1e-5)
    assert torch.allclose(metrics["penalty"], 0.2 * divergence, atol=1e-5)
    assert torch.equal(bottleneck.mode(h), mean)
    many, _ = bottleneck(h[:1].expand(20_000, -1, -1, -1), source(20_000))
    assert torch.allclose(many.mean(0), mean[0], atol=4 * float(std[0].max()) / 20_000**0.5)
    assert torch.allclose(many.std(0), std[0], rtol=0.03)


def vq(codes: Tensor, **options: Any) -> VectorQuantizer:
    """Return a quantiser with the given codes."""
    quantizer = VectorQuantizer(channels=codes.shape[1], num_codes=len(codes), **options)
    quantizer.codebook.copy_(codes)
    quantizer.counts.fill_(1.0)
    quantizer.sums.copy_(codes)
    quantizer.started.fill_(True)
    return quantizer


def test_vectors_become_their_nearest_code_with_straight_through_gradients() -> None:
    codes = torch.randn(7, 2)
    bottleneck = vq(codes, commitment=0.5).eval()
    h = torch.randn(4, 2, 3, 3, requires_grad=True)
    z, metrics = bottleneck(h, source(4))
    vectors = h.detach().permute(0, 2, 3, 1).reshape(-1, 2).numpy()
    nearest = ((vectors[:, None] - codes.numpy()[None]) ** 2).sum(2).argmin(1)
    expected = torch.from_numpy(codes.numpy()[nearest]).reshape(4, 3, 3, 2).permute(0, 3, 1, 2)
    assert torch.allclose(z, expected, atol=1e-6)
    assert torch.allclose(bottleneck.quantize(h.detach()), expected)
    distance = (h.detach() - expected).square().flatten(1).mean(1)
    assert torch.allclose(metrics["penalty"], 0.5 * distance, atol=1e-6)
    weight = torch.randn_like(z)
    (z * weight).sum().backward()
    assert torch.allclose(h.grad, weight), "the gradient of the codes is passed to the vectors"
    shares = np.bincount(nearest, minlength=7) / len(nearest)
    entropy = -(shares[shares > 0] * np.log(shares[shares > 0])).sum()
    assert metrics["perplexity"][0].item() == pytest.approx(np.exp(entropy), rel=1e-5)


def test_codes_are_moving_averages_of_their_vectors() -> None:
    codes = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    bottleneck = vq(codes, decay=0.9, revival_threshold=0.0).train()
    h = torch.tensor([[-1.2, 0.3], [-0.8, 0.1], [-1.0, -0.7], [2.0, 1.0]]).reshape(4, 2, 1, 1)
    bottleneck(h, source(4))
    # Three vectors chose the first code and one chose the second. Counts are divided by the mean, 2 vectors per code.
    count = 0.9 * 1 + 0.1 * np.array([3 / 2, 1 / 2])
    sums = 0.9 * np.array([[-1.0, 0.0], [1.0, 0.0]]) + 0.1 * np.array([[-3.0, -0.3], [2.0, 1.0]]) / 2
    assert np.allclose(bottleneck.codebook.numpy(), sums / count[:, None], atol=1e-6)
    before = bottleneck.codebook.clone()
    bottleneck.eval()(h, source(4))
    assert torch.equal(bottleneck.codebook, before), "codes change in training only"


def test_an_unused_code_is_reset_to_a_vector_of_the_batch() -> None:
    bottleneck = vq(torch.tensor([[0.0], [100.0]]), decay=0.5, revival_threshold=0.1).train()
    h = torch.randn(8, 1, 1, 1)
    for step in range(5):
        bottleneck(h, source(8, step))
    assert bottleneck.codebook.max() < 5
    assert bottleneck(h, source(8))[1]["perplexity"][0] > 1.2


def test_codes_are_initialised_from_the_first_batch() -> None:
    bottleneck = VectorQuantizer(channels=2, num_codes=4).train()
    h = 50 + torch.randn(16, 2, 2, 2)
    bottleneck(h, source(16))
    assert bottleneck.codebook.min() > 40


@pytest.mark.parametrize("num_codes", [16, 64, 512])
def test_rounding_does_not_decide_which_code_is_nearest(num_codes: int) -> None:
    """Assignments are the same in float32 and float64, although half of all vectors are equal (an empty background)
    and far from the origin, and codes are reset to some of them."""
    h = torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(0)) + 30
    h[:, :, 2:] = torch.tensor([30.1, 30.2, 30.3, 30.4])[:, None, None]
    drift = 1e-3 * torch.randn(h.shape, generator=torch.Generator().manual_seed(1))
    drift[:, :, 2:] = drift[:1, :, 2:3, :1]
    assigned = []
    for dtype in (torch.float32, torch.float64):
        bottleneck = VectorQuantizer(4, num_codes=num_codes, decay=0.9).to(dtype).train()
        steps = []
        for step in range(6):
            x = (h.double() + step * drift.double()).to(dtype)
            bottleneck(x, source(8, step))
            steps.append(bottleneck.nearest(x.movedim(1, -1).flatten(0, -2)))
        assigned.append(torch.stack(steps))
    assert torch.equal(*assigned)


def test_a_codebook_that_collapses_despite_resets_stops_training() -> None:
    model = autoencoder(bottleneck=vq(torch.tensor([[0.0], [1.0]]), decay=0.5, revival_threshold=0.25))
    same, bottleneck = torch.zeros(4, 1, 1, 1), model.coder.bottleneck.train()
    steps_to_revival = 2  # steps for a count of 1 to fall to 1/4
    for step in range(VectorQuantizer.PATIENCE + steps_to_revival):
        bottleneck.check_collapse()
        bottleneck(same, source(4, step))
    assert bottleneck.codebook.abs().max() < 1, "the other code was reset"  # type: ignore[union-attr,operator]
    with pytest.raises(UserError, match=r"collapsed.*model\.optimizer\.lr"):
        model.validation_metrics(torch.zeros(2, 1, 8, 8), {}, source(2))
    with pytest.raises(UserError, match="collapsed"):
        model.on_save_checkpoint({})


@pytest.mark.parametrize("num_codes, places", [(20, 2), (256, 5)])
def test_using_few_of_many_codes_is_a_collapse(num_codes: int, places: int) -> None:
    """The vectors are at a few positions and have a little noise, so codes that were reset are used occasionally."""
    model = autoencoder(bottleneck=VectorQuantizer(1, num_codes=num_codes, decay=0.5, revival_threshold=0.25))
    bottleneck = model.coder.bottleneck.train()
    for step in range(VectorQuantizer.PATIENCE + 2):
        bottleneck.check_collapse()
        generator = torch.Generator().manual_seed(step)
        at = torch.arange(300.0).remainder(places).view(300, 1, 1, 1)
        # One of 300 vectors is slightly off.
        noise = 1e-3 * torch.randn(300, 1, 1, 1, generator=generator)
        bottleneck(at + noise * (torch.arange(300) == step).view(300, 1, 1, 1), source(300, step))
    assert not bottleneck.possibly_collapsed, "the collapse is certain"
    with pytest.raises(TrainingStopped, match=rf"nearly all vectors used at most {places} of {num_codes}"):
        bottleneck.check_collapse()


def test_more_codes_than_vectors_is_not_a_collapse() -> None:
    bottleneck = VectorQuantizer(2, num_codes=2048, decay=0.5).train()
    for step in range(VectorQuantizer.PATIENCE + 20):
        bottleneck(torch.randn(32, 2, 1, 1, generator=torch.Generator().manual_seed(step)), source(32, step))
    bottleneck.check_collapse()
    assert not bottleneck.possibly_collapsed


@pytest.mark.parametrize("num_codes", [2, 64])
def test_a_small_codebook_or_a_common_code_is_not_a_collapse(num_codes: int) -> None:
    """There is no collapse if two codes are both in use, or if nine of ten vectors use one code but all other codes are
    in use."""
    bottleneck = VectorQuantizer(1, num_codes=num_codes, decay=0.5).train()
    for step in range(VectorQuantizer.PATIENCE + 100):
        x = torch.zeros(640, 1, 1, 1)
        x[:64] = torch.arange(1.0, 65).view(64, 1, 1, 1)
        bottleneck(x, source(640, step))
    bottleneck.check_collapse()


def learn_codes(rank: int, world: int) -> dict[str, Tensor]:
    """Train one of ``world`` processes for three steps on its part of each batch."""
    torch.manual_seed(0)
    quantizer = VectorQuantizer(channels=2, num_codes=8, revival_threshold=0.2)
    # Adam would amplify rounding errors of zero gradients.
    sgd = partial(torch.optim.SGD, lr=1e-2)
    model = without_trainer(autoencoder(bottleneck=quantizer, discriminator=PatchDiscriminator, optimizer=sgd))
    model.adversarial_start = 0.0
    x = digits(24)
    rows = slice(rank * 8 // world, (rank + 1) * 8 // world)
    for step in range(3):
        model.rng = RandomSource(torch.Generator().manual_seed(step), rows.start, rows.stop, 8)
        model.training_step((x[8 * step :][rows], {}), step)
    return model.state_dict()


@needs_fork
def test_two_processes_learn_the_same_as_one(tmp_path: Path) -> None:
    (alone,) = in_processes(1, tmp_path, learn_codes)
    first, second = in_processes(2, tmp_path, learn_codes)
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(value.float(), first[name].float(), atol=1e-4), name


def perceptual(channels: int = 1) -> PerceptualNetwork:
    torch.manual_seed(3)
    return PerceptualNetwork(VGG(channels, 10, widths=[8, 8]), "random", "0" * 64)


def test_the_perceptual_distance_is_differentiable_in_the_images() -> None:
    network = perceptual()
    x, y = torch.rand(3, 1, 8, 8) * 2 - 1, torch.rand(3, 1, 8, 8) * 2 - 1
    assert (network(x, x) == 0).all() and (network(x, y) > 0).all()
    assert torch.allclose(network(x, y), network(y, x))
    expected = np.zeros(3)
    for a, b in zip(network.network.activations(x), network.network.activations(y), strict=True):
        a, b = a.numpy(), b.numpy()
        a, b = (v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-6) for v in (a, b))
        expected += ((a - b) ** 2).sum(1).mean((1, 2))
    assert np.allclose(network(x, y).numpy(), expected, atol=1e-5)
    y.requires_grad_()
    network(x, y).sum().backward()
    assert y.grad is not None and y.grad.abs().sum() > 0
    assert all(p.grad is None for p in network.parameters()) and not network.train().network.training


@pytest.mark.parametrize(("name", "least"), [("fashion_mnist", 0.7), ("cifar10", 0.35)])
def test_the_shipped_networks_classify_images(name: str, least: float, data_root: Path, cache: Path) -> None:
    data = build_data(compose(f"data={name}", f"paths.data={data_root}", f"paths.cache={cache}"))
    network = perceptual_network(data.spec.shape[0])
    assert len(network.sha256) == 64
    x, cond = next(iter(data.batches("test", 500)))
    with torch.no_grad():
        assert (network.network(x).argmax(1) == cond["label"]).float().mean() > least


def test_missing_or_damaged_weights_raise_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"2 channels.*model/perceptual=null"):
        perceptual_network(2)
    with pytest.raises(UserError, match="no perceptual network"):
        perceptual_network(1, tmp_path / "none.safetensors")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"nothing")
    with pytest.raises(UserError, match="corrupted"):
        perceptual_network(1, damaged)


def test_lpips_matches_torchmetrics_or_says_where_its_weights_go(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    from gencompare.models.autoencoder import lpips

    with pytest.raises(UserError, match="3 channels"):
        lpips(1)

    def offline(*args: Any, **kwargs: Any) -> Any:
        raise OSError("no network")

    monkeypatch.setattr(torchvision.models, "vgg16", offline)
    with pytest.raises(UserError, match=r"vgg16-397923af.pth.*TORCH_HOME.*model/perceptual=trained"):
        lpips(3)
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    monkeypatch.setattr(torchvision.models, "vgg16", lambda **_: SimpleNamespace(features=layers))
    torch.manual_seed(0)
    peer = LearnedPerceptualImagePatchSimilarity(net_type="vgg", reduction="none")
    torch.manual_seed(0)
    own = lpips(3)
    x, y = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 3, 32, 32) * 2 - 1
    assert own(x, y).shape == (2,) and not own.train().training
    assert own.name == compose("evaluation=vgg16").evaluation.available.vgg16.name, "the name under which VGG16 ranks"
    assert own(x, y).sum().item() == pytest.approx(peer(x, y).sum().item(), rel=1e-4)
    y.requires_grad_()
    own(x, y).sum().backward()
    assert y.grad is not None and y.grad.abs().sum() > 0


def test_the_adaptive_weight_balances_gradient_norms() -> None:
    """With the weight lambda, both gradients have equal norm at the last decoder weight (Esser et al. 2021, eq. 7)."""
    model = autoencoder(discriminator=PatchDiscriminator)
    x = digits(8)
    reconstruction, _ = model.coder(x, source(8))
    loss, generator_loss = (x - reconstruction).abs().mean(), -model.discriminator(reconstruction).mean()  # type: ignore[misc]
    adaptive_weight = model._adaptive_weight(loss, generator_loss)
    last = model.coder.decoder.out.weight  # type: ignore[union-attr]
    (one,) = torch.autograd.grad(loss, last, retain_graph=True)  # type: ignore[arg-type]
    (two,) = torch.autograd.grad(adaptive_weight.detach() * generator_loss, last)  # type: ignore[arg-type]
    assert one.norm().item() == pytest.approx(two.norm().item(), rel=1e-3)


def test_each_patch_has_its_own_hinge_loss() -> None:
    """A patch within the margin has a loss, no matter how far beyond it the other patches of the image are."""

    class Patches(nn.Module):
        def __init__(self, shape: tuple[int, ...]) -> None:
            super().__init__()
            self.scores = nn.Parameter(torch.tensor([0.5, 5.0]))

        def forward(self, x: Tensor) -> Tensor:
            return self.scores.expand(len(x), 2)

    model = autoencoder(discriminator=Patches)
    losses: list[Tensor] = []
    model.optimizers = lambda: [None, SimpleNamespace(zero_grad=lambda: None, step=lambda: None)]  # type: ignore
    model.manual_backward = lambda loss: losses.append(loss) or loss.backward()  # type: ignore
    metrics = model._discriminator_step(digits(4), digits(4))
    # Real: max(0, 1 - 0.5) and max(0, 1 - 5) = 0; reconstructed: 1.5 and 6; means over the patches.
    assert metrics["d_loss"].item() == pytest.approx((0.5 + 0) / 2 + (1.5 + 6) / 2)
    assert PatchDiscriminator((3, 32, 32))(torch.zeros(2, 3, 32, 32)).shape == (2, 36)


def test_the_discriminator_starts_after_its_fraction_of_the_budget() -> None:
    model = without_trainer(autoencoder(discriminator=PatchDiscriminator, adversarial_start=0.5))
    before = {name: value.clone() for name, value in model.discriminator.state_dict().items()}  # type: ignore[union-attr]
    model.rng = source(8)
    assert "d_loss" not in model.training_step((digits(8), {}), 0)
    after = model.discriminator.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(before[name], after[name]) for name in before)
    model.progress, model.rng = 0.5, source(8)
    metrics = model.training_step((digits(8), {}), 1)
    assert metrics["d_loss"] > 0 and not all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("bottleneck", [lambda: GaussianPosterior(4, 1e-4), lambda: VectorQuantizer(4, num_codes=64)])
def test_a_few_images_are_memorised(bottleneck: Any) -> None:
    model = without_trainer(autoencoder(bottleneck=bottleneck(), optimizer=partial(torch.optim.Adam, lr=1e-2)))
    x = digits(6)
    for step in range(100):
        model.rng = source(6, step)
        model.training_step((x, {}), step)
    metrics = model.eval().validation_metrics(x, {}, source(6))
    assert metrics["psnr"].mean() > 18
    assert all(value.shape == (6,) for value in metrics.values())


@pytest.mark.parametrize("bottleneck", [lambda: GaussianPosterior(3), lambda: VectorQuantizer(3, num_codes=64)])
def test_latents_are_whitened_and_decode_deterministically(bottleneck: Any) -> None:
    data = Digits()
    trained = autoencoder(bottleneck=bottleneck())
    with torch.no_grad():
        for p in trained.coder.parameters():
            p.add_(0.01)  # weights other than the initial ones
    latents = Latents(Digits.spec, autoencoder=partial(autoencoder, bottleneck=bottleneck()))
    assert isinstance(latents, LatentSpace) and isinstance(latents, SupportsReconstruction)
    latents.load_autoencoder(trained.coder, (x for x, _ in data.batches("train")))
    x = torch.cat([x for x, _ in data.batches("train")])
    w = latents.encode(x).double()
    assert w.shape[1:] == latents.latent_shape
    assert torch.allclose(w.mean((0, 2, 3)), torch.zeros(3, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(w.var((0, 2, 3)), torch.ones(3, dtype=torch.float64), atol=1e-3)
    reconstruction = latents.decode(latents.encode(x[:4]))
    assert torch.equal(reconstruction, latents.decode(latents.encode(x[:4])))
    assert torch.allclose(reconstruction, trained.coder.decode(trained.coder.encode(x[:4])), atol=1e-4)
    assert not any(p.requires_grad for p in latents.parameters()) and not latents.train().coder.training


def test_a_constant_latent_channel_raises_an_error() -> None:
    trained = autoencoder()
    with torch.no_grad():
        trained.coder.encoder.out.weight.zero_()  # type: ignore[union-attr,operator]
    with pytest.raises(UserError, match="fewer latent channels"):
        Latents(Digits.spec, autoencoder=autoencoder).load_autoencoder(trained.coder, [digits(8)])


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 64, 64), (1, 28, 28)])
def test_every_image_size_is_supported(shape: tuple[int, int, int]) -> None:
    channel_mult = (1, 1, 2)
    coder = AutoencoderCore(
        DataSpec("images", shape),
        encoder=partial(LatentEncoder, channels=8, channel_mult=channel_mult, num_blocks=2),
        decoder=partial(LatentDecoder, channels=8, channel_mult=channel_mult, num_blocks=2),
        bottleneck=GaussianPosterior(4),
    )
    assert coder.latent_shape == (4, shape[1] // 4, shape[2] // 4)
    x = torch.rand(2, *shape) * 2 - 1
    assert coder.decode(coder.encode(x)).shape == x.shape
    discriminator = PatchDiscriminator(shape, channels=8, num_layers=3)
    scores = discriminator(x)
    assert len(scores) == 2 and scores.ndim == 2 and torch.allclose(discriminator(x[:1]), scores[:1], atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: autoencoder(encoder=partial(LatentEncoder, channels=8, channel_mult=(1, 1, 1, 1, 1))),
            "halved 4 times",
        ),
        (lambda: autoencoder(encoder=partial(LatentEncoder, channels=9)), "multiple of 8"),
        (lambda: GaussianPosterior(channels=0), "channels=0 must be at least 1"),
        (lambda: GaussianPosterior(weight=-1.0), "weight=-1.0 must be a number of at least 0"),
        (lambda: VectorQuantizer(num_codes=1), "at least 2 codes"),
        (lambda: autoencoder(adversarial_start=1.5), "adversarial_start"),
        (lambda: Latents(Digits.spec, autoencoder=lambda spec, **_: nn.Identity()), "Identity is not an autoencoder"),
    ],
)
def test_invalid_settings_raise_an_error(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
