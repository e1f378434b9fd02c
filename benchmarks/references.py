"""The references of `posteriors.py`: long runs of NUTS, in NumPyro and double precision.

    python benchmarks/references.py [--only NAME ...]
    python benchmarks/references.py --check

makes `benchmarks/posteriors/NAME.npz` anew where the run is sound: R-hat below 1.01, bulk and tail
ESS above 1000 for every scalar, and at most one draw in a thousand divergent. `--check` compares
the log joint densities of both hosts' models instead. All models together take some minutes.
"""

import argparse
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import arviz as az
import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro.handlers import reparam
from numpyro.infer import MCMC, NUTS, init_to_uniform
from numpyro.infer.reparam import LocScaleReparam
from numpyro.infer.util import log_density
from posteriors import POSTERIORS, REFERENCES, Posterior, Reference, by_site, columns

CHAINS, WARMUP, DRAWS, KEPT = 4, 2000, 5000, 1000
EXACT_DRAWS = 1_000_000
LEVELS = (0.05, 0.5, 0.95)


def standardized(x: np.ndarray, y: np.ndarray) -> None:
    """`scales` on predictors of unit scale: its slopes are seven orders of magnitude apart."""
    scale = x.std(0)
    intercept = numpyro.sample("intercept", dist.Normal(0, 100))
    z = numpyro.sample("z", dist.Normal(0, 1e4 * scale).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(10))
    numpyro.deterministic("slopes", z / scale)
    numpyro.sample("y", dist.Normal(intercept + x / scale @ z, sigma).to_event(1), obs=y)


@dataclass(frozen=True)
class Run:
    """How NUTS is run: with which settings, and on which model where not on the one asked for.

    The other model has the same sites, those that it does not sample as deterministic ones.
    """

    target: float = 0.95
    dense: bool = False
    model: Callable[..., None] | None = None


RUNS = {
    "eight_schools_centered": Run(
        0.99,
        model=reparam(
            POSTERIORS["eight_schools_centered"].numpyro_model, {"theta": LocScaleReparam(0)}
        ),
    ),
    "eight_schools_noncentered": Run(0.99),
    "logistic": Run(dense=True),
    "horseshoe": Run(0.99),
    "trend": Run(dense=True),
    "scales": Run(dense=True, model=standardized),
    "groups": Run(),
    "mixture": Run(dense=True),
    "gp_regression": Run(dense=True),
    "gp_poisson": Run(0.99),
    "autoregression": Run(dense=True),
    "garch": Run(0.99, dense=True),
    "volatility": Run(0.99),
    "lotka_volterra": Run(dense=True),
}


def nuts(posterior: Posterior, seed: int) -> Reference:
    run = RUNS[posterior.name]
    kernel = NUTS(
        run.model or posterior.numpyro_model,
        target_accept_prob=run.target,
        dense_mass=run.dense,
        init_strategy=init_to_uniform,
    )
    mcmc = MCMC(
        kernel,
        num_warmup=WARMUP,
        num_samples=DRAWS,
        num_chains=CHAINS,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(seed), **posterior.data)
    divergences = int(mcmc.get_extra_fields()["diverging"].sum())
    draws = mcmc.get_samples()
    names, table = columns({site: draws[site] for site in prior(posterior, jax.random.key(0))})
    chains = table.reshape(CHAINS, DRAWS, -1)
    each = [chains[..., i] for i in range(len(names))]
    return Reference(
        names,
        table.mean(0),
        table.std(0),
        np.quantile(table, LEVELS, 0),
        np.array([az.ess(x, method="bulk") for x in each]),
        np.array([az.ess(x, method="tail") for x in each]),
        np.array([az.rhat(x) for x in each]),
        divergences,
        table[:: len(table) // KEPT],
    )


def exact_funnel() -> Reference:
    rng = np.random.default_rng(0)
    v = 3 * rng.standard_normal(EXACT_DRAWS)
    x = np.exp(v / 2)[:, None] * rng.standard_normal((EXACT_DRAWS, 9))
    names, table = columns({"v": v, "x": x})
    number = np.full(10, float(EXACT_DRAWS))
    return Reference(
        names,
        np.zeros(10),
        np.array([3.0] + 9 * [math.exp(9 / 4)]),
        np.quantile(table, LEVELS, 0),
        number,
        number,
        np.ones(10),
        0,
        table[:: EXACT_DRAWS // KEPT],
    )


def sound(reference: Reference) -> bool:
    return (
        reference.rhat.max() < 1.01
        and min(reference.ess_bulk.min(), reference.ess_tail.min()) > 1000
        and reference.divergences <= CHAINS * DRAWS // 1000
    )


def store(name: str, reference: Reference) -> None:
    REFERENCES.mkdir(exist_ok=True)
    arrays = vars(reference) | {"draws": reference.draws.astype(np.float32)}
    np.savez_compressed(REFERENCES / f"{name}.npz", **arrays)


def make(name: str, seed: int) -> bool:
    start = time.perf_counter()
    reference = exact_funnel() if name == "funnel" else nuts(POSTERIORS[name], seed)
    passed = sound(reference)
    print(
        f"{name:26} {len(reference.names):3} scalars  R-hat {reference.rhat.max():.4f}  "
        f"ESS bulk {reference.ess_bulk.min():7.0f}  tail {reference.ess_tail.min():7.0f}  "
        f"divergent {reference.divergences:3}  {time.perf_counter() - start:4.0f} s"
        + ("" if passed else "  NOT STORED"),
        flush=True,
    )
    if passed:
        store(name, reference)
    return passed


def joint_numpyro(posterior: Posterior, latents: Mapping[str, Any]) -> float:
    return float(log_density(posterior.numpyro_model, (), dict(posterior.data), latents)[0])


def joint_pyro(posterior: Posterior, latents: Mapping[str, Any]) -> float:
    import torch
    from pyro import poutine

    values = {name: torch.tensor(np.asarray(value)) for name, value in latents.items()}
    model = poutine.trace(poutine.condition(posterior.pyro_model, values))
    return model.get_trace(**posterior.pyro_data()).log_prob_sum().item()


def prior(posterior: Posterior, key: Array) -> dict[str, Any]:
    model = numpyro.handlers.seed(posterior.numpyro_model, key)
    sites = numpyro.handlers.trace(model).get_trace(**posterior.data).values()
    return {
        site["name"]: site["value"]
        for site in sites
        if site["type"] == "sample" and not site["is_observed"]
    }


def check(name: str, draws: int = 5) -> bool:
    """Compare the hosts' log joint densities at draws from the prior and from the reference."""
    import torch

    torch.set_default_dtype(torch.float64)
    posterior, worst = POSTERIORS[name], 0.0
    points = [prior(posterior, key) for key in jax.random.split(jax.random.key(0), draws)]
    if (REFERENCES / f"{name}.npz").is_file():
        reference = posterior.reference()
        table = by_site(reference.names, reference.draws[:: KEPT // draws].astype(float))
        points += [{site: value[i] for site, value in table.items()} for i in range(draws)]
    for latents in points:
        ours, theirs = joint_numpyro(posterior, latents), joint_pyro(posterior, latents)
        worst = max(worst, abs(ours - theirs) / max(1.0, abs(ours)))
    print(f"{name:26} {len(points)} points, relative difference {worst:.1e}", flush=True)
    return worst < 1e-9


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=POSTERIORS, default=list(POSTERIORS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="compare the hosts' models instead")
    arguments = parser.parse_args()
    numpyro.enable_x64()
    if arguments.check:
        passed = [check(name) for name in arguments.only]
    else:
        passed = [make(name, arguments.seed) for name in arguments.only]
    raise SystemExit(not all(passed))
