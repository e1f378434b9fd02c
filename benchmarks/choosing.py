"""Which flow for which table: held-out density and training time of each builder, in Pyro.

    python benchmarks/choosing.py --data uci_tables.npz

Writes `docs/choosing.json`, from which the page *Choosing a flow* is made. The file holds tables
`power_plant` and `kin8nm` of continuous columns, the first of shape (n, 5), the second (n, 9).
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import multivariate_normal

import pyroflows

ROOT = Path(__file__).parent.parent
TABLES = ("power_plant", "kin8nm")
FEW = 500  # rows of the second table, to show what a flow learns from few
SLOWLY = 5e-4  # the learning rate for those: at the usual one, the best parameters are the tenth
HELD_OUT = 0.1
FLOWS: dict[str, tuple[Any, dict[str, Any]]] = {
    "nice": (pyroflows.nice, {}),
    "realnvp": (pyroflows.realnvp, {}),
    "glow": (pyroflows.glow, {}),
    "realnvp, 16 layers of 128 units": (
        pyroflows.realnvp,
        {"layers": 16, "hidden": (128, 128)},
    ),
}
TRAINING = {"batch_size": 256, "schedule": "cosine", "standardize": True}


def main() -> None:
    """Fit each flow to each table, and write down what it is worth."""
    options = arguments()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with np.load(options.data) as file:
        tables = {name: np.asarray(file[name], "float32") for name in TABLES}
    for name, rows in (*tables.items(), (f"kin8nm, {FEW} rows", tables["kin8nm"])):
        train, test = split(rows, options.seed)
        few = name not in tables
        train, rate = (train[:FEW], SLOWLY) if few else (train, 3e-3)
        found[name] = {"rows": len(train), "columns": train.shape[1], "learning_rate": rate}
        flows = found[name]["flows"] = {}
        for flow, (builder, given) in FLOWS.items():
            torch.manual_seed(options.seed)
            model = builder(train.shape[1], **given)
            result = flows[flow] = fitted(model, train, test, rate, options)
            print(name, flow, result, flush=True)
    figures = {"steps": options.steps, "tables": found}
    path = ROOT / "docs/choosing.json"
    path.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"written to {path}")


def arguments() -> argparse.Namespace:
    first, *_ = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(description=first)
    parser.add_argument("--data", required=True, help="an .npz file with the tables")
    parser.add_argument("--steps", type=int, default=2000, help="of training, each flow (2000)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def split(rows: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Hold out rows by chance."""
    order = np.random.default_rng(seed).permutation(len(rows))
    count = round(HELD_OUT * len(rows))
    return rows[order[count:]], rows[order[:count]]


def fitted(
    flow: pyroflows.TransformModule,
    train: np.ndarray,
    test: np.ndarray,
    learning_rate: float,
    options: argparse.Namespace,
) -> dict[str, float]:
    """Return nats per held-out row above a Gaussian of full covariance, and seconds of training."""
    begin = time.perf_counter()
    result = pyroflows.fit(
        flow,
        torch.from_numpy(train),
        steps=options.steps,
        learning_rate=learning_rate,
        seed=options.seed,
        progress=False,
        **TRAINING,
    )
    seconds = time.perf_counter() - begin
    with torch.no_grad():
        log_density = pyroflows.flow_distribution(result.flow).log_prob(torch.from_numpy(test))
    wide = train.astype("float64")
    gaussian = multivariate_normal(wide.mean(0), np.cov(wide.T)).logpdf(test)
    return {
        "nats": round(float(log_density.double().mean()) - float(gaussian.mean()), 3),
        "seconds": round(seconds, 1),
        "best_step": int(result.best_step),
    }


if __name__ == "__main__":
    main()
