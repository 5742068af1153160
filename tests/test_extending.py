"""Extensions outside the repository: a family, schedule, sampler, data set and metric, each one object and one YAML."""

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

    def losses(self, x, cond, rng):
        return {"loss": (x - torch.tanh(self.mean + rng.normal(x.shape[1:]))).square().flatten(1).mean(1)}

    @torch.no_grad()
    def sample(self, n, cond=None, *, generator):
        return torch.tanh(self.mean + torch.randn(n, *self.spec.shape, generator=generator))


class LinearLogSNR(VariancePreserving):
    """A log-SNR that falls linearly from 10 to -10."""

    t_min = 0.0

    def log_snr(self, t):
        return 10 - 20 * t


@dataclass(frozen=True, kw_only=True)
class MyEuler(Sampler):
    """Euler's method: each step takes the predicted image and noise to the next noise level."""

    order = 1

    def trajectory(self, denoiser, x, times, cond, generator):
        for t, s in pairwise(times):
            prediction = denoiser(x, t, cond)
            at_s = denoiser.schedule.at(s, x)
            x = at_s.alpha * prediction.x0 + at_s.sigma * prediction.eps
            yield Step(s, x, prediction)


class Stripes(ImageData):
    """8x8 images without labels; all pixels of a row have the same grey level."""

    spec = DataSpec(name="stripes", shape=(1, 8, 8), num_bins=256)

    def load(self):
        g = torch.Generator().manual_seed(0)
        rows = torch.randint(256, (900, 1, 8, 1), generator=g, dtype=torch.uint8).expand(-1, -1, -1, 8).contiguous()
        return {"train": Split(rows[:500]), "val": Split(rows[500:600]), "test": Split(rows[600:])}


def mean_distance(generated, reference):
    """Distance between the means of two sets of features."""
    return float((generated.mean(0) - reference.mean(0)).norm())
'''

TRAINING = """
conditional: false
optimizer: {_target_: torch.optim.Adam, _partial_: true, lr: 1.0e-2}
lr_schedule: null
grad_clip: null
"""

METRIC = """# @package evaluation.protocol.metrics.mean_distance
_target_: mine.mean_distance
_partial_: true
"""

YAML = {
    "model/blob.yaml": "_target_: mine.Blob" + TRAINING,
    "model/schedule/linear_log_snr.yaml": "_target_: mine.LinearLogSNR\n",
    "model/sampler/my_euler.yaml": "_target_: mine.MyEuler\nnum_steps: 5\n",
    "data/stripes.yaml": "_target_: mine.Stripes\nbatch_size: ${trainer.global_batch_size}\nseed: ${seed}\n",
    "evaluation/metric/mean_distance.yaml": METRIC,
}


@pytest.fixture(scope="module")
def extension_env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Write the module and the YAML files to a folder outside the repository, and return an environment that uses
    it."""
    folder = tmp_path_factory.mktemp("extensions")
    (folder / "mine.py").write_text(MODULE)
    for name, text in YAML.items():
        path = folder / "conf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "GENCOMPARE_CONF": str(folder / "conf"), "PYTHONPATH": path, "FOLDER": str(folder)}


def run(env: dict[str, str], *args: str) -> str:
    process = subprocess.run(
        [sys.executable, *args], env=env, cwd=env["FOLDER"], capture_output=True, text=True, timeout=280
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    return process.stdout


def test_help_lists_the_new_options(extension_env: dict[str, str]) -> None:
    lines = run(extension_env, str(ROOT / "run.py"), "--help").splitlines()
    for name in YAML:
        group, option = name.removesuffix(".yaml").rsplit("/", 1)
        line = next(line for line in lines if line.startswith(f"{group}:"))
        assert option in line.split(":")[1].replace(",", " ").split()


def test_runs_use_the_extensions(extension_env: dict[str, str]) -> None:
    shared = ["debug=fast", "logger=csv", "+evaluation/metric=mean_distance"]
    parts = ["model=ddpm", "model/schedule=linear_log_snr", "model/sampler=my_euler", "data=digits"]
    folder = Path(extension_env["FOLDER"])
    for overrides, expected in ((["model=blob", "data=stripes"], "mean distance"), (parts, "MyEuler")):
        process = Forked(folder, *overrides, *shared, env=extension_env, first=lambda: sys.path.insert(0, str(folder)))
        assert process.wait(timeout=280) == 0, process.output()[-3000:]
        assert expected in process.output()


@pytest.mark.slow
def test_the_interface_tests_cover_the_extensions(extension_env: dict[str, str]) -> None:
    """The tests that glob conf/ run unchanged on all five extensions."""
    args = ["-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=", "-v", "--rootdir", str(ROOT)]
    files = [f"tests/test_{part}.py" for part in ("conf", "contract", "data", "extra_metrics", "schedules", "samplers")]
    # Sampler tests under the new schedule run with the new sampler only.
    parts = "(linear_log_snr and my_euler) or ((linear_log_snr or my_euler) and not test_samplers)"
    # The blob has a single mode, so it cannot memorise several images.
    selection = f"(blob or stripes or mean_distance or {parts}) and not memorised"
    output = run(extension_env, *args, "-k", selection, *(str(ROOT / file) for file in files))
    assert output.count("[linear_log_snr-my_euler] PASSED") >= 4
    for name in YAML:
        option = Path(name).stem
        assert any(option in line and "PASSED" in line for line in output.splitlines()), f"no test covers {option}"
    assert "FAILED" not in output
