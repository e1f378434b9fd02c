"""Posteriors of known density, for guides: the log ratio is zero where a guide is exact."""

import numpy as np
from scipy import stats


def log_ratio(fitted, log_density):
    """The log-density of a target over that of a guide, at the guide's draws."""
    x, log_q = fitted.draws()
    return log_density(np, x) - log_q


LOC = np.array([500.0, -20.0, 3e6])
SCALES = np.array([1e-3, 1.0, 1e4])
CORRELATION = np.array([[1.0, 0.9, -0.3], [0.9, 1.0, 0.1], [-0.3, 0.1, 1.0]])


def correlated(host):
    """A Gaussian far away, on scales from 1e-3 to 1e4."""
    cholesky = host.array(SCALES[:, None] * np.linalg.cholesky(CORRELATION))

    def model():
        host.sample("x", host.dist.MultivariateNormal(host.array(LOC), scale_tril=cholesky))

    return model


def log_correlated(xp, x):
    z = (x - LOC) / SCALES
    return stats.multivariate_normal(np.zeros(3), CORRELATION).logpdf(z) - np.log(SCALES).sum()


def log_normal(xp, x, loc, scale):
    scale = scale + 0 * x  # an array of the same kind
    return -0.5 * ((x - loc) / scale) ** 2 - xp.log(scale) - 0.5 * np.log(2 * np.pi)


def banana(xp, x):
    bent = log_normal(xp, x[..., 1], x[..., 0] ** 2, 0.1)
    return log_normal(xp, x[..., 0], 0.0, 1.0) + bent + log_normal(xp, x[..., 2], 0.0, 1.0)


def funnel(xp, x):
    width = xp.exp(x[..., 0] / 2)
    narrow = log_normal(xp, x[..., 1], 0.0, width) + log_normal(xp, x[..., 2], 0.0, width)
    return log_normal(xp, x[..., 0], 0.0, 3.0) + narrow
