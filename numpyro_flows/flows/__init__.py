"""Flows: NICE, RealNVP and Glow, each built by one call."""

from numpyro_flows.flows.builders import glow, nice, realnvp

__all__ = ["glow", "nice", "realnvp"]
