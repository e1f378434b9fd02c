"""Laws on what flows are put into: other bases, and contexts that are already given."""

import jax
import numpy as np
import numpyro.distributions
import pyro.distributions
import pytest
import torch

import numpyro_flows
import pyroflows


@pytest.mark.parametrize("wing", ["pyro", "numpyro"])
def test_a_base_with_more_event_dimensions(wing):
    """A density of several events at once agrees with the host's."""
    z = np.random.default_rng(0).normal(size=(5, 2))
    if wing == "pyro":
        flow = pyroflows.realnvp(2, init_scale=0.3).double()
        base = pyro.distributions.Normal(torch.zeros(5, 2).double(), 1.0).to_event(2)
        host = pyro.distributions.TransformedDistribution(base, [flow])
        x = torch.from_numpy(z)
        ours, theirs = pyroflows.flow_distribution(flow, base).log_prob(x), host.log_prob(x)
        ours, theirs = ours.detach().numpy(), theirs.detach().numpy()
    else:
        flow = numpyro_flows.realnvp(2, init_scale=0.3, key=jax.random.key(0))
        base = numpyro.distributions.Normal(np.zeros((5, 2)), 1.0).to_event(2)
        host = numpyro.distributions.TransformedDistribution(base, [flow])
        ours, theirs = numpyro_flows.flow_distribution(flow, base).log_prob(z), host.log_prob(z)
    assert np.shape(ours) == np.shape(theirs) == ()
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize("wing", ["pyro", "numpyro"])
def test_a_base_that_is_a_flow_itself(wing):
    """Two flows in one distribution, or in two: the same density."""
    x = np.random.default_rng(0).normal(size=(4, 2))
    if wing == "pyro":
        flows = [pyroflows.glow(2, layers=2, init_scale=0.3).double() for _ in range(2)]
        inner = pyroflows.flow_distribution(flows[0])
        nested = pyroflows.flow_distribution(flows[1], inner).log_prob(torch.from_numpy(x))
        joint = pyroflows.flow_distribution(pyroflows.Chain(flows)).log_prob(torch.from_numpy(x))
        nested, joint = nested.detach().numpy(), joint.detach().numpy()
    else:
        keys = jax.random.split(jax.random.key(0))
        flows = [numpyro_flows.glow(2, layers=2, init_scale=0.3, key=key) for key in keys]
        inner = numpyro_flows.flow_distribution(flows[0])
        density = numpyro_flows.flow_distribution(flows[1], inner)
        nested, joint = (
            density.log_prob(x),
            numpyro_flows.flow_distribution(numpyro_flows.Chain(flows)).log_prob(x),
        )
        sample, parts = density.sample_with_intermediates(jax.random.key(1), (3,))
        np.testing.assert_allclose(
            density.log_prob(sample, parts), density.log_prob(sample), rtol=1e-4
        )
    np.testing.assert_allclose(nested, joint, rtol=1e-4)


@pytest.mark.parametrize("wing", ["pyro", "numpyro"])
def test_a_context_within_a_chain_is_state(wing):
    """It has the same name in both wings, and is not trained."""
    if wing == "pyro":
        inner = pyroflows.realnvp(2, layers=2, context_dim=1).condition(torch.ones(1))
        flow = pyroflows.Chain([inner, pyroflows.DiagonalScaling(2)])
        trained, state = dict(flow.named_parameters()), flow.state_dict()
    else:
        inner = numpyro_flows.realnvp(2, layers=2, context_dim=1, key=jax.random.key(0))
        inner = inner.condition(jax.numpy.ones(1))
        flow = numpyro_flows.Chain([inner, numpyro_flows.DiagonalScaling(2)])
        state = flow.state_dict()
        marks = numpyro_flows.tree.trainable(flow)
        trained = {} if not marks.layers[0].context else {"layers.0.context"}
    assert "layers.0.context" in state
    assert "layers.0.context" not in trained


@pytest.mark.parametrize("wing", ["pyro", "numpyro"])
def test_a_conditioned_flow_is_initialised(wing):
    """`initialize` reaches the layers behind a context."""
    rng = np.random.default_rng(0)
    x, context = 3.0 + rng.normal(size=(50, 2)), rng.normal(size=3)
    if wing == "pyro":
        flow = pyroflows.glow(2, layers=2, context_dim=3).double()
        plain = flow.condition(torch.from_numpy(context))
        plain.initialize(torch.from_numpy(x))
        encoded = plain.inv(torch.from_numpy(x)).detach().numpy()
        flags = [v for k, v in flow.state_dict().items() if k.endswith("initialized")]
    else:
        flow = numpyro_flows.glow(2, layers=2, context_dim=3, key=jax.random.key(0))
        plain = flow.condition(jax.numpy.asarray(context)).initialize(jax.numpy.asarray(x))
        encoded = np.asarray(plain.inv(jax.numpy.asarray(x)))
        flags = [v for k, v in plain.state_dict().items() if k.endswith("initialized")]
    assert flags
    assert all(bool(flag) for flag in flags)
    assert np.abs(encoded.mean(0)).max() < 1.0


@pytest.mark.parametrize("wing", ["pyro", "numpyro"])
def test_a_network_of_ones_own_sees_the_context(wing):
    """A plain network of the host takes part a and the context in one."""
    context = np.array([[0.0], [1.0]])
    if wing == "pyro":
        flow = pyroflows.realnvp(4, layers=2, context_dim=1, network=torch.nn.Linear).double()
        density = pyroflows.flow_distribution(flow, context=torch.from_numpy(context))
        values = density.log_prob(torch.ones(4).double()).detach().numpy()
    else:

        def network(inputs, outputs, key):
            return numpyro_flows.DenseNet(inputs, outputs, (), init_scale=1.0, key=key)

        flow = numpyro_flows.realnvp(
            4, layers=2, context_dim=1, network=network, key=jax.random.key(0)
        )
        density = numpyro_flows.flow_distribution(flow, context=jax.numpy.asarray(context))
        values = np.asarray(density.log_prob(jax.numpy.ones(4)))
    assert values.shape == (2,)
    assert values[0] != values[1]
