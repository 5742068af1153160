"""Count the files of this package that a two-step fit and one call of `sample` enter.

    python benchmarks/files_entered.py

A file is entered if one of its functions runs; importing it does not count. The model is ``model=ddpm data=digits``
with the callbacks of a run and two evaluations (a sample grid and the cheap metrics, from few samples in few steps).
"""

from __future__ import annotations

import inspect
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import gencompare

PACKAGE = Path(gencompare.__file__).parent
SETTINGS = ["model=ddpm", "data=digits", "logger=none", "trainer=cpu", "budget=steps", "budget.steps=2"]


@contextmanager
def files_entered() -> Iterator[set[str]]:
    """Collect the package files, as relative paths, that contain a function called inside the block."""
    found: set[str] = set()

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        # Module and class bodies, which run on import, lack the flag for optimised code.
        if event == "call" and code.co_flags & inspect.CO_OPTIMIZED and code.co_filename.startswith(str(PACKAGE)):
            found.add(str(Path(code.co_filename).relative_to(PACKAGE)))

    sys.setprofile(profile)
    try:
        yield found
    finally:
        sys.setprofile(None)


def fit(folder: Path) -> Callable[[], None]:
    """Build a two-step run in ``folder`` and return the function that trains it."""
    from gencompare.tasks.runs import build

    small = [
        "model.sampler.num_steps=2",
        "callbacks.evaluation.num_samples=20",
        "callbacks.evaluation.num_grid_images=4",
    ]
    cfg = gencompare.compose(*SETTINGS, *small, folder=folder)
    data, model = gencompare.build(cfg)
    data.setup()
    callbacks = build.build_callbacks(cfg, model, data, build.build_protocol(cfg), folder)
    trainer = build.build_trainer(cfg, model, callbacks, [], folder)
    return lambda: trainer.fit(model, datamodule=data)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        train = fit(Path(folder))
        with files_entered() as by_fit:
            train()
        _, model = gencompare.build(gencompare.compose(*SETTINGS, folder=folder))
        with files_entered() as by_sample:
            model.eval().sample(4, generator=torch.Generator().manual_seed(0))  # type: ignore[operator]
    for title, found in (("trainer.fit of two steps", by_fit), ("model.sample(4)", by_sample)):
        print(f"{title}: {len(found)} files\n  " + "\n  ".join(sorted(found)))


if __name__ == "__main__":
    main()
