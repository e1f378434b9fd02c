"""A horseshoe regression in 1,000 and 4,000 dimensions: guides beside NUTS, in NumPyro.

    python benchmarks/high_dim.py                       # an hour on two cores, most of it NUTS
    python benchmarks/high_dim.py --size 1000 --guides AutoNormal

The model is the one of Andrade, "Stable training of normalizing flows for high-dimensional
variational inference" (2024), section 5: a logistic regression with a horseshoe prior, on more
predictors than rows. His data are not ours to give, so these are made: 100 rows, correlated
predictors, five of which count. What comes out is kept in benchmarks/high_dim.json, and the table
is written into docs/benchmarks.md.
"""

import argparse
import datetime
import importlib.metadata
import time
import warnings
from typing import Any

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from records import Records, when

from numpyro_flows import AutoRealNVP, fit_guide, to_arviz

SIZES, ROWS, TRUE = (1000, 4000), 100, (3.0, -3.0, 2.0, -2.0, 2.0)
DRAWS, WARMUP, CHAINS = 1000, 1000, 2
GUIDES = ("AutoNormal", "AutoRealNVP", "AutoRealNVP, high_dim")
TARGETS = [f"{size}, {name}" for size in SIZES for name in ("NUTS", *GUIDES)]
PACKAGES = ("numpyro", "jax", "arviz")


def horseshoe(x: Array, y: Array | None = None) -> None:
    """Logistic regression with a horseshoe prior, non-centred."""
    count = x.shape[1]
    intercept = numpyro.sample("intercept", dist.Normal(0.0, 2.0))
    overall = numpyro.sample("overall", dist.HalfCauchy(0.1))
    local = numpyro.sample("local", dist.HalfCauchy(1.0).expand([count]).to_event(1))
    z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([count]).to_event(1))
    slopes = numpyro.deterministic("slopes", overall * local * z)
    numpyro.sample("y", dist.Bernoulli(logits=intercept + x @ slopes).to_event(1), obs=y)


def data(size: int) -> dict[str, Array]:
    """Make predictors and outcomes for so many latent numbers."""
    random, count = np.random.default_rng(size), size // 2 - 1
    common = random.standard_normal((ROWS, 1))
    x = np.sqrt(0.9) * random.standard_normal((ROWS, count)) + np.sqrt(0.1) * common
    logits = x[:, : len(TRUE)] @ np.array(TRUE)
    y = random.uniform(size=ROWS) < 1 / (1 + np.exp(-logits))
    return {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.float32)}


def sampled(size: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Draw the slopes by NUTS, `(chains, draws, predictors)`."""
    begin = time.perf_counter()
    mcmc = MCMC(
        NUTS(horseshoe, target_accept_prob=0.95),
        num_warmup=WARMUP,
        num_samples=DRAWS,
        num_chains=CHAINS,
        chain_method="sequential",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(0), **data(size), extra_fields=("diverging", "num_steps"))
    slopes = np.asarray(mcmc.get_samples(group_by_chain=True)["slopes"])
    fields = mcmc.get_extra_fields()
    return slopes, {
        "seconds": round(time.perf_counter() - begin),
        "rhat": float(max(az.rhat(column) for column in slopes.transpose(2, 0, 1))),
        "divergent": int(fields["diverging"].sum()),
        "gradients": int(fields["num_steps"].sum()),
    }


def trained(name: str, size: int, steps: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Train a guide, and return draws of the slopes with the verdict on it."""
    begin, inputs = time.perf_counter(), data(size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == "AutoNormal":
            guide: Any = AutoNormal(horseshoe)
            svi = SVI(horseshoe, guide, numpyro.optim.Adam(5e-3), Trace_ELBO(16))
            result: Any = svi.run(jax.random.key(0), steps, progress_bar=False, **inputs)
        else:
            guide = AutoRealNVP(horseshoe, preset="high_dim" if "high_dim" in name else None)
            result = fit_guide(guide, kwargs=inputs, steps=steps, progress=False)
        options = {"params": result.params, "kwargs": inputs, "draws": 4000}
        found = to_arviz(guide, **options, key=jax.random.key(1))
    return found.posterior["slopes"].values, {
        "seconds": round(time.perf_counter() - begin),
        "steps": len(result.losses),
        "elbo": round(float(found.attrs["elbo"]), 2),
        "pareto_k": round(float(found.attrs["pareto_k"]), 2),
    }


def compared(slopes: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Compare means and deviations of the slopes with those of NUTS."""
    own, other = (x.reshape(-1, x.shape[-1]) for x in (slopes, truth))
    spread = other.std(0)
    means = np.abs(own.mean(0) - other.mean(0)) / spread
    ratios = own.std(0) / spread
    true = slice(len(TRUE))
    return {
        "mean_true": round(float(means[true].max()), 2),
        "mean": round(float(np.quantile(means, 0.99)), 2),
        "deviation_true": round(float(np.maximum(ratios, 1 / ratios)[true].max()), 2),
        "deviation": round(float(np.median(ratios)), 2),
    }


def main() -> None:
    """Measure, keep and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs="+", default=SIZES, choices=SIZES)
    parser.add_argument("--guides", nargs="+", default=GUIDES, choices=GUIDES)
    parser.add_argument("--steps", type=int, default=5000)
    options = parser.parse_args()
    records = Records(__file__, TARGETS)
    about = {
        "wing": "numpyro",
        "date": datetime.date.today().isoformat(),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
    }
    for size in options.size:
        truth, run = sampled(size)
        print(size, "NUTS", run, flush=True)
        records.keep({**about, "target": f"{size}, NUTS", **run})
        for name in options.guides:
            slopes, run = trained(name, size, options.steps)
            run |= compared(slopes, truth)
            print(size, name, run, flush=True)
            records.keep({**about, "target": f"{size}, {name}", **run})
    records.write(when, table)


def table(runs: list[dict[str, Any]]) -> str:
    """Return a row for each run."""
    rows = [
        "| numbers, guide | ELBO | k̂ | mean: true | all | deviation: true | all | steps | s |",
        "|" + "---|" * 9,
    ]
    for run in runs:
        if "elbo" not in run:
            rows.append(
                f"| {run['target']} (R̂ {run['rhat']:.2f}) | | | | | | | | {run['seconds']} |"
            )
            continue
        rows.append(
            f"| {run['target']} | {run['elbo']:.1f} | {run['pareto_k']:.2f} | "
            f"{run['mean_true']:.2f} | {run['mean']:.2f} | {run['deviation_true']:.2f} | "
            f"{run['deviation']:.2f} | {run['steps']} | {run['seconds']} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    main()
