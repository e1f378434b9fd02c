"""The base of every layer: one pair of methods in, a NumPyro transform out; their composition."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform, _InverseTransform

from numpyro_flows.checks import (
    as_count,
    as_event_shape,
    check_context,
    check_event,
    check_finite,
    check_shape,
)
from numpyro_flows.event import Event
from numpyro_flows.partition import Partition
from numpyro_flows.recipe import Recipe
from numpyro_flows.tree import Module, named, replace, restored

Flow = TypeVar("Flow", bound="TransformModule")


class _HostTransform(Transform):
    """NumPyro's transform, but for its pytree registration: Equinox registers each module once."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super(Transform, cls).__init_subclass__(**kwargs)


class TransformModule(eqx.Module, _HostTransform):
    """A bijection with parameters: an Equinox module and all that NumPyro wants of a transform.

    A layer implements two methods, `forward_and_ladj` and `inverse_and_ladj`. Everything else,
    `__call__`, `inv`, `log_abs_det_jacobian` and the shape methods, follows from them. Calling a
    flow maps base samples to data, `x = flow(z)`; `flow.inv` maps data to base. A layer with a
    `context_dim` is given the context, `(*batch, context_dim)`, as a second argument of the two.

    Args:
        event_shape: shape of the data's events, an int or a tuple of ints.
        base_shape: shape of the base's events; by default the same.
        context_dim: size of the context vector; 0 for none.

    Attributes:
        base: name of the base distribution that the flow was last fitted with.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_flows import TransformModule
        >>> class Scale(TransformModule):
        ...     log_scale: jax.Array
        ...
        ...     def __init__(self, event_shape):
        ...         super().__init__(event_shape)
        ...         self.log_scale = jnp.ones(self.event_shape)
        ...
        ...     def forward_and_ladj(self, x):
        ...         ladj = jnp.broadcast_to(self.log_scale.sum(), x.shape[:-1])
        ...         return x * jnp.exp(self.log_scale), ladj
        ...
        ...     def inverse_and_ladj(self, y):
        ...         ladj = jnp.broadcast_to(self.log_scale.sum(), y.shape[:-1])
        ...         return y * jnp.exp(-self.log_scale), -ladj
        >>> scale = Scale(2)
        >>> scale.log_abs_det_jacobian(jnp.ones((3, 2)), scale(jnp.ones((3, 2)))).tolist()
        [2.0, 2.0, 2.0]
    """

    # Floating-point arrays of a class that are state, not parameters.
    buffers: ClassVar[tuple[str, ...]] = ()

    event_shape: tuple[int, ...] = eqx.field(static=True)
    base_shape: tuple[int, ...] = eqx.field(static=True)
    context_dim: int = eqx.field(static=True)
    base: str = eqx.field(static=True)
    recipe: Recipe | None = eqx.field(static=True)

    def __init__(
        self,
        event_shape: int | Sequence[int],
        *,
        base_shape: int | Sequence[int] | None = None,
        context_dim: int = 0,
    ) -> None:
        self.event_shape = as_event_shape(event_shape)
        self.base_shape = self.event_shape if base_shape is None else as_event_shape(base_shape)
        self.context_dim = as_count(context_dim, "context_dim", 0)
        self.base = "normal"
        self.recipe = None

    def forward_and_ladj(self, x: Array) -> tuple[Array, Array]:
        """Map base to data: `(*batch, *base_shape)` to `(y, log|det dy/dx|)`."""
        raise NotImplementedError(f"{type(self).__name__} does not implement forward_and_ladj")

    def inverse_and_ladj(self, y: Array) -> tuple[Array, Array]:
        """Map data to base: `(*batch, *event_shape)` to `(x, log|det dx/dy|)`."""
        raise NotImplementedError(f"{type(self).__name__} does not implement inverse_and_ladj")

    # How a flow passes an event on. Layers that look at its parts override it.

    def _forward_event(self, event: Event) -> tuple[Event, Array]:
        context = [event.context] if self.context_dim else []
        y, ladj = self.forward_and_ladj(event.whole(), *context)
        return event.to(y), ladj

    def _inverse_event(self, event: Event) -> tuple[Event, Array]:
        context = [event.context] if self.context_dim else []
        x, ladj = self.inverse_and_ladj(event.whole(), *context)
        return event.to(x), ladj

    def _absorb(self, event: Event, first: bool) -> "tuple[TransformModule, Event]":
        """Learn the data's moments on the way from data to base (see `initialize`, `update`)."""
        return self, self._inverse_event(event)[0]

    def _end_partition(self, last: bool) -> Partition | None:
        """Return the partition that the layer at one end works on, if it is a coupling."""
        return None

    def _unpacked(self) -> "TransformModule":
        """Return the module whose fields have the names and shapes of PyTorch's wing."""
        return self

    def _packed(self, unpacked: Any) -> Any:
        """Undo `_unpacked`."""
        return unpacked

    # Data-dependent state

    def initialize(self: Flow, x: Array, context: Array | None = None) -> Flow:
        """Initialise what starts from data: ActNorm and batch normalisations.

        Each such layer that is not yet initialised takes the moments of the batch as the layers
        between it and the data have encoded it. `fit` calls this on its first batch; nothing
        else does.

        Args:
            x: data `(*batch, *event_shape)`.
            context: context `(*batch, context_dim)` of a conditional flow.

        Returns:
            The new flow.

        Raises:
            ValueError: where `x` has no rows or some that are not finite.
        """
        x = check_finite(x, self.event_shape, "x")
        return _absorbed(self, self._entry(x, context).value, context, True)

    def update(self: Flow, x: Array, context: Array | None = None) -> Flow:
        """Move the running averages of every batch normalisation towards a batch of data.

        `fit` calls this before every step. Arguments, result and errors as for `initialize`.
        """
        x = check_finite(x, self.event_shape, "x")
        return _absorbed(self, self._entry(x, context).value, context, False)

    def scale_penalty(self) -> Array:
        """Sum of the squared learned factors of the tanh scales (RealNVP's L2 penalty)."""

        def has_penalty(node: Any) -> bool:
            return callable(getattr(node, "penalty", None))

        nodes = jax.tree.leaves(self, is_leaf=has_penalty)
        return sum((node.penalty() for node in nodes if has_penalty(node)), jnp.zeros(()))

    # Context

    def condition(self, context: Array) -> "Conditioned":
        """Return the plain transform that this conditional flow is, given a context.

        Args:
            context: `(*batch, context_dim)`; its batch shape broadcasts with the events'.

        Raises:
            ValueError: where the flow takes no context, or one of another size.
        """
        return Conditioned(self, context)

    def _entry(self, x: Array, context: Array | None = None, *, at_base: bool = False) -> Event:
        """Check an input and its context, and return them as the event that a flow passes on."""
        event_shape = self.base_shape if at_base else self.event_shape
        x = check_event(x, event_shape)
        if context is not None:
            check_context(context, self.context_dim)
            batch = len(x.shape) - len(event_shape)
            joint = jnp.broadcast_shapes(x.shape[:batch], context.shape[:-1])
            x = jnp.broadcast_to(x, (*joint, *event_shape))
        elif self.context_dim:
            raise ValueError(
                f"`context` is missing: this flow was built with context_dim={self.context_dim}; "
                "use flow.condition(context)"
            )
        return Event(x, None, context)

    # What NumPyro asks for

    @property
    def domain(self) -> constraints.Constraint:
        """Real events."""
        return constraints.independent(constraints.real, len(self.base_shape))

    @property
    def codomain(self) -> constraints.Constraint:
        """Real events."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def forward_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the data that a base sample of this shape is mapped to."""
        return self._batch(shape, self.base_shape) + self.event_shape

    def inverse_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the base sample that data of this shape is mapped to."""
        return self._batch(shape, self.event_shape) + self.base_shape

    def _batch(self, shape: Sequence[int], event_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Check the shape of some events, and return its batch shape."""
        shape = check_shape(shape, event_shape)
        return shape[: len(shape) - len(event_shape)]

    @property
    def inv(self) -> Transform:
        """The inverse, from data to base; `flow.inv.inv is flow`."""
        return _InverseTransform(self)

    def __call__(self, x: Array) -> Array:
        """Map base to data."""
        return self.forward_and_ladj(x)[0]

    def _inverse(self, y: Array) -> Array:
        return self.inverse_and_ladj(y)[0]

    def call_with_intermediates(self, x: Array) -> tuple[Array, Array]:
        """Map base to data, and keep the log-determinant for `log_abs_det_jacobian`."""
        return self.forward_and_ladj(x)

    def log_abs_det_jacobian(self, x: Array, y: Array, intermediates: Any = None) -> Array:
        """Return `log|det dy/dx|`, batch-shaped, for a pair with `y = flow(x)`."""
        # The host has just called `inv`: XLA merges the two forward passes.
        return -self.inverse_and_ladj(y)[1] if intermediates is None else intermediates

    def tree_flatten(self) -> tuple[tuple[Any, ...], Any]:
        """Flatten as the host's transforms do; JAX itself flattens a flow as an Equinox module."""
        fields = [f for f in dataclasses.fields(self)]
        names = tuple(f.name for f in fields if not f.metadata.get("static"))
        static = {f.name: getattr(self, f.name) for f in fields if f.name not in names}
        return tuple(getattr(self, name) for name in names), (names, static)

    @classmethod
    def tree_unflatten(cls, aux_data: Any, params: Sequence[Any]) -> "TransformModule":
        """Undo `tree_flatten`."""
        names, static = aux_data
        module = object.__new__(cls)
        for name, value in [*zip(names, params, strict=True), *static.items()]:
            object.__setattr__(module, name, value)
        return module

    # Arrays by name

    def state_dict(self) -> dict[str, Array]:
        """Return all arrays by name, with the names and shapes that PyTorch's wing gives them."""
        return dict(named(self, ""))

    def load_state_dict(self: Module, state: Mapping[str, Any]) -> Module:
        """Return the flow with arrays replaced by those of a `state_dict`.

        Raises:
            ValueError: where names or shapes differ from the flow's.
        """
        own = dict(named(self, ""))
        missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or unexpected:
            raise ValueError(
                f"`state` does not fit this flow: missing {missing}, unexpected {unexpected}"
            )
        for name, array in own.items():
            if array.shape != jnp.shape(state[name]):
                raise ValueError(
                    f"`state` has shape {jnp.shape(state[name])} for {name}, expected {array.shape}"
                )
        return restored(self, "", state)

    def astype(self: Module, dtype: Any) -> Module:
        """Return the flow with its floating-point arrays in another dtype."""
        return jax.tree.map(lambda a: a.astype(dtype) if eqx.is_inexact_array(a) else a, self)


class OnEvents(TransformModule):
    """A transform that is told how it passes an event on, in parts or whole.

    To be subclassed, not used: a subclass has `_forward_event` and `_inverse_event`.
    """

    def forward_and_ladj(self, x: Array) -> tuple[Array, Array]:
        """Map base to data."""
        return run(self, self._entry(x, at_base=True).value, None, True)

    def inverse_and_ladj(self, y: Array) -> tuple[Array, Array]:
        """Map data to base."""
        return run(self, self._entry(y).value, None, False)


class Conditioned(TransformModule):
    """A conditional flow together with a context: a plain transform.

    Shapes: as the flow's; the batch shape of an event broadcasts with the context's.
    """

    buffers: ClassVar[tuple[str, ...]] = ("context",)

    flow: TransformModule
    context: Array

    def __init__(self, flow: TransformModule, context: Array) -> None:
        check_context(context, flow.context_dim)
        super().__init__(flow.event_shape, base_shape=flow.base_shape)
        self.flow, self.context, self.base = flow, context, flow.base

    @property
    def domain(self) -> constraints.Constraint:
        """As the flow's."""
        return self.flow.domain

    @property
    def codomain(self) -> constraints.Constraint:
        """As the flow's."""
        return self.flow.codomain

    def forward_and_ladj(self, x: Array) -> tuple[Array, Array]:
        """Map base to data, given the context."""
        x = self.flow._entry(x, self.context, at_base=True).value
        return run(self.flow, x, self.context, True)

    def inverse_and_ladj(self, y: Array) -> tuple[Array, Array]:
        """Map data to base, given the context."""
        return run(self.flow, self.flow._entry(y, self.context).value, self.context, False)

    def _absorb(self, event: Event, first: bool) -> tuple[TransformModule, Event]:
        flow, encoded = self.flow._absorb(self.flow._entry(event.whole(), self.context), first)
        return replace(self, flow=flow), event.to(encoded.whole())

    def _batch(self, shape: Sequence[int], event_shape: tuple[int, ...]) -> tuple[int, ...]:
        batch = super()._batch(shape, event_shape)
        return jnp.broadcast_shapes(batch, self.context.shape[:-1])


# A flow runs under jit even where its user does not: a bare scan would be compiled at every call.
@eqx.filter_jit
def run(
    flow: TransformModule, x: Array, context: Array | None, forward: bool
) -> tuple[Array, Array]:
    """Take an event through a flow, from base to data or back."""
    event = Event(x, None, context)
    event, ladj = (flow._forward_event if forward else flow._inverse_event)(event)
    return event.whole(), ladj


@eqx.filter_jit
def _absorbed(flow: Any, x: Array, context: Array | None, first: bool) -> Any:
    return flow._absorb(Event(x, None, context), first)[0]
