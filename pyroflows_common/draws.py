"""Draws of named sites, of any kind: their arrays, their weights, their moments."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pyroflows_common.checks import as_numpy

# Of fewer draws none can be held out.
FEWEST = 10
# A full covariance takes this many draws for each coordinate.
FULL = 5
# Draws lie in a plane if a direction has this part of the longest one, or less.
LEAST = 1e-6
# What messages say of draws that have no unconstrained coordinates.
OUTSIDE = "with NaN or inf, outside of a support, or on its edge"
# Draws are held out in up to this many blocks: neighbours in a chain are alike.
BLOCKS = 10


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


def is_guide(draws: Any) -> bool:
    """Return whether draws have yet to be made, by a guide or a density."""
    sources = isinstance(draws, Mapping) or hasattr(draws, "posterior")
    return callable(draws) and not sources and not hasattr(draws, "get_samples")


def as_draws(
    given: Mapping[str, Any],
    weights: Any,
    names: Iterable[str],
    shapes: Mapping[str, Sequence[int]],
) -> NamedDraws:
    """Return draws by name, chains one after the other, without those of weight 0.

    Args:
        given: arrays `(draws, *shape)` or, where shapes are known, `(chains, draws, *shape)`.
        weights: weights of the draws, or None.
        names: names to return.
        shapes: shapes of values, as far as they are known.
    """
    values = {name: as_numpy(array) for name, array in chosen(given, names).items()}
    missing = sorted(set(names) - set(values))
    if missing:
        raise ValueError(f"`draws` has no {missing}: it has {sorted(given)}")
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
    weights = _as_weights(weights, max(sizes.values()))
    if weights is not None:
        kept = weights > 0
        values, weights = {n: value[kept] for n, value in values.items()}, weights[kept]
    count = len(next(iter(values.values())))
    if count < FEWEST:
        raise ValueError(f"`draws` has {count} draws, expected at least {FEWEST}")
    return NamedDraws(values, weights)


def as_mapping(draws: Any) -> tuple[Mapping[str, Any], Any]:
    """Return the arrays of draws of any kind by name, and the weights that come with them."""
    given, chained = arrays_of(draws, "draws")
    if chained:
        given = {name: _joined(as_numpy(array)) for name, array in given.items()}
    return given, _noted(draws)


def chosen(given: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return arrays by the names of sites: ArviZ's names have dots in place of slashes."""
    found = {name: name if name in given else name.replace("/", ".") for name in names}
    return {name: given[own] for name, own in found.items() if own in given}


def arrays_of(draws: Any, argument: str) -> tuple[dict[str, Any], bool]:
    """Return the arrays of draws of any kind by name, and whether the first dimension is chains.

    Args:
        draws: arrays by name, with or without a dimension of chains; what ArviZ works with, whose
            group `posterior` holds them; or a sampler that has run.
        argument: how messages call them.
    """
    if hasattr(draws, "get_samples"):
        return dict(draws.get_samples(group_by_chain=True)), True
    group = getattr(draws, "posterior", draws)
    if hasattr(group, "data_vars"):
        if not {"chain", "draw"} <= set(group.dims):
            raise ValueError(
                f"`{argument}` has the dimensions {sorted(map(str, group.dims))}, expected chain "
                "and draw among them"
            )
        if group is draws and "pareto_k" in group.attrs:
            raise ValueError(f"`{argument}` is a group of the data of to_arviz: pass all of them")
        arrays = group.data_vars.items()
        return {str(n): array.transpose("chain", "draw", ...).values for n, array in arrays}, True
    if not isinstance(draws, Mapping):
        raise TypeError(
            f"`{argument}` is a {type(draws).__name__}, expected a dictionary such as "
            "mcmc.get_samples(), data of ArviZ with the group posterior, or a sampler that has run"
        )
    return dict(draws), False


def _joined(array: np.ndarray) -> np.ndarray:
    """Return draws by chain as one sequence."""
    return array.reshape(-1, *array.shape[2:])


def _noted(draws: Any) -> np.ndarray | None:
    """Return the weights of draws that `to_arviz` has noted; None if there are none.

    It warns of draws that are not to be trusted.
    """
    said = getattr(getattr(draws, "posterior", None), "attrs", {}).get("verdict", "")
    if "do not trust" in said:
        warnings.warn(f"the draws are those of a guide: {said}", stacklevel=5)
    stats = getattr(draws, "sample_stats", {})
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
    if 1 / (share**2).sum() < FULL * rows.shape[1]:
        return mean, deviation, None
    lengths = np.linalg.svd(factor / deviation[:, None], compute_uv=False)
    if lengths[-1] < LEAST * lengths[0]:
        raise ValueError(
            "`draws` lie in a plane: some numbers are determined by others. Leave their sites out"
        )
    return mean, deviation, factor


def with_slopes(
    rows: np.ndarray, weights: np.ndarray | None, slopes: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Return the rows whose slopes are finite, their weights and slopes; warn of the others."""
    good = np.isfinite(slopes).all(1)
    if good.sum() < FEWEST:
        raise ValueError(
            f"`draws` has {good.sum()} of {len(rows)} rows with a finite slope of the model's "
            f"log-density, expected at least {FEWEST}: leave `slopes` out"
        )
    if not good.all():
        warnings.warn(
            f"the model's log-density has no finite slope at {(~good).sum()} of {len(rows)} draws, "
            "which are left out: look for NaN or inf in the model there",
            stacklevel=4,
        )
    return rows[good], None if weights is None else weights[good], slopes[good]


def check_moves(name: str, rows: np.ndarray) -> None:
    """Check that no number of a site is the same in all draws."""
    if (rows == rows[0]).all(0).any():
        raise ValueError(
            f"`draws` gives site {name!r} a number that is the same in all {len(rows)} draws: a "
            "point has no density"
        )


def held_out(draws: int) -> np.ndarray:
    """Return whether each draw is held out: a tenth, in blocks."""
    blocks = min(BLOCKS, draws // 10)
    return np.arange(draws) * 10 * blocks // draws % 10 == 9


def lowest(losses: np.ndarray) -> float:
    """Return the lowest finite loss of the held-out draws; infinite if none is finite."""
    return float(np.nanmin(losses, initial=np.inf))
