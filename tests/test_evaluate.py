"""evaluate(): one protocol for models and images, and the same metrics for any number of processes."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from gencompare.data.datamodule import ImageData, Split
from gencompare.data.digits import Digits
from gencompare.data.toy2d import Toy2D
from gencompare.errors import UserError
from gencompare.evaluation.evaluate import EvaluationProtocol, evaluate
from gencompare.evaluation.extractors.extractor import IdentityExtractor
from gencompare.evaluation.extractors.selection import module_extractor
from gencompare.evaluation.metrics.compute import cheap_metrics
from gencompare.evaluation.model_metrics import reconstruction
from gencompare.evaluation.reference import quantize_split
from gencompare.evaluation.sampling import count_rows, draw_samples, labels_like
from gencompare.generative_model import Cond, DataSpec, LikelihoodEstimate
from gencompare.models.gaussian import GaussianBaseline
from gencompare.records import Result, RunRecord, SampleSettings
from gencompare.rng import derive_seed


class Tiny(ImageData):
    """2x2 images of 256 levels around one of two means, in a ratio of 3 to 1. Their pixels are cheap features."""

    spec = DataSpec(name="tiny", shape=(1, 2, 2), num_classes=2)

    def load(self) -> dict[str, Split]:
        splits = {}
        for k, (name, n) in enumerate({"train": 900, "val": 200, "test": 300}.items()):
            label = (torch.arange(n) % 4 == 3).long()
            noise = torch.randn(n, 1, 2, 2, generator=torch.Generator().manual_seed(k))
            images = (80 + 90 * label[:, None, None, None] + 20 * noise).round().clamp(0, 255).to(torch.uint8)
            splits[name] = Split(images, label)
        return splits


class UniformModel(nn.Module):
    """Draws uniform images. Its network is called on 2 n inputs, then on n: three evaluations per image."""

    conditional = False
    spec = Tiny.spec

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Identity()
        self.frozen = nn.Dropout()
        self.train()
        self.frozen.eval()
        self.conds: list[Cond] = []

    def sample(self, n: int, cond: Cond | None = None, *, generator: torch.Generator) -> Tensor:
        assert not any(module.training for module in self.modules())
        assert not torch.is_grad_enabled()
        self.conds.append(dict(cond or {}))
        x = torch.rand(n, 1, 2, 2, generator=generator) * 2 - 1
        self.net(torch.cat([x, x]))
        return self.net(x)

    def nfe_networks(self) -> dict[str, nn.Module]:
        return {"net": self.net}

    def sampling_description(self) -> str:
        return "uniform"


class Failing(UniformModel):
    """Returns NaN for one chunk."""

    def sample(self, n: int, cond: Cond | None = None, *, generator: torch.Generator) -> Tensor:
        if generator.initial_seed() == self.bad:
            return torch.full((n, 1, 2, 2), float("nan"))
        return super().sample(n, cond, generator=generator)

    bad = 0


IDENTITY = EvaluationProtocol(extractors=(IdentityExtractor,), num_images=300, chunk_size=40)


def values(result: Result) -> dict[str, float | None]:
    return {name: metric.value for name, metric in result.metrics.items()}


# Sampling


def test_chunks_depend_on_seed_and_position_only() -> None:
    model = UniformModel()
    long, short = (
        draw_samples(model, 100, seed=3, chunk_size=40).images,
        draw_samples(model, 40, seed=3, chunk_size=40).images,
    )
    assert torch.equal(long[:40], short)
    assert not torch.equal(long[:40], long[40:80]) and not torch.equal(
        long, draw_samples(model, 100, seed=4, chunk_size=40).images
    )
    assert [len(draw_samples(model, n, chunk_size=40).images) for n in (1, 39, 40, 41)] == [1, 39, 40, 41]


def test_network_evaluations_are_counted_and_modes_restored() -> None:
    model = UniformModel()
    samples = draw_samples(model, 100, chunk_size=40)
    assert samples.nfe == {"net": 3.0} and samples.seconds > 0 and samples.peak_memory_bytes > 0
    assert model.training and model.net.training and not model.frozen.training
    assert not model.net._forward_hooks


class Rows(nn.Module):
    def forward(self, n: int) -> Tensor:
        return torch.zeros(n, 1, 2, 2)


class Parts(nn.Module):
    def forward(self, parts: list[Tensor]) -> list[Tensor]:
        return parts


def test_networks_without_batched_inputs_are_counted_by_their_outputs() -> None:
    networks = {"rows": Rows(), "parts": Parts()}
    with count_rows(networks) as rows:
        networks["rows"](5)
    assert rows == {"rows": 5}
    with count_rows(networks), pytest.raises(UserError, match=r"'parts' cannot be counted.*nfe_networks\(\)"):
        networks["parts"]([torch.zeros(2, 1)])


def test_flops_per_sample_are_those_of_its_network_evaluations() -> None:
    """A sample takes three products of a 4x4 matrix with a vector, 3 * 2 * 4 * 4 FLOPs, whatever the chunk size."""
    model = UniformModel()
    model.net = nn.Sequential(nn.Flatten(), nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Unflatten(1, (1, 2, 2)))
    result = evaluate(model, Tiny(), IDENTITY)
    assert result.details["flops_per_sample"] == 3 * 2 * 4 * 4


def test_labels_have_the_proportions_of_the_reference() -> None:
    reference = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)
    labels = labels_like(reference, 1000, seed=0)
    assert torch.bincount(labels).tolist() == [500, 300, 200]
    assert torch.equal(labels, labels_like(reference, 1000, seed=0))
    first = torch.bincount(labels[:100], minlength=3)
    assert (first > 5).all(), "labels are shuffled"
    counts = torch.bincount(labels_like(reference, 7, seed=0), minlength=3)
    assert ((counts - 7 * torch.tensor([0.5, 0.3, 0.2])).abs() < 1).all()


def test_a_conditional_model_gets_labels_in_reference_proportions() -> None:
    model = UniformModel()
    model.conditional = True
    data = Tiny()
    result = evaluate(model, data, IDENTITY)
    labels = torch.cat([cond["label"] for cond in model.conds])
    assert torch.bincount(labels[:300]).tolist() == [225, 75], "one more sample is drawn to count FLOPs"
    assert (result.measurement.conditioning, result.measurement.label_distribution) == ("labels", "train")
    unconditional = evaluate(UniformModel(), data, IDENTITY)
    assert unconditional.measurement.differences(result.measurement).keys() == {"conditioning", "label_distribution"}
    assert unconditional.metrics["fd_raw"] == result.metrics["fd_raw"], "this model ignores its labels"


# Metrics


def test_a_model_and_its_saved_images_get_the_same_metrics() -> None:
    data, kept = Tiny(), []
    one = evaluate(UniformModel(), data, IDENTITY, generation=SampleSettings(weights="ema"), on_samples=kept.append)
    two = evaluate(kept[0], data, IDENTITY)
    padded = evaluate(kept[0].float() / 127.5 - 1, data, IDENTITY)
    assert values(one) == values(two) == values(padded)
    assert one.measurement == two.measurement
    assert one.generation.nfe == {"net": 3.0} and one.generation.sampler == "uniform"
    assert one.generation.weights == "ema" and two.generation.nfe is None
    assert (
        one.primary_metric == "mmd_raw"
        and one.measurement.num_images == 300
        and one.measurement.num_reference_images == 900
    )
    assert one.measurement.reference_hash == data.hash("train")


def test_the_baseline_is_the_metric_of_test_images() -> None:
    data = Tiny()
    real = evaluate(data.split("test").images, data, IDENTITY)
    for name in ("mmd_raw", "fd_raw", "kd_raw", "precision", "recall"):
        assert real.metrics[name].value == pytest.approx(real.metrics[name].baseline, rel=1e-9), name
    assert real.metrics["memorization"].value is None
    more = evaluate(UniformModel(), data, dataclasses.replace(IDENTITY, num_images=500))
    assert more.metrics["fd_raw"].baseline == real.metrics["fd_raw"].baseline
    assert "300 test images" in more.metrics["fd_raw"].note
    assert evaluate(UniformModel(), data, IDENTITY).metrics["fd_raw"].ratio_to_baseline > 100  # type: ignore[operator]


def test_continuous_data_are_measured_without_quantization() -> None:
    data = Toy2D(num_points=600)
    result = evaluate(data.split("val").images, data)
    assert (
        result.primary_metric == "mmd_raw"
        and result.measurement.quantization == "none"
        and result.measurement.num_images == 600
    )
    assert result.metrics["fd_raw"].value == pytest.approx(0, abs=0.02)
    assert "confident" not in result.metrics


def test_too_few_or_invalid_samples_are_refused() -> None:
    data = Tiny()
    cases: list[tuple[Any, EvaluationProtocol, str]] = [
        (UniformModel(), dataclasses.replace(IDENTITY, num_images=4), "evaluation.num_images=4 .*at least 20"),
        (UniformModel(), dataclasses.replace(IDENTITY, reference="tset"), "no split 'tset'"),
        (torch.zeros(200, 1, 2, 2), IDENTITY, "needs 300 images, but only 200"),
        (torch.zeros(3, 1, 2, 2), dataclasses.replace(IDENTITY, num_images=None), "3 samples are too few"),
        (torch.full((300, 1, 2, 2), math.nan), IDENTITY, "300 of 300 samples contain NaN"),
        (torch.zeros(300, 3, 2, 2), IDENTITY, "has images of shape"),
        (Digits.spec, IDENTITY, ""),
    ]
    for source, protocol, message in cases[:-1]:
        with pytest.raises(UserError, match=message):
            evaluate(source, data, protocol)
    with pytest.raises(UserError, match="labels"):
        evaluate(torch.zeros(300, 1, 2, 2), data, IDENTITY, labels=torch.zeros(2))


def test_suspicious_samples_get_warnings() -> None:
    flat = evaluate(torch.zeros(300, 1, 2, 2), Tiny(), IDENTITY)
    assert any("generates a single image" in warning for warning in flat.details["warnings"])
    unit = evaluate(torch.rand(300, 1, 2, 2), Tiny(), IDENTITY)
    assert any("[0, 1]" in warning for warning in unit.details["warnings"])
    assert evaluate(UniformModel(), Tiny(), IDENTITY).details["warnings"] == []


# Likelihoods and reconstructions


class Scoring(UniformModel):
    def likelihoods(self) -> dict[str, LikelihoodEstimate]:
        return {
            "mean": LikelihoodEstimate(
                "bound", lambda x, cond, g: {"far": x.mean((1, 2, 3)), "near": torch.full((len(x),), 2)}
            ),
            "noise": LikelihoodEstimate("estimate", lambda x, cond, g: {"all": torch.rand(len(x), generator=g)}),
            "broken": LikelihoodEstimate("exact", lambda x, cond, g: {"all": torch.full((len(x),), math.nan)}),
        }

    def reconstruct(self, x: Tensor, cond: Cond, *, generator: torch.Generator) -> Tensor:
        return x + torch.where(x < 0, 2, -2) * 3 / 255


def test_likelihoods_are_means_over_test_images() -> None:
    data = Tiny()
    result = evaluate(Scoring(), data, IDENTITY)
    expected = (data.split("test").images.double() / 127.5 - 1).mean() + 2
    assert result.metrics["bpd_mean"].value == pytest.approx(float(expected), rel=1e-6)
    assert result.metrics["bpd_mean"].note == f"bound, 300 test images; far {float(expected) - 2:.3g} + near 2"
    assert result.metrics["bpd_broken"].value is None and "300 of them" in result.metrics["bpd_broken"].note
    assert result.metrics["psnr"].value == pytest.approx(10 * math.log10(255**2 / 9), rel=1e-6)
    few = evaluate(Scoring(), data, dataclasses.replace(IDENTITY, num_likelihood_images=100))
    assert few.metrics["bpd_mean"].note.startswith("bound, 100 of 300 test images; far")
    third = data.split("test").images[::3].double()
    assert few.metrics["bpd_mean"].value == pytest.approx(float((third / 127.5 - 1).mean() + 2), rel=1e-6)
    assert "bpd_mean" not in evaluate(UniformModel(), data, IDENTITY).metrics


# Processes


def one_of(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    try:
        sizes = []
        drawn = draw_samples(
            UniformModel(), 230, seed=5, chunk_size=40, progress=lambda done, n: sizes.append((done, n))
        )
        result = evaluate(Scoring(), Tiny(), IDENTITY)
        failures = []
        bad = Failing()
        bad.bad = derive_seed(0, "sample", 2)
        try:
            draw_samples(bad, 230, chunk_size=40)
        except UserError as error:
            failures.append(str(error))
        torch.save(
            {"images": drawn.images, "nfe": drawn.nfe, "values": values(result), "id": result.id, "sizes": sizes,
             "failures": failures},
            f"{folder}/{rank}.pt",
        )  # fmt: skip
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("world", "most_chunks"), [(2, 3), (4, 2)])
def test_ranks_draw_the_same_images_and_get_the_same_metrics(world: int, most_chunks: int, tmp_path: Path) -> None:
    """The 6 chunks are divided among the ranks."""
    mp.start_processes(one_of, (world, str(tmp_path)), nprocs=world, start_method="fork")  # type: ignore[attr-defined]
    alone = draw_samples(UniformModel(), 230, seed=5, chunk_size=40)
    expected = evaluate(Scoring(), Tiny(), IDENTITY)
    for rank in range(world):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(found["images"], alone.images) and found["nfe"] == alone.nfe
        assert len(found["sizes"]) <= most_chunks, "the chunks are divided among the ranks"
        assert found["values"].keys() == values(expected).keys() and found["id"] == expected.id
        for name, value in values(expected).items():
            assert found["values"][name] == (value if value is None else pytest.approx(value, rel=1e-6)), name
        assert len(found["failures"]) == 1 and "NaN" in found["failures"][0], "an error on one rank is raised on all"


# The default protocol


def test_all_extractors_measure_the_same_samples() -> None:
    """The first extractor is used for ranking. The others measure the same images, and a record lists their results
    too."""
    data = Tiny()
    twice = dataclasses.replace(
        IDENTITY, extractors=(IdentityExtractor, lambda spec: module_extractor(spec, Twice(), "twice"))
    )
    model = UniformModel()
    result = evaluate(model, data, twice)
    assert len(model.conds) == 8 + 1, "each of 8 chunks is drawn once, and one image to count FLOPs"
    (other,) = result.secondary_results
    assert (result.measurement.extractor, other.measurement.extractor) == ("raw", "twice")
    assert result.primary_metric == "mmd_raw" and other.primary_metric == "mmd_twice"
    assert other.generation == result.generation
    # The kernel's bandwidth follows the features, so their scale does not matter.
    assert other.metrics["mmd_twice"].value == pytest.approx(result.metrics["mmd_raw"].value, rel=1e-3)
    record = RunRecord("run", "fake", {})
    record.add_result(result)
    record.add_result(result)
    assert [r.measurement.extractor for r in record.results] == ["raw", "twice"]
    assert all(r.secondary_results == [] for r in record.results)
    with pytest.raises(UserError, match="twice"):
        evaluate(UniformModel(), data, dataclasses.replace(IDENTITY, extractors=(IdentityExtractor, IdentityExtractor)))


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x.flatten(1)


def test_the_default_protocol_measures_digits_with_two_networks(cache: Path) -> None:
    data = Digits()
    baseline = GaussianBaseline(data.spec).fit(data.batches("train"), data.batches("val"))
    protocol = EvaluationProtocol(cache=cache)
    result = evaluate(baseline, data, protocol)
    (second,) = result.secondary_results
    assert result.primary_metric == "mmd_efficientnet_lite0" and second.measurement.extractor == "digits"
    primary = result.metrics[result.primary_metric]
    assert primary.value is not None and primary.baseline is not None and primary.interval is not None
    assert abs(primary.baseline) < primary.interval[0], "the baseline is worse than real images"
    assert primary.ratio_to_baseline is None, "a ratio to an unbiased distance of real images is meaningless"
    assert result.metrics["memorization"].value == pytest.approx(1, abs=0.1)
    assert result.metrics["bpd_density"].note.startswith("bound") and "bpd_density" not in second.metrics
    assert {"confident", "class_share_min"} <= second.metrics.keys()
    copies = evaluate(quantize_split(data.split("train").images[:500], data.spec), data, protocol)
    assert copies.metrics["memorization"].value == copies.metrics["authenticity"].value == 0
    assert copies.metrics[copies.primary_metric].value < primary.interval[0]


def test_cheap_metrics_order_images_by_quality() -> None:
    data = Digits()
    (extractor, _) = EvaluationProtocol().check(data)
    x, _ = next(data.batches("test", 200))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    metrics = [cheap_metrics((x + s * noise).clamp(-1, 1), data, extractor) for s in (0.0, 0.2, 0.5)]
    assert list(metrics[0]) == ["mmd_efficientnet_lite0", "density", "coverage"]
    distances, densities, coverages = (list(values) for values in zip(*(f.values() for f in metrics), strict=True))
    assert distances == sorted(distances)
    assert densities == sorted(densities, reverse=True) and coverages == sorted(coverages, reverse=True)


class Rounds(nn.Module):
    """Rounds each value to one of nine levels."""

    def reconstruct(self, x: Tensor, cond: Cond, *, generator: torch.Generator) -> Tensor:
        return (x * 4).round() / 4


@pytest.mark.parametrize("n, features, used", [(100, 64, 100), (50, 64, 500), (50, 600, None)])
def test_reconstruction_distance_uses_all_test_images_if_needed(n: int, features: int, used: int | None) -> None:
    data, cpu = Digits(), torch.device("cpu")
    extractor = IdentityExtractor(data.spec)
    extractor.dim = features
    found = reconstruction(Rounds(), data, n, 0, extractor, cpu)
    distance = found["rfd_raw"]
    assert distance.note.startswith(found["psnr"].note) and f", {used or n} " in found["psnr"].note
    assert (distance.value is None) == (used is None) == ("too few for 600 features" in distance.note)
