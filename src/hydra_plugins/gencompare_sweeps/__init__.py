"""What Hydra finds of this project: its sweepers and launchers must lie in this namespace, and load without torch."""
