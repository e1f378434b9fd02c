"""One small adapter a wing: arrays in, arrays out, so that a law is written once for both.

A wing whose host is not installed has none: `.ci/one_wing.py` runs the laws of the other.
"""

from importlib.util import find_spec

WINGS = []
if find_spec("pyro"):
    from tests.wings.pyro_wing import PyroWing

    WINGS.append(PyroWing())
if find_spec("numpyro"):
    from tests.wings.numpyro_wing import NumPyroWing

    WINGS.append(NumPyroWing())

__all__ = ["WINGS"]
