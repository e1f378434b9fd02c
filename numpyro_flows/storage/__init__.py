"""Storage: flow files that both wings read, and checkpoints of training."""

from numpyro_flows.storage.flow import load, save

__all__ = ["load", "save"]
