"""Optimisers that torch does not provide."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from gencompare.errors import UserError
from gencompare.sharding import is_sharded

MIN_FEATURES = 8
"""Weights with fewer inputs or outputs than this read or write images, and are not hidden matrices."""


class Muon(torch.optim.Optimizer):
    r"""Muon for the weight matrices of hidden layers, and AdamW for all other parameters.

    The momentum :math:`M` of a matrix of shape (A, B) is replaced by the nearest semi-orthogonal matrix,

    .. math:: W \leftarrow (1 - \eta \lambda) W - 0.2 \, \eta \sqrt{\max(A, B)} \; U V^\top, \qquad M = U S V^\top,

    approximated by five Newton-Schulz iterations (`torch.optim.Muon`). The factor :math:`0.2 \sqrt{\max(A, B)}` gives
    updates the root mean square that AdamW's have, so that one learning rate :math:`\eta` and one weight decay
    :math:`\lambda` serve both. The kernel of a convolution is a matrix with a row per output channel. Biases,
    normalisations, and layers that read or write images (with fewer than `MIN_FEATURES` inputs or outputs) are left to
    AdamW.

    Jordan et al. (2024), "Muon: An optimizer for hidden layers in neural networks",
    https://kellerjordan.github.io/posts/muon; Liu et al. (2025), "Muon is scalable for LLM training", section 2.2,
    https://arxiv.org/abs/2502.16982.

    Args:
        params: parameters, or groups of them with settings.
        lr: learning rate of both.
        weight_decay: decoupled weight decay of both.
        momentum: of Muon, with Nesterov's correction.
        betas: of AdamW.
        eps: of AdamW.

    Raises:
        UserError: the installed torch has no Muon (before 2.9), or the weights are divided among processes.
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
            matrices = [as_matrix(p, p) for p in hidden]
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
                if stepped is not parameter:
                    stepped.data = as_matrix(parameter, parameter)
                    stepped.grad = None if parameter.grad is None else as_matrix(parameter.grad, parameter)
                if parameter in self.state:  # of the last step, or loaded from a checkpoint
                    optimizer.state[stepped] = self.state[parameter]
            optimizer.step()
            for parameter, stepped in pairs:
                self.state[parameter] = optimizer.state[stepped]
        return loss


def is_hidden_matrix(p: Tensor) -> bool:
    """Return whether a parameter is a matrix, or the kernel of a convolution, between hidden features."""
    return p.ndim >= 2 and min(p.shape[0], p.shape[1]) >= MIN_FEATURES


def as_matrix(value: Tensor, weight: Tensor) -> Tensor:
    """Reshape a weight, or its gradient, to a matrix with one row per output, sharing memory with the weight.

    The columns are in the order of the weight in memory, which may be channels_last. The order does not matter: a
    permutation of columns permutes the columns of the nearest semi-orthogonal matrix.
    """
    value = value.detach()
    if weight.is_contiguous():
        return value.flatten(1)
    return value.movedim(1, -1).flatten(1)
