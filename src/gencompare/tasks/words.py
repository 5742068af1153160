"""Words of the command line that the program itself writes: values in Hydra's grammar, and commands to paste."""

from __future__ import annotations

import re
import shlex

PLAIN = re.compile(r"(?!(?:null|true|false|nan|inf)$)(?:\.{0,2}/|[a-z_])[\w./-]*", re.ASCII | re.IGNORECASE)


def quoted(text: str) -> str:
    """``text`` as a value in Hydra's grammar that means just this text, whatever is in it; plain text stays bare.

    Backslashes count only before a quote and before ``${``, where they are doubled.
    """
    if PLAIN.fullmatch(text):
        return text
    literal = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", text)
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), literal) + "'"


def pasted(key: str, value: object) -> str:
    """``key=value`` for a command that the user may paste into a shell."""
    return shlex.quote(f"{key}={quoted(str(value))}")
