"""The two hosts, as far as tests of guides need them: arrays in, arrays out."""

import contextlib
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions
import numpyro.infer.autoguide
import numpyro.infer.reparam
import pyro
import pyro.distributions
import pyro.infer.autoguide
import pyro.infer.reparam
import torch
from numpyro.infer.initialization import init_to_value as numpyro_init_to_value
from pyro.infer.autoguide.initialization import init_to_value as pyro_init_to_value

import numpyro_flows
import pyroflows

DRAWS = 1000


class PyroFitted:
    """A guide with its parameters; arrays out."""

    def __init__(self, model, guide, *args):
        self.model, self.guide, self.args = model, guide, args
        pyro.set_rng_seed(0)
        guide(*args)

    def train(self, steps, rate=1e-2, particles=16):
        loss = pyro.infer.Trace_ELBO(num_particles=particles, vectorize_particles=True)
        svi = pyro.infer.SVI(self.model, self.guide, pyro.optim.Adam({"lr": rate}), loss)
        return np.array([svi.step(*self.args) for _ in range(steps)])

    @torch.no_grad()
    def draws(self):
        """Draws of the latent numbers and their log-densities."""
        pyro.set_rng_seed(0)
        posterior = self.guide.get_posterior()
        x = posterior.sample((DRAWS,))
        return x.numpy(), posterior.log_prob(x).numpy()

    def gradient(self, particles=1, seed=0):
        """The gradient of the evidence lower bound in all parameters, as one vector."""
        pyro.set_rng_seed(seed)
        loss = pyro.infer.Trace_ELBO(num_particles=particles, vectorize_particles=True)
        value = loss.differentiable_loss(self.model, self.guide, *self.args)
        parameters = list(self.guide.parameters())
        found = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([gradient.flatten() for gradient in found]).numpy()

    def median(self):
        return {name: value.numpy() for name, value in self.guide.median(*self.args).items()}

    def quantiles(self, levels):
        found = self.guide.quantiles(levels, *self.args)
        return {name: value.numpy() for name, value in found.items()}


class PyroHost:
    """Pyro, as far as a test needs it."""

    name, package, np, Fitted = "pyro", pyroflows, torch, PyroFitted
    dist, guides = pyro.distributions, pyro.infer.autoguide
    sample, factor, plate = staticmethod(pyro.sample), staticmethod(pyro.factor), pyro.plate
    deterministic, param = staticmethod(pyro.deterministic), staticmethod(pyro.param)
    init_to_value = staticmethod(pyro_init_to_value)
    block, scale = staticmethod(pyro.poutine.block), staticmethod(pyro.poutine.scale)
    mask, reparam = staticmethod(pyro.poutine.mask), staticmethod(pyro.poutine.reparam)
    reparams = pyro.infer.reparam

    def array(self, x):
        return torch.as_tensor(np.asarray(x, dtype="float64"))

    def bools(self, x):
        return torch.as_tensor(np.asarray(x, dtype="bool"))

    validation = staticmethod(pyro.validation_enabled)
    eager = staticmethod(contextlib.nullcontext)  # as it always is

    @staticmethod
    def clear():
        """Forget all parameters."""
        pyro.clear_param_store()

    def params(self, guide, *args):
        """The parameters that a guide starts with, where they are not in a store."""
        return {}

    def to_arviz(self, posterior, model=None, seed=0, params=None, **options):
        return pyroflows.to_arviz(posterior, model, seed=seed, **options)

    def log_evidence(self, posterior, model=None, seed=0, params=None, **options):
        return pyroflows.log_evidence(posterior, model, seed=seed, **options)

    def sample_neutra(self, guide, model=None, seed=0, **options):
        return pyroflows.sample_neutra(guide, model, seed=seed, **options)

    @torch.no_grad()
    def drawn(self, guide, result):
        """Draws of a guide that has been fitted, and their log-densities."""
        assert result.guide is guide
        posterior = guide.get_posterior()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            x = posterior.sample((DRAWS,))
        return x.numpy(), posterior.log_prob(x).numpy()

    @torch.no_grad()
    def density_at(self, result, x):
        """The log-density of a fitted guide at unconstrained coordinates."""
        return result.guide.get_posterior().log_prob(torch.as_tensor(x)).numpy()

    def quantiles(self, result, levels):
        """Those of each site in a fitted guide."""
        return {n: value.numpy() for n, value in result.guide.quantiles(levels).items()}

    def going_on(self, result):
        """Arguments of `fit_guide` to go on from an earlier result."""
        return {}

    def named(self, name):
        """The argument of a guide that gives its parameters a name."""
        return {"name": name}

    def unfitted(self, guide):
        """What `drawn` takes for a guide at its start."""
        guide()
        return types.SimpleNamespace(guide=guide)

    def stored(self):
        """The parameters that the host holds."""
        return {name: value.tolist() for name, value in pyro.get_param_store().items()}

    def bound(self):
        """An evidence lower bound."""
        return pyro.infer.Trace_ELBO()

    def conditioned(self, model, values):
        """The model at values of its latent sites."""
        return pyro.poutine.condition(model, values)

    @torch.no_grad()
    def log_density(self, model):
        """The log-density of a model and the values of its sites."""
        trace = pyro.poutine.trace(model).get_trace()
        sites = {n: s["value"].numpy() for n, s in trace.nodes.items() if s["type"] == "sample"}
        return float(trace.log_prob_sum()), sites

    def straight(self, size):
        """A flow that is the identity at its start, exactly."""
        return pyroflows.nice(size, layers=2, hidden=(4,), init_scale=0.0)


def draws_of(guide):
    """A program for draws of the latent numbers of a NumPyro guide and their log-densities."""

    @jax.jit
    def draws(params):
        posterior = guide.get_posterior(params)
        x = posterior.sample(jax.random.key(0), (DRAWS,))
        # The host's own posteriors may have one density for each number.
        return x, posterior.log_prob(x).reshape(DRAWS, -1).sum(1)

    return draws


class NumPyroFitted:
    """As Pyro's."""

    def __init__(self, model, guide, *args):
        self.model, self.guide, self.args = model, guide, args
        self.params = HOSTS["numpyro"].params(guide, *args)

    def train(self, steps, rate=1e-2, particles=16):
        loss = numpyro.infer.Trace_ELBO(particles)
        svi = numpyro.infer.SVI(self.model, self.guide, numpyro.optim.Adam(rate), loss)

        @jax.jit
        def run(params):  # `svi.run` sets up outside of its program, in a hundred small ones
            state = svi.init(jax.random.key(0), *self.args, init_params=params)
            state, losses = jax.lax.scan(
                lambda state, _: svi.update(state, *self.args), state, None, steps
            )
            return svi.get_params(state), losses

        self.params, losses = run(self.params)
        return np.asarray(losses)

    def draws(self):
        return tuple(map(np.asarray, self._draws(self.params)))

    @functools.cached_property
    def _draws(self):
        return draws_of(self.guide)

    def gradient(self, particles=1, seed=0):
        loss = numpyro.infer.Trace_ELBO(particles)

        @jax.jit
        @jax.grad
        def gradient(params, key):
            return loss.loss(key, params, self.model, self.guide, *self.args)

        found = gradient(self.params, jax.random.key(seed))
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(found)])

    def median(self):
        return jax.tree.map(np.asarray, jax.jit(self.guide.median)(self.params))

    def quantiles(self, levels):
        found = jax.jit(lambda params: self.guide.quantiles(params, levels))(self.params)
        return jax.tree.map(np.asarray, found)


class NumPyroHost:
    """NumPyro, as far as a test needs it."""

    name, package, np, Fitted = "numpyro", numpyro_flows, jnp, NumPyroFitted
    dist, guides = numpyro.distributions, numpyro.infer.autoguide
    sample, factor = staticmethod(numpyro.sample), staticmethod(numpyro.factor)
    plate, deterministic = numpyro.plate, staticmethod(numpyro.deterministic)
    param = staticmethod(numpyro.param)
    init_to_value = staticmethod(numpyro_init_to_value)
    block, scale, mask = numpyro.handlers.block, numpyro.handlers.scale, numpyro.handlers.mask
    reparam, reparams = numpyro.handlers.reparam, numpyro.infer.reparam

    def array(self, x):
        return jnp.asarray(x, dtype="float64")

    def bools(self, x):
        return jnp.asarray(x, dtype="bool")

    compiles = True  # the set-up of guides: one program in place of a hundred

    @contextlib.contextmanager
    def eager(self):
        """Set guides up as a user would who calls them: with warnings about their numbers."""
        self.compiles = False
        try:
            yield
        finally:
            self.compiles = True

    @contextlib.contextmanager
    def validation(self):
        """NumPyro validates numbers only, and not what is being compiled."""
        with self.eager(), numpyro.validation_enabled():
            yield

    @staticmethod
    def clear():
        """As Pyro's: nothing is kept."""

    def params(self, guide, *args):
        """As Pyro's."""

        def run():
            seeded = numpyro.handlers.seed(guide, jax.random.key(0))
            trace = numpyro.handlers.trace(seeded).get_trace(*args)
            return {name: site["value"] for name, site in trace.items() if site["type"] == "param"}

        return jax.jit(run)() if self.compiles else run()

    def to_arviz(self, posterior, model=None, seed=0, **options):
        return numpyro_flows.to_arviz(posterior, model, key=jax.random.key(seed), **options)

    def log_evidence(self, posterior, model=None, seed=0, **options):
        return numpyro_flows.log_evidence(posterior, model, key=jax.random.key(seed), **options)

    def sample_neutra(self, guide, model=None, seed=0, **options):
        return numpyro_flows.sample_neutra(guide, model, key=jax.random.key(seed), **options)

    def drawn(self, guide, result):
        """As Pyro's."""
        return tuple(map(np.asarray, draws_of(guide)(result.params)))

    def unfitted(self, guide):
        """As Pyro's."""
        return types.SimpleNamespace(guide=guide, params=self.params(guide))

    def stored(self):
        """As Pyro's: nothing is held."""

    def density_at(self, result, x):
        """As Pyro's."""
        return np.asarray(jax.jit(result.guide.get_posterior(result.params).log_prob)(x))

    def quantiles(self, result, levels):
        """As Pyro's."""
        return jax.tree.map(np.asarray, result.guide.quantiles(result.params, levels))

    def going_on(self, result):
        """As Pyro's."""
        return {"params": result.params}

    def named(self, name):
        """As Pyro's."""
        return {"prefix": name}

    def bound(self):
        """As Pyro's."""
        return numpyro.infer.Trace_ELBO()

    def conditioned(self, model, values):
        """As Pyro's."""
        return numpyro.handlers.condition(model, values)

    def log_density(self, model):
        """As Pyro's."""
        density, trace = numpyro.infer.util.log_density(model, (), {}, {})
        return float(density), {name: np.asarray(site["value"]) for name, site in trace.items()}

    def straight(self, size, key):
        """As Pyro's."""
        return numpyro_flows.nice(size, layers=2, hidden=(4,), init_scale=0.0, key=key)


HOSTS = {host.name: host for host in (PyroHost(), NumPyroHost())}


def small(host, model, kind="AutoRealNVP", **options):
    """A guide of few and small couplings."""
    return getattr(host.package, kind)(model, **{"layers": 2, "hidden": (4,), **options})


def started(host, model, *args, **options):
    return host.Fitted(model, small(host, model, **options), *args)


def gaussian(host, model, *args, **options):
    """A guide that is exactly Gaussian at its start."""
    options = {"degrees_of_freedom": None, **options}
    return host.Fitted(model, host.package.AutoFlow(model, host.straight, **options), *args)


def of_density(host, log_density, size=3):
    """The model whose posterior has this log-density."""

    def model():
        base = host.dist.Normal(host.array(np.zeros(size)), host.array(1.0))
        x = host.sample("x", base.to_event(1).mask(False))
        host.factor("density", log_density(host.np, x))

    return model
