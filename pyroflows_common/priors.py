"""The values of a prior: their names and supports, their form in files, their region."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pyroflows_common.archive import plain
from pyroflows_common.checks import as_count, as_scale, check_rows
from pyroflows_common.draws import NamedDraws, as_draws, as_mapping, chosen
from pyroflows_common.support import Support

# Supports of whole vectors and matrices.
WHOLE = "simplex", "ordered_vector", "corr_cholesky"
# With fewer draws where the new posterior lies, the prior is an extrapolation.
FEW = 100.0


class Site(NamedTuple):
    """A named value of a prior.

    Args:
        name: its name.
        shape: its shape.
        batch_dim: number of its first dimensions that are plates'.
        support: its support, as files hold it: for each number, or a name for each vector.
    """

    name: str
    shape: tuple[int, ...]
    batch_dim: int
    support: Support


def check_sites(sites: Sequence[Site], name: str) -> None:
    """Check that the names of sites, and that of the latent site, are different."""
    names = [name, *(site.name for site in sites)]
    twice = sorted({one for one in names if names.count(one) > 1})
    if twice:
        raise ValueError(
            f"`name` and the names of the sites have {twice} twice, expected different ones. If "
            "the model draws from a FlowPrior, pass supports=prior.supports in place of the model"
        )


def check_values(shapes: Mapping[str, Sequence[int]], sites: Sequence[Site]) -> None:
    """Check that there is a value for each site, of a shape `(*batch, *shape)`, and no other."""
    expected = {site.name: site.shape for site in sites}
    if set(shapes) != set(expected):
        raise ValueError(f"`values` has {sorted(shapes)}, expected {sorted(expected)}")
    batches = {}
    for name, shape in expected.items():
        own = tuple(shapes[name])
        cut = len(own) - len(shape)
        if cut < 0 or own[cut:] != shape:
            raise ValueError(
                f"`values` has site {name!r} of shape {own}, expected (*batch, *{shape})"
            )
        batches[name] = own[:cut]
    if len(set(batches.values())) > 1:
        raise ValueError(f"`values` has different batch shapes: {batches}")


def joint_shape(site: Site, batch: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a site's value for latent vectors of a batch shape.

    The site's plates take dimensions that the batch leaves to them, as in the hosts' guides.
    """
    inner = len(batch) - site.batch_dim
    free = inner >= 0 and all(size == 1 for size in batch[inner:])
    return (*(batch[:inner] if free else batch), *site.shape)


Described = tuple[tuple[Site, ...], float, str]  # sites, draws and name of a prior


def describe(sites: Sequence[Site], draws: float, name: str) -> dict[str, Any]:
    """Return the sites, draws and name of a prior as files hold them."""
    return {"sites": [list(site) for site in sites], "draws": draws, "name": name}


def described(about: Mapping[str, Any]) -> Described | None:
    """Return the sites, draws and name of the prior in a file; None if it has a flow only."""
    found = about.get("prior")
    if found is None:
        return None
    try:
        sites = tuple(_site(*map(plain, site)) for site in found["sites"])
        return sites, as_scale(found["draws"], "draws", zero=False), str(found["name"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"its prior is {found!r:.80}") from error


def _site(name: str, shape: tuple[int, ...], batch_dim: int, support: Any) -> Site:
    """Return the site of a file, checked."""
    sizes = [as_count(size, "shape") for size in shape]
    if not isinstance(name, str) or not 0 <= as_count(batch_dim, "batch_dim", 0) <= len(sizes):
        raise ValueError("a name or the number of plates is wrong")
    site = Site(name, tuple(sizes), batch_dim, support)
    if isinstance(support, str):
        check_whole(site)
    else:
        pairs = [(low, high) for low, high in support]
        ends = [-math.inf if low is None else low for low, _ in pairs]
        others = [math.inf if high is None else high for _, high in pairs]
        order = all(low < high for low, high in zip(ends, others, strict=True))
        if not order or len(pairs) not in (1, math.prod(sizes)):
            raise ValueError("a support is wrong")
    return site


def check_whole(site: Site) -> None:
    """Check that the support of whole vectors or matrices is known and fits a site's shape."""
    name, shape, _, support = site
    square = support != "corr_cholesky" or (len(shape) > 1 and shape[-1] == shape[-2])
    if support not in WHOLE or not shape or shape[-1] < 2 or not square:
        raise ValueError(f"site {name!r} has shape {shape}, but its support is {support}")


def check_like(prior: Described | None, sites: Sequence[Site] | None) -> None:
    """Check that a file holds a prior of these sites, or a flow if there are none."""
    held, wanted = (None if one is None else tuple(one) for one in (prior and prior[0], sites))
    if held != wanted:
        kinds = ["a flow" if one is None else f"a FlowPrior of {one}" for one in (held, wanted)]
        raise ValueError(f"it holds {kinds[0]}, but `like` is {kinds[1]}")


class Known(NamedTuple):
    """What a model says of a latent site.

    Args:
        shape: shape of its value.
        batch_dim: number of its first dimensions that are plates'.
        supports: its support in two runs of the model, which differ if it depends on other sites.
    """

    shape: tuple[int, ...]
    batch_dim: int
    supports: tuple[Any, Any]


def check_structure(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Check that two runs of a model have the same latent sites."""
    if set(one) != set(other):
        raise ValueError(
            f"`model` has the sites {sorted(one)} in one run and {sorted(other)} in another, "
            "expected the same sites in all"
        )


def choose(
    draws: Any,
    weights: Any,
    known: Mapping[str, Known],
    supports: Any,
    names: Sequence[str] | None,
    read: Callable[[Any], Support],
) -> tuple[tuple[Site, ...], NamedDraws]:
    """Return the sites of a prior, and draws of them.

    Args:
        draws: draws of any kind, but no guide.
        weights: weights of the draws; None for those that `to_arviz` has noted, or equal ones.
        known: the latent sites of a model.
        supports: supports by name, which take precedence.
        names: names of the sites; None for all that are known or have a support.
        read: function that returns a support as files hold it.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a name or a support is missing, or draws, shapes, supports and weights do not
            fit each other.
    """
    if not isinstance(supports, Mapping | None):
        kind = type(supports).__name__
        raise TypeError(f"`supports` is a {kind}, expected a dictionary of constraints by site")
    if isinstance(names, str):
        raise TypeError(f"`sites` is {names!r}, expected a sequence of names")
    supports = supports or {}
    given, noted = as_mapping(draws)
    if names is None:
        names = list(chosen(given, dict.fromkeys([*known, *supports])))
        lost = sorted(known.keys() - names)
        if lost and names:
            raise ValueError(
                f"`draws` has no {lost}, which `model` has: it has {sorted(given)}. Name the sites "
                "of the prior in `sites`"
            )
        absent = sorted(supports.keys() - names)
        if absent:
            raise ValueError(f"`supports` has {absent}, but `draws` has the sites {sorted(given)}")
    if not names:
        raise ValueError(
            f"`draws` has the sites {sorted(given)}, none of which has a support: pass `supports`, "
            "or the `model` of the draws"
        )
    unknown = sorted(set(names) - known.keys() - supports.keys())
    if unknown:
        raise ValueError(f"the support of {unknown} is not known: pass `supports`, or a `model`")
    shapes = {name: known[name].shape for name in names if name in known}
    named = as_draws(given, noted if weights is None else weights, names, shapes)
    sites = []
    for name, value in named.values.items():
        own = known.get(name)
        kinds = (supports[name],) if own is None or name in supports else own.supports
        form = _as_form(name, value.shape[1:], kinds, read)
        sites.append(Site(name, value.shape[1:], own.batch_dim if own else 0, form))
    return tuple(sites), named


def _as_form(
    name: str, shape: tuple[int, ...], supports: Sequence[Any], read: Callable[[Any], Support]
) -> Support:
    """Return the support of a site as files hold it."""
    try:
        form, *others = map(read, supports)
    except ValueError as error:
        raise ValueError(f"site {name!r}: {error}") from None
    if any(other != form for other in others):
        raise ValueError(
            f"the support of site {name!r} depends on other sites: learn a prior of the others, or "
            "give the site a fixed support, such as a fraction between 0 and 1 that the model "
            "multiplies by the bound"
        )
    size = math.prod(shape)
    if not isinstance(form, str) and len(form) not in (1, size):
        raise ValueError(f"site {name!r} has {size} numbers, but {len(form)} supports")
    if isinstance(form, str):
        check_whole(Site(name, shape, 0, form))
    return form


def bad_draws(site: Site) -> str:
    """Return what a message says of draws that have no unconstrained coordinates."""
    form = site.support if isinstance(site.support, str) else [list(p) for p in site.support]
    return f"with NaN or inf, outside the site's support, {form}, or on its edge"


def draws_of(sites: Sequence[Site], name: str, size: int, draws: Any, weights: Any) -> NamedDraws:
    """Return draws of a prior's latent site, of this name and size, or else of its values."""
    given, noted = as_mapping(draws)
    shapes = {name: (size,)} if name in given else {site.name: site.shape for site in sites}
    return as_draws(given, noted if weights is None else weights, shapes, shapes)


def checked_region(
    latents: np.ndarray, weights: np.ndarray | None, draws: float, level: int = 3
) -> float:
    r"""Return how many of a prior's draws count where a new posterior lies; warn of few.

    In the coordinates of its base, the prior's draws are standard normal, and those of the new
    posterior have a mean m and a variance v along each direction. There n draws with the weights
    \(r = N(m, v) / N(0, 1)\) count as

    $$n \frac{(\mathrm{E}\,r)^2}{\mathrm{E}\,r^2}
    = n \sqrt{v (2 - v)}\, e^{-m^2 / (2 - v)}.$$

    The directions are the axes of the new covariance and that of the new mean. No v is above 1:
    data make a posterior narrower, and the covariance of few draws has axes that are too long.

    Args:
        latents: (S, D), draws of the new posterior in the coordinates of the prior's base.
        weights: (S,) or None.
        draws: n, the number of draws that the prior has learned from.
        level: how far the user's call is, for the warning.
    """
    check_rows(np.isfinite(latents).all(1), "`draws`", "with NaN or inf, or outside of a support")
    if len(latents) <= latents.shape[1]:
        raise ValueError(
            f"`draws` has {len(latents)} draws of {latents.shape[1]} numbers, expected more draws "
            "than numbers"
        )
    share = np.full(len(latents), 1 / len(latents)) if weights is None else weights / weights.sum()
    mean = share @ latents
    covariance = (share[:, None] * (latents - mean)).T @ (latents - mean)
    directions = np.linalg.eigh(covariance)[1].T
    if mean.any():
        directions = np.concatenate([directions, mean[None] / np.linalg.norm(mean)])
    m = directions @ mean
    v = np.clip(((directions @ covariance) * directions).sum(1), 0.0, 1.0)
    effective = float((draws * np.sqrt(v * (2 - v)) * np.exp(-(m**2) / (2 - v))).min())
    if effective < FEW:
        warnings.warn(
            "the new posterior lies where the prior has learned from few draws, effectively "
            f"{effective:.1f} of {draws:.0f}: there the prior is an extrapolation. Learn it from "
            "more draws, or fit all the data at once",
            stacklevel=level,
        )
    return effective
