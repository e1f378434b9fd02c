"""Composition: a chain of layers, and a stack of blocks built alike."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from pyro.distributions import constraints
from torch import Tensor, nn

from pyroflows.transform import Pair, TransformModule


class Chain(TransformModule):
    """Layers one after the other: `y = layers[-1](… layers[0](x))`, ladj the sum of theirs.

    Args:
        layers: transforms, the one next to the base first; each takes the events that the one
            before it gives.

    Raises:
        ValueError: where there are none, or where shapes or context sizes differ.
        TypeError: where one is not a `TransformModule`.

    Examples:
        >>> import torch
        >>> from pyroflows import AdditiveCoupling, Chain, DiagonalScaling
        >>> flow = Chain([DiagonalScaling(4), AdditiveCoupling(4)])
        >>> flow(torch.ones(2, 4)).shape
        torch.Size([2, 4])
    """

    layers: Any  # an nn.ModuleList, whose items are typed as modules alone

    def __init__(self, layers: Iterable[TransformModule]) -> None:
        layers = list(layers)
        context_dim = check_layers(layers)
        super().__init__(
            layers[-1].event_shape, base_shape=layers[0].base_shape, context_dim=context_dim
        )
        self.layers = nn.ModuleList(layers)

    @property
    def domain(self) -> constraints.Constraint:
        """What the first layer takes."""
        return self.layers[0].domain

    @property
    def codomain(self) -> constraints.Constraint:
        """What the last layer gives."""
        return self.layers[-1].codomain

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> Pair:
        """Map base to data, through the first layer first."""
        ladj: Any = 0.0
        for layer in self.layers:
            x, step = layer._forward_pair(x, context)
            ladj = ladj + step
        return x, ladj

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> Pair:
        """Map data to base, through the last layer first."""
        ladj: Any = 0.0
        for layer in reversed(self.layers):
            y, step = layer._inverse_pair(y, context)
            ladj = ladj + step
        return y, ladj

    def _absorb(self, y: Tensor, context: Tensor | None, first: bool) -> Tensor:
        for layer in reversed(self.layers):
            y = layer._absorb(y, context, first)
        return y

    def _standardize(self, parts: Iterator[Tensor]) -> Iterator[Tensor] | None:
        left: Iterator[Tensor] | None = parts
        for layer in reversed(self.layers):
            left = None if left is None else layer._standardize(left)
        return left


class Stack(Chain):
    """A chain of blocks that are built alike, as the builders repeat them.

    NumPyro's mirror holds their parameters stacked and scans over them, so that compile time does
    not grow with depth.

    Args:
        layers: the blocks, the one next to the base first.
    """

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: int) -> TransformModule:
        return self.layers[index]


def check_layers(layers: Sequence[Any]) -> int:
    """Refuse layers that do not fit one another; return the size of their context."""
    check_modules(layers, "layers")
    for i, (layer, following) in enumerate(pairwise(layers)):
        if layer.event_shape != following.base_shape:
            raise ValueError(
                f"`layers` do not fit: number {i} gives events of shape {layer.event_shape}, but "
                f"number {i + 1} takes {following.base_shape}"
            )
    return check_context_dims(layers, "layers")


def check_modules(layers: Sequence[Any], name: str) -> None:
    """Refuse what is not a sequence of transforms."""
    if not layers:
        raise ValueError(f"`{name}` is empty, expected at least one transform")
    for layer in layers:
        if not isinstance(layer, TransformModule):
            raise TypeError(f"`{name}` has a {type(layer).__name__}, expected TransformModules")


def check_context_dims(layers: Sequence[Any], name: str) -> int:
    """Return the size of the context that the layers take; 0 where they take none."""
    contexts = {layer.context_dim for layer in layers} - {0}
    if len(contexts) > 1:
        raise ValueError(f"`{name}` take contexts of different sizes: {sorted(contexts)}")
    return max(contexts, default=0)
