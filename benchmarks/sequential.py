"""Posteriors of half the data as priors for the other half, by flows and by normal distributions.

    python benchmarks/sequential.py                   # both wings' priors; an hour
    python benchmarks/sequential.py --wing numpyro --only garch funnel

Every second row of a posterior's data makes a first posterior, which NumPyro's NUTS samples.
`fit_prior` of a wing learns a prior from these draws. With this prior and the other rows NUTS
samples again, in NumPyro for both wings: Pyro's prior comes as a file. The result is compared with
the posterior of all the data (`references.py`). A multivariate normal distribution in unconstrained
space, `fit_prior` before its first step, stands beside. What comes out is kept in
benchmarks/sequential.json, and the table is written into docs/benchmarks.md.
"""

import argparse
import datetime
import functools
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from guides import compared
from jax import Array
from numpyro import handlers
from numpyro.infer import MCMC, NUTS
from numpyro.primitives import Messenger
from posteriors import POSTERIORS, Posterior
from references import RUNS, Run

import numpyro_flows

RESULTS = Path(__file__).with_suffix(".json")
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
START, END = "<!-- sequential: start -->", "<!-- sequential: end -->"
WINGS = ("numpyro", "pyro")
KINDS = ("normal", "flow")
CHAINS, WARMUP, DRAWS = 4, 1000, 5000
MEAN, DEVIATION = 0.1, 1.1  # of deviations; a factor

Model = Callable[..., Any]


def main() -> None:
    """Measure, keep and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wing", choices=WINGS, nargs="+", default=list(WINGS))
    parser.add_argument("--only", nargs="+", choices=POSTERIORS, default=list(POSTERIORS))
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry", action="store_true", help="print, but keep and write nothing")
    options = parser.parse_args()
    numpyro.enable_x64()
    for name in options.only:
        posterior = POSTERIORS[name]
        draws = first_draws(posterior, jax.random.key(options.seed))
        for wing in options.wing:
            for kind in options.kind:
                run = measured(wing, kind, posterior, draws, options.seed)
                print(line(run), flush=True)
                if not options.dry:
                    keep(run)
    if not options.dry:
        write(json.loads(RESULTS.read_text())["runs"])


def measured(
    wing: str, kind: str, posterior: Posterior, draws: Mapping[str, np.ndarray], seed: int
) -> dict[str, Any]:
    """Learn a prior, sample with it, and compare with the posterior of all the data."""
    begin = time.perf_counter()
    # A normal distribution is where the flow starts.
    short = {"steps": 1, "learning_rate": 1e-9} if kind == "normal" else {}
    prior = learned(wing, posterior, draws, seed, **short)
    seconds = time.perf_counter() - begin
    model = functools.partial(second, prior, posterior)
    samples, divergences = sampled(model, Run(0.95), jax.random.key(seed + 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        effective = prior.check(samples)
    return {
        "date": datetime.date.today().isoformat(),
        "wing": wing,
        "kind": kind,
        "posterior": posterior.name,
        "seconds": round(seconds, 1),
        "divergences": divergences,
        "effective": round(effective),
        **compared(posterior, samples),
    }


def learned(
    wing: str, posterior: Posterior, draws: Mapping[str, np.ndarray], seed: int, **options: Any
) -> numpyro_flows.FlowPrior:
    """Return the prior that a wing learns, in NumPyro."""
    options["progress"] = False
    if wing == "numpyro":
        model, kwargs = posterior.numpyro_model, dict(posterior.data)
        key = jax.random.key(seed)
        return numpyro_flows.fit_prior(draws, model, kwargs=kwargs, key=key, **options)
    import torch

    import pyroflows

    torch.set_default_dtype(torch.float64)
    model, kwargs = posterior.pyro_model, posterior.pyro_data()
    prior = pyroflows.fit_prior(draws, model, kwargs=kwargs, seed=seed, **options)
    with tempfile.TemporaryDirectory() as folder:
        pyroflows.save(prior, f"{folder}/prior")
        return numpyro_flows.load(f"{folder}/prior")


class First(Messenger):
    """Handler that leaves every second row of the data."""

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and msg["is_observed"] and np.size(msg["value"]):
            msg["fn"] = dist.Unit(halves(msg["fn"], msg["value"])[0])
            msg["value"] = jnp.zeros((*msg["fn"].batch_shape, 0))


def halves(fn: dist.Distribution, y: Array) -> tuple[Array, Array]:
    """Return the log-densities of the first rows, and of the others given the first."""
    first = np.arange(len(y)) % 2 == 0
    if isinstance(fn, dist.MultivariateNormal):
        index = np.flatnonzero(first)
        part = dist.MultivariateNormal(fn.loc[index], fn.covariance_matrix[np.ix_(index, index)])
        own = part.log_prob(y[index])
        return own, fn.log_prob(y) - own
    while isinstance(fn, dist.Independent):
        fn = fn.base_dist
    each = fn.log_prob(y).reshape(len(y), -1).sum(1)
    return each[first].sum(), each[~first].sum()


def second(prior: numpyro_flows.FlowPrior, posterior: Posterior) -> None:
    """The model of the other rows."""
    values = prior()
    given = handlers.substitute(handlers.seed(posterior.numpyro_model, 0), values)
    with handlers.block():
        trace = handlers.trace(given).get_trace(**posterior.data)
    for site in trace.values():
        if site["type"] == "sample" and site["is_observed"]:
            numpyro.factor(f"{site['name']}_second", halves(site["fn"], site["value"])[1])


def first_draws(posterior: Posterior, key: Array) -> dict[str, np.ndarray]:
    """Draw from the posterior of the first rows."""
    model = posterior.numpyro_model
    if posterior.name == "funnel":  # it has no data: the draws are exact
        found = numpyro.infer.Predictive(model, num_samples=CHAINS * DRAWS)(key)
    else:
        run = RUNS[posterior.name]
        part = functools.partial(First(run.model or model), **posterior.data)
        found, _ = sampled(part, run, key)
    names = set(numpyro_sites(posterior))
    return {name: np.asarray(value) for name, value in found.items() if name in names}


def numpyro_sites(posterior: Posterior) -> list[str]:
    """Return the names of the latent sites of a model."""
    seeded = handlers.seed(posterior.numpyro_model, 0)
    trace = handlers.trace(seeded).get_trace(**posterior.data).values()
    return [s["name"] for s in trace if s["type"] == "sample" and not s["is_observed"]]


def sampled(model: Model, run: Run, key: Array) -> tuple[dict[str, Array], int]:
    """Run NUTS, and return the draws and the number of divergences."""
    kernel = NUTS(model, target_accept_prob=run.target, dense_mass=run.dense)
    size = {"num_warmup": WARMUP, "num_samples": DRAWS, "num_chains": CHAINS}
    mcmc = MCMC(kernel, **size, chain_method="vectorized", progress_bar=False)
    mcmc.run(key)
    return mcmc.get_samples(), int(mcmc.get_extra_fields()["diverging"].sum())


def passes(run: Mapping[str, Any]) -> bool:
    """Whether the posterior is that of all the data."""
    return run["mean"] <= MEAN and run["deviation"] <= DEVIATION


def line(run: Mapping[str, Any]) -> str:
    """Return a run in one line."""
    return (
        f"{run['wing']:8s} {run['kind']:7s} {run['posterior']:26s} mean {run['mean']:6.3f}  "
        f"deviation {run['deviation']:6.3f}  draws that count {run['effective']:5d}  "
        f"divergent {run['divergences']:4d}  {run['seconds']:6.1f} s  "
        + ("passes" if passes(run) else "fails")
    )


def keep(run: dict[str, Any]) -> None:
    """Store a run in place of an earlier one."""
    same = ("posterior", "wing", "kind")
    runs = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []
    runs = [r for r in runs if any(r[field] != run[field] for field in same)]
    runs.append(run)
    runs.sort(key=lambda r: tuple(r[field] for field in same))
    RESULTS.write_text(json.dumps({"runs": runs}, indent=1) + "\n")


def write(runs: list[dict[str, Any]]) -> None:
    """Write the table into the page."""
    text = PAGE.read_text()
    before, _, rest = text.partition(START)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{START}\n\n{report(runs)}\n\n{END}{after}")


def report(runs: list[dict[str, Any]]) -> str:
    """Return a summary and a row for each posterior and prior."""
    rows = ["| prior | passes | seconds, median | measured |", "|---|---|---|---|"]
    for wing in WINGS:
        for kind in KINDS:
            own = [run for run in runs if (run["wing"], run["kind"]) == (wing, kind)]
            if own:
                days = sorted({run["date"] for run in own})
                dates = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
                package = "pyroflows" if wing == "pyro" else "numpyro_flows"
                seconds = np.median([run["seconds"] for run in own])
                passed = f"{sum(map(passes, own))} of {len(own)}"
                rows.append(f"| {kind}, {package} | {passed} | {seconds:.0f} | {dates} |")
    rows += ["", '??? note "Every run"', ""]
    rows.append("    | | posterior | prior | mean | deviation | draws that count | divergent | s |")
    rows.append("    |---|---|---|---|---|---|---|---|")
    for run in runs:
        rows.append(
            f"    | {'✓' if passes(run) else ''} | {run['posterior']} | "
            f"{run['kind']}, {run['wing']} | {run['mean']:.2f} | {run['deviation']:.2f} | "
            f"{run['effective']} | {run['divergences']} | {run['seconds']:.0f} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    main()
