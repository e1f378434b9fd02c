"""Adapter for old and new ArviZ: smooths log ratios, and packs draws with the verdict."""

import importlib
import math
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from pyroflows_common.evidence import weighed
from pyroflows_common.sites import Draws, dim_names
from pyroflows_common.verdict import Weights, verdict, weigh


class ArviZ:
    """The installed ArviZ.

    Args:
        caller: name of the function that needs it.

    Raises:
        ImportError: if ArviZ is not installed.
    """

    def __init__(self, caller: str = "to_arviz") -> None:
        try:
            self.module = importlib.import_module("arviz")
        except ImportError as error:
            raise ImportError(
                f"{caller} needs ArviZ, which the extra pyroflows[arviz] installs"
            ) from error
        self.old = self.module.__version__.startswith("0.")

    def smooth(self, log_ratio: np.ndarray) -> tuple[np.ndarray, float]:
        """Return Pareto smoothed log weights and the shape of the Pareto distribution."""
        if self.old:
            return self.module.psislw(log_ratio)
        stats = importlib.import_module("arviz_stats.base").array_stats
        try:
            return stats.psislw(-log_ratio)  # it takes log-likelihoods and inverts them
        except ValueError:  # no tail to fit
            return log_ratio - np.logaddexp.reduce(log_ratio), math.inf

    def effective(self, chains: np.ndarray) -> float:
        """Return the effective number of draws of `(chains, draws)`, for their mean."""
        if self.old:
            return float(self.module.ess(chains, method="mean"))
        stats = importlib.import_module("arviz_stats.base").array_stats
        return float(stats.ess(chains, chain_axis=0, draw_axis=1, method="mean"))

    def bulk(self, chains: np.ndarray) -> float:
        """Return the bulk effective sample size of `(chains, draws)`."""
        if self.old:
            return float(self.module.ess(chains, method="bulk"))
        stats = importlib.import_module("arviz_stats.base").array_stats
        return float(stats.ess(chains, chain_axis=0, draw_axis=1, method="bulk"))

    def rhat(self, chains: np.ndarray) -> float:
        """Return the rank-normalised R-hat of `(chains, draws)`."""
        if self.old:
            return float(self.module.rhat(chains))
        stats = importlib.import_module("arviz_stats.base").array_stats
        return float(stats.rhat(chains, chain_axis=0, draw_axis=1))

    def chains(self, samples: Mapping[str, np.ndarray], stats: Mapping[str, np.ndarray]) -> Any:
        """Return draws by MCMC, `(chains, draws, *shape)`, as the data of this ArviZ."""
        named = {name.replace("/", "."): array for name, array in samples.items()}
        groups = {"posterior": named, "sample_stats": dict(stats)}
        return self.module.from_dict(**groups) if self.old else self.module.from_dict(groups)

    def collect(
        self,
        drawn: Draws[np.ndarray],
        predicted: Mapping[str, np.ndarray],
        weights: Weights,
        kept: np.ndarray | None,
        *,
        coords: Mapping[str, Any] | None,
        dims: Mapping[str, Sequence[str]] | None,
        host: ModuleType,
        single: bool,
    ) -> Any:
        """Return draws, densities and weights as the data of this ArviZ.

        Args:
            drawn: the draws before resampling.
            predicted: simulated observations, one for each draw that is kept.
            weights: those of the draws.
            kept: indices of the resampled draws; None if the draws stay as they are.
            coords: coordinates of dimensions.
            dims: names of the dimensions of sites, before those of the plates.
            host: the package that ran the model.
            single: whether the guide is one that `fit_mixture` takes.
        """
        draws = len(weights.ratio)
        index = np.arange(draws) if kept is None else kept
        log_weight = weights.log_weight if kept is None else np.full(draws, -math.log(draws))
        sample_stats = {
            "lp": drawn.log_p[index].astype(np.float64),
            "log_importance_ratio": weights.ratio[index],
            "log_weight": log_weight,
        }
        sampled = {
            "posterior": _taken({**drawn.values, **drawn.deterministic}, index),
            "posterior_predictive": predicted,
            "log_likelihood": _taken(drawn.log_likelihood, index),
            "sample_stats": sample_stats,
        }
        chain = {
            group: {name: np.asarray(array)[None] for name, array in arrays.items()}
            for group, arrays in sampled.items()
        }
        evidence = weighed(weights)
        attrs = {
            "inference_library": host.__name__,
            "inference_library_version": host.__version__,
            "pareto_k": weights.pareto_k,
            "elbo": float(weights.ratio.mean()),
            "log_evidence": evidence.value,
            "log_evidence_error": evidence.error,
            "importance_ess": weights.ess,
            "verdict": verdict(weights, kept is not None, single, drawn.joint is not None),
        }
        if drawn.joint is not None:
            attrs["pareto_k_joint"] = weigh(self.smooth, drawn.joint, 0.0).pareto_k
        # Neither NetCDF nor xarray's trees allow a slash in a name.
        groups = {
            group: {name.replace("/", "."): array for name, array in arrays.items()}
            for group, arrays in {**chain, "observed_data": drawn.observed}.items()
            if arrays
        }
        names = {
            name.replace("/", "."): [dim.replace("/", ".") for dim in value]
            for name, value in {**dim_names(drawn.sites), **(dims or {})}.items()
        }
        if self.old:
            return self.module.from_dict(
                **groups, coords=coords, dims=names, attrs=attrs, posterior_attrs=attrs
            )
        everywhere = {"/": attrs, "posterior": attrs}
        return self.module.from_dict(groups, coords=coords, dims=names, attrs=everywhere)


def _taken(arrays: Mapping[str, np.ndarray], index: np.ndarray) -> dict[str, np.ndarray]:
    """Return some entries along the first dimension of each array."""
    return {name: array[index] for name, array in arrays.items()}
