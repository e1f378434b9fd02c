"""Guides: flows as variational posteriors, their training and the verdict on them."""

from pyroflows.guides.arviz import to_arviz
from pyroflows.guides.autoflow import AutoFlow
from pyroflows.guides.couplings import AutoGlow, AutoNICE, AutoRealNVP
from pyroflows.guides.evidence import log_evidence
from pyroflows.guides.fit import GuideFitResult, fit_guide
from pyroflows.guides.modes import MixtureFitResult, fit_mixture
from pyroflows.guides.neutra import NeuTraResult, sample_neutra
from pyroflows.guides.prior import fit_prior

__all__ = [
    "AutoFlow",
    "AutoGlow",
    "AutoNICE",
    "AutoRealNVP",
    "GuideFitResult",
    "MixtureFitResult",
    "NeuTraResult",
    "fit_guide",
    "fit_mixture",
    "fit_prior",
    "log_evidence",
    "sample_neutra",
    "to_arviz",
]
