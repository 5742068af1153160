"""Every use of a private API of Lightning, Hydra, OmegaConf or torch, with its reason.

tests/test_private_apis.py fails if one changes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any


def basic_sweeper() -> type[Any]:
    """Return Hydra's basic sweeper. The public `Sweeper` cannot expand overrides such as ``model=vae,ddpm``."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    return BasicSweeper


def yaml_loader() -> type[Any]:
    """Return OmegaConf's YAML loader. The public `OmegaConf.load` also parses every interpolation in a file."""
    from omegaconf._utils import get_yaml_loader

    return get_yaml_loader()


class MovesOtherModules:
    """Mixin for modules that moves `other_modules` with the module (``.to()``, ``.cuda()``, ``.double()``, ...).

    torch has no public hook for this, except submodules, which would be trained, averaged and saved too.
    """

    def other_modules(self) -> Iterable[Any]:
        """Return the modules that move with this one."""
        raise NotImplementedError

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        for module in self.other_modules():
            module._apply(fn, recurse)
        return super()._apply(fn, recurse)  # type: ignore[misc]


@contextmanager
def allow_compiled_variants(modules: int) -> Iterator[None]:
    """Let ``torch.compile`` compile a function for that many modules in the block, in as many variants as for one.

    The modules of a class share the code of ``forward``. After 8 variants of one function, such as blocks of different
    widths, torch runs all others eagerly, and has no public setting for it.
    """
    from torch._dynamo import config

    names = ("recompile_limit", "accumulated_recompile_limit")
    with config.patch({name: max(modules, 1) * getattr(config, name) for name in names}):
        yield


def remove_compiled_call(module: Any) -> None:
    """Undo ``module.compile()``, for which torch has no public function."""
    module._compiled_call_impl = None


@contextmanager
def rank_command(command: list[str], folder: str) -> Iterator[None]:
    """Make Lightning start other ranks with ``command`` in ``folder`` during the block.

    By default Lightning repeats Hydra's command line, so each rank of a sweep would run the whole sweep. When a rank
    dies, Lightning kills the first process within 5 s, which may be too soon to record what happened (`observe_ranks`).
    """
    from pytorch_lightning.strategies.launchers import subprocess_script

    replaced = {
        "_hydra_subprocess_cmd": lambda local_rank: (command, folder),
        "_launch_process_observer": observe_ranks,
    }
    original = {name: getattr(subprocess_script, name) for name in replaced}
    for name, function in replaced.items():
        setattr(subprocess_script, name, function)
    try:
        yield
    finally:
        for name, function in original.items():
            setattr(subprocess_script, name, function)


GRACE_SECONDS = 5.0
"""How long the first process may take to exit after another rank died, before Lightning kills it."""
_started: list[tuple[list[Any], threading.Event]] = []
"""The processes of the current job that Lightning has started, and whether the job has ended."""


def observe_ranks(processes: list[Any]) -> None:
    """Start Lightning's thread that kills this process if one of ``processes`` dies, unless the job ends within
    `GRACE_SECONDS`. It looks every second."""
    from lightning_fabric.strategies.launchers.subprocess_script import _ChildProcessObserver

    job_ended = threading.Event()
    _started.append((processes, job_ended))

    class PatientObserver(_ChildProcessObserver):
        def _terminate_all(self) -> None:
            if not job_ended.wait(GRACE_SECONDS):
                super()._terminate_all()

    PatientObserver(main_pid=os.getpid(), child_processes=processes, sleep_period=1).start()


def end_ranks() -> None:
    """Note that the current job has ended. If one of its processes died, kill the others, which may wait for it."""
    for processes, job_ended in _started:
        job_ended.set()
        if any(process.poll() for process in processes):
            for process in processes:
                process.kill()
    _started.clear()
