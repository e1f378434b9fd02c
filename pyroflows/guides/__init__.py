"""Guides: flows as variational posteriors, their training and the verdict on them."""

from pyroflows.guides.arviz import to_arviz
from pyroflows.guides.autoflow import AutoFlow
from pyroflows.guides.couplings import AutoGlow, AutoNICE, AutoRealNVP
from pyroflows.guides.fit import GuideFitResult, fit_guide

__all__ = [
    "AutoFlow",
    "AutoGlow",
    "AutoNICE",
    "AutoRealNVP",
    "GuideFitResult",
    "fit_guide",
    "to_arviz",
]
