"""Sweepers and launchers in the namespace in which Hydra searches for plugins. They are imported without torch."""
