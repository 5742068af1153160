"""Inject faults: kill runs at random times, damage their files, and start runs with random overrides.

    python benchmarks/faults.py kills --number 100
    python benchmarks/faults.py damages --number 1000
    python benchmarks/faults.py overrides --number 200
    python benchmarks/faults.py sweep --number 20

A killed run, started again with the same command, must end with the same weights, curve and metrics as an undisturbed
one, bit for bit. A damaged file must be named in one line, and never be used. A run with random overrides must train,
or end with one line of explanation. Prints each violation, then a table, and stores the counts in
``benchmarks/results/faults_<experiment>.json``. ``tests/test_faults.py`` runs a twentieth of it.
"""

from __future__ import annotations

import argparse
import csv
import errno
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

import gencompare
from gencompare import files
from gencompare.checkpoint_files import read_checkpoint
from gencompare.command_line import conf_dir
from gencompare.errors import UserError
from gencompare.records import RunRecord
from gencompare.tasks.main import main as run_command_line

RESULTS = Path(__file__).parent / "results"
SMALL = [
    "data=digits", "trainer=cpu", "logger=csv", "trainer.global_batch_size=16", "budget=steps", "budget.steps=8",
    "callbacks.evaluation.num_evaluations=2", "callbacks.evaluation.num_grid_images=4",
    "callbacks.evaluation.num_samples=0", "callbacks.metric_logger.log_every_n_steps=1", "callbacks.progress_bar=null",
    "callbacks.checkpoints.every_minutes=0", "evaluation.num_images=40", "evaluation.extractors=[classifier]",
    "evaluation.protocol.num_likelihood_images=8", "evaluation.protocol.chunk_size=10",
]  # fmt: skip
TINY = ["model.network.channels=8", "model.network.num_groups=8", "model/sampler=ddim", "model.sampler.num_steps=4"]
LATENT = [
    "model.latent.autoencoder.encoder.channels=8",
    "model.latent.budget.images=null",
    "model.latent.budget.steps=8",
]
COMMANDS = {
    "vae": ["model=vae", *SMALL, "hydra.run.dir=run"],
    "hvae": ["model=hvae", *SMALL, "hydra.run.dir=run"],
    "gan": ["model=gan", *SMALL, "hydra.run.dir=run"],
    "ebm": ["model=ebm", *SMALL, "hydra.run.dir=run"],
    "conditional ddpm": ["model=ddpm", "model.conditional=true", *SMALL, *TINY, "hydra.run.dir=run"],
    "vqvae": ["model=vqvae", *SMALL, "hydra.run.dir=run"],
    "ldm with its autoencoder": ["model=ldm", *SMALL, *TINY, *LATENT, "hydra.run.dir=run"],
    "sweep": ["-m", "model=vae", "seed=0,1", *SMALL, "budget.steps=4", "hydra.sweep.dir=run"],
    "evaluation": ["task=evaluate", "run_dir=run", "evaluation.num_images=200", "evaluation.protocol.seed=1"],
}  # fmt: skip


def invoke(overrides: list[str]) -> int:
    """Run the command line in this process and return the exit code."""
    sys.argv = ["run.py", *overrides]
    os.environ |= {"HYDRA_FULL_ERROR": "0", "GENCOMPARE_FULL_ERROR": "0"}
    try:
        run_command_line()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def fork(folder: Path, overrides: list[str], before: Callable[[], None] = lambda: None) -> int:
    """Start the command in a fork of this process, which saves the imports. Return the process id.

    Args:
        folder: the working directory.
        overrides: the command.
        before: called first in the new process.
    """
    pid = os.fork()
    if pid:
        return pid
    try:
        torch.set_num_threads(1)
        os.chdir(folder)
        output = os.open(folder / "output.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(output, number)
            # A test may have set another one.
            setattr(sys, name, os.fdopen(number, "w", buffering=1, closefd=False))
        files.ORPHAN_SECONDS = 0.0  # no other process writes in this folder
        before()
        code = invoke(overrides)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    except BaseException as error:
        os.write(2, f"Traceback: {type(error).__name__}: {error}\n".encode())
        os._exit(99)


def wait(pid: int) -> int:
    """Wait for a process and return its exit code, or minus the number of its signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# Kills


@dataclass
class Outcome:
    """Everything that must not depend on interruptions: weights, curves and metrics of all runs in a folder."""

    weights: dict[str, dict[str, Any]]
    curves: dict[str, list[dict[str, str]]]
    metrics: dict[str, list[Any]]

    @classmethod
    def of(cls, folder: Path) -> Outcome:
        weights, curves, metrics = {}, {}, {}
        for path in sorted(path for path in folder.rglob("record.json") if "wandb" not in path.parts):
            name = str(path.parent.relative_to(folder))
            checkpoint = read_checkpoint(path.parent / "checkpoints" / "last.ckpt")
            weights[name] = {**checkpoint["state_dict"], **{f"ema {k}": v for k, v in checkpoint["ema"].items()}}
            with (path.parent / "curve.csv").open() as file:
                times = ("seconds", "train/images_per_second")
                curves[name] = [{k: v for k, v in row.items() if k not in times} for row in csv.DictReader(file)]
            record = RunRecord.load(path.parent)
            assert record.state == "finished", f"{name} is {record.state}"
            metrics[name] = [(each.id, each.metrics) for each in record.results]
        return cls(weights, curves, metrics)

    def differences(self, other: Outcome) -> list[str]:
        """Return the names of the parts that differ."""
        found = [
            f"{run}: {name}"
            for run, tensors in self.weights.items()
            for name, value in tensors.items()
            if not torch.equal(value, other.weights.get(run, {}).get(name, torch.empty(0)))
        ]
        found += ["curves"] if self.curves != other.curves else []
        found += ["metrics"] if self.metrics != other.metrics else []
        return found + (["runs"] if self.weights.keys() != other.weights.keys() else [])


def kills(number: int, seed: int, folder: Path) -> Counter[str]:
    """Kill each command ``number / len(COMMANDS)`` times, up to twice in a row, and compare its outcome."""
    rng, counts = random.Random(seed), Counter[str]()
    whole: dict[str, tuple[Outcome, float]] = {}
    for k in range(number):
        name, command = list(COMMANDS.items())[k % len(COMMANDS)]
        start = folder / f"{name} start"
        if name not in whole:
            start.mkdir()
            if name == "evaluation":
                assert wait(fork(start, COMMANDS["vae"])) == 0, (start / "output.txt").read_text()
            undisturbed = folder / f"{name} undisturbed"
            shutil.copytree(start, undisturbed)
            begin = time.monotonic()
            assert wait(fork(undisturbed, command)) == 0, (undisturbed / "output.txt").read_text()
            whole[name] = Outcome.of(undisturbed), time.monotonic() - begin
        expected, seconds = whole[name]
        trial = folder / f"{name} {k}"
        shutil.copytree(start, trial)
        again = command
        for _ in range(rng.choice([1, 1, 2])):
            pid = fork(trial, again)
            time.sleep(rng.uniform(0.02, 0.95) * seconds)
            os.kill(pid, signal.SIGKILL)
            counts["killed"] += wait(pid) == -signal.SIGKILL
            if "hydra.run.dir=run" in command and (trial / "run" / "record.json").exists():
                again = ["resume=run"]
        counts["while a file was written"] += bool(list(trial.rglob("*.part")))
        code = wait(fork(trial, again))
        text = (trial / "output.txt").read_text()
        differences = [f"exit code {code}: {text[-300:]}"] if code else Outcome.of(trial).differences(expected)
        differences += [str(path.name) for path in trial.rglob("*.part")]
        differences += ["traceback"] if "Traceback" in text else []
        counts["different" if differences else "bit-exact"] += 1
        if differences:
            print(f"{name}, trial {k}: {differences[:3]}")
        shutil.rmtree(trial)
    return counts


# Damages


def damaged(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Return a kind of damage and the damaged content."""
    size = len(content)
    kind = rng.choice(["bit", "zeros", "random bytes", "truncated", "appended", "swapped", "empty"])
    at, length = rng.randrange(size), rng.randrange(1, max(2, min(4096, size // 2)))
    block = content[at : at + length]
    if kind == "bit":
        changed = content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
    elif kind == "zeros":
        changed = content[:at] + bytes(len(block)) + content[at + len(block) :]
    elif kind == "random bytes":
        changed = content[:at] + rng.randbytes(len(block)) + content[at + len(block) :]
    elif kind == "truncated":
        changed = content[:at]
    elif kind == "appended":
        changed = content + rng.randbytes(length)
    elif kind == "swapped":
        middle = size // 2
        changed = content[middle:] + content[:middle]
    else:
        changed = b""
    return kind, changed


def damages(number: int, seed: int, folder: Path) -> Counter[str]:
    """Damage every kind of file in turn, and read it as the commands do."""
    rng, counts = random.Random(seed), Counter[str]()
    targets = prepare_files(folder)
    for k in range(number):
        name, (path, read) = list(targets.items())[k % len(targets)]
        content = path.read_bytes()
        kind, changed = damaged(content, rng)
        if changed == content:
            continue
        path.write_bytes(changed)
        outcome, detail = outcome_of(read, path)
        if outcome in ("used", "raw error"):
            print(f"{name}, {kind}: {outcome}: {detail}")
        counts[outcome] += 1
        path.write_bytes(content)
    return counts


def outcome_of(read: Callable[[], Any], path: Path) -> tuple[str, str]:
    """Read a damaged file. Return ``named``, ``used`` or ``raw error``, with a detail."""
    output = StringIO()
    try:
        with redirect_stdout(output), redirect_stderr(output):
            read()
    except UserError as error:
        text = str(error)
        return ("named", text) if path.name in text and "\n" not in text else ("raw error", text)
    except Exception as error:
        return "raw error", f"{type(error).__name__}: {error}"[:200]
    return ("named", "") if path.name in output.getvalue() else ("used", output.getvalue()[-100:])


def prepare_files(folder: Path) -> dict[str, tuple[Path, Callable[[], Any]]]:
    """Create a run, its exports and an extractor. Return each file with the function that reads it in a command."""
    from gencompare.comparison.load_runs import load_runs
    from gencompare.evaluation.extractors.shipped_classifiers import read_classifier
    from gencompare.tasks.runs import run_config
    from gencompare.tasks.runs.pretrained import read_weights

    os.chdir(folder)
    for command in (
        COMMANDS["vae"], ["task=export", "run_dir=run", "task.out=weights.safetensors"],
        ["task=export", "run_dir=run", "format=hub", "task.out=hub"],
        ["model=classifier", *SMALL, "hydra.run.dir=classifier"],
        ["task=export_extractor", "run_dir=classifier", "task.out=extractor.safetensors"],
    ):  # fmt: skip
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            assert invoke(command) == 0
    run, cfg = folder / "run", run_config.load(folder / "run")
    picture = next(iter(RunRecord.load(run).results[0].images.values()))

    def config() -> None:
        run_config._report_copy.cache_clear()
        assert run_config.load(run) == cfg

    def curve() -> None:
        for skipped in load_runs([run]).skipped:
            print(skipped.folder)

    def shown() -> None:
        if load_runs([run]).runs[0].read_png(picture) is None:
            print(picture)

    def pretrained() -> None:
        read_weights(folder / "weights.safetensors")

    checkpoints, hub, extractor = run / "checkpoints", folder / "hub", folder / "extractor.safetensors"
    earlier = checkpoints / "step_00000007.ckpt"
    return {
        "last.ckpt": (checkpoints / "last.ckpt", lambda: gencompare.load_run(run)),
        earlier.name: (earlier, lambda: read_checkpoint(earlier)),
        "record.json": (run / "record.json", lambda: RunRecord.load(run)),
        "config.yaml": (run / "config.yaml", config),
        "curve.csv": (run / "curve.csv", curve),
        "samples.png": (run / picture, shown),
        "weights.safetensors": (folder / "weights.safetensors", pretrained),
        "model.safetensors": (hub / "model.safetensors", lambda: gencompare.from_pretrained(hub)),
        "config.json": (hub / "config.json", lambda: gencompare.from_pretrained(hub)),
        "extractor.safetensors": (extractor, lambda: read_classifier(extractor)),
    }


# A sweep in a bad night


def sweep(number: int, seed: int, folder: Path) -> Counter[str]:
    """Run a sweep of ``number`` jobs without a network, with a disk that is full for a while, a clock that is set back
    by an hour, and a SIGKILL; start it again once, and compare it with an undisturbed sweep."""
    rng = random.Random(seed)
    seeds = f"seed={','.join(map(str, range(number)))}"
    command = ["-m", "model=vae", seeds, *SMALL, "budget.steps=6", "hydra.sweep.dir=run"]
    undisturbed, trial = folder / "undisturbed", folder / "trial"
    for each in (undisturbed, trial):
        each.mkdir()
    begin = time.monotonic()
    assert wait(fork(undisturbed, command)) == 0, (undisturbed / "output.txt").read_text()[-500:]
    seconds = time.monotonic() - begin
    # Nothing listens on port 9, so W&B is dead from the start.
    dead = {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    command = [*(each for each in command if each != "logger=csv"), "logger=[csv,wandb]"]

    def faults() -> None:
        os.environ.update(dead)
        os.environ.pop("WANDB_MODE", None)
        start, clock, temporary = time.monotonic(), time.time, tempfile.mkstemp
        full = 0.25 * seconds, 0.25 * seconds + min(60.0, 0.25 * seconds)

        def mkstemp(*args: Any, **kwargs: Any) -> Any:
            if full[0] < time.monotonic() - start < full[1]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return temporary(*args, **kwargs)

        files.tempfile.mkstemp = mkstemp  # all files are written through it
        time.time = lambda: clock() - (3600.0 if time.monotonic() - start > 0.4 * seconds else 0.0)

    pid = fork(trial, command, before=faults)
    time.sleep(rng.uniform(0.7, 0.9) * seconds)
    os.kill(pid, signal.SIGKILL)
    counts = Counter({"killed": int(wait(pid) == -signal.SIGKILL)})
    code = wait(fork(trial, command, before=lambda: os.environ.update(dead)))
    output = (trial / "output.txt").read_text()
    expected, found = Outcome.of(undisturbed), Outcome.of(trial) if code == 0 else None
    differences = [f"exit code {code}: {output[-500:]}"] if found is None else found.differences(expected)
    differences += ["traceback"] if "Traceback" in output else []
    for name, text in {
        "messages about the full disk": "No space left on the disk",
        "messages about W&B": "W&B cannot be reached",
    }.items():
        counts[name] = len(re.findall(re.escape(text), output))
    counts["jobs complete"] = len(found.weights) if found else 0
    counts["different"] += bool(differences)
    if differences:
        print(differences[:5])
    return counts


# Overrides

VALUES: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 7, 0.5, -0.5, 1.5, 1e-30, 1e30, 10**12, "null", "true", "false", "abc", "''", "[]", "[1,2]", "{}",
    ".nan", ".inf", "-.inf", "1e5", "'a b'", "/nowhere",
)  # fmt: skip
MODELS = (
    "vae", "hvae", "gan", "ebm", "ddpm", "iddpm", "vdm", "ncsn", "sde_vp", "edm", "flow", "vqvae", "autoencoder", "ldm",
    "classifier", "gaussian",
)  # fmt: skip
UNTOUCHED = (
    "hydra", "task", "paths", "runs", "run_dir", "resume", "choices", "samples", "pretrained", "num_images", "budget",
    "data.root", "data.cache", "evaluation.available", "out", "sweep_name", "command",
)  # fmt: skip
"""Keys that would make a run long, or write elsewhere."""
MAX_SECONDS = 5.0
"""Processor time after the imports within which invalid settings must be explained."""


def random_overrides(rng: random.Random) -> list[str]:
    """Return a model with one to three random settings: values of any type, or options of its config groups."""
    model = rng.choice(MODELS)
    with redirect_stdout(StringIO()):
        cfg = gencompare.compose(f"model={model}", "data=digits", "logger=csv")
    leaves = [key for key in _leaves(cfg) if not key.startswith(UNTOUCHED) and "_target_" not in key]
    groups = [str(group) for group in cfg.choices if str(group).startswith("model/") and "@" not in str(group)]
    found = [f"model={model}"]
    for _ in range(rng.choice([1, 1, 2, 3])):
        if groups and rng.random() < 0.25:
            group = rng.choice(groups)
            options = sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))
            # Networks for images of 32x32 and more take minutes.
            found.append(f"{group}={rng.choice([each for each in options if not re.search('cifar10|dit_', each)])}")
        else:
            found.append(f"{rng.choice(leaves)}={rng.choice(VALUES)}")
    latent = model == "ldm" or "model/latent=autoencoder" in found
    return [*found, *(LATENT if latent else [])]  # the first stage has its own budget


def _leaves(node: Any, path: str = "") -> Iterator[str]:
    if isinstance(node, DictConfig):
        for key, value in node.items_ex(resolve=False):
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path


def overrides(number: int, seed: int, folder: Path, seconds: float = 60.0) -> Counter[str]:
    """Train two steps with random overrides."""
    rng, counts = random.Random(seed), Counter[str]()
    quick = [each for each in SMALL if not each.startswith(("budget.steps", "evaluation.num_images"))]
    for k in range(number):
        chosen = random_overrides(rng)
        trial = folder / str(k)
        trial.mkdir()
        keys = {each.split("=")[0] for each in chosen}
        rest = [each for each in quick if each.split("=")[0] not in keys]
        pid = fork(trial, [*chosen, *rest, "budget.steps=2", "evaluation.num_images=20", "hydra.run.dir=run"])
        code, cpu_seconds = _wait_for(pid, seconds)
        outcome, detail = judge(code, (trial / "output.txt").read_text(), cpu_seconds)
        if outcome in VIOLATIONS:
            print(f"{k}: {' '.join(chosen)}: {outcome}: {detail}", flush=True)
        counts[outcome] += 1
        shutil.rmtree(trial)
    return counts


def _wait_for(pid: int, seconds: float) -> tuple[int | None, float]:
    """Wait for a process at most ``seconds``, then kill it. Return its exit code and its processor time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    wait(pid)
    return None, seconds


def judge(code: int | None, output: str, seconds: float) -> tuple[str, str]:
    """Return ``trained``, ``explained`` by one line that starts with "Error:", or the violation, and a detail."""
    end = " ".join(output[-250:].split())
    if code is None:
        return "too slow", end
    if "Traceback" in output:
        return "raw error", end
    if code == 0:
        return "trained", ""
    errors = [line for line in output.splitlines() if line.startswith("Error: ")]
    if len(errors) != 1:
        return "raw error", f"{len(errors)} lines of error, exit code {code}: {end}"
    # An error of another kind than `UserError` names its type and place.
    if re.match(r"Error: \w+ at \w+\.py:\d+", errors[0]):
        return "raw error", errors[0]
    return ("explained", "") if seconds < MAX_SECONDS else ("late", errors[0])


EXPERIMENTS: dict[str, Callable[[int, int, Path], Counter[str]]] = {
    "kills": kills, "damages": damages, "overrides": overrides, "sweep": sweep,
}  # fmt: skip
VIOLATIONS = ("different", "used", "raw error", "too slow", "late")


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary working directory without the variables that select data and caches of the user."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        try:
            yield Path(name)
        finally:
            os.chdir(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--number", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.monotonic()
    with scratch() as folder:
        counts = EXPERIMENTS[options.experiment](options.number, options.seed, folder)
    for name, count in counts.most_common():
        print(f"{count:6d}  {name}")
    stored = {
        "number": options.number,
        "seed": options.seed,
        "counts": dict(counts),
        "seconds": round(time.monotonic() - start),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"faults_{options.experiment}.json").write_text(json.dumps(stored, indent=1) + "\n")
    sys.exit(any(counts[name] for name in VIOLATIONS))


if __name__ == "__main__":
    main()
