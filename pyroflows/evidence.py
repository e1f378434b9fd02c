"""Training of guides: the highest evidence lower bound that some learning rate comes to."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from tqdm.auto import tqdm

from pyroflows.checks import as_count, as_scales
from pyroflows.importance import Inputs, as_inputs, model_of
from pyroflows.latent import alone, discrete_sites, first_line, plate_nesting, without
from pyroflows.seeds import seeded
from pyroflows.settings import check_schedule, factor

PARTICLES = 16
# Stretches of training, of which the best one's parameters are left.
STRETCHES, SHORTEST = 50, 10


@dataclasses.dataclass
class GuideFitResult:
    """What `fit_guide` has come to.

    Args:
        guide: the trained guide.
        losses: minus the evidence lower bound at each step of the best run, in nats; also of the
            steps that were skipped.
        loss: the best mean loss of a stretch, infinite where none was finite.
        learning_rate: that of the best run.
        skipped: number of its steps that were left out since loss or gradient were not finite.
        stopped: why it ended: `"steps"`, `"interrupted"` or `"not finite"`.
    """

    guide: Any
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
    seed: int = 0,
) -> GuideFitResult:
    r"""Train a guide by the host's `SVI`, and keep the best of it.

    Adam climbs the evidence lower bound with a learning rate that falls along a cosine, which takes
    the noise of the last steps out. The parameters that are left are those after the best stretch
    of training, by the mean loss over a fiftieth of all steps, and of the best run, where several
    learning rates are given: each starts at the same place, where the guide does. Equal seeds give
    equal numbers.

    A step whose loss or gradient is not finite, or where the model raises an error, is skipped; a
    stretch of nothing else ends a run.

    Args:
        guide: an automatic or hand-written guide. Its parameters, and those of the model, are
            trained in place; Pyro's parameter store holds them.
        model: the model, with its data as observed sites. Default: the one that an automatic
            guide was made for, with all sites that it hides from the guide.
        args: positional arguments of the model and of the guide.
        kwargs: keyword arguments of both.
        steps: number of steps of each run.
        learning_rate: Adam's step size, or several to try: one run each.
        schedule: `"cosine"`, None, or a function of the number of steps done, from 0, that gives a
            factor on the learning rate.
        loss: one of Pyro's evidence lower bounds. Default: `Trace_ELBO` with 16 particles, as a
            batch where the model can be batched, or `TraceEnum_ELBO` where the guide leaves
            discrete sites to be summed out.
        progress: whether to show a bar.
        seed: of all random numbers; the global ones are not touched.

    Returns:
        The guide with the history of its best run. Ctrl-C ends training with what is best so far.

    Raises:
        ValueError: where an argument is out of its range, or `model` is missing.
        TypeError: where `guide`, `model` or `args` is of the wrong kind.

    Examples:
        >>> import pyro, pyro.distributions as dist
        >>> from pyroflows import AutoRealNVP, fit_guide
        >>> def model():
        ...     pyro.sample("x", dist.Normal(5.0, 0.1).expand([2]).to_event(1))
        >>> guide = AutoRealNVP(model, layers=2)
        >>> result = fit_guide(guide, steps=100, learning_rate=[1e-3, 1e-2], progress=False)
        >>> abs(result.loss) < 0.1
        True
    """
    rates = as_scales(learning_rate, "learning_rate")
    steps, seed = as_count(steps, "steps"), as_count(seed, "seed", 0)
    check_schedule(schedule)
    factors = [factor(schedule, k, steps) for k in range(steps)]
    model = without(model_of(guide, model, "guide"), BlockMessenger)
    inputs = as_inputs(args, kwargs)
    if not (loss is None or isinstance(loss, ELBO)):
        raise TypeError(f"`loss` is {loss!r}, expected one of Pyro's, such as Trace_ELBO()")
    found = []
    with seeded(seed):
        if loss is None:
            model, loss = _bound(model, guide, inputs)
        run = _Run(model, guide, loss, factors, inputs, seed)
        with tqdm(total=steps * len(rates), disable=not progress, desc="fit_guide") as bar:
            for rate in rates:
                found.append(run.train(rate, bar))
                if found[-1][0].stopped == "interrupted":
                    break
    result, best = min(found, key=lambda one: one[0].loss)
    run.restore(best)
    if not math.isfinite(result.loss):
        warnings.warn(
            "the evidence lower bound was not finite at any step, or at hardly any: the guide is "
            "where it started",
            stacklevel=2,
        )
    return result


def _bound(model: Any, guide: Any, inputs: Inputs) -> tuple[Any, Any]:
    """Return the model and an evidence lower bound that suits it.

    Where discrete sites are left to it, it sums them out. Where the model cannot be batched, it
    takes one particle at a time.
    """
    args, kwargs = inputs
    drawn = poutine.trace(guide).get_trace(*args, **kwargs)
    trace = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs)
    nesting = max(plate_nesting(drawn), plate_nesting(trace))
    options: dict[str, Any] = {"num_particles": PARTICLES, "max_plate_nesting": nesting}
    if not set(discrete_sites(trace)) <= set(drawn.nodes):
        return config_enumerate(model), TraceEnum_ELBO(vectorize_particles=True, **options)
    reason = _unbatchable(model, trace, inputs, nesting)
    if reason:
        warnings.warn(
            f"the model takes one particle at a time, which takes longer: {reason}", stacklevel=3
        )
    return model, Trace_ELBO(vectorize_particles=not reason, **options)


def _unbatchable(model: Any, trace: Any, inputs: Inputs, nesting: int) -> str:
    """Say why a model does not give two equal particles at once twice the density of one.

    A model written for one particle may broadcast its data over several.
    """
    args, kwargs = inputs
    values = {}
    for name, site in prune_subsample_sites(trace).iter_stochastic_nodes():
        plates = [None] * (nesting - len(site["fn"].batch_shape))
        value = site["value"].detach()[(None, *plates)]
        values[name] = value.expand(2, *value.shape[1:])
    one = {name: trace.nodes[name]["value"].detach() for name in values}
    particles = pyro.plate("_particles", 2, dim=-nesting - 1)

    def density(model: Any, values: dict[str, Tensor]) -> float:
        with torch.no_grad(), alone(), seeded(0):
            found = poutine.trace(poutine.condition(model, values)).get_trace(*args, **kwargs)
            return float(found.log_prob_sum())

    try:
        single, double = density(model, one), density(particles(model), values)
    except (ArithmeticError, RuntimeError, ValueError) as error:
        return f"with several it raises {type(error).__name__}: {first_line(error)}"
    if math.isclose(2 * single, double, rel_tol=1e-3, abs_tol=1e-2) or not math.isfinite(single):
        return ""
    return f"two equal particles have the log-density {double:.5g}, one of them {single:.5g}"


class _Run:
    """A guide and its model, at the start of training."""

    def __init__(
        self,
        model: Any,
        guide: Any,
        loss: Any,
        factors: list[float],
        inputs: Inputs,
        seed: int,
    ) -> None:
        self.guide, self.loss, self.factors, self.seed = guide, loss, factors, seed
        self.inputs = (model, guide, *inputs[0]), inputs[1]
        with poutine.trace(param_only=True) as capture:
            self.evaluate()
        sites = capture.trace.nodes.values()
        self.parameters = list(dict.fromkeys(site["value"].unconstrained() for site in sites))
        self.start = self.copied()

    def train(self, rate: float, bar: Any) -> tuple[GuideFitResult, list[Tensor]]:
        """Return what one learning rate comes to, and its parameters."""
        self.restore(self.start)
        torch.manual_seed(self.seed)
        best, loss, skipped, stopped = self.start, math.inf, 0, "steps"
        losses: list[float] = []
        adam = torch.optim.Adam(self.parameters, foreach=True)
        for length in stretches(len(self.factors)):
            done = len(losses)
            try:
                while len(losses) < done + length:
                    adam.param_groups[0]["lr"] = rate * self.factors[len(losses)]
                    losses.append(self.attempt())
                    if math.isfinite(losses[-1]) and self.gradient_norm().isfinite():
                        adam.step()
                    else:
                        skipped += 1
                    adam.zero_grad()
                    bar.update()
            except KeyboardInterrupt:
                stopped = "interrupted"
            stretch = np.array(losses[done:])
            mean = mean_loss(stretch) if len(stretch) >= min(length, SHORTEST) else math.inf
            if mean < loss:
                loss, best = mean, self.copied()
            if stopped == "interrupted":
                break
            if not np.isfinite(stretch).any():
                stopped = "not finite"
                break
            bar.set_postfix_str(f"ELBO {-mean:.2f}")
        return GuideFitResult(self.guide, np.array(losses), loss, rate, skipped, stopped), best

    def evaluate(self) -> float:
        """Return the loss, and leave its gradients with the parameters."""
        args, kwargs = self.inputs
        return float(self.loss.loss_and_grads(*args, **kwargs))

    def attempt(self) -> float:
        """As `evaluate`; NaN where the model, or validation, refuses what a guide has become."""
        try:
            return self.evaluate()
        except (ArithmeticError, RuntimeError, ValueError):
            return math.nan

    def gradient_norm(self) -> Tensor:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def copied(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def restore(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)
            parameter.grad = None


def stretches(steps: int) -> list[int]:
    """Return the lengths of the stretches of training."""
    length = min(max(steps // STRETCHES, SHORTEST), steps)
    count = steps // length
    return [length] * (count - 1) + [steps - length * (count - 1)]


def mean_loss(losses: np.ndarray) -> float:
    """Return the mean of the finite losses, infinity where most are not."""
    finite = losses[np.isfinite(losses)]
    return float(finite.mean()) if 2 * len(finite) > len(losses) else math.inf
