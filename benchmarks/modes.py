"""Mixtures of guides on posteriors with several modes, compared with exact shares and grids.

    python benchmarks/modes.py                     # both wings; an hour on a CPU
    python benchmarks/modes.py --wing numpyro --only sine labels

Each run is one `fit_mixture` of an AutoRealNVP. What comes out is kept in benchmarks/modes.json,
where later runs replace what they measure again, and the table is written into docs/benchmarks.md.

The targets are four Gaussians of unlike covariance in ten dimensions, each ten units from the
others; the frequency of a sine in noise, from seven short nights; the labels of a mixture of two
normal distributions; a number whose noisy square has been seen; and a regression with one mode,
for the time that the search for more takes.
"""

import argparse
import datetime
import importlib.metadata
import math
import time
import warnings
from typing import Any

import numpy as np
from records import Records, when
from scipy import stats

PACKAGES = {"numpyro": ("numpyro", "jax", "arviz"), "pyro": ("pyro-ppl", "torch", "arviz")}
DRAWS = 10_000


class Gaussians:
    """Four Gaussians in ten dimensions, with deviations from 0.5 to 2 in random directions."""

    title, size, exact = "four Gaussians, D = 10", 10, 0.0
    shares = np.array([0.4, 0.3, 0.2, 0.1])

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        turned = self._rotation(random)
        self.means = (np.eye(4, self.size) - 0.25) * 10 / math.sqrt(2) @ turned
        scales = np.geomspace(0.5, 2.0, self.size)
        factors = np.stack([self._rotation(random) * scales for _ in range(4)])
        self.factors = np.linalg.cholesky(factors @ factors.swapaxes(1, 2))

    def _rotation(self, random: np.random.Generator) -> np.ndarray:
        return np.linalg.qr(random.normal(size=(self.size, self.size)))[0]

    def model(self, host: Any, array: Any, xp: Any) -> None:
        dist = host.distributions
        wide = dist.Normal(array(np.zeros(self.size)), array(6.0)).to_event(1)
        x = host.sample("x", wide)
        parts = dist.MultivariateNormal(array(self.means), scale_tril=array(self.factors))
        density = parts.log_prob(x[..., None, :]) + array(np.log(self.shares))
        host.factor("density", xp.logsumexp(density, -1) - wide.log_prob(x))

    def mode(self, draws: dict[str, np.ndarray]) -> np.ndarray:
        far = np.square(draws["x"][:, None] - self.means).sum(-1)
        return far.argmin(1)


class Grid:
    """A posterior of one number of interest, with the others integrated out on a grid."""

    site: str  # of that number

    def __init__(self, points: np.ndarray, log_density: np.ndarray, log_evidence: float) -> None:
        weights = np.exp(log_density - log_density.max())
        self.points, self.weights, self.exact = points, weights / weights.sum(), log_evidence
        rises = np.diff(log_density) > 0
        tops = np.flatnonzero(rises[:-1] & ~rises[1:]) + 1
        valleys = [a + log_density[a:b].argmin() for a, b in zip(tops, tops[1:], strict=False)]
        shares = np.array([part.sum() for part in np.split(self.weights, valleys)])
        self.ends, self.shares = points[valleys], shares

    def mode(self, draws: dict[str, np.ndarray]) -> np.ndarray:
        return np.searchsorted(self.ends, draws[self.site])


class Sine(Grid):
    """The frequency of a sine: amplitudes are normal, and integrate out."""

    site = "frequency"

    def __init__(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        nights = random.choice([0.0, 1.0, 2.0, 5.0, 6.0, 7.0, 10.0], 12)
        self.times = np.sort(nights + random.uniform(-0.2, 0.2, 12))
        self.y = np.sin(2 * np.pi * 0.7 * self.times + 0.4) + 0.5 * random.normal(size=12)
        points = np.linspace(0.05, 2.0, 8001)
        angles = 2 * np.pi * points[:, None] * self.times
        waves = np.stack([np.sin(angles), np.cos(angles)], -1)
        covariances = 0.25 * np.eye(12) + waves @ waves.swapaxes(1, 2)
        density = np.array([stats.multivariate_normal.logpdf(self.y, cov=c) for c in covariances])
        super().__init__(points, density, float(np.logaddexp.reduce(density) - math.log(8001)))
        self.title = f"frequency, {(self.shares > 0.02).sum()} modes"

    def model(self, host: Any, array: Any, xp: Any) -> None:
        dist = host.distributions
        frequency = host.sample("frequency", dist.Uniform(array(0.05), array(2.0)))
        wide = dist.Normal(array(np.zeros(2)), array(1.0)).to_event(1)
        sine, cosine = xp.halves(host.sample("amplitude", wide))
        angle = 2 * math.pi * frequency[..., None] * array(self.times)
        mean = sine * xp.sin(angle) + cosine * xp.cos(angle)
        host.sample("y", dist.Normal(mean, array(0.5)).to_event(1), obs=array(self.y))


class Labels(Grid):
    """A mixture of two normal distributions, whose components have no names."""

    title, site = "labels of two components", "difference"

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self.y = np.where(random.uniform(size=60) < 0.4, -1.5, 1.5) + random.normal(size=60)
        means, shares = np.linspace(-3.5, 3.5, 281), (np.arange(100) + 0.5) / 100
        each = stats.norm.pdf(self.y, means[:, None], 1.0)
        density = np.zeros((len(means), len(means)))
        for share in shares:
            total = np.log(share * each[:, None] + (1 - share) * each[None]).sum(-1)
            density += np.exp(total + 110) / len(shares)
        prior = stats.norm.pdf(means, 0.0, 3.0) * (means[1] - means[0])
        joint = density * prior[:, None] * prior
        differences = means[:, None] - means
        points = np.unique(differences.round(6))
        sums = np.array([joint[differences.round(6) == d].sum() for d in points])
        super().__init__(points, np.log(sums + 1e-300), math.log(joint.sum()) - 110)

    def model(self, host: Any, array: Any, xp: Any) -> None:
        dist = host.distributions
        share = host.sample("share", dist.Uniform(array(0.0), array(1.0)))
        wide = dist.Normal(array(np.zeros(2)), array(3.0)).to_event(1)
        first, second = xp.halves(host.sample("means", wide))
        y = array(self.y)
        parts = [
            xp.log(weight[..., None]) + dist.Normal(mean, array(1.0)).log_prob(y)
            for weight, mean in ((share, first), (1 - share, second))
        ]
        host.factor("y", xp.logaddexp(*parts).sum(-1))

    def mode(self, draws: dict[str, np.ndarray]) -> np.ndarray:
        return super().mode({"difference": draws["means"][:, 0] - draws["means"][:, 1]})


class Square(Grid):
    """A number of which the square has been seen, with noise."""

    title, site = "square", "a"

    def __init__(self) -> None:
        points = np.linspace(-12.0, 12.0, 40_001)
        density = stats.norm.logpdf(points, 1.0, 3.0) + stats.norm.logpdf(9.0, points**2, 1.0)
        evidence = np.logaddexp.reduce(density) + math.log(points[1] - points[0])
        super().__init__(points, density, float(evidence))

    def model(self, host: Any, array: Any, xp: Any) -> None:
        a = host.sample("a", host.distributions.Normal(array(1.0), array(3.0)))
        host.sample("y", host.distributions.Normal(a**2, array(1.0)), obs=array(9.0))


class Regression:
    """Twenty responses on four predictors, with noise of unknown size: one mode."""

    title, exact, shares = "regression, one mode", math.nan, np.ones(1)

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self.rows = random.normal(size=(20, 4))
        self.y = self.rows @ [1.0, -1.0, 0.5, 0.0] + 0.5 * random.normal(size=20)

    def model(self, host: Any, array: Any, xp: Any) -> None:
        dist = host.distributions
        noise = host.sample("noise", dist.LogNormal(array(0.0), array(1.0)))
        slopes = host.sample("slopes", dist.Normal(array(np.zeros(4)), array(1.0)).to_event(1))
        mean = (array(self.rows) * slopes[..., None, :]).sum(-1)
        density = dist.Normal(mean, noise[..., None]).to_event(1)
        host.sample("y", density, obs=array(self.y))

    def mode(self, draws: dict[str, np.ndarray]) -> np.ndarray:
        return np.zeros(len(draws["noise"]), dtype=int)


# Each target, and how many seeds it has.
TARGETS: dict[str, tuple[Any, int]] = {
    "gaussians": (Gaussians, 10),
    "sine": (lambda: Sine(1), 3),
    "nights": (lambda: Sine(3), 3),
    "labels": (Labels, 3),
    "square": (Square, 3),
    "one": (Regression, 1),
}


class NumPyro:
    """NumPyro, as far as the targets need it."""

    def __init__(self) -> None:
        import jax
        import numpyro

        self.sin, self.cos, self.log = jax.numpy.sin, jax.numpy.cos, jax.numpy.log
        self.logaddexp, self.logsumexp = jax.numpy.logaddexp, jax.scipy.special.logsumexp
        self.host, self.array, self.jax = numpyro, jax.numpy.asarray, jax

    def halves(self, x: Any) -> Any:
        return x[..., :1], x[..., 1:]

    def guide(self, target: Any) -> Any:
        from numpyro_flows import AutoRealNVP

        return AutoRealNVP(lambda: target.model(self.host, self.array, self))

    def fit(self, name: str, guide: Any, steps: int, seed: int) -> Any:
        import numpyro_flows

        key = self.jax.random.key(seed)
        return getattr(numpyro_flows, name)(guide, steps=steps, progress=False, key=key)

    def judged(self, result: Any) -> Any:
        from numpyro_flows import to_arviz

        key = self.jax.random.key(100)
        return to_arviz(result.guide, params=result.params, draws=DRAWS, key=key)


class Pyro:
    """Pyro, as far as the targets need it."""

    def __init__(self) -> None:
        import pyro
        import torch

        self.sin, self.cos, self.log = torch.sin, torch.cos, torch.log
        self.logaddexp, self.logsumexp = torch.logaddexp, torch.logsumexp
        self.host, self.torch = pyro, torch
        pyro.clear_param_store()

    def array(self, x: Any) -> Any:
        return self.torch.as_tensor(x, dtype=self.torch.float32)

    def halves(self, x: Any) -> Any:
        return x[..., :1], x[..., 1:]

    def guide(self, target: Any) -> Any:
        from pyroflows import AutoRealNVP

        self.model = lambda: target.model(self.host, self.array, self)
        return AutoRealNVP(self.model)

    def fit(self, name: str, guide: Any, steps: int, seed: int) -> Any:
        import pyroflows

        return getattr(pyroflows, name)(guide, steps=steps, progress=False, seed=seed)

    def judged(self, result: Any) -> Any:
        from pyroflows import to_arviz

        return to_arviz(result.guide, draws=DRAWS, seed=100)


def main() -> None:
    """Measure, keep and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wing", choices=PACKAGES, nargs="+", default=list(PACKAGES))
    parser.add_argument("--only", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--seeds", type=int, help="most seeds of a target")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--dry", action="store_true", help="print, but keep and write nothing")
    options = parser.parse_args()
    records = Records(__file__, list(TARGETS))
    for wing in options.wing:
        for name in options.only:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run = measured(wing, name, options)
            print(run, flush=True)
            if not options.dry:
                records.keep(run)
                records.write(about, table, ratio)


def measured(wing: str, name: str, options: Any) -> dict[str, Any]:
    """Fit a mixture for each seed, and compare it with the truth."""
    make, seeds = TARGETS[name]
    target, host = make(), {"numpyro": NumPyro, "pyro": Pyro}[wing]
    run: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES[wing]},
        "wing": wing,
        "target": name,
        "title": target.title,
        "steps": options.steps,
        "shares": target.shares.tolist(),
        "exact": None if math.isnan(target.exact) else target.exact,
        "found": [],
    }
    if name == "one":  # what either would do first, for both
        library = host()
        library.fit("fit_guide", library.guide(target), 10, 0)
    for seed in range(min(seeds, options.seeds or seeds)):
        library = host()
        begin = time.perf_counter()
        result = library.fit("fit_mixture", library.guide(target), options.steps, seed)
        found = {"seconds": time.perf_counter() - begin, "parts": len(result.weights)}
        data = library.judged(result)
        draws = {n: np.asarray(v)[0] for n, v in data["posterior"].items()}
        modes = target.mode(draws)
        found |= {
            "shares": (np.bincount(modes, minlength=len(target.shares)) / DRAWS).tolist(),
            "elbo": float(data.attrs["elbo"]),
            "k": float(data.attrs["pareto_k"]),
        }
        run["found"].append(found)
        print(name, seed, found, flush=True)
    if name == "one":
        library = host()
        begin = time.perf_counter()
        library.fit("fit_guide", library.guide(target), options.steps, 0)
        run["single_seconds"] = time.perf_counter() - begin
    return run


def about(runs: list[dict[str, Any]]) -> str:
    """Return when and with what the runs were made."""
    return f"{when(runs)}, {runs[-1]['steps']} steps for each mode."


def table(runs: list[dict[str, Any]]) -> str:
    """Return a row for each target."""
    rows = [
        "| target | exact shares | largest error of a share | log Z − ELBO | k̂ | guides | "
        "seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        exact, found = np.array(run["shares"]), run["found"]
        if len(exact) < 2:
            continue
        errors = [abs(np.array(one["shares"]) - exact).max() for one in found]
        gaps = [run["exact"] - one["elbo"] for one in found]
        shown = ", ".join(f"{share:.2f}" for share in exact if share > 0.02)
        parts = sorted({one["parts"] for one in found})
        rows.append(
            f"| {run['title']}, {len(found)} seeds | {shown} | {max(errors):.3f} | "
            f"{max(gaps):.3f} | {max(one['k'] for one in found):.2f} | "
            f"{' to '.join(map(str, sorted({parts[0], parts[-1]})))} | "
            f"{np.mean([one['seconds'] for one in found]):.0f} |"
        )
    return "\n".join(rows)


def ratio(runs: list[dict[str, Any]]) -> str:
    """Return what the search for more modes costs where there is one."""
    for run in runs:
        if "single_seconds" in run:
            (found,) = run["found"]
            return (
                f"On a regression with one mode, `fit_mixture` took {found['seconds']:.0f} s and "
                f"`fit_guide` {run['single_seconds']:.0f} s."
            )
    return ""


if __name__ == "__main__":
    main()
