"""torch.compile: whether it can be used, and networks that are compiled within a block."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from gencompare.batch_splitting import replaced_forward
from gencompare.errors import UserError
from gencompare.private_apis import allow_compiled_variants

BACKEND = "inductor"
"""Backend of ``torch.compile``."""
COMPILERS = ("g++", "clang++", "c++", "gcc", "clang", "cc", "cl")


def has_compiler() -> bool:
    """Return whether there is a C++ compiler, which ``torch.compile`` needs."""
    return any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", *COMPILERS))


def check_compiler(setting: str, instead: str) -> None:
    """Raise `UserError` if there is no C++ compiler, which ``setting`` needs."""
    if not has_compiler():
        raise UserError(f"{setting} needs a C++ compiler, such as g++: install one, or use {instead}.")


def compile_in_place(module: nn.Module, mode: str) -> None:
    """Compile later calls of ``module`` in a mode of ``torch.compile``, with its hooks. Names of weights stay."""
    module.compile(mode=mode, backend=BACKEND)


@contextmanager
def compiled(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Compile the method ``forward`` of ``networks`` in the block; the first call of each takes longer.

    Hooks of the networks run in Python. Outputs change only by rounding.

    Raises:
        UserError: there is no C++ compiler.
    """
    check_compiler("evaluation.protocol.compile=true", "false")
    networks = list(networks)
    with (
        allow_compiled_variants(len(networks)),
        replaced_forward(networks, lambda forward: torch.compile(forward, backend=BACKEND)),
    ):
        yield
