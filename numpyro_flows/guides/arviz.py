"""`to_arviz`: a guide's draws for ArviZ. `pyroflows_common/verdict.py` words the verdict."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import numpyro

from numpyro_flows.guides import importance, row_weights
from numpyro_flows.guides.autoflow import AutoFlow
from numpyro_flows.guides.mixture import AutoFlowMixture
from numpyro_flows.rng import RandomKey, check_key
from pyroflows_common import verdict
from pyroflows_common.arviz import ArviZ
from pyroflows_common.checks import as_count, as_inputs
from pyroflows_common.guides import model_of


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
    key: RandomKey,
) -> Any:
    r"""Draw from a guide, weigh the draws against its model, and hand both to ArviZ.

    Each draw has an importance ratio, and a generalised Pareto distribution is fitted to the
    largest ones:

    $$r_s = \frac{p(x, \theta_s)}{q(\theta_s)}, \qquad \theta_s \sim q, \qquad s = 1, \dots, S.$$

    Its shape $\hat k$ says whether the guide can be trusted. Below 0.5 the guide is good. Below
    $\min(1 - 1/\log_{10} S, 0.7)$ its draws are usable after importance resampling. Above that
    they are not. A guide that is too wide is good in this sense, too, because its draws can be
    weighed; the verdict then says to resample them. The verdict covers only the places where the
    draws are. It cannot detect modes that the guide missed: no draw lands there. If there may be
    several modes, `fit_mixture` looks for them.

    Of a guide with local sites, the ratios and $\hat k$ are those of the global sites. The local
    ones are integrated out of the model row by row, by quadrature around where they started, or by
    importance sampling, and each row is drawn again by its weights. The ratio of all sites, whose
    $\hat k$ is the attribute `pareto_k_joint`, may be hopeless for thousands of rows, although
    each is right to a hair.

    The draws are independent and form one chain. ArviZ gives no R-hat for it: R-hat compares
    chains, and the chains of one guide agree however wrong the guide is. Use $\hat k$ instead.
    ArviZ treats the draws as draws from the posterior. Before `arviz.loo`, resample draws that
    cannot be used as they are, or the $\hat k$ of `loo` will be too high.

    Args:
        posterior: an automatic or hand-written guide; or a NumPyro distribution, such as
            `flow_distribution(flow, context=observation)`, over the only latent site of the
            model, which has to be real.
        model: the model, with its data as observed sites. Default: the model of an automatic
            guide. A guide for a part of a model, by `handlers.block`, needs it.
        params: parameters of the guide and of the model, such as `svi_result.params`.
        args: positional arguments of the model and of the guide.
        kwargs: keyword arguments of both.
        draws: number of draws, at least 25.
        coords: coordinates of dimensions, as in `arviz.from_dict`.
        dims: names of the dimensions of sites, as in `arviz.from_dict`. Default: the names of the
            plates.
        posterior_predictive: whether to simulate the observed sites, too.
        resample: whether to resample the draws by their smoothed weights (systematic resampling).
            Copies of one draw follow each other, so that ArviZ's effective sample size counts
            them as about one.
        key: random key.

    Returns:
        What the installed ArviZ works with: `InferenceData` for ArviZ 0.2x, an `xarray.DataTree`
        for 1.x. Its groups are `posterior` (with the deterministic sites, and with reparametrised
        sites beside their auxiliary ones); `log_likelihood` (of each observation, without
        `handlers.scale` and without factors); `observed_data`; `posterior_predictive`, if asked
        for; and `sample_stats`: `lp` is the log joint density, `log_importance_ratio` the log ratio
        (minus infinity if it is not finite) and `log_weight` its normalised, smoothed value, which
        is equal for all draws after resampling. Its attributes are `pareto_k` (minus infinity if
        all ratios are equal); `elbo`, the mean log ratio; `log_evidence` and `log_evidence_error`,
        as `log_evidence` estimates them from these draws, NaN where $\hat k$ is too high;
        `importance_ess`, the effective number of the weighted draws; and `verdict`, in words. They
        describe the draws before resampling, and the group `posterior` has them, too. Slashes in
        the names of sites become dots.

    Raises:
        ValueError: if `model` or one of `params` is missing, or if posterior and model do not fit
            each other: the guide leaves latent sites out (sum discrete ones out in the model), it
            is a guide of points, or a plate takes a subsample of the data.
        TypeError: if `posterior`, `model`, `params`, `args` or `key` has the wrong type.
        ImportError: if ArviZ is not installed.

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
        'k̂ = ...: good; the draws can be used as they are; no draw tells of modes that were missed'
        >>> data.log_likelihood["y"].dims
        ('chain', 'draw', 'people')
    """
    arviz = ArviZ()
    check_key(key)
    draws = as_count(draws, "draws", verdict.FEWEST)
    model = model_of(posterior, model)
    params = importance.as_params(params)
    inputs = as_inputs(args, kwargs)
    draw_key, resample_key, predict_key = jax.random.split(key, 3)
    drawn = row_weights.draw(posterior, model, params, inputs, draws, draw_key)
    weights = verdict.weigh(arviz.smooth, drawn.log_p, drawn.log_q)
    kept, predicted = None, {}
    if resample:
        kept = verdict.resample(weights.log_weight, float(jax.random.uniform(resample_key)))
    if posterior_predictive:
        index = np.arange(draws) if kept is None else kept
        predicted = importance.simulate(model, params, inputs, drawn, index, predict_key)
    single = isinstance(posterior, AutoFlow) and not isinstance(posterior, AutoFlowMixture)
    single = single and not row_weights.has_rows(posterior)
    options = {"coords": coords, "dims": dims, "host": numpyro, "single": single}
    return arviz.collect(drawn, predicted, weights, kept, **options)
