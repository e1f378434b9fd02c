"""`fit_prior`: learns a prior over named values from draws."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers

from numpyro_flows.flows.builders import realnvp
from numpyro_flows.flows.monotone import monotone
from numpyro_flows.guides.arviz import to_arviz
from numpyro_flows.guides.draws import started, trained
from numpyro_flows.guides.importance import as_params
from numpyro_flows.guides.model import is_latent
from numpyro_flows.layers.preconditioner import preconditioned
from numpyro_flows.prior import FlowPrior, as_form, unconstrained
from numpyro_flows.rng import RandomKey, check_key
from numpyro_flows.transform import TransformModule
from pyroflows_common import priors
from pyroflows_common.checks import Inputs, as_count, as_inputs, check_rows
from pyroflows_common.draws import check_moves, is_guide
from pyroflows_common.guides import DRAWS, check_built, check_function, model_of
from pyroflows_common.priors import Known, Site, check_sites
from pyroflows_common.search import DENSE

# SiLU, because samplers follow gradients, and those of ReLU networks jump. The log-scales of the
# paper's form have no budget: in a funnel they range over e^±5.
DEFAULT = functools.partial(realnvp, hidden=(32, 32), activation="silu", robust=False)


def fit_prior(
    draws: Any,
    model: Callable[..., Any] | None = None,
    *,
    params: Mapping[str, Any] | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    supports: Mapping[str, Any] | None = None,
    sites: Sequence[str] | None = None,
    weights: Any = None,
    build: Callable[..., TransformModule] | None = None,
    steps: int = 2000,
    learning_rate: float = 2e-3,
    name: str = "prior",
    progress: bool = True,
    key: RandomKey | None = None,
) -> FlowPrior:
    r"""Learn a joint prior over named values from draws: today's posterior is tomorrow's prior.

    Each site is mapped from its support to real numbers, \(x = c^{-1}(\theta)\). The flow starts
    as the normal distribution with the mean and covariance of the draws, and maximum likelihood
    improves on it:

    $$x = m + L \cdot \mathrm{flow}(z), \qquad z \sim N(0, 1).$$

    A tenth of the draws is held out, and the parameters that suit them best are kept: the prior
    describes them no worse than the normal distribution does. With fewer than five draws for each
    unconstrained number, or more than 256 numbers, L is diagonal at the start.

    Args:
        draws: draws of the values: a dictionary of arrays `(draws, *shape)`, such as
            `mcmc.get_samples()`, or by chain if a model tells the shapes; the data of ArviZ
            (`InferenceData` or `DataTree`), whose weights count if they are of `to_arviz`; a
            sampler that has run; or a guide, which is drawn from and weighed as by `to_arviz`.
        model: the model of the draws, whose latent sites give names, shapes and supports. Default:
            that of an automatic guide.
        params: parameters of a guide and its model, such as `svi_result.params`.
        args: positional arguments of the model, and of a guide.
        kwargs: keyword arguments of both.
        supports: supports by name, which take precedence over those of the model: a constraint of
            NumPyro on each number, such as `positive` or `interval(a, b)`; `simplex`,
            `ordered_vector` or `corr_cholesky`; or a sequence of constraints, one for each number.
            Without a model it has to have all values. That of values from a `FlowPrior` is
            `prior.supports`.
        sites: names of the values. Default: all latent sites of the model, or all in `supports`.
        weights: weights `(draws,)` of the draws, from 0 on.
        build: makes the flow, given D and a `key`, such as a builder of this package. Default: a
            RealNVP of 8 couplings, or a monotone function of a single number.
        steps: maximum number of steps.
        learning_rate: step size of Adam, which falls along a cosine.
        name: name of the prior's latent site.
        progress: whether to show a bar. Ctrl-C ends training and keeps the best so far.
        key: random key; by default always the same one.

    Returns:
        The prior, to call in a model.

    Raises:
        ValueError: if an argument is out of its range, if a support is missing, depends on other
            sites or is discrete, or if draws are not finite or not inside of it.
        TypeError: if an argument has the wrong type.
        ImportError: if `draws` is a guide, and ArviZ is not installed.

    Examples:
        >>> import jax
        >>> from numpyro.distributions import constraints
        >>> from numpyro_flows import fit_prior
        >>> rate = jax.numpy.exp(jax.random.normal(jax.random.key(0), (500,)))
        >>> supports = {"rate": constraints.positive}
        >>> prior = fit_prior({"rate": rate}, supports=supports, steps=100, progress=False)
        >>> prior.log_prob({"rate": jax.numpy.ones(3)}).shape
        (3,)
    """
    key = jax.random.key(0) if key is None else key
    check_key(key)
    steps, inputs = as_count(steps, "steps"), as_inputs(args, kwargs)
    build = DEFAULT if build is None else build
    check_function(build, "build", "a function of D and a key that makes a flow", TransformModule)
    draw_key, build_key, fit_key = jax.random.split(key, 3)
    if is_guide(draws):
        model = model_of(draws, model, "draws")
        draws = to_arviz(
            draws, model, params=params, args=args, kwargs=kwargs, draws=DRAWS, key=draw_key
        )
    known = {} if model is None else _known(model, as_params(params), inputs)
    sites_, named = priors.choose(draws, weights, known, supports, sites, as_form)
    rows = np.concatenate([_rows(site, named.values[site.name]) for site in sites_], 1)
    size = rows.shape[1]
    inner = build(size, key=build_key) if size > 1 else monotone(1)
    check_built(inner, size)
    flow = preconditioned(inner, size if size <= DENSE else 0)
    flow = started(flow, rows, named.weights)
    check_sites(sites_, name)
    settings = {"learning_rate": learning_rate, "schedule": "cosine", "progress": progress}
    result = trained(flow, rows, named.weights, None, steps=steps, **settings, key=fit_key)
    return FlowPrior(result.flow, sites_, named.effective, name)


def _known(
    model: Callable[..., Any], params: Mapping[str, Any], inputs: Inputs
) -> dict[str, Known]:
    """Return what a model says of its latent sites, in two runs."""
    args, kwargs = inputs
    with handlers.block():
        seeds = (handlers.seed(handlers.substitute(model, params), seed) for seed in range(2))
        traces = [handlers.trace(run).get_trace(*args, **kwargs) for run in seeds]
    one, other = ({n: s for n, s in trace.items() if is_latent(s)} for trace in traces)
    priors.check_structure(one, other)
    return {
        name: Known(
            jnp.shape(site["value"]),
            jnp.ndim(site["value"]) - site["fn"].event_dim,
            (site["fn"].support, other[name]["fn"].support),
        )
        for name, site in one.items()
    }


def _rows(site: Site, values: np.ndarray) -> np.ndarray:
    """Return the unconstrained coordinates of a site's draws."""
    x, ladj = unconstrained(site, jnp.asarray(values))
    rows = np.asarray(x, float)
    good = np.isfinite(rows).all(1) & np.isfinite(np.asarray(ladj))
    check_rows(good, f"`draws` of site {site.name!r}", priors.bad_draws(site))
    check_moves(site.name, rows)
    return rows
