"""The base of every layer: one pair of methods in, a Pyro transform out; and their composition."""

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions.conditional import ConditionalTransform
from pyro.distributions.torch_transform import TransformModule as PyroTransformModule
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import constraints

from pyroflows.checks import (
    as_count,
    as_event_shape,
    check_context,
    check_event,
    check_finite,
    check_shape,
)
from pyroflows.event import Event
from pyroflows.memo import Memo, has_storage, plain
from pyroflows.recipe import Recipe


class TransformModule(PyroTransformModule):
    """A bijection with parameters, and all that Pyro wants to know of one.

    A layer implements two methods, `forward_and_ladj` and `inverse_and_ladj`. Everything else,
    `__call__`, `inv`, `log_abs_det_jacobian` and the shape methods, follows from them. Calling a
    flow maps base samples to data, `x = flow(z)`; `flow.inv` maps data to base. A layer with a
    `context_dim` is given the context, `(*batch, context_dim)`, as a second argument of the two.

    Args:
        event_shape: shape of the data's events, an int or a tuple of ints.
        base_shape: shape of the base's events; by default the same.
        context_dim: size of the context vector; 0 for none.

    Attributes:
        base: name of the base distribution that the flow was last fitted with. Copies, pickles
            and `save` keep it; torch's `state_dict` holds tensors alone.

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
        self._memo: Memo | None = None

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map base to data: `(*batch, *base_shape)` to `(y, log|det dy/dx|)`."""
        raise NotImplementedError(f"{type(self).__name__} does not implement forward_and_ladj")

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Map data to base: `(*batch, *event_shape)` to `(x, log|det dx/dy|)`."""
        raise NotImplementedError(f"{type(self).__name__} does not implement inverse_and_ladj")

    # How a flow passes an event on. Layers that look at its parts override it.

    def _forward_event(self, event: Event) -> tuple[Event, Tensor]:
        context = [event.context] if self.context_dim else []
        y, ladj = self.forward_and_ladj(event.whole(), *context)
        return event.to(y), ladj

    def _inverse_event(self, event: Event) -> tuple[Event, Tensor]:
        context = [event.context] if self.context_dim else []
        x, ladj = self.inverse_and_ladj(event.whole(), *context)
        return event.to(x), ladj

    def _absorb(self, event: Event, first: bool) -> Event:
        """Learn the data's moments on the way from data to base (see `initialize`, `update`)."""
        return self._inverse_event(event)[0]

    # Data-dependent state

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None) -> "TransformModule":
        """Initialise what starts from data: ActNorm and batch normalisations.

        Each such layer that is not yet initialised takes the moments of the batch as the layers
        between it and the data have encoded it. `fit` calls this on its first batch; nothing
        else does.

        Args:
            x: data `(*batch, *event_shape)`.
            context: context `(*batch, context_dim)` of a conditional flow.

        Returns:
            The flow itself.

        Raises:
            ValueError: where `x` has no rows or some that are not finite.
        """
        self._absorb(self._entry(check_finite(x, self.event_shape, "x"), context), True)
        return self

    @torch.no_grad()
    def update(self, x: Tensor, context: Tensor | None = None) -> "TransformModule":
        """Move the running averages of every batch normalisation towards a batch of data.

        `fit` calls this before every step. Arguments, result and errors as for `initialize`.
        """
        self._absorb(self._entry(check_finite(x, self.event_shape, "x"), context), False)
        return self

    def scale_penalty(self) -> Tensor:
        """Sum of the squared learned factors of the tanh scales (RealNVP's L2 penalty)."""
        terms = [m.penalty() for m in self.modules() if callable(getattr(m, "penalty", None))]
        return torch.stack(terms).sum() if terms else torch.zeros(())

    # Context

    def condition(self, context: Tensor) -> "Conditioned":
        """Return the plain transform that this conditional flow is, given a context.

        Args:
            context: `(*batch, context_dim)`; its batch shape broadcasts with the events'.

        Raises:
            ValueError: where the flow takes no context, or one of another size.

        In Pyro's `ConditionalTransformedDistribution` a plain layer beside conditional ones goes
        into a `Chain` with them, or into Pyro's `ConstantConditionalTransform`.
        """
        return Conditioned(self, context)

    def _entry(self, x: Tensor, context: Tensor | None = None, *, at_base: bool = False) -> Event:
        """Check an input and its context, and return them as the event that a flow passes on."""
        event_shape = self.base_shape if at_base else self.event_shape
        check_event(x, event_shape)
        if context is not None:
            check_context(context, self.context_dim)
            batch = len(x.shape) - len(event_shape)
            joint = torch.broadcast_shapes(x.shape[:batch], context.shape[:-1])
            x = x.expand(*joint, *event_shape)
        elif self.context_dim:
            raise ValueError(
                f"`context` is missing: this flow was built with context_dim={self.context_dim}; "
                "use flow.condition(context)"
            )
        return Event(x, None, context)

    # What Pyro asks for

    @property
    def domain(self) -> constraints.Constraint:
        """Real events."""
        return constraints.independent(constraints.real, len(self.base_shape))

    @property
    def codomain(self) -> constraints.Constraint:
        """Real events."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        """Shape of the data that a base sample of this shape is mapped to."""
        return self._batch(shape, self.base_shape) + self.event_shape

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        """Shape of the base sample that data of this shape is mapped to."""
        return self._batch(shape, self.event_shape) + self.base_shape

    def _batch(self, shape: Sequence[int], event_shape: tuple[int, ...]) -> torch.Size:
        """Check the shape of some events, and return its batch shape."""
        shape = check_shape(shape, event_shape)
        return shape[: len(shape) - len(event_shape)]

    def with_cache(self, cache_size: int = 1) -> "TransformModule":
        """Return the flow itself: nothing here depends on the size of Pyro's cache."""
        return self

    def clear_cache(self) -> None:
        """Forget the last evaluation. Never needed for correct results."""
        self._memo = None

    def _call(self, x: Tensor) -> Tensor:
        y, ladj = self.forward_and_ladj(x)
        self._remember(y, x, ladj, forward=True)
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        x, ladj = self._inverse_pair(y)
        self._remember(x, y, ladj, forward=False)
        return x

    def _inverse_pair(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return `inverse_and_ladj(y)`, free of charge where `y` has just come out of the flow."""
        # What is remembered is a function of the base, without the gradient in y that y has.
        tracked = torch.is_grad_enabled() and y.requires_grad
        memo = None if tracked else self._recall(y, forward=True)
        if memo is None:
            return self.inverse_and_ladj(y)
        return memo.other.clone(), -memo.ladj

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return `log|det dy/dx|`, batch-shaped, for a pair with `y = flow(x)`."""
        memo = self._recall(y, forward=True)
        if memo is None or memo.other is not x:
            memo = self._recall(x, forward=False)
            if memo is None or memo.other is not y:
                return -self.inverse_and_ladj(y)[1]
        # Once only: a second use might want to go backward through a graph that is freed by then.
        self._memo = None
        return memo.ladj if memo.forward else -memo.ladj

    # The host calls a value and its log-determinant one by one. The memo holds what the last call
    # has computed for as long as its output lives, and is believed only while all that the output
    # was computed from is unchanged. Version counters cannot tell: pyro.optim.ClippedAdam, among
    # others, writes through `.data`. So the memo compares the numbers themselves.

    def _state(self) -> tuple[list[Tensor], list[Any]] | None:
        """List the tensors and settings that a call depends on; None where that cannot be known."""
        tensors: list[Tensor] = []
        settings: list[Any] = []
        modules: list[nn.Module] = [self]
        # As `parameters()` and `buffers()`, which take as long as a coupling.
        while modules:
            module = modules.pop()
            if isinstance(module, PyroModule):  # its parameters may be random variables
                return None
            for name, value in vars(module).items():
                if isinstance(value, Tensor):
                    tensors.append(value)
                elif name not in _INTERNAL:
                    settings.append(plain(value))
                    if settings[-1] is NotImplemented:  # a function, for one, may look at anything
                        return None
            tensors += [t for t in module._parameters.values() if t is not None]
            tensors += [t for t in module._buffers.values() if t is not None]
            modules += [m for m in module._modules.values() if m is not None]
        return tensors, settings

    def _remember(self, output: Tensor, other: Tensor, ladj: Tensor, forward: bool) -> None:
        if torch.compiler.is_compiling() or output is other or not has_storage(output):
            return
        state = self._state()
        if state is not None:
            self._memo = Memo(output, other, ladj, forward, *state)

    def _recall(self, output: Tensor, forward: bool) -> Memo | None:
        if torch.compiler.is_compiling():
            return None
        memo = self._memo
        if memo is None or memo.forward is not forward or memo.output() is not output:
            return None
        return memo if memo.holds(output, self._state()) else None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_memo": None}

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)


# What torch and Pyro keep on every module, and a flow for others.
_INTERNAL = (set(vars(nn.Module())) - {"training"}) | {
    "_memo", "_inv", "_cache_size", "_cached_x_y", "base", "recipe",
}  # fmt: skip

# Registered, not inherited: PyroModule cannot take in a class whose metaclass is ABCMeta.
ConditionalTransform.register(TransformModule)


class OnEvents(TransformModule):
    """A transform that is told how it passes an event on, in parts or whole.

    To be subclassed, not used: a subclass has `_forward_event` and `_inverse_event`.
    """

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map base to data."""
        event, ladj = self._forward_event(self._entry(x, at_base=True))
        return event.whole(), ladj

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Map data to base."""
        event, ladj = self._inverse_event(self._entry(y))
        return event.whole(), ladj


class Conditioned(TransformModule):
    """A conditional flow together with a context: a plain transform.

    Shapes: as the flow's; the batch shape of an event broadcasts with the context's.
    """

    flow: TransformModule
    context: Tensor

    def __init__(self, flow: TransformModule, context: Tensor) -> None:
        check_context(context, flow.context_dim)
        super().__init__(flow.event_shape, base_shape=flow.base_shape)
        self.flow, self.base = flow, flow.base
        self.register_buffer("context", context)

    @property
    def domain(self) -> constraints.Constraint:
        """As the flow's."""
        return self.flow.domain

    @property
    def codomain(self) -> constraints.Constraint:
        """As the flow's."""
        return self.flow.codomain

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map base to data, given the context."""
        event, ladj = self.flow._forward_event(self.flow._entry(x, self.context, at_base=True))
        return event.whole(), ladj

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Map data to base, given the context."""
        event, ladj = self.flow._inverse_event(self.flow._entry(y, self.context))
        return event.whole(), ladj

    def _absorb(self, event: Event, first: bool) -> Event:
        return event.to(
            self.flow._absorb(self.flow._entry(event.whole(), self.context), first).whole()
        )

    def _batch(self, shape: Sequence[int], event_shape: tuple[int, ...]) -> torch.Size:
        batch = super()._batch(shape, event_shape)
        return torch.broadcast_shapes(batch, self.context.shape[:-1])
