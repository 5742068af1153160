"""Start new processes as forks of the process that runs the tests, which saves import time.

They can be killed, and several of them can train together. Other tests start ``run.py`` in a new interpreter.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
import torch
from torch import Tensor

from gencompare.files import file_lock
from gencompare.records import RunRecord
from gencompare.tasks.runs import run_folder

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def in_processes(
    world: int, folder: Path, share: Callable[..., Mapping[str, Tensor]], *args: Any, timeout: float = 120
) -> list[dict[str, Tensor]]:
    """Run ``share(rank, world, *args)`` in ``world`` processes of a gloo group. Return the results in rank order."""
    name = uuid4().hex

    def run(rank: int) -> None:
        torch.set_num_threads(1)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        init_method = f"file://{folder}/{name}"
        torch.distributed.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world)
        torch.save(dict(share(rank, world, *args)), folder / f"{name}_{rank}.pt")
        torch.distributed.destroy_process_group()

    processes = [get_context("fork").Process(target=run, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=timeout)
        assert process.exitcode == 0
    return [torch.load(folder / f"{name}_{rank}.pt") for rank in range(world)]


def run_main(folder: Path, *overrides: str) -> None:
    """Run the command line in this process, a new one. The other ranks that it starts are forks, too."""
    from lightning_fabric.utilities.rank_zero import _get_rank
    from lightning_utilities.core.rank_zero import rank_zero_only
    from pytorch_lightning.strategies.launchers import subprocess_script

    from gencompare.tasks.main import main

    def start_rank(command: list[str], *, env: Mapping[str, str], cwd: str | None) -> Forked:
        assert command[1:] == ["-m", "gencompare.tasks.runs.rank"]
        return Forked(folder, env=env)

    rank_zero_only.rank = _get_rank() or 0  # otherwise read only once, on import
    subprocess_script.subprocess = SimpleNamespace(Popen=start_rank)  # type: ignore[assignment]
    sys.argv = ["run.py", *overrides]
    main()


class Forked:
    """``python run.py OVERRIDES`` in ``folder``, with the part of `subprocess.Popen`'s interface that Lightning and
    tests use.

    Args:
        env: the environment; if None, that of this process.
        first: called first in the new process, so it also affects the processes that this one starts.
        output: the file for its output.
        run: runs the command, given ``folder`` and ``overrides``.
    """

    def __init__(
        self,
        folder: Path,
        *overrides: str,
        env: Mapping[str, str] | None = None,
        first: Callable[[], Any] | None = None,
        output: Path | None = None,
        run: Callable[..., Any] = run_main,
    ) -> None:
        self._output = output or folder / "output.txt"
        self._process = get_context("fork").Process(target=self._run, args=(folder, overrides, env, first, run))
        self._process.start()

    def _run(
        self,
        folder: Path,
        overrides: tuple[str, ...],
        env: Mapping[str, str] | None,
        first: Callable[[], Any] | None,
        run: Callable[..., Any],
    ) -> None:
        """Run the command in the new process, and end the process."""
        sys.stdout = sys.stderr = output = self._output.open("a", buffering=1)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        os.chdir(folder)
        if env is not None:
            os.environ.clear()
            os.environ.update(env)
        if first is not None:
            first()
        run(folder, *overrides)

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def poll(self) -> int | None:
        """Return the exit code: None while running, and the negated signal number after a signal."""
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self._process.is_alive() and self._process.pid is not None:
            os.kill(self._process.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def output(self) -> str:
        """Return the output of the process and of its child processes."""
        return self._output.read_text()


@contextmanager
def active_process(folder: Path, final_state: str, **training: Any) -> Iterator[None]:
    """Start a process that holds the lock of a run folder until another process waits for it. Then it sets the state in
    the record to ``final_state`` and ends."""
    started, awaited = (get_context("fork").Event() for _ in range(2))
    original = run_folder.file_lock

    def work() -> None:
        with file_lock(folder / run_folder.LOCK_FILE):
            RunRecord.update(folder, lambda record: setattr(record, "state", "running"))
            started.set()
            awaited.wait(timeout=100)
            RunRecord.update(folder, lambda r: (setattr(r, "state", final_state), r.training.update(training))[0])

    def notifying_lock(path: Path, *, wait: bool = True) -> Any:
        if wait:
            awaited.set()
        return original(path, wait=wait)

    process = get_context("fork").Process(target=work)
    process.start()
    assert started.wait(timeout=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "file_lock", notifying_lock)
        yield
    process.join(timeout=20)
