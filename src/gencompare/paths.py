"""Where the configuration tree lies: in a checkout or in an installed wheel."""

from __future__ import annotations

from pathlib import Path


def conf_dir() -> Path:
    """The folder ``conf``: the checkout's own if this is one, else the copy inside the installed package."""
    package = Path(__file__).resolve().parent
    checkout = package.parents[1] / "conf"
    return checkout if (checkout / "config.yaml").is_file() else package / "conf"
