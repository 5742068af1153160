"""The FID network with random weights, for parity and speed tests without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn


def save_random_inception(path: Path) -> Path:
    """Write random weights of ``inception-v3-compat`` that let activations neither vanish nor explode."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.save({}, path)
    torch.manual_seed(0)
    with patch.object(FeatureExtractorInceptionV3, "load_state_dict", lambda *args: None):
        net: Any = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(path))
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
            nn.init.uniform_(module.weight, 0.7, 1.0)
            nn.init.normal_(module.bias, 0, 0.1)
    torch.save(net.state_dict(), path)
    return path
