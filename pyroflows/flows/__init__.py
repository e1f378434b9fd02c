"""Flows: NICE, RealNVP and Glow from one call."""

from pyroflows.flows.builders import glow, nice, realnvp

__all__ = ["glow", "nice", "realnvp"]
