"""Importance weights: the draws of a guide, weighed against its model."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.infer.util import log_density

from pyroflows_common.checks import Inputs

# Draws that are made, or whose model is evaluated, at once.
BLOCK = 250


class Sites(NamedTuple):
    """The sites of one run, by their names."""

    latent: dict[str, Any]
    observed: dict[str, Any]  # without factors
    deterministic: dict[str, Any]


class Draws(NamedTuple):
    """Draws of a guide, and what the model makes of them: the first dimension is that of draws."""

    sites: Sites
    values: dict[str, np.ndarray]
    log_q: np.ndarray
    log_p: np.ndarray
    log_likelihood: dict[str, np.ndarray]
    deterministic: dict[str, np.ndarray]


def draw(posterior: Any, model: Any, params: Any, inputs: Inputs, draws: int, key: Array) -> Draws:
    """Draw from a guide or a density, and evaluate the model at each draw."""
    first, keys, last = jax.random.split(key, 3)
    guide = _guide_of(posterior, model, params, inputs, first)
    sites = _match(guide, model, params, inputs, first)
    values, log_q = _sample(guide, params, inputs, jax.random.split(keys, draws), sites.latent)
    for name, value in values.items():
        if value.dtype.kind == "f" and value.size and (value == value[0]).all():
            raise ValueError(
                f"`posterior` gives site {name!r} the same value in all {draws} draws: a point "
                "has no density to weigh; use a guide with a width"
            )
    return Draws(sites, values, log_q, *_evaluate(model, params, inputs, values, last))


def _run(function: Any, params: Any, inputs: Inputs, key: Array) -> Any:
    """Run a guide or a model once, and refuse what misses a parameter."""
    seeded = handlers.seed(handlers.substitute(function, data=params), key)
    trace = handlers.trace(seeded).get_trace(*inputs[0], **inputs[1])
    missing = sorted(n for n, s in trace.items() if s["type"] == "param" and n not in params)
    if missing:
        raise ValueError(
            f"`params` has no {missing}: expected all parameters of guide and model, such as "
            "svi_result.params"
        )
    return trace


def _sites(trace: Any) -> Sites:
    sites = Sites({}, {}, {})
    for name, site in trace.items():
        if site["type"] == "deterministic":
            sites.deterministic[name] = site
        elif site["type"] == "sample" and not site["is_observed"]:
            sites.latent[name] = site
        elif site["type"] == "sample" and np.size(site["value"]):  # that of a factor is empty
            sites.observed[name] = site
    return sites


def _guide_of(posterior: Any, model: Any, params: Any, inputs: Inputs, key: Array) -> Any:
    """Return the guide, or one that draws the model's only site from a density."""
    if not isinstance(posterior, dist.Distribution):
        return posterior
    latent = _sites(_run(model, params, inputs, key)).latent
    if len(latent) != 1:
        raise ValueError(
            f"`posterior` is a density, but `model` has the latent sites {sorted(latent)}: "
            "expected one; use a guide"
        )
    ((name, site),) = latent.items()
    support, batch = site["fn"].support, tuple(posterior.batch_shape)
    shape, expected = tuple(posterior.event_shape), tuple(site["fn"].shape())
    if not isinstance(_each(support), type(constraints.real)):
        raise ValueError(
            f"`posterior` is a density on the real line, but site {name!r} of `model` has the "
            f"support {support}: use a guide"
        )
    if batch:
        raise ValueError(
            f"`posterior` is a batch of densities of shape {batch}, expected one: of a "
            "conditional flow, give one context"
        )
    if shape != expected:
        raise ValueError(
            f"`posterior` has events of shape {shape}, but site {name!r} of `model` has shape "
            f"{expected}"
        )
    return lambda *args, **kwargs: numpyro.sample(name, posterior)


def _match(guide: Any, model: Any, params: Any, inputs: Inputs, key: Array) -> Sites:
    """Return the sites of the model, and refuse what cannot be weighed."""
    guide_trace = _run(guide, params, inputs, key)
    trace = _run(handlers.replay(model, guide_trace), params, inputs, key)
    guide_sites, sites = _sites(guide_trace), _sites(trace)
    auxiliary = {n for n, s in guide_sites.latent.items() if s["infer"].get("is_auxiliary")}
    missing = sorted(set(sites.latent) - set(guide_sites.latent))
    surplus = sorted(set(guide_sites.latent) - set(sites.latent) - auxiliary)
    if missing or not sites.latent:
        raise ValueError(
            f"`posterior` does not draw the latent sites {missing} of `model`: expected all of "
            "them; sum discrete ones out in the model"
        )
    if surplus:
        raise ValueError(
            f"`posterior` draws the sites {surplus}, which `model` does not have: mark auxiliary "
            "ones with infer={'is_auxiliary': True}"
        )
    for name, site in sites.latent.items():
        shape, expected = np.shape(site["value"]), tuple(site["fn"].shape())
        if shape != expected:
            raise ValueError(
                f"`posterior` draws site {name!r} with shape {shape}, but in `model` it has shape "
                f"{expected}"
            )
    everything = (*guide_trace.values(), *trace.values())
    for name, (full, size) in ((s["name"], s["args"]) for s in everything if s["type"] == "plate"):
        if size not in (None, full):
            raise ValueError(
                f"plate {name!r} takes a subsample, {size} of {full}: the ratios need all of the "
                "data; choose `args` or `kwargs` so that the model does"
            )
    return sites


def _sample(
    guide: Any, params: Any, inputs: Inputs, keys: Array, names: Iterable[str]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Draw each site with the log-density of each draw."""

    def one(key: Array) -> tuple[dict[str, Array], Array]:
        log_q, trace = log_density(handlers.seed(guide, key), *inputs, params)
        return {name: trace[name]["value"] for name in names}, log_q

    values, log_q = _mapped(one, keys, len(keys))
    return {name: values[name] for name in names}, log_q  # JAX has sorted them


def _evaluate(
    model: Any, params: Any, inputs: Inputs, values: dict[str, np.ndarray], key: Array
) -> tuple[Any, ...]:
    """Return log joint densities, log-likelihoods of observations and deterministic values."""

    def one(values: dict[str, Array]) -> tuple[Any, ...]:
        log_p, trace = log_density(handlers.seed(model, key), *inputs, {**params, **values})
        for name in values:
            log_p = jnp.where(_inside(trace[name]), log_p, -jnp.inf)
        sites = _sites(trace)
        log_likelihood = {n: s["fn"].log_prob(s["value"]) for n, s in sites.observed.items()}
        return log_p, log_likelihood, {n: s["value"] for n, s in sites.deterministic.items()}

    draws = len(next(iter(values.values())))
    return _mapped(one, values, draws)


def _mapped(function: Callable[..., Any], inputs: Any, draws: int) -> Any:
    """Map over the first dimension, some draws at once.

    Without jit: to compile a guide takes longer than to run it, and is done anew in each call.
    """
    blocks = [
        jax.device_get(jax.vmap(function)(jax.tree.map(lambda x, i=i: x[i : i + BLOCK], inputs)))
        for i in range(0, draws, BLOCK)
    ]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *blocks)


def _each(support: Any) -> Any:
    """Return the constraint on each number of an event."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def _inside(site: Any) -> Any:
    """Whether a value lies in the support of its site, where that is a matter of each number."""
    support = site["fn"].support
    if _each(support).event_dim:  # a simplex or a matrix, whose conditions hold up to rounding
        return True
    return jnp.all(support(site["value"]))
