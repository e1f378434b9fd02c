"""What both wings' guides have in common: their model, their options and their permutations."""

import contextlib
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from pyroflows_common.checks import as_scale
from pyroflows_common.draws import lowest
from pyroflows_common.history import FitResult

# Standard deviation of the first weights of each conditioner's last layer.
INIT_SCALE = 1e-3
# Number of draws from which medians and quantiles are taken.
DRAWS = 4096

MIXTURE = (
    "a mixture of guides has no transform of one base distribution, which NeuTraReparam or "
    "fit_guide(draws=...) would need: take the guide of one mode, from `parts`"
)
NOTHING = "found no Gaussian with a finite evidence lower bound"
SUBSAMPLED = (
    "the model takes a part of its data, which does not tell the modes and their shares: expected "
    "all data"
)
PARTIAL = (
    "`guide` draws a part of the model's latent sites only: expected a guide of all, as the modes "
    "of a part do not tell those of the whole"
)


def model_of(
    posterior: Any, model: Any, name: str = "posterior", note: str = ""
) -> Callable[..., Any]:
    """Check that `posterior` is a guide or a distribution, and return its model.

    Args:
        posterior: the guide or distribution.
        model: its model; None for the one that an automatic guide holds.
        name: how messages call the posterior.
        note: what to add if there is no model.
    """
    expected = "a guide" if name == "guide" else "a guide or a distribution"
    if not callable(posterior):  # distributions are callable, too
        raise TypeError(f"`{name}` is a {type(posterior).__name__}, expected {expected}")
    if isinstance(posterior, type):
        raise TypeError(f"`{name}` is the class {posterior.__name__}, expected an instance")
    if model is None:
        with contextlib.suppress(AttributeError, TypeError):  # a copied guide has lost its model
            model = posterior.model
    if model is None:
        raise ValueError(f"`model` is missing: only an automatic guide knows its own model{note}")
    if not callable(model):
        raise TypeError(f"`model` is a {type(model).__name__}, expected a function")
    return model


def check_function(value: Any, name: str, expected: str, flow: type) -> None:
    """Check that `value` is a function, and not a flow itself."""
    if not callable(value) or isinstance(value, flow):
        raise TypeError(f"`{name}` is a {type(value).__name__}, expected {expected}")


def check_options(init: str, init_scale: float, degrees_of_freedom: float | None) -> None:
    """Check the options of a guide: how it starts and what its base is."""
    if init not in ("search", "location"):
        raise ValueError(f"`init` is {init!r}, expected 'search' or 'location'")
    as_scale(init_scale, "init_scale", zero=False)
    if degrees_of_freedom is not None:
        as_scale(degrees_of_freedom, "degrees_of_freedom", zero=False)


def check_learner(guide: Any, kind: type, mixture: type, loss: Any) -> None:
    """Check that a guide can be trained on draws.

    Args:
        guide: the guide.
        kind: the wing's `AutoFlow`.
        mixture: the wing's mixture of guides.
        loss: the loss of an evidence lower bound, which draws take the place of.
    """
    if not isinstance(guide, kind):
        raise TypeError(
            f"`guide` is a {type(guide).__name__}, expected an AutoFlow to train on `draws`"
        )
    if isinstance(guide, mixture):
        raise ValueError(MIXTURE)
    if loss is not None:
        raise ValueError("`loss` is given, but `draws` take the place of an evidence lower bound")


def check_slopes(slopes: Any, draws: Any) -> bool:
    """Check that slopes are asked for at draws, and return whether they are."""
    if not isinstance(slopes, bool):
        raise TypeError(f"`slopes` is a {type(slopes).__name__}, expected True or False")
    if slopes and draws is None:
        raise ValueError("`slopes` is true, but there are no `draws` at which to take them")
    return slopes


def check_mixable(guide: Any, kind: type, mixture: type) -> None:
    """Check that guides like this one can be mixed.

    Args:
        guide: the guide.
        kind: the wing's `AutoFlow`.
        mixture: the wing's mixture of guides.
    """
    if not isinstance(guide, kind) or isinstance(guide, mixture):
        raise TypeError(f"`guide` is a {type(guide).__name__}, expected an AutoFlow")


def check_parameters(names: Iterable[str]) -> None:
    """Check that a model has no parameters of its own, which each part would learn anew."""
    found = sorted(names)
    if found:
        raise ValueError(
            f"the model has the parameters {found}, which the guide of each mode would learn "
            "differently: learn them by fit_guide first, and give the model their values"
        )


def warn_of_interruption(done: int, modes: int) -> None:
    """Warn that guides of some modes have not been trained, and are left out."""
    if done < modes:
        warnings.warn(
            f"training was interrupted: guides of {done} of {modes} modes are in the mixture",
            stacklevel=3,
        )


def outcome(
    result: FitResult, rate: float, gradients: int
) -> tuple[np.ndarray, float, float, int, str, int]:
    """Return what a `GuideFitResult` says of a run on draws, in its order."""
    loss = lowest(result.validation_losses)
    return result.losses, loss, rate, result.skipped, result.stopped, gradients


def check_built(flow: Any, size: int) -> None:
    """Check that a guide's flow is one of as many numbers as the model has."""
    shape = getattr(flow, "event_shape", (size,))  # a `Chain` refuses what is no flow
    if shape != (size,):
        raise ValueError(
            f"`build` made a flow on events of shape {shape}, but the model has {size} latent "
            f"numbers: expected one of shape {(size,)}"
        )


def warn_of_search(reason: str) -> None:
    """Warn that the search for a start has failed."""
    warnings.warn(
        f"the search for a start {reason}: the guide starts at `init_loc_fn` with `init_scale`",
        stacklevel=2,
    )


def foreign_support(name: str) -> str:
    """Say that a guide cannot follow the support of a site."""
    return (
        f"the support of site {name!r} depends on latent sites that the guide does not draw, or on "
        "another random choice: draw them in the same guide, or give the site a fixed support, "
        "such as a fraction between 0 and 1 that the model multiplies by the bound"
    )


def permutations(size: int, count: int) -> tuple[list[list[int]], list[int]]:
    """Return some random permutations, always the same, and the one that undoes all of them."""
    random, order, drawn = np.random.default_rng(0), np.arange(size), []
    for _ in range(count):
        drawn.append(random.permutation(size))
        order = order[drawn[-1]]
    return [permutation.tolist() for permutation in drawn], np.argsort(order).tolist()
