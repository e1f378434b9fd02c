"""Base class of all layers: it turns one pair of methods into a Pyro transform."""

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Shaped
from pyro.distributions.conditional import ConditionalTransform
from pyro.distributions.torch_transform import TransformModule as PyroTransformModule
from torch import Tensor, nn
from torch.distributions import constraints

from pyroflows.inputs import as_context, check_event, check_finite
from pyroflows.support import check_support
from pyroflows_common.checks import as_count, as_event_shape, check_shape, joint_batch
from pyroflows_common.recipe import Recipe

# A value and the log-determinant of the map that gave it; the context of a conditional layer,
# whose batch shape broadcasts with that of the events.
Pair = tuple[Float[Tensor, "..."], Float[Tensor, "*batch"]]
Context = Shaped[Tensor, "*#batch context_dim"] | None
# Data that arrives in parts, each with its weights if any.
Parts = Iterator[tuple[Float[Tensor, "n ..."], Float[Tensor, " n"] | None]]


class TransformModule(PyroTransformModule):
    """A parametric bijection with the interface of a Pyro transform.

    A layer implements two methods, `forward_and_ladj` and `inverse_and_ladj`. Everything else,
    `__call__`, `inv`, `log_abs_det_jacobian` and the shape methods, follows from them. Calling a
    flow maps base samples to data, `x = flow(z)`; `flow.inv` maps data to base. The context,
    `(*batch, context_dim)`, is the second argument of both methods; a layer that takes no context
    may omit it. The base class checks all inputs before a layer sees them.

    Args:
        event_shape: shape of the data events, an int or a tuple of ints.
        base_shape: shape of the base events; `event_shape` by default.
        context_dim: size of the context vector; 0 for none.

    Attributes:
        base: name of the base distribution of the last fit. Copies, pickles and `save` keep it;
            torch's `state_dict` holds only tensors.

    Examples:
        >>> import torch
        >>> from pyroflows import TransformModule
        >>> class Scale(TransformModule):
        ...     def __init__(self, event_shape):
        ...         super().__init__(event_shape)
        ...         self.log_scale = torch.nn.Parameter(torch.ones(self.event_shape))
        ...
        ...     def forward_and_ladj(self, x):
        ...         return x * self.log_scale.exp(), self.log_scale.sum().expand(x.shape[:-1])
        ...
        ...     def inverse_and_ladj(self, y):
        ...         return y * (-self.log_scale).exp(), -self.log_scale.sum().expand(y.shape[:-1])
        >>> scale = Scale(2)
        >>> scale.log_abs_det_jacobian(torch.ones(3, 2), scale(torch.ones(3, 2))).tolist()
        [2.0, 2.0, 2.0]
    """

    bijective = True

    def __init__(
        self,
        event_shape: int | Sequence[int],
        *,
        base_shape: int | Sequence[int] | None = None,
        context_dim: int = 0,
    ) -> None:
        super().__init__()
        self.event_shape = as_event_shape(event_shape)
        self.base_shape = self.event_shape if base_shape is None else as_event_shape(base_shape)
        self.context_dim = as_count(context_dim, "context_dim", 0)
        self.base = "normal"
        self.recipe: Recipe | None = None
        self._memo: _Memo | None = None
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

    def forward_and_ladj(self, x: Float[Tensor, "..."], context: Context = None) -> Pair:
        """Map base to data.

        Args:
            x: base samples `(*batch, *base_shape)`.
            context: `(*batch, context_dim)` of a conditional layer.

        Returns:
            `y`, `(*batch, *event_shape)`, and `log|det dy/dx|`, `(*batch,)`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement forward_and_ladj")

    def inverse_and_ladj(self, y: Float[Tensor, "..."], context: Context = None) -> Pair:
        """Map data to base.

        Args:
            y: data `(*batch, *event_shape)`.
            context: `(*batch, context_dim)` of a conditional layer.

        Returns:
            `x`, `(*batch, *base_shape)`, and `log|det dx/dy|`, `(*batch,)`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement inverse_and_ladj")

    # Data-dependent state

    def _absorb(self, y: Tensor, context: Context, first: bool) -> Tensor:
        """Learn moments from data `(n, *event_shape)` and encode it; see `initialize`, `update`."""
        return self._inverse_pair(y, context)[0]

    def _standardize(self, parts: Parts) -> Parts | None:
        """Let the layer at the data end learn the moments of data that arrives in parts.

        Return the encoded parts for the layer before it, or None if this one has learned them.
        """
        raise ValueError(
            f"`standardize` is true, but the flow ends in {type(self).__name__}: append "
            f"Standardization({self.event_shape})"
        )

    @torch.no_grad()
    def initialize(self, x: Float[Tensor, "..."], context: Context = None) -> "TransformModule":
        """Initialise the data-dependent layers, ActNorm and batch normalisation, from a batch.

        Each layer that is not yet initialised takes the moments of the batch as encoded by the
        layers between it and the data. `fit` calls this on its first batch; nothing else does.

        Args:
            x: data `(*batch, *event_shape)`.
            context: context `(*batch, context_dim)` of a conditional flow.

        Returns:
            The flow itself.

        Raises:
            ValueError: if `x` has no rows, or some that are not finite or not in the codomain.
        """
        x, context = self._entry(x, context)
        check_finite(x, self.event_shape)
        check_support(x, self.codomain)
        self._absorb(x, context, True)
        return self

    @torch.no_grad()
    def update(self, x: Float[Tensor, "..."], context: Context = None) -> "TransformModule":
        """Update the running averages of every batch normalisation with a batch of data.

        `fit` calls this before every step. Arguments, result and errors are those of `initialize`.
        """
        x, context = self._entry(x, context)
        check_finite(x, self.event_shape)
        check_support(x, self.codomain)
        self._absorb(x, context, False)
        return self

    def scale_penalty(self) -> Float[Tensor, ""]:
        """Return the sum of the squared factors of all tanh scales (RealNVP's L2 penalty)."""
        terms = [m.penalty() for m in self.modules() if callable(getattr(m, "penalty", None))]
        return torch.stack(terms).sum() if terms else torch.zeros(())

    # Context

    def condition(self, context: Shaped[Tensor, "*batch context_dim"]) -> "Conditioned":
        """Return this conditional flow as a plain transform with a fixed context.

        Args:
            context: `(*batch, context_dim)`; its batch shape broadcasts with the events'.

        Raises:
            ValueError: if the flow takes no context or one of another size.

        In Pyro's `ConditionalTransformedDistribution`, combine plain and conditional layers in a
        `Chain`, or wrap the plain ones in Pyro's `ConstantConditionalTransform`.
        """
        return Conditioned(self, context)

    # The pair without checks: layers call it on the layers that they contain.

    def _forward_pair(self, x: Tensor, context: Context) -> Pair:
        return self.forward_and_ladj(x, context)

    def _inverse_pair(self, y: Tensor, context: Context) -> Pair:
        return self.inverse_and_ladj(y, context)

    def _entry(
        self, x: Tensor, context: Context = None, *, at_base: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Check an input and its context; broadcast the input to their joint batch shape."""
        event_shape = self.base_shape if at_base else self.event_shape
        check_event(x, event_shape)
        if context is not None:
            context = as_context(context, self.context_dim, x.dtype)
            batch = len(x.shape) - len(event_shape)
            joint = joint_batch(x.shape[:batch], context.shape[:-1])
            x = x.expand(*joint, *event_shape)
        elif self.context_dim:
            raise ValueError(
                f"`context` is missing: this flow was built with context_dim={self.context_dim}; "
                "use flow.condition(context)"
            )
        return x, context

    # The interface of Pyro's transforms

    @property
    def domain(self) -> constraints.Constraint:
        """Real events."""
        return constraints.independent(constraints.real, len(self.base_shape))

    @property
    def codomain(self) -> constraints.Constraint:
        """Real events."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        """Return the shape of the data for base samples of this shape."""
        return self._batch(shape, self.base_shape) + self.event_shape

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        """Return the shape of the base samples for data of this shape."""
        return self._batch(shape, self.event_shape) + self.base_shape

    def _batch(self, shape: Sequence[int], event_shape: tuple[int, ...]) -> torch.Size:
        """Check the shape of a batch of events, and return its batch shape."""
        check_shape(shape, event_shape)
        return torch.Size(shape[: len(shape) - len(event_shape)])

    def with_cache(self, cache_size: int = 1) -> "TransformModule":
        """Return the flow itself, which does not use Pyro's cache."""
        return self

    def clear_cache(self) -> None:
        """Forget the last evaluation. Never needed for correct results."""
        self._memo = None

    # The host asks for a value and its log-determinant separately, but one evaluation gives both:
    # the memo keeps the second for the host's next call. It identifies a pair by its two tensors
    # and cannot go stale when the flow changes: it holds the log-determinant of the map between
    # these two.

    def _call(self, x: Tensor) -> Tensor:
        y, ladj = self.forward_and_ladj(x)
        self._remember(x, y, ladj)
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        x, ladj = self.inverse_and_ladj(y)
        self._remember(x, y, -ladj)
        return x

    def log_abs_det_jacobian(
        self, x: Float[Tensor, "..."], y: Float[Tensor, "..."]
    ) -> Float[Tensor, "*batch"]:
        """Return `log|det dy/dx|`, batch-shaped, for a pair with `y = flow(x)`."""
        memo = self._memo  # read once: another thread may take it
        if memo is not None and not torch.compiler.is_compiling():
            self._memo = None
            ladj = memo.recall(x, y)
            if ladj is not None:
                return ladj
        return -self.inverse_and_ladj(y)[1]

    def _remember(self, x: Tensor, y: Tensor, ladj: Tensor) -> None:
        # Inference tensors have no version to compare.
        if not (torch.compiler.is_compiling() or x.is_inference() or y.is_inference()):
            self._memo = _Memo(x, y, ladj)

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_memo": None}

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)


# Registered, not inherited: PyroModule cannot wrap a class whose metaclass is ABCMeta.
ConditionalTransform.register(TransformModule)

_PAIR = {"forward_and_ladj": "_forward_pair", "inverse_and_ladj": "_inverse_pair"}


def _with_context(method: Callable[..., Pair], takes_context: bool) -> Callable[..., Pair]:
    """Add a context argument to a layer's method, which receives it only if it takes one."""

    @functools.wraps(method)
    def plain(self: TransformModule, x: Float[Tensor, "..."], context: Context = None) -> Pair:
        if not takes_context:
            return method(self, x)
        return method(self, x, context if self.context_dim else None)

    return plain


def _take_context(cls: type[TransformModule]) -> bool:
    """Whether both methods of a layer take a context."""
    return all(len(inspect.signature(getattr(cls, name)).parameters) > 2 for name in _PAIR)


def _checked(method: Callable[..., Pair], plain: Callable[..., Pair]) -> Callable[..., Pair]:
    """Return the public form of a layer's method, which checks its inputs."""
    at_base = method.__name__ == "forward_and_ladj"

    @functools.wraps(method)
    def checked(self: TransformModule, x: Float[Tensor, "..."], context: Context = None) -> Pair:
        return plain(self, *self._entry(x, context, at_base=at_base))

    return checked


def example(module: nn.Module) -> Tensor:
    """Return some floating-point tensor of a module; one of the default dtype without any."""
    # Like `parameters()`, but torch.compile can trace it: `parameters()` hashes the modules, and
    # Pyro's transforms define their own hash.
    found = _example(module)
    return torch.zeros(()) if found is None else found


def _example(module: nn.Module) -> Tensor | None:
    for tensor in [*module._parameters.values(), *module._buffers.values()]:
        if tensor is not None and tensor.dtype.is_floating_point:
            return tensor
    examples = (_example(child) for child in module._modules.values() if child is not None)
    return next((example for example in examples if example is not None), None)


class _Memo:
    """The log-determinant of the last pair, valid for one use while both tensors are alive."""

    __slots__ = ("__weakref__", "x", "y", "state", "ladj")

    def __init__(self, x: Tensor, y: Tensor, ladj: Tensor) -> None:
        memo = weakref.ref(self)

        def forget(_: weakref.ref[Tensor]) -> None:
            dead = memo()
            if dead is not None:
                dead.ladj = None

        self.x, self.y = weakref.ref(x, forget), weakref.ref(y, forget)
        self.state = self._state(x, y)
        self.ladj: Tensor | None = ladj

    def recall(self, x: Tensor, y: Tensor) -> Tensor | None:
        """Return the log-determinant if this is the pair, unchanged, in the same grad mode."""
        known = self.x() is x and self.y() is y and self.state == self._state(x, y)
        return self.ladj if known else None

    @staticmethod
    def _state(x: Tensor, y: Tensor) -> tuple[int, int, bool]:
        return x._version, y._version, torch.is_grad_enabled()


class Conditioned(TransformModule):
    """A conditional flow with a fixed context: a plain transform.

    Shapes: those of the flow; the batch shapes of events and context broadcast.

    Args:
        flow: the conditional flow.
        context: `(*batch, context_dim)`.
    """

    flow: TransformModule
    context: Tensor

    def __init__(
        self, flow: TransformModule, context: Shaped[Tensor, "*batch context_dim"]
    ) -> None:
        context = as_context(context, flow.context_dim, example(flow).dtype)
        super().__init__(flow.event_shape, base_shape=flow.base_shape)
        self.flow, self.base = flow, flow.base
        self.register_buffer("context", context)

    @property
    def domain(self) -> constraints.Constraint:
        """The domain of the flow."""
        return self.flow.domain

    @property
    def codomain(self) -> constraints.Constraint:
        """The codomain of the flow."""
        return self.flow.codomain

    def forward_and_ladj(self, x: Float[Tensor, "..."]) -> Pair:
        """Map base to data, given the context."""
        return self.flow.forward_and_ladj(x, self.context)

    def inverse_and_ladj(self, y: Float[Tensor, "..."]) -> Pair:
        """Map data to base, given the context."""
        return self.flow.inverse_and_ladj(y, self.context)

    def _absorb(self, y: Tensor, context: Context, first: bool) -> Tensor:
        return self.flow._absorb(*self.flow._entry(y, self.context), first)

    def _batch(self, shape: Sequence[int], event_shape: tuple[int, ...]) -> torch.Size:
        batch = super()._batch(shape, event_shape)
        return torch.Size(joint_batch(batch, self.context.shape[:-1]))
