"""The sites of a model and a guide: whether the two fit, and what draws of the guide hold."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

Array = TypeVar("Array")  # the host's, or NumPy's


class Sites(NamedTuple):
    """The sites of one run by name, as the host traces them."""

    latent: dict[str, Any]
    observed: dict[str, Any]  # without factors
    deterministic: dict[str, Any]


class Draws(NamedTuple, Generic[Array]):
    """Draws of a guide, and what the model makes of them.

    The first dimension of each array is that of the draws, except in `observed`. Of a guide with
    local sites, `log_p` minus `log_q` is the log ratio of the global ones, and `joint` that of all.
    """

    sites: Sites
    observed: dict[str, Array]
    values: dict[str, Array]
    log_q: Array
    log_p: Array
    log_likelihood: dict[str, Array]
    deterministic: dict[str, Array]
    joint: Array | None = None

    def as_numpy(self, convert: Callable[[Array], np.ndarray]) -> "Draws[np.ndarray]":
        """Return the same draws with each array converted."""

        def each(arrays: Mapping[str, Array]) -> dict[str, np.ndarray]:
            return {name: convert(array) for name, array in arrays.items()}

        return Draws(
            self.sites,
            each(self.observed),
            each(self.values),
            convert(self.log_q),
            convert(self.log_p),
            each(self.log_likelihood),
            each(self.deterministic),
            None if self.joint is None else convert(self.joint),
        )


def site_of(density: Any, sites: Sites, is_real: Callable[[Any], bool]) -> str:
    """Return the name of the only latent site of a model, which a density has to fit.

    Args:
        density: a distribution of the host.
        sites: those of the model.
        is_real: whether a support is the real line, or a product of it.
    """
    if len(sites.latent) != 1:
        raise ValueError(
            f"`posterior` is a density, but `model` has the latent sites {sorted(sites.latent)}: "
            "expected one; give observations their data by `args` or `kwargs`, or use a guide"
        )
    ((name, site),) = sites.latent.items()
    support, batch = site["fn"].support, tuple(density.batch_shape)
    shape, expected = tuple(density.event_shape), tuple(site["fn"].shape())
    if not is_real(support):
        raise ValueError(
            f"`posterior` is a density on the real line, but site {name!r} of `model` has the "
            f"support {support}: use a guide"
        )
    if batch:
        raise ValueError(
            f"`posterior` is a batch of densities of shape {batch}, expected one: give a "
            "conditional flow one context"
        )
    if shape != expected:
        raise ValueError(
            f"`posterior` has events of shape {shape}, but site {name!r} of `model` has shape "
            f"{expected}"
        )
    return name


def check_match(guide: Sites, model: Sites) -> None:
    """Check that a guide draws the latent sites of its model, and each in the right shape."""
    auxiliary = {n for n, s in guide.latent.items() if s["infer"].get("is_auxiliary")}
    missing = sorted(set(model.latent) - set(guide.latent))
    surplus = sorted(set(guide.latent) - set(model.latent) - auxiliary)
    if not model.latent:
        raise ValueError("`model` has no latent sites: `posterior` has nothing to draw")
    if missing:
        raise ValueError(
            f"`posterior` does not draw the latent sites {missing} of `model`, expected all of "
            "them: give observations their data by `args` or `kwargs`, and sum discrete ones out "
            "in the model"
        )
    if surplus:
        raise ValueError(
            f"`posterior` draws the sites {surplus}, which `model` does not have: mark auxiliary "
            "ones with infer={'is_auxiliary': True}"
        )
    for name, site in model.latent.items():
        shape, expected = tuple(np.shape(site["value"])), tuple(site["fn"].shape())
        if shape != expected:
            raise ValueError(
                f"`posterior` draws site {name!r} with shape {shape}, but in `model` it has shape "
                f"{expected}"
            )


def check_scored(guide: Sites, vectors: Mapping[str, Iterable[str]]) -> None:
    """Check that values of the model's sites tell all that a guide draws.

    Args:
        guide: its sites.
        vectors: auxiliary sites from which it makes sites of the model, and the names of those.
    """
    known = set(vectors).union(*vectors.values())
    auxiliary = (n for n, s in guide.latent.items() if s["infer"].get("is_auxiliary"))
    hidden = sorted(set(auxiliary) - known)
    if hidden:
        raise ValueError(
            f"`posterior` draws the auxiliary sites {hidden}: its density at `samples`, which do "
            "not have them, is unknown; use an automatic guide of continuous sites, or leave "
            "`samples` out"
        )


def check_plates(plates: Iterable[tuple[str, int | None, int | None]]) -> None:
    """Check that no plate, given by its name, size and full size, takes a subsample."""
    for name, size, full_size in plates:
        if None not in (size, full_size) and size != full_size:
            raise ValueError(
                f"plate {name!r} takes a subsample, {size} of {full_size}: the ratios need all of "
                "the data; choose `args` or `kwargs` so that the model takes all"
            )


def check_widths(values: Mapping[str, np.ndarray]) -> None:
    """Check that no site has the same value in all draws, as those of a guide of points have."""
    for name, value in values.items():
        if value.dtype.kind == "f" and value.size and (value == value[0]).all():
            raise ValueError(
                f"`posterior` gives site {name!r} the same value in all {len(value)} draws: a "
                "point has no density to weigh; use a guide with a width"
            )


def dim_names(sites: Sites) -> dict[str, list[str]]:
    """Name the dimensions of each site by its plates."""
    every = {**sites.latent, **sites.deterministic, **sites.observed}
    result = {}
    for name, site in every.items():
        shape = np.shape(site["value"])
        plates = [plate for plate in site["cond_indep_stack"] if plate.dim is not None]
        if name in sites.deterministic:
            # It has no event_dim, or none to rely on: the plates have to fit in only one way.
            depth = max((-plate.dim for plate in plates), default=0)
            fits = [
                sum(shape[batch + plate.dim] == plate.size for plate in plates)
                for batch in range(depth, len(shape) + 1)
            ]
            best = max(fits, default=0)
            batch = depth + fits.index(best) if fits.count(best) == 1 else 0
        else:
            batch = len(shape) - site["fn"].event_dim
        names = result[name] = [f"{name}_dim_{axis}" for axis in range(len(shape))]
        for plate in plates:
            axis, taken = batch + plate.dim, plate.name in {"chain", "draw", *every}
            if axis >= 0 and shape[axis] == plate.size and not taken:
                names[axis] = plate.name
    return result
