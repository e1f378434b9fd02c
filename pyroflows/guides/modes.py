"""`fit_mixture`: trains a guide for each mode of a posterior, and mixes them."""

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pyro import poutine

from pyroflows.guides import store
from pyroflows.guides.autoflow import AutoFlow
from pyroflows.guides.fit import GuideFitResult, fit_guide
from pyroflows.guides.mixture import AutoFlowMixture
from pyroflows.guides.model import LogDensity, alone
from pyroflows.guides.reference import GuideDistribution, Start
from pyroflows.rng import seeded
from pyroflows.transform import TransformModule
from pyroflows_common.checks import Inputs, as_count, as_inputs
from pyroflows_common.guides import check_mixable, check_parameters, model_of
from pyroflows_common.mixture import DRAWS, bound_of, weights_of


@dataclasses.dataclass
class MixtureFitResult:
    """The result of `fit_mixture`.

    Args:
        guide: the mixture; the guide itself if there is one mode.
        weights: those of the parts, `(K,)`: the share of the posterior around each mode.
        parts: the result of `fit_guide` for each mode, the one with the best start first.
        loss: minus the evidence lower bound of the mixture, in nats.
    """

    guide: Any = dataclasses.field(repr=False)
    weights: np.ndarray
    parts: list[GuideFitResult] = dataclasses.field(repr=False)
    loss: float


def fit_mixture(
    guide: AutoFlow,
    model: Callable[..., Any] | None = None,
    *,
    starts: int = 64,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    steps: int = 5000,
    learning_rate: float | Sequence[float] = 5e-3,
    schedule: str | Callable[[int], float] | None = "cosine",
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
    is missed in silence, as it is by any approximation: give more `starts`, and wide priors narrow
    enough to draw from.

    Args:
        guide: a guide of all latent sites of its model, an `AutoFlow`. It starts anew, and is the
            guide of the mode with the best start.
        model: as in `fit_guide`. Default: the guide's.
        starts: number of points from which the search sets out, at least 4.
        args: as in `fit_guide`.
        kwargs: as in `fit_guide`.
        steps: number of steps for each mode.
        learning_rate: as in `fit_guide`.
        schedule: as in `fit_guide`.
        loss: as in `fit_guide`.
        progress: as in `fit_guide`.
        seed: seed of all random numbers; the global ones are left alone.

    Returns:
        The mixture as a guide, for `Predictive`, `to_arviz`, `log_evidence` and `guide.quantiles`,
        with the weights and the result of each part. Ctrl-C ends training and mixes the guides so
        far.

    Raises:
        ValueError: if an argument is out of its range, if the guide draws only a part of the
            model's sites, or if the model has parameters of its own.
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
    starts = as_count(starts, "starts", 4)
    inputs = as_inputs(args, kwargs)
    seed = as_count(seed, "seed", 0)
    with seeded(seed):
        check_parameters(_parameters(model_of(guide, model, "guide"), inputs))
        name = guide._pyro_name
        store.forget(name)
        begins, log_density = guide._modes(starts, *inputs[0], **inputs[1])
    settings = {
        "args": args,
        "kwargs": kwargs,
        "steps": steps,
        "learning_rate": learning_rate,
        "schedule": schedule,
        "loss": loss,
        "progress": progress,
        "seed": seed,
    }
    parts: list[GuideFitResult] = []
    for k, start in enumerate(begins):
        part = guide if k == 0 else guide._another(f"{name}_{k}")
        part._set_up(functools.partial(_begin, start=start), *inputs[0], **inputs[1])
        parts.append(fit_guide(part, model, **settings))
        if parts[-1].stopped == "interrupted":
            break
    if len(parts) == 1 or log_density is None:
        return MixtureFitResult(guide, np.ones(1), parts, parts[0].loss)
    with seeded(seed):
        log_p, log_q = _densities([part.guide for part in parts], log_density)
    weights = weights_of(log_p, log_q)
    transforms = [copy.deepcopy(part.guide._modules["transform"]) for part in parts]
    mixture = AutoFlowMixture(guide, transforms, weights, name=f"{name}_mixture")
    mixture._setup_prototype(*inputs[0], **inputs[1])
    return MixtureFitResult(mixture, weights, parts, -bound_of(weights, log_p, log_q))


def _begin(flow: TransformModule, start: Start) -> None:
    flow.layers[-1].load_state_dict(start.state_dict())


def _parameters(model: Callable[..., Any], inputs: Inputs) -> list[str]:
    """Return the names of a model's own parameters."""
    with alone(), poutine.trace(param_only=True) as capture:
        model(*inputs[0], **inputs[1])
    return list(capture.trace.nodes)


@torch.no_grad()
def _densities(guides: list[AutoFlow], log_density: LogDensity) -> tuple[np.ndarray, np.ndarray]:
    """Return the log-densities of model and parts at draws of each part."""
    parts = [guide._posterior(GuideDistribution) for guide in guides]
    draws = [part.sample((DRAWS,)) for part in parts]
    log_q = [torch.stack([part.log_prob(x) for part in parts], -1) for x in draws]
    log_p = [log_density(x) for x in draws]
    return torch.stack(log_p).cpu().numpy(), torch.stack(log_q).cpu().numpy()
