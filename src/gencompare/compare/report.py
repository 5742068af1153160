"""The comparison of run folders, as files: a page, a CSV and a Markdown table."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from gencompare.compare.gather import gather
from gencompare.compare.page import write_page
from gencompare.compare.table import write_csv, write_markdown
from gencompare.errors import UserError

PAGE, TABLE, MARKDOWN = "compare.html", "compare.csv", "compare.md"


def report(folders: Iterable[str | os.PathLike[str]], out: str | os.PathLike[str]) -> Path:
    """Write ``compare.html``, ``compare.csv`` and ``compare.md`` of ``folders`` in ``out``. Returns the page.

    One folder makes the page of a single run. Raises `UserError` when none of them holds a readable record.
    """
    gathered = gather(folders)
    if not gathered.runs:
        reasons = [skip.reason for skip in gathered.skipped]
        raise UserError(f"No run can be shown: {reasons[0]}" if reasons else "No run folder was given to compare.")
    out = Path(out)
    write_csv(gathered, out / TABLE)
    write_markdown(gathered, out / MARKDOWN)
    write_page(gathered, out / PAGE)
    return out / PAGE
