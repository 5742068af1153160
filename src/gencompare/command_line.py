"""Hydra overrides and commands that the program itself prints, and the config tree they refer to."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

PLAIN = re.compile(r"(?!(?:null|true|false|nan|inf)$)(?:\.{0,2}/|[a-z_])[\w./-]*", re.ASCII | re.IGNORECASE)
"""Text that Hydra's grammar takes as it stands; not all of it, but what paths and names usually are."""


def quote(text: str) -> str:
    """``text`` as a value that means just this text, whatever is in it; plain text stays bare.

    Backslashes count only before a quote and before ``${``, where they are doubled.
    """
    if PLAIN.fullmatch(text):
        return text
    literal = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", text)
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), literal) + "'"


def override(key: str, value: object) -> str:
    """``key=value`` as a word for Hydra."""
    return f"{key}={quote(str(value))}"


def command(*words: str) -> str:
    """``python run.py`` with these words, to be pasted into a shell."""
    return shlex.join(["python", "run.py", *words])


def shell_command(key: str, value: object) -> str:
    """``key=value`` as a word to be pasted into a shell."""
    return shlex.quote(override(key, value))


def conf_dir() -> Path:
    """The folder ``conf``: the checkout's own if this is one, else the copy inside the installed package."""
    package = Path(__file__).resolve().parent
    checkout = package.parents[1] / "conf"
    return checkout if (checkout / "config.yaml").is_file() else package / "conf"
