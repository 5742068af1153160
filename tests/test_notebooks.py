"""The notebooks in notebooks/: they run, their stored copies are current, and each ends with questions."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
sys.path.insert(0, str(NOTEBOOKS))
if not NOTEBOOKS.is_dir():
    pytest.skip("a source distribution has no notebooks", allow_module_level=True)

build = pytest.importorskip("build", reason="the notebooks extra is not installed")
import nbformat  # noqa: E402

each_notebook = pytest.mark.parametrize("script", build.scripts(), ids=lambda script: script.stem)


def test_there_are_twelve_notebooks() -> None:
    assert [int(script.stem[:2]) for script in build.scripts()] == list(range(1, 13))


@each_notebook
def test_the_stored_notebook_has_the_cells_of_its_script(script: Path) -> None:
    stored = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    cells = [(cell.cell_type, cell.source) for cell in build.read(script).cells]
    assert [(cell.cell_type, cell.source) for cell in stored.cells] == cells, "run python notebooks/build.py"
    outputs = [output for cell in stored.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
    assert script.with_suffix(".ipynb").stat().st_size < 1_000_000


@each_notebook
def test_a_notebook_imports_the_package_and_ends_with_questions(script: Path) -> None:
    cells = build.read(script).cells
    assert cells[0].source.startswith("# ") and build.is_install(cells[1]) and "gencompare" in cells[2].source
    questions = [k for k, cell in enumerate(cells) if "## Questions" in cell.source]
    assert len(questions) == 1
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    assert not [line for source in code for line in source.splitlines() if len(line) > 120]
    assert len([cell for cell in cells[questions[0] :] if cell.cell_type == "code"]) in (2, 3, 4)
    for path in (script, script.with_suffix(".ipynb")):
        assert not re.search(r"/(work|tmp|home|root)/", path.read_text())


@pytest.mark.notebooks
@each_notebook
def test_a_notebook_runs(script: Path) -> None:
    build.run(build.read(script))
