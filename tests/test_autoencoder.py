"""Laws of autoencoders: bottlenecks, the distance of features, the balance of losses, and latents that are whitened."""

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

NARROW = {"channels": 8, "multipliers": (1, 2), "attention": False}


def whole(n: int, seed: int = 0) -> RandomSource:
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


def by_hand(model: Autoencoder) -> Autoencoder:
    """The model with its optimisers and backward pass outside of a trainer."""
    optimizers = model.configure_optimizers()
    model.optimizers = lambda: optimizers  # type: ignore[method-assign,assignment]
    model.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign,assignment]
    return model


def digits(n: int) -> Tensor:
    return next(iter(Digits().batches("train", n)))[0]


def test_the_kl_bottleneck_draws_from_its_gaussian_and_charges_the_divergence() -> None:
    h = torch.randn(5, 6, 2, 2)
    bottleneck = GaussianPosterior(channels=3, weight=0.2)
    _, figures = bottleneck(h, whole(5))
    mean, std = h[:, :3], (0.5 * h[:, 3:]).exp()
    q = torch.distributions.Normal(mean, std)
    divergence = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).flatten(1).mean(1)
    assert torch.allclose(figures["kl"], divergence, atol=1e-5)
    assert torch.allclose(figures["penalty"], 0.2 * divergence, atol=1e-5)
    assert torch.equal(bottleneck.point(h), mean)
    many, _ = bottleneck(h[:1].expand(20_000, -1, -1, -1), whole(20_000))
    assert torch.allclose(many.mean(0), mean[0], atol=4 * float(std[0].max()) / 20_000**0.5)
    assert torch.allclose(many.std(0), std[0], rtol=0.03)


def vq(codes: Tensor, **options: Any) -> VectorQuantizer:
    """A quantiser whose codes are set."""
    made = VectorQuantizer(channels=codes.shape[1], codes=len(codes), **options)
    made.codebook.copy_(codes)
    made.counts.fill_(1.0)
    made.sums.copy_(codes)
    made.started.fill_(True)
    return made


def test_vectors_become_their_nearest_code_and_pass_gradients_straight_through() -> None:
    codes = torch.randn(7, 2)
    bottleneck = vq(codes, commitment=0.5).eval()
    h = torch.randn(4, 2, 3, 3, requires_grad=True)
    z, figures = bottleneck(h, whole(4))
    vectors = h.detach().permute(0, 2, 3, 1).reshape(-1, 2).numpy()
    nearest = ((vectors[:, None] - codes.numpy()[None]) ** 2).sum(2).argmin(1)
    expected = torch.from_numpy(codes.numpy()[nearest]).reshape(4, 3, 3, 2).permute(0, 3, 1, 2)
    assert torch.allclose(z, expected, atol=1e-6)
    assert torch.allclose(bottleneck.settled(h.detach()), expected)
    distance = (h.detach() - expected).square().flatten(1).mean(1)
    assert torch.allclose(figures["penalty"], 0.5 * distance, atol=1e-6)
    weight = torch.randn_like(z)
    (z * weight).sum().backward()
    assert torch.allclose(h.grad, weight), "the gradient of the codes is that of the vectors"
    shares = np.bincount(nearest, minlength=7) / len(nearest)
    entropy = -(shares[shares > 0] * np.log(shares[shares > 0])).sum()
    assert figures["perplexity"][0].item() == pytest.approx(np.exp(entropy), rel=1e-5)


def test_codes_follow_the_mean_of_the_vectors_that_choose_them() -> None:
    codes = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    bottleneck = vq(codes, decay=0.9, revive=0.0).train()
    h = torch.tensor([[-1.2, 0.3], [-0.8, 0.1], [-1.0, -0.7], [2.0, 1.0]]).reshape(4, 2, 1, 1)
    bottleneck(h, whole(4))
    # In units of the mean use, 2 vectors a code: three chose the first, one the second.
    count = 0.9 * 1 + 0.1 * np.array([3 / 2, 1 / 2])
    sums = 0.9 * np.array([[-1.0, 0.0], [1.0, 0.0]]) + 0.1 * np.array([[-3.0, -0.3], [2.0, 1.0]]) / 2
    assert np.allclose(bottleneck.codebook.numpy(), sums / count[:, None], atol=1e-6)
    settled = bottleneck.codebook.clone()
    bottleneck.eval()(h, whole(4))
    assert torch.equal(bottleneck.codebook, settled), "codes move in training alone"


def test_a_code_that_nobody_chooses_is_set_on_a_vector_of_the_batch() -> None:
    bottleneck = vq(torch.tensor([[0.0], [100.0]]), decay=0.5, revive=0.1).train()
    h = torch.randn(8, 1, 1, 1)
    for step in range(5):
        bottleneck(h, whole(8, step))
    assert bottleneck.codebook.max() < 5
    assert bottleneck(h, whole(8))[1]["perplexity"][0] > 1.2


def test_the_first_batch_gives_the_first_codes() -> None:
    bottleneck = VectorQuantizer(channels=2, codes=4).train()
    h = 50 + torch.randn(16, 2, 2, 2)
    bottleneck(h, whole(16))
    assert bottleneck.codebook.min() > 40


def test_a_codebook_that_collapses_in_spite_of_revival_stops_training() -> None:
    model = autoencoder(bottleneck=vq(torch.tensor([[0.0], [1.0]]), decay=0.5, revive=0.25))
    same, bottleneck = torch.zeros(4, 1, 1, 1), model.coder.bottleneck.train()
    revived = 2  # steps in which a count of 1 falls to 1/4
    for step in range(VectorQuantizer.PATIENCE + revived):
        bottleneck.check()
        bottleneck(same, whole(4, step))
    assert bottleneck.codebook.abs().max() < 1, "the other code was revived"  # type: ignore[union-attr,operator]
    with pytest.raises(UserError, match=r"collapsed.*model\.optimizer\.lr"):
        model.validation_metrics(torch.zeros(2, 1, 8, 8), {}, whole(2))
    with pytest.raises(UserError, match="collapsed"):
        model.on_save_checkpoint({})


@pytest.mark.parametrize("codes, places", [(20, 2), (256, 5)])
def test_a_few_codes_of_many_are_a_collapse_too(codes: int, places: int) -> None:
    """Vectors at few places, with a little noise, for which revived codes are chosen now and then."""
    model = autoencoder(bottleneck=VectorQuantizer(1, codes=codes, decay=0.5, revive=0.25))
    bottleneck = model.coder.bottleneck.train()
    for step in range(VectorQuantizer.PATIENCE + 2):
        bottleneck.check()
        generator = torch.Generator().manual_seed(step)
        at = torch.arange(300.0).remainder(places).view(300, 1, 1, 1)
        # One image in 300 is a little elsewhere.
        noise = 1e-3 * torch.randn(300, 1, 1, 1, generator=generator)
        bottleneck(at + noise * (torch.arange(300) == step).view(300, 1, 1, 1), whole(300, step))
    assert not bottleneck.possibly_collapsed, "it is sure"
    with pytest.raises(TrainingStopped, match=rf"nearly all images fell on at most {places} of {codes}"):
        bottleneck.check()


def test_more_codes_than_vectors_are_no_collapse() -> None:
    bottleneck = VectorQuantizer(2, codes=2048, decay=0.5).train()
    for step in range(VectorQuantizer.PATIENCE + 20):
        bottleneck(torch.randn(32, 2, 1, 1, generator=torch.Generator().manual_seed(step)), whole(32, step))
    bottleneck.check()
    assert not bottleneck.possibly_collapsed


@pytest.mark.parametrize("codes", [2, 64])
def test_a_small_codebook_or_a_common_code_is_no_collapse(codes: int) -> None:
    """Both codes of two in use; and a background that nine of ten vectors belong to, with all other codes in use."""
    bottleneck = VectorQuantizer(1, codes=codes, decay=0.5).train()
    for step in range(VectorQuantizer.PATIENCE + 100):
        x = torch.zeros(640, 1, 1, 1)
        x[:64] = torch.arange(1.0, 65).view(64, 1, 1, 1)
        bottleneck(x, whole(640, step))
    bottleneck.check()


def learn_codes(rank: int, world: int) -> dict[str, Tensor]:
    """Three steps of one of ``world`` processes, each with its part of the batches."""
    torch.manual_seed(0)
    quantizer = VectorQuantizer(channels=2, codes=8, revive=0.2)
    # Adam would magnify the rounding of gradients that are nought.
    sgd = partial(torch.optim.SGD, lr=1e-2)
    model = by_hand(autoencoder(bottleneck=quantizer, discriminator=PatchDiscriminator, optimizer=sgd))
    model.adversarial_after = 0.0
    x = digits(24)
    rows = slice(rank * 8 // world, (rank + 1) * 8 // world)
    for step in range(3):
        model.rng = RandomSource(torch.Generator().manual_seed(step), rows.start, rows.stop, 8)
        model.training_step((x[8 * step :][rows], {}), step)
    return model.state_dict()


@needs_fork
def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    (alone,) = in_processes(1, tmp_path, learn_codes)
    first, second = in_processes(2, tmp_path, learn_codes)
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(value.float(), first[name].float(), atol=1e-4), name


def perceptual(channels: int = 1) -> PerceptualNetwork:
    torch.manual_seed(3)
    return PerceptualNetwork(VGG(channels, 10, widths=[8, 8]), "random", "0" * 64)


def test_the_distance_of_features_is_a_distance_whose_gradient_goes_to_the_images() -> None:
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
def test_the_shipped_networks_know_what_is_on_an_image(name: str, least: float, data_root: Path, cache: Path) -> None:
    data = build_data(compose(f"data={name}", f"paths.data={data_root}", f"paths.cache={cache}"))
    network = perceptual_network(data.spec.shape[0])
    assert len(network.sha256) == 64
    x, cond = next(iter(data.batches("test", 500)))
    with torch.no_grad():
        assert (network.network(x).argmax(1) == cond["label"]).float().mean() > least


def test_weights_that_are_missing_damaged_or_others_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"2 channels.*model/perceptual=null"):
        perceptual_network(2)
    with pytest.raises(UserError, match="no perceptual network"):
        perceptual_network(1, tmp_path / "none.safetensors")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged"):
        perceptual_network(1, damaged)


def test_lpips_is_the_published_distance_or_says_where_its_weights_go(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    from gencompare.models.autoencoder import lpips

    with pytest.raises(UserError, match="colour images"):
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
    assert own.name == compose("evaluation=vgg16").evaluation.available.vgg16.name, "what may not measure the model"
    assert own(x, y).sum().item() == pytest.approx(peer(x, y).sum().item(), rel=1e-4)
    y.requires_grad_()
    own(x, y).sum().backward()
    assert y.grad is not None and y.grad.abs().sum() > 0


def test_the_discriminator_pulls_as_hard_as_the_rest_of_the_loss() -> None:
    """lambda makes both gradients equally long at the decoder's last weight (Esser et al. 2021, eq. 7)."""
    model = autoencoder(discriminator=PatchDiscriminator)
    x = digits(8)
    again, _ = model.coder(x, whole(8))
    loss, fooling = (x - again).abs().mean(), -model.discriminator(again).mean()  # type: ignore[misc]
    balance = model._balance(loss, fooling)
    last = model.coder.decoder.out.weight  # type: ignore[union-attr]
    (one,) = torch.autograd.grad(loss, last, retain_graph=True)  # type: ignore[arg-type]
    (two,) = torch.autograd.grad(balance.detach() * fooling, last)  # type: ignore[arg-type]
    assert one.norm().item() == pytest.approx(two.norm().item(), rel=1e-3)


def test_each_patch_is_judged_by_itself() -> None:
    """A patch within the margin is pushed however far beyond it the other patches of its image are."""

    class Patches(nn.Module):
        def __init__(self, shape: tuple[int, ...]) -> None:
            super().__init__()
            self.scores = nn.Parameter(torch.tensor([0.5, 5.0]))

        def forward(self, x: Tensor) -> Tensor:
            return self.scores.expand(len(x), 2)

    model = autoencoder(discriminator=Patches)
    taken: list[Tensor] = []
    model.optimizers = lambda: [None, SimpleNamespace(zero_grad=lambda: None, step=lambda: None)]  # type: ignore
    model.manual_backward = lambda loss: taken.append(loss) or loss.backward()  # type: ignore
    figures = model._discriminator_step(digits(4), digits(4))
    # Real: max(0, 1 - 0.5) and max(0, 1 - 5) = 0; given back: 1.5 and 6; means over the patches.
    assert figures["d_loss"].item() == pytest.approx((0.5 + 0) / 2 + (1.5 + 6) / 2)
    assert PatchDiscriminator((3, 32, 32))(torch.zeros(2, 3, 32, 32)).shape == (2, 36)


def test_the_discriminator_joins_when_its_share_of_the_budget_is_spent() -> None:
    model = by_hand(autoencoder(discriminator=PatchDiscriminator, adversarial_after=0.5))
    before = {name: value.clone() for name, value in model.discriminator.state_dict().items()}  # type: ignore[union-attr]
    model.rng = whole(8)
    assert "d_loss" not in model.training_step((digits(8), {}), 0)
    after = model.discriminator.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(before[name], after[name]) for name in before)
    model.progress, model.rng = 0.5, whole(8)
    figures = model.training_step((digits(8), {}), 1)
    assert figures["d_loss"] > 0 and not all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("bottleneck", [lambda: GaussianPosterior(4, 1e-4), lambda: VectorQuantizer(4, codes=64)])
def test_a_few_images_are_learned_by_heart(bottleneck: Any) -> None:
    model = by_hand(autoencoder(bottleneck=bottleneck(), optimizer=partial(torch.optim.Adam, lr=1e-2)))
    x = digits(6)
    for step in range(100):
        model.rng = whole(6, step)
        model.training_step((x, {}), step)
    figures = model.eval().validation_metrics(x, {}, whole(6))
    assert figures["psnr"].mean() > 18
    assert all(value.shape == (6,) for value in figures.values())


@pytest.mark.parametrize("bottleneck", [lambda: GaussianPosterior(3), lambda: VectorQuantizer(3, codes=64)])
def test_latents_are_whitened_over_the_training_images_and_decode_to_the_same_each_time(bottleneck: Any) -> None:
    data = Digits()
    trained = autoencoder(bottleneck=bottleneck())
    with torch.no_grad():
        for p in trained.coder.parameters():
            p.add_(0.01)  # not the weights that a fresh one has
    latents = Latents(Digits.spec, autoencoder=partial(autoencoder, bottleneck=bottleneck()))
    assert isinstance(latents, LatentSpace) and isinstance(latents, SupportsReconstruction)
    latents.take(trained.coder, (x for x, _ in data.batches("train")))
    x = torch.cat([x for x, _ in data.batches("train")])
    w = latents.encode(x).double()
    assert w.shape[1:] == latents.latent_shape
    assert torch.allclose(w.mean((0, 2, 3)), torch.zeros(3, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(w.var((0, 2, 3)), torch.ones(3, dtype=torch.float64), atol=1e-3)
    again = latents.decode(latents.encode(x[:4]))
    assert torch.equal(again, latents.decode(latents.encode(x[:4])))
    assert torch.allclose(again, trained.coder.decode(trained.coder.encode(x[:4])), atol=1e-4)
    assert not any(p.requires_grad for p in latents.parameters()) and not latents.train().coder.training


def test_a_channel_that_says_nothing_is_refused() -> None:
    trained = autoencoder()
    with torch.no_grad():
        trained.coder.encoder.out.weight.zero_()  # type: ignore[union-attr,operator]
    with pytest.raises(UserError, match="fewer latent channels"):
        Latents(Digits.spec, autoencoder=autoencoder).take(trained.coder, [digits(8)])


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 64, 64), (1, 28, 28)])
def test_every_size_is_encoded_decoded_and_judged(shape: tuple[int, int, int]) -> None:
    multipliers = (1, 1, 2)
    coder = AutoencoderCore(
        DataSpec("images", shape),
        encoder=partial(LatentEncoder, channels=8, multipliers=multipliers, blocks=2),
        decoder=partial(LatentDecoder, channels=8, multipliers=multipliers, blocks=2),
        bottleneck=GaussianPosterior(4),
    )
    assert coder.latent_shape == (4, shape[1] // 4, shape[2] // 4)
    x = torch.rand(2, *shape) * 2 - 1
    assert coder.decode(coder.encode(x)).shape == x.shape
    judge = PatchDiscriminator(shape, width=8, layers=3)
    scores = judge(x)
    assert len(scores) == 2 and scores.ndim == 2 and torch.allclose(judge(x[:1]), scores[:1], atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: autoencoder(encoder=partial(LatentEncoder, channels=8, multipliers=(1, 1, 1, 1, 1))),
            "halved 4 times",
        ),
        (lambda: autoencoder(encoder=partial(LatentEncoder, channels=9)), "multiple of 8"),
        (lambda: GaussianPosterior(channels=0), "at least 1 channel"),
        (lambda: GaussianPosterior(weight=-1.0), "negative"),
        (lambda: VectorQuantizer(codes=1), "at least 2 codes"),
        (lambda: autoencoder(adversarial_after=1.5), "adversarial_after"),
        (lambda: Latents(Digits.spec, autoencoder=lambda spec, **_: nn.Identity()), "Identity is no autoencoder"),
    ],
)
def test_settings_without_sense_are_refused(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
