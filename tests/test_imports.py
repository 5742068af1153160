"""The import rules of docs/architecture.md, read from the source."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "gencompare"
HEAVY = {"torch", "torchvision", "pytorch_lightning", "torchmetrics", "torch_fidelity"}
HYDRA = {"hydra", "omegaconf"}
NOT_FOR_MODELS = {"gencompare.data", "gencompare.evaluation", "gencompare.training", "gencompare.tasks"}
NOT_FOR_EVALUATION = {"gencompare.models", "gencompare.diffusion", "gencompare.training", "gencompare.data"}
WITHOUT_TORCH = (
    "checksums.py", "comparison", "command_line.py", "errors.py", "files.py", "migrations.py", "records.py",
    "safe_files.py", "trust.py", "version.py",
)  # fmt: skip
"""Packages and modules that load without torch, so that a comparison starts quickly on any machine."""
NOT_FOR_HELP = {*HEAVY, "lightning_fabric", "wandb", "matplotlib", "scipy", "sklearn", "jinja2", "PIL"}
NOT_BEFORE_TRAINING = {
    "wandb", "matplotlib", "scipy", "sklearn", "torchvision", "torchmetrics", "torch_fidelity", "torchdiffeq", "jinja2",
}  # fmt: skip
"""Packages of which training loads no module before the first step, beyond those that Lightning itself imports through
torchmetrics: scipy.signal, matplotlib, torchvision.models and others. torch's optimisers import torch._dynamo."""


def imports(path: Path) -> set[str]:
    """Return the dotted names of all modules that a file imports anywhere, and of names imported from modules."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def within(names: set[str], packages: set[str]) -> set[str]:
    """Return the names that equal one of ``packages`` or are inside one."""
    return {name for name in names for package in packages if name == package or name.startswith(package + ".")}


def violations(path: Path) -> set[str]:
    """Return the imports of a file that the rules forbid."""
    room = path.relative_to(PACKAGE).parts[0]
    names = imports(path)
    forbidden = set()
    if room not in ("tasks", "private_apis.py"):  # private_apis.py imports Hydra inside a function
        forbidden |= within(names, HYDRA)
    if room != "tasks" and path.name != "__init__.py":
        forbidden |= within(names, {"gencompare.tasks"})
    if room in ("networks", "diffusion"):
        own = {name for name in names if name.startswith("gencompare.")}
        shared = {
            f"gencompare.{name}"
            for name in ("checksums", "dequantization", "distributed", "errors", "hyperparameters", "rng", "safe_files")
        }
        allowed = {f"gencompare.{room}", "gencompare.generative_model.Cond"} | shared
        forbidden |= own - within(own, allowed) - {"gencompare.generative_model"}
        forbidden |= within(names, {"pytorch_lightning", "torchmetrics", "torchvision"})
    if room == "models":
        forbidden |= within(names, NOT_FOR_MODELS)
        families = {f"gencompare.models.{p.stem}" for p in (PACKAGE / "models").glob("*.py") if is_family(p)}
        forbidden |= within(names, families - {f"gencompare.models.{path.stem}"})
    if room == "evaluation":
        forbidden |= within(names, NOT_FOR_EVALUATION)
    if room == "training":
        forbidden |= within(names, {"gencompare.models", "gencompare.networks", "gencompare.diffusion"})
    if room in WITHOUT_TORCH:
        forbidden |= within(names, HEAVY)
        forbidden |= within(names, {"gencompare.generative_model", "gencompare.evaluation", "gencompare.training"})
    if room in ("distributed.py", "resources.py"):
        forbidden |= {name for name in names if name.startswith("gencompare")} - within(names, {"gencompare.errors"})
    return forbidden


def is_family(path: Path) -> bool:
    """Return whether a module in models/ defines a family, a subclass of `GenerativeModel` or `TrainedModel`."""
    bases = {"GenerativeModel", "TrainedModel"}
    tree = ast.parse(path.read_text())
    return any(
        isinstance(node, ast.ClassDef) and bases & {b.id for b in node.bases if isinstance(b, ast.Name)}
        for node in ast.walk(tree)
    )


def import_graph(package: Path) -> dict[str, set[str]]:
    """Map each module of a package to the modules of the package that it imports anywhere."""
    modules = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: (imports(path) & modules.keys()) - {name} for name, path in modules.items()}


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules of an import cycle, or an empty list if there is none.

    A package counts as a module, but importing one of its modules does not count as importing the package.
    """
    remaining = dict(graph)
    while leaves := [name for name, targets in remaining.items() if not targets & remaining.keys()]:
        for name in leaves:
            del remaining[name]
    path: list[str] = []
    name = next(iter(sorted(remaining)), None)
    while name is not None and name not in path:
        path.append(name)
        name = min(remaining[name] & remaining.keys())
    return [] if name is None else path[path.index(name) :]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_follow_the_import_rules(path: Path) -> None:
    assert not violations(path), f"{path.name} may not import {sorted(violations(path))}"


def loaded_modules(folder: Path, *overrides: str, before: str = "") -> tuple[str, set[str]]:
    """Run the command line in a new interpreter until it ends or the first training step begins.

    Args:
        before: a module that is imported first.

    Returns:
        The output, and the modules that were loaded, except those that ``before`` imports.
    """
    code = f"""
import atexit, sys
{f"import {before}" if before else ""}
at_start = {{*sys.modules}} if {bool(before)} else set()
atexit.register(lambda: print("LOADED", *({{*sys.modules}} - at_start)))
from gencompare.tasks.main import main
if {bool(before)}:
    from gencompare.training.clock import TrainingClock
    TrainingClock.on_train_batch_start = lambda *_: sys.exit("first step")
sys.argv = ["run.py", *{overrides}]
main()
"""
    env = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    ran = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, timeout=200)
    output, _, modules = ran.stdout.rpartition("LOADED ")
    return output + ran.stderr, {*modules.split()}


def test_help_imports_no_slow_modules(tmp_path: Path) -> None:
    shown, modules = loaded_modules(tmp_path, "--help")
    for text in ("task=evaluate", "model: ", "data: ", "ddpm", "Examples"):
        assert text in shown
    assert not within(modules, NOT_FOR_HELP) and len(modules) < 550


def test_training_starts_without_modules_that_it_may_not_need(tmp_path: Path) -> None:
    overrides = ["model=ddpm", "data=digits", "trainer=cpu", "logger=csv", "budget=steps", "hydra.run.dir=run"]
    output, modules = loaded_modules(tmp_path, *overrides, before="pytorch_lightning")
    assert "gencompare.models.diffusion" in modules, output
    assert not within(modules, NOT_BEFORE_TRAINING) and len(modules) < 400


def test_there_is_no_import_cycle() -> None:
    """Imports inside functions and under TYPE_CHECKING count too."""
    cycle = find_cycle(import_graph(PACKAGE))
    assert not cycle, " -> ".join(cycle)


def test_a_planted_import_cycle_is_found(tmp_path: Path) -> None:
    package = tmp_path / "p"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text("import p.b")
    (package / "b.py").write_text("def f():\n    from p.c import x")
    (package / "c.py").write_text("x = 1")
    assert not find_cycle(import_graph(package))
    (package / "c.py").write_text("from p import a\nx = 1")
    assert sorted(find_cycle(import_graph(package))) == ["p.a", "p.b", "p.c"]


def test_module_names_are_unique() -> None:
    counts = Counter(path.stem for path in PACKAGE.rglob("*.py") if path.stem != "__init__")
    assert not [name for name, count in counts.items() if count > 1]


def test_planted_violations_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = {
        "diffusion/a.py": "from gencompare.networks.unet import UNet",
        "models/a.py": "import gencompare.evaluation.metrics",
        "comparison/a.py": "import torch",
        "records.py": "def f():\n    import torch.nn",
        "migrations.py": "import torch",
        "evaluation/metrics/a.py": "from gencompare.models.vae import VAE",
        "training/a.py": "from gencompare.tasks.runs.build import build_model",
        "training/b.py": "from gencompare.models.vae import VAE",
        "networks/a.py": "from omegaconf import OmegaConf",
        "resources.py": "from gencompare.records import RunRecord",
    }
    monkeypatch.setattr("test_imports.PACKAGE", tmp_path)
    for name, source in planted.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(source)
        assert violations(path), f"the rule for {name} does not find a violation"


def test_a_family_that_imports_another_family_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = tmp_path / "models"
    models.mkdir()
    (models / "one.py").write_text("class One(GenerativeModel): ...")
    (models / "two.py").write_text("from gencompare.models.one import One\nclass Two(GenerativeModel): ...")
    (models / "helper.py").write_text("from gencompare.models.one import One")
    monkeypatch.setattr("test_imports.PACKAGE", tmp_path)
    assert not violations(models / "one.py")
    assert violations(models / "two.py") and violations(models / "helper.py")
