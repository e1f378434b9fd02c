"""Flows as training leaves them, and what their files say."""

import numpy as np
from numpy.testing import assert_array_equal

import numpyro_flows.tree
from pyroflows_common import archive
from tests.specs.registry import case

SMALL = case("glow", 3, layers=2, hidden=(4,))


def used(wing, case, dtype="float64", base="logistic", seed=0):
    """A flow as training leaves it: weights moved, flags set, with a base of its own."""
    flow = wing.build(case, seed, dtype=dtype)
    state = wing.state(flow)
    state = {k: np.array(True) if k.endswith("initialized") else v for k, v in state.items()}
    return with_base(wing, wing.load(flow, state), base)


def with_base(wing, flow, base):
    if wing.name == "numpyro":
        return numpyro_flows.tree.replace(flow, base=base)
    flow.base = base
    return flow


def same(wing, one, other):
    """Assert that two flows of a wing are the same, to the last bit."""
    ours, theirs = wing.state(one), wing.state(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert_array_equal(value, theirs[name], err_msg=name)
    for attribute in ("base", "event_shape", "context_dim", "recipe"):
        assert getattr(one, attribute) == getattr(other, attribute)
    assert type(one) is type(other)


def about(path):
    return archive.read(path)[0]


def tampered(path, change):
    """Change what a file holds, with a checksum that is right."""
    about, arrays = archive.read(path)
    arrays = dict(arrays)
    change(about, arrays)
    archive.write(path, about, arrays)
