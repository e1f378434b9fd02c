"""Storage: flow files that both wings read, and checkpoints of training."""

from pyroflows.storage.flow import load, save

__all__ = ["load", "save"]
