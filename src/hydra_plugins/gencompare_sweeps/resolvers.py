"""A resolver for settings that depend on the machine."""

from __future__ import annotations

from omegaconf import OmegaConf

BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "sve_bf16")


def cpu_precision() -> str:
    """Return bf16-mixed if the CPU has instructions for bfloat16, else 32-true: the precision of ``trainer=cpu``."""
    import torch  # slow to import

    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # missing in earlier versions of torch
    return "bf16-mixed" if any(capabilities.get(name) for name in BFLOAT16_INSTRUCTIONS) else "32-true"


OmegaConf.register_new_resolver(cpu_precision.__name__, cpu_precision, replace=True)
