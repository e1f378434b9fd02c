"""The Pyro wing behind NumPy arrays."""

import copy
import functools
import pickle
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.optim.clipped_adam import ClippedAdam

import pyroflows
from tests.wings import base


class OwnNetwork(torch.nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        weight = np.cos(np.arange(n_in * n_out)).reshape(n_in, n_out)
        self.weight = torch.as_tensor(weight)

    def forward(self, x):
        return torch.sin(x @ self.weight.to(x.dtype))


class OwnConvolution(OwnNetwork):
    def forward(self, x):
        return super().forward(x.movedim(-3, -1)).movedim(-1, -3)


def own_scale(r):
    return 0.5 * torch.sin(r)


class PyroWing(base.Wing):
    name = "pyro"
    # The host's distribution keeps nothing of a sample for its density.
    evaluations_of_sample_and_log_prob, evaluations_of_log_prob = 2, 1
    draws_float32 = True
    package = pyroflows
    own_network = OwnNetwork
    own_convolution = OwnConvolution
    own_scale = staticmethod(own_scale)

    # Arrays

    def array(self, x):
        return torch.as_tensor(x)

    def numpy(self, x):
        return x.detach().numpy()

    # Flows

    def new(self, name, *args, seed=0, **options):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return super().new(name, *args, **options)

    def cast(self, flow, dtype):
        return flow.to(getattr(torch, dtype))

    def state(self, flow):
        return {name: self.numpy(value).copy() for name, value in flow.state_dict().items()}

    def load(self, flow, state):
        flow.load_state_dict({name: torch.as_tensor(value) for name, value in state.items()})
        return flow

    def with_setting(self, flow, inner, setting, value):
        """The flow, with a setting of the module named `inner` changed by hand."""
        setattr(flow.get_submodule(inner), setting, value)
        return flow

    def copies(self, flow):
        return {"deepcopy": copy.deepcopy(flow), "pickle": pickle.loads(pickle.dumps(flow))}

    def initialize(self, flow, x, context=None):
        return flow.initialize(self.array(x), *([] if context is None else [self.array(context)]))

    def update(self, flow, x, context=None):
        return flow.update(self.array(x), *([] if context is None else [self.array(context)]))

    def standardize(self, layer, x):
        return layer.standardize(self.array(x))

    def dequantize(self, x, seed, **options):
        generator = torch.Generator().manual_seed(seed)
        return pyroflows.dequantize(x, generator, **options)

    # The pair

    def forward(self, flow, x, context=None):
        y, ladj = self.given(flow, context).forward_and_ladj(self.array(x))
        return self.numpy(y), self.numpy(ladj)

    def inverse(self, flow, y, context=None):
        x, ladj = self.given(flow, context).inverse_and_ladj(self.array(y))
        return self.numpy(x), self.numpy(ladj)

    def jacobian(self, flow, latents, context=None):
        """One Jacobian a point, by autodiff of the host's own call."""
        flow, size = self.given(flow, context), latents[0].size
        jacobians = map(
            functools.partial(torch.autograd.functional.jacobian, flow), self.array(latents)
        )
        return np.stack([jacobian.numpy().reshape(size, size) for jacobian in jacobians])

    # What the host calls

    def call(self, flow, x, context=None):
        """`flow(x)` and `log_abs_det_jacobian` of the pair."""
        flow, x = self.given(flow, context), self.array(x)
        y = flow(x)
        return self.numpy(y), self.numpy(flow.log_abs_det_jacobian(x, y))

    def call_inverse(self, flow, y, context=None):
        """`flow.inv(y)` and the log-determinant of that direction."""
        inverse, y = self.given(flow, context).inv, self.array(y)
        x = inverse(y)
        return self.numpy(x), self.numpy(inverse.log_abs_det_jacobian(y, x))

    def dtypes(self, function, flow, density, *points):
        """Names of the dtypes that a function of them returns."""
        return [
            str(a.dtype) for a in map(self.numpy, function(flow, density, *map(self.array, points)))
        ]

    def satisfies(self, constraint, x):
        return constraint.check(self.array(x)).numpy()

    # Densities

    def normal_base(self, shape, loc, scale, dtype="float64"):
        """A base of the user's own."""
        loc = torch.full(shape, loc, dtype=getattr(torch, dtype))
        return dist.Normal(loc, scale).to_event(len(shape))

    def biject_to(self, support, x):
        return self.numpy(torch.distributions.biject_to(support)(self.array(x)))

    def uniform_base(self, shape, low, high, dtype="float32"):
        low, high = (torch.full(shape, bound, dtype=getattr(torch, dtype)) for bound in (low, high))
        return dist.Uniform(low, high).to_event(len(shape))

    def two_peaks(self, *places, weights):
        """A base over vectors of one number: a mixture of two normals."""
        weights, places = (torch.tensor(numbers) for numbers in (weights, places))
        peaks = dist.Normal(places[:, None], torch.tensor(0.5)).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(weights), peaks)

    def poisson_base(self, shape):
        return dist.Poisson(torch.ones(shape)).to_event(len(shape))

    def logistic_base(self, shape):
        zeros = torch.zeros(shape, dtype=torch.float64)
        return dist.Logistic(zeros, torch.ones_like(zeros)).to_event(len(shape))

    def host_density(self, flow, base_density, context=None):
        return dist.TransformedDistribution(base_density, [self.given(flow, context)])

    def log_prob(self, density, x):
        return self.numpy(density.log_prob(self.array(x)))

    def sample(self, density, shape, seed=0):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.numpy(density.sample(shape))

    def sample_and_log_prob(self, density, shape, seed=0):
        """A sample and its log-density in the cheapest way."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            if isinstance(density, pyroflows.FlowDistribution):
                x, log_prob = density.rsample_and_log_prob(shape)
            else:
                x = density.rsample(shape)
                log_prob = density.log_prob(x)
            return self.numpy(x), self.numpy(log_prob)

    def drawn(self, density, shape):
        """A sample and its log-density, with the host's own objects that must stay alive."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            x = density.rsample(shape)
        log_prob = density.log_prob(x)
        arrays = {"sample": self.numpy(x).copy(), "log_prob": self.numpy(log_prob).copy()}
        return SimpleNamespace(**arrays, host=(x, log_prob))

    def log_prob_of(self, density, drawn):
        return self.numpy(density.log_prob(drawn.host[0]))

    def held(self, flow, x, inverse):
        """A host's input and output, which must stay alive."""
        x = self.array(x)
        return x, (flow.inv if inverse else flow)(x)

    def recalled(self, flow, held, inverse):
        """The log-determinant of a pair, and where its output comes from."""
        transform = flow.inv if inverse else flow
        ladj = transform.log_abs_det_jacobian(*held)
        return self.numpy(ladj), self.numpy(transform.inv(held[1]))

    def again(self, density, flow):
        """The distribution after an update of its flow: parameters are shared."""
        return density

    def decoded(self, density, flow, z):
        """`flow(z)` and its log-density, in one go."""
        x = flow(self.array(z))
        return self.numpy(x), self.numpy(density.log_prob(x))

    def context_gradient(self, flow, x, context):
        """The gradient of the summed log-density in the context."""
        context = self.array(context).requires_grad_()
        density = pyroflows.flow_distribution(flow, context=context)
        (found,) = torch.autograd.grad(density.log_prob(self.array(x)).sum(), context)
        return self.numpy(found)

    def gradients(self, flow, x, context=None):
        """The gradient of the summed log-density in every parameter and in x."""
        x = self.array(x).requires_grad_()
        inputs = {"x": x, **dict(flow.named_parameters())}
        total = self.density(flow, context=context).log_prob(x).sum()
        found = torch.autograd.grad(total, list(inputs.values()))
        return {name: self.numpy(grad) for name, grad in zip(inputs, found, strict=True)}

    # Spies

    def spied(self, flow):
        """The flow, and a function that tells how often its conditioners have been evaluated."""
        calls = []
        for module in flow.modules():
            if isinstance(module, pyroflows.AdditiveCoupling | pyroflows.AffineCoupling):
                module.network.register_forward_hook(lambda *_: calls.append(1))
        return flow, lambda: len(calls)

    # Training

    @property
    def updates(self):
        """Ways in which a user's parameters change, each giving the flow afterwards."""
        return {
            "adam": lambda flow, x: self._step(flow, x, torch.optim.Adam),
            "sgd": lambda flow, x: self._step(flow, x, torch.optim.SGD),
            "clipped_adam": lambda flow, x: self._step(flow, x, ClippedAdam),
            "in_place": self._in_place,
            "data": self._data,
            "vector": self._vector,
            "load_state_dict": lambda flow, x: self.load(flow, base.disturbed(self.state(flow), 9)),
        }

    def _step(self, flow, x, optimizer):
        optimizer = optimizer(flow.parameters(), lr=1e-2)
        (-self.density(flow).log_prob(self.array(x)).mean()).backward()
        optimizer.step()
        flow.zero_grad()
        return flow

    def _in_place(self, flow, x):
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter.add_(0.1)
        return flow

    def _data(self, flow, x):
        for parameter in flow.parameters():
            parameter.data.add_(0.1)
        return flow

    def _vector(self, flow, x):
        vector = torch.nn.utils.parameters_to_vector(flow.parameters()).detach()
        torch.nn.utils.vector_to_parameters(vector + 0.1, flow.parameters())
        return flow

    def train(self, flow, batches, learning_rate):
        """Plain maximum likelihood, without any of the guards of `fit`; gives the losses, too."""
        optimizer = torch.optim.Adam(flow.parameters(), lr=learning_rate)
        losses = []
        for i, batch in enumerate(batches):
            (flow.update if i else flow.initialize)(self.array(batch))
            loss = -self.density(flow).log_prob(self.array(batch)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        pyro.clear_param_store()
        return flow, np.array(losses)
