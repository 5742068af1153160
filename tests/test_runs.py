"""task=list_runs: one row per run, whatever its state."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from gencompare.comparison.formatting import WIDE
from gencompare.comparison.load_runs import find_run_folders, load_runs
from gencompare.files import file_lock
from gencompare.tasks.list_runs import print_runs
from synthetic import result, write_run


def printed_lines(folders: list[Path]) -> list[str]:
    text = StringIO()
    print_runs(folders, Console(file=text, width=WIDE))
    return text.getvalue().splitlines()


def line_of(lines: list[str], name: str) -> str:
    (line,) = [line for line in lines if name in line]
    return " ".join(line.split())


def test_runs_are_listed_oldest_first(cli: Callable[..., int], tmp_path: Path, capsys: Any) -> None:
    odd = "[red]c[/red]<b>"
    runs = tmp_path / "runs"
    write_run(
        runs / "late",
        [result(1.5), result(0.25, generation={"sampler": "heun"})],
        created="2026-03-04T05:06:07+00:00",
        family="vae",
        seed=3,
    )
    write_run(runs / "sweep" / "early", [], created="2026-01-01T00:00:00+00:00", state="failed")
    write_run(runs / "sweep" / "deep" / odd, [], created="2026-02-01T00:00:00+00:00", state="running")
    write_run(runs / "live", [], created="2026-02-02T00:00:00+00:00", state="running")
    (runs / "damaged").mkdir()
    (runs / "damaged" / "record.json").write_text("{")
    (runs / "stranger.txt").write_text("")
    with file_lock(runs / "live" / ".lock"):
        assert cli("task=list_runs") == 0
    lines = capsys.readouterr().out.splitlines()
    assert line_of(lines, "runs/late") == "2026-03-04 05:06 finished vae digits 3 FD digits 1.50 500 runs/late"
    assert line_of(lines, "early").split()[2] == "failed"
    assert line_of(lines, odd).split()[2] == "died", "no process is using it"
    assert line_of(lines, "runs/live").split()[2] == "running"
    order = [next(k for k, line in enumerate(lines) if name in line) for name in ("early", odd, "live", "runs/late")]
    assert order == sorted(order)
    assert "4 runs, 1 skipped" in lines
    assert "corrupted" in line_of(lines, "skipped: runs")
    assert cli("task=list_runs", "runs=nowhere/*") == 1
    assert not list(runs.glob("*_list_runs")), "a command that writes nothing leaves no folder"
    assert "matches no run folder" in capsys.readouterr().err


def test_a_thousand_runs_are_listed_in_seconds(tmp_path: Path) -> None:
    write_run(tmp_path / "first", [result(1.5), result(0.25)])
    text = json.dumps(json.loads((tmp_path / "first" / "record.json").read_text()) | {"sha256": None})
    for k in range(1000):
        folder = tmp_path / "many" / f"run_{k:04d}"
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(text.replace(str(tmp_path / "first"), str(folder)))
    start = time.process_time()
    lines = printed_lines(find_run_folders(str(tmp_path / "many" / "**")))
    assert time.process_time() - start < 10
    assert "1000 runs" in lines and sum("run_0" in line for line in lines) == 1000


def test_the_offline_folder_of_wandb_is_not_listed_twice(cli: Callable[..., int], tmp_path: Path, capsys: Any) -> None:
    overrides = [
        "model=gaussian", "trainer=cpu", "evaluation.num_images=100",
        "evaluation.extractors=[classifier]", "evaluation.protocol.num_likelihood_images=20",
    ]  # fmt: skip
    assert (
        cli(
            *overrides,
            "callbacks.evaluation.num_evaluations=1",
            "callbacks.evaluation.num_samples=0",
            "hydra.run.dir=runs/run",
        )
        == 0
    )
    capsys.readouterr()
    assert cli("task=list_runs") == 0
    assert "1 runs" in capsys.readouterr().out.splitlines(), "the copy in wandb/ does not count"
    (offline,) = (tmp_path / "runs" / "run" / "wandb").glob("offline-run-*")
    for pattern in ("runs/run/wandb/offline-run-*", "runs/*/wandb/*"):  # the second pattern also matches latest-run
        assert cli("task=list_runs", f"runs={pattern}") == 0
        out = capsys.readouterr().out
        assert "-run" in out and "/files" in out and "1 runs" in out.splitlines()
    (run,) = load_runs([offline / "files"]).runs
    assert run.record.state == "finished" and run.curve, "it can be compared"
    assert run.read_png(run.record.results[0].images["samples"])


def test_a_comparison_is_logged_to_wandb_with_table_charts_and_page(cli: Callable[..., int], tmp_path: Path) -> None:
    for k, name in enumerate(("a <b>", "b")):
        write_run(tmp_path / "runs" / name, [result(0.25 + k)], training={"flops": 1e9 * (2 - k)})
    overrides = ["task=compare", "runs=runs/*", "task.out=page"]
    assert cli(*overrides) == 0
    assert not (tmp_path / "page" / "wandb").exists(), "it is downloaded only on request"
    assert cli(*overrides, "logger=wandb") == 0
    (files,) = (tmp_path / "page" / "wandb").glob("offline-run-*/files")
    assert (files / "compare.html").read_text() == (tmp_path / "page" / "compare.html").read_text()
    (table,) = (json.loads(path.read_text()) for path in (files / "media" / "table").glob("*.json"))
    assert [row[table["columns"].index("fd_digits")] for row in table["data"]] == [0.25, 1.25]
    sent = len(list((files / "media" / "images").rglob("*.png")))
    assert sent == len(list((tmp_path / "page" / "plots").glob("*.png"))) > 0
    assert cli(*overrides, "logger=none") == 0


class RemoteFile:
    """A file of a W&B run."""

    def __init__(self, source: Path, name: str, downloaded: list[str]) -> None:
        self.source, self.name, self.downloaded = source, name, downloaded

    def download(self, root: str, replace: bool) -> None:
        self.downloaded.append(self.name)
        target = Path(root) / self.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((self.source / self.name).read_bytes())


def test_finished_runs_of_a_wandb_project_are_downloaded_once(
    cli: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """W&B's API is simulated, so neither a network nor an account is needed."""
    import wandb

    remote = tmp_path / "remote"
    write_run(remote / "done", [result(0.25)])
    write_run(remote / "going", [], state="running")
    downloaded: list[str] = []
    files = {
        name: [RemoteFile(remote / name, f, downloaded) for f in ("samples/grid.png", "record.json")]
        for name in ("done", "going")
    }
    files["done"].append(RemoteFile(remote / "done", "../evil.json", downloaded))
    files["stranger"] = []
    runs = [SimpleNamespace(id=name, files=lambda name=name: files[name]) for name in files]
    monkeypatch.setattr(
        wandb, "Api", lambda **_: SimpleNamespace(runs=lambda project: runs if project == "me/it" else [])
    )
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli("task=list_runs", "runs=wandb:me/it") == 1
    assert "wandb login" in capsys.readouterr().err
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert cli("task=list_runs", "runs=wandb:me/it") == 0
    assert "2 runs" in capsys.readouterr().out.splitlines()
    assert sorted(downloaded) == ["record.json"] * 2 + ["samples/grid.png"] * 2, "nothing is written outside the folder"
    downloaded.clear()
    assert cli("task=list_runs", "runs=wandb:me/it") == 0
    assert len(downloaded) == 2, "only the unfinished run is downloaded again"
    for pattern, message in (("wandb:me/other", "No run"), ("wandb:me", "ENTITY/PROJECT")):
        assert cli("task=list_runs", f"runs={pattern}") == 1
        assert message in capsys.readouterr().err
