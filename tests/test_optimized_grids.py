"""Optimised times of few-step samplers: exact solutions, what the search may return, and the task."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from composing import compose
from gaussian_truth import COVARIANCE, MEAN, ExactDenoiser, schedule_named
from gencompare.diffusion.multistep_samplers import AdamsBashforth, DPMSolverPP2M, UniPC
from gencompare.diffusion.ode_samplers import Euler, Heun
from gencompare.diffusion.optimized_grids import Problem, check_optimizable, optimize_times, solve
from gencompare.diffusion.samplers import DDIM, Ancestral, Sampler
from gencompare.diffusion.times import LogSNRGrid, TabulatedGrid, UniformGrid
from gencompare.errors import UserError
from gencompare.records import RunRecord
from gencompare.tasks.runs.build import build_data, build_model
from gencompare.tasks.runs.loading import load_run

Cli = Callable[..., int]


def gaussian_problem(schedule: str, seed: int) -> Problem:
    """Noise and the exact solutions of the probability-flow ODE, for Gaussian data.

    The ODE is linear, and maps the marginal at t_max to the data without a rotation within any principal axis.
    """
    denoiser = ExactDenoiser(schedule_named(schedule))
    noise = torch.randn(64, 1, 1, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    fine = DPMSolverPP2M(num_steps=2000, grid=LogSNRGrid())
    return Problem(denoiser, noise, solve(fine, denoiser, noise, {}), {})


@pytest.mark.parametrize("schedule", ["rectified", "vp"])
def test_targets_are_samples_of_the_data(schedule: str) -> None:
    """The fine solution maps the prior to the exact marginal, so whitened solutions keep the noise's norm."""
    problem = gaussian_problem(schedule, 0)
    values, axes = torch.linalg.eigh(COVARIANCE)
    white = (problem.targets[:, 0, 0] - MEAN) @ axes / values.sqrt()
    # The prior has unit variance; the marginal at t_max has nearly unit variance, so whitened values are the noise.
    torch.testing.assert_close(white.abs(), (problem.noise[:, 0, 0] @ axes).abs(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("schedule", ["rectified", "vp", "karras"])
def test_optimised_times_beat_every_grid_on_other_noise(schedule: str) -> None:
    train, validation = gaussian_problem(schedule, 0), gaussian_problem(schedule, 1)
    found = optimize_times(DPMSolverPP2M(num_steps=6), train, validation, max_iterations=20)
    assert set(found.grid_errors) == {"UniformGrid", "LogSNRGrid", "KarrasGrid"}
    assert found.error < 0.6 * min(found.grid_errors.values())
    assert found.error == validation.error(found.sampler)
    times = found.sampler.times(train.denoiser.schedule)
    assert len(times) == 7 and (times.diff() < 0).all()


def test_two_times_are_the_best_of_all_pairs() -> None:
    """With two steps there is one free time, which a fine scan also finds."""
    train = gaussian_problem("rectified", 0)
    found = optimize_times(Euler(num_steps=2), train, train, max_iterations=30)
    scan = min(
        train.error(Euler(num_steps=2, grid=TabulatedGrid((1.0, float(time)))))
        for time in torch.linspace(0.02, 0.98, 193)
    )
    assert found.error <= 1.001 * scan


def test_a_search_that_finds_nothing_returns_the_best_grid() -> None:
    """If validation disagrees with training, the best grid on validation is returned."""
    train, other = gaussian_problem("rectified", 0), gaussian_problem("rectified", 1)
    sampler = DPMSolverPP2M(num_steps=4)
    uniform = solve(DPMSolverPP2M(num_steps=4, grid=UniformGrid()), other.denoiser, other.noise, {})
    found = optimize_times(sampler, train, Problem(other.denoiser, other.noise, uniform, {}), max_iterations=5)
    assert found.error < 1e-12
    torch.testing.assert_close(
        found.sampler.times(train.denoiser.schedule), UniformGrid()(train.denoiser.schedule, 4), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    "sampler",
    [Ancestral(num_steps=3), Heun(num_steps=3), DDIM(num_steps=3, eta=0.5), DPMSolverPP2M(num_steps=3, eta=1.0)],
)
def test_samplers_that_draw_noise_or_call_twice_are_refused(sampler: Sampler) -> None:
    with pytest.raises(UserError, match="cannot be optimised"):
        check_optimizable(sampler)
    check_optimizable(UniPC(num_steps=3))
    check_optimizable(AdamsBashforth(num_steps=3))


@pytest.mark.parametrize(
    ("times", "num_steps", "message"),
    [
        ([], 2, "must be set"),
        ([1.0, 0.5], 3, "belong together"),
        ([1.0, 1.5], 2, "belong to another schedule"),
        ([0.5, 0.9], 2, "strictly decreasing"),
        (["a"], 1, "must be a number"),
    ],
)
def test_bad_times_are_refused(times: Any, num_steps: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TabulatedGrid(times)(schedule_named("rectified"), num_steps)


def test_the_task_finds_evaluates_and_describes_samplers(cli: Cli, tmp_path: Path, capsys: Any) -> None:
    quick = [
        "trainer=cpu", "logger=none", "callbacks.progress_bar=null", "evaluation.num_images=100",
        "evaluation.extractors=[classifier]", "evaluation.protocol.num_likelihood_images=20",
    ]  # fmt: skip
    train = [
        "model=flow", "model/network=mlp", "model.network.width=16", "trainer.global_batch_size=16",
        "budget.images=null", "budget.steps=3", "callbacks.evaluation.num_evaluations=0", "evaluation.checkpoints=[]",
    ]  # fmt: skip
    assert cli(*train, *quick, "hydra.run.dir=run") == 0
    search = [
        "task.num_calls=[2,3]",
        "task.num_images=8",
        "task.num_val_images=8",
        "task.max_iterations=2",
        "task.target_steps=10",
    ]
    assert cli("task=optimize_sampler", "run_dir=run", "evaluation.checkpoints=[last]", *quick, *search) == 0
    record = RunRecord.load(tmp_path / "run")
    said = sorted(result.generation.sampler.split(" 0.")[0] for result in record.results)
    assert [text.split(", ", 1)[1] for text in said] == ["2 steps, times 1", "3 steps, times 1"]
    written = OmegaConf.load(tmp_path / "run" / "optimized_samplers.yaml")
    assert sorted(written) == ["dpmpp_2m_2", "dpmpp_2m_3", "unipc_2", "unipc_3"]
    overrides = shlex.split(written.unipc_3.overrides)
    cfg = compose("model=flow", *overrides)
    model = build_model(cfg, build_data(cfg))
    times = model.sampler.times(model.schedule)
    assert len(times) == 4 and times[0] == pytest.approx(model.schedule.t_max)
    capsys.readouterr()
    assert cli("task=optimize_sampler", "run_dir=run", *quick, "task.samplers=[ancestral]") == 1
    assert "cannot be optimised" in capsys.readouterr().err
    assert load_run(tmp_path / "run").model.sampler.num_steps == 50, "the run keeps its own sampler"
