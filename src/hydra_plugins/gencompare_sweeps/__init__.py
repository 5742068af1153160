"""Sweepers and launchers, in the namespace where Hydra searches for plugins. They do not import torch."""
