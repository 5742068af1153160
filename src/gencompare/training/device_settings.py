"""A callback for settings of the device that make training steps faster."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback
from torch import nn

from gencompare.compilation import compile_in_place
from gencompare.generative_model import TrainedModel
from gencompare.private_apis import allow_compiled_variants, remove_compiled_call
from gencompare.training.clock import TrainingFlops


class DeviceSettings(Callback):
    """Applies the settings of ``cfg.trainer`` that trade rounding for speed to training steps, and to nothing else.

    Evaluations, during and after training, compute as if nothing was set, so the same weights give the same metrics
    with any trainer. (The weights keep their memory format in evaluations *during* training.)

    The blocks of the network are compiled in place, so the names of weights stay. Steps whose FLOPs are counted run
    eagerly, since compiled code hides its operations from `FlopCounter`. The first compiled step takes longer, which
    counts as training time.

    Args:
        matmul_precision: precision of float32 matrix products, see `torch.set_float32_matmul_precision`.
        compile_mode: mode of ``torch.compile`` for `TrainedModel.blocks`; None runs them eagerly.
        memory_format: ``channels_last`` for the layout (n, H, W, C) of weights and features; None for (n, C, H, W).
    """

    order = 2
    """After `TrainingFlops`, which has the same order and is listed first, and before all that reads the weights."""

    def __init__(
        self, *, matmul_precision: str = "highest", compile_mode: str | None = None, memory_format: str | None = None
    ) -> None:
        self.matmul_precision, self.compile_mode, self.memory_format = matmul_precision, compile_mode, memory_format
        self._blocks: list[nn.Module] = []
        self._limits = ExitStack()
        self._start: float | None = None
        """When the first compiled step started."""
        self._compiled = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, TrainedModel)
        if self.memory_format is not None:
            pl_module.to(memory_format=getattr(torch, self.memory_format))
        if self.compile_mode is not None:
            self._blocks, self._compiled = pl_module.blocks(), False
            self._limits.enter_context(allow_compiled_variants(len(self._blocks)))
            for block in self._blocks:
                compile_in_place(block, self.compile_mode)
            torch.compiler.set_stance("force_eager")

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, i: int) -> None:
        torch.set_float32_matmul_precision(self.matmul_precision)
        counting = any(each.is_counting for each in trainer.callbacks if isinstance(each, TrainingFlops))  # type: ignore[attr-defined]
        if not self._blocks or counting:
            return
        if not self._compiled:
            self._start = time.monotonic()
            if trainer.is_global_zero:
                print("Compiling the blocks of the network (trainer.compile); this step takes longer.", flush=True)
        torch.compiler.set_stance("default")
        torch.compiler.cudagraph_mark_step_begin()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._end_step()
        if self._start is not None:
            if trainer.is_global_zero:
                seconds = time.monotonic() - self._start
                print(f"Compiled; the step took {seconds:.0f} s, which count as training time.", flush=True)
            self._compiled, self._start = True, None

    def _end_step(self) -> None:
        torch.set_float32_matmul_precision("highest")
        if self._blocks:
            torch.compiler.set_stance("force_eager")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._end_step()
        if self.memory_format is not None:
            pl_module.to(memory_format=torch.contiguous_format)
        for block in self._blocks:
            remove_compiled_call(block)
        if self._blocks:
            torch.compiler.set_stance("default")
        self._blocks = []
        self._limits.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")
