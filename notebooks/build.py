"""Run the notebooks and store them with their outputs: python notebooks/build.py [NAME ...]

Each notebook is a Python script in jupytext's percent format (NN_name.py), which is what to edit. This script runs it
and writes the paired NN_name.ipynb. Pictures are reduced to 128 colours, which keeps a notebook below 1 MB.
"""

from __future__ import annotations

import base64
import io
import sys
import time
import tomllib
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

FOLDER = Path(__file__).parent
INSTALL = "install"
"""Tag of the cell that installs the package outside of a checkout."""
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}
TIMEOUT = 300
"""Seconds that a cell may take."""


def scripts() -> list[Path]:
    """The notebooks as scripts, in order."""
    return sorted(FOLDER.glob("[0-9][0-9]_*.py"))


def read(script: Path) -> NotebookNode:
    """Read a script as a notebook whose install cell has the address of the repository in pyproject.toml."""
    notebook = jupytext.read(script)
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    repository = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())["tool"]["gencompare"]["repository"]
    for number, cell in enumerate(notebook.cells):
        cell.id = f"{script.stem}-{number}".replace("_", "-")[-64:]
        if is_install(cell):
            line = "%pip install -q git+{REPOSITORY}"
            known = line.replace("{REPOSITORY}", repository)
            cell.source = cell.source.replace(line, known if repository else f"# {line}")
    return notebook


def is_install(cell: NotebookNode) -> bool:
    """Whether a cell installs the package."""
    return INSTALL in cell.metadata.get("tags", [])


def run(notebook: NotebookNode) -> None:
    """Run all cells except for the install cell, in place.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raises an exception.
    """
    cells = notebook.cells
    notebook.cells = [cell for cell in cells if not is_install(cell)]
    try:
        NotebookClient(notebook, timeout=TIMEOUT, kernel_name=KERNEL["name"]).execute()
    finally:
        notebook.cells = cells


def shrink(notebook: NotebookNode) -> None:
    """Reduce pictures to 128 colours, and remove what changes from run to run."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "text/html" in data:
                data["text/plain"] = "<table>"
            if "image/png" in data:
                picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB").quantize(128)
                png = io.BytesIO()
                picture.save(png, "PNG", optimize=True)
                data["image/png"] = base64.b64encode(png.getvalue()).decode()
                data["text/plain"] = "<picture>"


def main(names: list[str]) -> None:
    """Run and store the notebooks of these names, or all of them."""
    for script in scripts():
        if names and script.stem not in names:
            continue
        start = time.monotonic()
        notebook = read(script)
        run(notebook)
        shrink(notebook)
        path = script.with_suffix(".ipynb")
        nbformat.write(notebook, path)
        print(f"{path.name}: {time.monotonic() - start:.0f} s, {path.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
