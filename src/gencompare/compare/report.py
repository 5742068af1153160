"""The comparison of run folders, as files: a page, tables as CSV, Markdown and LaTeX, and its charts."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from gencompare.compare.charts import save_all
from gencompare.compare.files import write_csv, write_latex, write_markdown
from gencompare.compare.gather import Gathered, View, gather
from gencompare.compare.page import write_page
from gencompare.errors import UserError

PAGE, TABLE, MARKDOWN, LATEX = "compare.html", "compare.csv", "compare.md", "compare.tex"


def report(folders: Iterable[str | os.PathLike[str]], out: str | os.PathLike[str], view: View = View()) -> Path:
    """`write` of what is gathered from ``folders``."""
    return write(gather(folders, view), out)


def write(gathered: Gathered, out: str | os.PathLike[str]) -> Path:
    """Write ``compare.html``, ``.csv``, ``.md``, ``.tex`` and the folder ``plots`` in ``out``. Returns the page.

    One folder makes the page and the tables of a single run. Raises `UserError` when none of them holds a readable
    record, and when the view asks for what there is not.
    """
    if not gathered.runs:
        reasons = [skip.reason for skip in gathered.skipped]
        raise UserError(f"No run can be shown: {reasons[0]}" if reasons else "No run folder was given to compare.")
    out = Path(out)
    write_csv(gathered, out / TABLE)
    write_markdown(gathered, out / MARKDOWN)
    write_latex(gathered, out / LATEX)
    if len(gathered.runs) > 1:
        save_all(gathered, out)
    write_page(gathered, out / PAGE)
    return out / PAGE
