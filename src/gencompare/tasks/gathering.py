"""Where runs are: folders of this machine, W&B's offline folders among them, or a W&B project."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from gencompare.compare.gather import find
from gencompare.errors import UserError
from gencompare.records import FILE, RunRecord

REMOTE = "wandb:"
WANTED = re.compile(rf"{re.escape(FILE)}|curve\.csv|samples/[\w.-]+\.png")
"""Files of a W&B run that make a run folder: `training.loggers.finish` puts them there."""


def located(pattern: str, cache: Path) -> list[Path]:
    """The run folders that ``runs=`` names: a glob (of W&B's offline folders too), or ``wandb:ENTITY/PROJECT``.

    Args:
        cache: folder in which the files of a W&B project are kept.
    """
    if pattern.startswith(REMOTE):
        return fetched(pattern.removeprefix(REMOTE), cache / "wandb")
    return outermost(find(pattern))


def outermost(folders: list[Path]) -> list[Path]:
    """``folders`` without those inside another: a run folder holds W&B's copy of its record."""
    known = set(folders)
    return [folder for folder in folders if not known.intersection(folder.parents)]


def fetched(project: str, cache: Path) -> list[Path]:
    """Bring the records, curves and sample grids of a W&B project here; what was finished is fetched once.

    Raises `UserError` without a key, without a network, and where no run of the project holds a record.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", project):
        raise UserError(f"runs={REMOTE}{project}: give {REMOTE}ENTITY/PROJECT.")
    import wandb
    from wandb.errors import Error as WandbError

    from gencompare.training.loggers import has_key

    if not has_key():
        raise UserError(f"runs={REMOTE}{project} needs an API key of W&B: wandb login, or set WANDB_API_KEY.")
    folders = []
    try:
        for run in wandb.Api(timeout=30).runs(project):
            folder = cache / project.replace("/", "_") / re.sub(r"[^\w-]", "_", run.id)
            if not complete(folder):
                fetch(run, folder)
            if (folder / FILE).is_file():
                folders.append(folder)
    except (WandbError, ValueError, OSError) as error:
        raise UserError(f"W&B does not give {project}: {' '.join(str(error).split())}") from error
    if not folders:
        raise UserError(f"No run of the W&B project {project} holds a {FILE}.")
    return sorted(folders)


def complete(folder: Path) -> bool:
    try:
        return RunRecord.load(folder).state == "finished"
    except UserError:
        return False


def fetch(run: Any, folder: Path) -> None:
    """The wanted files of one W&B run; the record last, so that a folder with one is whole."""
    files = [file for file in run.files() if WANTED.fullmatch(file.name)]
    for file in sorted(files, key=lambda file: file.name == FILE):
        folder.mkdir(parents=True, exist_ok=True)
        file.download(root=str(folder), replace=True)
