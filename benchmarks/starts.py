"""Where guides start: the bound of what the search finds, before any training.

    python benchmarks/starts.py                                 # all posteriors, in NumPyro
    python benchmarks/starts.py --wing pyro --only noise_process --seeds 0 1 2 --fit

Each line has the evidence lower bound of the start, in nats, and the seconds that it took, with
compilation. The posteriors are those of `posteriors.py` and `noise_process`, which is hard to
search: a Gaussian process with another one for the logarithm of its noise, on 66 numbers.
"""

import argparse
import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from posteriors import POSTERIORS

DRAWS = 4096
BASES = 40, 20  # functions of the process and of its noise
HARD = "noise_process"


def main() -> None:
    """Search, and print what is found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wing", choices=WINGS, default="numpyro")
    parser.add_argument("--only", nargs="+", choices=[*POSTERIORS, HARD])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--fit", action="store_true", help="train by `fit_guide`, too")
    options = parser.parse_args()
    for name in options.only or [*POSTERIORS, HARD]:
        for seed in options.seeds:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found = WINGS[options.wing](name, seed, options.fit)
            print(f"{options.wing:8s} {name:26s} seed {seed}  {found}", flush=True)
            for warning in caught:
                print(f"    {str(warning.message)[:200]}", flush=True)


def process_data() -> dict[str, np.ndarray]:
    """Draw both processes on short length scales, and the data."""
    x = np.sort(np.random.default_rng(12).random(133))
    rng = np.random.default_rng(5)

    def process(loc: float, scale: float, length: float, count: int) -> np.ndarray:
        functions, frequencies = bases(x, count)
        decay = np.exp(-0.25 * (length * frequencies) ** 2)
        weights = scale * math.sqrt(length) * (2 * np.pi) ** 0.25 * decay
        return loc + functions @ (weights * rng.standard_normal(count))

    mean, log_noise = process(-13.0, 40.0, 0.05, BASES[0]), process(2.0, 1.5, 0.1, BASES[1])
    return {"x": x, "y": mean + np.exp(log_noise) * rng.standard_normal(len(x))}


def bases(x: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return eigenfunctions and frequencies (Solin and Särkkä, arXiv:1401.5508, section 3.2)."""
    edge = 1.25 * np.abs(x - x.mean()).max()
    frequencies = np.arange(1, count + 1) * np.pi / (2 * edge)
    return np.sin(frequencies * (x[:, None] - x.mean() + edge)) / np.sqrt(edge), frequencies


def noise_process(
    sample: Any, dist: Any, xp: Any, data: dict[str, np.ndarray]
) -> Callable[[], None]:
    """Return the model in a host."""
    as_array = xp.asarray if hasattr(xp, "asarray") else xp.as_tensor
    y, zero = as_array(data["y"].astype("float32")), as_array(np.float32(0.0))
    parts = [
        tuple(map(lambda a: as_array(a.astype("float32")), bases(data["x"], n))) for n in BASES
    ]

    def process(name: str, loc: float, scale: float, functions: Any, frequencies: Any) -> Any:
        level = sample(f"{name}_level", dist.StudentT(3.0, loc + zero, scale))
        length = sample(f"{name}_length", dist.InverseGamma(1.125 + zero, 0.0177))
        spread = sample(f"{name}_scale", dist.HalfNormal(30.0 + zero))
        z = sample(f"{name}_z", dist.Normal(0 * frequencies, 1.0).to_event(1))
        decay = xp.exp(-0.25 * (length[..., None] * frequencies) ** 2)
        weights = (spread * xp.sqrt(length))[..., None] * (2 * np.pi) ** 0.25 * decay * z
        return level[..., None] + (functions @ weights[..., None])[..., 0]

    def model() -> None:
        mean = process("mean", -13.0, 36.0, *parts[0])
        log_noise = process("noise", 0.0, 10.0, *parts[1])
        sample("y", dist.Normal(mean, xp.exp(log_noise)).to_event(1), obs=y)

    return model


def in_numpyro(name: str, seed: int, fit: bool) -> str:
    """Search in NumPyro."""
    import jax
    import numpyro
    from numpyro import handlers
    from numpyro.infer import Trace_ELBO

    import numpyro_flows

    kwargs: dict[str, Any] = {}
    if name == HARD:
        model = noise_process(numpyro.sample, numpyro.distributions, jax.numpy, process_data())
    else:
        model = POSTERIORS[name].numpyro_model
        kwargs = {n: jax.numpy.asarray(x) for n, x in POSTERIORS[name].data.items()}
    guide = numpyro_flows.AutoRealNVP(model)
    begin = time.perf_counter()
    trace = handlers.trace(handlers.seed(guide, jax.random.key(seed))).get_trace(**kwargs)
    params = {n: site["value"] for n, site in trace.items() if site["type"] == "param"}
    jax.block_until_ready(params)
    seconds = time.perf_counter() - begin

    def bound(params: Any) -> float:
        loss = jax.jit(lambda key: Trace_ELBO(DRAWS).loss(key, params, model, guide, **kwargs))
        return -float(loss(jax.random.key(1)))

    line = f"start {bound(params):9.2f}  {seconds:5.1f} s"
    if fit:
        begin = time.perf_counter()
        result = numpyro_flows.fit_guide(
            numpyro_flows.AutoRealNVP(model),
            kwargs=kwargs,
            key=jax.random.key(seed),
            progress=False,
        )
        line += f"  fit_guide {bound(result.params):9.2f}  {time.perf_counter() - begin:5.1f} s"
        line += f"  {len(result.losses)} steps"
    return line


def in_pyro(name: str, seed: int, fit: bool) -> str:
    """Search in Pyro."""
    import pyro
    import torch
    from pyro.infer import Trace_ELBO

    import pyroflows

    kwargs: dict[str, Any] = {}
    if name == HARD:
        model = noise_process(pyro.sample, pyro.distributions, torch, process_data())
    else:
        model, kwargs = POSTERIORS[name].pyro_model, POSTERIORS[name].pyro_data()
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = pyroflows.AutoRealNVP(model)
    begin = time.perf_counter()
    guide(**kwargs)
    seconds = time.perf_counter() - begin

    def bound() -> float:
        loss = Trace_ELBO(num_particles=DRAWS, vectorize_particles=True)
        with torch.no_grad():
            return -float(loss.loss(model, guide, **kwargs))

    line = f"start {bound():9.2f}  {seconds:5.1f} s"
    if fit:
        begin = time.perf_counter()
        result = pyroflows.fit_guide(guide, kwargs=kwargs, seed=seed, progress=False)
        line += f"  fit_guide {bound():9.2f}  {time.perf_counter() - begin:5.1f} s"
        line += f"  {len(result.losses)} steps"
    return line


WINGS = {"numpyro": in_numpyro, "pyro": in_pyro}

if __name__ == "__main__":
    main()
