"""A setting that nothing reads is refused in one line before training; what a user adds to a run is built and used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from pytorch_lightning import Callback, LightningModule, Trainer

from gencompare.records import RunRecord

QUICK = [
    "model=flow", "trainer=cpu", "budget=steps", "budget.steps=3", "trainer.global_batch_size=8",
    "callbacks.evaluation.num_evaluations=0", "callbacks.metric_logger.log_every_n_steps=1",
    "evaluation.checkpoints=[]", "logger=none", "hydra.run.dir=run",
]  # fmt: skip


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("+nonsense=1", "There is no setting 'nonsense'. A label of your own goes into tags"),
        ("+seeds=1", "Did you mean seed?"),
        ("+trainer.nonsense=1", "There is no setting 'trainer.nonsense'"),
        ("+trainer.max_steps=1", "Use budget=steps budget.steps=N"),
        ("+trainer.max_epochs=2", "Use budget.images=N"),
        ("+trainer.check_val_every_n_epoch=1", "Use callbacks.evaluation.num_evaluations=N"),
        ("+trainer.accumulate_grad_batches=4", "Use trainer.global_batch_size=N"),
        ("+callbacks.x._target_=no.such.Callback", "no.such.Callback"),
        ("+callbacks.x._target_=gencompare.errors.UserError", "callbacks.x"),
        ("+callbacks.x=no_such_option", "Choose from device_stats_monitor, learning_rate_monitor"),
        ("+callbacks.x.decay=1", "+callbacks.x._target_=CLASS"),
        ("+callbacks.evaluation.number=2", "There is no setting 'callbacks.evaluation.number'"),
        ("+callbacks.early_stoping.patience=2", "+callbacks.early_stoping._target_=CLASS"),
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
def test_a_setting_that_nothing_reads_is_refused_before_training(
    word: str, message: str, cli: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(*QUICK, word) in (1, 2)
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1, error
    record = tmp_path / "run" / "record.json"
    assert not record.exists() or json.loads(record.read_text())["state"] == "failed"
    assert not (tmp_path / "run" / "checkpoints").exists()


class Counts(Callback):
    """Counts training steps in a file."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: object) -> None:
        steps = int(self.path.read_text()) if self.path.exists() else 0
        self.path.write_text(str(steps + 1))


def test_callbacks_and_loggers_of_the_user_are_used(cli: Callable[..., int], tmp_path: Path) -> None:
    words = [
        "+callbacks.count._target_=test_strictness.Counts", "+callbacks.count.path=steps.txt",
        "+callbacks.lr=learning_rate_monitor", "+logger.x._target_=pytorch_lightning.loggers.CSVLogger",
        "+trainer.enable_model_summary=false", "tags=[first,try]",
    ]  # fmt: skip
    assert cli(*QUICK, *words) == 0
    assert (tmp_path / "steps.txt").read_text() == "3"
    (file,) = (tmp_path / "run").rglob("metrics.csv")
    assert "lr-" in file.read_text().splitlines()[0]
    assert RunRecord.load(tmp_path / "run").config["tags"] == ["first", "try"]
