"""Guides: flows as variational posteriors, their training and the verdict on them."""

from numpyro_flows.guides.arviz import to_arviz
from numpyro_flows.guides.autoflow import AutoFlow
from numpyro_flows.guides.couplings import AutoGlow, AutoNICE, AutoRealNVP
from numpyro_flows.guides.evidence import log_evidence
from numpyro_flows.guides.fit import GuideFitResult, fit_guide
from numpyro_flows.guides.modes import MixtureFitResult, fit_mixture
from numpyro_flows.guides.neutra import NeuTraResult, sample_neutra
from numpyro_flows.guides.prior import fit_prior

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
