"""ArviZ, old and new: the smoothing of log ratios, and groups of draws."""

import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def arviz_functions() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return functions of the installed ArviZ that smooth log ratios and that make groups."""
    try:
        arviz = importlib.import_module("arviz")
    except ImportError as error:
        raise ImportError("to_arviz needs ArviZ: pip install 'pyroflows[arviz]'") from error
    old = arviz.__version__.startswith("0.")

    def psis(log_ratio: np.ndarray) -> tuple[np.ndarray, float]:
        if old:
            return arviz.psislw(log_ratio)
        stats = importlib.import_module("arviz_stats.base").array_stats
        try:
            return stats.psislw(-log_ratio)  # it takes log-likelihoods, and inverts them
        except ValueError:  # no tail to fit
            return log_ratio - np.logaddexp.reduce(log_ratio), math.inf

    def gather(
        groups: dict[str, dict[str, np.ndarray]],
        coords: Any,
        dims: Mapping[str, Any],
        attrs: dict[str, Any],
    ) -> Any:
        # Neither NetCDF nor xarray's trees allow a slash in a name.
        groups = {
            group: {name.replace("/", "."): array for name, array in arrays.items()}
            for group, arrays in groups.items()
            if arrays
        }
        names = {
            name.replace("/", "."): [dim.replace("/", ".") for dim in value]
            for name, value in dims.items()
        }
        if old:
            return arviz.from_dict(
                **groups, coords=coords, dims=names, attrs=attrs, posterior_attrs=attrs
            )
        everywhere = {"/": attrs, "posterior": attrs}
        return arviz.from_dict(groups, coords=coords, dims=names, attrs=everywhere)

    return psis, gather
