"""Sphinx configuration: python -m sphinx -W --keep-going -b html docs build/docs (or make docs)."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from sphinx.application import Sphinx

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path[:0] = [str(DOCS), str(ROOT / "src")]

import config_reference  # noqa: E402

import gencompare  # noqa: E402

project = "gencompare"
copyright = "gencompare contributors"
version = release = gencompare.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
]
exclude_patterns = ["**/.ipynb_checkpoints"]

# Markdown

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"
# The language of most blocks without one: shell commands, trees of files and tables of numbers.
highlight_language = "text"

# Docstrings

default_role = "py:obj"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings give shapes and ranges; the signature would repeat the types without them
autodoc_inherit_docstrings = False

# HTML

html_theme = "furo"
html_title = f"gencompare {version}"
html_static_path = ["_static"]
html_css_files = ["gencompare.css"]
html_theme_options = {"navigation_with_keys": True}
html_copy_source = False
copybutton_exclude = ".linenos, .gp, .go"

# Existing pages are plain Markdown that also reads well on a forge. What Sphinx needs is added while it reads them.


def subpages(folder: Path) -> list[str]:
    """Return the pages below ``folder/README.md`` in the navigation: all others of the folder."""
    pages = [path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.md")]
    return sorted(set(pages) - {"README"})


def complete(app: Sphinx, name: str, source: list[str]) -> None:
    """Complete the text of an existing page.

    The tables of a comparison, which are made for pasting, get a title above their headings; metric studies get one
    too. The pages of both folders get a hidden table of contents. The changelog is a page of the site, and links from
    notebooks to docs/ are relative to their copies.
    """
    text = source[0].replace("](../CHANGELOG.md", "](/changelog.md")
    folder, _, page = name.rpartition("/")
    if folder == "notebooks":
        text = text.replace("](../docs/", "](../")
    if page == "compare":
        text = f"# Tables: {folder.removeprefix('results/')}\n\n" + re.sub("^###", "##", text, flags=re.MULTILINE)
    if folder == "metrics" and page != "README":
        text = f"# Metrics on {page}\n\n" + text
    if name in ("results/README", "metrics/README"):
        text += "\n\n```{toctree}\n:hidden:\n\n" + "\n".join(subpages(DOCS / folder)) + "\n```\n"
    source[0] = text


def copy_notebooks() -> None:
    """Copy notebooks/*.ipynb into docs/notebooks, since Sphinx reads pages from its source folder only.

    The folder also gets the page that lists them. Notebooks that were not written yet are left out.
    """
    target = DOCS / "notebooks"
    target.mkdir(exist_ok=True)
    notebooks = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    for old in set(target.glob("*.ipynb")) - {target / path.name for path in notebooks}:
        old.unlink()
    for path in notebooks:
        copy = target / path.name
        if not copy.exists() or copy.read_bytes() != path.read_bytes():
            shutil.copyfile(path, copy)
    lines = ["# Notebooks", "", "The folder `notebooks/` has their sources. `make notebooks` runs them.", ""]
    if notebooks:
        lines += ["```{toctree}", ":maxdepth: 1", "", *(path.stem for path in notebooks), "```", ""]
    config_reference.write(target / "index.md", "\n".join(lines))


def keep_first_sentence(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Keep napoleon from taking the text before a colon in an attribute's docstring as its type.

    It looks for a colon in the first line only, so an empty comment goes before it.
    """
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]


def setup(app: Sphinx) -> None:
    copy_notebooks()
    config_reference.write(DOCS / "reference" / "config.md", config_reference.page(ROOT / "conf"))
    app.connect("source-read", complete)
    app.connect("autodoc-process-docstring", keep_first_sentence, priority=400)  # before napoleon
