"""New processes without the seconds that imports take: forks of the one that runs the tests.

They are processes all the same: they can be killed, and several of them train together. That a new interpreter finds
its way is for the tests that start ``run.py`` itself.
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

from gencompare.files import locked
from gencompare.records import RunRecord
from gencompare.tasks.runs import sweep

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked here")


def in_processes(
    world: int, folder: Path, share: Callable[..., Mapping[str, Tensor]], *args: Any
) -> list[dict[str, Tensor]]:
    """What ``share(rank, world, *args)`` gives in each of ``world`` processes of one gloo group, by rank."""
    name = uuid4().hex

    def run(rank: int) -> None:
        torch.set_num_threads(1)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        meeting = f"file://{folder}/{name}"
        torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
        torch.save(dict(share(rank, world, *args)), folder / f"{name}_{rank}.pt")
        torch.distributed.destroy_process_group()

    processes = [get_context("fork").Process(target=run, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode == 0
    return [torch.load(folder / f"{name}_{rank}.pt") for rank in range(world)]


class Forked:
    """``python run.py WORDS`` in ``folder``; answers to what Lightning and the tests ask of a `subprocess.Popen`.

    Args:
        env: the environment; None keeps this process's.
        first: called in the new process before anything else; what it changes is changed in further processes too.
        output: where it prints to.
    """

    def __init__(
        self,
        folder: Path,
        *words: str,
        env: Mapping[str, str] | None = None,
        first: Callable[[], Any] | None = None,
        output: Path | None = None,
    ) -> None:
        self._output = output or folder / "output.txt"
        self._process = get_context("fork").Process(target=self._run, args=(folder, words, env, first))
        self._process.start()

    def _run(
        self, folder: Path, words: tuple[str, ...], env: Mapping[str, str] | None, first: Callable[[], Any] | None
    ) -> None:
        """What the new process does. Nothing is put back: the process ends."""
        sys.stdout = sys.stderr = output = self._output.open("a", buffering=1)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        os.chdir(folder)
        if env is not None:
            os.environ.clear()
            os.environ.update(env)
        if first is not None:
            first()
        sys.argv = ["run.py", *words]

        from lightning_utilities.core.rank_zero import rank_zero_only
        from pytorch_lightning.strategies.launchers import subprocess_script

        from gencompare.tasks.main import main

        def further(command: list[str], *, env: Mapping[str, str], cwd: str | None) -> Forked:
            assert command[1:] == ["-m", "gencompare.tasks.runs.rank"]
            return Forked(folder, env=env)

        rank_zero_only.rank = int(os.environ.get("LOCAL_RANK", 0))  # else read once, at import
        subprocess_script.subprocess = SimpleNamespace(Popen=further)  # type: ignore[assignment]
        main()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code, or None while it runs; minus the signal's number where one ended it."""
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

    def output(self) -> str:
        """All that it and its further processes printed."""
        return self._output.read_text()


@contextmanager
def living_on(folder: Path, ends: str, **training: Any) -> Iterator[None]:
    """A process is at work in a run folder until it is waited for, and then leaves the state ``ends`` in its record."""
    begun, awaited = (get_context("fork").Event() for _ in range(2))
    original = sweep.locked

    def work() -> None:
        with locked(folder / sweep.LOCK):
            RunRecord.update(folder, lambda record: setattr(record, "state", "running"))
            begun.set()
            awaited.wait(timeout=100)
            RunRecord.update(folder, lambda r: (setattr(r, "state", ends), r.training.update(training))[0])

    def telling(path: Path, *, wait: bool = True) -> Any:
        if wait:
            awaited.set()
        return original(path, wait=wait)

    process = get_context("fork").Process(target=work)
    process.start()
    assert begun.wait(timeout=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "locked", telling)
        yield
    process.join(timeout=20)
