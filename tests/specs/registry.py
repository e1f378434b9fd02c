"""Every layer and builder that the laws are run on: a new one costs one line."""

import math
from dataclasses import dataclass, field

import numpy as np
from scipy import special

from tests.reference import build
from tests.wings.base import of_pixels, own_network, own_scale


@dataclass(frozen=True, eq=False)
class Case:
    """A layer or a flow by its public name, the size of its event and its arguments.

    The size is D of a vector or `(C, H, W)` of an image.
    """

    name: str
    size: int | tuple
    options: dict = field(default_factory=dict)
    layers: tuple = ()

    def __str__(self):
        options = [f"{k}={v}" for k, v in self.options.items() if k != "hidden"]
        size = str(self.size).replace(" ", "")
        return "-".join([self.name, size, *options, *(inner[0] for inner in self.layers)])

    @property
    def shape(self):
        """Shape of the data's events."""
        return (self.size,) if isinstance(self.size, int) else self.size

    @property
    def base_shape(self):
        """Shape of the base's events."""
        if self.name == "Squeeze":
            c, h, w = self.shape
            return (4 * c, h // 2, w // 2)
        flat = len(self.shape) == 3 and self.name in ("Flatten", "MultiScale", *BUILDERS)
        return (math.prod(self.shape),) if flat else self.shape

    @property
    def pixels(self):
        """Whether the data are pixels in the unit interval."""
        bounded = self.name in ("Logit", "BijectTo")
        return bounded or self.options.get("logit") is not None

    @property
    def context_dim(self):
        inner = [entry[-1].get("context_dim", 0) for entry in self.layers]
        return max([self.options.get("context_dim", 0), *inner])

    @property
    def conditioners(self):
        """Number of couplings."""
        get = self.options.get
        if self.name == "nice" or (self.name in BUILDERS and isinstance(self.size, int)):
            return get("layers", 4 if self.name == "nice" else 8)
        if self.name == "realnvp":
            return 6 * (get("scales") - 1) + 4
        if self.name == "glow":
            priors = get("levels") - 1 if get("learned_prior", True) else 0
            return get("levels") * get("steps") + priors
        return sum("Coupling" in name for name in [self.name, *(n[0] for n in self.layers)])

    def points(self, *batch, seed=0, scale=1.5, dtype="float64"):
        """Data to try the flow on."""
        rng = np.random.default_rng(seed)
        x = scale * rng.standard_normal((*batch, *self.shape))
        return (special.expit(x) if self.pixels else x).astype(dtype)

    def latents(self, *batch, seed=0, scale=1.5, dtype="float64"):
        """Base samples to try the flow on."""
        rng = np.random.default_rng(seed)
        return (scale * rng.standard_normal((*batch, *self.base_shape))).astype(dtype)

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
            size = self.shape[0]
            outputs = 1 if self.name in ("AdditiveCoupling", "nice") else 2
            network = own_network(size // 2, outputs * (size - size // 2))
            options["network"] = network if len(self.shape) == 1 else of_pixels(network)
        state = {k: v.astype("float64") if v.dtype.kind == "f" else v for k, v in state.items()}
        layers = self.layers or options.pop("layers", ())
        return build(self.name, state, self.size, layers=layers, **options)


BUILDERS = ("nice", "realnvp", "glow")


def case(name, size, *layers, **options):
    if "Coupling" in name or name == "nice" or (name in BUILDERS and isinstance(size, int)):
        options.setdefault("hidden", (8,))
    return Case(name, size, options, layers)


MASK = (True, False, False, True, True)
COUPLING = {"hidden": (8,)}

LAYERS = [
    case("AdditiveCoupling", 5, hidden=(8, 8)),
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
    case("AffineCoupling", 1, context_dim=2, partition="alternating"),
    case("AffineCoupling", 3, context_dim=2, partition=(False, False, False)),
    case("AffineCoupling", 3, context_dim=2),
    case("DiagonalScaling", 3),
    case("ActNorm", 3),
    case("BatchNorm", 3, eps=0.1),
    case("Standardization", 3),
    case("Permutation", 4),
    case("InvertibleLinear", 1),
    case("InvertibleLinear", 5),
    case("InvertibleLinear", 4, gain=0.25),
    case("LowerTriangular", 4),
    case("LowerTriangular", 3, gain=0.25),
    case("BijectTo", 4, support=((0.0, None), (None, 1.0), (-0.1, 1.1), (None, None))),
    case("Preconditioner", 4),
    case("Preconditioner", 5, rank=2),
    case("SinhArcsinh", 3),
    case("SinhArcsinh", 2, tails=False),
    case("LogTails", 3, threshold=0.5),
    case(
        "Chain",
        4,
        ("ActNorm", {}),
        ("AffineCoupling", {**COUPLING, "scale": "sigmoid"}),
        ("AdditiveCoupling", COUPLING),
        ("Permutation", {}),
        ("AffineCoupling", {**COUPLING, "partition": "alternating", "context_dim": 2}),
        ("BatchNorm", {}),
    ),
    case("Stack", 3, ("AffineCoupling", COUPLING), ("AffineCoupling", COUPLING)),
]

FLOWS = [
    case("nice", 5, hidden=(8, 8)),
    case("nice", 4, layers=3, partition="halves", robust=False, activation="tanh"),
    case("nice", 2, layers=1),
    case("nice", 1, layers=3, context_dim=2),
    case("nice", 3, layers=2, context_dim=2),
    case("realnvp", 5, layers=4),
    case("realnvp", 4, layers=3, scale="exp", robust=False, partition="alternating"),
    case("realnvp", 3, layers=3, batch_norm=True),
    case("realnvp", 2, layers=2, scale="clamp", network="own"),
    case("realnvp", 1, layers=3, context_dim=2, logit=0.05),
    case("realnvp", 3, layers=2, context_dim=2),
    case("realnvp", 3, layers=2, logit=0.05),
    case("glow", 5, layers=3),
    case("glow", 4, layers=1, scale="tanh", partition=(False, True, True, False)),
    case("glow", 3, layers=2, robust=False),
    case("glow", 2, layers=20, hidden=(3,)),
    case("glow", 1, layers=3, context_dim=2),
    case("glow", 3, layers=2, context_dim=2, activation="silu"),
]

IMAGE_LAYERS = [
    case("AdditiveCoupling", (2, 3, 2), partition="channels", hidden=(4,), activation="elu"),
    case("AffineCoupling", (2, 3, 2), partition="checkerboard", hidden=(4, 3)),
    case("AffineCoupling", (1, 2, 2), partition="checkerboard", hidden=(), context_dim=2),
    case("AffineCoupling", (2, 1, 2), context_dim=2, partition=(False, False), hidden=()),
    case("AffineCoupling", (3, 2, 2), scale="sigmoid", context_dim=2, hidden=(4,)),
    case("AffineCoupling", (4, 2, 1), partition=(True, False, True, False), hidden=()),
    case("AffineCoupling", (3, 2, 2), scale="clamp", network="own"),
    case("ActNorm", (2, 3, 2)),
    case("BatchNorm", (2, 2, 2), eps=0.1),
    case("DiagonalScaling", (2, 2, 2)),
    case("Standardization", (2, 2, 2)),
    case("InvertibleConv1x1", (3, 2, 2)),
    case("SinhArcsinh", (2, 2, 1)),
    case("LogTails", (2, 2, 1), threshold=0.5),
    case("Squeeze", (2, 4, 2)),
    case("Flatten", (2, 3, 2)),
    case("Logit", 3),
    case("Logit", (1, 2, 2), alpha=0.01),
    case("BijectTo", (1, 2, 2), support=((-0.1, 1.1),)),
    case(
        "MultiScale",
        (1, 4, 4),
        ("ActNorm", (2, 2, 2), (2, 2, 2), {}),
        ("Squeeze", (1, 4, 4), (4, 2, 2), {}),
    ),
]
IMAGE_FLOWS = [
    case("nice", (1, 2, 3), layers=2, logit=0.05),
    case("realnvp", (2, 4, 2), scales=2, channels=2, blocks=1, norm="instance", scale="sigmoid"),
    case("realnvp", (1, 2, 4), scales=1, channels=3, blocks=0, norm="batch", context_dim=1),
    case("realnvp", (1, 3, 2), scales=1, channels=3, blocks=0, norm=None, batch_norm=True),
    case("glow", (1, 4, 4), levels=2, steps=2, channels=4),
    case("glow", (1, 2, 4), levels=1, steps=1, channels=3, coupling="additive", logit=0.1),
    case("glow", (2, 2, 2), levels=1, steps=2, channels=3, context_dim=2, robust=False),
    case("glow", (1, 4, 4), levels=2, steps=1, channels=3, learned_prior=False, scale="tanh"),
]
LAYERS += IMAGE_LAYERS
FLOWS += IMAGE_FLOWS
CASES = LAYERS + FLOWS


def shortest(kind):
    """The shortest case of each kind."""
    longest_first = sorted(CASES, key=lambda case: -case.conditioners)
    return list({kind(case): case for case in longest_first}.values())


# Each layer and builder, on vectors and on images. KINDS, with and without context: for laws that
# do not depend on scales, activations and partitions. NAMES: nor on the context.
KINDS = shortest(lambda case: (case.name, len(case.shape), case.context_dim > 0))
NAMES = shortest(lambda case: (case.name, len(case.shape)))
