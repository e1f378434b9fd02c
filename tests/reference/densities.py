"""Base densities and the change of variables (NICE, equations 2 and 3)."""

import numpy as np


def normal(z, scale=1.0):
    """Log-density of independent normals."""
    return (-0.5 * (z / scale) ** 2 - np.log(scale) - 0.5 * np.log(2 * np.pi)).sum(-1)


def logistic(z, scale=1.0):
    """Log-density of independent logistics (NICE, section 3.4)."""
    z = z / scale
    return (-np.logaddexp(0, z) - np.logaddexp(0, -z) - np.log(scale)).sum(-1)


def log_density(flow, x, base=normal, context=None):
    """Log-density of data under a reference flow."""
    z, ladj = flow.inverse(x, context)
    return base(z) + ladj
