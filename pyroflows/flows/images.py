"""RealNVP and Glow on images: the levels of multi-scale flows."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from pyroflows.layers.chain import Chain, Stack
from pyroflows.layers.coupling import Coupling
from pyroflows.layers.elementwise import ActNorm, BatchNorm
from pyroflows.layers.linear import InvertibleConv1x1
from pyroflows.layers.multiscale import MultiScale, Squeeze
from pyroflows.transform import TransformModule
from pyroflows_common.levels import CHANNELS, CHECKERBOARDS, LAST_CHECKERBOARDS
from pyroflows_common.partition import Partition, channels, checkerboard

# Makes a coupling from an event shape, a partition and the width of its network.
CouplingOfWidth = Callable[[tuple[int, ...], Partition, int], TransformModule]


def coupling_of(
    kind: type[Coupling],
    network: Callable[[int, int], nn.Module] | None,
    shape: int | tuple[int, ...],
    partition: Partition,
    *,
    context_dim: int,
    **options: Any,
) -> TransformModule:
    """Return a coupling with its own network, made by a function if one is given.

    It has its own copy of a scale module, too.
    """
    if network is not None:
        size_a, size_b = partition.sizes
        options["network"] = network(size_a + context_dim, kind.outputs * size_b)
    if "scale" in options:
        options["scale"] = copy.deepcopy(options["scale"])
    return kind(shape, partition=partition, context_dim=context_dim, **options)


def realnvp_levels(
    shape: tuple[int, ...],
    coupling: CouplingOfWidth,
    end: list[TransformModule],
    *,
    scales: int,
    width: int,
    batch_norm: bool,
) -> MultiScale:
    """Return RealNVP's scales; the width of the networks doubles from scale to scale."""

    def couplings(
        partition: Partition, shape: tuple[int, ...], width: int, count: int
    ) -> Iterator[TransformModule]:
        for i in range(count):
            yield coupling(shape, partition.swap if i % 2 else partition, width)
            if batch_norm:
                yield BatchNorm(shape)

    levels: list[TransformModule] = []
    for scale in range(scales):
        c, h, w = shape
        if scale == scales - 1:
            layers = [*couplings(checkerboard(shape), shape, width, LAST_CHECKERBOARDS)]
        else:
            inner = (4 * c, h // 2, w // 2)
            layers = [
                *couplings(channels(inner), inner, 2 * width, CHANNELS),
                Squeeze(shape),
                *couplings(checkerboard(shape), shape, width, CHECKERBOARDS),
            ]
            shape, width = (2 * c, h // 2, w // 2), 2 * width
        levels.insert(0, Chain([*layers, *(end if scale == 0 else [])]))
    return MultiScale(levels)


def glow_levels(
    shape: tuple[int, ...],
    coupling: CouplingOfWidth,
    end: list[TransformModule],
    *,
    levels: int,
    steps: int,
    width: int,
    gain: Callable[[int], float],
    prior: Callable[[tuple[int, ...]], TransformModule] | None,
) -> MultiScale:
    """Return Glow's levels; `prior`, if any, makes the layer of the factored-out variables.

    `gain` gives the gain of the matrices on a number of channels.
    """

    def step(shape: tuple[int, ...]) -> Chain:
        layer = coupling(shape, channels(shape), width)
        return Chain([layer, InvertibleConv1x1(shape, gain=gain(shape[0])), ActNorm(shape)])

    built: list[TransformModule] = []
    for level in range(levels):
        c, h, w = shape
        inner = (4 * c, h // 2, w // 2)
        priors: list[TransformModule] = []
        if prior is not None:
            priors = [ActNorm(inner) if level == levels - 1 else prior(inner)]
        layers = [*priors, Stack([step(inner) for _ in range(steps)]), Squeeze(shape)]
        built.insert(0, Chain([*layers, *(end if level == 0 else [])]))
        shape = (2 * c, h // 2, w // 2)
    return MultiScale(built)
