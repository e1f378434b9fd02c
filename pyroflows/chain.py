"""Transforms one after the other: a chain of layers, and a stack of blocks built alike."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from pyroflows.transform import Event, TransformModule


class Chain(TransformModule):
    """Layers one after the other: `y = layers[-1](… layers[0](x))`, ladj the sum of theirs.

    Args:
        layers: transforms of events of one shape, the one next to the base first.

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
        shape, context_dim = check_layers(layers)
        super().__init__(shape, context_dim=context_dim)
        self.layers = nn.ModuleList(layers)

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the layers from the first to the last."""
        event, ladj = self._forward_event(self._entry(x))
        return event.whole(), ladj

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Invert the layers from the last to the first."""
        event, ladj = self._inverse_event(self._entry(y))
        return event.whole(), ladj

    def _forward_event(self, event: Event) -> tuple[Event, Tensor]:
        ladj: Any = 0.0
        for layer in self.layers:
            event, step = layer._forward_event(event)
            ladj = ladj + step
        return event, ladj

    def _inverse_event(self, event: Event) -> tuple[Event, Tensor]:
        ladj: Any = 0.0
        for layer in reversed(self.layers):
            event, step = layer._inverse_event(event)
            ladj = ladj + step
        return event, ladj

    def _absorb(self, event: Event, first: bool) -> Event:
        for layer in reversed(self.layers):
            event = layer._absorb(event, first)
        return event


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


def check_layers(layers: list[Any]) -> tuple[tuple[int, ...], int]:
    """Refuse layers that do not fit one another; return their event shape and context size."""
    if not layers:
        raise ValueError("`layers` is empty, expected at least one transform")
    for layer in layers:
        if not isinstance(layer, TransformModule):
            raise TypeError(f"`layers` has a {type(layer).__name__}, expected TransformModules")
    shapes = {layer.event_shape for layer in layers}
    if len(shapes) > 1:
        raise ValueError(f"`layers` transform events of different shapes: {sorted(shapes)}")
    contexts = {layer.context_dim for layer in layers} - {0}
    if len(contexts) > 1:
        raise ValueError(f"`layers` take contexts of different sizes: {sorted(contexts)}")
    return layers[0].event_shape, max(contexts, default=0)
