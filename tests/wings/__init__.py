"""One small adapter a wing: arrays in, arrays out, so that a law is written once for both."""

from tests.wings.numpyro_wing import NumPyroWing
from tests.wings.pyro_wing import PyroWing

WINGS = [PyroWing(), NumPyroWing()]

__all__ = ["WINGS"]
