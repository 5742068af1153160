"""The documentation: it builds without warnings, it lists every setting, and its links point to files."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gencompare.comparison.load_runs import find_run_folders, load_runs
from gencompare.comparison.page import render
from gencompare.comparison.tables import write_csv, write_markdown

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
GENERATED = (DOCS / "notebooks", DOCS / "reference" / "config.md")
"""Written by the build, and not in the repository."""


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    """Marked as slow: the build takes half a minute on an idle core, most of it for the docstrings."""
    pytest.importorskip("myst_nb", reason="the docs extra is not installed")
    arguments = ["-W", "--keep-going", "-q", "-b", "html", "-d", str(tmp_path / "doctrees")]
    command = [sys.executable, "-m", "sphinx", *arguments, str(DOCS), str(tmp_path / "html")]
    process = subprocess.run(command, capture_output=True, text=True, timeout=290)
    assert process.returncode == 0, process.stderr[-3000:]
    assert (tmp_path / "html" / "index.html").is_file()


@pytest.fixture(scope="module")
def config_page() -> str:
    spec = importlib.util.spec_from_file_location("config_reference", DOCS / "config_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["config_reference"] = module  # for its dataclasses
    spec.loader.exec_module(module)
    return module.page(ROOT / "conf")


def keys(value: object, prefix: str = "") -> list[str]:
    """Return the dotted keys of all settings: what is not a mapping, and mappings without entries."""
    if not isinstance(value, dict) or not value:
        return [prefix]
    return [key for name, item in value.items() for key in keys(item, f"{prefix}.{name}" if prefix else str(name))]


FILES = sorted((ROOT / "conf").rglob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "conf")))
def test_every_setting_is_in_the_reference(path: Path, config_page: str) -> None:
    group = "/".join(path.relative_to(ROOT / "conf").parent.parts)
    section = config_page.split(f"\n## {group}=\n" if group else "\n## config\n")[1].split("\n## ")[0]
    if group:
        section = section.split(f"\n### {path.stem}\n")[1].split("\n### ")[0]
    listed = re.findall(r"^\| `([^`]+)` \|", section, flags=re.MULTILINE)
    for key in filter(None, keys(yaml.safe_load(path.read_text()) or {})):
        if key == "defaults" or key.split(".")[-1] in ("_target_", "_partial_"):
            continue  # in the text above the table
        # A mapping in one line is listed as a whole.
        assert any(key == name or key.startswith(f"{name}.") for name in listed), key
    header = re.match(r"(?:# @package .*\n)?((?:#.*\n)*)", path.read_text())
    assert header is not None
    assert re.findall(r"\w+", header[1]) == re.findall(r"\w+", section)[: len(re.findall(r"\w+", header[1]))]


PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *sorted(page for page in DOCS.rglob("*.md") if not any(page.is_relative_to(path) for path in GENERATED)),
]


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as forges make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_point_to_files(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target not in GENERATED, link
        assert target.is_relative_to(ROOT), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link


RESULTS = sorted(path for path in (DOCS / "results").iterdir() if next(path.glob("*/record.json"), None))


@pytest.mark.parametrize("folder", RESULTS, ids=lambda folder: folder.name)
def test_the_pages_of_results_are_current(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables of all comparisons, and one whole page, are what python docs/results/build.py writes."""
    monkeypatch.chdir(ROOT)
    loaded = load_runs(find_run_folders(f"{folder}/*"))
    write_csv(loaded, tmp_path / "compare.csv")
    write_markdown(loaded, tmp_path / "compare.md")
    for name in ("compare.csv", "compare.md"):
        assert (tmp_path / name).read_text() == (folder / name).read_text(), "run python docs/results/build.py"
    if folder.name == "sde_vp":
        pages = [render(loaded), (folder / "compare.html").read_text()]
        # Without the date, and without charts, which other versions of Matplotlib draw differently.
        new, committed = (re.sub(r"<footer>.*?</footer>|<svg.*?</svg>", "", text, flags=re.DOTALL) for text in pages)
        assert new == committed, "run python docs/results/build.py"
