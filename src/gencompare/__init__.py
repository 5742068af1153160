"""Train any family of image generative models, evaluate them all under one protocol, and compare them.

Names that need torch are imported on first use, so that ``import gencompare`` and ``run.py --help`` are fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gencompare.version import __version__

_LAZY = {
    "EMA": "gencompare.training.ema",
    "build": "gencompare.tasks.python_api",
    "compare": "gencompare.tasks.python_api",
    "compose": "gencompare.tasks.python_api",
    "evaluate": "gencompare.evaluation.evaluate",
    "from_pretrained": "gencompare.tasks.hub",
    "load_from_checkpoint": "gencompare.generative_model",
    "load_run": "gencompare.tasks.runs.loading",
    "sample": "gencompare.tasks.python_api",
    "train": "gencompare.tasks.python_api",
}
__all__ = [
    "EMA",
    "__version__",
    "build",
    "compare",
    "compose",
    "evaluate",
    "from_pretrained",
    "load_from_checkpoint",
    "load_run",
    "sample",
    "train",
]

if TYPE_CHECKING:
    from gencompare.evaluation.evaluate import evaluate
    from gencompare.generative_model import load_from_checkpoint
    from gencompare.tasks.hub import from_pretrained
    from gencompare.tasks.python_api import build, compare, compose, sample, train
    from gencompare.tasks.runs.loading import load_run
    from gencompare.training.ema import EMA


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'gencompare' has no attribute '{name}'")
