r"""Maximal update parametrisation (muP): the learning rate that is best for a narrow network is best for a wide one.

With a base width b and a width w, and Adam or AdamW (Yang et al. 2022, "Tensor Programs V: tuning large neural networks
via zero-shot hyperparameter transfer", table 3 and appendix B, https://arxiv.org/abs/2203.03466):

============================================  ========================  ===========================
weights                                       learning rate             variance at initialisation
============================================  ========================  ===========================
input: the number of inputs is fixed          lr                        that of the base width
hidden and output: w inputs                   :math:`\text{lr} \, b/w`  :math:`\propto 1/w`, or zero
biases and embeddings                         lr                        that of the base width
============================================  ========================  ===========================

A network of the base width is not changed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import nn


def lr_factors(network: nn.Module, inputs: Collection[nn.Module], ratio: float) -> dict[str, float]:
    """Return the factor of the learning rate for each hidden and output weight, by name.

    Args:
        network: a network of linear layers.
        inputs: those of its layers whose number of inputs does not grow with the width.
        ratio: base width / width.
    """
    hidden = {
        name: each for name, each in network.named_modules() if isinstance(each, nn.Linear) and each not in inputs
    }
    return {f"{name}.weight": ratio for name in hidden}


@torch.no_grad()
def rescale_inputs(inputs: Iterable[nn.Linear], width: int, base_width: int) -> None:
    """Give the weights of input layers of ``width`` outputs the variance that `xavier_uniform_` gives them at the base
    width: 2 / (inputs + base width)."""
    for layer in inputs:
        layer.weight *= ((layer.in_features + width) / (layer.in_features + base_width)) ** 0.5
