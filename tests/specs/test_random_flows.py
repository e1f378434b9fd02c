"""The main laws on flows that hypothesis draws: sizes, depths, arguments, seeds."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from tests.specs.registry import case


@st.composite
def flows(draw):
    """A builder's call: D, depth and every option."""
    name = draw(st.sampled_from(["nice", "realnvp", "glow"]))
    size = draw(st.integers(2, 6))
    masks = st.lists(st.booleans(), min_size=size, max_size=size).filter(
        lambda m: 0 < sum(m) < size
    )
    layers = draw(st.integers(1, 5))
    options = {
        "layers": layers,
        "hidden": tuple(draw(st.lists(st.integers(1, 9), max_size=2))),
        "activation": draw(st.sampled_from(["relu", "silu", "gelu", "elu", "tanh"])),
        "partition": draw(st.sampled_from(["halves", "alternating"]) | masks.map(tuple)),
        "context_dim": draw(st.sampled_from([0, 0, 1, 3])),
        "robust": draw(st.booleans()),
    }
    if name != "nice":
        options["scale"] = draw(st.sampled_from(["tanh", "sigmoid", "clamp", "exp"]))
    if name == "realnvp":
        options["batch_norm"] = draw(st.booleans())
    return case(name, size, **options)


@given(case=flows(), seed=st.integers(0, 2**16))
def test_agreement_with_the_papers(wing, case, seed):
    flow = wing.build(case, seed, noise=0.2)
    reference = case.reference(wing.state(flow))
    context = case.context(5, seed=seed)
    for ours, theirs, points in [
        (wing.forward, reference.forward, case.latents(5, seed=seed)),
        (wing.inverse, reference.inverse, case.points(5, seed=seed)),
    ]:
        for got, expected in zip(ours(flow, points, context), theirs(points, context), strict=True):
            assert_allclose(got, expected, rtol=1e-8, atol=1e-8)


@given(case=flows(), seed=st.integers(0, 2**16))
def test_round_trips_and_log_determinants(wing, case, seed):
    flow = wing.build(case, seed, noise=0.2)
    points, context = case.latents(2, seed=seed), case.context(seed=seed)
    there, ladj = wing.forward(flow, points, context)
    back, inverse_ladj = wing.inverse(flow, there, context)
    assert_allclose(back, points, rtol=1e-7, atol=1e-7)
    assert_allclose(inverse_ladj, -ladj, rtol=1e-7, atol=1e-7)
    _, expected = np.linalg.slogdet(wing.jacobian(flow, points, context=context))
    assert_allclose(ladj, expected, rtol=1e-7, atol=1e-7)


@given(case=flows(), seed=st.integers(0, 2**16), data=st.data())
def test_batches_and_densities(wing, case, seed, data):
    batch = tuple(data.draw(st.lists(st.integers(1, 3), max_size=2)))
    flow = wing.build(case, seed, noise=0.2)
    context = case.context(*batch, seed=seed)
    density = wing.density(flow, context=context)
    sample, log_prob = wing.sample_and_log_prob(density, () if case.context_dim else batch)
    assert sample.shape == (*batch, *case.shape)
    z, ladj = wing.inverse(flow, sample, context)
    expected = (-0.5 * z**2 - 0.5 * np.log(2 * np.pi)).sum(-1) + ladj
    assert_allclose(log_prob, expected, rtol=1e-7, atol=1e-7)
