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


def as_mapping(draws: Any) -> tuple[Mapping[str, Any], Any]:
    """Return the arrays of draws of any kind by name, and the weights that come with them."""
    given, chained = arrays_of(draws, "draws")
    if chained:
        given = {name: _joined(as_numpy(array)) for name, array in given.items()}
    return given, _noted(draws)


def arrays_of(draws: Any, argument: str) -> tuple[dict[str, Any], bool]:
    """Return the arrays of draws of any kind by name, and whether the first dimension is chains.

    Args:
        draws: arrays by name, with or without a dimension of chains; what ArviZ works with, whose
            group `posterior` holds them; or a sampler that has run.
        argument: how messages call them.
    """
    if hasattr(draws, "get_samples"):
        return dict(draws.get_samples(group_by_chain=True)), True
    dataset = getattr(draws, "posterior", draws)
    if hasattr(dataset, "data_vars"):
        chained = {"chain", "draw"} <= set(dataset.dims)
        dataset = dataset.transpose("chain", "draw", ...) if chained else dataset
        return {str(name): array.values for name, array in dataset.data_vars.items()}, chained
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
    effective = 1 / (share**2).sum()
    return mean, deviation, factor if effective >= FULL * rows.shape[1] else None


def check_moves(name: str, rows: np.ndarray) -> None:
    """Check that no number of a site is the same in all draws."""
    if (rows == rows[0]).all(0).any():
        raise ValueError(
            f"`draws` gives site {name!r} a number that is the same in all {len(rows)} draws: a "
            "point has no density"
        )


def held_out(draws: int) -> np.ndarray:
    """Return whether each draw is held out: a tenth, in blocks.

    Raises:
        ValueError: if there are too few draws.
    """
    if draws < FEWEST:
        raise ValueError(f"`draws` has {draws} draws, expected at least {FEWEST}")
    blocks = min(BLOCKS, draws // 10)
    return np.arange(draws) * 10 * blocks // draws % 10 == 9
