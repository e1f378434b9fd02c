"""The evidence by a trained AutoRealNVP, compared with closed forms.

    python benchmarks/evidence.py                    # both wings; half an hour each on a CPU
    python benchmarks/evidence.py --wing numpyro --only pine_x pine_z

Each target has one guide, which `fit_guide` trains, and so many seeds of `log_evidence`. For some,
the host's NUTS draws from the posterior, too, for bridge sampling. What comes out is kept in
benchmarks/evidence.json, where later runs replace what they measure again, and the table is written
into docs/benchmarks.md.

The targets are regressions with unknown noise in D dimensions, of which one is its precision; the
same without the last slope, for a Bayes factor; Neal's funnel in ten dimensions, whose evidence is
zero; and two regressions on the Radiata pine data of E. J. Williams, "Regression Analysis" (1959).
"""

import argparse
import datetime
import functools
import importlib.metadata
import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from pine import DENSITY, EXACT, PRIOR, RESIN_ADJUSTED, STRENGTH
from records import Records, when
from scipy import stats

PACKAGES = {"numpyro": ("numpyro", "jax", "arviz"), "pyro": ("pyro-ppl", "torch", "arviz")}
CHAINS, DRAWS = 2, 1000  # of NUTS


class Prior(NamedTuple):
    """Of the slopes: mean, and precision in units of that of the noise; of the noise: gamma."""

    loc: np.ndarray
    precision: np.ndarray
    shape: float
    rate: float


@dataclass(frozen=True)
class Regression:
    """Responses on the columns of a table, with noise of unknown precision."""

    rows: np.ndarray
    responses: np.ndarray
    prior: Prior

    @property
    def exact(self) -> float:
        """The evidence: under the prior, the responses have a Student distribution."""
        shape = np.eye(len(self.rows)) + self.rows / self.prior.precision @ self.rows.T
        unit = self.prior.rate / self.prior.shape
        student = stats.multivariate_t(
            self.rows @ self.prior.loc, shape * unit, 2 * self.prior.shape
        )
        return float(student.logpdf(self.responses))

    def model(self, host: Any, array: Any) -> None:
        """Run the model in one of the hosts."""
        dist, prior = host.distributions, self.prior
        tau = host.sample("tau", dist.Gamma(array(prior.shape), array(prior.rate)))
        deviation = tau**-0.5
        width = deviation[..., None] / array(prior.precision**0.5)
        slopes = host.sample("slopes", dist.Normal(array(prior.loc), width).to_event(1))
        with host.plate("rows", len(self.rows)):
            loc = (array(self.rows) * slopes[..., None, :]).sum(-1)
            host.sample("y", dist.Normal(loc, deviation), obs=array(self.responses))


class Funnel:
    """Neal's funnel in ten dimensions, without data."""

    exact = 0.0

    def model(self, host: Any, array: Any) -> None:
        """Run the model in one of the hosts."""
        v = host.sample("v", host.distributions.Normal(array(0.0), array(3.0)))
        with host.plate("dim", 9):
            host.sample("x", host.distributions.Normal(0 * v, 2.718281828459045 ** (v / 2)))


def simulated(size: int, count: int | None = None) -> Regression:
    """Return a regression of 100 responses in `size` dimensions, with fewer slopes if given."""
    random = np.random.default_rng(size)
    rows = random.normal(size=(100, size - 1))
    slopes = random.normal(size=size - 1)
    slopes[-1] = 0.1  # hardly any
    responses = rows @ slopes + 0.7 * random.normal(size=100)
    count = count or size - 1
    prior = Prior(np.zeros(count), np.full(count, 0.5), 2.0, 1.0)
    return Regression(rows[:, :count], responses, prior)


def pine(x: np.ndarray) -> Regression:
    """Return the strength of the Radiata pines as a line in one of the densities."""
    return Regression(np.stack([np.ones(len(x)), x - x.mean()], 1), STRENGTH, Prior(*PRIOR))


@dataclass(frozen=True)
class Target:
    """A model with the bar for its evidence, how often it is estimated, and whether by NUTS."""

    title: str
    model: Any
    bar: float
    seeds: int = 5
    nuts: bool = False
    steps: int = 1  # times those of the others


TARGETS = {
    **{f"regression_{d}": Target(f"regression, D = {d}", simulated(d), 0.01) for d in (2, 5)},
    "regression_10": Target("regression, D = 10", simulated(10), 0.01, seeds=20, nuts=True),
    **{f"regression_{d}": Target(f"regression, D = {d}", simulated(d), 0.01) for d in (20, 50)},
    "nested_5": Target("D = 5 without its last slope", simulated(5, 3), 0.01),
    "pine_x": Target("Radiata pine, density", pine(DENSITY), 0.02, seeds=20, nuts=True),
    "pine_z": Target("Radiata pine, adjusted", pine(RESIN_ADJUSTED), 0.02, seeds=20, nuts=True),
    "funnel": Target("funnel, D = 10", Funnel(), 0.1, seeds=20, steps=3),
}


def main() -> None:
    """Measure, keep and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wing", choices=PACKAGES, nargs="+", default=list(PACKAGES))
    parser.add_argument("--only", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry", action="store_true", help="print, but keep and write nothing")
    options = parser.parse_args()
    records = Records(__file__, list(TARGETS))
    for name, value in EXACT.items():  # the published values are those of these data
        assert abs(TARGETS[name].model.exact - value) < 1e-3
    for wing in options.wing:
        for name in options.only:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run = measured(wing, name, options)
            print(run, flush=True)
            if not options.dry:
                records.keep(run)
                records.write(about, table, nested)


def measured(wing: str, name: str, options: Any) -> dict[str, Any]:
    """Train a guide, and estimate the evidence by many seeds."""
    target = TARGETS[name]
    begin = time.perf_counter()
    steps = target.steps * options.steps
    estimate, sampled = {"numpyro": in_numpyro, "pyro": in_pyro}[wing](target, steps, options.seed)
    run: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES[wing]},
        "wing": wing,
        "target": name,
        "steps": steps,
        "exact": target.model.exact,
        "training_seconds": round(time.perf_counter() - begin, 1),
        "found": [],
    }
    begin = time.perf_counter()
    for seed in range(target.seeds):
        try:
            run["found"].append(estimate(seed, None))
        except ValueError as error:
            run.setdefault("refused", []).append(str(error))
    run["seconds"] = round((time.perf_counter() - begin) / target.seeds, 1)
    if target.nuts:
        run["bridge"] = estimate(0, sampled())
    return run


def in_numpyro(target: Target, steps: int, seed: int) -> tuple[Any, Any]:
    """Return functions that estimate the evidence, and draw from the posterior."""
    import jax
    import numpyro
    from numpyro.infer import MCMC, NUTS

    import numpyro_flows

    def model() -> None:
        target.model.model(numpyro, jax.numpy.asarray)

    guide = numpyro_flows.AutoRealNVP(model)
    key = jax.random.key(seed)
    fitted = numpyro_flows.fit_guide(guide, steps=steps, progress=False, key=key)
    evidence = functools.partial(numpyro_flows.log_evidence, guide, params=fitted.params)

    def estimate(seed: int, samples: Any) -> list[float]:
        return list(evidence(samples=samples, key=jax.random.key(100 + seed)))

    def sampled() -> Any:
        mcmc = MCMC(NUTS(model), num_warmup=DRAWS, num_samples=DRAWS, num_chains=CHAINS)
        mcmc.run(jax.random.key(seed))
        return mcmc.get_samples(group_by_chain=True)

    return estimate, sampled


def in_pyro(target: Target, steps: int, seed: int) -> tuple[Any, Any]:
    """Return functions that estimate the evidence, and draw from the posterior."""
    import pyro
    import torch
    from pyro.infer import MCMC, NUTS
    from pyro.infer.reparam import NeuTraReparam

    import pyroflows

    pyro.clear_param_store()

    def array(x: Any) -> torch.Tensor:
        return torch.as_tensor(x, dtype=torch.float32)

    def model() -> None:
        target.model.model(pyro, array)

    guide = pyroflows.AutoRealNVP(model, layers=8)
    pyroflows.fit_guide(guide, model, steps=steps, progress=False, seed=seed)

    def estimate(seed: int, samples: Any) -> list[float]:
        return list(pyroflows.log_evidence(guide, model, samples=samples, seed=100 + seed))

    def sampled() -> Any:
        pyro.set_rng_seed(seed)
        neutra = NeuTraReparam(guide.requires_grad_(False))  # plain NUTS takes many steps a draw
        mcmc = MCMC(NUTS(neutra.reparam(model)), DRAWS // 2, DRAWS // 4, disable_progbar=True)
        mcmc.run()
        (latent,) = mcmc.get_samples(group_by_chain=True).values()
        return neutra.transform_sample(latent)

    return estimate, sampled


def about(runs: list[dict[str, Any]]) -> str:
    """Return when and with what the runs were made."""
    return f"{when(runs)}."


def table(runs: list[dict[str, Any]]) -> str:
    """Return a row for each target."""
    rows = [
        "| target | exact | mean absolute error | bar | stated error | within two | k̂ | by NUTS | "
        "seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        target, exact = TARGETS[run["target"]], run["exact"]
        head = f"| {target.title} | {exact:.3f} |"
        if not run["found"]:
            rows.append(f"{head} refused | {target.bar} | | | | | {run['seconds']:.0f} |")
            continue
        value, error, k = np.array(run["found"]).T
        hits = f"{(abs(value - exact) < 2 * error).sum()} of {target.seeds}"
        if run.get("refused"):
            hits += f", {len(run['refused'])} refused"
        bridge = "{:.3f} ± {:.3f}".format(*run["bridge"]) if "bridge" in run else ""
        miss = abs(value - exact).mean()
        rows.append(
            f"{head} {miss:.4f} | {target.bar} | {error.mean():.4f} | {hits} | "
            f"{np.median(k):.2f} | {bridge} | {run['seconds']:.0f} |"
        )
    return "\n".join(rows)


def nested(runs: list[dict[str, Any]]) -> str:
    """Return the Bayes factor of the nested regressions in a sentence."""
    named: Mapping[str, Any] = {run["target"]: run for run in runs if run["found"]}
    if not {"regression_5", "nested_5"} <= set(named):
        return ""
    whole, part = named["regression_5"], named["nested_5"]
    value = whole["found"][0][0] - part["found"][0][0]
    error = math.hypot(whole["found"][0][1], part["found"][0][1])
    exact = whole["exact"] - part["exact"]
    return (
        "The logarithm of the Bayes factor of the regression in five dimensions and the one "
        f"without its last slope is {value:.4f} ± {error:.4f}; exact is {exact:.4f}."
    )


if __name__ == "__main__":
    main()
