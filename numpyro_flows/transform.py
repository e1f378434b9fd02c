"""The base of every layer: one pair of methods in, a NumPyro transform out."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform, _InverseTransform

from numpyro_flows.tree import Module, frozen, named, replace, restored
from pyroflows_common.checks import as_count, as_event_shape, check_rows, check_shape
from pyroflows_common.recipe import Recipe

Flow = TypeVar("Flow", bound="TransformModule")
Pair = tuple[Array, Array]  # a value, and the log-determinant of the map that gave it


class _HostTransform(Transform):
    """NumPyro's transform, but for its pytree registration: Equinox registers each module once."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super(Transform, cls).__init_subclass__(**kwargs)


class TransformModule(eqx.Module, _HostTransform):
    """A bijection with parameters: an Equinox module and all that NumPyro wants of a transform.

    A layer implements two methods, `forward_and_ladj` and `inverse_and_ladj`. Everything else,
    `__call__`, `inv`, `log_abs_det_jacobian` and the shape methods, follows from them. Calling a
    flow maps base samples to data, `x = flow(z)`; `flow.inv` maps data to base. The context is the
    second argument of the pair; a layer that takes none may leave it out.

    The two methods map one event, `(*event_shape)`, with its context, `(context_dim,)`: inputs are
    checked, and batches mapped over, before a layer sees them. Callers pass any batch shape.

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
        ...         return x * jnp.exp(self.log_scale), self.log_scale.sum()
        ...
        ...     def inverse_and_ladj(self, y):
        ...         return y * jnp.exp(-self.log_scale), -self.log_scale.sum()
        >>> scale = Scale(2)
        >>> scale.log_abs_det_jacobian(jnp.ones((3, 2)), scale(jnp.ones((3, 2)))).tolist()
        [2.0, 2.0, 2.0]
    """

    # Floating-point arrays of a class that are state, not parameters.
    buffers: ClassVar[tuple[str, ...]] = ()
    _takes_context: ClassVar[bool] = True

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
        if self.context_dim and not self._takes_context:
            raise TypeError(
                f"`context_dim` is {context_dim}, but {type(self).__name__}'s forward_and_ladj and "
                "inverse_and_ladj take no context: add a second argument, `context`, to both"
            )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, unchecked in _PAIR.items():
            method = vars(cls).get(name)
            if method is not None:
                cls._takes_context = len(inspect.signature(method).parameters) > 2
                setattr(cls, unchecked, _with_context(method, cls._takes_context))
                setattr(cls, name, _checked(method))

    def forward_and_ladj(self, x: Array, context: Array | None = None) -> Pair:
        """Map base to data.

        Args:
            x: base samples `(*batch, *base_shape)`.
            context: `(*batch, context_dim)` of a conditional layer.

        Returns:
            `y`, `(*batch, *event_shape)`, and `log|det dy/dx|`, `(*batch,)`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement forward_and_ladj")

    def inverse_and_ladj(self, y: Array, context: Array | None = None) -> Pair:
        """Map data to base.

        Args:
            y: data `(*batch, *event_shape)`.
            context: `(*batch, context_dim)` of a conditional layer.

        Returns:
            `x`, `(*batch, *base_shape)`, and `log|det dx/dy|`, `(*batch,)`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement inverse_and_ladj")

    # Data-dependent state

    def _absorb(
        self, y: Array, context: Array | None, first: bool
    ) -> "tuple[TransformModule, Array]":
        """Learn moments from data `(n, *event_shape)` (see `initialize`, `update`); encode it."""
        return self, self._encoded(y, context)

    def _encoded(self, y: Array, context: Array | None) -> Array:
        return jax.vmap(lambda y, context: self._inverse_pair(y, context)[0])(y, context)

    def _standardize(
        self, parts: Iterator[Array]
    ) -> "tuple[TransformModule, Iterator[Array] | None]":
        """Let the layer at the data's end learn the moments of data that comes in parts.

        Returns:
            The new layer; and None where it has learned, or encoded parts where the layer before
            it is to learn theirs.
        """
        raise ValueError(
            f"`standardize` is true, but the flow ends in {type(self).__name__}: append "
            f"Standardization({self.event_shape})"
        )

    def initialize(self: Flow, x: Array, context: Array | None = None) -> Flow:
        """Initialise the layers that start from data: ActNorm and batch normalisation.

        Each such layer that is not yet initialised takes the moments of the batch as encoded by
        the layers between it and the data. `fit` calls this on its first batch; nothing else does.

        Args:
            x: data `(*batch, *event_shape)`.
            context: context `(*batch, context_dim)` of a conditional flow.

        Returns:
            The new flow.

        Raises:
            ValueError: where `x` has no rows, or rows that are not finite.
        """
        return self._learned(x, context, True)

    def update(self: Flow, x: Array, context: Array | None = None) -> Flow:
        """Move the running averages of every batch normalisation towards a batch of data.

        `fit` calls this before every step. Arguments, result and errors as for `initialize`.
        """
        return self._learned(x, context, False)

    def _learned(self: Flow, x: Array, context: Array | None, first: bool) -> Flow:
        x, context = self._entry(x, context)
        check_finite(x, self.event_shape)
        return _absorbed(self, x, context, first)

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

    # The pair for one event, without checks: what a layer calls on the layers in it.

    def _forward_pair(self, x: Array, context: Array | None) -> Pair:
        return self.forward_and_ladj(x, context)

    def _inverse_pair(self, y: Array, context: Array | None) -> Pair:
        return self.inverse_and_ladj(y, context)

    def _outermost(self, x: Array, context: Array | None, forward: bool) -> Pair:
        """Check a batch of events, and map over it."""
        x, context = self._entry(x, context, at_base=forward)
        return _mapped(self, x, context, forward)

    def _entry(
        self, x: Array, context: Array | None = None, *, at_base: bool = False
    ) -> tuple[Array, Array | None]:
        """Check an input and its context; broadcast both to their joint batch shape."""
        event_shape = self.base_shape if at_base else self.event_shape
        x = check_event(x, event_shape)
        if context is not None:
            check_context(context, self.context_dim)
            joint = jnp.broadcast_shapes(x.shape[: x.ndim - len(event_shape)], context.shape[:-1])
            x = jnp.broadcast_to(x, (*joint, *event_shape))
            context = jnp.broadcast_to(context, (*joint, self.context_dim))
        elif self.context_dim:
            raise ValueError(
                f"`context` is missing: this flow was built with context_dim={self.context_dim}; "
                "use flow.condition(context)"
            )
        return x, context

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
        check_shape(shape, event_shape)
        return tuple(shape[: len(shape) - len(event_shape)])

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

    def eq(self, other: object, static: bool = False) -> Any:
        """Whether another transform is built alike and has equal arrays.

        Args:
            other: the other one.
            static: whether the answer is a plain bool, also within `jit`: traced arrays are equal
                then if they are the same.
        """
        if type(other) is not type(self):
            return False
        if not static:
            return eqx.tree_equal(self, other)
        leaves, others = jax.tree.leaves(self), jax.tree.leaves(other)
        alike = jax.tree.structure(self) == jax.tree.structure(other)
        return alike and all(map(_same, leaves, others))

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


_PAIR = {"forward_and_ladj": "_forward_pair", "inverse_and_ladj": "_inverse_pair"}


def _with_context(method: Callable[..., Pair], takes_context: bool) -> Callable[..., Pair]:
    """Return a layer's method with a context as its last argument, which is passed on if taken."""

    @functools.wraps(method)
    def plain(self: TransformModule, x: Array, context: Array | None = None) -> Pair:
        if not takes_context:
            return method(self, x)
        return method(self, x, context if self.context_dim else None)

    return plain


def _checked(method: Callable[..., Pair]) -> Callable[..., Pair]:
    """Return a layer's method for batches, its inputs checked, as its users call it."""
    forward = method.__name__ == "forward_and_ladj"

    @functools.wraps(method)
    def checked(self: TransformModule, x: Array, context: Array | None = None) -> Pair:
        return self._outermost(x, context, forward)

    return checked


# A flow runs under jit even where its user does not: a bare scan would be compiled at every call.
@eqx.filter_jit
def _mapped(flow: TransformModule, x: Array, context: Array | None, forward: bool) -> Pair:
    """Map events, each with its context, from base to data or back."""
    flow = frozen(flow)
    pair: Callable[..., Pair] = flow._forward_pair if forward else flow._inverse_pair
    for _ in range(x.ndim - len(flow.base_shape if forward else flow.event_shape)):
        pair = jax.vmap(pair)
    y, ladj = pair(x, context)
    return y, ladj.astype(y.dtype)


@eqx.filter_jit
def _absorbed(flow: Flow, x: Array, context: Array | None, first: bool) -> Flow:
    rows = x.reshape(-1, *flow.event_shape)
    contexts = None if context is None else context.reshape(-1, flow.context_dim)
    return flow._absorb(rows, contexts, first)[0]  # type: ignore[return-value]


def _same(a: Any, b: Any) -> bool:
    if a is b or not (eqx.is_array(a) and eqx.is_array(b)):
        return a is b or bool(a == b)
    if isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
        return False
    return a.shape == b.shape and a.dtype == b.dtype and bool((a == b).all())


class Conditioned(TransformModule):
    """A conditional flow with a context: a plain transform.

    Shapes: as the flow's; the batch shape of an event broadcasts with the context's.

    Args:
        flow: the conditional flow.
        context: `(*batch, context_dim)`.
    """

    inputs: ClassVar[tuple[str, ...]] = ("context",)  # not trained, but differentiable

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

    def forward_and_ladj(self, x: Array) -> Pair:
        """Map base to data, given the context."""
        return self.flow._forward_pair(x, self.context)

    def inverse_and_ladj(self, y: Array) -> Pair:
        """Map data to base, given the context."""
        return self.flow._inverse_pair(y, self.context)

    def _outermost(self, x: Array, context: Array | None, forward: bool) -> Pair:
        return self.flow._outermost(x, self.context, forward)

    def _absorb(
        self, y: Array, context: Array | None, first: bool
    ) -> tuple[TransformModule, Array]:
        contexts = jnp.broadcast_to(self.context, (len(y), self.flow.context_dim))
        flow, x = self.flow._absorb(y, contexts, first)
        return replace(self, flow=flow), x

    def _learned(self, x: Array, context: Array | None, first: bool) -> "Conditioned":
        return replace(self, flow=self.flow._learned(x, self.context, first))

    def _batch(self, shape: Sequence[int], event_shape: tuple[int, ...]) -> tuple[int, ...]:
        batch = super()._batch(shape, event_shape)
        return jnp.broadcast_shapes(batch, self.context.shape[:-1])


def check_event(x: Any, event_shape: tuple[int, ...], name: str = "x") -> Array:
    """Check that `x` is a real floating-point array of events, and return it as JAX's."""
    if not hasattr(x, "dtype"):
        raise TypeError(f"`{name}` is a {type(x).__name__}, expected a jax.Array")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"`{name}` has dtype {x.dtype}, expected a real floating-point array such as float32"
        )
    check_shape(x.shape, event_shape, name)
    return jnp.asarray(x)


def check_context(context: Any, context_dim: int) -> None:
    """Check that the flow was built for this context."""
    if not context_dim:
        raise ValueError("`context` was given, but this flow was built without (context_dim=0)")
    if not hasattr(context, "dtype") or not jnp.issubdtype(context.dtype, jnp.floating):
        raise TypeError("`context` must be a floating-point jax.Array")
    if context.ndim == 0 or context.shape[-1] != context_dim:
        size = context.shape[-1] if context.ndim else "none"
        raise ValueError(
            f"`context` has last dimension {size}, but this flow was built with "
            f"context_dim={context_dim}"
        )


def check_finite(x: Array, event_shape: tuple[int, ...], name: str = "`x`") -> None:
    """Check that data has rows, all of them finite unless they are traced."""
    rows = x.reshape(-1, math.prod(event_shape))
    if not len(rows):
        raise ValueError(f"{name} of shape {tuple(x.shape)} has no rows")
    if not isinstance(x, jax.core.Tracer):
        check_rows(np.asarray(jnp.isfinite(rows).all(-1)), name)
