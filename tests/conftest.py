"""Fixtures for the real data sets, the cache, and running the command line in this process."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
# One thread per test process, because tests run in parallel and results must not depend on the number of cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "offline"

import torch  # noqa: E402  (after the number of threads is set)
from hydra.core.plugins import Plugins  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

from gaussian_truth import SCHEDULES, schedule_named  # noqa: E402
from gencompare.diffusion.schedules import NoiseSchedule  # noqa: E402
from hydra_plugins.gencompare_sweeps.resolvers import cpu_precision  # noqa: E402

# trainer=cpu has the same precision on all machines in tests, since many expect results that are equal bit for bit.
Plugins.instance()  # Hydra runs the module of the resolver again when it looks for plugins, which it does once
OmegaConf.register_new_resolver(cpu_precision.__name__, lambda: "32-true", replace=True)


def pytest_collection_finish() -> None:
    """Exclude the tests and all imported modules from garbage collection, which takes seconds for so many objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Return the folder of the real data sets: GENCOMPARE_DATA, else ``shared/data`` beside the checkout."""
    for folder in (os.environ.get("GENCOMPARE_DATA"), CHECKOUT.parent / "shared" / "data"):
        if folder and Path(folder).is_dir():
            return Path(folder).resolve()
    pytest.skip("no real data sets: set GENCOMPARE_DATA to their folder")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder where decoded images and real features are cached for all tests."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    os.environ["GENCOMPARE_CACHE"] = str(folder / "cache")
    return folder / "cache"


@pytest.fixture
def double() -> Iterator[None]:
    """Make float64 the default dtype. Modules use this with ``pytestmark = pytest.mark.usefixtures("double")``."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest) -> NoiseSchedule:
    """Return each option of conf/model/schedule in turn, in the default dtype."""
    return schedule_named(request.param)


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return ``cli(*overrides) -> exit code``, which runs the command line in this process, in a temporary folder."""
    from gencompare.tasks.main import main

    monkeypatch.chdir(tmp_path)

    def run(*overrides: str) -> int:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["run.py", *overrides])
            patch.setenv("HYDRA_FULL_ERROR", "0")
            patch.setenv("GENCOMPARE_FULL_ERROR", "0")
            if not any(override.startswith(("+sweep", "+search")) for override in overrides):
                # Hydra composes each config twice, once just to read hydra.mode, which only sweep presets set.
                patch.setattr("hydra._internal.hydra.Hydra.get_mode", lambda *args, **kwargs: None)
            try:
                main()
            except SystemExit as end:
                return end.code if isinstance(end.code, int) else 1 if end.code else 0
        return 0

    return run
