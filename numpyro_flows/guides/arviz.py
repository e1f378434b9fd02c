"""A guide's draws for ArviZ, with the verdict on the guide."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import numpyro
from jax import Array
from numpyro import handlers
from numpyro.infer import Predictive

from numpyro_flows.guides import importance
from numpyro_flows.guides.model import model_of
from numpyro_flows.rng import check_key
from pyroflows_common import verdict
from pyroflows_common.arviz import arviz_functions
from pyroflows_common.checks import as_count, as_inputs


def to_arviz(
    posterior: Any,
    model: Callable[..., Any] | None = None,
    *,
    params: Mapping[str, Any] | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    draws: int = 1000,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    posterior_predictive: bool = False,
    resample: bool = False,
    key: Array,
) -> Any:
    r"""Draw from a guide, weigh the draws against its model, and hand both to ArviZ.

    Each draw has an importance ratio, and a generalised Pareto distribution is fitted to the
    largest ones:

    $$r_s = \frac{p(x, \theta_s)}{q(\theta_s)}, \qquad \theta_s \sim q, \qquad s = 1, \dots, S.$$

    Its shape $\hat k$ says whether the guide can be trusted. Below 0.5 it is good; below
    $\min(1 - 1/\log_{10} S, 0.7)$ its draws are usable after importance resampling; above, not
    at all. A guide that is too wide is good in this sense, too, since its draws can be weighed:
    the verdict then says to resample them. It speaks of where the draws are: of a mode that the
    guide has missed altogether no draw tells. Where there may be several, fit guides from several
    starts, by `init_loc_fn`, and compare their evidence lower bounds.

    The draws are independent and make up one chain, for which ArviZ gives no R-hat: it compares
    chains, and those of one guide agree however wrong the guide is. $\hat k$ takes its place.
    ArviZ takes the draws for the posterior's: before `arviz.loo`, resample those that cannot be
    used as they are, or its own $\hat k$ will be too high.

    Args:
        posterior: an automatic or hand-written guide; or a NumPyro distribution, such as
            `flow_distribution(flow, context=observation)`, over the only latent site of the
            model, which has to be real.
        model: the model, with its data as observed sites. Default: the one that an automatic
            guide was made for. A guide made for a part of a model, by `handlers.block`, needs it.
        params: parameters of the guide and of the model, such as `svi_result.params`.
        args: positional arguments of the model and of the guide.
        kwargs: keyword arguments of both.
        draws: number of draws, at least 25.
        coords: coordinates of dimensions, as in `arviz.from_dict`.
        dims: names of the dimensions of sites, as in `arviz.from_dict`. Default: the names of the
            plates.
        posterior_predictive: whether to simulate the observed sites, too.
        resample: whether to draw again from the draws in proportion to their smoothed weights
            (systematic resampling). A draw that is taken several times stands several times in a
            row, so that ArviZ's effective sample size counts it about once.
        key: random key.

    Returns:
        What the installed ArviZ works with: `InferenceData` of ArviZ 0.2x, an `xarray.DataTree`
        of 1.x. Its groups are `posterior` (with the deterministic sites); `log_likelihood` (of
        each observation, without `handlers.scale`, and without factors); `observed_data`;
        `posterior_predictive` where asked for; and `sample_stats`: `lp` is the log joint density,
        `log_importance_ratio` the ratio (minus infinity where it is not finite) and `log_weight`
        its normalised, smoothed logarithm, which is that of equal weights once the draws have
        been resampled. Its attributes are `pareto_k` (minus infinity where all ratios are
        equal); `elbo`, the mean log ratio; `importance_ess`, the effective number of the weighted
        draws; and `verdict`, in words. The group `posterior` has them, too, and they are of the
        draws before resampling. A slash in a site's name becomes a dot.

    Raises:
        ValueError: where `model` or one of `params` is missing, or posterior and model do not
            fit each other: latent sites that the guide does not draw (discrete ones have to be
            summed out in the model), a guide of points, plates that take a subsample of the data.
        TypeError: where `posterior`, `model`, `params`, `args` or `key` is of the wrong kind.
        ImportError: where ArviZ is not installed.

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry, "Pareto smoothed importance sampling" (JMLR 2024);
        Yao, Vehtari, Simpson and Gelman, "Yes, but did it work?" (ICML 2018).

    Examples:
        >>> import jax, numpyro
        >>> import jax.numpy as jnp
        >>> import numpyro.distributions as dist
        >>> from numpyro_flows import to_arviz
        >>> def model(y):
        ...     mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with numpyro.plate("people", len(y)):
        ...         numpyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        >>> data = to_arviz(
        ...     dist.Normal(0.8, 0.55), model, args=(jnp.ones(3),), key=jax.random.key(0)
        ... )
        >>> data.attrs["verdict"]
        'k̂ = ...: good; the draws can be used as they are'
        >>> data.log_likelihood["y"].dims
        ('chain', 'draw', 'people')
    """
    psis, gather = arviz_functions()
    check_key(key)
    draws = as_count(draws, "draws", verdict.FEWEST)
    model = model_of(posterior, model)
    if not isinstance(params, Mapping | None):
        raise TypeError(
            f"`params` is a {type(params).__name__}, expected a dictionary such as "
            "svi_result.params"
        )
    inputs = as_inputs(args, kwargs)
    params = dict(params or {})
    draw_key, resample_key, predict_key = jax.random.split(key, 3)
    drawn = importance.draw(posterior, model, params, inputs, draws, draw_key)
    latent, observed, deterministic = drawn.sites
    ratio = drawn.log_p.astype(np.float64) - drawn.log_q
    ratio = np.nan_to_num(ratio, nan=-np.inf, posinf=-np.inf, neginf=-np.inf)
    weights = verdict.weigh(psis, ratio)
    kept, log_weight = np.arange(draws), weights.log_weight
    if resample:
        kept = verdict.resample(log_weight, float(jax.random.uniform(resample_key)))
        log_weight = np.full(draws, -math.log(draws))
    values = {name: value[kept] for name, value in drawn.values.items()}
    predicted = {}
    if posterior_predictive:
        predict = Predictive(
            handlers.uncondition(model), values, params=params, return_sites=list(observed)
        )
        predicted = predict(predict_key, *inputs[0], **inputs[1])

    def chain(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return {name: np.asarray(array)[None] for name, array in arrays.items()}

    groups = {
        "posterior": chain({**values, **{n: v[kept] for n, v in drawn.deterministic.items()}}),
        "posterior_predictive": chain(predicted),
        "log_likelihood": chain({n: value[kept] for n, value in drawn.log_likelihood.items()}),
        "sample_stats": {
            "lp": drawn.log_p[None, kept],
            "log_importance_ratio": ratio[None, kept],
            "log_weight": log_weight[None],
        },
        "observed_data": {n: np.asarray(s["value"]) for n, s in observed.items()},
    }
    sites = {**latent, **deterministic, **observed}
    names = {name: _dim_names(site, sites) for name, site in sites.items()}
    attrs = {
        "inference_library": "numpyro",
        "inference_library_version": numpyro.__version__,
        "pareto_k": weights.pareto_k,
        "elbo": float(ratio.mean()),
        "importance_ess": weights.ess,
        "verdict": verdict.verdict(weights, resample),
    }
    return gather(groups, coords, {**names, **dict(dims or {})}, attrs)


def _dim_names(site: Any, sites: Mapping[str, Any]) -> list[str]:
    """Name the dimensions of a site by its plates."""
    shape = np.shape(site["value"])
    names = [f"{site['name']}_dim_{i}" for i in range(len(shape))]
    plates = site["cond_indep_stack"]
    if site["type"] == "sample":
        batch = len(shape) - site["fn"].event_dim
    else:
        batch = len(shape) if max((-plate.dim for plate in plates), default=0) == len(shape) else 0
    for plate in plates:
        axis = batch + plate.dim
        if axis >= 0 and shape[axis] == plate.size and plate.name not in {"chain", "draw", *sites}:
            names[axis] = plate.name
    return names
