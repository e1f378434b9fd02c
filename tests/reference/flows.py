"""The builders by the papers: which layers, in which order, with which names in the state."""

import numpy as np

from tests.reference import image_flows, images
from tests.reference import layers as by_equation
from tests.reference.layers import Composed, Coupling

BUDGET = 4.0  # log-scales of all couplings together in a robust flow


def build(name, state, size, prefix="", *, layers=(), **options):
    """Return the reference of a layer or builder by its public name.

    Args:
        name: public name, such as `"AffineCoupling"` or `"glow"`.
        state: named arrays.
        size: D, or `(C, H, W)`.
        prefix: what the names in the state begin with.
        layers: for `Chain` and `Stack`: `(name, options)` of each; for `MultiScale`:
            `(name, shape, base shape, options)`; for a builder: their number.
        options: the keyword arguments that the layer or builder was given.
    """
    if name in ("Chain", "Stack"):
        return Composed(
            build(inner, state, size, f"{prefix}layers.{i}.", **given)
            for i, (inner, given) in enumerate(layers)
        )
    if name == "MultiScale":
        return images.MultiScale(
            [
                (build(inner, state, shape, f"{prefix}levels.{i}.", **given), base)
                for i, (inner, shape, base, given) in enumerate(layers)
            ]
        )
    if name == "nice" or (name in BUILDERS and isinstance(size, int)):
        given = {"layers": layers} if layers else {}
        return BUILDERS[name](state, size, prefix, **given, **options)
    if isinstance(size, int):
        return LAYERS[name](state, prefix, size, **options)
    if name in image_flows.BUILDERS:
        return image_flows.BUILDERS[name](state, size, prefix, **options)
    return image_flows.LAYERS[name](state, prefix, size, **options)


def mask(partition, size):
    """Return the binary mask of a partition: ones where the coordinate is left as it is."""
    if not isinstance(partition, str):
        return np.asarray(partition, dtype=bool)
    if partition == "halves":
        return np.arange(size) < size // 2
    return (np.arange(size) % 2 == 0) & (size > 1)  # one number is transformed


def coupling(outputs, **defaults):
    def made(state, prefix, size, **options):
        options = {"partition": "halves", **defaults, **options}
        for unused in ("hidden", "init_scale", "context_dim"):
            options.pop(unused, None)
        b = mask(options.pop("partition"), size)
        return Coupling(state, prefix, b, outputs=outputs, **options)

    return made


LAYERS = {
    "AdditiveCoupling": coupling(1),
    "AffineCoupling": coupling(2),
    "DiagonalScaling": lambda state, prefix, size: by_equation.diagonal_scaling(state, prefix),
    "ActNorm": lambda state, prefix, size: by_equation.act_norm(state, prefix),
    "Standardization": lambda state, prefix, size: by_equation.act_norm(state, prefix),
    "BatchNorm": lambda state, prefix, size, momentum=0.1, eps=1e-5: by_equation.batch_norm(
        state, prefix, eps
    ),
    "Permutation": lambda state, prefix, size: by_equation.permutation(state, prefix),
    "Logit": lambda state, prefix, size, alpha=0.05: images.Logit(alpha, 1),
    "BijectTo": lambda state, prefix, size, support: by_equation.intervals(support, 1),
    "InvertibleLinear": lambda state, prefix, size, gain=1.0: by_equation.invertible_linear(
        state, prefix, gain
    ),
    "LowerTriangular": lambda state, prefix, size, gain=1.0: by_equation.lower_triangular(
        state, prefix, gain
    ),
    "Preconditioner": lambda state, prefix, size, rank=None: by_equation.preconditioner(
        state, prefix
    ),
    "SinhArcsinh": lambda state, prefix, size, tails=True: by_equation.sinh_arcsinh(
        state, prefix, 1
    ),
    "LogTails": lambda state, prefix, size, threshold=100.0: by_equation.log_tails(threshold, 1),
}


def alternating(state, size, prefix, start, layers, b, make, batch_norm=False):
    """Yield couplings, every second with its mask swapped; a `BatchNorm` after each, if wanted.

    From entry `start` of the flow's layers on: a stack of pairs, and an odd last one by itself.
    A mask that leaves nothing as it is has no swap.
    """
    pairs, swap = layers // 2, ~b if b.any() else b
    for i in range(layers):
        if i < 2 * pairs:
            place, index = f"{prefix}layers.{start}.layers.{i // 2}.", (i % 2) * (1 + batch_norm)
        else:
            place, index = prefix, start + (pairs > 0)
        yield make(state, f"{place}layers.{index}.", size, partition=swap if i % 2 else b)
        if batch_norm:
            yield by_equation.batch_norm(state, f"{place}layers.{index + 1}.")


def nice(
    state, size, prefix="", layers=4, partition="alternating", robust=True, network=None,
    activation="relu", logit=None, **unused,
):  # fmt: skip
    """NICE, sections 3.2, 3.3 and 5.1: couplings that alternate, and the scaling at the base."""
    shape, size = size, int(np.prod(size))
    make = coupling(1, squash=robust, activation=activation, network=network)
    scaling = by_equation.diagonal_scaling(state, f"{prefix}layers.0.")
    couplings = alternating(state, size, prefix, 1, layers, mask(partition, size), make)
    if isinstance(shape, int):
        return Composed([scaling, *couplings, *last(state, prefix, logit)])
    end = image_flows.data_end(state, prefix, last_index(state, prefix), shape, logit)
    return Composed([scaling, *couplings, images.Flatten(shape), *end])


def realnvp(
    state, size, prefix="", layers=8, partition="halves", robust=True, scale="tanh", network=None,
    activation="relu", batch_norm=False, logit=None, **unused,
):  # fmt: skip
    """RealNVP, sections 3.4 and 3.5: masked affine couplings, every second mask swapped."""
    make = coupling(
        2, squash=robust, scale=scale, limit=BUDGET / layers if robust else None,
        activation=activation, network=network,
    )  # fmt: skip
    b = mask(partition, size)
    couplings = alternating(state, size, prefix, 0, layers, b, make, batch_norm)
    return Composed([*couplings, *last(state, prefix, logit)])


def glow(
    state, size, prefix="", layers=8, partition="halves", robust=True, scale="sigmoid",
    network=None, activation="relu", logit=None, **unused,
):  # fmt: skip
    """Glow, figure 2a: from data to base a step is actnorm, invertible matrix, coupling."""
    make = coupling(
        2, squash=robust, scale=scale, limit=BUDGET / layers if robust else None,
        activation=activation, network=network,
    )  # fmt: skip
    found = []
    for i in range(layers):
        step = f"{prefix}layers.0.layers.{i}.layers."
        found += [
            make(state, f"{step}0.", size, partition=partition),
            by_equation.invertible_linear(state, f"{step}1.", min(1, 16 / layers) if robust else 1),
            by_equation.act_norm(state, f"{step}2."),
        ]
    return Composed([*found, *last(state, prefix, logit)])


def last(state, prefix, logit):
    """The standardisation at the data's end, whatever the number of layers before it."""
    standardization = by_equation.act_norm(state, f"{prefix}layers.{last_index(state, prefix)}.")
    return [standardization] + ([] if logit is None else [images.Logit(logit, 1)])


def last_index(state, prefix):
    inner = {key[len(prefix) + len("layers.") :] for key in state if key.startswith(prefix)}
    return max(int(key.split(".")[0]) for key in inner)


BUILDERS = {"nice": nice, "realnvp": realnvp, "glow": glow}
