"""Unknown settings are rejected in one line before training, old names still work, and added callbacks are used."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf
from pytorch_lightning import Callback, LightningModule, Trainer

from composing import compose
from gencompare.command_line import conf_dir
from gencompare.errors import UserError
from gencompare.records import RunRecord
from gencompare.tasks.runs import config_keys, run_config

QUICK = [
    "model=flow", "trainer=cpu", "budget=steps", "budget.steps=3", "trainer.global_batch_size=8",
    "callbacks.evaluation.num_evaluations=0", "callbacks.metric_logger.log_every_n_steps=1",
    "evaluation.checkpoints=[]", "logger=none", "hydra.run.dir=run",
]  # fmt: skip


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+nonsense=1", "There is no setting 'nonsense'. Use tags=[...] to label a run."),
        ("+seeds=1", "Did you mean seed?"),
        ("+train=false", "task=evaluate run_dir=RUN_FOLDER only evaluates"),
        ("+ckpt_path=last.ckpt", "resume=RUN_FOLDER continues a run"),
        ("+trainer.nonsense=1", "There is no setting 'trainer.nonsense'"),
        ("+trainer.max_steps=1", "Use budget=steps budget.steps=N"),
        ("+trainer.max_epochs=2", "Use budget.images=N"),
        ("+trainer.check_val_every_n_epoch=1", "Use callbacks.evaluation.num_evaluations=N"),
        ("+trainer.accumulate_grad_batches=4", "Use trainer.global_batch_size=N and trainer.num_micro_batches=M"),
        ("+callbacks.x._target_=no.such.Callback", "no.such.Callback"),
        ("+callbacks.x._target_=gencompare.errors.UserError", "callbacks.x"),
        ("+callbacks.x=no_such_option", "Choose from device_stats_monitor, learning_rate_monitor"),
        ("+callbacks.x.decay=1", "+callbacks.x._target_=CLASS"),
        ("+callbacks.evaluation.number=2", "There is no setting 'callbacks.evaluation.number'"),
        ("+callbacks.early_stoping.patience=2", "+callbacks.early_stoping._target_=CLASS"),
        ("callbacks.clock=null", "callbacks.clock=null is not allowed: without the clock, training would never end."),
        (
            "+callbacks.stop={_target_: pytorch_lightning.callbacks.EarlyStopping, monitor: val/loss}",
            "Use callbacks.evaluation.patience=N.",
        ),
        (
            "+callbacks.accumulate={_target_: pytorch_lightning.callbacks.GradientAccumulationScheduler, scheduling:"
            " {0: 2}}",
            "Use trainer.global_batch_size=N and trainer.num_micro_batches=M.",
        ),
        ("+callbacks.time={_target_: pytorch_lightning.callbacks.Timer, duration: '00:00:00:01'}", "Use budget=device"),
        ("+evaluation.nonsense=1", "There is no setting 'evaluation.nonsense'"),
        ("+evaluation.protocol.nonsense=1", "nonsense"),
        ("+model.nonsense=1", "nonsense"),
        ("+data.nonsense=1", "nonsense"),
        ("+budget.epochs=1", "epochs"),
        ("+logger.x._target_=gencompare.errors.UserError", "UserError"),
        ("ckpt_path=a", "resume=RUN_FOLDER"),
        ("task_name=a", "hydra.run.dir=DIR"),
        ("train=false", "task=evaluate run_dir=RUN_FOLDER"),
        ("batch_size=3", "trainer.global_batch_size=N"),
    ],
)
def test_an_invalid_setting_is_refused_before_training(
    override: str, message: str, cli: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(*QUICK, override) in (1, 2)
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1, error
    record = tmp_path / "run" / "record.json"
    assert not record.exists() or json.loads(record.read_text())["state"] == "failed"
    assert not (tmp_path / "run" / "checkpoints").exists()


LIMITS = {
    "accumulate_grad_batches": "2", "max_steps": "1", "max_time": "'00:00:00:01'", "fast_dev_run": "true",
    "limit_train_batches": "1",
}  # fmt: skip
"""Trainer arguments that would change how much is trained without the budget, the record and the schedules knowing."""


def test_limits_of_the_trainer_are_refused_in_new_resumed_and_stored_runs(
    cli: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are refused before the run folder is created or changed."""
    run = tmp_path / "run"

    def refused(name: str, *overrides: str) -> None:
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        capsys.readouterr()
        assert cli(*overrides) == 1
        error = capsys.readouterr().err.strip()
        expected = f"trainer.{name} is set by this program. Use {config_keys.TRAINER_EQUIVALENTS[name]}."
        assert expected in error and len(error.splitlines()) == 1, error
        assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    for name, value in LIMITS.items():
        refused(name, *QUICK, f"+trainer.{name}={value}")
        assert not run.exists()
    assert cli(*QUICK) == 0
    stored = (run / run_config.FILE).read_text()
    for name, value in LIMITS.items():
        refused(name, "resume=run", "budget.steps=5", f"+trainer.{name}={value}")
        cfg = OmegaConf.create(stored)
        OmegaConf.update(cfg, f"trainer.{name}", yaml.safe_load(value), force_add=True)
        OmegaConf.save(cfg, run / run_config.FILE)
        refused(name, "resume=run", "budget.steps=5")
        (run / run_config.FILE).write_text(stored)
    assert RunRecord.load(run).training["steps"] == 3
    assert cli("resume=run", "budget.steps=5") == 0
    assert RunRecord.load(run).training["steps"] == 5


def test_every_argument_of_the_trainer_with_an_equivalent_is_refused() -> None:
    for name, equivalent in config_keys.TRAINER_EQUIVALENTS.items():
        assert name in config_keys._trainer_arguments()
        with pytest.raises(UserError, match=re.escape(f"trainer.{name} is set by this program. Use {equivalent}.")):
            config_keys.check_trainer({name: None}, config_keys._trainer_arguments())


class StepCounter(Callback):
    """Counts training steps in a file."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: object) -> None:
        steps = int(self.path.read_text()) if self.path.exists() else 0
        self.path.write_text(str(steps + 1))


def test_added_callbacks_and_loggers_are_used(cli: Callable[..., int], tmp_path: Path) -> None:
    overrides = [
        "+callbacks.count._target_=test_strictness.StepCounter", "+callbacks.count.path=steps.txt",
        "+callbacks.lr=learning_rate_monitor", "+logger.x._target_=pytorch_lightning.loggers.CSVLogger",
        "+trainer.enable_model_summary=false", "tags=[first,try]",
    ]  # fmt: skip
    assert cli(*QUICK, *overrides) == 0
    assert (tmp_path / "steps.txt").read_text() == "3"
    (file,) = (tmp_path / "run").rglob("metrics.csv")
    assert "lr-" in file.read_text().splitlines()[0]
    assert RunRecord.load(tmp_path / "run").config["tags"] == ["first", "try"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("n=5", "num_images"),
        ("callbacks.looks.count=0", "callbacks.evaluation.num_evaluations"),
        ("callbacks.progress=false", "callbacks.progress_bar"),
        ("model.sampler.steps=3", "model.sampler.num_steps"),
    ],
)
def test_an_old_option_name_works_and_prints_one_line(
    old: str, new: str, cli: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(*QUICK, "callbacks.evaluation.num_grid_images=0", old) == 0
    key, _, value = old.partition("=")
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "is now called" in line] == [
        f"{key} is now called {new}; the old name still works."
    ]
    expected = None if value == "false" else int(value)
    assert OmegaConf.select(run_config.load(tmp_path / "run"), new) == expected


def test_the_old_name_of_a_task_works_and_prints_one_line(
    cli: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("task=explore") == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "task=explore is now called task=visualize; the old name still works."
    assert len(lines) == 2 and lines[1].startswith("Error: task=visualize needs run_dir=DIR")


@pytest.mark.parametrize("shown", [True, False])
def test_the_progress_bar_can_be_removed(
    shown: bool, cli: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gencompare.training.progress_bar.LINE_SECONDS", 0)
    assert cli(*QUICK, *([] if shown else ["callbacks.progress_bar=null"])) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("training ")]
    assert len(lines) == (3 if shown else 0), lines


OLD_CALLBACKS = """
ema: {decay: 0.9}
looks: {count: 4, grid: 16, held_out: 100, patience: 3, preview: 50}
checkpoints: {every_minutes: 7}
curve: {every: 20}
progress: true
"""


def test_a_config_with_old_names_loads_with_current_names(tmp_path: Path) -> None:
    old = OmegaConf.create(
        {
            "choices": {"model": "ddpm", "model/bits": "vlb", "task": "train"},
            "run": None,
            "n": 64,
            "model": {
                "_target_": "gencompare.models.diffusion.Diffusion",
                "schedule": {
                    "_target_": "gencompare.diffusion.schedules.LinearBetas",
                    "first": 1e-4,
                    "last": 0.02,
                    "T": 9,
                },
                "sampler": {"_target_": "gencompare.diffusion.samplers.Heun", "steps": 5},
                "bits": None,
            },
            "callbacks": OmegaConf.create(OLD_CALLBACKS),
        }
    )
    OmegaConf.save(old, tmp_path / run_config.FILE)
    cfg = run_config.load(tmp_path)
    assert cfg.num_images == 64 and "n" not in cfg and "run" not in cfg and "run_dir" in cfg
    assert cfg.choices["model/likelihoods"] == "vlb"
    assert cfg.model.schedule == {
        "_target_": "gencompare.diffusion.discrete_schedules.LinearBetas",
        "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 9,
    }  # fmt: skip
    assert cfg.model.sampler == {"_target_": "gencompare.diffusion.ode_samplers.Heun", "num_steps": 5}
    assert "likelihoods" in cfg.model and "bits" not in cfg.model
    current = OmegaConf.load(conf_dir() / "callbacks" / "default.yaml")
    del current.divergence, current.energy, current.checkpoints.keep_previous  # did not exist
    assert {name: sorted(options) for name, options in cfg.callbacks.items()} == {
        name: sorted(options) for name, options in current.items()
    }
    assert {name: options._target_ for name, options in cfg.callbacks.items()} == {
        name: options._target_ for name, options in current.items()
    }
    assert cfg.callbacks.ema.decay == 0.9 and cfg.callbacks.checkpoints.every_minutes == 7
    assert cfg.callbacks.metric_logger.log_every_n_steps == 20
    evaluation = {key: value for key, value in cfg.callbacks.evaluation.items() if key != "_target_"}
    assert evaluation == {
        "num_evaluations": 4, "num_grid_images": 16, "num_val_images": 100, "num_samples": 50, "patience": 3,
    }  # fmt: skip
    composed = compose()
    composed.callbacks = cfg.callbacks
    config_keys.check_keys(composed)
