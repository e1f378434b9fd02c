"""`fit_guide`: tries several learning rates and keeps the highest evidence lower bound."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.poutine import Trace
from pyro.poutine.block_messenger import BlockMessenger
from torch import Tensor

from pyroflows.guides.autoflow import AutoFlow
from pyroflows.guides.draws import fit_to_draws
from pyroflows.guides.mixture import AutoFlowMixture
from pyroflows.guides.model import (
    Screened,
    alone,
    first_line,
    latent_sites,
    model_of,
    plate_nesting,
    without,
)
from pyroflows.guides.store import settled
from pyroflows.rng import seeded
from pyroflows_common.ascent import BOUND, GRADIENT, PARTICLES, Ascent, as_settings
from pyroflows_common.checks import Inputs, as_count, as_inputs
from pyroflows_common.guides import check_learner, check_slopes, outcome

Model = Callable[..., Any]  # or a guide


@dataclasses.dataclass
class GuideFitResult:
    """The result of `fit_guide`.

    Args:
        guide: the trained guide.
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
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    steps: int = 5000,
    learning_rate: float | Sequence[float] = 5e-3,
    schedule: str | Callable[[int], float] | None = "auto",
    loss: Any = None,
    progress: bool = True,
    seed: int = 0,
) -> GuideFitResult:
    r"""Train a guide by the host's `SVI`, and keep the best of it.

    Adam climbs the evidence lower bound with a learning rate that falls along a cosine, which
    averages out the noise of the last steps. Once the mean bound of 250 steps is no longer above
    that of the 250 before, beyond its noise, the learning rate falls to zero within as many steps
    as were made so far, at most 1000, and training ends: most guides need a part of `steps`. A run
    is divided into fifty stretches. The parameters after the last stretch whose mean loss is no
    higher than the lowest one, within its noise, are kept. With several learning rates there is one
    run for each, all from the start of the guide, and the best run counts. Runs with the same
    seed are identical.

    A step is skipped if its loss or gradient is not finite, or if the model raises an error. A
    stretch of skipped steps only ends the run.

    With `draws` of the posterior, the guide is trained on them by maximum likelihood, as flows are
    by `fit`, in place of the bound: without gradients of the model, and in all modes that the draws
    have. A guide that is new starts as their normal distribution. A tenth of them is held
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
        guide: an automatic or hand-written guide. Its parameters, and those of the model, are
            trained in place; Pyro's parameter store holds them.
        model: the model, with its data as observed sites. Default: the model of an automatic
            guide, including sites hidden from the guide.
        draws: draws of the posterior, such as those of a short run of NUTS, for an `AutoFlow`: a
            dictionary of its sites, as `mcmc.get_samples()` gives it, with or without chains; the
            data of ArviZ, whose weights count if they are of `to_arviz`; or a sampler that has run.
        slopes: whether to train on the slopes of the model's log-density at the draws.
        args: positional arguments of the model and of the guide.
        kwargs: keyword arguments of both.
        steps: the most steps of each run.
        learning_rate: Adam's step size, or several to try.
        schedule: `"auto"`; `"cosine"`, which takes all steps; None for a constant rate; or a
            function of the number of steps done, from 0, that gives a factor on the learning rate.
        loss: one of Pyro's evidence lower bounds. Default: `Trace_ELBO` with 16 particles, as a
            batch if the model can be batched, or `TraceEnum_ELBO` if the guide leaves discrete
            sites to be summed out.
        progress: whether to show a bar; where standard error is no terminal, it is a few lines.
        seed: seed of all random numbers; the global ones are left alone.

    Returns:
        The guide with the history of its best run. Ctrl-C ends training and keeps the best so far.

    Raises:
        ValueError: if an argument is out of its range, if `model` is missing, if the guide leaves
            sites to a default `loss` that cannot be summed out, or if `draws` lack a site, are
            fewer than ten, lie outside of a support or have no finite `slopes`.
        TypeError: if `guide`, `model` or `args` has the wrong type, or if the guide of `draws` is
            no `AutoFlow`.

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
    settings = as_settings(steps, learning_rate, schedule, loss, progress, ELBO)
    slopes = check_slopes(slopes, draws)
    seed = as_count(seed, "seed", 0)
    own, model = model is None, model_of(guide, model, "guide")
    seen = model
    if own:  # the guide may see only a part of its model
        model = without(model, BlockMessenger)
    model = Screened()(model)
    inputs = as_inputs(args, kwargs)
    if draws is not None:
        check_learner(guide, AutoFlow, AutoFlowMixture, loss)
        rates, options = settings.rates, settings.of_draws()
        found = fit_to_draws(guide, seen, draws, inputs, rates, seed, slopes, **options)
        return GuideFitResult(guide, *outcome(*found))
    with seeded(seed):
        if loss is None:
            model, loss = _bound(model, guide, inputs)
        ascent = _Ascent(model, guide, loss, inputs, seed)
        best = ascent.best(settings)
    ascent.restore(best.state)
    if best.stopped == "not finite":
        best.warn(GRADIENT if np.isfinite(best.losses[-1]) else BOUND + ascent.cause)
    count = len(best.losses) * getattr(loss, "num_particles", 1)
    return GuideFitResult(guide, *best[1:], count)


def _bound(model: Model, guide: Model, inputs: Inputs) -> tuple[Model, ELBO]:
    """Return the model and an evidence lower bound that suits it.

    The bound sums out discrete sites that the guide leaves. It takes one particle at a time if the
    model cannot be batched.
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
            "loss would be no bound. Draw them in the guide, or give a `loss` that does without"
        )
    return config_enumerate(model), TraceEnum_ELBO(**options)


def _run(model: Model, guide: Model, inputs: Inputs) -> tuple[Trace, Trace]:
    """Return traces of guide and model with the same draws."""
    args, kwargs = inputs
    drawn = poutine.trace(guide).get_trace(*args, **kwargs)
    return drawn, poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs)


def _unbatchable(model: Model, traces: list[Trace], inputs: Inputs, nesting: int) -> str:
    """Say why the densities of several particles at once are not those of each one alone.

    A model written for a single particle may broadcast its data over several, or mix them.
    """
    args, kwargs = inputs
    values = [{n: s["value"].detach() for n, s in latent_sites(t).items()} for t in traces]
    batch = {}
    for name, site in latent_sites(traces[0]).items():
        several = torch.stack([value[name] for value in values])
        plates = [None] * (nesting - len(site["fn"].batch_shape))
        batch[name] = several[(slice(None), *plates)]
    particles = pyro.plate("_particles", len(values), dim=-nesting - 1)

    def densities(model: Model, values: dict[str, Tensor]) -> dict[str, float]:
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


class _Ascent(Ascent):
    """Training of a guide and its model."""

    def __init__(
        self,
        model: Model,
        guide: Model,
        loss: ELBO,
        inputs: Inputs,
        seed: int,
    ) -> None:
        self.loss, self.seed = loss, seed
        self.inputs = (model, guide, *inputs[0]), inputs[1]
        with poutine.trace(param_only=True) as capture:
            self.evaluate()
        sites = capture.trace.nodes.values()
        self.parameters = list(dict.fromkeys(site["value"].unconstrained() for site in sites))
        self.start = self.state_now()

    def begin(self) -> None:
        self.restore(self.start)
        torch.manual_seed(self.seed)
        self.adam = torch.optim.Adam(self.parameters, fused=True)
        self.skipped = 0
        self.cause = ""

    def climb(self, rates: np.ndarray) -> Iterator[np.ndarray]:
        for rate in rates.tolist():
            self.adam.param_groups[0]["lr"] = rate
            with settled():
                loss = self.attempt()
            yield np.array([loss])
            if math.isfinite(loss) and self.gradient_norm().isfinite():
                self.adam.step()
            else:
                self.skipped += 1
            self.adam.zero_grad()

    def evaluate(self) -> float:
        """Return the loss, and leave its gradients with the parameters."""
        args, kwargs = self.inputs
        return float(self.loss.loss_and_grads(*args, **kwargs))

    def attempt(self) -> float:
        """Return the loss; NaN if the model, or validation, raises an error at these parameters."""
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

    def state_now(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]

    def stands(self, before: list[Tensor]) -> bool:
        return all(map(torch.equal, self.parameters, before))

    def blind(self) -> bool:
        with alone():
            return not any(self.guides() for _ in range(PARTICLES))

    def guides(self) -> bool:
        """Return whether the model's gradient is finite at a draw of the guide."""
        (model, guide, *args), kwargs = self.inputs
        sites = latent_sites(poutine.trace(guide).get_trace(*args, **kwargs))
        values = {name: site["value"].detach() for name, site in sites.items()}
        leaves = [v.requires_grad_() for v in values.values() if v.is_floating_point()]
        if not leaves:
            return True
        try:
            trace = poutine.trace(poutine.condition(model, values)).get_trace(*args, **kwargs)
            density = trace.log_prob_sum() + 0.0 * sum(leaf.sum() for leaf in leaves)
        except (ArithmeticError, RuntimeError, ValueError):  # as in `attempt`
            return False
        slopes = torch.autograd.grad(density, leaves)
        return all(bool(slope.isfinite().all()) for slope in slopes)

    @torch.no_grad()
    def restore(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)
            parameter.grad = None
