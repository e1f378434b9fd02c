"""Composition: chains of layers, and stacks of blocks with the same structure."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

from jaxtyping import Float
from pyro.distributions import constraints
from torch import Tensor, nn
from typing_extensions import override

from pyroflows.layers.coupling import Coupling, coupled, runs
from pyroflows.transform import Context, Pair, Parts, TransformModule
from pyroflows_common.checks import check_context_dims, check_fit


class Chain(TransformModule):
    """Composition of layers: `y = layers[-1](… layers[0](x))`, ladj the sum over the layers.

    Args:
        layers: transforms in order from base to data; each takes the events that the one before it
            gives.

    Raises:
        ValueError: if there are no layers, or if shapes or context sizes do not match.
        TypeError: if an element is not a `TransformModule`.

    Examples:
        >>> import torch
        >>> from pyroflows import AdditiveCoupling, Chain, DiagonalScaling
        >>> flow = Chain([DiagonalScaling(4), AdditiveCoupling(4)])
        >>> flow(torch.ones(2, 4)).shape
        torch.Size([2, 4])
    """

    layers: Any  # an nn.ModuleList, whose items are typed only as modules

    def __init__(self, layers: Iterable[TransformModule]) -> None:
        layers = list(layers)
        check_modules(layers, "layers")
        check_fit(layers)
        context_dim = check_context_dims(layers, "layers")
        super().__init__(
            layers[-1].event_shape, base_shape=layers[0].base_shape, context_dim=context_dim
        )
        self.layers = nn.ModuleList(layers)

    @property
    def domain(self) -> constraints.Constraint:
        """The domain of the first layer."""
        return self.layers[0].domain

    @property
    def codomain(self) -> constraints.Constraint:
        """The codomain of the last layer."""
        return self.layers[-1].codomain

    @override
    def forward_and_ladj(self, x: Float[Tensor, "..."], context: Context = None) -> Pair:
        return self._through(x, context, True)

    @override
    def inverse_and_ladj(self, y: Float[Tensor, "..."], context: Context = None) -> Pair:
        return self._through(y, context, False)

    def _through(self, x: Tensor, context: Context, forward: bool) -> Pair:
        ladj: Any = 0.0
        for run in runs(list(_flat(self.layers)), forward):
            if len(run) > 1:
                x, step = coupled(cast(list[Coupling], run), x, context, forward)
            else:
                pair = run[0]._forward_pair if forward else run[0]._inverse_pair
                x, step = pair(x, context)
            ladj = ladj + step
        return x, ladj

    def _absorb(self, y: Tensor, context: Context, first: bool) -> Tensor:
        for layer in reversed(self.layers):
            y = layer._absorb(y, context, first)
        return y

    def _standardize(self, parts: Parts) -> Parts | None:
        left: Parts | None = parts
        for layer in reversed(self.layers):
            left = None if left is None else layer._standardize(left)
        return left


class Stack(Chain):
    """A chain of blocks with the same structure.

    The NumPyro wing stacks their parameters and scans over them, so that compile time does not grow
    with depth.

    Args:
        layers: the blocks in order from base to data.
    """

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: int) -> TransformModule:
        return self.layers[index]


def _flat(layers: Iterable[TransformModule]) -> Iterator[TransformModule]:
    """Yield layers, and those of chains in their place."""
    for layer in layers:
        if type(layer) in (Chain, Stack):
            yield from _flat(layer.layers)
        else:
            yield layer


def check_modules(layers: Sequence[object], name: str) -> None:
    """Check that `layers` is a non-empty sequence of transforms."""
    if not layers:
        raise ValueError(f"`{name}` is empty, expected at least one transform")
    for layer in layers:
        if not isinstance(layer, TransformModule):
            raise TypeError(f"`{name}` has a {type(layer).__name__}, expected TransformModules")
