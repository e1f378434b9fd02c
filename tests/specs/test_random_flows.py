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
def test_flows(wing, case, seed):
    flow = wing.build(case, seed, noise=0.2)
    reference = case.reference(wing.state(flow))
    latents, context = case.latents(3, seed=seed), case.context(seed=seed)

    # Agreement with the papers
    there, ladj = wing.forward(flow, latents, context)
    back, inverse_ladj = wing.inverse(flow, there, context)
    for ours, theirs in [
        ((there, ladj), reference.forward(latents, context)),
        ((back, inverse_ladj), reference.inverse(there, context)),
    ]:
        for got, expected in zip(ours, theirs, strict=True):
            assert_allclose(got, expected, rtol=1e-8, atol=1e-8)

    # Round trips and log-determinants
    assert_allclose(back, latents, rtol=1e-7, atol=1e-7)
    assert_allclose(inverse_ladj, -ladj, rtol=1e-7, atol=1e-7)
    _, expected = np.linalg.slogdet(wing.jacobian(flow, latents, context))
    assert_allclose(ladj, expected, rtol=1e-7, atol=1e-7)

    # Densities
    sample, log_prob = wing.sample_and_log_prob(wing.density(flow, context=context), (3,))
    z, ladj = wing.inverse(flow, sample, context)
    expected = (-0.5 * z**2 - 0.5 * np.log(2 * np.pi)).sum(-1) + ladj
    assert_allclose(log_prob, expected, rtol=1e-7, atol=1e-7)
