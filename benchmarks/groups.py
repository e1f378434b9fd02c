"""Guides of models of groups in batches, compared with exact posteriors and the hosts' guide.

    python benchmarks/groups.py                     # both wings; half an hour on a CPU
    python benchmarks/groups.py --wing numpyro --only normal

Each fit is one `fit_guide` of an AutoRealNVP on batches of the groups, and the host's AutoNormal
with the same steps, particles and learning rate. What comes out is kept in benchmarks/groups.json,
where later runs replace what they measure again, and the table is written into docs/benchmarks.md.

The targets are centred normal groups of 1 to 20 data, whose groups integrate out in closed form;
logistic groups with an intercept and a slope each, compared with NUTS; and the time of a step for
more and more groups.
"""

import argparse
import datetime
import importlib.metadata
import math
import time
from typing import Any

import numpy as np
from records import Records, when
from scipy import optimize, stats

PACKAGES = {"numpyro": ("numpyro", "jax", "arviz"), "pyro": ("pyro-ppl", "torch", "arviz")}
DRAWS, RATE, PARTICLES = 1000, 5e-3, 16
SIZES = 1_000, 10_000, 100_000


class Normal:
    """Centred normal groups of 1 to 20 data."""

    title, data = "normal", 20

    def __init__(self, size: int = 10_000) -> None:
        self.size = size
        random = np.random.default_rng(0)
        counts = random.integers(1, self.data + 1, size)
        theta = 5.0 + 0.7 * random.normal(size=(size, 1))
        self.seen = np.arange(self.data) < counts[:, None]
        self.y = np.where(self.seen, theta + 1.3 * random.normal(size=self.seen.shape), 0.0)

    def model(self, host: Any, arrays: Any, batch: int | None) -> None:
        dist, (y, seen) = host.distributions, arrays
        mean = host.sample("mean", dist.Normal(0.0, 10.0))
        scale = host.sample("scale", dist.HalfNormal(2.0))
        noise = host.sample("noise", dist.HalfNormal(2.0))
        with host.plate("group", self.size, subsample_size=batch, dim=-2) as rows:
            theta = host.sample("theta", dist.Normal(mean, scale))
            with host.plate("datum", self.data, dim=-1), host.mask(seen[rows]):
                host.sample("y", dist.Normal(theta, noise), obs=y[rows])

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.y.astype("float32"), self.seen

    def log_density(self, mean: Any, log_scale: Any, log_noise: Any) -> Any:
        """Return the log-density without the groups, and with the change to logarithms."""
        scale, noise = np.exp(log_scale), np.exp(log_noise)
        counts = self.seen.sum(1)
        means = self.y.sum(1) / counts
        rest = (((self.y - means[:, None]) ** 2) * self.seen).sum()
        found = stats.norm(0, 10).logpdf(mean) + stats.halfnorm(0, 2).logpdf(scale)
        found += stats.halfnorm(0, 2).logpdf(noise) + log_scale + log_noise
        found -= rest / (2 * noise**2) + (counts - 1).sum() * (log_noise + math.log(2 * np.pi) / 2)
        found -= 0.5 * np.log(counts).sum()
        for count in range(1, self.data + 1):
            own = means[counts == count]
            spread = scale**2 + noise**2 / count
            squares = (own**2).sum() - 2 * own.sum() * mean + len(own) * mean**2
            found -= 0.5 * (len(own) * np.log(2 * np.pi * spread) + squares / spread)
        return found

    def exact(self) -> dict[str, Any]:
        """Return mean and deviation of each global number and the evidence, by importance."""
        start = np.array([5.0, math.log(0.7), math.log(1.3)])
        options = {"xatol": 1e-7, "fatol": 1e-8, "maxiter": 5000}
        best = optimize.minimize(
            lambda x: -self.log_density(*x), start, method="Nelder-Mead", options=options
        ).x
        step, eye = 1e-3, 1e-3 * np.eye(3)

        def second(a: np.ndarray, b: np.ndarray) -> float:
            ends = [(1, a + b), (-1, a - b), (-1, b - a), (1, -a - b)]
            return sum(s * self.log_density(*(best + x)) for s, x in ends) / (4 * step**2)

        curvature = -np.array([[second(a, b) for b in eye] for a in eye])
        wide = stats.multivariate_normal(best, 1.3 * np.linalg.inv(curvature))
        x = wide.rvs(100_000, random_state=0)
        logs = self.log_density(*x.T) - wide.logpdf(x)
        weights = np.exp(logs - logs.max())
        evidence = float(logs.max() + np.log(weights.mean()))
        weights /= weights.sum()
        x = np.column_stack([x[:, 0], np.exp(x[:, 1:])])
        mean = weights @ x
        deviation = np.sqrt(weights @ (x - mean) ** 2)
        return {"mean": mean.tolist(), "deviation": deviation.tolist(), "evidence": evidence}

    names = "mean", "scale", "noise"


class Logistic:
    """Logistic groups with an intercept and a slope each, of eight data."""

    title, data = "logistic", 8
    names = "mean", "scale"

    def __init__(self, size: int = 1_000) -> None:
        self.size = size
        random = np.random.default_rng(1)
        self.x = random.normal(size=(size, self.data))
        factor = np.linalg.cholesky([[1.0, 0.3], [0.3, 0.36]])
        b = np.array([-0.5, 0.8]) + random.normal(size=(size, 2)) @ factor.T
        chance = 1 / (1 + np.exp(-(b[:, :1] + b[:, 1:] * self.x)))
        self.y = random.random(chance.shape) < chance

    def model(self, host: Any, arrays: Any, batch: int | None) -> None:
        dist, (x, y) = host.distributions, arrays
        mean = host.sample("mean", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
        scale = host.sample("scale", dist.HalfNormal(1.0).expand([2]).to_event(1))
        with host.plate("group", self.size, subsample_size=batch) as rows:
            b = host.sample("b", dist.Normal(mean, scale).to_event(1))
            logits = b[..., :1] + b[..., 1:] * x[rows]
            host.sample("y", dist.Bernoulli(logits=logits).to_event(1), obs=y[rows])

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.x.astype("float32"), self.y.astype("float32")

    def exact(self) -> dict[str, Any]:
        """Return mean and deviation of each global number, by NUTS."""
        import jax
        from numpyro.infer import MCMC, NUTS

        library = NumPyro()
        kernel = NUTS(library.model(self))
        mcmc = MCMC(
            kernel, num_warmup=1000, num_samples=4000, num_chains=2, progress_bar=False,
            chain_method="sequential",
        )  # fmt: skip
        mcmc.run(jax.random.key(0), None)
        draws = np.concatenate([np.asarray(mcmc.get_samples()[n]) for n in self.names], 1)
        return {"mean": draws.mean(0).tolist(), "deviation": draws.std(0).tolist()}


TARGETS = {"normal": Normal, "logistic": Logistic}


class NumPyro:
    """Fits of NumPyro."""

    def model(self, target: Any) -> Any:
        import jax.numpy as jnp
        import numpyro
        from numpyro import handlers

        host = type("Host", (), {**vars(numpyro), "mask": lambda seen: handlers.mask(mask=seen)})
        arrays = tuple(map(jnp.asarray, target.arrays))
        return lambda batch: target.model(host, arrays, batch)

    def fit(self, target: Any, batch: int, steps: int) -> Any:
        from numpyro_flows import AutoRealNVP, fit_guide

        guide = AutoRealNVP(self.model(target), layers=8)
        return fit_guide(guide, args=(batch,), steps=steps, progress=False)

    def weighed(self, result: Any) -> Any:
        import jax

        from numpyro_flows import to_arviz

        options = {"params": result.params, "draws": DRAWS, "key": jax.random.key(1)}
        return to_arviz(result.guide, args=(None,), **options)

    def losses(self, target: Any, guide: Any, batch: int, steps: int) -> tuple[Any, Any]:
        import jax
        import numpyro
        from numpyro.infer import SVI, Trace_ELBO

        model = self.model(target)
        loss = Trace_ELBO(num_particles=PARTICLES)
        svi = SVI(model, guide, numpyro.optim.Adam(RATE), loss)
        result = svi.run(jax.random.key(0), steps, batch, progress_bar=False)
        found = jax.jit(lambda key: loss.loss(key, result.params, model, guide, None))
        return result, [float(found(jax.random.key(k))) for k in range(20)]

    def normal(self, target: Any, batch: int, steps: int) -> float:
        """Return the bound of the host's guide, on all groups."""
        from numpyro.infer.autoguide import AutoNormal

        guide = AutoNormal(self.model(target))
        return -float(np.mean(self.losses(target, guide, batch, steps)[1]))

    def joint(self, target: Any, result: Any) -> float:
        """Return the bound of our guide, on all groups and all sites."""
        import jax
        from numpyro.infer import Trace_ELBO

        loss, model = Trace_ELBO(num_particles=PARTICLES), self.model(target)
        found = jax.jit(lambda key: loss.loss(key, result.params, model, result.guide, None))
        return -float(np.mean([found(jax.random.key(k)) for k in range(20)]))

    def step(self, target: Any, batch: int) -> tuple[float, float]:
        """Return the seconds of the set-up and of a step."""
        import jax
        import optax
        from numpyro.infer import SVI, Trace_ELBO

        from numpyro_flows import AutoRealNVP

        model = self.model(target)
        guide = AutoRealNVP(model, layers=8)
        svi = SVI(model, guide, optax.adam(RATE), Trace_ELBO(num_particles=PARTICLES))
        begin = time.perf_counter()
        state = svi.init(jax.random.key(0), batch)
        set_up = time.perf_counter() - begin

        @jax.jit
        def run(state: Any) -> Any:
            return jax.lax.scan(lambda s, _: svi.update(s, batch), state, length=200)

        state, _ = jax.block_until_ready(run(state))
        begin = time.perf_counter()
        jax.block_until_ready(run(state))
        return set_up, (time.perf_counter() - begin) / 200


class Pyro:
    """Fits of Pyro."""

    def model(self, target: Any) -> Any:
        import pyro
        import torch
        from pyro import poutine

        host = type("Host", (), {**vars(pyro), "mask": lambda seen: poutine.mask(mask=seen)})
        arrays = tuple(map(torch.as_tensor, target.arrays))
        return lambda batch: target.model(host, arrays, batch)

    def fit(self, target: Any, batch: int, steps: int) -> Any:
        import pyro

        from pyroflows import AutoRealNVP, fit_guide

        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = AutoRealNVP(self.model(target), layers=8)
        return fit_guide(guide, args=(batch,), steps=steps, progress=False)

    def weighed(self, result: Any) -> Any:
        from pyroflows import to_arviz

        return to_arviz(result.guide, args=(None,), draws=DRAWS, seed=1)

    def _loss(self, nesting: int) -> Any:
        from pyro.infer import Trace_ELBO

        options = {"vectorize_particles": True, "max_plate_nesting": nesting}
        return Trace_ELBO(num_particles=PARTICLES, **options)

    def normal(self, target: Any, batch: int, steps: int) -> float:
        import pyro
        from pyro.infer import SVI
        from pyro.infer.autoguide import AutoNormal

        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model = self.model(target)
        guide, loss = AutoNormal(model), self._loss(2 if target.title == "normal" else 1)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": RATE}), loss)
        for _ in range(steps):
            svi.step(batch)
        # The guide's plates keep the size of the batch: all groups at once need a guide of all.
        whole = AutoNormal(model)
        whole(None)
        return -float(np.mean([self._whole(model, whole, guide, loss) for _ in range(20)]))

    def _whole(self, model: Any, whole: Any, guide: Any, loss: Any) -> float:
        import torch

        with torch.no_grad():
            for ours, theirs in zip(whole.parameters(), guide.parameters(), strict=True):
                ours.copy_(theirs)
            return loss.loss(model, whole, None)

    def joint(self, target: Any, result: Any) -> float:
        loss, model = self._loss(2 if target.title == "normal" else 1), self.model(target)
        return -float(np.mean([loss.loss(model, result.guide, None) for _ in range(20)]))

    def step(self, target: Any, batch: int) -> tuple[float, float]:
        import pyro
        from pyro.infer import SVI

        from pyroflows import AutoRealNVP

        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model = self.model(target)
        guide = AutoRealNVP(model, layers=8)
        begin = time.perf_counter()
        guide(batch)
        set_up = time.perf_counter() - begin
        svi = SVI(model, guide, pyro.optim.Adam({"lr": RATE}), self._loss(2))
        for _ in range(10):
            svi.step(batch)
        begin = time.perf_counter()
        for _ in range(40):
            svi.step(batch)
        return set_up, (time.perf_counter() - begin) / 40


LIBRARIES = {"numpyro": NumPyro, "pyro": Pyro}


def main() -> None:
    """Measure, keep and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--wing", choices=list(LIBRARIES), default=None)
    parser.add_argument("--only", nargs="*", default=[*TARGETS, "time"])
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    records = Records(__file__, [*TARGETS, "time"])
    for wing in [options.wing] if options.wing else LIBRARIES:
        for name in options.only:
            library = LIBRARIES[wing]()
            found = times(library) if name == "time" else fits(library, name, options.steps)
            versions = {n: importlib.metadata.version(n) for n in PACKAGES[wing]}
            date = datetime.datetime.now(datetime.UTC).date().isoformat()
            run = {"wing": wing, "target": name, "date": date, "versions": versions, **found}
            print(run, flush=True)
            records.keep(run)
    records.write(about, table, steps)


def fits(library: Any, name: str, count: int) -> dict[str, Any]:
    """Fit both guides to a target, and compare them with the exact posterior."""
    target = TARGETS[name]()
    batch = 200 if name == "normal" else 100
    exact = target.exact()
    begin = time.perf_counter()
    result = library.fit(target, batch, count)
    seconds = time.perf_counter() - begin
    begin = time.perf_counter()
    data = library.weighed(result)
    weighing = time.perf_counter() - begin
    parts = [np.asarray(data.posterior[n])[0].reshape(DRAWS, -1) for n in target.names]
    draws = np.concatenate(parts, 1)
    error = (draws.mean(0) - exact["mean"]) / exact["deviation"]
    ratio = draws.std(0) / exact["deviation"]
    return {
        "groups": target.size,
        "batch": batch,
        "steps": count,
        "error": float(np.abs(error).max()),
        "ratio": [float(ratio.min()), float(ratio.max())],
        "evidence": exact.get("evidence"),
        "log_evidence": float(data.attrs["log_evidence"]),
        "k": float(data.attrs["pareto_k"]),
        "bound": library.joint(target, result),
        "normal": library.normal(target, batch, count),
        "seconds": seconds,
        "weighing": weighing,
    }


def times(library: Any) -> dict[str, Any]:
    """Time the set-up and a step for more and more groups."""
    found = {size: library.step(Normal(size), 200) for size in SIZES}
    return {"sizes": list(SIZES), "set_up": [a for a, _ in found.values()],
            "step": [b for _, b in found.values()]}  # fmt: skip


def about(runs: list[dict[str, Any]]) -> str:
    """Return when and with what the runs were made."""
    steps = {run["steps"] for run in runs if "steps" in run}
    return f"{when(runs)}, {', '.join(map(str, sorted(steps)))} steps."


def table(runs: list[dict[str, Any]]) -> str:
    """Return a row for each target."""
    rows = [
        "| target | groups | batch | error | deviations | log Z − estimate | k̂ | ELBO above "
        "AutoNormal | fit | ratios |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        if run["target"] == "time":
            continue
        gap = "" if run["evidence"] is None else f"{run['evidence'] - run['log_evidence']:.3f}"
        low, high = run["ratio"]
        rows.append(
            f"| {run['target']} | {run['groups']:,} | {run['batch']} | {run['error']:.2f} | "
            f"{low:.2f} to {high:.2f} | {gap} | {run['k']:.2f} | "
            f"{run['bound'] - run['normal']:.1f} | {run['seconds']:.0f} s | "
            f"{run['weighing']:.0f} s |"
        )
    return "\n".join(rows)


def steps(runs: list[dict[str, Any]]) -> str:
    """Return the times of a step and of the set-up."""
    for run in runs:
        if run["target"] == "time":
            parts = [
                f"{step * 1000:.1f} ms with {size:,} groups (set-up {start:.0f} s)"
                for size, step, start in zip(run["sizes"], run["step"], run["set_up"], strict=True)
            ]
            return f"A step on a batch of 200 took {', '.join(parts)}."
    return ""


if __name__ == "__main__":
    main()
