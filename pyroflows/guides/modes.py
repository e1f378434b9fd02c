"""`fit_mixture`: trains a guide for each mode of a posterior, and mixes them."""

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine import Trace
from pyro.poutine.block_messenger import BlockMessenger
from torch import Tensor

from pyroflows.guides import store
from pyroflows.guides.autoflow import AutoFlow
from pyroflows.guides.fit import GuideFitResult, fit_guide
from pyroflows.guides.mixture import AutoFlowMixture
from pyroflows.guides.model import LogDensity, alone, latent_sites, plates, without
from pyroflows.guides.reference import GuideDistribution, Start
from pyroflows.rng import seeded
from pyroflows.transform import TransformModule
from pyroflows_common.ascent import as_settings
from pyroflows_common.checks import Inputs, as_count, as_inputs
from pyroflows_common.guides import (
    PARTIAL,
    SUBSAMPLED,
    check_mixable,
    check_parameters,
    model_of,
    warn_of_interruption,
)
from pyroflows_common.mixture import BLOCK, DRAWS, bound_of, weights_of
from pyroflows_common.search import MODES


@dataclasses.dataclass
class MixtureFitResult:
    """The result of `fit_mixture`.

    Args:
        guide: the mixture; the guide itself if there is one mode.
        weights: those of the parts, `(K,)`: the share of the posterior around each mode.
        parts: the result of `fit_guide` for each mode, the one with the best start first.
        loss: minus the evidence lower bound of the mixture, in nats; that of `fit_guide` if there
            is one mode.
    """

    guide: Any = dataclasses.field(repr=False)
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
    seed: int = 0,
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

    To keep the mixture, pickle it, as by `torch.save(result.guide, path)`. Its median may lie
    between the modes: take those of the `parts`.

    Args:
        guide: a guide of all latent sites of its model, an `AutoFlow`. It starts anew, and is the
            guide of the mode with the best start.
        starts: number of points from which the search sets out, at least 4.
        args: as in `fit_guide`.
        kwargs: as in `fit_guide`.
        steps: the most steps for each mode.
        learning_rate: as in `fit_guide`.
        schedule: as in `fit_guide`.
        loss: as in `fit_guide`.
        progress: as in `fit_guide`.
        seed: seed of all random numbers; the global ones are left alone.

    Returns:
        The mixture as a guide, for `Predictive`, `to_arviz`, `log_evidence` and `guide.quantiles`,
        with the weights and the result of each part. Ctrl-C ends training and mixes the guides so
        far, with a warning.

    Raises:
        ValueError: if an argument is out of its range, if the guide draws only a part of the
            model's sites, or if the model has parameters of its own or takes a part of its data.
        TypeError: if `guide` is no `AutoFlow`, or another argument has the wrong type.

    References:
        Cappé, Douc, Guillin, Marin and Robert, "Adaptive importance sampling in general mixture
        classes" (Statistics and Computing 2008), for the weights.

    Examples:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyroflows import AutoRealNVP, fit_mixture
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(0.0, 3.0))
        ...     pyro.sample("y", dist.Normal(x**2, 0.1), obs=torch.tensor(4.0))
        >>> result = fit_mixture(AutoRealNVP(model), steps=100, progress=False)
        >>> result.weights.round(1)
        array([0.5, 0.5])
    """
    check_mixable(guide, AutoFlow, AutoFlowMixture)
    starts, seed = as_count(starts, "starts", 4), as_count(seed, "seed", 0)
    settings = as_settings(steps, learning_rate, schedule, loss, progress, ELBO)
    inputs = as_inputs(args, kwargs)
    with seeded(seed):
        _check_model(guide, inputs)
        names = _names(guide._pyro_name)
        for name in names:
            store.forget(name)
        begins, log_density = guide._modes(starts, *inputs[0], **inputs[1])
    options = {
        "args": args,
        "kwargs": kwargs,
        "steps": settings.steps,
        "learning_rate": settings.rates,
        "schedule": schedule,
        "loss": loss,
        "progress": progress,
        "seed": seed,
    }
    parts: list[GuideFitResult] = []
    for start, name in zip(begins, names[:-1], strict=False):
        with seeded(seed):
            part = guide if not parts else guide._another(name)
            part._set_up(functools.partial(_begin, start=start), *inputs[0], **inputs[1])
        parts.append(fit_guide(part, **options))
        if parts[-1].stopped == "interrupted":
            break
    warn_of_interruption(len(parts), len(begins))
    if len(parts) == 1 or log_density is None:
        return MixtureFitResult(guide, np.ones(1), parts, parts[0].loss)
    with seeded(seed), torch.no_grad():
        log_p, log_q = _densities([part.guide for part in parts], log_density)
        weights = weights_of(log_p, log_q)
        transforms = [copy.deepcopy(part.guide._modules["transform"]) for part in parts]
        mixture = AutoFlowMixture(guide, transforms, weights, name=names[-1])
        mixture(*inputs[0], **inputs[1])  # the parameter store has it from now on
    return MixtureFitResult(mixture, weights, parts, -bound_of(weights, log_p, log_q))


def _names(name: str) -> list[str]:
    """Return the names of the guides of modes in the parameter store, and that of the mixture."""
    return [name, *(f"{name}.mode{k}" for k in range(1, MODES)), f"{name}.mixture"]


def _begin(flow: TransformModule, start: Start) -> None:
    flow.layers[-1].load_state_dict(start.state_dict())


def _check_model(guide: AutoFlow, inputs: Inputs) -> None:
    """Check that the guide draws all latent sites of its model, of all data, without parameters.

    Sites that the guide leaves out and that can be summed out do not matter.
    """
    args, kwargs = inputs
    model = model_of(guide, None, "guide")

    def start(site: dict[str, Any]) -> Tensor | None:
        return None if site["fn"].support.is_discrete else guide.init_loc_fn(site)

    def traced(model: Callable[..., Any]) -> Trace:
        return poutine.trace(InitMessenger(start)(model)).get_trace(*args, **kwargs)

    with alone():
        seen = latent_sites(traced(model))
        trace = traced(without(model, InitMessenger, BlockMessenger))
    check_parameters(name for name, site in trace.nodes.items() if site["type"] == "param")
    if any(frame.size != frame.full_size for frame in plates(trace)):
        raise ValueError(SUBSAMPLED)
    for name, site in latent_sites(trace).items():
        discrete = site["fn"].support.is_discrete
        if not site["fn"].has_enumerate_support if discrete else name not in seen:
            raise ValueError(PARTIAL)


@torch.no_grad()
def _densities(guides: list[AutoFlow], log_density: LogDensity) -> tuple[np.ndarray, np.ndarray]:
    """Return the log-densities of model and parts at draws of each part."""
    parts = [guide._posterior(GuideDistribution) for guide in guides]
    draws = [part.sample((DRAWS,)) for part in parts]
    log_q = [torch.stack([part.log_prob(x) for part in parts], -1) for x in draws]
    log_p = [torch.cat([log_density(some) for some in x.split(BLOCK)]) for x in draws]
    return torch.stack(log_p).cpu().numpy(), torch.stack(log_q).cpu().numpy()
