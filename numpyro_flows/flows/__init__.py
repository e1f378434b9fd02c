"""Flows: NICE, RealNVP and Glow from one call."""

from numpyro_flows.flows.builders import glow, nice, realnvp

__all__ = ["glow", "nice", "realnvp"]
