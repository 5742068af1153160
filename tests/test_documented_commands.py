"""Every command of README.md, CONTRIBUTING.md and docs/ runs, at a small size: make docs-check.

Commands of ``run.py`` run with a few training steps, a few samples and at most two values of each sweep. The tables
below list the commands that are only composed, that must fail with a clear message, or that are not run, with the
reason.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "how_to").glob("*.md")), ROOT / "docs" / "results" / "README.md",
    *sorted((ROOT / "docs" / "results").glob("*/README.md")),
]  # fmt: skip
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
PROGRAMS = (
    "python", ".venv/bin/", "make", "gencompare", "wandb", "pip", "torchrun", "docker", "export", "source", 'eval "',
    "tensorboard", "jupyter", "sbatch",
)  # fmt: skip

COMPOSED = (
    (r"experiment=(cifar10|eurosat64|fashion_mnist)|data=eurosat64", "hours of training, or weeks"),
    (r"task=measure_metrics", "minutes; tests/test_cli.py runs a small one"),
    (r"task=reproduce", "days of training; tests/test_published_results.py runs a small one"),
    (r"task=validate_metrics", "an hour; tests/test_metric_validation.py runs a small one"),
    (r"launcher=slurm", "needs a SLURM cluster"),
    (r"search=families", "a search for each family; +search=optuna runs"),
    (r"model=mine|mypackage", "placeholders"),
)
"""Commands that are composed, but not run, with the reason."""

MESSAGES = (
    (r"paper_fid50k|,inception\]", "weights"),
    (r"trainer=gpu", "trainer=cpu"),
    (r"MLFlowLogger", "mlflow"),
    (r"task\.push=USER", "hub"),
)
"""Commands that fail on a machine without network, GPU or optional package, with a word of the message."""

NOT_RUN = (
    (r"^make (bench|demo|setup|test|docs|lint)", "make targets that install, and that continuous integration runs"),
    (r"^(pip|source|export|\.venv/bin/pre-commit|\.venv/bin/python run\.py$)", "change the environment"),
    (r"^(wandb|tensorboard)", "need a server"),
    (r"task=bench", "tests/test_benchmarks.py runs the benchmarks"),
    (r"^torchrun", "tests/test_launched_ranks.py runs torchrun"),
    (r"^python benchmarks/", "tests/test_benchmarks.py runs the benchmarks"),
    (r"^python docs/(figures|results/(keep|build|find))", "write into the repository, whose pages are tested"),
    (r"^python -m pytest tests/test_(contract|score_matching_failures)\.py$", "part of make test"),
    (r"^gencompare\.", "Python, not a shell command"),
    (r"^python run\.py -sc install=fish", "needs fish"),
    (r"DATA_classifier", "a placeholder"),
    (r"run_dir=sr ", "needs the run of another command, which takes twelve minutes"),
)
"""Commands that are not run, with the reason."""

QUICK = {
    "trainer": "trainer=cpu", "budget": "budget=steps", "budget.steps": "budget.steps=2",
    "trainer.global_batch_size": "trainer.global_batch_size=8",
    "callbacks.evaluation.num_evaluations": "callbacks.evaluation.num_evaluations=1",
    "callbacks.evaluation.num_samples": "callbacks.evaluation.num_samples=0",
    "callbacks.evaluation.num_grid_images": "callbacks.evaluation.num_grid_images=4",
    "evaluation.num_images": "evaluation.num_images=20",
    "evaluation.protocol.num_likelihood_images": "evaluation.protocol.num_likelihood_images=4",
}  # fmt: skip
"""Overrides, by key, that make a run small."""
SHORT_STAGE = ["model.latent.budget.images=null", "model.latent.budget.steps=2"]
"""Overrides that shorten the training of an autoencoder before a model of its latents."""


def documented_commands() -> dict[str, str]:
    """Return each command with the page that has it first."""
    found: dict[str, str] = {}
    for page in PAGES:
        text = page.read_text()
        blocks = [body for language, body in FENCE.findall(text) if language in ("", "bash")]
        lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        for raw in [*lines, *re.findall(r"`([^`\n]+)`", FENCE.sub("", text))]:
            command = re.sub(r"\s+", " ", re.sub(r"\s+# .*", "", raw)).strip()
            if command.startswith(PROGRAMS) and " " in command:
                found.setdefault(command, str(page.relative_to(ROOT)))
    return found


def reason(command: str, table: tuple[tuple[str, str], ...]) -> str | None:
    return next((text for pattern, text in table if re.search(pattern, command)), None)


COMMANDS = documented_commands()
RUN = [command for command in COMMANDS if reason(command, NOT_RUN) is None]


def test_commands_are_found_and_exceptions_apply() -> None:
    assert len(RUN) > 100
    for table in (COMPOSED, MESSAGES, NOT_RUN):
        for pattern, _ in table:
            assert any(re.search(pattern, command) for command in COMMANDS), f"no command matches {pattern}"


class Workspace:
    """A folder with everything that documented commands refer to: trained runs, images, samples, own code."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "docs").symlink_to(ROOT / "docs")
        for name, source in own_files().items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(source)
        generator = np.random.default_rng(0)
        for k in range(60):
            path = folder / "photos" / "ab"[k % 2] / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (70, 80, 3), np.uint8)).save(path)
        np.savez(folder / "theirs.npz", arr_0=generator.integers(0, 256, (30, 8, 8, 1)).astype(np.uint8))
        np.savez(folder / "photos.npz", arr_0=generator.integers(0, 256, (30, 32, 32, 3)).astype(np.uint8))

    def run_folder(self, command: str, cli: Callable[..., int]) -> str:
        """Return the folder of a trained run that the command can use, and train it if necessary."""
        conditional = ["model=ddpm", "model.conditional=true", "model.label_dropout=0.1"]
        guided = [*conditional, "model/guidance=classifier_free"]
        settings: dict[str, list[str]] = {
            "weights=posthoc": ["model=ddpm", "+callbacks.posthoc_ema=posthoc_ema"],
            "model.guidance.scale=1,": guided, "guidance": conditional, "temperature": ["model=hvae"],
            "pixel_noise": ["model=vae"], "num_sampling_steps": ["model=ebm"], "autoencoder_run": ["model=autoencoder"],
            "mean_shift": ["model=vae"], "top_k": ["model=vqtransformer", *SHORT_STAGE], "": ["model=ddpm"],
        }  # fmt: skip
        key = next(key for key in settings if key in command)
        name = re.sub(r"\W+", "_", " ".join(settings[key]))
        if not (self.folder / "trained" / name / "record.json").exists():
            assert cli(*settings[key], *QUICK.values(), "logger=none", f"hydra.run.dir=trained/{name}") == 0
        return f"trained/{name}"


def own_files() -> dict[str, str]:
    """Return the files of the how-to pages, by path: blocks that start with their path, or follow it in a sentence."""
    files = {}
    for page in sorted((ROOT / "docs" / "how_to").glob("*.md")):
        text = page.read_text()
        for _, body in FENCE.findall(text):
            if named := re.match(r"# (mine/\S+)\n", body):
                files[named[1]] = body[named.end() :]
        for path, body in re.findall(r"`(mine/[^`]+)`[^`]*```\w+\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            files[path] = body
    return files


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> Iterator[Workspace]:
    folder = tmp_path_factory.mktemp("documented")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GENCOMPARE_CONF", str(folder / "mine" / "conf"))
        patch.setenv("PYTHONPATH", str(folder / "mine"))
        own = "bars,coupling_flow,dpm_solver_2,mean_shift,shifted_logistic"
        patch.setenv("GENCOMPARE_TRUSTED_PACKAGES", own)
        patch.setenv("GENCOMPARE_DATA", str(data_root))
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_DIR", str(folder))
        patch.syspath_prepend(str(folder / "mine"))
        yield Workspace(folder)


def small(command: str, run_folder: str) -> list[str]:
    """Return the arguments of ``python run.py`` for a small version of ``command``."""
    command = re.sub(r"\b(DIR|RUN_FOLDER)\b", run_folder, command).replace("docs/results/FOLDER", "docs/results/sde_vp")
    command = re.sub(
        r"\b(FILE\.npz|PATH)\b", "photos.npz" if "data=cifar10" in command else "theirs.npz", command
    ).replace("cifar10_samples.npz", "photos.npz")
    arguments = shlex.split(command)[2:]
    trains = not any(each.startswith("task=") or each in ("--help", "-sc") for each in arguments)
    evaluates = "task=evaluate" in arguments
    lists = 0
    changed: list[str] = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if argument.startswith("task.out="):
            argument = "task.out=out"
        elif key == "pretrained" and value == "theirs.npz":
            argument = "pretrained=weights.safetensors"
        elif key == "samples" and value == "out":
            argument = "samples=theirs.npz"
        elif "-m" in arguments and re.fullmatch(r"[\w./:+-]+(,[\w./:+-]+)+", value):
            lists += 1
            argument = f"{key}={','.join(value.split(',')[: 2 if lists == 1 else 1])}"
        own = key.lstrip("+") in QUICK or key.startswith(("budget", "debug"))
        if not (trains and own and "ddp" not in value) and not (evaluates and key == "evaluation.num_images"):
            changed.append(argument)
    if trains:
        quick = {key: value for key, value in QUICK.items() if not (key == "trainer" and "trainer=ddp" in arguments)}
        if "+search=optuna" in arguments:
            quick["callbacks.evaluation.num_samples"] = "callbacks.evaluation.num_samples=20"
            changed = [each for each in changed if "n_trials" not in each] + ["hydra.sweeper.n_trials=2"]
        changed += [*quick.values()]
        if "trainer=ddp" in arguments:
            changed.append("trainer.accelerator=cpu")
        if any(re.search("=ldm|vqtransformer|latent=autoencoder", each) for each in arguments):
            changed += SHORT_STAGE
    elif evaluates:
        changed += [QUICK["evaluation.num_images"], QUICK["evaluation.protocol.num_likelihood_images"]]
    elif "task=visualize" in arguments or "task=sample" in arguments:
        changed = [each for each in changed if not each.startswith("num_images=")] + ["num_images=4"]
    for sweep in (each.removeprefix("+sweep=") for each in changed if each.startswith("+sweep=")):
        preset = yaml.safe_load((ROOT / "conf" / "sweep" / f"{sweep}.yaml").read_text())
        for k, (key, values) in enumerate(preset["hydra"]["sweeper"]["params"].items()):
            if not any(each.startswith(f"{key}=") for each in changed):
                changed.append(f"{key}={','.join(str(values).split(',')[: 2 if k == 0 else 1])}")
    return changed


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.mark.docs
@pytest.mark.timeout(900)
@pytest.mark.parametrize("command", [pytest.param(each, id=f"{COMMANDS[each]}: {each}") for each in RUN])
def test_a_documented_command(
    command: str, workspace: Workspace, cli: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    with inside(workspace.folder):
        if not re.match(r"(\.venv/bin/)?python run\.py", command):
            run_other(command, workspace.folder)
            return
        arguments = small(
            command, workspace.run_folder(command, cli) if "DIR" in command or "FOLDER" in command else ""
        )
        if "pretrained=weights.safetensors" in arguments:
            run = workspace.run_folder(command, cli)
            assert cli("task=export", f"run_dir={run}", "task.out=weights.safetensors") == 0
        message = reason(command, MESSAGES)
        if "-sc" in arguments or "--help" in arguments:
            subprocess.run([sys.executable, str(ROOT / "run.py"), *arguments], check=True, capture_output=True)
        elif reason(command, COMPOSED) is not None:
            composed = [each for each in arguments if each != "-m" and not each.startswith("hydra/launcher")]
            first = [each if "=[" in each else re.sub(r"(=[^,({]*),.*", r"\1", each) for each in composed]
            known = [each for each in first if not re.search(r"hydra\.launcher|=mine|mypackage", each)]
            assert cli(*known, "--cfg", "job") == 0, capfd.readouterr().err
        elif message is not None:
            assert cli(*arguments) != 0
            assert message in capfd.readouterr().err
        elif "trainer=ddp" in arguments or "hydra/launcher=parallel" in arguments:
            # Processes are started with the command line of this one.
            process = [sys.executable, str(ROOT / "run.py"), *arguments]
            done = subprocess.run(process, capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, done.stderr[-3000:]
        else:
            assert cli(*arguments) == 0, capfd.readouterr().err


def run_other(command: str, folder: Path) -> None:
    """Run a command other than ``run.py``: pytest, a script in docs/, or shell completion."""
    if command.startswith("eval"):
        subprocess.run(["bash", "-c", command.replace("python run.py", f"{sys.executable} {ROOT}/run.py")], check=True)
        return
    arguments = [sys.executable if each == "python" else each for each in shlex.split(command)]
    arguments += ["-n0"] if "pytest" in arguments else []
    environment = os.environ | {"PYTHONPATH": f"{folder / 'mine'}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


BLOCKS = [
    pytest.param(page, body, id=f"{page.relative_to(ROOT)}: block {k}")
    for page in (ROOT / "README.md", *sorted((ROOT / "docs" / "how_to").glob("*.md")))
    for k, (language, body) in enumerate(FENCE.findall(page.read_text()))
    if language == "python" and not body.startswith("# mine/") and "wandb.Api" not in body
]
SMALLER = {"2_000": "20", "val_check_interval=500": "val_check_interval=10", "budget.images=2000": "budget.images=64"}


@pytest.mark.docs
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("page", "body"), BLOCKS)
def test_a_documented_python_block(page: Path, body: str, workspace: Workspace) -> None:
    for value, smaller in SMALLER.items():
        body = body.replace(value, smaller)
    with inside(workspace.folder):
        exec(compile(body, str(page), "exec"), {"__name__": "__main__"})
