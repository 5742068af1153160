"""Tasks, which build objects from the configuration: the only modules that use Hydra. No other package imports them."""
