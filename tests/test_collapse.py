"""Missing modes are detected during training, for any family, and in results."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from gencompare.data.toy2d import Toy2D
from gencompare.evaluation.evaluate import EvaluationProtocol, evaluate
from gencompare.evaluation.extractors.extractor import IdentityExtractor
from gencompare.evaluation.metrics.neighbors import EXPECTED_COVERAGE, compute_prdc, missing_modes
from gencompare.generative_model import Cond, GenerativeModel
from gencompare.rng import RandomSource
from gencompare.training.budget import Budget
from gencompare.training.clock import TrainingClock
from gencompare.training.evaluation_callback import EvaluationCallback

RING = Toy2D("gaussians8", num_points=1000)


def warning(samples: Tensor, best: float = 0.0) -> str | None:
    real = RING.split("val").images.flatten(1)
    near = compute_prdc(samples[:1000], real)
    return missing_modes(near.density, near.coverage, best)


def test_samples_that_miss_modes_and_only_those_are_reported() -> None:
    test = RING.split("test")
    points, labels = test.images.flatten(1), test.labels
    assert labels is not None
    assert warning(points) is None, "as good as real images"
    assert warning(points[labels < 6].repeat(2, 1)) is None, "missing a quarter of the modes is not enough"
    # Three modes of eight: coverage cannot be above 3 / 8.
    assert "cover only 3" in (warning(points[labels < 3].repeat(3, 1)) or "")
    assert "cover only 1" in (warning(points[labels < 1].repeat(9, 1)) or "")
    noise = torch.rand(1000, 2, generator=torch.Generator().manual_seed(0)) + 2
    assert warning(noise) is None, "bad, but not collapsed: no sample is near a real point"
    assert "after 90% earlier" in (warning(noise, best=0.9) or "")
    assert warning(noise, best=0.3) is None, "it was never good"


def test_imperfect_samples_are_reported_only_if_they_cover_almost_nothing() -> None:
    assert missing_modes(density=0.6, coverage=0.25) is None, "a short run without a collapse"
    assert missing_modes(density=0.6, coverage=0.05), "a collapse to a few poor images"
    assert missing_modes(density=9.0, coverage=0.4), "blurred images"


def test_coverage_of_real_images_has_the_expected_value() -> None:
    """Coverage depends on ranks only, so the value holds for any density: here a ring of modes and a ten-dimensional
    normal."""
    normal = torch.randn(2, 2000, 10, generator=torch.Generator().manual_seed(0))
    ring = [RING.split(name).images.flatten(1) for name in ("val", "test")]
    for samples, real in (normal, ring):
        # Neighbours are covered together, so the standard deviation is a few times that of independent coin flips.
        assert compute_prdc(samples, real).coverage == pytest.approx(EXPECTED_COVERAGE, abs=0.02)


class Narrowing(GenerativeModel):
    """Draws real points from all modes, and after half of the budget from a single mode."""

    def __init__(self) -> None:
        super().__init__(RING.spec, optimizer=partial(torch.optim.SGD, lr=1e-30))
        self.weight = nn.Parameter(torch.zeros(()))
        self.steps = 0

    def losses(self, x: Tensor, cond: Cond, rng: RandomSource) -> dict[str, Tensor]:
        self.steps += self.training
        return {"loss": x.flatten(1).sum(1) * self.weight}

    def sample(self, n: int, cond: Cond | None = None, *, generator: torch.Generator) -> Tensor:
        split = RING.split("test")
        images = split.images if self.steps <= 6 else split.images[split.labels == 0]  # type: ignore[operator]
        return images[torch.randint(len(images), (n,), generator=generator)]


def test_training_reports_lost_modes_of_models_other_than_gans(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    protocol = EvaluationProtocol(extractors=(IdentityExtractor,))
    evaluation = EvaluationCallback(
        num_evaluations=4,
        num_grid_images=0,
        num_val_images=0,
        num_samples=250,
        protocol=protocol,
        data=RING,
        folder=tmp_path,
        seed=0,
    )
    logged: list[dict[str, float]] = []
    logger = pl.loggers.CSVLogger(tmp_path)
    logger.log_metrics = lambda metrics, step=None: logged.append(metrics)  # type: ignore[method-assign,assignment]
    trainer = pl.Trainer(
        callbacks=[TrainingClock(0, 64, Budget(steps=12)), evaluation], logger=logger, max_epochs=-1,
        limit_val_batches=0, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu",
    )  # fmt: skip
    trainer.fit(Narrowing(), datamodule=RING)
    coverage = [row["val/coverage"] for row in logged]
    assert min(coverage[:2]) > 0.85 and max(coverage[2:]) < 0.15
    assert list(evaluation.missing_modes) == [9, 12]
    assert capsys.readouterr().out.count("low coverage:") == 2
    other = EvaluationCallback(protocol=None, data=RING, folder=tmp_path, seed=0)
    other.load_state_dict(evaluation.state_dict())
    assert other.missing_modes == evaluation.missing_modes and other.best_coverage == max(coverage)


def test_a_result_contains_the_warning() -> None:
    split = RING.split("test")
    narrow = split.images[split.labels == 0].repeat(3, 1, 1, 1)  # type: ignore[operator]
    flags = evaluate(narrow[:300], RING, EvaluationProtocol(extractors=(IdentityExtractor,), num_images=300)).details[
        "warnings"
    ]
    assert any(flag.startswith("low coverage") for flag in flags)
