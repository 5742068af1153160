"""Format Hydra overrides and commands to paste into a shell, and locate the config tree."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

from gencompare.errors import printable

UNQUOTED = re.compile(r"(?!(?:null|true|false|nan|inf)$)(?:\.{0,2}/|[a-z_])[\w./-]*", re.ASCII | re.IGNORECASE)
"""Text that Hydra parses as itself without quotes. Covers common paths and names, but not all such text."""


def quote(text: str) -> str:
    """Format ``text`` as a Hydra value that parses to exactly this string, with quotes only if necessary.

    Within quotes, backslashes are literal except before a quote and before ``${``, where they are doubled.
    """
    if UNQUOTED.fullmatch(text):
        return text
    literal = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)
    return "'" + re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), literal) + "'"


def override(key: str, value: object) -> str:
    """Format the Hydra override ``key=value``, with the value quoted for Hydra if necessary."""
    return f"{key}={quote(str(value))}"


def shell_override(key: str, value: object) -> str:
    """Format the override ``key=value``, also quoted for a shell."""
    return shlex.quote(override(key, value))


def run_command(*overrides: str) -> str:
    """Format the command ``python run.py`` with ``overrides``, quoted for a shell and printable."""
    return printable(shlex.join(["python", "run.py", *overrides]))


def conf_dir() -> Path:
    """Return the ``conf`` folder of the source checkout if there is one, otherwise that of the installed package."""
    package = Path(__file__).resolve().parent
    checkout = package.parents[1] / "conf"
    return checkout if (checkout / "config.yaml").is_file() else package / "conf"


def config_roots() -> list[Path]:
    """Return the folders of config groups: that of this project, and the user's own (``GENCOMPARE_CONF``)."""
    own = os.environ.get("GENCOMPARE_CONF")
    return [conf_dir(), *([Path(own)] if own else [])]
