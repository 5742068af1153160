"""Tasks, which build objects from the config. Only these modules use Hydra, and no other package imports them."""
