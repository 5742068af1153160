"""The rooms of the house and who may enter: the import rules of docs/architecture.md, read from the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "gencompare"
HEAVY = {"torch", "torchvision", "pytorch_lightning", "torchmetrics", "torch_fidelity"}
HYDRA = {"hydra", "omegaconf"}
OWN_FAMILY_FREE = {"gencompare.data", "gencompare.evaluation", "gencompare.training", "gencompare.tasks"}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, by its dotted name, wherever in the file; names imported from a package too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def touches(names: set[str], forbidden: set[str]) -> set[str]:
    return {name for name in names for f in forbidden if name == f or name.startswith(f + ".")}


def violations(path: Path) -> set[str]:
    room = path.relative_to(PACKAGE).parts[0]
    names = imports(path)
    bad = set()
    if room != "tasks":
        bad |= touches(names, HYDRA)
        if path.name != "__init__.py":
            bad |= touches(names, {"gencompare.tasks"})
    own = {name for name in names if name.startswith("gencompare.")}
    if room in ("networks", "diffusion"):
        shared = {"gencompare.errors", "gencompare.rng", "gencompare.hyperparameters"}
        allowed = {f"gencompare.{room}", "gencompare.generative_model.Cond"} | shared
        bad |= own - touches(own, allowed) - {"gencompare.generative_model"}
        bad |= touches(names, {"pytorch_lightning", "torchmetrics", "torchvision"})
    if room == "models":
        bad |= touches(names, OWN_FAMILY_FREE)
        siblings = {f"gencompare.models.{p.stem}" for p in (PACKAGE / "models").glob("*.py") if is_family(p)}
        bad |= touches(names, siblings - {f"gencompare.models.{path.stem}"})
    if room == "evaluation":
        bad |= touches(names, {"gencompare.models", "gencompare.diffusion", "gencompare.training", "gencompare.data"})
    if room in ("compare", "records.py", "protocol.py", "files.py", "errors.py", "paths.py", "pictures.py"):
        bad |= touches(names, HEAVY)
        bad |= touches(names, {"gencompare.generative_model", "gencompare.evaluation", "gencompare.training"})
    return bad


def is_family(path: Path) -> bool:
    """A module of models/ that defines a LightningModule of its own (helpers may be shared)."""
    bases = {"GenerativeModel", "TrainedModel"}
    tree = ast.parse(path.read_text())
    return any(
        isinstance(node, ast.ClassDef) and bases & {b.id for b in node.bases if isinstance(b, ast.Name)}
        for node in ast.walk(tree)
    )


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_import_rules(path: Path) -> None:
    assert not violations(path), f"{path.name} may not import {sorted(violations(path))}"


def test_the_rules_bite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = {
        "diffusion/a.py": "from gencompare.networks.unet import UNet",
        "models/a.py": "import gencompare.evaluation.metrics",
        "compare/a.py": "import torch",
        "records.py": "def f():\n    import torch.nn",
        "evaluation/a.py": "from gencompare.models.vae import VAE",
        "training/a.py": "from gencompare.tasks.runs.build import build_model",
        "networks/a.py": "from omegaconf import OmegaConf",
    }
    monkeypatch.setattr("test_imports.PACKAGE", tmp_path)
    for name, source in planted.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
        assert violations(path), f"the rule for {name} does not bite"
