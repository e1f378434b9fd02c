"""Flows in torch.func and torch.compile."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.func import functional_call, grad, jacfwd, jacrev, vmap
from torch.testing import assert_close

from pyroflows import AffineCoupling, Chain, InvertibleLinear, flow_distribution
from tests.hosts.pyro.flows import FLOWS, IMAGES, every_flow, make, perturbed

# torch.func


@every_flow
def test_vmap(name):
    flow, x = make(name), torch.randn(6, 3)
    density = flow_distribution(flow)
    assert_close(vmap(flow)(x), flow(x))
    assert_close(vmap(flow.inv)(x), flow.inv(x))
    with pyro.validation_enabled(False):
        density = flow_distribution(flow)
        assert_close(vmap(density.log_prob)(x), density.log_prob(x))

        def both(z):
            y = flow(z)
            return density.log_prob(y)

        assert_close(vmap(both)(x), density.log_prob(flow(x)), rtol=1e-4, atol=1e-4)


@every_flow
def test_functional_derivatives(name):
    flow = make(name).double()
    x = torch.randn(3, dtype=torch.float64)
    y, ladj = flow.forward_and_ladj(x)
    for jacobian in (jacrev(flow)(x), jacfwd(flow)(x)):
        assert_close(torch.linalg.slogdet(jacobian).logabsdet, ladj)
    with pyro.validation_enabled(False):
        density = flow_distribution(flow)
        leaf = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(density.log_prob(leaf), leaf)
        assert_close(grad(density.log_prob)(x), expected)
        per_row = vmap(grad(density.log_prob))(x.expand(4, 3))
        assert_close(per_row, expected.expand(4, 3))


@every_flow
def test_functional_call_is_fresh(name):
    """With other parameter values after a sample, whose memo is of the flow's own values."""
    flow = make(name)
    x = flow_distribution(flow).sample((4,))
    other = {key: value.detach() + 0.2 for key, value in flow.named_parameters()}
    updated = copy.deepcopy(flow)
    updated.load_state_dict(other, strict=False)

    class LogProb(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.flow = flow

        def forward(self, value):
            return flow_distribution(self.flow).log_prob(value)

    module = LogProb()
    given = {f"flow.{key}": value for key, value in other.items()}
    expected = flow_distribution(updated).log_prob(x.clone())
    assert_close(functional_call(module, given, (x,)), expected)
    assert_close(functional_call(flow, other, (x,)), updated(x.clone()))
    with pyro.validation_enabled(False):
        ours = grad(lambda values: functional_call(module, values, (x,)).sum())(given)
        leaves = list(updated.parameters())
        theirs = torch.autograd.grad(flow_distribution(updated).log_prob(x.clone()).sum(), leaves)
        for key, gradient in zip(dict(updated.named_parameters()), theirs, strict=True):
            assert_close(ours[f"flow.{key}"], gradient, rtol=1e-3, atol=1e-3)
        stacked = {key: torch.stack([value, value + 0.1]) for key, value in given.items()}
        ensemble = vmap(lambda values: functional_call(module, values, (x,)))(stacked)
        assert ensemble.shape == (2, 4)
        assert_close(ensemble[0], expected)
    assert_close(flow_distribution(flow).log_prob(x), flow_distribution(flow).log_prob(x.clone()))


@pytest.mark.parametrize("outer", [jacfwd, jacrev])
@pytest.mark.parametrize("inner", [jacfwd, jacrev])
@every_flow
def test_nested_derivatives(name, inner, outer):
    density = flow_distribution(make(name).double().requires_grad_(False))
    x = torch.randn(3, dtype=torch.float64)
    found = outer(inner(density.log_prob))(x)
    assert_close(found, torch.autograd.functional.hessian(density.log_prob, x))
    step = 1e-5 * torch.eye(3, dtype=torch.float64)
    slope = jacrev(density.log_prob)
    differences = [(slope(x + s) - slope(x - s)) / 2e-5 for s in step]
    assert_close(found, torch.stack(differences), rtol=1e-5, atol=1e-6)


# torch.compile


COMPILED = {
    **FLOWS,
    "by_hand": lambda: Chain(
        [
            AffineCoupling(3, hidden=(4,), partition="alternating"),
            AffineCoupling(3, hidden=(4,), partition=[True, False, False]),
        ]
    ),
}
two_compiled = pytest.mark.parametrize("name", ["glow", "by_hand"])


def compiled(function):
    """In one graph, without a break."""
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("name", ["realnvp", "glow"])
def test_compiled_images(name):
    flow = perturbed(IMAGES[name]())
    x = flow_distribution(flow).sample((5,))
    call = compiled(lambda x: flow_distribution(flow).log_prob(x))
    assert_close(call(x), flow_distribution(flow).log_prob(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_log_prob(name):
    flow, x = perturbed(COMPILED[name]()), torch.randn(6, 3)

    def log_prob(x):
        return flow_distribution(flow).log_prob(x)

    fast = compiled(log_prob)
    for _ in range(2):
        assert_close(fast(x), log_prob(x), rtol=1e-4, atol=1e-4)
        found = torch.autograd.grad(fast(x).sum(), list(flow.parameters()))
        expected = torch.autograd.grad(log_prob(x).sum(), list(flow.parameters()))
        for ours, theirs in zip(found, expected, strict=True):
            assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
        perturbed(flow)


@two_compiled
@pytest.mark.parametrize("call", ["forward_and_ladj", "inverse_and_ladj"])
def test_compiled_pair(name, call):
    flow, x = perturbed(COMPILED[name]()), torch.randn(6, 3)
    pair = compiled(getattr(flow, call))
    for ours, theirs in zip(pair(x), getattr(flow, call)(x), strict=True):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@two_compiled
def test_compiled_calls(name):
    flow, x = perturbed(COMPILED[name]()), torch.randn(6, 3)
    host = dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), [flow])
    assert_close(compiled(lambda z: flow(z))(x), flow(x), rtol=1e-4, atol=1e-4)
    assert_close(compiled(lambda y: flow.inv(y))(x), flow.inv(x), rtol=1e-4, atol=1e-4)
    expected = host.log_prob(x)
    with pyro.validation_enabled(False):
        host = dist.TransformedDistribution(host.base_dist, [flow])
        assert_close(compiled(host.log_prob)(x), expected, rtol=1e-4, atol=1e-4)


@two_compiled
def test_compiled_condition(name):
    if name == "by_hand":
        flow = Chain([AffineCoupling(3, hidden=(4,), context_dim=2), InvertibleLinear(3)])
    else:
        flow = FLOWS[name](context_dim=2)
    flow, x, context = perturbed(flow), torch.randn(6, 3), torch.randn(6, 2)

    def log_prob(x, context):
        return flow_distribution(flow, context=context).log_prob(x)

    assert_close(compiled(log_prob)(x, context), log_prob(x, context), rtol=1e-4, atol=1e-4)


@two_compiled
def test_compiled_rsample(name):
    density = flow_distribution(perturbed(COMPILED[name]()))

    def both():
        x = density.rsample((6,))
        return x, density.log_prob(x)

    torch.manual_seed(3)
    x, log_prob = compiled(both)()
    torch.manual_seed(3)
    assert_close(x, density.rsample((6,)), rtol=1e-4, atol=1e-4)
    assert_close(log_prob, density.log_prob(x.clone()), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@every_flow
def test_compile_by_inductor(name):
    torch.compiler.reset()
    flow, x = make(name), torch.randn(6, 3)
    fast = torch.compile(lambda x: flow_distribution(flow).log_prob(x), fullgraph=True)
    assert_close(fast(x), flow_distribution(flow).log_prob(x), rtol=1e-4, atol=1e-4)
