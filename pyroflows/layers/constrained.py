"""Constrained events: the bijection from real events to a support."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import biject_to
from typing_extensions import override

from pyroflows.layers.chain import Chain
from pyroflows.support import inverse_inside, is_real, kept_inside
from pyroflows.transform import Pair, Parts, TransformModule
from pyroflows_common.checks import as_event_shape
from pyroflows_common.recipe import Recipe
from pyroflows_common.support import as_support, check_columns, runs, words

KNOWN = {
    "real": constraints.real,
    "simplex": constraints.simplex,
    "ordered_vector": constraints.ordered_vector,
}


class BijectTo(TransformModule):
    r"""The host's `biject_to` as a layer: it maps real events onto a support.

    For each number, with the ends a and b of an interval,

    $$y = a + e^x, \qquad y = b - e^x \quad\text{or}\quad y = a + (b - a)\,\mathrm{sigmoid}(x);$$

    stick-breaking maps K − 1 real numbers onto a simplex of K numbers. Data outside the support or
    on its edge have the density 0: their ladj is −∞, and x is 0 in place of a number that does not
    exist.

    Shapes: `(*batch, *base_shape)` to `(*batch, *event_shape)`, which differ for a simplex only;
    ladj `(*batch,)`.

    Args:
        event_shape: shape of the constrained events.
        support: a constraint of Pyro on each number, such as `positive`, `interval(a, b)` or
            `greater_than(a)`; `simplex` or `ordered_vector`; or a sequence of constraints, one for
            each number of a vector.

    Attributes:
        support: the support as files hold it: a name, or the ends of each column's interval.

    Raises:
        ValueError: if the support is none of these or does not fit the event's shape.

    Examples:
        >>> import torch
        >>> from pyro.distributions import constraints
        >>> from pyroflows import BijectTo
        >>> BijectTo(2, [constraints.positive, constraints.unit_interval])(torch.zeros(2)).tolist()
        [1.0, 0.5]
    """

    def __init__(self, event_shape: int | Sequence[int], support: Any) -> None:
        shape = as_event_shape(event_shape)
        form = as_support(support, KNOWN)
        check_columns(form, shape)
        super().__init__(shape, base_shape=shape[0] - 1 if form == "simplex" else shape)
        self.support = form

    @property
    def codomain(self) -> constraints.Constraint:
        """The support."""
        if isinstance(self.support, str):
            return KNOWN[self.support]
        parts, places = zip(*self._runs(), strict=True)
        inner = parts[0]
        if len(parts) > 1:
            inner = constraints.cat(parts, -1, [place.stop - place.start for place in places])
        return constraints.independent(inner, len(self.event_shape))

    @override
    def forward_and_ladj(self, x: Float[Tensor, "..."]) -> Pair:
        ys, ladj = [], x.new_zeros(())
        for constraint, place in self._runs():
            bijection, part = biject_to(constraint), x[..., place]
            y = bijection(part)
            ladj = ladj + self._sum(bijection.log_abs_det_jacobian(part, y))
            ys.append(kept_inside(y, constraint))
        return torch.cat(ys, -1), ladj

    @override
    def inverse_and_ladj(self, y: Float[Tensor, "..."]) -> Pair:
        xs, ladj = [], y.new_zeros(())
        for constraint, place in self._runs():
            bijection, part = biject_to(constraint), y[..., place]
            x, log_slope = inverse_inside(bijection, part, constraint)
            ladj = ladj - self._sum(log_slope)
            xs.append(x)
        return torch.cat(xs, -1), ladj

    def _standardize(self, parts: Parts) -> Parts:
        return ((self._inverse_pair(y, None)[0], weights) for y, weights in parts)

    def _runs(self) -> Iterator[tuple[constraints.Constraint, slice]]:
        """Yield the constraints, and the columns that each holds for."""
        if isinstance(self.support, str):
            yield KNOWN[self.support], slice(None)
        elif len(self.support) == 1:
            yield between(*self.support[0]), slice(None)
        else:
            for pair, place in runs(self.support):
                yield between(*pair), place

    def _sum(self, log_slope: Tensor) -> Tensor:
        if isinstance(self.support, str):
            return log_slope
        return log_slope.sum(tuple(range(-len(self.event_shape), 0)))


def constrained(flow: TransformModule, support: Any) -> TransformModule:
    """Return a flow on real events with a `BijectTo` at its data end, recorded for `save`."""
    if not is_real(flow.codomain):
        raise ValueError(f"`support` is given, but `flow` has one already: {words(flow.codomain)}")
    form = as_support(support, KNOWN)
    shape = (flow.event_shape[0] + 1,) if form == "simplex" else flow.event_shape
    whole = Chain([flow, BijectTo(shape, form)])
    whole.base = flow.base
    if flow.recipe is not None:
        arguments = (*flow.recipe.arguments, ("support", form))
        whole.recipe = Recipe(flow.recipe.builder, arguments)
    return whole


def between(low: float | None, high: float | None) -> constraints.Constraint:
    """Return the constraint of an interval with these ends, if it has them."""
    if low is None:
        return constraints.real if high is None else constraints.less_than(high)
    return constraints.greater_than(low) if high is None else constraints.interval(low, high)
