"""The reference of all options, as Markdown: one table of key, default and comment for each YAML file of conf/."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Row:
    """One setting."""

    key: str
    """Dotted, as on the command line within its group."""
    default: str
    comment: str


@dataclass(frozen=True)
class Option:
    """One YAML file."""

    name: str
    header: str
    """The comment at the top of the file."""
    package: str | None
    """The package of the first line, such as ``_global_``; None for the folder's own."""
    target: str | None
    """The Python object that the option creates."""
    defaults: list[str]
    """The options that this one is composed of."""
    rows: list[Row]


def read(path: Path) -> Option:
    """Read a YAML file with its comments.

    The comment of a key is the one behind its value; without one, the lines above the key.
    """
    lines = path.read_text().splitlines()
    package, header = None, []
    for line in lines:
        if found := re.fullmatch(r"# @package (\S+)", line):
            package = found[1]
        elif line.startswith("#"):
            header.append(line.removeprefix("#").removeprefix(" "))
        else:
            break
    root = yaml.compose("\n".join(lines))
    rows = list(_rows(root, lines, "", len(header) + (package is not None))) if root else []
    # The text above the table names the Python object of the option; `_partial_` only says how it is called.
    target = next((row.default for row in rows if row.key == "_target_"), None)
    shown = [row for row in rows if row.key != "_target_" and row.key.split(".")[-1] != "_partial_"]
    return Option(path.stem, "\n".join(header), package, target, _defaults(root), shown)


def _rows(node: yaml.Node, lines: list[str], prefix: str, top: int) -> Iterator[Row]:
    """Yield the settings of a mapping. The first ``top`` lines are the header of the file."""
    assert isinstance(node, yaml.MappingNode)
    for key, value in node.value:
        name, first = prefix + key.value, key.start_mark.line
        above = []
        while (first := first - 1) >= top and lines[first].lstrip().startswith("#"):
            above.insert(0, lines[first].lstrip(" #"))
        if isinstance(value, yaml.MappingNode) and not value.flow_style:
            comment = _comment(lines[key.end_mark.line][key.end_mark.column + 1 :]) or " ".join(above)
            if comment or not value.value:
                yield Row(name, "", comment)
            yield from _rows(value, lines, f"{name}.", top)
        elif name != "defaults":
            rest = lines[value.end_mark.line][value.end_mark.column :] if value.end_mark.line < len(lines) else ""
            block = isinstance(value, yaml.SequenceNode) and not value.flow_style
            yield Row(name, _text(value, lines), (not block and _comment(rest)) or " ".join(above))


def _comment(rest: str) -> str:
    """Return the comment in the rest of a line."""
    rest = rest.strip()
    return rest.lstrip("# ") if rest.startswith("#") else ""


def _text(node: yaml.Node, lines: list[str]) -> str:
    """Return a value as it is written in the file, in one line."""
    if isinstance(node, yaml.SequenceNode) and not node.flow_style:
        return "[" + ", ".join(_text(item, lines) for item in node.value) + "]"
    start, end = node.start_mark, node.end_mark
    if start.line == end.line:
        return lines[start.line][start.column : end.column].strip()
    return " ".join(line.strip() for line in "\n".join(lines)[start.index : end.index].splitlines())


def _defaults(root: yaml.Node | None) -> list[str]:
    """Return the entries of a defaults list, as on the command line."""
    lists = [value for key, value in (root.value if root else []) if key.value == "defaults"]
    entries = []
    for item in lists[0].value if lists else []:
        pairs = item.value if isinstance(item, yaml.MappingNode) else []
        entries += [f"{key.value}={value.value}" for key, value in pairs] or [str(item.value)]
    return entries


def groups(conf: Path) -> dict[str, list[Option]]:
    """Return the options of every config group by its name; ``config`` is the file at the top."""
    files = sorted(conf.rglob("*.yaml"))
    found: dict[str, list[Option]] = {}
    for path in sorted(files, key=lambda path: (path.parent != conf, path.relative_to(conf).parts)):
        group = "/".join(path.relative_to(conf).parent.parts) or "config"
        found.setdefault(group, []).append(read(path))
    return dict(sorted(found.items(), key=lambda item: (item[0] != "config", item[0])))


def page(conf: Path) -> str:
    """Write the whole reference."""
    parts = [
        "# Configuration",
        "Every group, option and setting of `conf/`. `python run.py GROUP=OPTION` chooses an option, and"
        " `python run.py GROUP.KEY=VALUE` changes a setting: an option's keys are those of its group, with `.` for `/`"
        " (`model/schedule=cosine model.schedule.s=0.01`). Options marked *global* set keys anywhere in the config."
        " `python run.py --help` prints the groups and their options, and `python run.py --cfg job` the composed"
        " config.",
    ]
    for group, options in groups(conf).items():
        parts.append(f"## {group}" if group == "config" else f"## {group}=")
        for option in options:
            if group != "config":
                parts.append(f"### {option.name}")
            parts += _sections(option)
    return "\n\n".join(parts) + "\n"


def _sections(option: Option) -> Iterator[str]:
    """Yield the text and the table of an option."""
    if option.header:
        yield _header(option.header)
    details = []
    if option.target:
        details.append(f"Creates `{option.target}`.")
    if option.package == "_global_":
        details.append("Global.")
    elif option.package:
        details.append(f"Its keys are in `{option.package}`.")
    if option.defaults:
        details.append("Defaults: " + ", ".join(f"`{default}`" for default in option.defaults) + ".")
    if details:
        yield " ".join(details)
    if option.rows:
        table = ["| key | default | |", "|---|---|---|"]
        table += [f"| {_code(row.key)} | {_code(row.default)} | {_escape(row.comment)} |" for row in option.rows]
        yield "\n".join(table)


def _header(text: str) -> str:
    """Return the comment at the top of a file, with its indented lines as a block of commands."""
    lines, inside = [], False
    for line in text.splitlines():
        if line.startswith("  ") != inside:
            lines.append("```" if inside else "\n```")
            inside = not inside
        lines.append(line.strip() if inside else _escape(line))
    return "\n".join([*lines, "```"] if inside else lines)


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|") if text else ""


def _escape(comment: str) -> str:
    """Escape what Markdown would interpret in a comment."""
    return re.sub(r"([|<>*$\[\]])", r"\\\1", comment)


def write(path: Path, text: str) -> None:
    """Write a page unless it is unchanged, so that Sphinx reads it again only if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
