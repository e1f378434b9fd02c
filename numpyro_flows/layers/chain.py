"""Composition: chains of layers, and stacks of blocks with the same structure."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float
from numpyro.distributions import constraints
from typing_extensions import override

from numpyro_flows.layers.coupling import Coupling, coupled, parts_coupled, runs
from numpyro_flows.transform import Conditioned, Context, EventPair, Parts, TransformModule
from numpyro_flows.tree import Blocks, replace
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
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_flows import AdditiveCoupling, Chain, DiagonalScaling
        >>> flow = Chain([DiagonalScaling(4), AdditiveCoupling(4, key=jax.random.key(0))])
        >>> flow(jnp.ones((2, 4))).shape
        (2, 4)
    """

    _learns: ClassVar[bool] = False

    layers: Any  # a tuple, or the blocks of a stack

    def __init__(self, layers: Iterable[TransformModule]) -> None:
        layers = list(layers)
        check_modules(layers, "layers")
        check_fit(layers)
        context_dim = check_context_dims(layers, "layers")
        super().__init__(
            layers[-1].event_shape, base_shape=layers[0].base_shape, context_dim=context_dim
        )
        self.layers = self._held(layers)

    @property
    def domain(self) -> constraints.Constraint:
        """The domain of the first layer."""
        return self.layers[0].domain

    @property
    def codomain(self) -> constraints.Constraint:
        """The codomain of the last layer."""
        return self.layers[-1].codomain

    @override
    def forward_and_ladj(self, x: Float[Array, "..."], context: Context = None) -> EventPair:
        return self._through(x, context, True)

    @override
    def inverse_and_ladj(self, y: Float[Array, "..."], context: Context = None) -> EventPair:
        return self._through(y, context, False)

    def _through(self, x: Array, context: Context, forward: bool) -> EventPair:
        ladj: Any = 0.0
        for run in runs(list(_flat(self.layers)), forward):
            if len(run) > 1:
                x, step = coupled(cast(list[Coupling], run), x, context, forward)
            else:
                pair = run[0]._forward_pair if forward else run[0]._inverse_pair
                x, step = pair(x, context)
            ladj = ladj + step
        return x, ladj

    def _absorb(self, y: Array, context: Context, first: bool) -> tuple[TransformModule, Array]:
        layers = []
        for layer in reversed(self.layers):
            layer, y = layer._absorb(y, context, first)
            layers.append(layer)
        return replace(self, layers=self._held(reversed(layers))), y

    def _standardize(self, parts: Parts) -> tuple[TransformModule, Parts | None]:
        layers, left = list(self.layers), parts
        for i in reversed(range(len(layers))):
            layers[i], left = layers[i]._standardize(left)
            if left is None:
                break
        return replace(self, layers=self._held(layers)), left

    def _held(self, layers: Iterable[TransformModule]) -> "tuple[TransformModule, ...] | Blocks":
        """Return layers in the form in which the chain stores them."""
        return tuple(layers)


class Stack(Chain):
    """A chain of blocks with the same structure.

    Their arrays are stacked along a first axis and a scan runs over them, so that compile time does
    not grow with depth. `stack[k]` is the k-th block.

    Args:
        layers: the blocks in order from base to data.

    Raises:
        ValueError: if there are no blocks, or if their structures differ.
    """

    _learns: ClassVar[bool] = False

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: int) -> TransformModule:
        return self.layers[index]

    @override
    def _through(self, x: Array, context: Context, forward: bool) -> EventPair:
        arrays, static = eqx.partition(self.layers.stacked, eqx.is_array)
        # Blocks of couplings on the same two parts pass these on as they are.
        first, *others = runs(list(_flat([self.layers.stacked])), forward)
        partition = cast(Coupling, first[0]).partition if len(first) > 1 and not others else None

        def step(carry: tuple[Any, Array], arrays: Any) -> tuple[tuple[Any, Array], None]:
            block, (event, ladj) = eqx.combine(arrays, static), carry
            if partition is None:
                pair = block._forward_pair if forward else block._inverse_pair
                event, log_det = pair(event, context)
            else:
                run = cast(list[Coupling], runs(list(_flat([block])), forward)[0])
                *event, log_det = parts_coupled(run, event[0], event[1], context, forward)
            return (event, ladj + log_det), None

        # The carry keeps one dtype: that of the blocks' output.
        dtype = _dtype(x, arrays)
        x = x.astype(dtype)
        start: Any = x if partition is None else list(partition.split(x))
        # The length is explicit because blocks may have no arrays at all.
        start = start, jnp.zeros((), dtype)
        (end, ladj), _ = jax.lax.scan(step, start, arrays, len(self), reverse=not forward)
        return end if partition is None else partition.join(*end), ladj

    def _absorb(self, y: Array, context: Context, first: bool) -> tuple[TransformModule, Array]:
        arrays, static = eqx.partition(self.layers.stacked, eqx.is_array)

        def step(y: Array, arrays: Any) -> tuple[Array, Any]:
            block, x = eqx.combine(arrays, static)._absorb(y, context, first)
            return x, eqx.filter(block, eqx.is_array)

        x, arrays = jax.lax.scan(step, y.astype(_dtype(y, arrays)), arrays, len(self), reverse=True)
        blocks = replace(self.layers, stacked=eqx.combine(arrays, static))
        return replace(self, layers=blocks), x

    def _held(self, layers: Iterable[TransformModule]) -> Blocks:
        return Blocks(layers)


def _flat(layers: Iterable[TransformModule]) -> Iterator[TransformModule]:
    """Yield layers, and those of chains in their place."""
    for layer in layers:
        if type(layer) is Chain:  # a stack scans over its blocks
            yield from _flat(layer.layers)
        else:
            yield layer


def _dtype(*values: object) -> jnp.dtype:
    return jnp.result_type(*filter(eqx.is_inexact_array, jax.tree.leaves(values)))


def check_modules(layers: Sequence[object], name: str) -> None:
    """Check that `layers` is a non-empty sequence of transforms."""
    if not layers:
        raise ValueError(f"`{name}` is empty, expected at least one transform")
    for layer in layers:
        if not isinstance(layer, TransformModule):
            raise TypeError(f"`{name}` has a {type(layer).__name__}, expected TransformModules")
        if isinstance(layer, Conditioned) and layer.context.ndim > 1:
            raise ValueError(
                f"`{name}` has a flow with a batch of contexts of shape {layer.context.shape}, "
                "which cannot be told from the batch of events: condition the whole flow instead"
            )
