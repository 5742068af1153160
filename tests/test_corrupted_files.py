"""Every file that is written and read back has a checksum; a corrupted file is named, and nothing is lost silently."""

from __future__ import annotations

import fcntl
import io
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

import gencompare
from checkpoints import assert_same_training, checkpoint
from gencompare.checkpoint_files import earlier_checkpoints, find_checkpoint, read_checkpoint, write_checkpoint
from gencompare.checksums import (
    GrowingFile,
    check_safetensors,
    check_zip,
    read_checked_json,
    read_checked_yaml,
    seal_safetensors,
    write_checked_json,
    write_checked_yaml,
)
from gencompare.comparison.load_runs import load_runs
from gencompare.errors import CorruptedFileError, UserError
from gencompare.files import atomic_write, remove_orphans
from gencompare.records import RunRecord
from test_cli import QUICK, Cli, error_line

TENSORS = {"weight": torch.arange(12.0).reshape(3, 4), "bias": torch.zeros(3)}
VALUES = {"name": "run", "metrics": [1.5, None, {"x": "y"}], "schema": 2}
TEXT = "seed: 0\nmodel:\n  channels: 16\n  names: [a, b]\n"


def write_all(folder: Path) -> dict[str, tuple[Path, Callable[[Path], Any]]]:
    """Write one file of each kind. Return each with the function that reads it."""
    write_checked_yaml(folder / "config.yaml", TEXT)
    write_checked_json(folder / "record.json", VALUES)
    payload = seal_safetensors(lambda metadata: save(TENSORS, metadata), {"format": "pt", "hash": "0" * 64})
    (folder / "weights.safetensors").write_bytes(payload)
    write_checkpoint(folder / "last.ckpt", {"state_dict": TENSORS, "callbacks": {"clock": {"step": 3}}})

    def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
        check_safetensors(path, path.read_bytes())
        try:
            return load(path.read_bytes())
        except SafetensorError as error:  # an invalid header
            raise CorruptedFileError(path) from error

    return {
        "yaml": (folder / "config.yaml", read_checked_yaml),
        "json": (folder / "record.json", read_checked_json),
        "safetensors": (folder / "weights.safetensors", read_safetensors),
        "checkpoint": (folder / "last.ckpt", read_checkpoint),
    }


KINDS = ("yaml", "json", "safetensors", "checkpoint")


@pytest.mark.parametrize("kind", KINDS)
def test_an_intact_file_is_read(tmp_path: Path, kind: str) -> None:
    path, read = write_all(tmp_path)[kind]
    value = read(path)
    if kind == "yaml":
        assert value == TEXT
    elif kind == "json":
        assert value == VALUES
    else:
        tensors = value["state_dict"] if kind == "checkpoint" else value
        assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_flipped_bit_is_found(tmp_path: Path, kind: str) -> None:
    path, read = write_all(tmp_path)[kind]
    content = path.read_bytes()
    bits = range(8 * len(content))
    if kind == "checkpoint":  # the end, with the checksum, and a sample of the rest
        bits = [*range(bits.stop - 8 * 110, bits.stop), *random.Random(0).sample(bits, 300)]
    for bit in bits:
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(CorruptedFileError, match=path.name):
            read(path)


@pytest.mark.parametrize("kind", KINDS)
def test_every_truncation_is_found(tmp_path: Path, kind: str) -> None:
    path, read = write_all(tmp_path)[kind]
    content = path.read_bytes()
    for size in range(0, len(content), max(1, len(content) // 200)):
        path.write_bytes(content[:size])
        with pytest.raises(CorruptedFileError, match=path.name):
            read(path)


@pytest.mark.parametrize("kind", KINDS)
def test_overwritten_and_appended_bytes_are_found(tmp_path: Path, kind: str) -> None:
    path, read = write_all(tmp_path)[kind]
    content, rng = path.read_bytes(), random.Random(0)
    for _ in range(100):
        start, size = rng.randrange(len(content) - 40), rng.randrange(1, 40)
        block = bytes(size) if rng.random() < 0.5 else rng.randbytes(size)
        changed = content[:start] + block + content[start + size :]
        if rng.random() < 0.1:
            changed = content + block
        if changed == content:
            continue
        path.write_bytes(changed)
        with pytest.raises(CorruptedFileError, match=path.name):
            read(path)


def test_files_without_a_checksum_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(TEXT)
    assert read_checked_yaml(tmp_path / "config.yaml") == TEXT
    (tmp_path / "record.json").write_text(json.dumps(VALUES))
    assert read_checked_json(tmp_path / "record.json") == VALUES
    check_safetensors("weights", save(TENSORS, {"modelspec.hash_sha256": "0x" + "ab" * 32}))
    torch.save(TENSORS, tmp_path / "plain.ckpt")
    assert torch.equal(read_checkpoint(tmp_path / "plain.ckpt")["weight"], TENSORS["weight"])


def test_an_edited_file_is_accepted_as_its_message_says(tmp_path: Path) -> None:
    write_all(tmp_path)
    config, record = tmp_path / "config.yaml", tmp_path / "record.json"
    config.write_text(config.read_text().replace("16", "32"))
    with pytest.raises(CorruptedFileError, match="delete its first line"):
        read_checked_yaml(config)
    config.write_text(config.read_text().partition("\n")[2])
    assert "channels: 32" in read_checked_yaml(config)
    edited = json.loads(record.read_text()) | {"name": "other"}
    record.write_text(json.dumps(edited))
    with pytest.raises(CorruptedFileError, match='set "sha256" to null'):
        read_checked_json(record)
    record.write_text(json.dumps(edited | {"sha256": None}))
    assert read_checked_json(record)["name"] == "other"


def test_a_checkpoint_of_a_plain_trainer_is_verified_by_its_crc(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"weight": torch.arange(4096.0)}, buffer)
    content = buffer.getvalue()
    check_zip("plain", io.BytesIO(content))
    # The values of the tensor, which torch reads without a check.
    middle = content.index(torch.arange(2000.0, 2010.0).numpy().tobytes())
    changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    assert torch.load(io.BytesIO(changed))["weight"].shape == (4096,)
    with pytest.raises(CorruptedFileError):
        check_zip("plain", io.BytesIO(changed))


def test_a_growing_file_may_be_longer_than_its_checksum_covers(tmp_path: Path) -> None:
    file = GrowingFile(tmp_path / "curve.csv")
    assert file.is_intact()
    file.rewrite("step,loss\n")
    file.append("1,0.5\n")
    file.append("2,0.25\n")
    content = file.path.read_bytes()
    assert file.is_intact() and content == b"step,loss\n1,0.5\n2,0.25\n"
    file.path.write_bytes(content + b"3,0.")  # killed before the checksum was written
    assert file.is_intact()
    for changed in (content[:-1], b"", content.replace(b"0.5", b"0.6"), b"S" + content[1:]):
        file.path.write_bytes(changed)
        assert not file.is_intact()
    file.path.write_bytes(content)
    file.checksum_path.write_bytes(file.checksum_path.read_bytes()[:-2])
    assert not file.is_intact()


def test_temporary_files_of_killed_writers_are_removed(tmp_path: Path) -> None:
    orphan = tmp_path / "checkpoints" / ".last.ckpt.abc.part"
    orphan.parent.mkdir()
    orphan.write_bytes(b"half")
    with atomic_write(tmp_path / "record.json") as file:  # a writer that is alive
        file.write(b"x")
        file.flush()
        alive = next(tmp_path.glob(".record.json.*.part"))
        for path in (orphan, alive):
            os.utime(path, (time.time() - 60,) * 2)
        remove_orphans(tmp_path)
        assert alive.exists() and not orphan.exists()
    assert (tmp_path / "record.json").read_bytes() == b"x"
    with orphan.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
    remove_orphans(tmp_path)
    assert orphan.exists(), "a file that was just created may not be locked yet"


RUN = [
    "model=vae", *QUICK, "callbacks.evaluation.num_evaluations=0", "callbacks.checkpoints.every_minutes=0",
    "callbacks.metric_logger.log_every_n_steps=1", "logger=csv", "evaluation.num_images=60",
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run of six steps, with checkpoints of steps 5 and 6."""
    folder = tmp_path_factory.mktemp("whole")
    gencompare.train(gencompare.compose(*RUN, "budget.steps=6", f"hydra.run.dir={folder / 'run'}"))
    return folder / "run"


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of the uninterrupted run."""
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def flip(path: Path, position: float = 0.5) -> None:
    """Flip a bit of a file at a relative position."""
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 1
    path.write_bytes(content)


def test_the_previous_checkpoint_is_kept(whole: Path) -> None:
    assert [path.name for path in earlier_checkpoints(whole / "checkpoints")] == ["step_00000005.ckpt"]
    assert RunRecord.load(whole).checkpoints["last"] == "checkpoints/last.ckpt"


@pytest.mark.parametrize("number", [0, 3])
def test_the_number_of_kept_checkpoints_is_an_option(cli: Cli, tmp_path: Path, number: int) -> None:
    assert cli(*RUN, f"callbacks.checkpoints.keep_previous={number}", "budget.steps=5", "hydra.run.dir=run") == 0
    kept = [path.name for path in earlier_checkpoints(tmp_path / "run" / "checkpoints")]
    assert kept == [f"step_0000000{k}.ckpt" for k in range(5 - number, 5)]


@pytest.mark.parametrize("fault", ["corrupted", "missing"])
def test_training_resumes_from_the_previous_checkpoint(
    whole: Path, run: Path, cli: Cli, capsys: Any, fault: str
) -> None:
    last = run / "checkpoints" / "last.ckpt"
    last.unlink() if fault == "missing" else flip(last)
    assert cli("resume=run") == 0
    out = capsys.readouterr().out
    assert f"last.ckpt is {fault}: resuming from step_00000005.ckpt, step 5; 1 of 6 steps are lost" in out
    assert_same_training(whole, run)
    assert RunRecord.load(run).state == "finished"
    assert (run / "checkpoints" / "last.ckpt.corrupted").exists() == (fault == "corrupted")
    assert read_checkpoint(earlier_checkpoints(run / "checkpoints")[0])["callbacks"]["TrainingClock"]["step"] == 5


def test_a_run_whose_checkpoints_are_gone_is_not_restarted(run: Path, cli: Cli, capsys: Any) -> None:
    before = {name: (run / name).read_bytes() for name in ("curve.csv", "record.json")}
    shutil.rmtree(run / "checkpoints")
    assert cli("resume=run") == 1
    assert "run, which has 6 recorded steps, are missing" in error_line(capsys)
    assert {name: (run / name).read_bytes() for name in before} == before


def test_a_run_whose_checkpoints_are_all_corrupted_is_refused(run: Path, cli: Cli, capsys: Any) -> None:
    for path in (run / "checkpoints").glob("*.ckpt"):
        flip(path)
    before = (run / "curve.csv").read_bytes()
    assert cli("resume=run") == 1
    line = error_line(capsys)
    assert "run/checkpoints can be read" in line and "last.ckpt is corrupted" in line
    assert (run / "curve.csv").read_bytes() == before


def test_a_corrupted_checkpoint_is_not_evaluated(run: Path, cli: Cli, capsys: Any) -> None:
    before = (run / "record.json").read_bytes()
    flip(run / "checkpoints" / "last.ckpt")
    for task in ("evaluate", "sample", "export", "visualize"):
        assert cli(f"task={task}", "run_dir=run", "num_images=4") == 1
        line = error_line(capsys)
        assert "last.ckpt is corrupted" in line and "resume=run" in line
    with pytest.raises(UserError, match=r"last\.ckpt is corrupted"):
        gencompare.load_run(run)
    with pytest.raises(UserError, match=r"last\.ckpt is corrupted"):
        gencompare.load_from_checkpoint(run / "checkpoints" / "last.ckpt")
    assert (run / "record.json").read_bytes() == before


def test_a_corrupted_record_is_rebuilt_from_config_and_checkpoint(run: Path, cli: Cli, capsys: Any) -> None:
    before = RunRecord.load(run)
    (run / "record.json").write_bytes((run / "record.json").read_bytes()[:500])
    with pytest.raises(UserError, match="resume="):
        RunRecord.load(run)
    assert cli("task=evaluate", "run_dir=run") == 0
    assert "record.json is corrupted and kept as record.json.corrupted" in capsys.readouterr().out
    record = RunRecord.load(run)
    assert record.state == "finished" and record.config == before.config and record.model == before.model
    for name in ("steps", "images_seen", "seconds", "device_seconds", "flops", "total_cost"):
        assert record.training[name] == before.training[name], name
    assert [each.metrics for each in record.results] == [each.metrics for each in before.results]
    assert (run / "record.json.corrupted").stat().st_size == 500


def test_a_run_without_record_is_continued(whole: Path, run: Path, cli: Cli, capsys: Any) -> None:
    (run / "record.json").unlink()
    (run / "checkpoints" / "last.ckpt").unlink()
    assert cli("resume=run") == 0
    assert "record.json is missing: a new record is written" in capsys.readouterr().out
    assert_same_training(whole, run)


def test_a_corrupted_config_is_replaced_by_the_copy_in_the_record(run: Path, cli: Cli, capsys: Any) -> None:
    whole_config = (run / "config.yaml").read_bytes()
    (run / "config.yaml").write_bytes(whole_config[: len(whole_config) // 2])
    assert cli("task=sample", "run_dir=run", "num_images=2") == 0
    err = capsys.readouterr().err
    assert err.count("config.yaml is corrupted: using the copy of the config in record.json") == 1
    assert cli("resume=run") == 0
    assert (run / "config.yaml").read_bytes().startswith(b"# sha256"), "a resumed run writes its config"
    flip(run / "record.json")
    (run / "config.yaml").write_bytes(whole_config[: len(whole_config) // 2])
    assert cli("task=sample", "run_dir=run", "num_images=2") == 1
    assert "config.yaml is corrupted" in error_line(capsys)


def test_an_edited_config_is_not_replaced_silently(run: Path, cli: Cli, capsys: Any) -> None:
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("global_batch_size: 16", "global_batch_size: 32"))
    before = path.read_bytes()
    assert cli("resume=run") == 1
    assert "If you edited it, delete its first line. Otherwise, delete the file" in error_line(capsys)
    assert path.read_bytes() == before
    path.unlink()
    assert cli("task=sample", "run_dir=run", "num_images=2") == 0
    assert "config.yaml is missing: using the copy" in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_read_for_another_reason_is_not_replaced(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("gencompare.checkpoint_files.check_zip", fail)
    with pytest.raises(OSError, match="Input/output error"):
        find_checkpoint(run / "checkpoints")
    monkeypatch.undo()
    found = find_checkpoint(run / "checkpoints")
    assert found is not None and found.path.name == "last.ckpt" and found.step == 6
    earlier = find_checkpoint(run / "checkpoints", before=6)
    assert earlier is not None and earlier.step == 5


def test_a_folder_with_checkpoints_but_no_record_is_not_used_for_a_new_run(run: Path, cli: Cli, capsys: Any) -> None:
    (run / "record.json").unlink()
    before = (run / "checkpoints" / "last.ckpt").read_bytes()
    assert cli(*RUN, "budget.steps=2", "hydra.run.dir=run") == 1
    assert "already contains a run" in error_line(capsys)
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == before


@pytest.mark.parametrize("change", [lambda raw: raw.replace(b"1", b"7", 1), lambda raw: raw[:-20], lambda raw: b"\xff"])
def test_a_corrupted_curve_is_kept_aside(run: Path, cli: Cli, capsys: Any, change: Callable[[bytes], bytes]) -> None:
    raw = (run / "curve.csv").read_bytes()
    (run / "curve.csv").write_bytes(change(raw))
    loaded = load_runs([run])
    assert loaded.runs[0].curve == {} and [skip.folder.name for skip in loaded.skipped] == ["curve.csv"]
    (run / "checkpoints" / "last.ckpt").unlink()
    assert cli("resume=run") == 0
    assert "curve.csv is corrupted: it is kept as curve.csv.corrupted" in capsys.readouterr().out
    assert (run / "curve.csv.corrupted").read_bytes() == change(raw)
    assert not load_runs([run]).skipped


def test_a_corrupted_picture_is_left_out(run: Path, caplog: Any) -> None:
    loaded = load_runs([run]).runs[0]
    name, path = next(iter(loaded.record.results[0].images.items()))
    assert loaded.read_png(path) is not None
    flip(run / path)
    assert loaded.read_png(path) is None and Path(path).name in caplog.text, name


@pytest.mark.parametrize("position", [0.02, 0.5, 0.99])
def test_corrupted_exports_are_refused(run: Path, cli: Cli, capsys: Any, position: float) -> None:
    assert cli("task=export", "run_dir=run", "task.out=weights.safetensors") == 0
    assert cli("task=export", "run_dir=run", "format=hub", "task.out=folder") == 0
    flip(Path("weights.safetensors"), position)
    assert cli("task=evaluate", *RUN, "pretrained=weights.safetensors", "hydra.run.dir=published") == 1
    assert "weights.safetensors is corrupted" in error_line(capsys)
    for name in ("model.safetensors", "config.json"):
        shutil.copytree("folder", f"copy_{name}")
        flip(Path(f"copy_{name}") / name, position)
        with pytest.raises(UserError, match=f"{name} is corrupted"):
            gencompare.from_pretrained(f"copy_{name}")


@pytest.mark.slow
def test_a_sweep_mends_a_record_and_repeats_a_job_without_checkpoints(
    whole: Path, cli: Cli, tmp_path: Path, capsys: Any
) -> None:
    sweep = ["-m", *RUN, "budget.steps=2", "seed=0,1", "hydra.sweep.dir=sweep"]
    assert cli(*sweep) == 0
    first, second = tmp_path / "sweep" / "0_digits_vae", tmp_path / "sweep" / "1_digits_vae"
    state = checkpoint(first)["state_dict"]
    flip(first / "record.json")
    shutil.rmtree(second / "checkpoints")
    RunRecord.update(second, lambda record: setattr(record, "state", "interrupted"))
    capsys.readouterr()
    assert cli(*sweep) == 0
    out = capsys.readouterr().out
    assert "[0_digits_vae] was interrupted: resuming" in out
    assert "[1_digits_vae] its checkpoints are missing: training again in another folder" in out
    assert RunRecord.load(first).state == "finished" and RunRecord.load(first).results
    assert all(torch.equal(state[name], value) for name, value in checkpoint(first)["state_dict"].items())
    assert RunRecord.load(tmp_path / "sweep" / "1_digits_vae_2").state == "finished"
    assert RunRecord.load(second).state == "interrupted", "the old folder is kept as it was"
    assert cli(*sweep) == 0
    assert capsys.readouterr().out.count("already finished") == 2
