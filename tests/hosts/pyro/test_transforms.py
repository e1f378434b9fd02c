"""Flows as transforms of PyTorch and Pyro: modules, devices, distributions."""

import copy
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.testing import assert_close

from pyroflows import (
    ActNorm,
    AffineCoupling,
    Chain,
    ConvNet,
    DenseNet,
    InvertibleConv1x1,
    InvertibleLinear,
    ResNet,
    TransformModule,
    flow_distribution,
    glow,
    realnvp,
)
from pyroflows.layers.coupling import FEW, asinh
from pyroflows.layers.scales import TanhScale
from tests.hosts.pyro.flows import FLOWS, IMAGES, every_flow, make, perturbed

# The host's distributions


@every_flow
def test_conditional_transformed_distribution(name):
    flow = make(name, context_dim=2)
    base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    host = dist.ConditionalTransformedDistribution(base, [flow])
    context, x = torch.randn(5, 2), torch.randn(5, 3)
    ours = flow_distribution(flow, context=context)
    assert_close(host.condition(context).log_prob(x), ours.log_prob(x))
    assert host.condition(context).sample().shape == (5, 3)
    host.clear_cache()


@every_flow
def test_composes_with_the_hosts_transforms(name):
    flow = make(name)
    host = dist.transforms.ExpTransform()
    base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    density = dist.TransformedDistribution(base, [flow, host])
    x = density.rsample((4,))
    inner = x.log()
    expected = flow_distribution(flow).log_prob(inner) - inner.sum(-1)
    assert_close(density.log_prob(x), expected, rtol=1e-4, atol=1e-4)
    chained = dist.transforms.ComposeTransform([flow, host])
    z = torch.randn(4, 3)
    assert_close(chained(z), flow(z).exp())
    ladj = chained.log_abs_det_jacobian(z, chained(z))
    assert_close(ladj, flow.forward_and_ladj(z)[1] + flow(z).sum(-1))
    assert_close(chained.inv(chained(z)), z, rtol=1e-3, atol=1e-3)
    modules = pyro.distributions.torch_transform.ComposeTransformModule([flow, make(name)])
    assert len(list(modules.parameters())) == 2 * len(list(flow.parameters()))


@every_flow
@pytest.mark.parametrize("validate", [True, False])
def test_validation(name, validate):
    flow = make(name)
    with pyro.validation_enabled(validate):
        for density in (
            flow_distribution(flow),
            dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), [flow]),
        ):
            assert density.log_prob(density.sample((2,))).shape == (2,)
            broken = torch.tensor([[1.0, float("nan"), 0.0], [0.0, 0.0, 0.0]])
            if validate:
                with pytest.raises(ValueError, match="within the support"):
                    density.log_prob(broken)
            else:
                log_prob = density.log_prob(broken)
                assert log_prob.isnan().tolist() == [True, False]

        def model():
            with pyro.plate("rows", 5):
                pyro.sample("x", flow_distribution(flow), obs=torch.zeros(5, 3))

        assert poutine.trace(model).get_trace().log_prob_sum().isfinite()


@every_flow
def test_expand_to_event_and_mask(name):
    flow = make(name)
    density = flow_distribution(flow)
    expanded = density.expand([4])
    assert expanded.batch_shape == (4,)
    assert expanded.event_shape == (3,)
    x = expanded.sample((2,))
    assert x.shape == (2, 4, 3)
    assert_close(expanded.log_prob(x), density.log_prob(x))
    assert_close(expanded.to_event(1).log_prob(x), density.log_prob(x).sum(-1))
    assert expanded.expand_by([6]).batch_shape == (6, 4)
    masked = expanded.mask(torch.tensor([True, False, True, False]))
    assert (masked.log_prob(x)[:, 1::2] == 0).all()
    contexts = flow_distribution(make(name, context_dim=2), context=torch.randn(4, 2))
    assert contexts.expand([5, 4]).sample().shape == (5, 4, 3)
    assert contexts.expand([5, 4]).log_prob(torch.zeros(5, 4, 3)).shape == (5, 4)


@pytest.mark.parametrize("cache_size", [0, 1])
@every_flow
def test_the_hosts_cache_size_changes_nothing(name, cache_size):
    flow = make(name)
    cached = flow.with_cache(cache_size)
    z = torch.randn(5, 3)
    y = cached(z)
    assert_close(cached.inv(y), flow.inverse_and_ladj(y)[0], rtol=1e-4, atol=1e-4)
    cached.clear_cache()
    with torch.no_grad():
        next(flow.parameters()).add_(0.5)
    assert_close(cached.inv(y), copy.deepcopy(flow).inv(y.clone()))
    assert_close(cached.log_abs_det_jacobian(z, cached(z)), flow.forward_and_ladj(z)[1])


# Precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_flow
def test_half_precision(name, dtype):
    flow = make(name).to(dtype)
    x = flow_distribution(flow).sample((5,))
    assert x.dtype == dtype
    assert flow_distribution(flow).log_prob(x).isfinite().all()


@pytest.mark.parametrize("count", [FEW // 4, FEW])  # by torch, and by our own function
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_asinh(dtype, count):
    """From the smallest number to the largest."""
    largest = torch.finfo(dtype).max / 4
    sizes = torch.logspace(-40, math.log10(largest), count, dtype=torch.float64)
    x = torch.cat([-sizes, sizes.new_zeros(1), sizes]).to(dtype).requires_grad_()
    exact = x.detach().double()
    eps = torch.finfo(dtype).eps
    assert_close(asinh(x).double(), torch.asinh(exact), rtol=4 * eps, atol=4 * eps)
    (slope,) = torch.autograd.grad(asinh(x).sum(), x)
    assert_close(slope.double(), (1 + exact**2).rsqrt(), rtol=8 * eps, atol=4 * eps)


@pytest.mark.parametrize("name", IMAGES)
def test_autocast_is_for_the_networks(name):
    """Mixed precision: networks in half precision, the transform as precise as ever."""
    flow = perturbed(IMAGES[name]())
    calls = []
    for network in (m for m in flow.modules() if isinstance(m, DenseNet | ConvNet | ResNet)):
        network.register_forward_hook(lambda m, inputs, output: calls.append(output.dtype))
    x = flow_distribution(flow).sample((5,))
    exact = flow_distribution(flow).log_prob(x)
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        log_prob = flow_distribution(flow).log_prob(x)
        z = flow.inv(x)
        log_prob.sum().backward()
    assert set(calls) == {torch.bfloat16}
    assert z.dtype == log_prob.dtype == torch.float32
    assert_close(log_prob, exact, rtol=2e-2, atol=2e-2)
    assert all(p.grad.isfinite().all() for p in flow.parameters() if p.grad is not None)


@pytest.mark.parametrize("layer", [InvertibleLinear(4), InvertibleConv1x1((4, 2, 2))])
def test_autocast_leaves_matrices_alone(layer):
    x = torch.randn(5, *layer.event_shape)
    exact = layer.inv(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.inverse_and_ladj(x)[0], exact)


# Devices


@every_flow
def test_devices(name):
    flow = FLOWS[name]().to("meta")
    assert {tensor.device.type for tensor in flow.state_dict().values()} == {"meta"}
    y, ladj = flow.forward_and_ladj(torch.ones(4, 3, device="meta"))
    assert (y.device.type, ladj.device.type) == ("meta", "meta")
    assert (y.shape, ladj.shape) == ((4, 3), (4,))
    back = flow.to_empty(device="cpu")
    assert {tensor.device.type for tensor in back.state_dict().values()} == {"cpu"}
    assert FLOWS[name]().to("cpu").double().state_dict().keys() == flow.state_dict().keys()


@pytest.mark.gpu
@every_flow
def test_gpu(name):
    flow = make(name)
    x = torch.randn(64, 3)
    expected = flow_distribution(flow).log_prob(x)
    z = torch.randn(64, 3)
    forward = flow(z)
    flow = flow.to("cuda")
    density = flow_distribution(flow)
    assert_close(density.log_prob(x.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)
    assert_close(flow(z.cuda()).cpu(), forward, rtol=1e-3, atol=1e-3)
    sample = density.rsample((8,))
    assert sample.device.type == "cuda"
    density.log_prob(sample).sum().backward()
    flow.initialize(x.cuda())
    contexts = make(name, context_dim=2).to("cuda")
    given = flow_distribution(contexts, context=torch.randn(8, 2, device="cuda"))
    assert given.sample().device.type == "cuda"


# A user's own layer


class Shear(TransformModule):
    """Two methods are all that a layer needs."""

    def __init__(self):
        super().__init__(2)
        self.slope = torch.nn.Parameter(torch.tensor(0.5))

    def forward_and_ladj(self, x):
        a, b = x.unbind(-1)
        return torch.stack([a, 2 * b + self.slope * a], -1), np.log(2) + torch.zeros_like(a)

    def inverse_and_ladj(self, y):
        a, b = y.unbind(-1)
        return torch.stack([a, (b - self.slope * a) / 2], -1), -np.log(2) + torch.zeros_like(a)


def test_a_layer_of_ones_own():
    flow = Chain([Shear(), AffineCoupling(2, hidden=(4,)), InvertibleLinear(2)])
    density = flow_distribution(perturbed(flow))
    x = density.rsample((5,))
    jacobian = torch.autograd.functional.jacobian(flow.inv, x[0].detach())
    z = flow.inv(x[0])
    expected = density.base_dist.log_prob(z) + torch.linalg.slogdet(jacobian).logabsdet
    assert_close(density.log_prob(x)[0], expected, rtol=1e-4, atol=1e-4)
    assert "slope" in dict(flow.layers[0].named_parameters())
    with pytest.raises(NotImplementedError, match="forward_and_ladj"):
        TransformModule(2)(torch.ones(2))


class Turn(TransformModule):
    """A layer that takes a context has it as a second argument."""

    def __init__(self):
        super().__init__(2, context_dim=1)

    def forward_and_ladj(self, x, context):
        return x + context, torch.zeros_like((x + context)[..., 0])

    def inverse_and_ladj(self, y, context):
        return y - context, torch.zeros_like((y - context)[..., 0])


def test_a_layer_of_ones_own_sees_the_context():
    for flow in (Turn(), Chain([Turn(), ActNorm(2)])):
        y = flow.condition(torch.tensor([[1.0], [2.0]]))(torch.zeros(2))
        assert_close(y, torch.tensor([[1.0, 1.0], [2.0, 2.0]]))
        back = flow.condition(torch.tensor([2.0])).inv(y)
        assert_close(back, torch.tensor([[-1.0, -1.0], [0.0, 0.0]]))


def test_a_layer_that_would_ignore_its_context():
    class Deaf(TransformModule):
        def forward_and_ladj(self, x):
            return x, x.new_zeros(x.shape[:-1])

        def inverse_and_ladj(self, y):
            return self.forward_and_ladj(y)

    assert Deaf(2)(torch.ones(3, 2)).shape == (3, 2)

    class HalfDeaf(Deaf):
        def inverse_and_ladj(self, y, context):
            return self.forward_and_ladj(y)

    with pytest.raises(TypeError, match="HalfDeaf"):
        HalfDeaf(2, context_dim=1)
    with pytest.raises(TypeError, match="Deaf's forward_and_ladj and inverse_and_ladj take no"):
        Deaf(2, context_dim=1)


# Modules and imports


def test_couplings_share_no_scale_of_ones_own():
    scale = TanhScale((2,))
    for build in (glow, realnvp):
        flow = build(4, layers=3, scale=scale)
        assert len({id(m) for m in flow.modules() if isinstance(m, TanhScale)} | {id(scale)}) == 4


def test_no_side_effects_of_importing():
    """The import changes no default of the host: told by a process of its own."""
    import subprocess
    import sys

    code = (
        "import torch, pyro, pyro.distributions as dist\n"
        "def state(): return (torch.get_default_dtype(), torch.get_rng_state().sum().item(),\n"
        "    dist.Distribution._validate_args if hasattr(dist.Distribution, '_validate_args')\n"
        "    else torch.distributions.Distribution._validate_args,\n"
        "    torch.is_grad_enabled(), torch.get_num_threads())\n"
        "before = state()\nimport pyroflows\nassert state() == before, (before, state())\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class Doubled(AffineCoupling):
    """A coupling of the user's own, whose methods are not those of the base class."""

    def forward_and_ladj(self, x, context=None):
        y, ladj = super().forward_and_ladj(x, context)
        return 2 * y, ladj + 4 * math.log(2)


def test_a_chain_calls_a_couplings_own_methods():
    """Also between couplings on the same parts, which pass these on."""
    flow = Chain([AffineCoupling(4), Doubled(4), AffineCoupling(4)])
    x = torch.randn(3, 4)
    y, total = x, 0.0
    for layer in flow.layers:
        y, ladj = layer.forward_and_ladj(y)
        total = total + ladj
    found, found_ladj = flow.forward_and_ladj(x)
    assert_close(found, y)
    assert_close(found_ladj, total)
