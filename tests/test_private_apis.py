"""The private APIs of Lightning, Hydra and torch in `gencompare.private_apis` still work as expected."""

from __future__ import annotations

import ast
import os
import re
import signal
import threading
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies.launchers import subprocess_script
from torch import nn

from gencompare import private_apis
from gencompare.private_apis import MovesOtherModules, allow_compiled_variants, basic_sweeper, rank_command

PRIVATE = re.compile(
    r"from (pytorch_lightning|hydra|omegaconf|torch|torchmetrics|wandb)\S*\._|torch\._|\b(pl|nn|hydra)\._"
)


class Follower(MovesOtherModules, nn.Module):
    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.layer, self.others = nn.Linear(2, 2), (other,)

    def other_modules(self) -> tuple[nn.Module, ...]:
        return self.others


@pytest.mark.parametrize("move", ["double", "half", "to"])
def test_other_modules_move_with_a_module(move: str) -> None:
    other = nn.Linear(3, 3)
    module = Follower(other)
    getattr(module, move)(*([torch.bfloat16] if move == "to" else []))
    assert other.weight.dtype == module.layer.weight.dtype != torch.float32
    assert len(list(module.parameters())) == 2, "they are not submodules"


def test_modules_of_a_class_are_all_compiled() -> None:
    """More modules than `torch` compiles variants of one function by default."""
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    layers = [nn.Linear(size, 1) for size in range(2, 14)]
    functions = [torch.compile(layer.forward, backend=backend) for layer in layers]
    with allow_compiled_variants(len(layers)):
        for layer, function in zip(layers, functions, strict=True):
            function(torch.ones(1, layer.in_features))
    assert graphs == len(layers)


def test_lightning_starts_other_ranks_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """If Hydra is initialised, Lightning would start a command of its own, which `rank_command` replaces."""
    popen = Mock()
    monkeypatch.setattr(subprocess_script.subprocess, "Popen", popen)
    monkeypatch.setattr("hydra.core.hydra_config.HydraConfig.initialized", lambda: True)
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "0")
    launcher = subprocess_script._SubprocessScriptLauncher(LightningEnvironment(), num_processes=2, num_nodes=1)
    with rank_command(["python", "job"], str(tmp_path)):
        launcher._call_children_scripts()
    (call,) = popen.call_args_list
    assert call.args == (["python", "job"],) and call.kwargs["cwd"] == str(tmp_path)


def test_the_first_process_has_time_to_end_after_a_rank_died(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    events: list[Any] = []
    rank = Mock(returncode=1)
    rank.send_signal.side_effect = lambda number: events.append("rank")
    monkeypatch.setattr(private_apis, "GRACE_SECONDS", 7.0)
    monkeypatch.setattr("time.sleep", events.append)
    monkeypatch.setattr(threading.Event, "wait", lambda event, seconds: events.append(seconds))
    monkeypatch.setattr(private_apis.os, "kill", lambda pid, number: events.append((pid, number)))
    monkeypatch.setattr(threading.Thread, "start", lambda thread: thread.run())
    launcher = subprocess_script._SubprocessScriptLauncher(LightningEnvironment(), num_processes=2, num_nodes=1)
    monkeypatch.setattr(launcher, "_call_children_scripts", lambda: launcher.procs.append(rank))
    with rank_command(["python", "job"], str(tmp_path)):
        launcher.launch(lambda: None, trainer=None)
    poll, *ending = events
    assert poll == 1 and ending == [7.0, "rank", (os.getpid(), signal.SIGKILL)]


def test_the_basic_sweeper_expands_overrides() -> None:
    overrides = OverridesParser.create().parse_overrides(["model=vae,gan", "seed=0"])
    assert basic_sweeper().split_arguments(overrides, None) == [[["model=vae", "seed=0"], ["model=gan", "seed=0"]]]


def test_no_other_file_uses_a_private_api() -> None:
    """Only code is checked; strings and comments may name private APIs."""
    for path in sorted((Path(__file__).parents[1] / "src").rglob("*.py")):
        code = ast.unparse(ast.parse(path.read_text()))
        if path.name != "private_apis.py":
            assert not PRIVATE.search(code), path
