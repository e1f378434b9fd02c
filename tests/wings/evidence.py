"""Models whose evidence is known, and exact draws of their posteriors in place of MCMC."""

import numpy as np
from scipy import stats

RNG = np.random.default_rng(0)
ROWS = np.stack([np.ones(12), RNG.normal(size=12)], 1)
RESPONSES = ROWS @ [1.0, -2.0] + 0.5 * RNG.normal(size=12)
# Priors of the regression: precision of the noise, and of the slopes in units of that.
SHAPE, RATE, WIDTH = 3.0, 1.0, 0.1


def regression(host, rows=ROWS):
    """Normal slopes and noise of unknown precision, and a site of which the data say nothing."""

    def model():
        precision = host.sample("precision", host.dist.Gamma(host.array(SHAPE), host.array(RATE)))
        deviation = precision**-0.5
        each = host.array(np.zeros(rows.shape[1])) + 0 * deviation[..., None]
        width = deviation[..., None] / WIDTH**0.5
        slopes = host.sample("slopes", host.dist.Normal(each, width).to_event(1))
        host.sample("share", host.dist.Dirichlet(host.array([4.0, 3.0, 5.0])))
        with host.plate("rows", len(rows)):
            loc = (host.array(rows) * slopes[..., None, :]).sum(-1)
            host.sample("y", host.dist.Normal(loc, deviation), obs=host.array(RESPONSES))

    return model


def evidence(rows=ROWS):
    """That of the regression: its data have a Student distribution."""
    scale = np.eye(len(rows)) + rows @ rows.T / WIDTH
    return stats.multivariate_t.logpdf(RESPONSES, shape=scale * RATE / SHAPE, df=2 * SHAPE)


def posterior(chains=2, draws=500, rows=ROWS, seed=0):
    """Draws of the regression's posterior, with autocorrelation, as MCMC would give them."""
    inverse = np.linalg.inv(WIDTH * np.eye(rows.shape[1]) + rows.T @ rows)
    mean = inverse @ rows.T @ RESPONSES
    shape = SHAPE + len(rows) / 2
    rate = RATE + (RESPONSES @ RESPONSES - mean @ np.linalg.inv(inverse) @ mean) / 2
    z = autocorrelated(chains, draws, rows.shape[1] + 4, seed=seed)
    uniform = stats.norm.cdf(z)
    precision = stats.gamma.ppf(uniform[..., 0], shape, scale=1 / rate)
    slopes = mean + z[..., 4:] @ np.linalg.cholesky(inverse).T / precision[..., None] ** 0.5
    parts = stats.gamma.ppf(uniform[..., 1:4], [4.0, 3.0, 5.0])
    share = parts / parts.sum(-1, keepdims=True)
    return {"precision": precision, "slopes": slopes, "share": share}


def autocorrelated(chains, draws, size, rho=0.5, seed=0):
    """Standard normal numbers, `(chains, draws, size)`, each chain autocorrelated."""
    z = np.random.default_rng(seed).normal(size=(chains, draws, size))
    for i in range(1, draws):
        z[:, i] = rho * z[:, i - 1] + (1 - rho**2) ** 0.5 * z[:, i]
    return z


def peaks(xp, x):
    """The log-density, up to its constant, of two modes far apart."""
    return xp.logaddexp(-0.5 * (x + 9) ** 2, -0.5 * (x - 9) ** 2).sum(-1)


def near(found, value, errors=4.0):
    """Whether an estimate is as near as it says, rounding apart."""
    return abs(found.value - value) < errors * found.error + 1e-4
