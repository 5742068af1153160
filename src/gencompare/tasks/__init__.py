"""Where configuration becomes objects: the only rooms that know Hydra. Nothing imports this package."""
