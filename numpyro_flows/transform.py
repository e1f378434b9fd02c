"""Base class of all layers: it turns one pair of methods into a NumPyro transform."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Float, Shaped
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform, _InverseTransform

from numpyro_flows.inputs import Contexts, Events, as_context, check_event, check_finite
from numpyro_flows.networks import DataDependent
from numpyro_flows.support import check_support
from numpyro_flows.tree import (
    Module,
    as_dtype,
    dtype_of,
    fields,
    frozen,
    named,
    nodes,
    replace,
    restored,
)
from pyroflows_common.checks import as_count, as_event_shape, check_shape, joint_batch
from pyroflows_common.recipe import Recipe

Fields = tuple[tuple[str, ...], dict[str, object]]  # names of arrays, static fields
Flow = TypeVar("Flow", bound="TransformModule")
# A value and the log-determinant of the map that gave it, for a batch and for one event; the
# context of a conditional layer, whose batch shape broadcasts with that of the events.
Pair = tuple[Float[Array, "..."], Float[Array, "*batch"]]
EventPair = tuple[Float[Array, "..."], Float[Array, ""]]
Context = Shaped[Array | np.ndarray, "*#batch context_dim"] | None
# Data that arrives in parts, each with its weights if any.
Parts = Iterator[tuple[Float[Array | np.ndarray, "n ..."], Float[Array | np.ndarray, " n"] | None]]


class _HostTransform(Transform):
    """NumPyro's transform without its pytree registration: Equinox registers each module."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super(Transform, cls).__init_subclass__(**kwargs)


class TransformModule(eqx.Module, _HostTransform):
    """A parametric bijection: an Equinox module with the interface of a NumPyro transform.

    A layer implements two methods, `forward_and_ladj` and `inverse_and_ladj`. Everything else,
    `__call__`, `inv`, `log_abs_det_jacobian` and the shape methods, follows from them. Calling a
    flow maps base samples to data, `x = flow(z)`; `flow.inv` maps data to base. The context is the
    second argument of both methods; a layer that takes no context may omit it.

    The two methods map one event, `(*event_shape)`, with its context, `(context_dim,)`: the base
    class checks all inputs and maps over batches, so that callers can pass any batch shape.

    Args:
        event_shape: shape of the data events, an int or a tuple of ints.
        base_shape: shape of the base events; `event_shape` by default.
        context_dim: size of the context vector; 0 for none.

    Attributes:
        base: name of the base distribution of the last fit.

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

    # Names of floating-point arrays that are state, not parameters.
    buffers: ClassVar[tuple[str, ...]] = ()
    # Whether a layer that overrides `_absorb` learns itself, and not only the layers in it.
    _learns: ClassVar[bool] = False

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
        if self.context_dim and not _take_context(type(self)):
            raise TypeError(
                f"`context_dim` is {context_dim}, but {type(self).__name__}'s forward_and_ladj and "
                "inverse_and_ladj take no context: add a second argument, `context`, to both"
            )

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        for name, unchecked in _PAIR.items():
            method = vars(cls).get(name)
            if method is not None:
                takes_context = len(inspect.signature(method).parameters) > 2
                plain = _with_context(method, takes_context)
                setattr(cls, unchecked, plain)
                setattr(cls, name, _checked(method, plain))

    def forward_and_ladj(self, x: Events, context: Context = None) -> Pair:
        """Map base to data.

        Args:
            x: base samples `(*batch, *base_shape)`.
            context: `(*batch, context_dim)` of a conditional layer.

        Returns:
            `y`, `(*batch, *event_shape)`, and `log|det dy/dx|`, `(*batch,)`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement forward_and_ladj")

    def inverse_and_ladj(self, y: Events, context: Context = None) -> Pair:
        """Map data to base.

        Args:
            y: data `(*batch, *event_shape)`.
            context: `(*batch, context_dim)` of a conditional layer.

        Returns:
            `x`, `(*batch, *base_shape)`, and `log|det dx/dy|`, `(*batch,)`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement inverse_and_ladj")

    # Data-dependent state

    def _absorb(self, y: Array, context: Context, first: bool) -> "tuple[TransformModule, Array]":
        """Learn moments from data `(n, *event_shape)` and encode it; see `initialize`, `update`."""
        return self, self._encoded(y, context)

    def _encoded(self, y: Array, context: Context) -> Array:
        return jax.vmap(lambda y, context: self._inverse_pair(y, context)[0])(y, context)

    def _standardize(self, parts: Parts) -> "tuple[TransformModule, Parts | None]":
        """Let the layer at the data end learn the moments of data that arrives in parts.

        Return the layer, and the encoded parts for the one before it, or None if this one
        has learned them.
        """
        raise ValueError(
            f"`standardize` is true, but the flow ends in {type(self).__name__}: append "
            f"Standardization({self.event_shape})"
        )

    def initialize(self: Flow, x: Events, context: Context = None) -> Flow:
        """Initialise the data-dependent layers, ActNorm and batch normalisation, from a batch.

        Each layer that is not yet initialised takes the moments of the batch as encoded by the
        layers between it and the data. `fit` calls this on its first batch; nothing else does.

        Args:
            x: data `(*batch, *event_shape)`.
            context: context `(*batch, context_dim)` of a conditional flow.

        Returns:
            The new flow.

        Raises:
            ValueError: if `x` has no rows, or some that are not finite or not in the codomain.
        """
        return self._learned(x, context, True)

    def update(self: Flow, x: Events, context: Context = None) -> Flow:
        """Update the running averages of every batch normalisation with a batch of data.

        `fit` calls this before every step. Arguments, result and errors are those of `initialize`.
        """
        return self._learned(x, context, False)

    def _learned(self: Flow, x: Events, context: Context, first: bool) -> Flow:
        x, context = self._entry(x, context)
        check_finite(x, self.event_shape)
        check_support(x, self.codomain)
        # Compiling is slow: skip it where nothing learns.
        return _absorbed(self, x, context, first) if nodes(self, _has_state) else self

    def scale_penalty(self) -> Float[Array, ""]:
        """Return the sum of the squared factors of all tanh scales (RealNVP's L2 penalty)."""
        return sum((scale.penalty() for scale in nodes(self, has_penalty)), jnp.zeros(()))

    # Context

    def condition(self, context: Contexts) -> "Conditioned":
        """Return this conditional flow as a plain transform with a fixed context.

        Args:
            context: `(*batch, context_dim)`; its batch shape broadcasts with the events'.

        Raises:
            ValueError: if the flow takes no context or one of another size.
        """
        return Conditioned(self, context)

    # The pair for one event, without checks: layers call it on the layers that they contain.

    def _forward_pair(self, x: Array, context: Context) -> Pair:
        return self.forward_and_ladj(x, context)

    def _inverse_pair(self, y: Array, context: Context) -> Pair:
        return self.inverse_and_ladj(y, context)

    def _outermost(self, x: Events, context: Context, forward: bool) -> Pair:
        """Check a batch of events, and map over it."""
        x, context = self._entry(x, context, at_base=forward)
        return _mapped(self, x, context, forward)

    def _entry(
        self, x: Events, context: Context = None, *, at_base: bool = False
    ) -> tuple[Array, Array | None]:
        """Check an input and its context; broadcast both to their joint batch shape."""
        event_shape = self.base_shape if at_base else self.event_shape
        x = check_event(x, event_shape)
        if context is not None:
            context = as_context(context, self.context_dim, x.dtype)
            joint = joint_batch(x.shape[: x.ndim - len(event_shape)], context.shape[:-1])
            x = jnp.broadcast_to(x, (*joint, *event_shape))
            context = jnp.broadcast_to(context, (*joint, self.context_dim))
        elif self.context_dim:
            raise ValueError(
                f"`context` is missing: this flow was built with context_dim={self.context_dim}; "
                "use flow.condition(context)"
            )
        return x, context

    # The interface of NumPyro's transforms

    @property
    def domain(self) -> constraints.Constraint:
        """Real events."""
        return constraints.independent(constraints.real, len(self.base_shape))

    @property
    def codomain(self) -> constraints.Constraint:
        """Real events."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def forward_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the data for base samples of this shape."""
        return self._batch(shape, self.base_shape) + self.event_shape

    def inverse_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the base samples for data of this shape."""
        return self._batch(shape, self.event_shape) + self.base_shape

    def _batch(self, shape: Sequence[int], event_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Check the shape of a batch of events, and return its batch shape."""
        check_shape(shape, event_shape)
        return tuple(shape[: len(shape) - len(event_shape)])

    @property
    def inv(self) -> Transform:
        """The inverse, from data to base; `flow.inv.inv is flow`."""
        return _InverseTransform(self)

    def __call__(self, x: Events) -> Float[Array, "..."]:
        """Map base to data."""
        return self.forward_and_ladj(x)[0]

    def _inverse(self, y: Array) -> Array:
        return self.inverse_and_ladj(y)[0]

    def call_with_intermediates(self, x: Events) -> Pair:
        """Map base to data, and keep the log-determinant for `log_abs_det_jacobian`."""
        return self.forward_and_ladj(x)

    def log_abs_det_jacobian(
        self, x: Events, y: Events, intermediates: Float[Array, "*batch"] | None = None
    ) -> Float[Array, "*batch"]:
        """Return `log|det dy/dx|`, batch-shaped, for a pair with `y = flow(x)`."""
        # The host has just called `inv`: XLA merges the two forward passes.
        return -self.inverse_and_ladj(y)[1] if intermediates is None else intermediates

    def eq(self, other: object, static: bool = False) -> bool | Array:
        """Return whether another transform has the same structure and equal arrays.

        Args:
            other: the other transform.
            static: whether to return a plain bool, also under `jit`, where traced arrays count as
                equal only if they are the same object.
        """
        if type(other) is not type(self):
            return False
        if not static:
            return eqx.tree_equal(self, other)
        leaves, others = jax.tree.leaves(self), jax.tree.leaves(other)
        alike = bool(jax.tree.structure(self) == jax.tree.structure(other))  # type: ignore[operator]
        return alike and all(map(_same, leaves, others))

    def tree_flatten(self) -> tuple[tuple[object, ...], Fields]:
        """Flatten as NumPyro's transforms do; JAX itself flattens a flow as an Equinox module."""
        dynamic = fields(self)
        return tuple(dynamic.values()), (tuple(dynamic), fields(self, static=True))

    @classmethod
    def tree_unflatten(cls, aux_data: Fields, params: Sequence[object]) -> "TransformModule":
        """Undo `tree_flatten`."""
        names, static = aux_data
        module = object.__new__(cls)
        module.__dict__.update(zip(names, params, strict=True), **static)
        return module

    # Arrays by name

    def state_dict(self) -> dict[str, Array]:
        """Return all arrays by name, with the names and shapes of the Pyro wing."""
        return dict(named(self, ""))

    def load_state_dict(self: Module, state: Mapping[str, ArrayLike]) -> Module:
        """Return the flow with its arrays replaced by those of a `state_dict`.

        Raises:
            ValueError: if names or shapes differ from the flow's.
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

    def astype(self: Module, dtype: DTypeLike) -> Module:
        """Return the flow with its floating-point arrays in another dtype."""
        return as_dtype(self, dtype)


def has_penalty(node: object) -> bool:
    """Return whether a node of a flow is a scale with RealNVP's penalty."""
    return callable(getattr(node, "penalty", None))


def _has_state(node: object) -> bool:
    """Return whether a node of a flow has state that depends on data."""
    if not isinstance(node, TransformModule):
        return isinstance(node, DataDependent)
    owner = next(kind for kind in type(node).__mro__ if {"_absorb", "_learns"} & vars(kind).keys())
    return vars(owner).get("_learns", True)


_PAIR = {"forward_and_ladj": "_forward_pair", "inverse_and_ladj": "_inverse_pair"}


def _with_context(method: Callable[..., Pair], takes_context: bool) -> Callable[..., Pair]:
    """Add a context argument to a layer's method, which receives it only if it takes one."""

    @functools.wraps(method)
    def plain(self: TransformModule, x: Float[Array, "..."], context: Context = None) -> Pair:
        if not takes_context:
            return method(self, x)
        return method(self, x, context if self.context_dim else None)

    return plain


def _take_context(cls: type[TransformModule]) -> bool:
    """Whether both methods of a layer take a context."""
    return all(len(inspect.signature(getattr(cls, name)).parameters) > 2 for name in _PAIR)


def _checked(method: Callable[..., Pair], plain: Callable[..., Pair]) -> Callable[..., Pair]:
    """Return the public form of a layer's method, which checks its inputs and takes batches."""
    forward = method.__name__ == "forward_and_ladj"

    @functools.wraps(method)
    def checked(self: TransformModule, x: Events, context: Context = None) -> Pair:
        own = getattr(type(self), _PAIR[method.__name__])
        if inspect.unwrap(own) is not inspect.unwrap(method):  # by super(), which sees one event
            return plain(self, x, context)
        return self._outermost(x, context, forward)

    return checked


# A flow always runs under jit: a scan outside it would be compiled at every call.
@eqx.filter_jit
def _mapped(flow: TransformModule, x: Array, context: Context, forward: bool) -> Pair:
    """Map events, each with its context, from base to data or back."""
    flow = frozen(flow)
    pair: Callable[..., Pair] = flow._forward_pair if forward else flow._inverse_pair
    for _ in range(x.ndim - len(flow.base_shape if forward else flow.event_shape)):
        pair = jax.vmap(pair)
    y, ladj = pair(x, context)
    return y, ladj.astype(y.dtype)


@eqx.filter_jit
def _absorbed(flow: Flow, x: Array, context: Context, first: bool) -> Flow:
    rows = x.reshape(-1, *flow.event_shape)
    contexts = None if context is None else context.reshape(-1, flow.context_dim)
    return flow._absorb(rows, contexts, first)[0]


def _same(a: Any, b: Any) -> bool:
    traced = isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer)
    return a is b or (not traced and bool(eqx.tree_equal(a, b)))


class Conditioned(TransformModule):
    """A conditional flow with a fixed context: a plain transform.

    Shapes: those of the flow; the batch shapes of events and context broadcast.

    Args:
        flow: the conditional flow.
        context: `(*batch, context_dim)`.
    """

    conditions: ClassVar[tuple[str, ...]] = ("context",)  # not trained, but differentiable
    _learns: ClassVar[bool] = False

    flow: TransformModule
    context: Float[Array, "*batch context_dim"]

    def __init__(self, flow: TransformModule, context: Contexts) -> None:
        context = as_context(context, flow.context_dim, dtype_of(flow))
        super().__init__(flow.event_shape, base_shape=flow.base_shape)
        self.flow, self.context, self.base = flow, context, flow.base

    @property
    def domain(self) -> constraints.Constraint:
        """The domain of the flow."""
        return self.flow.domain

    @property
    def codomain(self) -> constraints.Constraint:
        """The codomain of the flow."""
        return self.flow.codomain

    def forward_and_ladj(self, x: Float[Array, "..."]) -> EventPair:
        """Map base to data, given the context."""
        return self.flow._forward_pair(x, self.context)

    def inverse_and_ladj(self, y: Float[Array, "..."]) -> EventPair:
        """Map data to base, given the context."""
        return self.flow._inverse_pair(y, self.context)

    def _outermost(self, x: Events, context: Context, forward: bool) -> Pair:
        self._refuse(context)
        return self.flow._outermost(x, self.context, forward)

    def _absorb(self, y: Array, context: Context, first: bool) -> tuple[TransformModule, Array]:
        contexts = jnp.broadcast_to(self.context, (len(y), self.flow.context_dim))
        flow, x = self.flow._absorb(y, contexts, first)
        return replace(self, flow=flow), x

    def _learned(self, x: Events, context: Context, first: bool) -> "Conditioned":
        self._refuse(context)
        return replace(self, flow=self.flow._learned(x, self.context, first))

    def _refuse(self, context: Context) -> None:
        if context is not None:
            as_context(context, self.context_dim, float)  # which is 0: an error

    def _batch(self, shape: Sequence[int], event_shape: tuple[int, ...]) -> tuple[int, ...]:
        batch = super()._batch(shape, event_shape)
        return joint_batch(batch, self.context.shape[:-1])
