"""Published figures of a data set, to hold a ranking against: never ranked, and marked as not measured here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources


@dataclass(frozen=True)
class Anchor:
    """What a paper reports of one model. None where it says nothing, or where it was not looked up."""

    model: str
    source: str
    """The paper, with the table where it is known."""
    fid: float | None = None
    """Of 50,000 samples against the training images, on the standard Inception network."""
    bpd: float | None = None
    """Bits/dim of test images: exact or a bound, as the paper has it."""
    nfe: float | None = None
    """Network calls a sample."""
    images: float | None = None
    """Training images seen."""
    note: str = ""


def anchors(data: str) -> list[Anchor]:
    """The published figures of the data set called ``data``, by FID and then bits/dim; none for most data sets."""
    found = [Anchor(**entry) for entry in _file().get(data, [])]
    return sorted(found, key=lambda a: (a.fid is None, a.fid if a.fid is not None else a.bpd))


@cache
def _file() -> dict[str, list[dict]]:
    return json.loads(resources.files("gencompare.compare").joinpath("anchors.json").read_text(encoding="utf-8"))
