"""Models whose posteriors are known, each in both hosts: what guides are judged on.

    posterior = POSTERIORS["eight_schools_centered"]
    posterior.numpyro_model(**posterior.data)         # a NumPyro model and its data
    posterior.pyro_model(**posterior.pyro_data())     # the same sites, priors and data in Pyro
    columns(draws)                                    # any draws, by site, as names and a table
    posterior.reference()                             # what NUTS says, from `references.py`

Only the host that is asked for is imported.
"""

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from plates import GROUPS

REFERENCES = Path(__file__).with_suffix("")


@dataclass(frozen=True)
class Reference:
    """The posterior of every scalar of every latent site, in the sites' own (constrained) space."""

    names: list[str]  # "mu", "theta[0]", "theta[1]", ...
    mean: np.ndarray
    sd: np.ndarray
    quantiles: np.ndarray  # (3, scalars): 5, 50 and 95 %
    ess_bulk: np.ndarray
    ess_tail: np.ndarray
    rhat: np.ndarray
    divergences: int
    draws: np.ndarray  # (about 1000, scalars)


@dataclass(frozen=True)
class Posterior:
    """A model and its data.

    `heavy_tailed` names the sites whose posterior has no mean or no variance, or none that a
    finite sample tells: compare their quantiles, not their moments.
    """

    name: str
    about: str
    data: Mapping[str, np.ndarray] = field(default_factory=dict)
    heavy_tailed: tuple[str, ...] = ()

    @property
    def numpyro_model(self) -> Callable[..., None]:
        return getattr(importlib.import_module("posteriors_numpyro"), self.name)

    @property
    def pyro_model(self) -> Callable[..., None]:
        return getattr(importlib.import_module("posteriors_pyro"), self.name)

    def pyro_data(self) -> dict[str, Any]:
        """Return the data as tensors, the real numbers in the default dtype."""
        import torch

        return {
            name: torch.as_tensor(x, dtype=torch.get_default_dtype() if x.dtype == float else None)
            for name, x in self.data.items()
        }

    def reference(self) -> Reference:
        with np.load(REFERENCES / f"{self.name}.npz") as file:
            stored = dict(file)
        stored |= {"names": stored["names"].tolist(), "divergences": int(stored["divergences"])}
        return Reference(**stored)


def columns(draws: Mapping[str, Any]) -> tuple[list[str], np.ndarray]:
    """Return the names of all scalars and the draws, (n, scalars), sites in alphabetical order.

    Each site's draws have one leading dimension, that of the draws.
    """
    names, parts = [], []
    for site in sorted(draws):
        value = np.asarray(draws[site])
        parts.append(value.reshape(len(value), -1))
        indices = np.ndindex(value.shape[1:])
        names += [site + "".join(f"[{i}]" for i in index) for index in indices]
    return names, np.concatenate(parts, 1)


def by_site(names: list[str], table: np.ndarray) -> dict[str, np.ndarray]:
    """Undo `columns`, for sites that are scalars or vectors."""
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(name.split("[")[0], []).append(place)
    return {
        site: table[:, where[0]] if names[where[0]] == site else table[:, where]
        for site, where in places.items()
    }


def correlated(rng: np.random.Generator, n: int, dim: int, factor: float) -> np.ndarray:
    """Draw standard normal predictors any two of which correlate by `factor`."""
    common, own = rng.standard_normal((n, 1)), rng.standard_normal((n, dim))
    return math.sqrt(factor) * common + math.sqrt(1 - factor) * own


def eight_schools_data() -> dict[str, np.ndarray]:
    # Rubin (1981), table 1.
    return {
        "y": np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]),
        "sigma": np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]),
    }


def logistic_data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    scales = np.array([0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0])
    z = correlated(rng, 200, 8, 0.6)
    logits = 0.5 + z @ np.array([1.0, -1.0, 0.8, 0.0, -0.5, 0.5, 0.0, 0.3])
    y = rng.random(200) < 1 / (1 + np.exp(-logits))
    return {"x": scales * (z + 2), "y": y.astype(float)}


def horseshoe_data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    x = correlated(rng, 60, 10, 0.3)
    weights = np.zeros(10)
    weights[:3] = 1.5, -1.0, 0.5
    return {"x": x, "y": x @ weights + rng.standard_normal(60)}


def trend_data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    year = np.arange(1950.0, 2014.0)
    return {"year": year, "y": 9.3 + 0.02 * (year - 1980) + 1.1 * rng.standard_normal(len(year))}


def scales_data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(4)
    scales = 10.0 ** np.arange(-3, 5)
    z = correlated(rng, 100, 8, 0.8)
    y = 5 + z @ np.array([1.0, 0.5, -1.0, 0.0, 2.0, -0.5, 0.0, 1.0]) + rng.standard_normal(100)
    return {"x": scales * (z + 1), "y": y}


def groups_data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    group = np.repeat(np.arange(GROUPS), rng.integers(2, 20, GROUPS))
    intercepts = 1.4 + 0.4 * rng.standard_normal(GROUPS)
    x = (rng.random(len(group)) < 0.3).astype(float)
    y = intercepts[group] - 0.7 * x + 0.75 * rng.standard_normal(len(group))
    return {"group": group, "x": x, "y": y}


def mixture_data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(6)
    first = rng.random(150) < 0.35
    z = rng.standard_normal(150)
    return {"y": np.where(first, -1.5 + 0.8 * z, 1.3 + 1.1 * z)}


def gp_regression_data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    x = np.sort(10 * rng.random(30))
    return {"x": x, "y": np.sin(x) + 0.3 * np.cos(2.7 * x) + 0.3 * rng.standard_normal(30)}


def gp_poisson_data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(8)
    x = np.linspace(0, 10, 15)
    return {"x": x, "y": rng.poisson(np.exp(1 + np.sin(x))).astype(float)}


def autoregression_data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(9)
    weights = np.array([0.6, -0.3, 0.2, 0.1, -0.15])  # of the value before, of the one before that
    series = list(rng.standard_normal(5))
    for noise in rng.standard_normal(200):
        series.append(0.4 + weights @ series[:-6:-1] + 0.8 * noise)
    values = np.array(series)
    return {"x": np.stack([values[5 - lag : -lag] for lag in range(1, 6)], 1), "y": values[5:]}


def garch_data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(10)
    y, variance = [], 1.5
    for noise in rng.standard_normal(200):
        y.append(0.2 + math.sqrt(variance) * noise)
        variance = 0.15 * 1.5 + 0.3 * (y[-1] - 0.2) ** 2 + 0.55 * variance
    return {"y": np.array(y)}


def volatility_data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(11)
    y, level = [], 0.0
    for noise, shock in rng.standard_normal((50, 2)):
        level = 0.95 * level + 0.4 * shock
        y.append(math.exp((level - 0.5) / 2) * noise)
    return {"y": np.array(y)}


def lynx_hare_data() -> dict[str, np.ndarray]:
    # Pelts taken by the Hudson's Bay Company, 1900 to 1920, in thousands: hares and lynxes.
    hare = (
        [30.0, 47.2, 70.2, 77.4, 36.3, 20.6, 18.1]
        + [21.4, 22.0, 25.4, 27.1, 40.3, 57.0, 76.6]
        + [52.3, 19.5, 11.2, 7.6, 14.6, 16.2, 24.7]
    )
    lynx = (
        [4.0, 6.1, 9.8, 35.2, 59.4, 41.7, 19.0]
        + [13.0, 8.3, 9.1, 7.4, 8.0, 12.3, 19.5]
        + [45.7, 51.1, 29.7, 15.8, 9.7, 10.1, 8.6]
    )
    return {"y": np.stack([hare, lynx], 1)}


_ALL = [
    Posterior(
        "eight_schools_centered",
        "Rubin's eight schools, centred: a funnel in tau and theta",
        eight_schools_data(),
    ),
    Posterior(
        "eight_schools_noncentered",
        "Rubin's eight schools, non-centred",
        eight_schools_data(),
    ),
    Posterior(
        "logistic",
        "logistic regression, 8 correlated predictors with scales from 0.2 to 50",
        logistic_data(),
    ),
    Posterior(
        "horseshoe",
        "regression, 10 predictors, regularised horseshoe (Piironen and Vehtari, 2017)",
        horseshoe_data(),
        heavy_tailed=("local_scale", "slab"),
    ),
    Posterior(
        "funnel",
        "Neal's funnel (2003) in 10 dimensions, without data",
        heavy_tailed=("x",),
    ),
    Posterior(
        "trend",
        "yearly temperatures on the year itself: intercept and slope correlate by almost -1",
        trend_data(),
    ),
    Posterior(
        "scales",
        "regression, 8 strongly correlated predictors with scales from 1e-3 to 1e4",
        scales_data(),
    ),
    Posterior(
        "groups",
        "intercepts of 20 unequal groups, centred, as for the radon data",
        groups_data(),
    ),
    Posterior(
        "mixture",
        "two Gaussians with ordered means, the component of each point summed out",
        mixture_data(),
    ),
    Posterior(
        "gp_regression",
        "hyperparameters of a Gaussian process, 30 points, latent values integrated out",
        gp_regression_data(),
    ),
    Posterior(
        "gp_poisson",
        "counts with a log-Gaussian-process rate, 15 latent values, non-centred",
        gp_poisson_data(),
    ),
    Posterior(
        "autoregression",
        "an autoregressive series of order 5, 200 steps",
        autoregression_data(),
    ),
    Posterior(
        "garch",
        "GARCH(1,1), 200 steps, stationary by a simplex of weights",
        garch_data(),
        heavy_tailed=("variance",),
    ),
    Posterior(
        "volatility",
        "stochastic volatility, 50 steps, non-centred",
        volatility_data(),
    ),
    Posterior(
        "lotka_volterra",
        "lynxes and hares, 1900 to 1920, by the Lotka-Volterra equations",
        lynx_hare_data(),
    ),
]
POSTERIORS = {posterior.name: posterior for posterior in _ALL}
