"""Importance weights of a guide with local sites: those of its global sites, and of each row."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from jaxtyping import Float
from numpyro import handlers

from numpyro_flows.guides import importance
from numpyro_flows.guides.autoflow import AutoFlow
from numpyro_flows.guides.importance import Matched, Model, Params
from numpyro_flows.guides.local import Taken
from numpyro_flows.guides.rows import Rows
from pyroflows_common.checks import Inputs
from pyroflows_common.laplace import quadrature
from pyroflows_common.local import EQUAL, SURE, TRIED
from pyroflows_common.sites import Draws


class Weighed(NamedTuple):
    """Draws of a guide with their log-densities.

    Args:
        values: those of each latent site.
        log_q: `(draws,)`, log-density in the guide; with local sites, of the global ones.
        log_p: `(draws,)`, in the model; with local sites, these are integrated out.
        joint: `(draws,)`, log ratio of all sites; None without local ones.
    """

    values: dict[str, np.ndarray]
    log_q: np.ndarray
    log_p: np.ndarray
    joint: np.ndarray | None


def sample(
    posterior: Any,
    matched: Matched,
    model: Model,
    params: Params,
    inputs: Inputs,
    draws: int,
    key: Array,
    last: Array,
) -> Weighed:
    """Draw from a guide, with the log-densities of each draw in guide and model.

    With local sites, these are integrated out of the model row by row, by quadrature or importance
    sampling, and each row is drawn again by its weights.
    """
    if has_rows(posterior):
        return _with_rows(posterior, matched, model, params, inputs, draws, key)
    values, log_q = importance.sample(matched, params, inputs, draws, key)
    log_p = importance.log_joints(matched, model, params, inputs, values, last)
    return Weighed(values, log_q, log_p, None)


def draw(
    posterior: Any, model: Model, params: Params, inputs: Inputs, draws: int, key: Array
) -> Draws[np.ndarray]:
    """Draw from a guide or a density, and evaluate the model at each draw."""
    first, keys, last = jax.random.split(key, 3)
    matched = importance.match(posterior, model, params, inputs, first)
    if not has_rows(posterior):
        values, log_q = importance.sample(matched, params, inputs, draws, keys)
        return importance.evaluate(matched, model, params, inputs, values, log_q, last)
    found = _with_rows(posterior, matched, model, params, inputs, draws, keys)
    values = found.values
    drawn = importance.evaluate(matched, model, params, inputs, values, found.log_q, last)
    # The ratio is that of the global sites, but the density of the draws is that of all sites.
    ratio = np.subtract(found.log_p, found.log_q, dtype=float)
    return drawn._replace(log_q=drawn.log_p.astype(float) - ratio, joint=found.joint)


def has_rows(posterior: Any) -> bool:
    """Return whether a guide has local sites."""
    return isinstance(posterior, AutoFlow) and posterior._groups is not None


def log_mean(ratios: Float[Array, "K N"]) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """Return the logarithm of the mean of each row's ratios, and its standard error.

    The mean is without its bias of first order.

    The ratios come in pairs of opposite noise.
    """
    top = ratios.max(0)
    shares = jnp.exp(ratios - jnp.where(jnp.isfinite(top), top, 0.0))
    pairs = shares.reshape(2, -1, shares.shape[-1]).mean(0)
    mean = pairs.mean(0)
    variance = pairs.var(0, ddof=1) / (len(pairs) * mean**2)
    return top + jnp.log(mean) + 0.5 * variance, jnp.sqrt(variance)


def _with_rows(
    posterior: Any,
    matched: Matched,
    model: Model,
    params: Params,
    inputs: Inputs,
    draws: int,
    key: Array,
) -> Weighed:
    groups = posterior._groups
    size, _ = groups.taken(model, inputs)
    layout = groups.layout._replace(size=size, taken=size)
    locs = {name: jnp.asarray(loc) for name, loc in posterior._init_locs.items()}
    rows = Rows(handlers.substitute(model, params), inputs, layout, locs)
    index = jnp.arange(size)
    features = groups.features_of(index, size, inputs)
    flow, local = handlers.substitute(posterior._modules, params)()
    base, rule = posterior.get_base_dist(), None
    if groups.encoding is None and local.is_searched():
        rule = quadrature(local.width)  # without noise, where the rows are not far from their start

    def ratios(noise: Array, x: Array, white: Array, taken: Taken) -> tuple[Array, Array, Array]:
        """Return density of the global sites, ratios of the rows and the rows, `(K, N)` each."""
        w, inner = taken.inner(noise, white)
        z, outer = taken.outer(w)
        whole, each = jax.vmap(lambda z: rows.log_parts(x, z, index))(z)
        normal = dist.Normal(jnp.zeros_like(noise), 1.0).log_prob(noise).sum(-1)
        found = each + inner + outer - normal
        return whole[0], jnp.where(jnp.isfinite(found), found, -jnp.inf), z

    def one(key: Array) -> tuple[Any, ...]:
        base_key, row_key, choice_key = jax.random.split(key, 3)
        u = base.sample(base_key)
        x, ladj = flow.forward_and_ladj(u)
        log_q = base.log_prob(u) - ladj
        white, taken = flow.layers[-1].inv(x), local.taken(index, features)
        half = jax.random.normal(row_key, (TRIED // 2, size, local.width), x.dtype)
        noise = jnp.concatenate([half, -half])
        whole, tried, z = ratios(noise, x, white, taken)
        marginal, error = log_mean(tried)
        if rule is not None:
            nodes, log_weights = (jnp.asarray(a, x.dtype) for a in rule)
            placed = jnp.broadcast_to(nodes[:, None], (len(nodes), size, local.width))
            at_nodes = ratios(placed, x, white, taken.at_start())[1]
            smooth = jax.scipy.special.logsumexp(at_nodes + log_weights[:, None], 0)
            agree = jnp.abs(smooth - marginal) < SURE * error + EQUAL
            marginal = jnp.where(agree, smooth, marginal)
        chosen = jax.random.categorical(choice_key, tried, 0)
        z = jnp.take_along_axis(z, chosen[None, :, None], 0)[0]
        log_p = whole + marginal.sum()
        values = {**posterior._constrained(x, params), **groups.constrained(z)}
        return values, log_q, log_p, whole + tried[0].sum() - log_q

    nodes = 0 if rule is None else len(rule[0])
    numbers = (TRIED + nodes) * size * local.width
    block = min(max(importance.NUMBERS // numbers, 1), importance.FEW - 1)
    found = importance.mapped(one, jax.random.split(key, draws), draws, block)
    values, *densities = found
    return Weighed({name: values[name] for name in matched.sites.latent}, *densities)
