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
        network: a network of linear layers and convolutions.
        inputs: those of its layers whose number of inputs does not grow with the width.
        ratio: base width / width.
    """
    hidden = {
        name: each
        for name, each in network.named_modules()
        if isinstance(each, nn.Linear | nn.Conv2d) and each not in inputs
    }
    return {f"{name}.weight": ratio for name in hidden}


@torch.no_grad()
def rescale_inputs(inputs: Iterable[nn.Linear | nn.Conv2d], ratio: float) -> None:
    r"""Give the weights of input layers the variance that `xavier_uniform_` gives them at the base width:
    :math:`2 / (\text{fan in} + \text{ratio} \cdot \text{fan out})`.

    Args:
        inputs: layers whose number of outputs grows with the width, initialised by `xavier_uniform_`.
        ratio: base width / width.
    """
    for layer in inputs:
        taps = layer.weight[0, 0].numel()
        fan_in, fan_out = taps * layer.weight.shape[1], taps * layer.weight.shape[0]
        layer.weight *= ((fan_in + fan_out) / (fan_in + ratio * fan_out)) ** 0.5
