"""Small flows and data, and what tests of `fit` ask of a result."""

import functools

import numpy as np
import pytest
from numpy.testing import assert_array_equal

GAUSSIAN = np.random.default_rng(0).normal([3.0, -1.0], [5.0, 0.1], size=(1000, 2))
SMALL = GAUSSIAN[:96].astype("float32")
# For tests that train too little to learn, or not at all.
UNHELPFUL = pytest.mark.filterwarnings("ignore:training did not help")
FAR = np.full((32, 2), 1e30, dtype="float32")  # finite, but its square is not


def fit(wing, flow, data, *, seed=0, **options):
    """Call a wing's `fit`, without a bar and with the wing's own kind of seed."""
    options = {"steps": 12, "batch_size": 32, "progress": False, **options}
    options.update({"key": wing.key(seed)} if wing.name == "numpyro" else {"seed": seed})
    return wing.package.fit(flow, data, **options)


def small(wing, name="realnvp", size=2, **options):
    """A flow that is trained in no time."""
    flow = wing.new(name, size, **{"layers": 2, "hidden": (8,), **options})
    return wing.cast(flow, "float32")


def loss(wing, flow, x, context=None):
    """The loss of a flow, computed by the user's own means."""
    density = wing.density(flow, context=context)
    return -wing.log_prob(density, x.astype("float32")).mean()


def same(wing, one, other):
    """Assert that two results are equal to the last bit."""
    for name in ("losses", "validation_losses", "validation_steps"):
        assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    for name in ("skipped", "best_step", "stopped"):
        assert getattr(one, name) == getattr(other, name), name
    theirs = wing.state(other.flow)
    for name, value in wing.state(one.flow).items():
        assert_array_equal(value, theirs[name], err_msg=name)


def unchanged(wing, flow, before, base="normal"):
    """Assert that a flow is as it was."""
    assert flow.base == base
    for name, value in wing.state(flow).items():
        assert_array_equal(value, before[name], err_msg=name)


def batches(count, size=32, seed=1):
    rows = np.random.default_rng(seed).normal(size=(count * size, 2)).astype("float32")
    return list(rows.reshape(count, size, 2))


def noisy(wing):
    """A function that adds uniform noise in [0, 1) to a batch."""
    if wing.name == "pyro":
        import torch

        return lambda x, generator: x + torch.rand(x.shape, generator=generator)
    import jax

    return lambda x, key: x + jax.random.uniform(key, x.shape)


def logit(wing):
    """A function that maps numbers between 0 and 1 to the real line, and 0 and 1 to infinity."""
    if wing.name == "pyro":
        return lambda x, generator: x.logit()
    import jax

    return lambda x, key: jax.scipy.special.logit(x)


@functools.cache  # NumPyro compiles a step anew for another optimiser
def plain_descent(wing, rate):
    """Stochastic gradient descent, as the wing's users pass an optimiser."""
    if wing.name == "pyro":
        import torch

        return lambda parameters: torch.optim.SGD(parameters, lr=rate)
    import optax

    return optax.sgd(rate)


def with_nan(rows):
    return with_number(rows, np.nan)


def with_number(rows, number):
    rows = rows.copy()
    rows[[4, 7], 1] = number
    return rows


class Dataset:
    """Rows, as PyTorch's are: with a length, and items by their numbers."""

    def __len__(self):
        return len(SMALL)

    def __getitem__(self, index):
        return SMALL[index]
