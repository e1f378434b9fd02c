"""Draws of a posterior by MCMC, in the forms in which hosts and ArviZ hand them on."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from pyroflows_common.checks import as_numpy
from pyroflows_common.draws import arrays_of, chosen
from pyroflows_common.verdict import FEWEST


def as_chains(
    samples: Any, shapes: Mapping[str, tuple[int, ...]], free: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """Return each site's draws as `(chains, draws, *shape)`.

    Args:
        samples: arrays by site, with or without a dimension of chains; or what ArviZ works with,
            whose group `posterior` holds them.
        shapes: shapes of the sites.
        free: sites on which the model does not depend, which `samples` may leave out.
    """
    if "pareto_k" in getattr(getattr(samples, "posterior", samples), "attrs", ()):
        raise ValueError(
            "`samples` are draws of a guide by to_arviz, expected draws of the posterior by MCMC"
        )
    arrays, _ = arrays_of(samples, "samples")
    given = chosen(arrays, shapes)
    missing = sorted(set(shapes) - set(given) - set(free))
    if missing:
        raise ValueError(f"`samples` has no {missing}: expected all latent sites of `model`")
    chains = {name: _chains(name, as_numpy(array), shapes[name]) for name, array in given.items()}
    counts = {name: array.shape[:2] for name, array in chains.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"`samples` has different numbers of chains and draws by site: {counts}")
    (chain, draw), *_ = counts.values()
    if chain * draw < FEWEST or draw < 4:
        raise ValueError(
            f"`samples` has {chain} chains of {draw} draws, expected at least {FEWEST} draws and 4 "
            "in each chain"
        )
    return chains


def _chains(name: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return a site's draws with a dimension of chains."""
    if array.shape[1:] == shape and array.ndim == len(shape) + 1:
        array = array[None]
    if array.ndim != len(shape) + 2 or array.shape[2:] != shape:
        raise ValueError(
            f"`samples` has site {name!r} with shape {array.shape}, but in `model` it has shape "
            f"{shape}: expected (draws, *shape) or (chains, draws, *shape)"
        )
    bad = ~np.isfinite(array) if array.dtype.kind == "f" else np.zeros(array.shape, bool)
    if bad.any():
        raise ValueError(f"`samples` has NaN or inf at site {name!r}: {bad.sum()} numbers")
    if array.dtype.kind == "f" and array.size and (array == array[0, 0]).all():
        raise ValueError(
            f"`samples` has the same value of site {name!r} in all draws: the chains did not move"
        )
    return array


def flattened(
    chains: Mapping[str, np.ndarray], drawn: Mapping[str, np.ndarray]
) -> tuple[tuple[int, ...], dict[str, np.ndarray]]:
    """Return the numbers of chains and draws, and each site with one dimension of draws.

    Sites that the chains leave out take values of a guide.
    """
    shape = next(iter(chains.values())).shape[:2]
    index = np.arange(shape[0] * shape[1])
    return shape, {
        name: chains[name].reshape(-1, *array.shape[1:])
        if name in chains
        else array[index % len(array)]
        for name, array in drawn.items()
    }
