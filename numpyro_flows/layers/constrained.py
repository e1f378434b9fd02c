"""Constrained events: the bijection from real events to a support."""

from collections.abc import Iterator, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float
from numpyro.distributions import biject_to, constraints
from typing_extensions import override

from numpyro_flows.layers.chain import Chain
from numpyro_flows.support import inverse_inside, is_real, kept_inside
from numpyro_flows.transform import EventPair, Parts, TransformModule
from numpyro_flows.tree import replace
from pyroflows_common.checks import as_event_shape
from pyroflows_common.recipe import Recipe
from pyroflows_common.support import Support, as_support, check_columns, runs, words

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
        support: a constraint of NumPyro on each number, such as `positive`, `interval(a, b)` or
            `greater_than(a)`; `simplex` or `ordered_vector`; or a sequence of constraints, one for
            each number of a vector.

    Attributes:
        support: the support as files hold it: a name, or the ends of each column's interval.

    Raises:
        ValueError: if the support is none of these or does not fit the event's shape.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro.distributions import constraints
        >>> from numpyro_flows import BijectTo
        >>> BijectTo(2, [constraints.positive, constraints.unit_interval])(jnp.zeros(2)).tolist()
        [1.0, 0.5]
    """

    support: Support = eqx.field(static=True)

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
    def forward_and_ladj(self, x: Float[Array, "..."]) -> EventPair:
        ys, ladj = [], jnp.zeros(())
        for constraint, place in self._runs():
            bijection, part = biject_to(constraint), x[..., place]
            y = bijection(part)
            ladj = ladj + bijection.log_abs_det_jacobian(part, y).sum()
            ys.append(kept_inside(y, constraint))
        return jnp.concatenate(ys, -1), ladj

    @override
    def inverse_and_ladj(self, y: Float[Array, "..."]) -> EventPair:
        xs, ladj = [], jnp.zeros(())
        for constraint, place in self._runs():
            bijection, part = biject_to(constraint), y[..., place]
            x, log_slope = inverse_inside(bijection, part, constraint)
            ladj = ladj - log_slope.sum()
            xs.append(x)
        return jnp.concatenate(xs, -1), ladj

    def _standardize(self, parts: Parts) -> tuple[TransformModule, Parts]:
        return self, ((self._encoded(jnp.asarray(y), None), weights) for y, weights in parts)

    def _runs(self) -> Iterator[tuple[constraints.Constraint, slice]]:
        """Yield the constraints, and the columns that each holds for."""
        if isinstance(self.support, str):
            yield KNOWN[self.support], slice(None)
        elif len(self.support) == 1:
            yield between(*self.support[0]), slice(None)
        else:
            for pair, place in runs(self.support):
                yield between(*pair), place


def constrained(flow: TransformModule, support: Any) -> TransformModule:
    """Return a flow on real events with a `BijectTo` at its data end, recorded for `save`."""
    if not is_real(flow.codomain):
        raise ValueError(f"`support` is given, but `flow` has one already: {words(flow.codomain)}")
    form = as_support(support, KNOWN)
    shape = (flow.event_shape[0] + 1,) if form == "simplex" else flow.event_shape
    recipe = flow.recipe
    if recipe is not None:
        recipe = Recipe(recipe.builder, (*recipe.arguments, ("support", form)))
    return replace(Chain([flow, BijectTo(shape, form)]), base=flow.base, recipe=recipe)


def between(low: float | None, high: float | None) -> constraints.Constraint:
    """Return the constraint of an interval with these ends, if it has them."""
    if low is None:
        return constraints.real if high is None else constraints.less_than(high)
    return constraints.greater_than(low) if high is None else constraints.interval(low, high)
