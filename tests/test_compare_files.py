"""The tables as LaTeX, and the charts as files."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gencompare.comparison.charts import file_names
from gencompare.comparison.page import report
from gencompare.comparison.tables import latex
from gencompare.records import Metric
from synthetic import result, write_run

ODD = r'\input{x} 100% $a_1$ & #1 {b} ~^ "q" <i>|`'


def test_latex_escapes_any_text() -> None:
    assert latex("a_b & 5 % #1 {x} $y$") == r"a\_b \& 5 \% \#1 \{x\} \$y\$"
    assert latex("\\~^") == r"\textbackslash{}\textasciitilde{}\textasciicircum{}"
    assert latex("FID\u00a0↓ 2 × [1, 2] –") == r"FID~$\downarrow$ 2 $\times$ [1, 2] --"  # noqa: RUF001
    assert latex("two\nlines\x00") == "two lines "
    # Undoing the escapes gives the original text.
    back = {r"\textbackslash{}": "\\", r"\textasciitilde{}": "~", r"\textasciicircum{}": "^", r"\textless{}": "<"}
    back |= {r"\textgreater{}": ">", r"\textbar{}": "|", r"\char34{}": '"', r"\textasciigrave{}": "`"}
    back |= {rf"\{sign}": sign for sign in "{}$&#%_"}
    read = re.sub(r"\\(?:text[a-z]+|char34)\{\}|\\[{}$&#%_]", lambda found: back[found[0]], latex(ODD))
    assert read == ODD


def test_latex_rows_have_equal_columns_and_the_best_is_bold(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, [result(v)], name=f"{name} {ODD}") for name, v in (("a", 1.25), ("b", 2.5))]
    metrics = {"fd_digits": Metric(None, higher_is_better=False)}
    folders.append(write_run(tmp_path / "c", [result(None, metrics=metrics)]))
    report(folders, tmp_path / "out")
    text = (tmp_path / "out" / "compare.tex").read_text()
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 4 and {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {8}
    spec = (re.search(r"\\begin\{tabular\}\{([rl]+)\}", text) or ["", ""])[1]
    assert len(spec) == 9
    assert re.findall(r"\\textbf\{([^}]+)\}", text) == ["1.25"]
    assert text.count(r"\midrule") == 2 and r"\toprule" in text and r"\bottomrule" in text
    if shutil.which("pdflatex"):
        page = "\\documentclass{article}\\usepackage{booktabs,textcomp}\\begin{document}\n" + text + "\\end{document}"
        (tmp_path / "page.tex").write_text(page)
        subprocess.run(["pdflatex", "-halt-on-error", "page.tex"], cwd=tmp_path, check=True, capture_output=True)


@pytest.mark.parametrize(
    "titles, names",
    [
        (["FID on cifar10 against training FLOPs"], ["fid_on_cifar10_against_training_flops"]),
        (["../../etc/passwd", "a/b", "a b", "A:B"], ["etc_passwd", "a_b", "a_b_2", "a_b_3"]),
        (["<>", "con" + "x" * 200], ["chart", "con" + "x" * 77]),
    ],
)
def test_chart_files_are_named_by_their_titles(titles: list[str], names: list[str]) -> None:
    assert file_names(titles) == names


def test_each_chart_is_saved_as_png_and_svg(tmp_path: Path) -> None:
    names = ["_hidden", "$a_1$ <b>&"]
    folders = [
        write_run(tmp_path / f"r{k}", [result(1.0 + k)], name=name, training={"flops": 1e12 * (k + 1)})
        for k, name in enumerate(names)
    ]
    report(folders, tmp_path / "out")
    found = sorted(path.name for path in (tmp_path / "out" / "plots").iterdir())
    stems = [
        "ddpm_on_digits_loss", "fd_digits_on_digits", "fd_digits_on_digits_95_intervals",
        "fd_digits_on_digits_against_bits_dim", "fd_digits_on_digits_against_training_flops",
    ]  # fmt: skip
    assert found == [f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")]
    for stem in stems:
        with Image.open(tmp_path / "out" / "plots" / f"{stem}.png") as image:
            assert np.ptp(np.asarray(image.convert("L"))) > 100
        text = (tmp_path / "out" / "plots" / f"{stem}.svg").read_text()
        assert "hidden" in text and "$a_1$ &lt;b&gt;&amp;" in text and "<script" not in text


def test_a_single_run_has_no_chart_files(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", [result(1.0)])
    report([folder], folder)
    assert not (folder / "plots").exists() and (folder / "compare.tex").is_file()
