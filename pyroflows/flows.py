"""Builders: NICE, RealNVP and Glow for vectors, from one call."""

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from pyroflows.chain import Chain, Stack
from pyroflows.checks import as_event_shape
from pyroflows.coupling import AdditiveCoupling, AffineCoupling
from pyroflows.linear import InvertibleLinear
from pyroflows.normalization import ActNorm, BatchNorm, DiagonalScaling, Standardization
from pyroflows.partition import Partition, as_partition
from pyroflows.transform import Recipe, TransformModule

# Log-scales of all couplings together, along one path through the flow: see `robust`.
LOG_SCALE_BUDGET = 4.0


def builder(build: Callable[..., Chain]) -> Callable[..., Chain]:
    """Let a builder note down on the flow how it was called, so that `save` can tell `load`."""

    @functools.wraps(build)
    def recorded(*args: Any, **kwargs: Any) -> Chain:
        call = inspect.signature(build).bind(*args, **kwargs)
        call.apply_defaults()
        arguments = {name: _plain(value) for name, value in call.arguments.items()}
        flow = build(**arguments)
        flow.recipe = Recipe(build.__name__, tuple(arguments.items()))
        return flow

    return recorded


@builder
def nice(
    event_shape: int | Sequence[int],
    *,
    layers: int = 4,
    hidden: Sequence[int] = (64, 64),
    activation: str = "relu",
    partition: str | Sequence[bool] | Partition = "alternating",
    network: Callable[[int, int], nn.Module] | None = None,
    context_dim: int = 0,
    robust: bool = True,
    init_scale: float = 0.0,
) -> Chain:
    """Build NICE: additive couplings that alternate, and a diagonal scaling next to the base.

    Args:
        event_shape: D or `(D,)`, at least 2.
        layers: number of couplings; the paper has four.
        hidden: widths of each conditioner's hidden layers.
        activation: activation of the conditioners.
        partition: `"alternating"` (the paper's), `"halves"`, a boolean mask or a `Partition`; every
            second coupling swaps its parts.
        network: makes a conditioner of one's own, given its numbers of inputs and outputs.
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
    partition = as_partition(partition, shape)

    def coupling(index: int) -> list[TransformModule]:
        part = partition.swap if index % 2 else partition
        return [
            AdditiveCoupling(
                shape,
                partition=part,
                network=_make(network, part, 1, context_dim),
                hidden=hidden,
                activation=activation,
                init_scale=init_scale,
                squash=robust,
                context_dim=context_dim,
            )
        ]

    return Chain([DiagonalScaling(shape), *_in_pairs(coupling, layers), Standardization(shape)])


@builder
def realnvp(
    event_shape: int | Sequence[int],
    *,
    layers: int = 8,
    hidden: Sequence[int] = (64, 64),
    activation: str = "relu",
    scale: str | Callable[..., Any] = "tanh",
    partition: str | Sequence[bool] | Partition = "halves",
    network: Callable[[int, int], nn.Module] | None = None,
    batch_norm: bool = False,
    context_dim: int = 0,
    robust: bool = True,
    init_scale: float = 0.0,
) -> Chain:
    """Build RealNVP: affine couplings that alternate.

    Args:
        event_shape: D or `(D,)`, at least 2.
        layers: number of couplings L.
        hidden: widths of each conditioner's hidden layers.
        activation: activation of the conditioners.
        scale: `"tanh"` (the paper's, with a learned factor), `"sigmoid"`, `"clamp"`, `"exp"` or a
            callable.
        partition: `"halves"`, `"alternating"`, a boolean mask or a `Partition`; every second
            coupling swaps its parts.
        network: makes a conditioner of one's own, given its numbers of inputs and outputs.
        batch_norm: whether a `BatchNorm` follows each coupling.
        context_dim: size of the context of a conditional flow.
        robust: whether each coupling's log-scales stay within 4 / L of their value at the start
            and conditioners see asinh of their input, which keeps deep flows invertible in float32
            whatever the training; False for the paper's exact form.
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

    return Chain([*_in_pairs(coupling, layers), Standardization(shape)])


@builder
def glow(
    event_shape: int | Sequence[int],
    *,
    layers: int = 8,
    hidden: Sequence[int] = (64, 64),
    activation: str = "relu",
    scale: str | Callable[..., Any] = "sigmoid",
    partition: str | Sequence[bool] | Partition = "halves",
    network: Callable[[int, int], nn.Module] | None = None,
    context_dim: int = 0,
    robust: bool = True,
    init_scale: float = 0.0,
) -> Chain:
    """Build Glow on vectors: steps of ActNorm, InvertibleLinear and AffineCoupling.

    The steps are named in the paper's order, from data to base.

    Args:
        event_shape: D or `(D,)`, at least 2.
        layers: number of steps L.
        hidden: widths of each conditioner's hidden layers.
        activation: activation of the conditioners.
        scale: `"sigmoid"` (Glow's code), `"tanh"`, `"clamp"`, `"exp"` (the paper) or a callable.
        partition: `"halves"`, `"alternating"`, a boolean mask or a `Partition`.
        network: makes a conditioner of one's own, given its numbers of inputs and outputs.
        context_dim: size of the context of a conditional flow.
        robust: whether each coupling's log-scales stay within 4 / L of their value at the start
            and conditioners see asinh of their input; False for the paper's exact form.
        init_scale: standard deviation of each conditioner's last layer at the start.

    Returns:
        The flow, with each matrix a random rotation; `fit` initialises each ActNorm from data.

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
    partition = as_partition(partition, shape)

    def step() -> Chain:
        coupling = AffineCoupling(
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
        return Chain([coupling, InvertibleLinear(shape), ActNorm(shape)])

    return Chain([Stack([step() for _ in range(_positive(layers))]), Standardization(shape)])


def _plain(value: Any) -> Any:
    """Turn a partition or sequence into a tuple, which can be compared and written to a file."""
    value = value.mask if isinstance(value, Partition) else value
    value = value.tolist() if hasattr(value, "tolist") else value
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


def _in_pairs(
    coupling: Callable[[int], list[TransformModule]], layers: int
) -> list[TransformModule]:
    """Stack couplings in pairs that swap their parts, and a last one by itself if there is."""
    pairs, single = divmod(_positive(layers), 2)
    stack = [Stack([Chain(coupling(0) + coupling(1)) for _ in range(pairs)])] if pairs else []
    return stack + (coupling(0) if single else [])


def _positive(layers: int) -> int:
    if layers < 1:
        raise ValueError(f"`layers` is {layers}, expected at least 1")
    return layers


def _make(
    network: Callable[[int, int], nn.Module] | None,
    partition: Partition,
    outputs: int,
    context_dim: int,
) -> nn.Module | None:
    size_a, size_b = partition.sizes
    return network(size_a + context_dim, outputs * size_b) if network else None
