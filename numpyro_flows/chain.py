"""Transforms one after the other: a chain of layers, and a stack of blocks built alike."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from numpyro.distributions import constraints

from numpyro_flows.event import Event
from numpyro_flows.partition import Partition
from numpyro_flows.transform import OnEvents, TransformModule
from numpyro_flows.tree import replace


class Chain(OnEvents):
    """Layers one after the other: `y = layers[-1](… layers[0](x))`, ladj the sum of theirs.

    Args:
        layers: transforms, the one next to the base first; each takes the events that the one
            before it gives.

    Raises:
        ValueError: where there are none, or where shapes or context sizes differ.
        TypeError: where one is not a `TransformModule`.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_flows import AdditiveCoupling, Chain, DiagonalScaling
        >>> flow = Chain([DiagonalScaling(4), AdditiveCoupling(4, key=jax.random.key(0))])
        >>> flow(jnp.ones((2, 4))).shape
        (2, 4)
    """

    layers: tuple[TransformModule, ...]

    def __init__(self, layers: Iterable[TransformModule]) -> None:
        layers = tuple(layers)
        context_dim = check_layers(layers)
        super().__init__(
            layers[-1].event_shape, base_shape=layers[0].base_shape, context_dim=context_dim
        )
        self.layers = layers

    @property
    def domain(self) -> constraints.Constraint:
        """What the first layer takes."""
        return self.layers[0].domain

    @property
    def codomain(self) -> constraints.Constraint:
        """What the last layer gives."""
        return self.layers[-1].codomain

    def _forward_event(self, event: Event) -> tuple[Event, Array]:
        ladj: Any = 0.0
        for layer in self.layers:
            event, step = layer._forward_event(event)
            ladj = ladj + step
        return event, ladj

    def _inverse_event(self, event: Event) -> tuple[Event, Array]:
        ladj: Any = 0.0
        for layer in reversed(self.layers):
            event, step = layer._inverse_event(event)
            ladj = ladj + step
        return event, ladj

    def _absorb(self, event: Event, first: bool) -> tuple[TransformModule, Event]:
        layers = []
        for layer in reversed(self.layers):
            layer, event = layer._absorb(event, first)
            layers.append(layer)
        return replace(self, layers=tuple(reversed(layers))), event

    def _end_partition(self, last: bool) -> Partition | None:
        return self.layers[-1 if last else 0]._end_partition(last)


class Stack(OnEvents):
    """A chain of blocks that are built alike, as the builders repeat them.

    Their arrays are held stacked along a first axis and a scan runs over them, so that compile
    time does not grow with depth. `stack[k]` is the k-th block.

    Args:
        layers: the blocks, the one next to the base first.

    Raises:
        ValueError: where there are none, or where they are not built alike.
    """

    blocks: TransformModule
    depth: int = eqx.field(static=True)

    def __init__(self, layers: Iterable[TransformModule]) -> None:
        layers = list(layers)
        context_dim = check_layers(layers)
        super().__init__(
            layers[-1].event_shape, base_shape=layers[0].base_shape, context_dim=context_dim
        )
        arrays, static = zip(*(eqx.partition(layer, eqx.is_array) for layer in layers), strict=True)
        shapes = [jax.tree.map(jnp.shape, a) for a in arrays]
        if any(s != static[0] for s in static) or any(s != shapes[0] for s in shapes):
            raise ValueError("`layers` of a Stack must be built alike; use a Chain for others")
        self.blocks = eqx.combine(jax.tree.map(lambda *a: jnp.stack(a), *arrays), static[0])
        self.depth = len(layers)

    @property
    def layers(self) -> tuple[TransformModule, ...]:
        """The blocks one by one."""
        return tuple(self[k] for k in range(self.depth))

    def __len__(self) -> int:
        return self.depth

    def __getitem__(self, index: int) -> TransformModule:
        if not -self.depth <= index < self.depth:
            raise IndexError(f"`index` is {index}, but the stack has {self.depth} blocks")
        return jax.tree.map(lambda a: a[index] if eqx.is_array(a) else a, self.blocks)

    def _forward_event(self, event: Event) -> tuple[Event, Array]:
        return self._scan(event, True)

    def _inverse_event(self, event: Event) -> tuple[Event, Array]:
        return self._scan(event, False)

    def _scan(self, event: Event, forward: bool) -> tuple[Event, Array]:
        arrays, static = eqx.partition(self.blocks, eqx.is_array)
        partition = self.blocks._end_partition(last=not forward)

        def step(carry: tuple[Any, Array], arrays: Any) -> tuple[tuple[Any, Array], None]:
            block, (value, ladj) = eqx.combine(arrays, static), carry
            state = Event(value, partition, event.context)
            state, log_det = (block._forward_event if forward else block._inverse_event)(state)
            return (_held(state, partition), ladj + log_det), None

        # The carry keeps one dtype: what the blocks will make of the event.
        value = _held(event, partition)
        dtype = _dtype(value, arrays)
        value = jax.tree.map(lambda v: v.astype(dtype), value)
        ladj = jnp.zeros(jax.tree.leaves(value)[0].shape[: -len(self.event_shape)], dtype)
        (value, ladj), _ = jax.lax.scan(
            step,
            (value, ladj),
            arrays,
            length=self.depth,  # blocks may have no arrays at all
            reverse=not forward,
        )
        return event.to(value, partition), ladj

    def _absorb(self, event: Event, first: bool) -> tuple[TransformModule, Event]:
        arrays, static = eqx.partition(self.blocks, eqx.is_array)

        def step(value: Array, arrays: Any) -> tuple[Array, Any]:
            block, state = eqx.combine(arrays, static)._absorb(event.to(value), first)
            return state.whole(), eqx.filter(block, eqx.is_array)

        value = event.whole().astype(_dtype(event.value, arrays))
        value, arrays = jax.lax.scan(step, value, arrays, self.depth, reverse=True)
        return replace(self, blocks=eqx.combine(arrays, static)), event.to(value)

    def _end_partition(self, last: bool) -> Partition | None:
        return self.blocks._end_partition(last)

    def _unpacked(self) -> TransformModule:
        return Chain(self.layers)

    def _packed(self, unpacked: Any) -> TransformModule:
        return replace(self, blocks=Stack(unpacked.layers).blocks)


def _dtype(*values: Any) -> Any:
    return jnp.result_type(*filter(eqx.is_inexact_array, jax.tree.leaves(values)))


def _held(event: Event, partition: Partition | None) -> Any:
    return event.whole() if partition is None else event.parts(partition)


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
