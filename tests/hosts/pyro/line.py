"""A line through five points, whose posterior is known, and small guides for it."""

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import (
    SVI,
    Trace_ELBO,
)
from scipy import stats

from pyroflows import AutoFlow, AutoRealNVP, nice

SMALL = {"layers": 2, "hidden": (4,)}

# A line through five points: posterior and evidence are known.
TIMES = np.linspace(-1.0, 1.0, 5)
Y = np.array([4.1, 5.2, 4.9, 5.3, 6.4])
NOISE = 0.5
DESIGN = np.stack([np.ones(5), TIMES], -1)
COVARIANCE = np.linalg.inv(np.eye(2) / 100.0 + DESIGN.T @ DESIGN / NOISE**2)
MEAN = COVARIANCE @ DESIGN.T @ Y / NOISE**2
SCALE = np.sqrt(np.diag(COVARIANCE))
EVIDENCE = stats.multivariate_normal.logpdf(Y, cov=100 * DESIGN @ DESIGN.T + NOISE**2 * np.eye(5))

DATA = torch.as_tensor(Y)


def line(y=DATA):
    zero = torch.zeros((), dtype=torch.float64)
    level = pyro.sample("level", dist.Normal(zero, 10.0))
    slope = pyro.sample("slope", dist.Normal(zero, 10.0))
    with pyro.plate("times", 5):
        trend = level + slope * torch.as_tensor(TIMES)
        return pyro.sample("y", dist.Normal(trend, NOISE), obs=y)


def straight(size):
    """A flow that is the identity at its start, exactly."""
    return nice(size, layers=2, hidden=(4,), init_scale=0.0)


def exact():
    """A guide that is the posterior of the line."""
    guide = AutoFlow(line, straight, degrees_of_freedom=None)
    guide()
    return guide


def small(model=line, make=AutoRealNVP, **options):
    return make(model, **{**SMALL, **options})


def learn(guide, model=line, steps=3, loss=None):
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 1e-2}), loss or Trace_ELBO())
    return [svi.step() for _ in range(steps)]


def drawn(guide, seed=0):
    """A draw of all sites."""
    pyro.set_rng_seed(seed)
    with torch.no_grad():
        return guide()
