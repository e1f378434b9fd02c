"""One small adapter a wing: arrays in, arrays out, so that a law is written once for both."""

import importlib.util

from tests.wings.pyro_wing import PyroWing

WINGS = [PyroWing()]
if getattr(importlib.util.find_spec("numpyro_flows"), "origin", None):
    from tests.wings.numpyro_wing import NumPyroWing

    WINGS.append(NumPyroWing())

__all__ = ["WINGS"]
