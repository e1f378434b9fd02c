"""`fit_guide`: tries several learning rates and keeps the highest evidence lower bound."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.flatten_util import ravel_pytree
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.elbo import ELBO
from numpyro.infer.svi import SVIState
from numpyro.infer.util import log_density

from numpyro_flows.compiling import effort
from numpyro_flows.guides.autoflow import AutoFlow
from numpyro_flows.guides.draws import fit_to_draws
from numpyro_flows.guides.importance import as_params
from numpyro_flows.guides.mixture import AutoFlowMixture
from numpyro_flows.guides.model import is_latent, unblocked
from numpyro_flows.rng import RandomKey, check_key
from pyroflows_common.ascent import BOUND, GRADIENT, PARTICLES, Ascent, Settings, as_settings
from pyroflows_common.checks import Inputs, as_inputs
from pyroflows_common.guides import check_learner, check_slopes, model_of, outcome

Model = Callable[..., Any]  # or a guide


@dataclasses.dataclass
class GuideFitResult:
    """The result of `fit_guide`.

    Args:
        guide: the guide.
        params: its parameters and those of the model, as in NumPyro's `SVIRunResult`.
        losses: minus the evidence lower bound at each step of the best run, in nats, or minus the
            mean log-density of draws, or half the Fisher divergence; skipped steps included.
        loss: the mean loss of the best stretch, or of the held-out draws; infinite if none is
            finite.
        learning_rate: learning rate of the best run.
        skipped: number of its steps that were skipped because loss or gradient was not finite.
        stopped: why it ended: `"steps"`, `"converged"`, `"interrupted"` or `"not finite"`.
        gradients: number of gradients of the model's log-density that the best run took: one for
            each particle of a step, or for each draw whose slope was taken.
    """

    guide: Any = dataclasses.field(repr=False)
    params: dict[str, Any] = dataclasses.field(repr=False)
    losses: np.ndarray = dataclasses.field(repr=False)
    loss: float
    learning_rate: float
    skipped: int
    stopped: str
    gradients: int = 0


def fit_guide(
    guide: Callable[..., Any],
    model: Callable[..., Any] | None = None,
    *,
    draws: Any = None,
    slopes: bool = False,
    params: Mapping[str, Any] | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    steps: int = 5000,
    learning_rate: float | Sequence[float] = 5e-3,
    schedule: str | Callable[[int], float] | None = "auto",
    loss: Any = None,
    progress: bool = True,
    key: RandomKey | None = None,
) -> GuideFitResult:
    r"""Train a guide by the host's `SVI`, and keep the best of it.

    Adam climbs the evidence lower bound with a learning rate that falls along a cosine, which
    averages out the noise of the last steps. Once the mean bound of 250 steps is no longer above
    that of the 250 before, beyond its noise, the learning rate falls to zero within as many steps
    as were made so far, at most 1000, and training ends: most guides need a part of `steps`. A run
    is divided into fifty stretches. The parameters after the last stretch whose mean loss is no
    higher than the lowest one, within its noise, are kept. With several learning rates there is one
    run for each, all from the start of the guide, and the best run counts. Runs with the same
    key are identical.

    A step is skipped if its loss or gradient is not finite. A stretch of skipped steps only ends
    the run.

    With `draws` of the posterior, the guide is trained on them by maximum likelihood, as flows are
    by `fit`, in place of the bound: without gradients of the model, and in all modes that the draws
    have. Without `params`, the guide starts as their normal distribution. A tenth of them is held
    out, and the parameters that suit those best are kept. The model has to depend on all sites: the
    search alone finds numbers without a posterior, such as those under a mask.

    With `slopes`, too, the guide is trained on the slopes of the model's log-density at the draws,
    one gradient each, by the Fisher divergence in the coordinates of its base:

    $$\mathrm{loss} = \frac1n \sum_{i=1}^n \tfrac12 \lVert \nabla_z \log \tilde\pi(z_i)
    - \nabla_z \log b(z_i) \rVert^2$$

    where b is the base's density, and π̃ the posterior pulled back through the flow to the draw's
    z. A slope says as much as D numbers, so that a few draws of a chain that has hardly mixed do:
    the draws only say where to look, and need not be distributed as the posterior. The likelihood,
    which believes them to be, plays no part.

    Args:
        guide: an automatic or hand-written guide.
        model: the model, with its data as observed sites. Default: the model of an automatic
            guide, including sites hidden from the guide.
        draws: draws of the posterior, such as those of a short run of NUTS, for an `AutoFlow`: a
            dictionary of its sites, as `mcmc.get_samples()` gives it, with or without chains; the
            data of ArviZ, whose weights count if they are of `to_arviz`; or a sampler that has run.
        slopes: whether to train on the slopes of the model's log-density at the draws.
        params: parameters to go on from, such as those of an earlier result.
        args: positional arguments of the model and of the guide.
        kwargs: keyword arguments of both.
        steps: the most steps of each run.
        learning_rate: Adam's step size, or several to try.
        schedule: `"auto"`; `"cosine"`, which takes all steps; None for a constant rate; or a
            function of the number of steps done, from 0, that gives a factor on the learning rate.
        loss: one of NumPyro's evidence lower bounds. Default: `Trace_ELBO` with 16 particles.
        progress: whether to show a bar; where standard error is no terminal, it is a few lines.
        key: random key; by default always the same one.

    Returns:
        The parameters with the history of the best run. Ctrl-C ends training and keeps the best so
        far.

    Raises:
        ValueError: if an argument is out of its range, if `model` is missing, if the guide leaves
            sites to a default `loss`, or if `draws` lack a site, are fewer than ten, lie outside
            of a support or have no finite `slopes`.
        TypeError: if `guide`, `model`, `args` or `key` has the wrong type, or if the guide of
            `draws` is no `AutoFlow`.

    Examples:
        >>> import numpyro, numpyro.distributions as dist
        >>> from numpyro_flows import AutoRealNVP, fit_guide
        >>> def model():
        ...     numpyro.sample("x", dist.Normal(5.0, 0.1).expand([2]).to_event(1))
        >>> guide = AutoRealNVP(model, layers=2)
        >>> result = fit_guide(guide, steps=100, learning_rate=[1e-3, 1e-2], progress=False)
        >>> abs(result.loss) < 0.1
        True
    """
    settings = as_settings(steps, learning_rate, schedule, loss, progress, ELBO)
    slopes = check_slopes(slopes, draws)
    inputs = as_inputs(args, kwargs)
    key = jax.random.key(0) if key is None else key
    check_key(key)
    params = as_params(params)
    if draws is None:
        return fit_from([params], guide, model, inputs, settings, key)[0]
    model_of(guide, model, "guide")
    check_learner(guide, AutoFlow, AutoFlowMixture, loss)
    rates, options = settings.rates, settings.of_draws()
    given = guide, draws, params, inputs, rates, key, slopes
    learned, found, rate, gradients = fit_to_draws(*given, **options)
    return GuideFitResult(guide, {**params, **learned}, *outcome(found, rate, gradients))


def fit_from(
    starts: Sequence[dict[str, Any]],
    guide: Callable[..., Any],
    model: Callable[..., Any] | None,
    inputs: Inputs,
    settings: Settings,
    key: RandomKey,
) -> list[GuideFitResult]:
    """Train a guide from each of several parameters; Ctrl-C ends all that follow.

    One program serves all of them.
    """
    own, model = model is None, model_of(guide, model, "guide")
    if own:  # the guide may see only a part of its model
        model = unblocked(model)
    loss = settings.loss
    ascent = _Ascent(model, guide, loss or Trace_ELBO(PARTICLES), inputs, key)
    results: list[GuideFitResult] = []
    for params in starts:
        ascent.start_from(params)
        if loss is None:
            params = ascent.svi.get_params(ascent.start)
            _check_sites(model, handlers.substitute(guide, params), inputs, key)
        best = ascent.best(settings)
        if best.stopped == "not finite":
            bound = ascent.svi.evaluate(best.state, *inputs[0], **inputs[1])
            best.warn(GRADIENT if np.isfinite(bound) else BOUND)
        count = len(best.losses) * getattr(ascent.svi.loss, "num_particles", 1)
        results.append(GuideFitResult(guide, ascent.svi.get_params(best.state), *best[1:], count))
        if best.stopped == "interrupted":
            break
    return results


def _check_sites(model: Model, guide: Model, inputs: Inputs, key: RandomKey) -> None:
    """Check that the guide draws all sites: otherwise the loss is no bound."""
    args, kwargs = inputs
    left: list[str] = []

    def run() -> None:
        drawn = handlers.trace(handlers.seed(guide, key)).get_trace(*args, **kwargs)
        seeded = handlers.seed(handlers.replay(model, drawn), key)
        sites = handlers.trace(seeded).get_trace(*args, **kwargs)
        left.extend(sorted(n for n, site in sites.items() if n not in drawn and is_latent(site)))

    jax.eval_shape(run)  # without its numbers
    if left:
        raise ValueError(
            f"`guide` does not draw the sites {left} of `model`: draw them in the guide, sum "
            "discrete ones out in the model, with a mixture distribution or by numpyro.factor, or "
            "give a `loss` that does without"
        )


class _Ascent(Ascent):
    """Training of a guide and its model."""

    def __init__(
        self,
        model: Model,
        guide: Model,
        loss: ELBO,
        inputs: Inputs,
        key: RandomKey,
    ) -> None:
        args, kwargs = inputs
        self.model, self.guide, self.inputs = model, guide, inputs
        self.init_key, self.key = jax.random.split(key)

        self.svi = SVI(model, guide, optax.adam(0.0), loss)

        def step(state: SVIState, rate: Array) -> tuple[SVIState, Array]:
            svi = SVI(model, guide, optax.adam(rate), loss)
            svi.constrain_fn = self.svi.constrain_fn
            return svi.stable_update(state, *args, **kwargs)

        self.stretch = jax.jit(functools.partial(lax.scan, step), compiler_options=effort(1))

    def start_from(self, params: dict[str, Any]) -> None:
        """Set where all runs start; without parameters, it is the start of the guide."""
        args, kwargs = self.inputs
        self.start = self.svi.init(self.init_key, *args, init_params=params or None, **kwargs)

    def begin(self) -> None:
        self.state = self.start._replace(rng_key=self.key)
        self.skipped = self.done = 0

    def climb(self, rates: np.ndarray) -> Iterator[np.ndarray]:
        self.state, losses = self.stretch(self.state, rates)
        self.done += len(rates)
        self.skipped = self.done - int(self.state.optim_state[0])
        yield np.asarray(losses)

    def state_now(self) -> SVIState:
        return self.state

    def stands(self, before: SVIState) -> bool:
        params = map(self.svi.get_params, (before, self.state))
        return all(jax.tree.leaves(jax.tree.map(np.array_equal, *params)))

    def blind(self) -> bool:
        args, kwargs = self.inputs
        params = self.svi.get_params(self.state)

        def finite(key: Array) -> Array:
            guide, model = (
                handlers.seed(handlers.substitute(function, params), key)
                for function in (self.guide, self.model)
            )
            drawn = handlers.trace(guide).get_trace(*args, **kwargs)
            values = {name: site["value"] for name, site in drawn.items() if is_latent(site)}
            real, rest = eqx.partition(values, eqx.is_inexact_array)

            def density(real: dict[str, Any]) -> Array:
                return log_density(model, args, kwargs, eqx.combine(real, rest))[0]

            return jnp.isfinite(ravel_pytree(jax.grad(density)(real))[0]).all()

        return not jax.jit(jax.vmap(finite))(jax.random.split(self.key, PARTICLES)).any()
