"""Format Hydra overrides and commands to paste into a shell, and locate the config tree."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

UNQUOTED = re.compile(r"(?!(?:null|true|false|nan|inf)$)(?:\.{0,2}/|[a-z_])[\w./-]*", re.ASCII | re.IGNORECASE)
"""Text that Hydra's grammar parses as itself without quotes: a subset that covers usual paths and names."""


def quote(text: str) -> str:
    """``text`` as a Hydra value that parses to exactly this string; quoted only if necessary.

    Within quotes, backslashes are literal except before a quote and before ``${``, where they are doubled.
    """
    if UNQUOTED.fullmatch(text):
        return text
    literal = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)
    return "'" + re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), literal) + "'"


def override(key: str, value: object) -> str:
    """The Hydra override ``key=value``, its value quoted for Hydra if necessary."""
    return f"{key}={quote(str(value))}"


def shell_override(key: str, value: object) -> str:
    """The override ``key=value``, quoted for a shell as well."""
    return shlex.quote(override(key, value))


def run_command(*overrides: str) -> str:
    """``python run.py`` with ``overrides``, quoted for a shell."""
    return shlex.join(["python", "run.py", *overrides])


def conf_dir() -> Path:
    """The ``conf`` folder of the source checkout, else the copy in the installed package."""
    package = Path(__file__).resolve().parent
    checkout = package.parents[1] / "conf"
    return checkout if (checkout / "config.yaml").is_file() else package / "conf"
