"""Importance weights: the draws of a guide, and their densities in guide and model."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.infer import Predictive
from numpyro.infer.util import log_density
from numpyro.primitives import Messenger

from numpyro_flows.compiling import effort
from pyroflows_common.checks import Inputs
from pyroflows_common.sites import Draws, Sites, check_match, check_plates, check_widths, site_of

# Most draws that are made, or at which the model is evaluated, at once, and the most numbers that
# these have, latent and observed. With fewer draws at once, optimisation pays.
MANY, NUMBERS, FEW = 2500, 2**22, 250

Model = Callable[..., Any]  # or a guide
Params = Mapping[str, Any]
Trace = dict[str, dict[str, Any]]


def as_params(params: Params | None) -> dict[str, Any]:
    """Check the parameters of guide and model, and return them as a dict."""
    if not isinstance(params, Mapping | None):
        raise TypeError(
            f"`params` is a {type(params).__name__}, expected a dictionary such as "
            "svi_result.params"
        )
    return dict(params or {})


class Matched(NamedTuple):
    """A guide and the sites of its model, which fit each other."""

    guide: Model  # of a density, one that draws the model's only site from it
    drawn: Sites  # those of the guide
    sites: Sites  # those of the model

    @property
    def block(self) -> int:
        """Largest number of draws to evaluate at once."""
        sites = (*self.sites.latent.values(), *self.sites.observed.values())
        numbers = sum(np.size(site["value"]) for site in sites)
        return min(max(NUMBERS // numbers, 1), MANY)


def match(posterior: Any, model: Model, params: Params, inputs: Inputs, key: Array) -> Matched:
    """Return the guide with the sites of its model, and check that the draws can be weighed."""
    guide = _guide_of(posterior, model, params, inputs, key)
    guide_trace = _run(guide, params, inputs, key)
    trace = _run(handlers.replay(model, guide_trace), params, inputs, key)
    matched = Matched(guide, _sites(guide_trace), _sites(trace))
    check_match(matched.drawn, matched.sites)
    nodes = [s for t in (guide_trace, trace) for s in t.values() if s["type"] == "plate"]
    check_plates((site["name"], *reversed(site["args"])) for site in nodes)
    return matched


def sample(
    matched: Matched, params: Params, inputs: Inputs, draws: int, key: Array
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Draw each site, with the log-density of each draw."""
    names = matched.sites.latent

    def one(key: Array) -> tuple[dict[str, Array], Array]:
        log_q, trace = log_density(handlers.seed(matched.guide, key), *inputs, params)
        return {name: trace[name]["value"] for name in names}, log_q

    values, log_q = mapped(one, jax.random.split(key, draws), draws, matched.block)
    check_widths(values)
    return {name: values[name] for name in names}, log_q  # JAX has sorted them


def log_joints(
    matched: Matched,
    model: Model,
    params: Params,
    inputs: Inputs,
    values: dict[str, np.ndarray],
    key: Array,
) -> np.ndarray:
    """Return the log joint density of each draw."""

    def one(values: dict[str, Array]) -> Array:
        return log_joint(model, params, inputs, values, key)[0]

    return mapped(one, values, len(next(iter(values.values()))), matched.block)


def log_joint(
    model: Model, params: Params, inputs: Inputs, values: dict[str, Array], key: Array
) -> tuple[Array, Trace]:
    """Return the log joint density of one draw, and the trace of the model there."""
    log_p, trace = log_density(handlers.seed(model, key), *inputs, {**params, **values})
    for name in values:
        log_p = jnp.where(_inside(trace[name]), log_p, -jnp.inf)
    return log_p, trace


def evaluate(
    matched: Matched,
    model: Model,
    params: Params,
    inputs: Inputs,
    values: dict[str, np.ndarray],
    log_q: np.ndarray,
    key: Array,
) -> Draws[np.ndarray]:
    """Return the draws of a guide with what the model makes of them."""

    def one(values: dict[str, Array]) -> tuple[Any, ...]:
        log_p, trace = log_joint(model, params, inputs, values, key)
        sites = _sites(trace)
        log_likelihood = {n: s["fn"].log_prob(s["value"]) for n, s in sites.observed.items()}
        return log_p, log_likelihood, {n: s["value"] for n, s in sites.deterministic.items()}

    found = mapped(one, values, len(log_q), matched.block)
    sites = matched.sites
    observed = {name: np.asarray(site["value"]) for name, site in sites.observed.items()}
    return Draws(sites, observed, values, log_q, *found)


def simulate(
    model: Model,
    params: Params,
    inputs: Inputs,
    drawn: Draws[np.ndarray],
    index: Sequence[int] | np.ndarray,
    key: Array,
) -> dict[str, np.ndarray]:
    """Draw the observations of a model again, at some of a guide's draws."""
    values = {name: value[index] for name, value in drawn.values.items()}
    names = list(drawn.observed)
    predict = Predictive(_Unobserved(model, names), values, params=params, return_sites=names)
    return jax.device_get(predict(key, *inputs[0], **inputs[1]))


class _Unobserved(Messenger):
    """A model that draws some of its observations, in the shape of their data.

    It draws those inside of `scan` and `cond`, too.
    """

    def __init__(self, model: Model, names: Collection[str]) -> None:
        super().__init__(model)
        self.names = names

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "control_flow":  # its functions are hidden from handlers outside
            args = list(msg["args"])
            functions = slice(0, 1) if callable(args[0]) else slice(1, 3)  # of scan; of cond
            args[functions] = [_Unobserved(function, self.names) for function in args[functions]]
            msg["args"] = tuple(args)
        elif msg["type"] == "sample" and msg["is_observed"] and msg["name"] in self.names:
            fn, shape = msg["fn"], jnp.shape(msg["value"])
            batch = jnp.broadcast_shapes(shape[: len(shape) - fn.event_dim], fn.batch_shape)
            msg["fn"] = fn if batch == fn.batch_shape else fn.expand(batch)
            msg["is_observed"], msg["value"] = False, None


def _run(function: Model, params: Params, inputs: Inputs, key: Array) -> Trace:
    """Run a guide or a model once, and check that no parameter is missing."""
    seeded = handlers.seed(handlers.substitute(function, data=params), key)
    trace = handlers.trace(seeded).get_trace(*inputs[0], **inputs[1])
    missing = sorted(n for n, s in trace.items() if s["type"] == "param" and n not in params)
    if missing:
        raise ValueError(
            f"`params` has no {missing}: expected all parameters of guide and model, such as "
            "svi_result.params"
        )
    return trace


def _sites(trace: Trace) -> Sites:
    sites = Sites({}, {}, {})
    for name, site in trace.items():
        if site["type"] == "deterministic":
            sites.deterministic[name] = site
        elif site["type"] == "sample" and not site["is_observed"]:
            sites.latent[name] = site
        elif site["type"] == "sample" and np.size(site["value"]):  # a factor has no value
            sites.observed[name] = site
    return sites


def _guide_of(posterior: Any, model: Model, params: Params, inputs: Inputs, key: Array) -> Model:
    """Return the guide, or one that draws the model's only site from a density."""
    if not isinstance(posterior, dist.Distribution):
        return posterior
    name = site_of(posterior, _sites(_run(model, params, inputs, key)), _is_real)
    return lambda *args, **kwargs: numpyro.sample(name, posterior)


def mapped(function: Callable[..., Any], inputs: Any, draws: int, block: int) -> Any:
    """Map over the first dimension, block by block.

    The program is optimised only where there are many blocks: it runs seldom, and each call
    compiles it anew. All blocks have the same size.
    """
    function = jax.vmap(function)
    compiled: Callable[..., Any] = jax.jit(
        function, compiler_options=None if block < FEW else effort(0)
    )
    size = math.ceil(draws / math.ceil(draws / block))
    blocks = []
    for start in range(0, draws, size):
        index = np.arange(start, start + size).clip(max=draws - 1)  # the last repeats its end
        taken = jax.tree.map(lambda x, index=index: x[index], inputs)
        try:
            blocks.append(jax.device_get(compiled(taken)))
        except jax.errors.JAXTypeError:  # the model needs values
            compiled = function
            blocks.append(jax.device_get(compiled(taken)))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:draws], *blocks)


def _each(support: Any) -> Any:
    """Return the constraint on each number of an event."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def _is_real(support: Any) -> bool:
    return isinstance(_each(support), type(constraints.real))


def _inside(site: dict[str, Any]) -> bool | Array:
    """Return whether a value lies in the support of its site, if each number decides for itself."""
    support = site["fn"].support
    if _each(support).event_dim:  # a simplex or a matrix: its conditions hold up to rounding
        return True
    return jnp.all(support(site["value"]))
