"""Builders: NICE, RealNVP and Glow for vectors and for images, from one call."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from pyroflows.chain import Chain, Stack
from pyroflows.checks import as_count, as_event_shape
from pyroflows.coupling import AdditiveCoupling, AffineCoupling
from pyroflows.image import Flatten
from pyroflows.linear import InvertibleLinear, shared_gain
from pyroflows.multiscale import glow_levels, realnvp_levels
from pyroflows.normalization import ActNorm, BatchNorm, DiagonalScaling, Standardization
from pyroflows.partition import Partition, as_partition
from pyroflows.pixels import Logit
from pyroflows.recipe import builder
from pyroflows.transform import TransformModule

# Log-scales of all couplings together, along one path through the flow: see `robust`.
LOG_SCALE_BUDGET = 4.0
# Of images, which have no far-out values, but pixels that hardly vary.
IMAGE_BUDGET = 16.0


@builder()
def nice(
    event_shape: int | Sequence[int],
    *,
    layers: int = 4,
    hidden: Sequence[int] = (64, 64),
    activation: str = "relu",
    partition: str | Sequence[bool] | Partition = "alternating",
    network: Callable[[int, int], nn.Module] | None = None,
    logit: float | None = None,
    context_dim: int = 0,
    robust: bool = True,
    init_scale: float = 0.0,
) -> TransformModule:
    """Build NICE: additive couplings that alternate, and a diagonal scaling next to the base.

    Args:
        event_shape: D or `(D,)`, at least 2; or `(C, H, W)`, images that are seen as vectors.
        layers: number of couplings; the paper has four.
        hidden: widths of each conditioner's hidden layers.
        activation: activation of the conditioners.
        partition: `"alternating"` (the paper's), `"halves"`, a boolean mask or a `Partition`; every
            second coupling swaps its parts.
        network: makes a conditioner of one's own, given its numbers of inputs and outputs.
        logit: α of a `Logit` at the data's end, for pixels in the unit interval; None for none.
        context_dim: size of the context of a conditional flow.
        robust: whether conditioners see asinh of their input; False for the paper's exact form.
        init_scale: standard deviation of each conditioner's last layer at the start.

    Returns:
        The flow: at the start the identity, up to `init_scale`.

    Raises:
        ValueError: where an argument is out of its range; the message names it.

    References:
        Dinh, Krueger and Bengio, "NICE" (arXiv:1410.8516), sections 3.2 to 3.4 and 5.1.

    Examples:
        >>> import torch
        >>> from pyroflows import flow_distribution, nice
        >>> density = flow_distribution(nice(4), "logistic")
        >>> density.log_prob(density.sample((3,))).shape
        torch.Size([3])
    """
    shape = as_event_shape(event_shape)
    size = math.prod(shape)
    partition = as_partition(partition, size)

    def coupling(index: int) -> list[TransformModule]:
        part = partition.swap if index % 2 else partition
        return [
            AdditiveCoupling(
                size,
                partition=part,
                network=_make(network, part, 1, context_dim),
                hidden=hidden,
                activation=activation,
                init_scale=init_scale,
                squash=robust,
                context_dim=context_dim,
            )
        ]

    image = [Flatten(shape)] if len(shape) == 3 else []
    layers_ = [DiagonalScaling(size), *_in_pairs(coupling, layers), *image]
    return Chain([*layers_, *_data_end(shape, logit)])


@builder(
    vectors=("layers", "hidden", "partition"),
    images=("scales", "blocks", "channels", "norm"),
)
def realnvp(
    event_shape: int | Sequence[int],
    *,
    layers: int = 8,
    hidden: Sequence[int] = (64, 64),
    activation: str = "relu",
    scale: str | Callable[..., Any] = "tanh",
    partition: str | Sequence[bool] | Partition = "halves",
    scales: int | None = None,
    blocks: int = 2,
    channels: int = 32,
    norm: str | None = None,
    network: Callable[[int, int], nn.Module] | None = None,
    batch_norm: bool = False,
    logit: float | None = None,
    context_dim: int = 0,
    robust: bool = True,
    init_scale: float = 0.0,
) -> TransformModule:
    """Build RealNVP: affine couplings that alternate; for images, over several scales.

    On images each scale has three couplings on a checkerboard, a `Squeeze`, three couplings on
    channels, and passes half of the channels on; the last one has four on a checkerboard. The
    width of the conditioners doubles from scale to scale.

    Args:
        event_shape: D or `(D,)`, at least 2; or `(C, H, W)`.
        layers: vectors: number of couplings L.
        hidden: vectors: widths of each conditioner's hidden layers.
        activation: activation of the conditioners.
        scale: `"tanh"` (the paper's, with a learned factor), `"sigmoid"`, `"clamp"`, `"exp"` or a
            callable.
        partition: vectors: `"halves"`, `"alternating"`, a boolean mask or a `Partition`; every
            second coupling swaps its parts.
        scales: images: number of scales; by default up to 3, as the size allows.
        blocks: images: number of residual blocks of each `ResNet`.
        channels: images: width of the residual networks of the first scale.
        norm: images: normalisation within the residual networks, `"instance"`, `"batch"` or None.
        network: makes a conditioner of one's own, given its numbers of inputs and outputs; for
            images the numbers of channels.
        batch_norm: whether a `BatchNorm` follows each coupling.
        logit: α of a `Logit` at the data's end, for pixels in the unit interval; None for none.
        context_dim: size of the context of a conditional flow.
        robust: whether each coupling's log-scales stay within 4 / L (images: 16 / L) of their
            start and conditioners see asinh of their input, which keeps deep flows invertible in
            float32 whatever the training; False for the paper's exact form, which conditional
            densities of very unlike widths need.
        init_scale: standard deviation of each conditioner's last layer at the start.

    Returns:
        The flow: at the start the identity, up to `init_scale`.

    Raises:
        ValueError: where an argument is out of its range; the message names it.

    References:
        Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP" (arXiv:1605.08803).

    Examples:
        >>> import torch
        >>> from pyroflows import flow_distribution, realnvp
        >>> density = flow_distribution(realnvp(2, layers=4, hidden=(32, 32)))
        >>> density.log_prob(torch.zeros(2)).shape
        torch.Size([])
    """
    shape = as_event_shape(event_shape)
    if len(shape) == 3:
        return realnvp_levels(
            shape,
            _data_end(shape, logit),
            scales=scales,
            network=network,
            blocks=blocks,
            width=channels,
            norm=norm,
            batch_norm=batch_norm,
            activation=activation,
            init_scale=init_scale,
            budget=IMAGE_BUDGET if robust else None,
            scale=scale,
            squash=robust,
            context_dim=context_dim,
        )
    partition = as_partition(partition, shape)

    def coupling(index: int) -> list[TransformModule]:
        part = partition.swap if index % 2 else partition
        layer = AffineCoupling(
            shape,
            scale=copy.deepcopy(scale),  # a module of its own for each coupling
            limit=LOG_SCALE_BUDGET / layers if robust else None,
            partition=part,
            network=_make(network, part, 2, context_dim),
            hidden=hidden,
            activation=activation,
            init_scale=init_scale,
            squash=robust,
            context_dim=context_dim,
        )
        return [layer, BatchNorm(shape)] if batch_norm else [layer]

    return Chain([*_in_pairs(coupling, layers), *_data_end(shape, logit)])


@builder(
    vectors=("layers", "hidden", "partition"),
    images=("levels", "steps", "channels", "coupling", "learned_prior"),
)
def glow(
    event_shape: int | Sequence[int],
    *,
    layers: int = 8,
    hidden: Sequence[int] = (64, 64),
    activation: str = "relu",
    scale: str | Callable[..., Any] = "sigmoid",
    partition: str | Sequence[bool] | Partition = "halves",
    levels: int | None = None,
    steps: int = 8,
    channels: int = 64,
    coupling: str = "affine",
    learned_prior: bool = True,
    network: Callable[[int, int], nn.Module] | None = None,
    logit: float | None = None,
    context_dim: int = 0,
    robust: bool = True,
    init_scale: float = 0.0,
) -> TransformModule:
    """Build Glow: steps of ActNorm, an invertible matrix and AffineCoupling.

    The steps are named in the paper's order, from data to base. On vectors the matrix is an
    `InvertibleLinear`. On images it is an `InvertibleConv1x1`, and each level squeezes the image,
    takes `steps` steps and passes half of the channels on.

    Args:
        event_shape: D or `(D,)`, at least 2; or `(C, H, W)`, with even height and width.
        layers: vectors: number of steps L.
        hidden: vectors: widths of each conditioner's hidden layers.
        activation: activation of the conditioners.
        scale: `"sigmoid"` (Glow's code), `"tanh"`, `"clamp"`, `"exp"` (the paper) or a callable.
        partition: vectors: `"halves"`, `"alternating"`, a boolean mask or a `Partition`.
        levels: images: number of levels; by default up to 3, as the size allows.
        steps: images: number of steps of each level, the paper's K.
        channels: images: width of the convolutional networks.
        coupling: images: `"affine"` or `"additive"`.
        learned_prior: images: whether what is factored out gets a mean and a scale that are
            functions of what goes on, and the last level those of an ActNorm.
        network: makes a conditioner of one's own, given its numbers of inputs and outputs; for
            images the numbers of channels.
        logit: α of a `Logit` at the data's end, for pixels in the unit interval; None for none.
        context_dim: size of the context of a conditional flow.
        robust: whether each coupling's log-scales stay within 4 / L (images: 16 / L) of their
            start, conditioners see asinh of their input and the matrices of more than 16 steps
            learn at 16 / L of the rate; False for the paper's exact form.
        init_scale: standard deviation of each conditioner's last layer at the start.

    Returns:
        The flow, with each matrix a random rotation; `fit` initialises each ActNorm from data. On
        images it is a `MultiScale`.

    Raises:
        ValueError: where an argument is out of its range; the message names it.

    References:
        Kingma and Dhariwal, "Glow" (arXiv:1807.03039), section 3.

    Examples:
        >>> import torch
        >>> from pyroflows import flow_distribution, glow
        >>> flow = glow(3, layers=2).initialize(torch.randn(100, 3))
        >>> flow_distribution(flow).sample((5,)).shape
        torch.Size([5, 3])
    """
    shape = as_event_shape(event_shape)
    if len(shape) == 3:
        return glow_levels(
            shape,
            _data_end(shape, logit),
            levels=levels,
            steps=steps,
            network=network,
            width=channels,
            coupling=coupling,
            learned_prior=learned_prior,
            activation=activation,
            init_scale=init_scale,
            budget=IMAGE_BUDGET if robust else None,
            scale=scale,
            squash=robust,
            context_dim=context_dim,
        )
    partition = as_partition(partition, shape)
    gain = shared_gain(as_count(layers, "layers")) if robust else 1.0

    def step() -> Chain:
        layer = AffineCoupling(
            shape,
            scale=copy.deepcopy(scale),  # a module of its own for each coupling
            limit=LOG_SCALE_BUDGET / layers if robust else None,
            partition=partition,
            network=_make(network, partition, 2, context_dim),
            hidden=hidden,
            activation=activation,
            init_scale=init_scale,
            squash=robust,
            context_dim=context_dim,
        )
        return Chain([layer, InvertibleLinear(shape, gain=gain), ActNorm(shape)])

    steps_ = Stack([step() for _ in range(layers)])
    return Chain([steps_, *_data_end(shape, logit)])


def _data_end(shape: tuple[int, ...], logit: float | None) -> list[TransformModule]:
    """Return what every flow has next to the data."""
    pixels = [] if logit is None else [Logit(shape, logit)]
    return [Standardization(shape), *pixels]


def _in_pairs(
    coupling: Callable[[int], list[TransformModule]], layers: int
) -> list[TransformModule]:
    """Stack couplings in pairs that swap their parts, and a last one by itself if there is."""
    pairs, single = divmod(as_count(layers, "layers"), 2)
    stack = [Stack([Chain(coupling(0) + coupling(1)) for _ in range(pairs)])] if pairs else []
    return stack + (coupling(0) if single else [])


def _make(
    network: Callable[[int, int], nn.Module] | None,
    partition: Partition,
    outputs: int,
    context_dim: int,
) -> nn.Module | None:
    size_a, size_b = partition.sizes
    return network(size_a + context_dim, outputs * size_b) if network else None
