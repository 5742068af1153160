"""A tracker, network or disk that fails does not end or delay training."""

from __future__ import annotations

import errno
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.loggers import TensorBoardLogger

import gencompare.files
from checkpoints import checkpoint
from gencompare.comparison.load_runs import load_runs
from gencompare.records import RunRecord
from gencompare.training.checkpoints import Checkpoints
from gencompare.training.loggers import CurveCSVLogger, wandb_logger
from test_cli import QUICK, Cli, error_line

RUN = [
    "model=vae", *QUICK, "budget.steps=8", "evaluation.checkpoints=[]", "callbacks.evaluation.num_evaluations=2",
    "callbacks.checkpoints.every_minutes=0",
]  # fmt: skip


@pytest.mark.parametrize("answers", [False, True], ids=["refused", "silent"])
def test_a_dead_or_silent_wandb_delays_a_run_by_seconds(
    answers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The server accepts connections and never answers, or accepts none. The run is logged offline, under its id."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        monkeypatch.delenv("WANDB_MODE", raising=False)
        if not answers:
            server.close()
        start = time.monotonic()
        logger = wandb_logger(folder=tmp_path, name="run", id="abc", project="test", init_timeout=1)
        # Without the limit it would be at least the 90 s of W&B's default.
        assert time.monotonic() - start < 30
        logger.log_metrics({"train/loss": 1.0, "images": 16, "seconds": 0.1}, step=1)
        logger.experiment.finish()  # type: ignore[attr-defined]
    assert "W&B cannot be reached" in capsys.readouterr().out
    (folder,) = (tmp_path / "wandb").glob("offline-run-*-abc")
    assert any(folder.glob("*.wandb"))


def test_a_logger_that_fails_does_not_end_training(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("log_metrics", "save", "finalize", "log_hyperparams"):
        monkeypatch.setattr(TensorBoardLogger, name, fail)
    assert cli(*RUN, "logger=[csv,tensorboard]", "hydra.run.dir=run") == 0
    out = capsys.readouterr().out
    assert out.count("TensorBoardLogger failed (OSError: [Errno 28] No space left on device). Training goes on.") == 1
    assert RunRecord.load(tmp_path / "run").state == "finished"
    assert len(load_runs([tmp_path / "run"]).runs[0].curve["step"]) >= 8


class FullDisk:
    """A disk that is full while ``full`` is set: each write of a file in ``folder`` fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = False
        original = gencompare.files.tempfile.mkstemp

        def mkstemp(*args: Any, **kwargs: Any) -> Any:
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(*args, **kwargs)

        monkeypatch.setattr(gencompare.files.tempfile, "mkstemp", mkstemp)
        open_file = Path.open

        def open_path(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if self.full and mode != "r" and path.name == "curve.csv" and "a" in mode:
                raise OSError(errno.ENOSPC, "No space left on device")
            return open_file(path, mode, *args, **kwargs)

        monkeypatch.setattr(Path, "open", open_path)


def test_a_disk_that_is_full_for_a_while_does_not_end_training(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """It is full in steps 3 to 5, where a checkpoint, an evaluation with its grid and the rows of the curve are due."""
    disk = FullDisk(monkeypatch)
    original = CurveCSVLogger.log_metrics

    def log(self: CurveCSVLogger, metrics: dict[str, float], step: int | None = None) -> None:
        disk.full = 3 <= (step or 0) <= 5
        original(self, metrics, step)

    monkeypatch.setattr(CurveCSVLogger, "log_metrics", log)
    assert cli(*RUN, "hydra.run.dir=run") == 0
    out = capsys.readouterr().out
    assert (
        out.count("curve.csv cannot be written") == 1 and out.count("Training continues without this checkpoint") == 3
    )
    assert out.count("Training continues without this grid") == 1
    record = RunRecord.load(tmp_path / "run")
    assert record.state == "finished" and checkpoint(tmp_path / "run")["callbacks"]["TrainingClock"]["step"] == 8
    curve = load_runs([tmp_path / "run"]).runs[0].curve
    assert set(curve["step"]) == set(range(1, 9)), "the rows of these steps are written later"


def test_a_disk_that_is_full_at_the_end_is_an_error_and_the_run_can_be_resumed(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    disk = FullDisk(monkeypatch)
    original = Checkpoints.on_train_batch_end

    def save(self: Checkpoints, trainer: Any, *args: Any) -> None:
        disk.full = trainer.should_stop
        try:
            original(self, trainer, *args)
        finally:
            disk.full = False

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "on_train_batch_end", save)
        assert cli(*RUN, "hydra.run.dir=run") == 1
    assert "No space left on the disk" in error_line(capsys)
    assert RunRecord.load(tmp_path / "run").state == "failed"
    assert cli("resume=run") == 0
    assert RunRecord.load(tmp_path / "run").state == "finished"
