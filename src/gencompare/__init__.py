"""gencompare: train any family of image generative model, measure all of them under one protocol, compare.

The heavy names are imported when they are first used, so that ``import gencompare`` and ``run.py --help`` stay quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {"evaluate": "gencompare.evaluation.evaluate", "load_run": "gencompare.tasks.load"}
__all__ = ["__version__", "evaluate", "load_run"]

if TYPE_CHECKING:
    from gencompare.evaluation.evaluate import evaluate
    from gencompare.tasks.load import load_run


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'gencompare' has no attribute '{name}'")
