"""What the papers say, in float64 NumPy: written from their equations, not from the wings."""

from tests.reference.densities import log_density, logistic, normal
from tests.reference.flows import build

__all__ = ["build", "log_density", "logistic", "normal"]
