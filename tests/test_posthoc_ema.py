"""Post-hoc EMA: power-function averages, snapshots of them, and averages of any length synthesised from snapshots."""

from __future__ import annotations

import itertools
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from gencompare.checkpoint_files import POSTHOC_EMA_KEY, read_checkpoint
from gencompare.comparison.sampler_description import describe_weights
from gencompare.data.digits import Digits
from gencompare.errors import UserError
from gencompare.records import RunRecord, SampleSettings
from gencompare.tasks.runs.loading import load_weights
from gencompare.tensor_files import write_tensors
from gencompare.training.budget import Budget
from gencompare.training.checkpoints import Checkpoints
from gencompare.training.clock import TrainingClock
from gencompare.training.divergence import DivergenceGuard
from gencompare.training.lightning_plugins import AtomicCheckpointIO
from gencompare.training.posthoc_ema import PosthocEMA, posthoc_length, snapshot_path, synthesize, to_half
from gencompare.training.power_average import (
    MAX_LENGTH,
    decay,
    exponent_of,
    inner_products,
    length_of,
    solve_coefficients,
)
from test_cli import QUICK, Cli, error_line
from test_training import Affine

LENGTHS = (0.05, 0.1)
STEPS = 48


def step_weights(length: float, time: int, steps: int) -> np.ndarray:
    """Return how much each of ``steps`` training steps counts in the average at ``time``, in closed form."""
    edges = (np.minimum(np.arange(steps + 1), time) / time) ** (exponent_of(length) + 1)
    return np.diff(edges)


def combined(length: float, num_snapshots: int, steps: int = 1920) -> tuple[np.ndarray, float]:
    """Return how much each step counts in the synthesised average at the end, and its relative error."""
    times = np.repeat(np.arange(1, num_snapshots + 1) * steps // num_snapshots, len(LENGTHS))
    exponents = np.tile([exponent_of(each) for each in LENGTHS], num_snapshots)
    coefficients, error = solve_coefficients(times.astype(float), exponents, steps, exponent_of(length))
    stored = zip(times.tolist(), np.tile(LENGTHS, num_snapshots).tolist(), strict=True)
    return coefficients @ np.stack([step_weights(each, time, steps) for time, each in stored]), error


@pytest.mark.parametrize("length", [1e-3, 0.05, 0.1, 0.2, 0.288])
def test_the_exponent_gives_the_length(length: float) -> None:
    assert length_of(exponent_of(length)) == pytest.approx(length, rel=1e-9)
    counts, times = step_weights(length, 100_000, 100_000), np.arange(0.5, 100_000) / 100_000
    deviation = math.sqrt(counts @ times**2 - (counts @ times) ** 2)
    assert deviation == pytest.approx(length, rel=1e-3), "the standard deviation of the averaged steps"


def test_the_uniform_average_has_the_maximum_length() -> None:
    assert length_of(0) == pytest.approx(MAX_LENGTH, rel=1e-12)
    assert exponent_of(MAX_LENGTH) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("length", [0.02, 0.1, 0.28])
def test_the_recursion_is_the_sum_in_closed_form(length: float) -> None:
    weights = np.random.default_rng(0).standard_normal(500).cumsum()
    average = math.nan  # the first step replaces it
    for step, value in enumerate(weights, start=1):
        d = decay(exponent_of(length), step)
        average = d * average + (1 - d) * value if d else value
    assert average == pytest.approx(step_weights(length, 500, 500) @ weights, rel=1e-12)


def test_inner_products_are_integrals() -> None:
    times, exponents = np.array([0.3, 0.3, 1.0, 1.0]), np.array([17.0, 7.0, 17.0, 0.5])
    x, quadrature = np.polynomial.legendre.leggauss(200)
    for i, j in np.ndindex(4, 4):
        upper = min(times[i], times[j])
        tau = upper * (x + 1) / 2
        p = [(exponents[k] + 1) * tau ** exponents[k] / times[k] ** (exponents[k] + 1) for k in (i, j)]
        expected = upper / 2 * quadrature @ (p[0] * p[1])
        product = inner_products(times[[i]], exponents[[i]], times[[j]], exponents[[j]])
        assert product.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("length", [0.03, 0.07, 0.2])
def test_the_synthesised_average_is_that_of_the_trajectory(length: float) -> None:
    """Its error falls with the number of snapshots, for a smooth trajectory and for a random walk."""
    exact = step_weights(length, 1920, 1920)
    time = np.arange(1, 1921) / 1920
    walk = np.random.default_rng(1).standard_normal((1920, 50)).cumsum(0) / math.sqrt(1920)
    profiles, predicted = zip(*(combined(length, n) for n in (4, 8, 16, 32)), strict=True)
    for trajectory in (3 * time[:, None] ** 3 - 2 * time[:, None] + 1, walk):
        errors = [np.linalg.norm((each - exact) @ trajectory) / np.linalg.norm(exact @ trajectory) for each in profiles]
        assert errors[2] < 3e-3, "with the default number of snapshots"
        assert all(fine < 0.3 * coarse for coarse, fine in itertools.pairwise(errors))
    measured = [np.linalg.norm(each - exact) / np.linalg.norm(exact) for each in profiles]
    assert measured == pytest.approx(predicted, rel=2e-3), "the error in the profile is predicted"


@pytest.mark.parametrize("length", LENGTHS)
def test_a_stored_average_is_itself(length: float) -> None:
    profile, error = combined(length, 16)
    assert np.allclose(profile, step_weights(length, 1920, 1920), atol=1e-12) and error < 1e-6


class Recorder(pl.Callback):
    """Records the weights after each step, and ends training after step ``until``."""

    def __init__(self, until: int | None = None) -> None:
        self.until, self.weights = until, []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.weights.append(pl_module.mean.detach().double().clone())
        if pl_module.clock.step == self.until:
            trainer.should_stop = True


def train(folder: Path, *, until: int | None = None, resume: bool = False, **options: Any) -> list[Tensor]:
    """Train for `STEPS` steps or until a step. Return the weights after each step."""
    data = Digits(batch_size=32, seed=3)
    recorder = Recorder(until)
    options = {"lengths": LENGTHS, "num_snapshots": 12} | options
    checkpoints = folder / "checkpoints"
    callbacks = [
        TrainingClock(5, 32, Budget(steps=STEPS)), PosthocEMA(folder, **options), DivergenceGuard(checkpoints),
        recorder, Checkpoints(checkpoints),
    ]  # fmt: skip
    trainer = pl.Trainer(
        callbacks=callbacks, plugins=[AtomicCheckpointIO()], logger=False, max_epochs=-1, limit_val_batches=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    path = checkpoints / "last.ckpt" if resume else None
    trainer.fit(Affine(data), datamodule=data, ckpt_path=path, weights_only=resume or None)
    return recorder.weights


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "posthoc_ema").iterdir()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """Return a run folder, and the weights (steps, ...) after each step of the run."""
    folder = tmp_path_factory.mktemp("run")
    return folder, torch.stack(train(folder))


def loaded(folder: Path, weights: str) -> Tensor:
    model = Affine(Digits())
    load_weights(model, folder, checkpoint="last", weights=weights)
    return model.mean.detach()


def test_averages_and_snapshots_of_a_run(trained: tuple[Path, Tensor]) -> None:
    folder, weights = trained
    stored = read_checkpoint(folder / "checkpoints" / "last.ckpt")[POSTHOC_EMA_KEY]
    assert stored["snapshots"] == [*range(4, STEPS + 1, 4)]
    assert files(folder).keys() == {f"step_{step:08d}.safetensors" for step in stored["snapshots"]}
    for length in LENGTHS:
        expected = torch.einsum("s,s...->...", torch.from_numpy(step_weights(length, STEPS, STEPS)), weights)
        torch.testing.assert_close(stored["averages"][str(length)]["mean"].double(), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(loaded(folder, f"posthoc:{length}"), stored["averages"][str(length)]["mean"])


@pytest.mark.parametrize("length", [0.04, 0.07, 0.13])
def test_a_run_is_loaded_with_an_average_of_another_length(trained: tuple[Path, Tensor], length: float) -> None:
    folder, weights = trained
    expected = torch.einsum("s,s...->...", torch.from_numpy(step_weights(length, STEPS, STEPS)), weights)
    error = (loaded(folder, f"posthoc:{length}") - expected).norm() / expected.norm()
    nearest = min((loaded(folder, f"posthoc:{each}") - expected).norm() / expected.norm() for each in LENGTHS)
    assert error < 0.005 and error < nearest / 5


def test_a_resumed_run_has_the_same_snapshots(trained: tuple[Path, Tensor], tmp_path: Path) -> None:
    folder, _ = trained
    train(tmp_path, until=22)
    later = snapshot_path(tmp_path / "posthoc_ema", 24)
    later.write_bytes(b"from a process that was killed after its last checkpoint")
    stale = snapshot_path(tmp_path / "posthoc_ema", 23)
    stale.write_bytes(b"from another budget")
    train(tmp_path, resume=True)
    assert files(tmp_path) == files(folder)
    one, two = (read_checkpoint(each / "checkpoints" / "last.ckpt")[POSTHOC_EMA_KEY] for each in (folder, tmp_path))
    assert one["step"] == two["step"] and one["snapshots"] == two["snapshots"]
    for length, average in one["averages"].items():
        assert all(torch.equal(value, two["averages"][length][name]) for name, value in average.items())


def test_steps_that_are_rolled_back_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The divergence at step 25 is noticed at step 28, before its snapshot, and the weights return to step 22."""
    train(tmp_path, until=22)
    original = Recorder.on_train_batch_end

    def spoil(self: Recorder, trainer: pl.Trainer, pl_module: Any, *batch: Any) -> None:
        original(self, trainer, pl_module, *batch)
        if pl_module.clock.step == 25:
            pl_module.mean.data.fill_(math.nan)

    monkeypatch.setattr(Recorder, "on_train_batch_end", spoil)
    train(tmp_path, resume=True)
    stored = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")[POSTHOC_EMA_KEY]
    assert stored["step"] == STEPS - 6
    assert stored["snapshots"] == [4, 8, 12, 16, 20, 22, *range(26, STEPS - 5, 4)]
    assert all(value.isfinite().all() for average in stored["averages"].values() for value in average.values())
    assert loaded(tmp_path, "posthoc:0.07").isfinite().all()


def test_resuming_with_other_lengths_is_refused(trained: tuple[Path, Tensor], tmp_path: Path) -> None:
    folder, _ = trained
    shutil.copytree(folder, tmp_path / "run")
    with pytest.raises(UserError, match="started with other lengths"):
        train(tmp_path / "run", resume=True, lengths=(0.05, 0.2))


def test_large_weights_are_not_rounded_to_infinity() -> None:
    assert to_half(torch.tensor([1e5])).item() == 1e5
    assert to_half(torch.tensor([1.0, 2.0])).dtype == torch.float16


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("posthoc:0.001", r"express lengths from 0.0\d+ to 0.\d+"),
        ("posthoc:0.5", "above 0 and below 0.2887"),
        ("posthoc:nan", "above 0 and below 0.2887"),
        ("posthoc:", "above 0 and below 0.2887"),
        ("posthoc", "choose ema, raw or posthoc:LENGTH"),
    ],
)
def test_lengths_that_cannot_be_expressed(trained: tuple[Path, Tensor], weights: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        loaded(trained[0], weights)


def remove(path: Path) -> None:
    path.unlink()


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def exchange(path: Path) -> None:
    write_tensors({"0.05/other": torch.zeros(1)}, path, {})


@pytest.mark.parametrize(
    ("change", "message"), [(remove, "is missing"), (damage, "is corrupted"), (exchange, "belongs to another model")]
)
def test_a_lost_snapshot_is_named(trained: tuple[Path, Tensor], tmp_path: Path, change: Any, message: str) -> None:
    shutil.copytree(trained[0], tmp_path / "run")
    change(snapshot_path(tmp_path / "run" / "posthoc_ema", 20))
    with pytest.raises(UserError, match=f"step_00000020.safetensors {message}"):
        loaded(tmp_path / "run", "posthoc:0.07")


@pytest.mark.parametrize(
    "options", [{"lengths": []}, {"lengths": 0.1}, {"lengths": [0.1, 0.3]}, {"lengths": ["x"]}, {"num_snapshots": 0}]
)
def test_invalid_options_of_the_callback(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"callbacks.posthoc_ema\.(lengths|num_snapshots)="):
        PosthocEMA(tmp_path, **options)


def test_other_weights_have_no_length() -> None:
    assert posthoc_length("ema") is None and posthoc_length("posthoc:0.08") == 0.08
    assert describe_weights(SampleSettings(weights="posthoc:0.08", checkpoint="best")) == "best, post-hoc EMA 0.08"


def test_a_result_says_its_length(cli: Cli, tmp_path: Path, capsys: Any) -> None:
    short = [
        *QUICK, "model=ddpm", "model/network=mlp", "model.network.width=16", "model.sampler.num_steps=2",
        "budget.steps=8", "callbacks.evaluation.num_evaluations=0", "evaluation.checkpoints=[]",
        "evaluation.num_images=20", "evaluation.protocol.num_likelihood_images=1",
    ]  # fmt: skip
    assert cli(*short, "+callbacks.posthoc_ema=posthoc_ema", "hydra.run.dir=run") == 0
    assert cli("task=evaluate", "run_dir=run", "weights=posthoc:0.08") == 0
    assert [each.generation.weights for each in RunRecord.load(tmp_path / "run").results] == ["posthoc:0.08"]
    shutil.rmtree(tmp_path / "run" / "posthoc_ema")
    capsys.readouterr()
    assert cli("task=sample", "run_dir=run", "weights=posthoc:0.08") == 1
    assert "is missing: put it back, or use weights=ema" in error_line(capsys)


def test_a_run_without_snapshots_is_refused() -> None:
    with pytest.raises(UserError, match="run has no snapshots for weights=posthoc:LENGTH"):
        synthesize(Path("run"), {"state_dict": {}}, 0.1)
