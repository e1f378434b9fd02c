"""Training by maximum likelihood."""

from pyroflows.training.fit import FitResult, fit

__all__ = ["FitResult", "fit"]
