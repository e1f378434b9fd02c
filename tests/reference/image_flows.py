"""The builders on images by the papers: which layers, in which order, under which names."""

import numpy as np

from tests.reference import images
from tests.reference.layers import Composed, intervals, invertible_linear, log_tails, sinh_arcsinh

BUDGET = 16.0  # log-scales of all couplings together in a robust flow


def coupling(outputs, net=images.conv_net):
    def made(
        state, prefix, shape, partition="channels", activation="relu", network=None, **options
    ):
        for unused in ("hidden", "init_scale", "context_dim"):
            options.pop(unused, None)
        by_channel = not (isinstance(partition, str) and partition.startswith("checkerboard"))
        if not by_channel:
            b = images.checkerboard(shape)
            b = ~b if partition.endswith("swapped") else b
        else:
            b = images.channels(shape, None if isinstance(partition, str) else partition)
        network = network or net(state, prefix, activation)
        return images.ImageCoupling(
            state, prefix, b, network, by_channel, outputs=outputs, **options
        )

    return made


def act_norm(state, prefix, shape):
    return images.Pointwise(state[f"{prefix}log_scale"], state[f"{prefix}loc"], shape)


def batch_norm(state, prefix, shape, momentum=0.1, eps=1e-5):
    log_scale = 0.5 * np.log(state[f"{prefix}running_var"] + eps)
    return images.Pointwise(log_scale, state[f"{prefix}running_mean"], shape)


def conv1x1(state, prefix, gain=1.0):
    return images.Conv1x1(invertible_linear(state, prefix, gain).matrix)


LAYERS = {
    "AdditiveCoupling": coupling(1),
    "AffineCoupling": coupling(2),
    "ActNorm": act_norm,
    "Standardization": act_norm,
    "BatchNorm": batch_norm,
    "DiagonalScaling": lambda state, prefix, shape: images.Pointwise(
        state[f"{prefix}log_scale"], 0.0, shape
    ),
    "InvertibleConv1x1": lambda state, prefix, shape, gain=1.0: conv1x1(state, prefix, gain),
    "Squeeze": lambda state, prefix, shape: images.Squeeze(shape),
    "Flatten": lambda state, prefix, shape: images.Flatten(shape),
    "Logit": lambda state, prefix, shape, alpha=0.05: images.Logit(alpha, len(shape)),
    "BijectTo": lambda state, prefix, shape, support: intervals(support, len(shape)),
    "SinhArcsinh": lambda state, prefix, shape: sinh_arcsinh(state, prefix, len(shape)),
    "LogTails": lambda state, prefix, shape, threshold=100.0: log_tails(threshold, len(shape)),
}


def data_end(state, prefix, start, shape, logit):
    layers = [act_norm(state, f"{prefix}layers.{start}.", shape)]
    return layers + ([] if logit is None else [images.Logit(logit, 3)])


def realnvp(
    state, shape, prefix="", scales=2, blocks=2, channels=32, norm=None, batch_norm=False,
    robust=True, scale="tanh", activation="relu", logit=None, **unused,
):  # fmt: skip
    """RealNVP, section 3.6: 3 checkerboards, squeeze, 3 of channels; the last 4 checkerboards."""
    couplings = 6 * (scales - 1) + 4
    make = coupling(2, lambda s, p, a: images.res_net(s, p, a, norm))
    options = {
        "squash": robust, "scale": scale, "activation": activation,
        "limit": BUDGET / couplings if robust else None,
    }  # fmt: skip
    levels, finest = [], shape
    for level in range(scales):
        place, index, found = f"{prefix}levels.{scales - 1 - level}.", 0, []

        def run(shape, names, place=place, found=found):
            nonlocal index
            for name in names:
                found.append(
                    make(state, f"{place}layers.{index}.", shape, partition=name, **options)
                )
                index += 1
                if batch_norm:
                    at = f"{place}layers.{index}."
                    found.append(LAYERS["BatchNorm"](state, at, shape))
                    index += 1

        c, h, w = shape
        boards = ["checkerboard", "checkerboard swapped"] * 2
        if level == scales - 1:
            run(shape, boards)
            base = shape
        else:
            base = (4 * c, h // 2, w // 2)
            half = np.arange(4 * c) < 2 * c
            run(base, [half, ~half, half])
            found.append(images.Squeeze(shape))
            index += 1
            run(shape, boards[:3])
        if level == 0:
            found += data_end(state, place, index, finest, logit)
        levels.insert(0, (Composed(found), base))
        shape = (2 * c, h // 2, w // 2)
    return images.MultiScale(levels)


def glow(
    state, shape, prefix="", levels=2, steps=8, channels=64, coupling="affine", learned_prior=True,
    robust=True, scale="sigmoid", activation="relu", logit=None, **unused,
):  # fmt: skip
    """Glow, figure 2b: squeeze, K steps, split; from data to base a step ends in its coupling."""
    affine = coupling == "affine"
    make = LAYERS["AffineCoupling" if affine else "AdditiveCoupling"]
    options = {"squash": robust, "activation": activation}
    if affine:
        limit = BUDGET / (levels * steps) if robust else None
        options |= {"scale": scale, "limit": limit}
    built, finest = [], shape
    for level in range(levels):
        c, h, w = shape
        base, coarsest = (4 * c, h // 2, w // 2), level == levels - 1
        place, found = f"{prefix}levels.{levels - 1 - level}.", []
        if learned_prior:
            prior = act_norm if coarsest else LAYERS["AffineCoupling"]
            given = {} if coarsest else {"squash": robust}
            found.append(prior(state, f"{place}layers.0.", base, **given))
        stack = len(found)
        for k in range(steps):
            step = f"{place}layers.{stack}.layers.{k}.layers."
            found += [
                make(state, f"{step}0.", base, **options),
                conv1x1(state, f"{step}1.", min(1, 16 / (levels * steps)) if robust else 1),
                act_norm(state, f"{step}2.", base),
            ]
        found.append(images.Squeeze(shape))
        if level == 0:
            found += data_end(state, place, stack + 2, finest, logit)
        built.insert(0, (Composed(found), base))
        shape = (2 * c, h // 2, w // 2)
    return images.MultiScale(built)


BUILDERS = {"realnvp": realnvp, "glow": glow}
