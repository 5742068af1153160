"""The environment of a run: package versions, commit, machine."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from gencompare.version import __version__

PACKAGES = (
    "torch", "torchvision", "pytorch-lightning", "hydra-core", "torchmetrics", "torch-fidelity", "wandb", "numpy",
    "scipy",
)  # fmt: skip


def environment(device: torch.device) -> dict[str, Any]:
    """Describe the machine and the code for a record, without user names or paths."""
    return {
        "gencompare": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git": _git_commit(Path(__file__).resolve().parent),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git_commit(folder: Path) -> dict[str, Any] | None:
    """Return the commit of this package's checkout, and whether it has uncommitted changes. Return None if the package
    is not in a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    try:
        # An installed package may be inside the checkout of another project.
        if not (Path(git("rev-parse", "--show-toplevel").strip()) / "src" / "gencompare").is_dir():
            return None
        return {"commit": git("rev-parse", "HEAD").strip(), "dirty": bool(git("status", "--porcelain").strip())}
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
