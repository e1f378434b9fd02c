"""A model whose posterior and evidence are known, and densities weighed against it."""

import numpy as np
from scipy import stats

Y = np.array([0.3, 1.9, 1.1, -0.4, 2.0])
PRECISION = 1.0 + len(Y)
MEAN, SCALE = Y.sum() / PRECISION, PRECISION**-0.5
EVIDENCE = stats.multivariate_normal.logpdf(Y, cov=np.eye(len(Y)) + 1.0)


def conjugate(host):
    """A mean with a standard normal prior: posterior and evidence are known."""

    def model(y):
        mean = host.sample("mean", host.dist.Normal(host.array(0.0), host.array(1.0)))
        host.deterministic("twice", 2 * mean)
        with host.plate("people", len(y)):
            host.sample("y", host.dist.Normal(mean, 1.0), obs=y)

    return model


def normal(host, loc, scale):
    return host.dist.Normal(host.array(loc), host.array(scale))


def weighed(host, loc, scale, **options):
    """The conjugate model's draws from a normal density."""
    args = (host.array(Y),)
    return host.to_arviz(normal(host, loc, scale), conjugate(host), args=args, **options)


def only(data, group, name):
    """The draws of one variable."""
    array = np.asarray(data[group][name])
    assert array.shape[0] == 1
    return array[0]


def by_hand(host, loc=0.1, scale=0.3):
    def guide(*args, **kwargs):
        host.sample("mean", normal(host, loc, scale))

    return guide
