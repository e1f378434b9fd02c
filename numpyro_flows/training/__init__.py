"""Training by maximum likelihood."""

from numpyro_flows.training.fit import FitResult, fit

__all__ = ["FitResult", "fit"]
