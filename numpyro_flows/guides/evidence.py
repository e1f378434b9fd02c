"""`log_evidence`: a guide's estimate of a model's evidence."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from numpyro_flows.guides import importance, row_weights
from numpyro_flows.guides.density import densities, free_sites
from numpyro_flows.rng import RandomKey, check_key
from pyroflows_common import verdict
from pyroflows_common.arviz import ArviZ
from pyroflows_common.chains import as_chains, flattened
from pyroflows_common.checks import as_count, as_inputs
from pyroflows_common.evidence import Evidence, bridged, refusal, weighed
from pyroflows_common.guides import model_of
from pyroflows_common.local import LOCAL_SAMPLES


def log_evidence(
    posterior: Any,
    model: Callable[..., Any] | None = None,
    *,
    params: Mapping[str, Any] | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    draws: int = 10_000,
    samples: Any = None,
    key: RandomKey,
) -> Evidence:
    r"""Estimate the evidence of a model, the probability of its data, with the help of a guide.

    The evidence, or marginal likelihood, is the integral over all latent variables

    $$Z = \int p(x, \theta) \, d\theta = E_q\Big[\frac{p(x, \theta)}{q(\theta)}\Big].$$

    The mean of so many importance ratios estimates it, of which the largest are smoothed: they
    count with the mean of the generalised Pareto distribution that is fitted to them. Its shape
    $\hat k$ says whether that can be trusted, as in `to_arviz`, also of a guide with local sites;
    where it cannot, there is an error. No weight tells of modes that the guide has missed.

    If MCMC has drawn `samples` from the posterior, bridge sampling takes those, too:

    $$Z = \frac{E_q[h(\theta) \, p(x, \theta)]}{E_{p(\theta | x)}[h(\theta) \, q(\theta)]}$$

    with the function h that makes the error least. It needs no low $\hat k$, but draws where guide
    and posterior overlap, and counts modes that the guide has missed and MCMC has not; a warning
    says if the two disagree.
    Autocorrelated draws count by their effective number. A guide that was trained by an evidence
    lower bound may meet any draws of the posterior; one that was fitted to draws, as by `fit`,
    needs others here.

    The difference of two values is the logarithm of a Bayes factor, and its error is the root of
    the sum of the squared errors, if the two have different random numbers. An evidence depends on
    the prior, however many the data: a prior that is ten times as wide costs log 10 for each number
    on which the data leave no doubt.

    Args:
        posterior: an automatic or hand-written guide; or a NumPyro distribution over the only
            latent site of the model, which has to be real.
        model: the model, with its data as observed sites. Default: the model of an automatic
            guide. A guide for a part of a model, by `handlers.block`, needs it.
        params: parameters of the guide and of the model, such as `svi_result.params`.
        args: positional arguments of the model and of the guide.
        kwargs: keyword arguments of both.
        draws: number of draws of the guide, at least 25.
        samples: draws of the posterior by MCMC: a dictionary of sites, as `mcmc.get_samples()`
            gives it, `(draws, *shape)` or with `group_by_chain=True`; what ArviZ works with, whose
            group `posterior` holds them; or a sampler that has run. The guide has to be an
            automatic one of continuous sites, or to have no auxiliary sites. Coordinates without a
            posterior, which guides of flows find, are drawn anew; sites of such only may be left
            out.
        key: random key.

    Returns:
        `value`, the natural logarithm of the evidence; `error`, its standard error, which without
        `samples` is multiplied by \(1 / (1 - \hat k)\) where $\hat k$ is above 0; and `pareto_k`.
        The evidence is that of the joint density as it stands: with the factors and scales of the
        model, and without what masks leave out.

    Raises:
        ValueError: if $\hat k$ is too high, or, with `samples`, if guide and posterior overlap too
            little; if `samples` do not fit `model`, or the density of `posterior` at `samples` is
            unknown; or if posterior and model do not fit each other, as in `to_arviz`.
        TypeError: if `posterior`, `model`, `params`, `args`, `samples` or `key` has the wrong type.
        ImportError: if ArviZ is not installed.

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry, "Pareto smoothed importance sampling" (JMLR 2024);
        Meng and Wong, "Simulating ratios of normalizing constants via a simple identity"
        (Statistica Sinica 1996), equation 4.1; Frühwirth-Schnatter, "Estimating marginal
        likelihoods for mixture and Markov switching models using bridge sampling techniques"
        (Econometrics Journal 2004).

    Examples:
        >>> import jax, numpyro
        >>> import jax.numpy as jnp
        >>> import numpyro.distributions as dist
        >>> from numpyro_flows import log_evidence
        >>> def model(y):
        ...     mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        >>> found = log_evidence(
        ...     dist.Normal(1.0, 0.8), model, args=(jnp.array(2.0),), key=jax.random.key(0)
        ... )
        >>> exact = dist.Normal(0.0, 2.0**0.5).log_prob(2.0)
        >>> bool(abs(found.value - exact) < 0.01)
        True
    """
    arviz = ArviZ("log_evidence")
    check_key(key)
    draws = as_count(draws, "draws", verdict.FEWEST)
    model = model_of(posterior, model)
    params = importance.as_params(params)
    inputs = as_inputs(args, kwargs)
    first, keys, last = jax.random.split(key, 3)
    matched = importance.match(posterior, model, params, inputs, first)
    chains = {}
    if samples is not None:
        if row_weights.has_rows(posterior):
            raise ValueError(LOCAL_SAMPLES)
        shapes = {name: np.shape(site["value"]) for name, site in matched.sites.latent.items()}
        chains = as_chains(samples, shapes, free_sites(posterior, params))
    values, log_q, log_p, _ = row_weights.sample(
        posterior, matched, model, params, inputs, draws, keys, last
    )
    weights = verdict.weigh(arviz.smooth, log_p, log_q)
    if samples is None:
        if not weights.trusted:
            raise ValueError(refusal(weights))
        return weighed(weights)
    shape, flat = flattened(chains, values)
    log_p, log_q = densities(posterior, matched, model, params, inputs, flat, last)
    return bridged(weights, log_p.reshape(shape), log_q.reshape(shape), arviz.effective)
