"""Overrides are quoted for Hydra and for a shell, whatever characters they contain."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from gencompare.command_line import quote, shell_override
from gencompare.tasks.runs.overrides import inherit_choices

ODD = [
    "it's a u? 50%", "a,b=[c]", "a\\b", "a\\", "a\\'b", "a\\\\", "${x}", "a\\${x}", "'q'", '"d"', "null", "True", "1e3",
    "12", "", " a ", "{x: 1}", "tab\tx", "süß", "#x", "nan",
]  # fmt: skip


@pytest.mark.parametrize("text", [*ODD, "runs/a_b-c.d", "../runs", "/tmp/x"])
def test_a_quoted_value_parses_to_its_text(text: str) -> None:
    override = OverridesParser.create().parse_override(f"key={quote(text)}")
    assert not override.is_sweep_override()
    cfg = OmegaConf.create({"x": "no"})
    OmegaConf.update(cfg, "key", override.value())
    assert cfg.key == text and isinstance(cfg.key, str)
    assert shlex.split(shell_override("key", text)) == [f"key={quote(text)}"]


def test_plain_text_is_not_quoted() -> None:
    assert [shell_override("ckpt_path", path) for path in ("runs/a_1.2-b", "/x/y")] == [
        "ckpt_path=runs/a_1.2-b",
        "ckpt_path=/x/y",
    ]


@pytest.mark.parametrize("name", [name for name in ODD if name.strip() and "/" not in name])
def test_a_run_folder_is_found_by_its_quoted_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    (Path(name) / "config.yaml").write_text("choices: {data: digits}\n")
    overrides = inherit_choices([f"run_dir={quote(name)}"])
    assert "data=digits" in overrides and f"hydra.run.dir={quote(name)}" in overrides
