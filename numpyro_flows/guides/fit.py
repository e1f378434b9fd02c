"""Training of guides: the highest evidence lower bound that some learning rate comes to."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.elbo import ELBO
from numpyro.infer.svi import SVIState
from tqdm.auto import tqdm

from numpyro_flows.guides.model import is_latent, model_of, unblocked
from numpyro_flows.rng import check_key
from pyroflows_common.checks import Inputs, as_count, as_inputs, as_scales
from pyroflows_common.schedule import check_schedule, factor, mean_loss, stretches

PARTICLES = 16


@dataclasses.dataclass
class GuideFitResult:
    """What `fit_guide` has come to.

    Args:
        guide: the guide.
        params: its parameters and the model's, as in NumPyro's `SVIRunResult`.
        losses: minus the evidence lower bound at each step of the best run, in nats; also of the
            steps that were skipped.
        loss: the best mean loss of a stretch, infinite where none was finite.
        learning_rate: that of the best run.
        skipped: number of its steps that were left out since loss or gradient were not finite.
        stopped: why it ended: `"steps"`, `"interrupted"` or `"not finite"`.
    """

    guide: Any = dataclasses.field(repr=False)
    params: dict[str, Any] = dataclasses.field(repr=False)
    losses: np.ndarray = dataclasses.field(repr=False)
    loss: float
    learning_rate: float
    skipped: int
    stopped: str


def fit_guide(
    guide: Callable[..., Any],
    model: Callable[..., Any] | None = None,
    *,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    steps: int = 5000,
    learning_rate: float | Sequence[float] = 5e-3,
    schedule: str | Callable[[int], float] | None = "cosine",
    loss: Any = None,
    progress: bool = True,
    key: Array | None = None,
) -> GuideFitResult:
    r"""Train a guide by the host's `SVI`, and keep the best of it.

    Adam climbs the evidence lower bound with a learning rate that falls along a cosine, which takes
    the noise of the last steps out. The parameters that are left are those after the best stretch
    of training, by the mean loss over a fiftieth of all steps, and of the best run, where several
    learning rates are given: each starts at the same place, where the guide does. Equal keys give
    equal numbers.

    A step whose loss or gradient is not finite is skipped; a stretch of nothing else ends a run.

    Args:
        guide: an automatic or hand-written guide.
        model: the model, with its data as observed sites. Default: the one that an automatic
            guide was made for, with all sites that it hides from the guide.
        args: positional arguments of the model and of the guide.
        kwargs: keyword arguments of both.
        steps: number of steps of each run.
        learning_rate: Adam's step size, or several to try: one run each.
        schedule: `"cosine"`, None, or a function of the number of steps done, from 0, that gives a
            factor on the learning rate.
        loss: one of NumPyro's evidence lower bounds. Default: `Trace_ELBO` with 16 particles.
        progress: whether to show a bar.
        key: random key; always the same one by default.

    Returns:
        The parameters with the history of the best run. Ctrl-C ends training with what is best
        so far.

    Raises:
        ValueError: where an argument is out of its range, `model` is missing, or the guide leaves
            sites to a default `loss`.
        TypeError: where `guide`, `model`, `args` or `key` is of the wrong kind.

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
    rates = as_scales(learning_rate, "learning_rate")
    steps = as_count(steps, "steps")
    check_schedule(schedule)
    factors = jnp.array([factor(schedule, k, steps) for k in range(steps)])
    own, model = model is None, model_of(guide, model, "guide")
    if own:  # an automatic guide's, with all that it hides from it
        model = unblocked(model)
    inputs = as_inputs(args, kwargs)
    if not (loss is None or isinstance(loss, ELBO)):
        raise TypeError(f"`loss` is {loss!r}, expected one of NumPyro's, such as Trace_ELBO()")
    key = jax.random.key(0) if key is None else key
    check_key(key)
    run = _Run(model, guide, loss or Trace_ELBO(PARTICLES), factors, inputs, key)
    if loss is None:
        params = run.svi.get_params(run.start)
        _check_sites(model, handlers.substitute(guide, params), inputs, key)
    found = []
    with tqdm(total=steps * len(rates), disable=not progress, desc="fit_guide") as bar:
        for rate in rates:
            found.append(run.train(rate, bar))
            if found[-1].stopped == "interrupted":
                break
    result = min(found, key=lambda result: result.loss)
    if result.stopped == "not finite":
        left = "those of its best stretch" if math.isfinite(result.loss) else "what they were"
        warnings.warn(
            f"training stopped after {len(result.losses)} steps, as the evidence lower bound was "
            f"not finite: the guide's parameters are {left}",
            stacklevel=2,
        )
    return result


def _check_sites(model: Any, guide: Any, inputs: Inputs, key: Array) -> None:
    """Refuse sites that the guide does not draw: the bound would not be one."""
    args, kwargs = inputs
    drawn = handlers.trace(handlers.seed(guide, key)).get_trace(*args, **kwargs)
    seeded = handlers.seed(handlers.replay(model, drawn), key)
    sites = handlers.trace(seeded).get_trace(*args, **kwargs)
    left = sorted(n for n, site in sites.items() if n not in drawn and is_latent(site))
    if left:
        raise ValueError(
            f"`guide` does not draw the sites {left} of `model`: draw them in the guide, sum "
            "discrete ones out in the model, with a mixture distribution or by numpyro.factor, or "
            "give a `loss` that can do without"
        )


class _Run:
    """A guide and its model, at the start of training."""

    def __init__(
        self,
        model: Any,
        guide: Any,
        loss: Any,
        factors: Array,
        inputs: Inputs,
        key: Array,
    ) -> None:
        args, kwargs = inputs
        init_key, self.key = jax.random.split(key)
        self.lengths = stretches(len(factors))

        def svi(rate: float | Array) -> SVI:
            return SVI(model, guide, optax.adam(lambda count: rate * factors[count]), loss)

        self.svi = svi(0.0)
        self.start = self.svi.init(init_key, *args, **kwargs)

        @functools.partial(jax.jit, static_argnames="length")
        def stretch(state: SVIState, rate: Array, length: int) -> tuple[SVIState, Array]:
            run = svi(rate)  # compiled once for all rates
            run.constrain_fn = self.svi.constrain_fn
            step = lambda state, _: run.stable_update(state, *args, **kwargs)  # noqa: E731
            return lax.scan(step, state, None, length=length)

        self.stretch = stretch

    def train(self, rate: float, bar: Any) -> GuideFitResult:
        """Return what one learning rate comes to."""
        state = best = self.start._replace(rng_key=self.key)
        loss, losses, stopped = math.inf, [np.array([])], "steps"
        try:
            for length in self.lengths:
                state, new = self.stretch(state, rate, length)
                losses.append(np.asarray(new))
                mean = mean_loss(losses[-1])
                if mean < loss:
                    loss, best = mean, state
                if not np.isfinite(losses[-1]).any():
                    stopped = "not finite"
                    break
                bar.set_postfix_str(f"ELBO {-mean:.2f}")
                bar.update(length)
        except KeyboardInterrupt:
            stopped = "interrupted"
        every = np.concatenate(losses)
        skipped = len(every) - int(state.optim_state[0])
        params = self.svi.get_params(best)
        return GuideFitResult(self.svi.guide, params, every, loss, rate, skipped, stopped)
