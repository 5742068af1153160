"""Optimisers that torch does not provide."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from gencompare.errors import UserError
from gencompare.sharding import is_sharded

MIN_FEATURES = 16
"""Weights with fewer inputs or outputs than this usually read or write images, and are not treated as hidden."""


class Muon(torch.optim.Optimizer):
    r"""Muon for the weight matrices of hidden layers, and AdamW for all other parameters.

    The momentum :math:`M` of a matrix of shape (A, B) is replaced by the nearest semi-orthogonal matrix,

    .. math:: W \leftarrow (1 - \eta \lambda) W - 0.2 \, \eta \sqrt{\max(A, B)} \; U V^\top, \qquad M = U S V^\top,

    approximated by five Newton-Schulz iterations (`torch.optim.Muon`). The factor :math:`0.2 \sqrt{\max(A, B)}` gives
    updates the root mean square that AdamW's have, so that one learning rate :math:`\eta` and one weight decay
    :math:`\lambda` serve both. The kernel of a convolution is a matrix with a row per output channel (per input channel
    if it is transposed). Biases, normalisations, and weights with fewer than `MIN_FEATURES` inputs or outputs, such as
    those that read or write images and the embeddings of a few classes, are left to AdamW.

    Jordan et al. (2024), "Muon: An optimizer for hidden layers in neural networks",
    https://kellerjordan.github.io/posts/muon; Liu et al. (2025), "Muon is scalable for LLM training", section 2.2,
    https://arxiv.org/abs/2502.16982.

    Args:
        params: parameters, not groups of them.
        lr: learning rate of both.
        weight_decay: decoupled weight decay of both.
        momentum: of Muon, with Nesterov's correction.
        betas: of AdamW.
        eps: of AdamW.

    Raises:
        UserError: the installed torch has no Muon (before 2.9), the weights are divided among processes, or there are
            groups of parameters.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise UserError(
                f"model.optimizer: Muon needs torch 2.9 or later, not {version('torch')}: upgrade torch, or use"
                " torch.optim.AdamW."
            )
        parameters = list(params)
        if any(isinstance(p, dict) for p in parameters):
            raise UserError("model.optimizer: Muon takes no groups of parameters: use torch.optim.AdamW.")
        if any(is_sharded(p) for p in parameters):
            raise UserError(
                "model.optimizer: Muon needs whole weight matrices, which trainer=fsdp divides among processes: use"
                " torch.optim.AdamW or trainer=ddp."
            )
        hidden = [p for p in parameters if is_hidden_matrix(p)]
        others = [p for p in parameters if not is_hidden_matrix(p)]
        common: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        self._optimizers: list[torch.optim.Optimizer] = []
        if hidden:  # torch's optimisers accept no empty list
            matrices = [p.detach().flatten(1) for p in hidden]
            muon = torch.optim.Muon(matrices, momentum=momentum, adjust_lr_fn="match_rms_adamw", **common)
            self._optimizers.append(muon)
        if others:
            self._optimizers.append(torch.optim.AdamW(others, betas=(betas[0], betas[1]), eps=eps, **common))
        groups = [{**optimizer.param_groups[0]} for optimizer in self._optimizers]
        if hidden:
            groups[0]["params"] = hidden
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update the parameters; ``closure`` computes the loss again, as for any optimiser of torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer, group in zip(self._optimizers, self.param_groups, strict=True):
            own = optimizer.param_groups[0]
            own.update({name: value for name, value in group.items() if name != "params"})
            pairs = list(zip(group["params"], own["params"], strict=True))
            for parameter, stepped in pairs:
                if stepped is not parameter:  # a matrix, which shares memory with a contiguous weight
                    stepped.data = parameter.detach().flatten(1)
                    stepped.grad = None if parameter.grad is None else parameter.grad.flatten(1)
                if parameter in self.state:  # of the last step, or loaded from a checkpoint
                    optimizer.state[stepped] = self.state[parameter]
            optimizer.step()
            for parameter, stepped in pairs:
                self.state[parameter] = optimizer.state[stepped]
                if stepped.data_ptr() != parameter.data_ptr():  # in channels_last, the matrix is a copy
                    parameter.copy_(stepped.view_as(parameter))
        return loss


def is_hidden_matrix(p: Tensor) -> bool:
    """Return whether a parameter is a matrix, or the kernel of a convolution, between hidden features."""
    return p.ndim >= 2 and min(p.shape[0], p.shape[1]) >= MIN_FEATURES


@torch.no_grad()
def match_memory_format(optimizer: torch.optim.Optimizer) -> None:
    """Give the state of an optimiser the memory format of its parameters, which may differ after resuming.

    The fused kernels of torch read parameter, gradient and state in the order of memory, and do not check it.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            same_shape = isinstance(value, Tensor) and value.shape == parameter.shape and not is_sharded(value)
            if same_shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
