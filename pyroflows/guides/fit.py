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
from torch import Tensor
from tqdm.auto import tqdm

from pyroflows.guides.model import (
    alone,
    first_line,
    latent_sites,
    model_of,
    plate_nesting,
    without,
)
from pyroflows.rng import seeded
from pyroflows_common.checks import Inputs, as_count, as_inputs, as_scales
from pyroflows_common.schedule import SHORTEST, check_schedule, factor, mean_loss, stretches

PARTICLES = 16


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

    guide: Any = dataclasses.field(repr=False)
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
        ValueError: where an argument is out of its range, `model` is missing, or the guide leaves
            sites to a default `loss` that cannot be summed out.
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
    own, model = model is None, model_of(guide, model, "guide")
    if own:  # an automatic guide's, with all that it hides from it
        model = without(model, BlockMessenger)
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
    if result.stopped == "not finite":
        left = "those of its best stretch" if math.isfinite(result.loss) else "what they were"
        warnings.warn(
            f"training stopped after {len(result.losses)} steps, as the evidence lower bound was "
            f"not finite{run.cause}: the guide's parameters are {left}",
            stacklevel=2,
        )
    return result


def _bound(model: Any, guide: Any, inputs: Inputs) -> tuple[Any, Any]:
    """Return the model and an evidence lower bound that suits it.

    Where discrete sites are left to it, it sums them out. Where the model cannot be batched, it
    takes one particle at a time.
    """
    traces = [_run(model, guide, inputs) for _ in range(PARTICLES)]
    drawn, trace = traces[0]
    nesting = max(plate_nesting(drawn), plate_nesting(trace))
    reason = _unbatchable(model, [trace for _, trace in traces], inputs, nesting)
    options = {
        "num_particles": PARTICLES,
        "max_plate_nesting": nesting,
        "vectorize_particles": not reason,
    }
    if reason:
        warnings.warn(
            f"the model takes one particle at a time, which takes longer: {reason}", stacklevel=3
        )
    left = {n: site for n, site in latent_sites(trace).items() if n not in drawn.nodes}
    if not left:
        return model, Trace_ELBO(**options)
    lost = sorted(name for name, site in left.items() if not site["fn"].has_enumerate_support)
    if lost:
        raise ValueError(
            f"`guide` does not draw the sites {lost} of `model`, which cannot be summed out: the "
            "bound would not be one. Draw them in the guide, or give a `loss` that can do without"
        )
    return config_enumerate(model), TraceEnum_ELBO(**options)


def _run(model: Any, guide: Any, inputs: Inputs) -> tuple[Any, Any]:
    """Return traces of guide and model with the same draws."""
    args, kwargs = inputs
    drawn = poutine.trace(guide).get_trace(*args, **kwargs)
    return drawn, poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs)


def _unbatchable(model: Any, traces: list[Any], inputs: Inputs, nesting: int) -> str:
    """Say why a model does not give several particles at once the densities of each by itself.

    One that is written for a single particle may broadcast its data over several, or mix them.
    """
    args, kwargs = inputs
    values = [{n: s["value"].detach() for n, s in latent_sites(t).items()} for t in traces]
    batch = {}
    for name, site in latent_sites(traces[0]).items():
        several = torch.stack([value[name] for value in values])
        plates = [None] * (nesting - len(site["fn"].batch_shape))
        batch[name] = several[(slice(None), *plates)]
    particles = pyro.plate("_particles", len(values), dim=-nesting - 1)

    def densities(model: Any, values: dict[str, Tensor]) -> dict[str, float]:
        with torch.no_grad(), alone(), seeded(0):
            trace = poutine.trace(poutine.condition(model, values)).get_trace(*args, **kwargs)
            trace.compute_log_prob()
            sites = ((n, s) for n, s in trace.nodes.items() if s["type"] == "sample")
            return {name: float(site["log_prob"].sum()) for name, site in sites}

    try:
        singles = [densities(model, value) for value in values]
        found = densities(particles(model), batch)
    except (ArithmeticError, RuntimeError, ValueError) as error:
        return f"with several it raises {type(error).__name__}: {first_line(error)}"
    for name in singles[0]:
        expected = sum(single[name] for single in singles)
        if not np.isclose(found[name], expected, rtol=1e-3, atol=1e-2, equal_nan=True):
            return (
                f"site {name!r} has the log-density {found[name]:.5g} for several, and "
                f"{expected:.5g} in sum for each of them"
            )
    return ""


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
        self.cause = ""
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
        except torch.OutOfMemoryError:
            raise
        except (ArithmeticError, RuntimeError, ValueError) as error:
            self.cause = f" or raised {type(error).__name__}: {first_line(error)}"
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
