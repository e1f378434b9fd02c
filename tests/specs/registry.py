"""Every layer and builder that the laws are run on: a new one costs one line."""

from dataclasses import dataclass, field

import numpy as np

from tests.reference import build
from tests.wings.base import own_network, own_scale


@dataclass(frozen=True, eq=False)
class Case:
    """A layer or a flow by its public name, the size of its event and its arguments."""

    name: str
    size: int
    options: dict = field(default_factory=dict)
    layers: tuple = ()

    def __str__(self):
        options = [f"{k}={v}" for k, v in self.options.items() if k != "hidden"]
        return "-".join([self.name, str(self.size), *options, *(n for n, _ in self.layers)])

    @property
    def context_dim(self):
        inner = [options.get("context_dim", 0) for _, options in self.layers]
        return max([self.options.get("context_dim", 0), *inner])

    @property
    def conditioners(self):
        """Number of couplings."""
        if self.name in ("nice", "realnvp", "glow"):
            return self.options.get("layers", 4 if self.name == "nice" else 8)
        return sum("Coupling" in name for name in [self.name, *(n for n, _ in self.layers)])

    def points(self, *batch, seed=0, scale=1.5, dtype="float64"):
        """Events to try the flow on."""
        rng = np.random.default_rng(seed)
        return (scale * rng.standard_normal((*batch, self.size))).astype(dtype)

    def context(self, *batch, seed=1, dtype="float64"):
        """Contexts to try it on; None where it takes none."""
        rng = np.random.default_rng(seed)
        if self.context_dim:
            return rng.standard_normal((*batch, self.context_dim)).astype(dtype)
        return None

    def reference(self, state):
        """The flow by the papers' equations, with these arrays."""
        options = dict(self.options)
        if options.get("scale") == "own":
            options["scale"] = own_scale
        if options.get("network") == "own":
            size_a = self.size // 2
            outputs = 1 if self.name in ("AdditiveCoupling", "nice") else 2
            options["network"] = own_network(size_a, outputs * (self.size - size_a))
        state = {k: v.astype("float64") if v.dtype.kind == "f" else v for k, v in state.items()}
        layers = self.layers or options.pop("layers", ())
        return build(self.name, state, self.size, layers=layers, **options)


def case(name, size, *layers, **options):
    if "Coupling" in name or name in ("nice", "realnvp", "glow"):
        options.setdefault("hidden", (8, 8))
    return Case(name, size, options, layers)


MASK = (True, False, False, True, True)
COUPLING = {"hidden": (8,)}

LAYERS = [
    case("AdditiveCoupling", 5),
    case("AdditiveCoupling", 4, partition="alternating", squash=False, activation="elu"),
    case("AdditiveCoupling", 3, context_dim=2, hidden=()),
    case("AffineCoupling", 5),
    case("AffineCoupling", 5, partition="alternating", activation="silu"),
    case("AffineCoupling", 5, partition=MASK, activation="gelu"),
    case("AffineCoupling", 4, limit=None, activation="tanh", squash=False),
    case("AffineCoupling", 4, scale="sigmoid"),
    case("AffineCoupling", 4, scale="sigmoid", limit=None),
    case("AffineCoupling", 4, scale="clamp"),
    case("AffineCoupling", 4, scale="clamp", limit=0.05),
    case("AffineCoupling", 4, scale="exp"),
    case("AffineCoupling", 4, scale="own", network="own"),
    case("AffineCoupling", 3, context_dim=2),
    case("DiagonalScaling", 3),
    case("ActNorm", 3),
    case("BatchNorm", 3, eps=0.1),
    case("Standardization", 3),
    case("Permutation", 4),
    case("InvertibleLinear", 1),
    case("InvertibleLinear", 5),
    case(
        "Chain",
        4,
        ("ActNorm", {}),
        ("AffineCoupling", {**COUPLING, "scale": "sigmoid"}),
        ("AdditiveCoupling", COUPLING),
        ("Permutation", {}),
        ("AffineCoupling", {**COUPLING, "partition": "alternating", "context_dim": 2}),
        ("InvertibleLinear", {}),
        ("BatchNorm", {}),
    ),
    case("Stack", 3, ("AffineCoupling", COUPLING), ("AffineCoupling", COUPLING)),
]

FLOWS = [
    case("nice", 5),
    case("nice", 4, layers=3, partition="halves", robust=False, activation="tanh"),
    case("nice", 2, layers=1),
    case("nice", 3, layers=2, context_dim=2),
    case("realnvp", 5, layers=4),
    case("realnvp", 4, layers=3, scale="exp", robust=False, partition="alternating"),
    case("realnvp", 3, layers=5, batch_norm=True),
    case("realnvp", 2, layers=2, scale="clamp", network="own"),
    case("realnvp", 3, layers=3, context_dim=2),
    case("glow", 5, layers=3),
    case("glow", 4, layers=1, scale="tanh", partition=(False, True, True, False)),
    case("glow", 3, layers=2, robust=False),
    case("glow", 3, layers=2, context_dim=2, activation="silu"),
]

CASES = LAYERS + FLOWS
