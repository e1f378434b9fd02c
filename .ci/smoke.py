"""Checks that an installed wing fits a flow and a guide: `smoke.py numpyro_flows`."""

import importlib
import importlib.metadata
import sys
import tempfile
from pathlib import Path

import numpy as np

NAME = sys.argv[1]
wing = importlib.import_module(NAME)
rng = np.random.default_rng(0)
x = rng.normal(size=(300, 2)).astype("float32")
x[:, 1] = x[:, 0] ** 2 + 0.3 * x[:, 1]  # a parabola
y = rng.normal(2.0, 1.0, size=40).astype("float32")

if NAME == "pyroflows":
    import pyro as host
    import pyro.distributions as dist
    import torch

    arrays, draws, packages = torch.tensor, {}, ("torch", "pyro-ppl")

    def new(builder, *args, **options):
        return builder(*args, **options)

    def sampled(density):
        return density.sample((5,))
else:
    import jax
    import numpyro as host
    import numpyro.distributions as dist

    arrays, draws = jax.numpy.asarray, {"key": jax.random.key(0)}
    packages = ("jax", "numpyro", "equinox", "optax")

    def new(builder, *args, **options):
        return builder(*args, key=jax.random.key(0), **options)

    def sampled(density):
        return density.sample(jax.random.key(1), (5,))


def model(y):
    loc = host.sample("loc", dist.Normal(0.0, 10.0))
    scale = host.sample("scale", dist.HalfNormal(arrays(5.0)))
    with host.plate("rows", len(y)):
        host.sample("y", dist.Normal(loc, scale), obs=y)


positive = dist.constraints.positive
x, y = arrays(x), arrays(y)
flow = new(wing.realnvp, 2, layers=2, hidden=(8,))
result = wing.fit(flow, x, steps=60, learning_rate=2e-2, standardize=True)
density = wing.flow_distribution(result.flow)
assert density.log_prob(x).mean() > -3.0
with tempfile.TemporaryDirectory() as folder:
    wing.save(result.flow, Path(folder) / "flow.safetensors")
    loaded = wing.load(Path(folder) / "flow.safetensors")
again = wing.flow_distribution(loaded).log_prob(x)
assert np.allclose(again.tolist(), density.log_prob(x).tolist(), atol=1e-5)

flow = new(wing.nice, 2, layers=2, hidden=(8,), context_dim=1)
wing.fit(flow, abs(x) + 0.01, context=x[:, :1], steps=20, support=[positive, positive])
flow = new(wing.glow, (1, 4, 4), levels=2, steps=1, channels=4)
assert sampled(wing.flow_distribution(flow)).shape == (5, 1, 4, 4)

guide = wing.AutoRealNVP(model, layers=2, hidden=(8,))
result = wing.fit_guide(guide, args=(y,), steps=60)
print(result)
if NAME == "numpyro_flows":
    draws["params"] = result.params
data = wing.to_arviz(guide, args=(y,), **draws)
print(data.attrs["verdict"])
assert abs(float(data.posterior["loc"].mean()) - 2.0) < 0.5

versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in (*packages, "arviz"))
print(f"{NAME} works on Python {sys.version.split()[0]} with {versions}")
