"""The mathematics of diffusion models, one concept a module. Torch only: no Lightning, no Hydra, no networks."""
