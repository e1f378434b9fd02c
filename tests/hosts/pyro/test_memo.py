"""What the memo of a sample may save, and what it must not."""

import copy
import gc

import pyro.distributions as dist
import pytest
import torch
from torch.func import functional_call
from torch.testing import assert_close

from pyroflows import ActNorm, Chain, flow_distribution, realnvp
from tests.hosts.pyro.flows import every_flow, make, perturbed


@every_flow
def test_a_sample_without_gradients_then_a_density_with(name):
    flow = make(name)
    density = flow_distribution(flow)
    with torch.no_grad():
        x = density.sample((6,))
    host = dist.TransformedDistribution(density.base_dist, [flow])
    for log_prob in (density.log_prob(x), host.log_prob(x)):
        found = torch.autograd.grad(log_prob.sum(), list(flow.parameters()))
        expected = torch.autograd.grad(
            flow_distribution(flow).log_prob(x.clone()).sum(), list(flow.parameters())
        )
        for ours, theirs in zip(found, expected, strict=True):
            assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
        assert any(gradient.abs().max() > 0 for gradient in found)


def test_parameters_that_start_to_need_gradients():
    flow = make("realnvp").requires_grad_(False)
    density = flow_distribution(flow)
    x = density.rsample((6,))
    assert not density.log_prob(x).requires_grad
    flow.requires_grad_(True)
    gradients = torch.autograd.grad(density.log_prob(x).sum(), list(flow.parameters()))
    assert any(gradient.abs().max() > 0 for gradient in gradients)


@every_flow
def test_gradients_through_a_sample_and_its_density(name):
    """The pathwise gradient of the entropy, with and without the memo."""
    original, found = make(name).double(), []
    for clone in (False, True):
        flow = copy.deepcopy(original)
        torch.manual_seed(5)
        density = flow_distribution(flow)
        x = density.rsample((7,))
        log_prob = density.log_prob(x.clone() if clone else x)
        found.append(torch.autograd.grad(log_prob.sum(), flow.parameters(), allow_unused=True))
    for ours, theirs in zip(*found, strict=True):
        # A shift does not appear in the log-determinant at all, or its gradients cancel.
        ours = torch.zeros_like(theirs) if ours is None else ours
        assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@every_flow
def test_several_backward_passes_of_one_batch(name):
    flow, x = make(name), torch.randn(5, 3)
    density = flow_distribution(flow)
    for _ in range(3):
        density.log_prob(x).sum().backward()
        flow.inv(x).sum().backward()
        z = flow.inv(x)
        flow.log_abs_det_jacobian(z, x).sum().backward()


@every_flow
def test_changes_in_place_are_seen(name):
    flow = make(name)
    density = flow_distribution(flow)
    with torch.no_grad():
        z = torch.randn(5, 3)
        x = flow(z)
        x.mul_(2.0)
        assert_close(density.log_prob(x), copy.deepcopy(density).log_prob(x.clone()))
        x = flow(z)
        z.add_(1.0)
        assert_close(flow.inv(x), copy.deepcopy(flow).inv(x.clone()))
        x = flow(z)
        x.data.add_(1.0)
        assert_close(flow.inv(x), copy.deepcopy(flow).inv(x.clone()))
        x = torch.randn(5, 3)
        z = flow.inv(x)
        x.add_(1.0)
        ladj = copy.deepcopy(flow).log_abs_det_jacobian(z.clone(), x.clone())
        assert_close(flow.log_abs_det_jacobian(z, x), ladj)


@every_flow
def test_changes_of_the_context_are_seen(name):
    flow, context = make(name, context_dim=2).requires_grad_(False), torch.zeros(2)
    density = flow_distribution(flow, context=context)
    x = density.sample((5,))
    context.add_(1.0)
    expected = flow_distribution(flow, context=torch.ones(2)).log_prob(x.clone())
    assert_close(density.log_prob(x), expected)


def test_replaced_modules_and_buffers_are_seen():
    flow = make("glow").requires_grad_(False)
    x = flow(torch.randn(5, 3))
    flow.layers[1] = ActNorm(3).requires_grad_(False)
    flow.layers[1].loc.fill_(1.0)
    assert_close(flow.inv(x), copy.deepcopy(flow).inv(x.clone()))
    x = flow(torch.randn(5, 3))
    flow.layers[0].layers[0].layers[1].signs.neg_()
    assert_close(flow.inv(x), copy.deepcopy(flow).inv(x.clone()))


class Unusual(torch.nn.Module):
    """A conditioner with all that a memo cannot see, or only just."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.listed = [torch.nn.Linear(inputs, 8)]
        self.dropout = torch.nn.Dropout(0.5)
        self.last = torch.nn.Linear(8, outputs)
        self.factor = 1.0

    def forward(self, x):
        return self.factor * self.last(self.dropout(self.listed[0](x).tanh()))


class Listless(Unusual):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.inner = self.listed.pop()
        del self.listed

    def forward(self, x):
        return self.factor * self.last(self.dropout(self.inner(x).tanh()))


def first(flow):
    return flow.layers[0].layers[0].layers[0]


BOUND = torch.tensor(0.1)


def bounded(r):
    return BOUND * torch.tanh(r)


# What is changed between a sample and its density, and in which flow.
CHANGES = {
    "function": ({"scale": bounded}, lambda flow: BOUND.add_(0.4)),
    "list": ({"network": Unusual}, lambda flow: first(flow).network.listed[0].bias.data.add_(1)),
    "eval": ({"network": Listless}, lambda flow: flow.eval()),
    "float": ({"network": Listless}, lambda flow: setattr(first(flow).network, "factor", 3.0)),
    "squash": ({}, lambda flow: setattr(first(flow), "squash", False)),
    "limit": ({}, lambda flow: setattr(first(flow).scale, "limit", 0.01)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_that_changes_is_remembered(change):
    options, act = CHANGES[change]
    flow = perturbed(realnvp(4, layers=2, **options)).requires_grad_(False)
    density = flow_distribution(flow)
    x = 3.0 * density.sample((50,))
    x = flow(x)
    act(flow)
    torch.manual_seed(5)
    found = density.log_prob(x)
    torch.manual_seed(5)
    assert_close(found, density.log_prob(x.clone()))


def test_a_context_within_a_chain_is_seen():
    context = torch.zeros(2)
    inner = make("realnvp", context_dim=2).requires_grad_(False)
    flow = Chain([inner.condition(context), ActNorm(3)]).requires_grad_(False)
    x = flow(torch.randn(5, 3))
    context.add_(1.0)
    assert_close(flow.inv(x), flow.inv(x.clone()))


@every_flow
def test_what_is_remembered_is_a_copy(name):
    flow = make(name).requires_grad_(False)
    z = torch.randn(5, 3)
    before = z.clone()
    flow.inv(flow(z)).zero_()
    assert_close(z, before)


def test_the_memo_lets_go():
    """A sample that is dropped takes what was remembered with it."""

    def tensors(shape):
        return [t for t in gc.get_objects() if type(t) is torch.Tensor and t.shape == shape]

    flow = make("realnvp").requires_grad_(False)
    gc.collect()
    gc.freeze()  # look through new objects only
    for call in (flow, flow.inv):
        z = torch.randn(1000, 3)
        x = call(z)
        held = tensors((1000, 3))
        assert len(held) >= 2
        del x, z, held
        gc.collect()
        assert not tensors((1000, 3))


def test_inference_mode():
    flow = make("glow")
    density = flow_distribution(flow)
    outside = density.log_prob(torch.ones(4, 3))
    with torch.inference_mode():
        x = density.sample((4,))
        inside = density.log_prob(x)
        assert_close(density.log_prob(torch.ones(4, 3)), outside)
    assert_close(density.log_prob(x.clone()), inside, rtol=1e-4, atol=1e-4)


# Gradients at a sample of one's own


class OfItsSample(torch.nn.Module):
    """What a functional call may be made of: a sample and its density in one go."""

    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, z):
        x = self.flow(z)
        return flow_distribution(self.flow).log_prob(x).sum() + x.square().sum()


@every_flow
def test_gradients_through_a_functional_call(name):
    """Taken after the call, when the module has its own parameters again."""
    module = OfItsSample(make(name))
    given = {k: (v + 0.1).detach().requires_grad_() for k, v in module.named_parameters()}
    z = torch.randn(5, 3)
    found = torch.autograd.grad(functional_call(module, given, (z,)), list(given.values()))
    own = copy.deepcopy(module)
    own.load_state_dict(given, strict=False)
    wanted = torch.autograd.grad(own(z), list(own.parameters()))
    for ours, theirs in zip(found, wanted, strict=True):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@every_flow
def test_second_derivatives_at_a_sample(name):
    density = flow_distribution(make(name))
    x = density.rsample((5,))
    results = []
    for point in (x, x.detach().clone().requires_grad_()):
        (first,) = torch.autograd.grad(density.log_prob(point).sum(), point, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), point, retain_graph=True)
        results += [(first, second)]
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def hosted(flow):
    base = dist.Normal(torch.zeros(3).double(), torch.ones(3).double()).to_event(1)
    return dist.TransformedDistribution(base, [flow])


@pytest.mark.parametrize("density", [flow_distribution, hosted])
@every_flow
def test_gradients_at_a_sample_of_ones_own(name, density):
    """What is remembered of a sample gives the gradients that computing anew gives."""
    flow = make(name).double()
    q = density(flow)
    parameters = list(flow.parameters())

    def gradients(forget):
        torch.manual_seed(1)
        z = q.rsample((5,))
        if forget:
            flow.clear_cache()
        loss = (q.log_prob(z) + z.square().sum(-1)).sum()
        return torch.autograd.grad(loss, [z, *parameters], allow_unused=True)

    for remembered, anew in zip(gradients(False), gradients(True), strict=True):
        assert (remembered is None) == (anew is None)
        if anew is not None:
            assert_close(remembered, anew)


def test_log_determinant_can_be_used_twice():
    flow = make("realnvp")
    y = torch.randn(4, 3)
    x = flow.inv(y)
    for _ in range(2):
        flow.log_abs_det_jacobian(x, y).sum().backward(retain_graph=False)
