"""task=bench: run the benchmarks of the checkout against other libraries, and write their tables."""

from __future__ import annotations

import subprocess
import sys

from omegaconf import DictConfig

from gencompare.command_line import conf_dir
from gencompare.errors import UserError

REPORT = "report"
"""The script that writes the tables of docs/performance.md."""


def bench(cfg: DictConfig) -> None:
    """Run the scripts ``benchmarks/PART.py`` for each of ``cfg.task.parts``, then write the tables.

    Raises:
        UserError: there is no checkout with benchmarks, a part does not exist, or a script fails.
    """
    folder = conf_dir().parent / "benchmarks"
    if not (folder / f"{REPORT}.py").is_file():
        raise UserError("task=bench needs a checkout of the repository, which contains the benchmarks.")
    parts = list(cfg.task.parts)
    for part in parts:
        if not (folder / f"{part}.py").is_file():
            known = ", ".join(sorted(path.stem for path in folder.glob("*.py")))
            raise UserError(f"task.parts: there is no benchmark {part}; choose from {known}.")
    for part in [*parts, REPORT]:
        if subprocess.run([sys.executable, str(folder / f"{part}.py")]).returncode:
            raise UserError(f"The benchmark {part} failed; its output is above.")
