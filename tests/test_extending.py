"""A family, a schedule, a sampler, a data set, a metric: each is one Python object and one YAML, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from forking import Forked

ROOT = Path(__file__).parents[1]

MODULE = '''
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from gencompare.generative_model import DataSpec, GenerativeModel
from gencompare.data.datamodule import ImageData, Split
from gencompare.diffusion.samplers import Sampler, Step
from gencompare.diffusion.schedules import VariancePreserving


class Blob(GenerativeModel):
    """x = tanh(mean + noise)."""

    def __init__(self, spec: DataSpec, **training):
        super().__init__(spec, **training)
        self.mean = nn.Parameter(torch.zeros(spec.shape))

    def losses(self, x, cond, draws):
        return {"loss": (x - torch.tanh(self.mean + draws.normal(x.shape[1:]))).square().flatten(1).mean(1)}

    @torch.no_grad()
    def sample(self, n, cond=None, *, generator):
        return torch.tanh(self.mean + torch.randn(n, *self.spec.shape, generator=generator))


class Chord(VariancePreserving):
    """The log-SNR falls in a straight line from 10 to -10."""

    t_min = 0.0

    def log_snr(self, t):
        return 10 - 20 * t


@dataclass(frozen=True, kw_only=True)
class Leap(Sampler):
    """Goes to the predicted image and noise at each step: Euler's method, written anew."""

    order = 1

    def walk(self, denoiser, x, times, cond, generator):
        for t, s in pairwise(times):
            prediction = denoiser(x, t, cond)
            then = denoiser.schedule.at(s, x)
            x = then.alpha * prediction.x0 + then.sigma * prediction.eps
            yield Step(s, x, prediction)


class Stripes(ImageData):
    """Images of 8x8 whose rows are of one grey, without labels."""

    spec = DataSpec(name="stripes", shape=(1, 8, 8), num_levels=256)

    def load(self):
        g = torch.Generator().manual_seed(0)
        rows = torch.randint(256, (900, 1, 8, 1), generator=g, dtype=torch.uint8).expand(-1, -1, -1, 8).contiguous()
        return {"train": Split(rows[:500]), "val": Split(rows[500:600]), "test": Split(rows[600:])}


def mean_gap(generated, reference):
    """Distance between the means of two sets of features."""
    return float((generated.mean(0) - reference.mean(0)).norm())
'''

TRAINING = """
conditional: false
optimizer: {_target_: torch.optim.Adam, _partial_: true, lr: 1.0e-2}
lr_schedule: null
grad_clip: null
"""

METRIC = """# @package evaluation.protocol.metrics.mean_gap
_target_: mine.mean_gap
_partial_: true
"""

YAML = {
    "model/blob.yaml": "_target_: mine.Blob" + TRAINING,
    "model/schedule/chord.yaml": "_target_: mine.Chord\n",
    "model/sampler/leap.yaml": "_target_: mine.Leap\nsteps: 5\n",
    "data/stripes.yaml": "_target_: mine.Stripes\nbatch_size: ${trainer.global_batch_size}\nseed: ${seed}\n",
    "evaluation/metric/mean_gap.yaml": METRIC,
}


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A folder that is not this repository, with the five objects and their YAML; the environment that names it."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "mine.py").write_text(MODULE)
    for name, text in YAML.items():
        path = folder / "conf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return {**os.environ, "GENCOMPARE_CONF": str(folder / "conf"), "PYTHONPATH": str(folder), "FOLDER": str(folder)}


def run(outside: dict[str, str], *words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words], env=outside, cwd=outside["FOLDER"], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_they_are_listed(outside: dict[str, str]) -> None:
    shown = run(outside, str(ROOT / "run.py"), "--help").splitlines()
    for name in YAML:
        group, option = name.removesuffix(".yaml").rsplit("/", 1)
        line = next(line for line in shown if line.startswith(f"{group}:"))
        assert option in line.split(":")[1].replace(",", " ").split()


def test_they_run(outside: dict[str, str]) -> None:
    common = ["debug=fast", "logger=csv", "+evaluation/metric=mean_gap"]
    parts = ["model=ddpm", "model/schedule=chord", "model/sampler=leap", "data=digits"]
    folder = Path(outside["FOLDER"])
    for words, shown in ((["model=blob", "data=stripes"], "mean_gap"), (parts, "Leap")):
        process = Forked(folder, *words, *common, env=outside, first=lambda: sys.path.insert(0, str(folder)))
        assert process.wait(timeout=280) == 0, process.output()[-3000:]
        assert shown in process.output()


def test_the_contract_tests_find_them(outside: dict[str, str]) -> None:
    """The tests that glob conf/ run on the five as they are, and a broken promise of theirs is seen."""
    words = ["-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=", "-v", "--rootdir", str(ROOT)]
    files = [
        f"tests/test_{part}.py" for part in ("conf", "contract", "data", "further_metrics", "schedules", "samplers")
    ]
    # The laws of samplers under the new schedule with the new sampler alone, not with all the others as well.
    chosen = "blob or stripes or mean_gap or (chord and leap) or ((chord or leap) and not test_samplers)"
    # The blob has one mode, so it cannot know several images by heart, and the law says so.
    chosen = f"({chosen}) and not by_heart"
    found = run(outside, *words, "-k", chosen, *(str(ROOT / file) for file in files))
    assert found.count("[chord-leap] PASSED") >= 4
    for name in YAML:
        option = Path(name).stem
        assert any(option in line and "PASSED" in line for line in found.splitlines()), f"no test ran on {option}"
    assert "FAILED" not in found
