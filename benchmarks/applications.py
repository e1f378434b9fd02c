"""Outliers and inpainting on MNIST, with Fashion-MNIST as the other data set, in Pyro.

    python benchmarks/applications.py --data mnist.npz --other fashion_mnist.npz \
        --nice out/nice-mnist/pyro.safetensors

Trains a Glow and its background flow on each of the two sets, and writes

- `docs/tutorials/outliers.json`: scores of corrupted digits and of each set under the other's flow,
- `docs/assets/mnist-corruption.webp` and `docs/assets/mnist-inpainting.webp`.

`--nice` is a NICE that `images.py --flow nice --preset long` has trained; without it, inpainting is
shown with Glow alone. Flows are kept in `--output`, and a second run takes them from there. The
files hold `x_test` and `x_train`, or `x` alone, whose last tenth is then held out.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from image_data import load, validation
from matplotlib.figure import Figure
from sklearn.metrics import precision_recall_fscore_support, roc_auc_score

import pyroflows
from pyroflows_common.corruption import KINDS

GLOW = {"levels": 2, "steps": 4, "channels": 32, "logit": 1e-6}
TRAINING = {"batch_size": 64, "learning_rate": 5e-3, "schedule": "cosine"}
# Share of the pixels that a background flow sees drawn anew (Ren et al., section 4: 0.1 to 0.3).
MUTATED = 0.2
STRENGTHS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
SCORES = ("log_density", "typicality", "complexity", "ratio")
FALSE_POSITIVES = 0.05
ROOT = Path(__file__).parent.parent


def main() -> None:
    """Train, score, fill in, and write down."""
    options = arguments()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    begin = time.perf_counter()
    sets, flows, backgrounds = {}, {}, {}
    for name, path in (("MNIST", options.data), ("Fashion-MNIST", options.other)):
        train, test, _ = load(path)
        sets[name] = split(torch.from_numpy(train), torch.from_numpy(test), options.events)
        for found, share in ((flows, 0.0), (backgrounds, MUTATED)):
            found[name] = trained(name, torch.from_numpy(train), share, options)
    figures = {
        "corruption": corruption(flows["MNIST"], sets["MNIST"], sets["Fashion-MNIST"]),
        "sets": {
            f"{own} → {other}": against(flows[own], backgrounds[own], sets[own], sets[other])
            for own, other in (("MNIST", "Fashion-MNIST"), ("Fashion-MNIST", "MNIST"))
        },
        "false_positive_rate": FALSE_POSITIVES,
        "events": options.events,
        "steps": options.steps,
        "mutated": MUTATED,
    }
    path = ROOT / "docs/tutorials/outliers.json"
    path.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    bands(figures["corruption"]["log_density"]).savefig(
        ROOT / "docs/assets/mnist-corruption.webp", dpi=150
    )
    models = {"Glow": (flows["MNIST"], None)}
    if options.nice is not None:
        nice = pyroflows.load(options.nice)
        models = {"NICE": (nice, torch.distributions.constraints.unit_interval), **models}
    inpainting(models, sets["MNIST"]["new"]).savefig(
        ROOT / "docs/assets/mnist-inpainting.webp", dpi=120
    )
    print(f"{(time.perf_counter() - begin) / 60:.0f} minutes; written to {path} and docs/assets")


def arguments() -> argparse.Namespace:
    first, *_ = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(description=first)
    parser.add_argument("--data", required=True, help="the regular images, an .npz file")
    parser.add_argument("--other", required=True, help="the other data set, an .npz file")
    parser.add_argument("--nice", type=Path, help="a trained NICE, .safetensors")
    parser.add_argument("--steps", type=int, default=4000, help="of training, each flow (4000)")
    parser.add_argument("--events", type=int, default=400, help="of each kind to score (400)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("out/applications"))
    return parser.parse_args()


def split(train: torch.Tensor, test: torch.Tensor, events: int) -> dict[str, torch.Tensor]:
    """Return images to know what is regular by, to set a threshold by, and to judge it by."""
    held_out = test if len(test) >= 2 * events else torch.cat([train[-2 * events :], test])
    # By chance: the digits in the second half of MNIST's test set are harder than those before.
    order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))
    known, new = held_out[order[: 2 * events]].split(events)
    return {"reference": train[:events], "threshold": known, "new": new}


def trained(
    name: str, train: torch.Tensor, mutated: float, options: argparse.Namespace
) -> pyroflows.TransformModule:
    """Train a Glow on images, a share of whose pixels is drawn anew, or load it."""
    kind = "background" if mutated else "flow"
    path = options.output / f"{name}-{kind}.safetensors"
    if path.exists():
        return pyroflows.load(path)
    # What scores are taken of has not been trained on.
    train = train[: -2 * options.events] if len(train) < 10_000 else train
    train = pyroflows.corrupt(train, "pixels", mutated, seed=options.seed)
    own, held_out = (torch.from_numpy(x) for x in validation(train.numpy(), None))
    shape = tuple(train.shape[1:])
    result = pyroflows.fit(
        pyroflows.glow(shape, **GLOW),
        own,
        validation=held_out,
        augment=pyroflows.dequantize,
        standardize=True,
        steps=options.steps,
        seed=options.seed,
        progress=lambda loss: f"{name} {kind}: {pyroflows.bits_per_dim(-loss, shape):.2f} bits",
        **TRAINING,
    )
    pyroflows.save(result.flow, path)
    return result.flow


def scores(
    flow: pyroflows.TransformModule, x: torch.Tensor, kind: str, **options: Any
) -> np.ndarray:
    """Score images of whole numbers."""
    y = pyroflows.dequantize(x, torch.Generator().manual_seed(0))
    return pyroflows.outlier_scores(flow, y, kind=kind, **options).numpy()


def judged(known: np.ndarray, regular: np.ndarray, outliers: np.ndarray) -> dict[str, float]:
    """Return how well scores tell outliers from regular events."""
    limit = pyroflows.threshold(known, false_positive_rate=FALSE_POSITIVES)
    labels = np.repeat([0, 1], [len(regular), len(outliers)])
    together = np.concatenate([regular, outliers])
    precision, recall, *_ = precision_recall_fscore_support(
        labels, together > limit, average="binary", zero_division=0
    )
    return {
        "auroc": round(float(roc_auc_score(labels, together)), 4),
        "precision": round(float(precision), 4),
        "recall": round(float(recall), 4),
    }


def corruption(
    flow: pyroflows.TransformModule, own: dict[str, torch.Tensor], other: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Score digits that are corrupted by degrees."""
    into = other["new"]
    into = into.repeat(-(-len(own["new"]) // len(into)), 1, 1, 1)[: len(own["new"])]
    reference = pyroflows.dequantize(own["reference"], torch.Generator().manual_seed(1))
    found: dict[str, Any] = {kind: {} for kind in SCORES[:2]}
    for score, table in found.items():
        given = {"reference": reference} if score == "typicality" else {}
        known, regular = (scores(flow, own[part], score, **given) for part in ("threshold", "new"))
        for kind in KINDS:
            rows = table[kind] = []
            for strength in STRENGTHS:
                options = {"other": into} if kind == "morph" else {}
                x = pyroflows.corrupt(own["new"], kind, strength, **options)
                values = scores(flow, x, score, **given)
                quantiles = np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95)).round(1).tolist()
                judgement = judged(known, regular, values)
                rows.append({"strength": strength, "quantiles": quantiles, **judgement})
            print(score, kind, [row["auroc"] for row in rows], flush=True)
    return found


def against(
    flow: pyroflows.TransformModule,
    background: pyroflows.TransformModule,
    own: dict[str, torch.Tensor],
    other: dict[str, torch.Tensor],
) -> dict[str, Any]:
    """Score one data set's images and another's under the flow of the first, in four ways."""
    reference = pyroflows.dequantize(own["reference"], torch.Generator().manual_seed(1))
    needed = {"typicality": {"reference": reference}, "ratio": {"background": background}}
    found = {}
    for kind in SCORES:
        known, regular, outliers = (
            scores(flow, x, kind, **needed.get(kind, {}))
            for x in (own["threshold"], own["new"], other["new"])
        )
        found[kind] = judged(known, regular, outliers)
        print(kind, found[kind], flush=True)
    return found


def bands(table: dict[str, Any]) -> Figure:
    """Draw the log-density of digits against the strength of each corruption."""
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots(2, 4, sharex=True, sharey=True)
    lowest = min(-row["quantiles"][2] for rows in table.values() for row in rows)
    for panel, (kind, rows) in zip(axes.flat, table.items(), strict=False):
        strengths = [row["strength"] for row in rows]
        bands = -np.array([row["quantiles"] for row in rows]).T
        for low, high, alpha in ((0, 4, 0.2), (1, 3, 0.35)):
            panel.fill_between(strengths, bands[low], bands[high], color="#1f5a94", alpha=alpha)
        panel.plot(strengths, bands[2], color="#1f5a94")
        panel.axhline(bands[4, 0], color="#d84315", lw=1, ls="--")
        panel.set_title(kind, fontsize=11)
        panel.set_yscale("symlog", linthresh=4000)
        panel.set_yticks((-4000, 0, 4000), ("−4000", "0", "4000"))
        panel.minorticks_off()
        panel.set_xticks((0, 0.5, 1), ("0", "0.5", "1"))
        panel.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylim(min(2 * lowest, -5000), 6000)
    axes[1, 3].axis("off")
    figure.supxlabel("strength of the corruption", fontsize=11)
    figure.supylabel("log-density of the pixels, nats", fontsize=11)
    return figure


def masks(side: int) -> dict[str, torch.Tensor]:
    """What is known of an image, of which the rest is to be filled in."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    drawn = torch.rand(side, side, generator=torch.Generator().manual_seed(0)) < 0.3
    return {
        "upper half": rows < side // 2,
        "left half": columns < side // 2,
        "three quarters": (rows < side // 2) | (columns < side // 2),
        "stripes": rows % 4 < 2,
        "30 % of the pixels": drawn,
    }


def inpainting(models: dict[str, Any], digits: torch.Tensor) -> Figure:
    """Fill in digits: truth, what is given, the mode, and draws, a column for each mask."""
    known = torch.stack(list(masks(digits.shape[-1]).values()))[:, None]
    x = pyroflows.dequantize(digits[: len(known)], torch.Generator().manual_seed(0))
    rows, labels = [x, torch.where(known, x, torch.nan)], ["truth", "given"]
    for name, (flow, support) in models.items():
        begin = time.perf_counter()
        # NICE has the same mode in both spaces.
        space = "latent" if support is None else "data"
        mode = pyroflows.inpaint(flow, x, known, support=support, space=space, restarts=8)
        rows.append(mode)
        draws = pyroflows.inpaint_draws(
            flow, x, known, support=support, num_samples=8, num_warmup=100, chains=2,
            max_tree_depth=5,
        )  # fmt: skip
        rows += [draws[3].clamp(0, 1), draws[7].clamp(0, 1)]
        labels += [f"{name}: mode", "draw", "draw"]
        print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)
    figure = pyroflows.plot_images(rows, labels)
    for panel, title in zip(figure.axes, masks(digits.shape[-1]), strict=False):
        panel.set_title(title.replace(" of ", "\nof "), fontsize=8)
    return figure


if __name__ == "__main__":
    main()
