"""A run that is resumed with another budget says what happens to its learning rate, which can also keep its decay."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gencompare.errors import UserError
from gencompare.training.learning_rate import WarmupDecay

RUN = [
    "model=vae", "data=digits", "trainer=cpu", "trainer.global_batch_size=8", "budget=steps", "budget.steps=10",
    "model.lr_schedule.warmup_steps=2", "callbacks.evaluation.num_evaluations=0", "evaluation.checkpoints=[]",
    "callbacks.metric_logger.log_every_n_steps=1", "logger=csv", "hydra.run.dir=run",
]  # fmt: skip
SENTENCE = "The learning rate decays again, over the larger budget: it goes from 0 to 0.0005."


def rates(folder: Path) -> list[float]:
    """Return the learning rate of each step, divided by its maximum."""
    with (folder / "curve.csv").open() as file:
        return [float(row["train/lr"]) / 1e-3 for row in csv.DictReader(file) if row.get("train/lr")]


def expected(schedule: WarmupDecay, first: int, last: int, budget: int) -> list[float]:
    return [schedule(step, min(1.0, step / budget)) for step in range(first, last)]


def test_a_larger_budget_restarts_the_decay_and_says_so(
    cli: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(*RUN) == 0
    assert "learning rate" not in capsys.readouterr().out
    assert cli("resume=run", "budget.steps=20") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "learning rate" in line]
    assert len(lines) == 1 and lines[0].startswith(SENTENCE), lines
    cosine = WarmupDecay(2, "cosine")
    assert rates(tmp_path / "run") == pytest.approx([*expected(cosine, 0, 10, 10), *expected(cosine, 10, 20, 20)])


def test_the_decay_of_the_first_budget_can_be_kept(
    cli: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beyond it, the learning rate stays at its last value, also if the run is resumed again."""
    assert cli(*RUN) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    constant = "+model.lr_schedule.resumed_budget=constant"
    assert cli("resume=run", "budget.steps=14", constant) == 1
    message = capsys.readouterr().err.strip()
    assert "would stay at 0" in message and "++model.lr_schedule.last=0.05" in message and "\n" not in message
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert cli("resume=run", "budget.steps=14", constant, "++model.lr_schedule.last=0.05") == 0
    assert "keeps the decay of the first budget: it is 5e-05 now" in capsys.readouterr().out
    assert cli("resume=run", "budget.steps=18") == 0
    assert rates(tmp_path / "run") == pytest.approx([*expected(WarmupDecay(2, "cosine"), 0, 10, 10), *[0.05] * 8])


@pytest.mark.parametrize(
    "setting", ["model.lr_schedule.decay=constant", "+model.lr_schedule.decay_steps=20", "~model.lr_schedule"]
)
def test_a_schedule_that_does_not_depend_on_the_budget_says_nothing(
    setting: str, cli: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [each for each in RUN if not (setting.startswith("~") and "lr_schedule" in each)]
    assert cli(*overrides, setting) == 0
    assert cli("resume=run", "budget.steps=12") == 0
    assert "learning rate" not in capsys.readouterr().out


def test_a_checkpoint_of_an_earlier_version_has_the_budget_of_its_config(
    cli: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(*RUN) == 0
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["callbacks"].pop("LearningRateScheduler")["budget"]["steps"] == 10
    torch.save(checkpoint, path)
    assert cli("resume=run", "budget.steps=20") == 0
    assert SENTENCE in capsys.readouterr().out


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(UserError, match="resumed_budget=hold: choose restart or constant"):
        WarmupDecay(resumed_budget="hold")
