"""What Pyro's users do with a sample's own density, and with random weights."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroSample
from pyro.nn.module import to_pyro_module_

from pyroflows import flow_distribution, glow, nice, realnvp


def perturbed(build, **options):
    torch.manual_seed(0)
    flow = build(3, layers=3, **options).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return flow


def hosted(flow):
    base = dist.Normal(torch.zeros(3).double(), torch.ones(3).double()).to_event(1)
    return dist.TransformedDistribution(base, [flow])


@pytest.mark.parametrize("density", [flow_distribution, hosted])
@pytest.mark.parametrize("build", [nice, realnvp, glow])
def test_gradients_at_a_sample_of_ones_own(build, density):
    """What is remembered of a sample gives the gradients that computing anew gives."""
    flow = perturbed(build)
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
            torch.testing.assert_close(remembered, anew)


def test_log_determinant_can_be_used_twice():
    flow = perturbed(realnvp)
    y = torch.randn(4, 3).double()
    x = flow.inv(y)
    for _ in range(2):
        flow.log_abs_det_jacobian(x, y).sum().backward(retain_graph=False)


def test_priors_on_weights():
    flow = realnvp(2, layers=2, hidden=(4,))
    to_pyro_module_(flow)
    for module in flow.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            shape = parameter.shape
            prior = dist.Normal(torch.zeros(shape), torch.ones(shape)).to_event(len(shape))
            delattr(module, name)
            setattr(module, name, PyroSample(prior))
    x = torch.randn(5, 2)

    def model():
        pyro.sample("x", flow_distribution(flow, "normal").to_event(0), obs=x)

    values = {float(pyro.poutine.trace(model).get_trace().log_prob_sum()) for _ in range(3)}
    assert len(values) == 3
