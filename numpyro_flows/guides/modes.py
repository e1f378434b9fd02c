"""`fit_mixture`: trains a guide for each mode of a posterior, and mixes them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpyro import handlers
from numpyro.infer.elbo import ELBO

from numpyro_flows.guides.autoflow import AutoFlow
from numpyro_flows.guides.fit import GuideFitResult, fit_from
from numpyro_flows.guides.mixture import AutoFlowMixture
from numpyro_flows.guides.model import LogDensity
from numpyro_flows.rng import RandomKey, check_key
from pyroflows_common.ascent import as_settings
from pyroflows_common.checks import as_count, as_inputs
from pyroflows_common.guides import check_mixable, check_parameters, warn_of_interruption
from pyroflows_common.mixture import BLOCK, DRAWS, bound_of, weights_of

Params = dict[str, Any]


@dataclasses.dataclass
class MixtureFitResult:
    """The result of `fit_mixture`.

    Args:
        guide: the mixture; the guide itself if there is one mode.
        params: its parameters.
        weights: those of the parts, `(K,)`: the share of the posterior around each mode.
        parts: the result of `fit_guide` for each mode, the one with the best start first.
        loss: minus the evidence lower bound of the mixture, in nats; that of `fit_guide` if there
            is one mode.
    """

    guide: Any = dataclasses.field(repr=False)
    params: Params = dataclasses.field(repr=False)
    weights: np.ndarray
    parts: list[GuideFitResult] = dataclasses.field(repr=False)
    loss: float


def fit_mixture(
    guide: AutoFlow,
    *,
    starts: int = 64,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    steps: int = 5000,
    learning_rate: float | Sequence[float] = 5e-3,
    schedule: str | Callable[[int], float] | None = "auto",
    loss: Any = None,
    progress: bool = True,
    key: RandomKey | None = None,
) -> MixtureFitResult:
    r"""Find the modes of a posterior, train a guide for each, and mix them.

    A search from dispersed starts, half of them draws of the prior, finds Gaussians. Those that lie
    at separate modes, with low densities between them, become the starts of guides. `fit_guide`
    trains each by itself, which keeps to its mode. Their weights minimise the Kullback-Leibler
    divergence of the posterior from the mixture, which draws of all parts estimate by importance:
    each part gets the share of the posterior that lies around its mode. Guides that have grown into
    one another share a mode.

    If the search finds one mode, the result is that of `fit_guide`. A mode that no start leads to
    is missed in silence, as it is by any approximation: give more `starts`, and priors narrow
    enough that their draws reach the modes. At most 16 modes are kept, with a warning if there are
    as many, and none whose Gaussian has an evidence lower bound that is lower than the best by more
    than 7 nats and a tenth of a nat for each coordinate.

    To keep the mixture, pickle its guide with the parameters. Its median may lie between the modes:
    take those of the `parts`.

    Args:
        guide: a guide of all latent sites of its model, an `AutoFlow`.
        starts: number of points from which the search sets out, at least 4.
        args: as in `fit_guide`.
        kwargs: as in `fit_guide`.
        steps: the most steps for each mode.
        learning_rate: as in `fit_guide`.
        schedule: as in `fit_guide`.
        loss: as in `fit_guide`.
        progress: as in `fit_guide`.
        key: random key; by default always the same one.

    Returns:
        The mixture as a guide with its parameters, for `Predictive`, `to_arviz`, `log_evidence`,
        `guide.sample_posterior` and `guide.quantiles`, with the weights and the result of each
        part. Ctrl-C ends training and mixes the guides so far, with a warning.

    Raises:
        ValueError: if an argument is out of its range, if the guide draws only a part of the
            model's sites, or if the model has parameters of its own or takes a part of its data.
        TypeError: if `guide` is no `AutoFlow`, or another argument has the wrong type.

    References:
        Cappé, Douc, Guillin, Marin and Robert, "Adaptive importance sampling in general mixture
        classes" (Statistics and Computing 2008), for the weights.

    Examples:
        >>> import numpyro, numpyro.distributions as dist
        >>> from numpyro_flows import AutoRealNVP, fit_mixture
        >>> def model():
        ...     x = numpyro.sample("x", dist.Normal(0.0, 3.0))
        ...     numpyro.sample("y", dist.Normal(x**2, 0.1), obs=4.0)
        >>> result = fit_mixture(AutoRealNVP(model), steps=100, progress=False)
        >>> result.weights.round(1)
        array([0.5, 0.5])
    """
    check_mixable(guide, AutoFlow, AutoFlowMixture)
    starts = as_count(starts, "starts", 4)
    settings = as_settings(steps, learning_rate, schedule, loss, progress, ELBO)
    inputs = as_inputs(args, kwargs)
    key = jax.random.key(0) if key is None else key
    check_key(key)
    search_key, fit_key, weigh_key = jax.random.split(key, 3)
    begins, log_density = guide._modes(starts, search_key, *inputs[0], **inputs[1])
    check_parameters(n for n, s in guide.prototype_trace.items() if s["type"] == "param")
    parts = fit_from(begins, guide, None, inputs, settings, fit_key)
    warn_of_interruption(len(parts), len(begins))
    if len(parts) == 1:
        return MixtureFitResult(guide, parts[0].params, np.ones(1), parts, parts[0].loss)
    fitted = [part.params for part in parts]
    log_p, log_q = _densities(guide, fitted, log_density, weigh_key)
    weights = weights_of(log_p, log_q)
    mixture = AutoFlowMixture(guide, weights)
    lower = bound_of(weights, log_p, log_q)
    return MixtureFitResult(mixture, mixture.named(fitted), weights, parts, -lower)


def _densities(
    guide: AutoFlow, params: list[Params], log_density: LogDensity, key: Array
) -> tuple[np.ndarray, np.ndarray]:
    """Return the log-densities of model and parts at draws of each part."""
    count = len(params)
    mixture = AutoFlowMixture(guide, np.full(count, 1 / count))

    @jax.jit
    def run(params: Params, key: Array) -> tuple[Array, Array]:
        with handlers.substitute(data=params):
            parts = [part._get_posterior() for part in mixture.parts]
        keys = jax.random.split(key, count)
        x = jnp.stack([p.sample(k, (DRAWS,)) for p, k in zip(parts, keys, strict=True)])
        log_q = jnp.stack([p.log_prob(x) for p in parts], -1)
        log_p = lax.map(log_density, x.reshape(count * DRAWS, -1), batch_size=BLOCK)
        return log_p.reshape(count, DRAWS), log_q

    log_p, log_q = run(mixture.named(params), key)
    return np.asarray(log_p), np.asarray(log_q)
