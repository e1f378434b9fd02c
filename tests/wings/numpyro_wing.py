"""The NumPyro wing behind NumPy arrays."""

import copy
import functools
import pickle
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax

import numpyro_flows
from numpyro_flows.tree import replace, trainable
from tests.wings import base

# The laws are checked in float64; what they build in float32 stays in it.
jax.config.update("jax_enable_x64", True)
adam = functools.cache(optax.adam)


class OwnNetwork(eqx.Module):
    n_in: int = eqx.field(static=True)
    n_out: int = eqx.field(static=True)

    def __init__(self, n_in, n_out, key=None):
        self.n_in, self.n_out = n_in, n_out

    def __call__(self, x):
        weight = np.cos(np.arange(self.n_in * self.n_out)).reshape(self.n_in, self.n_out)
        return jnp.sin(x @ jnp.asarray(weight, x.dtype))


class OwnConvolution(OwnNetwork):
    def __call__(self, x):
        return jnp.moveaxis(super().__call__(jnp.moveaxis(x, -3, -1)), -1, -3)


NETWORKS = (numpyro_flows.DenseNet, numpyro_flows.ConvNet, numpyro_flows.ResNet, OwnNetwork)


def own_scale(r):
    return 0.5 * jnp.sin(r)


class Counter:
    calls = 0

    def __call__(self, *_):
        self.calls += 1


COUNTER = Counter()  # one for all spies, so that a program with a spy is compiled once


class Spy(eqx.Module):
    """A network that counts its evaluations as they run, not as they are traced."""

    network: eqx.Module

    def __call__(self, *args):
        # A scan's gradient takes what does not depend on the block out of the loop: let it depend.
        weights = jax.tree.leaves(eqx.filter(self.network, eqx.is_array))
        jax.debug.callback(COUNTER, *weights[:1])
        return self.network(*args)


@eqx.filter_jit
def step(flow, moments, batch, optimizer):
    """One step of maximum likelihood."""
    parameters, state = eqx.partition(flow, trainable(flow))

    def loss(parameters):
        flow = eqx.combine(parameters, state)
        return -numpyro_flows.flow_distribution(flow).log_prob(batch).mean()

    value, gradients = jax.value_and_grad(loss)(parameters)
    changes, moments = optimizer.update(gradients, moments)
    parameters = optax.apply_updates(parameters, changes)
    return eqx.combine(parameters, state), moments, value


@eqx.filter_jit
def gradients(parameters, state, x, context):
    """Gradients of the summed log-density in the flow's parameters and in x."""

    def total(parameters, x):
        flow = eqx.combine(parameters, state)
        return numpyro_flows.flow_distribution(flow, context=context).log_prob(x).sum()

    return jax.grad(total, (0, 1))(parameters, x)


@eqx.filter_jit
def jacobians(flow, latents):
    return jax.vmap(jax.jacfwd(flow))(latents)


class NumPyroWing(base.Wing):
    name = "numpyro"
    # Two where nothing is compiled; XLA merges the two under `jit`.
    evaluations_of_sample_and_log_prob, evaluations_of_log_prob = 1, 2
    draws_float32 = False  # where JAX has float64 enabled, the host draws in nothing else
    package = numpyro_flows
    own_network = OwnNetwork
    own_convolution = OwnConvolution
    own_scale = staticmethod(own_scale)

    # Arrays

    def key(self, seed):
        return jax.random.key(seed)

    def array(self, x):
        return jax.device_put(np.array(x))  # `jnp.asarray` compiles a program for each shape

    def numpy(self, x):
        return np.asarray(x)

    # Flows

    @functools.cache  # noqa: B019, flows are values: one serves all tests
    def build(self, case, seed=0, dtype="float64", noise=0.3):
        return super().build(case, seed, dtype, noise)

    def cast(self, flow, dtype):
        # In NumPy, because `flow.astype` compiles a program for each shape.
        def moved(array):
            return self.array(np.asarray(array).astype(dtype))

        return jax.tree.map(lambda a: moved(a) if eqx.is_inexact_array(a) else a, flow)

    def state(self, flow):
        return {name: np.array(value) for name, value in flow.state_dict().items()}

    def load(self, flow, state):
        return flow.load_state_dict(state)

    def with_setting(self, flow, inner, setting, value):
        """The flow, with a setting of the module named `inner` changed by hand."""

        def module(node):
            for name in inner.split("."):
                node = node[int(name)] if name.isdigit() else getattr(node, name)
            return node

        return eqx.tree_at(module, flow, replace(module(flow), **{setting: value}))

    def copies(self, flow):
        return {"deepcopy": copy.deepcopy(flow), "pickle": pickle.loads(pickle.dumps(flow))}

    def initialize(self, flow, x, context=None):
        return flow.initialize(self.array(x), *([] if context is None else [self.array(context)]))

    def update(self, flow, x, context=None):
        return flow.update(self.array(x), *([] if context is None else [self.array(context)]))

    def standardize(self, layer, x):
        return layer.standardize(self.array(x))

    def dequantize(self, x, seed, **options):
        return numpyro_flows.dequantize(x, self.key(seed), **options)

    # The pair

    def forward(self, flow, x, context=None):
        return self._numpy(self.given(flow, context).forward_and_ladj(self.array(x)))

    def inverse(self, flow, y, context=None):
        return self._numpy(self.given(flow, context).inverse_and_ladj(self.array(y)))

    def _numpy(self, pair):
        return tuple(map(self.numpy, pair))

    def jacobian(self, flow, latents, context=None):
        """One Jacobian a point, by autodiff of the host's own call."""
        flow, size = self.given(flow, context), latents[0].size
        return self.numpy(jacobians(flow, self.array(latents))).reshape(-1, size, size)

    # What the host calls

    def call(self, flow, x, context=None):
        """`flow(x)` and `log_abs_det_jacobian` of the pair."""
        flow, x = self.given(flow, context), self.array(x)
        y = flow(x)
        return self._numpy((y, flow.log_abs_det_jacobian(x, y)))

    def call_inverse(self, flow, y, context=None):
        """`flow.inv(y)` and the log-determinant of that direction."""
        inverse, y = self.given(flow, context).inv, self.array(y)
        x = inverse(y)
        return self._numpy((x, inverse.log_abs_det_jacobian(y, x)))

    def dtypes(self, function, flow, density, *points):
        """Names of the dtypes that a function of them returns, which JAX can tell without it."""
        arrays = map(self.array, points)
        return [str(a.dtype) for a in eqx.filter_eval_shape(function, flow, density, *arrays)]

    def satisfies(self, constraint, x):
        return self.numpy(constraint(self.array(x)))

    # Densities

    def normal_base(self, shape, loc, scale, dtype="float64"):
        """A base of the user's own."""
        loc = jnp.full(shape, loc, dtype)
        return dist.Normal(loc, jnp.asarray(scale, dtype)).to_event(len(shape))

    def biject_to(self, support, x):
        return self.numpy(dist.biject_to(support)(self.array(x)))

    def uniform_base(self, shape, low, high, dtype="float32"):
        low, high = (jnp.full(shape, bound, dtype) for bound in (low, high))
        return dist.Uniform(low, high).to_event(len(shape))

    def two_peaks(self, *places, weights):
        """A base over vectors of one number: a mixture of two normals."""
        weights, places = (jnp.array(numbers, jnp.float32) for numbers in (weights, places))
        peaks = dist.Normal(places[:, None], jnp.array(0.5, jnp.float32)).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(weights), peaks)

    def poisson_base(self, shape):
        return dist.Poisson(jnp.ones(shape)).to_event(len(shape))

    def logistic_base(self, shape):
        return dist.Logistic(jnp.zeros(shape), jnp.ones(shape)).to_event(len(shape))

    def host_density(self, flow, base_density, context=None):
        return dist.TransformedDistribution(base_density, [self.given(flow, context)])

    def log_prob(self, density, x):
        return self.numpy(density.log_prob(self.array(x)))

    def sample(self, density, shape, seed=0):
        return self.numpy(density.sample(self.key(seed), shape))

    def sample_and_log_prob(self, density, shape, seed=0):
        """A sample and its log-density in the host's cheapest way."""
        x, intermediates = density.sample_with_intermediates(self.key(seed), shape)
        return self._numpy((x, density.log_prob(x, intermediates)))

    def drawn(self, density, shape):
        """A sample and its log-density, with the host's own objects that must stay alive."""
        x = density.sample(self.key(0), shape)
        log_prob = density.log_prob(x)
        arrays = {"sample": np.array(x), "log_prob": np.array(log_prob)}
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
        """The distribution after an update of its flow: flows are values, so it is a new one."""
        return self.density(flow)

    def decoded(self, density, flow, z):
        """`flow(z)` and its log-density, in one go."""
        x = flow(self.array(z))
        return self._numpy((x, density.log_prob(x)))

    def context_gradient(self, flow, x, context):
        """The gradient of the summed log-density in the context."""

        def total(context):
            density = numpyro_flows.flow_distribution(flow, context=context)
            return density.log_prob(self.array(x)).sum()

        return self.numpy(jax.grad(total)(self.array(context)))

    def gradients(self, flow, x, context=None):
        """The gradient of the summed log-density in every parameter and in x."""
        parameters, state = eqx.partition(flow, trainable(flow))
        context = None if context is None else self.array(context)
        of_flow, of_x = gradients(parameters, state, self.array(x), context)
        named = {name: self.numpy(grad) for name, grad in of_flow.state_dict().items()}
        return {"x": self.numpy(of_x), **named}

    # Spies

    def spied(self, flow):
        """The flow, and a function that tells how often its conditioners have been evaluated."""

        def is_network(node):
            return isinstance(node, NETWORKS)

        flow = jax.tree.map(
            lambda node: Spy(node) if is_network(node) else node, flow, is_leaf=is_network
        )
        jax.effects_barrier()
        COUNTER.calls = 0

        def count():
            jax.effects_barrier()
            return COUNTER.calls

        return flow, count

    # Training

    @property
    def updates(self):
        """Ways in which a user's parameters change, each giving the flow afterwards."""
        return {
            "adam": lambda flow, x: self._trained(flow, [x], 1e-2)[0],
            "in_place": self._moved,
            "load_state_dict": lambda flow, x: self.load(flow, base.disturbed(self.state(flow), 9)),
        }

    def _moved(self, flow, x):
        parameters, state = eqx.partition(flow, trainable(flow))
        moved = jax.tree.map(lambda p: self.array(np.asarray(p) + 0.1), parameters)
        return eqx.combine(moved, state)

    def train(self, flow, batches, learning_rate):
        """Plain maximum likelihood, without any of the guards of `fit`; gives the losses, too."""
        return self._trained(flow.initialize(self.array(batches[0])), batches, learning_rate)

    def _trained(self, flow, batches, learning_rate):
        optimizer = adam(learning_rate)
        moments = optimizer.init(eqx.filter(flow, trainable(flow)))
        losses = []
        for batch in map(self.array, batches):
            flow = flow.update(batch) if losses else flow
            flow, moments, loss = step(flow, moments, batch, optimizer)
            losses.append(loss)
        return flow, np.array(losses)
