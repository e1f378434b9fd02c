"""Draws of named sites, from which a prior is learned: their sources, their rows, their region."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pyroflows_common.archive import plain
from pyroflows_common.checks import as_count, as_numpy, as_scale
from pyroflows_common.support import Support

# A full covariance takes this many draws for each coordinate.
FULL = 5
# Draws are held out in this many blocks: neighbours in a chain are alike.
BLOCKS = 10
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
            f"`name` and the names of the sites have {twice} twice, expected different ones"
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
        return sites, as_scale(found["draws"], "draws"), str(found["name"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"its prior is {found!r:.80}") from error


def _site(name: str, shape: tuple[int, ...], batch_dim: int, support: Any) -> Site:
    """Return the site of a file, checked."""
    sizes = [as_count(size, "shape") for size in shape]
    pairs = [] if isinstance(support, str) else [(low, high) for low, high in support]
    ends = [end for pair in pairs for end in pair if end is not None]
    if not (isinstance(name, str) and all(isinstance(end, float) for end in ends)):
        raise ValueError("a name or a support is of the wrong type")
    return Site(name, tuple(sizes), as_count(batch_dim, "batch_dim", 0), support)


def check_like(prior: Described | None, sites: Sequence[Site]) -> None:
    """Check that a file holds a prior of these sites."""
    if prior is None:
        raise ValueError("it holds a flow, but `like` is a FlowPrior")
    if prior[0] != tuple(sites):
        raise ValueError(f"it holds a prior of {prior[0]}, but `like` is one of {tuple(sites)}")


class NamedDraws(NamedTuple):
    """Draws of named values.

    Args:
        values: (S, *shape) by name.
        weights: (S,), relative weights; None if all are equal.
    """

    values: dict[str, np.ndarray]
    weights: np.ndarray | None

    @property
    def effective(self) -> float:
        """Effective number of the weighted draws."""
        if self.weights is None:
            return float(len(next(iter(self.values.values()))))
        return float(self.weights.sum() ** 2 / (self.weights**2).sum())


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


def is_guide(draws: Any) -> bool:
    """Return whether draws have yet to be made, by a guide or a density."""
    sources = isinstance(draws, Mapping) or hasattr(draws, "posterior")
    return callable(draws) and not sources and not hasattr(draws, "get_samples")


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
    given, noted = _given(draws)
    dotted = {name: name.replace("/", ".") for name in known}  # as `to_arviz` names them
    given = {**{n: given[dot] for n, dot in dotted.items() if dot in given}, **given}
    if names is None:
        names = [name for name in [*known, *supports] if name in given]
        names = list(dict.fromkeys(names))
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
    if isinstance(form, str) and len(shape) < 1 + (form == "corr_cholesky"):
        raise ValueError(f"site {name!r} has shape {shape}, but its support is {form}")
    return form


def as_draws(
    given: Mapping[str, Any],
    weights: Any,
    names: Iterable[str],
    shapes: Mapping[str, Sequence[int]],
) -> NamedDraws:
    """Return draws by name, chains one after the other.

    Args:
        given: arrays `(draws, *shape)` or, where shapes are known, `(chains, draws, *shape)`.
        weights: weights of the draws, or None.
        names: names to return.
        shapes: shapes of values, as far as they are known.
    """
    missing = sorted(set(names) - set(given))
    if missing:
        raise ValueError(f"`draws` has no {missing}: it has {sorted(given)}")
    values = {name: as_numpy(given[name]) for name in names}
    for name, value in values.items():
        shape = tuple(shapes.get(name, value.shape[1:]))
        if value.ndim == len(shape) + 2:
            values[name] = value = _joined(value)
        if not value.ndim or value.shape[1:] != shape:
            raise ValueError(
                f"`draws` has site {name!r} of shape {value.shape}, expected {shape} after the "
                "dimension of the draws, or after those of chains and draws"
            )
        if value.dtype.kind != "f" or not value.size:
            raise ValueError(
                f"`draws` has site {name!r} of {value.dtype} and shape {value.shape}, expected "
                "real numbers: leave discrete and empty sites out, by `sites`"
            )
    sizes = {name: len(value) for name, value in values.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"`draws` has different numbers of draws: {sizes}")
    return NamedDraws(values, _as_weights(weights, max(sizes.values())))


def _given(draws: Any) -> tuple[Mapping[str, Any], Any]:
    """Return the arrays of draws of any kind by name, and the weights that come with them."""
    if hasattr(draws, "get_samples"):
        draws = draws.get_samples()
    if hasattr(draws, "posterior"):  # ArviZ's, old or new
        arrays = draws.posterior.data_vars
        return {str(n): _joined(array.values) for n, array in arrays.items()}, _noted(draws)
    if not isinstance(draws, Mapping):
        raise TypeError(
            f"`draws` is a {type(draws).__name__}, expected a dictionary of arrays by site, the "
            "data of ArviZ, a sampler that has run, or a guide"
        )
    return draws, None


def _joined(array: np.ndarray) -> np.ndarray:
    """Return draws by chain as one sequence."""
    return array.reshape(-1, *array.shape[2:])


def _noted(groups: Any) -> np.ndarray | None:
    """Return the weights of draws that `to_arviz` has noted; None if there are none.

    It warns of draws that are not to be trusted.
    """
    said = groups.posterior.attrs.get("verdict", "")
    if "do not trust" in said:
        warnings.warn(f"the draws are those of a guide: {said}", stacklevel=5)
    stats = getattr(groups, "sample_stats", {})
    if "log_weight" not in stats:
        return None
    log_weight = stats["log_weight"].values.ravel()
    return np.exp(log_weight - log_weight.max())


def _as_weights(weights: Any, draws: int) -> np.ndarray | None:
    if weights is None:
        return None
    weights = np.asarray(as_numpy(weights), float).ravel()
    if len(weights) != draws:
        raise ValueError(f"`weights` has {len(weights)} numbers, expected {draws}, one a draw")
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
        raise ValueError("`weights` has NaN, inf or negative numbers, or zeros only")
    return None if np.ptp(weights) == 0 else weights


def moments(
    rows: np.ndarray, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return mean, deviations and, if there are enough draws, a factor of the covariance.

    Args:
        rows: (S, D).
        weights: (S,) or None.
    """
    share = np.full(len(rows), 1 / len(rows)) if weights is None else weights / weights.sum()
    mean = share @ rows
    factor = (np.sqrt(share)[:, None] * (rows - mean)).T
    deviation = np.linalg.norm(factor, axis=1)
    effective = 1 / (share**2).sum()
    return mean, deviation, factor if effective >= FULL * rows.shape[1] else None


def check_moves(name: str, rows: np.ndarray) -> None:
    """Check that no number of a site is the same in all draws."""
    if (rows == rows[0]).all(0).any():
        raise ValueError(
            f"`draws` gives site {name!r} a number that is the same in all {len(rows)} draws: a "
            "point has no density"
        )


def bad_draws(site: Site) -> str:
    """Return what a message says of draws that have no unconstrained coordinates."""
    form = site.support if isinstance(site.support, str) else [list(p) for p in site.support]
    return f"with NaN or inf, outside the site's support, {form}, or on its edge"


def held_out(draws: int) -> np.ndarray:
    """Return whether each draw is held out: a tenth, in blocks."""
    return np.arange(draws) * 10 * BLOCKS // draws % 10 == 9


def draws_of(sites: Sequence[Site], name: str, draws: Any, weights: Any) -> NamedDraws:
    """Return draws of a prior's latent site, which has this name, or else of its values."""
    given, noted = _given(draws)
    shapes = {site.name: site.shape for site in sites}
    names = [name] if name in given else list(shapes)
    return as_draws(given, noted if weights is None else weights, names, shapes)


def checked_region(latents: np.ndarray, weights: np.ndarray | None, draws: float) -> float:
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
    """
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
            stacklevel=3,
        )
    return effective
