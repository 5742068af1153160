"""Where a run was made: versions, commit, machine."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch", "torchvision", "pytorch-lightning", "hydra-core", "torchmetrics", "torch-fidelity", "wandb", "numpy",
    "scipy",
)  # fmt: skip


def environment(device: torch.device) -> dict[str, Any]:
    """What a record says of the machine and the code. No user names, no paths."""
    import gencompare

    return {
        "gencompare": gencompare.__version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git": _git(Path(gencompare.__file__).resolve().parent),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(folder: Path) -> dict[str, Any] | None:
    def ask(*words: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True).stdout

    try:
        # An installed package may lie inside somebody else's checkout: only our own commit is meant.
        if not (Path(ask("rev-parse", "--show-toplevel").strip()) / "src" / "gencompare").is_dir():
            return None
        return {"commit": ask("rev-parse", "HEAD").strip(), "dirty": bool(ask("status", "--porcelain").strip())}
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
