"""Flow distributions: a base distribution and a flow as one Pyro distribution."""

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor

from pyroflows.support import check_base, log_prob_inside
from pyroflows.transform import Context, Pair, TransformModule, example
from pyroflows_common.checks import check_shape

BASES = {"normal": dist.Normal, "logistic": dist.Logistic}


class FlowDistribution(dist.TransformedDistribution):
    """A `TransformedDistribution` of one flow, whose `log_prob` evaluates each network once.

    Created by `flow_distribution`.
    """

    def rsample_and_log_prob(self, sample_shape: Sequence[int] = ()) -> Pair:
        """Return draws and their log-densities, with one evaluation of each network.

        Args:
            sample_shape: shape of the independent draws.

        Returns:
            Draws `(*sample_shape, *batch, *event_shape)` and their log-densities, both
            differentiable in the flow's parameters.
        """
        (flow,) = self.transforms
        x = self.base_dist.rsample(torch.Size(sample_shape))
        y, ladj = flow.forward_and_ladj(x)
        return y, self._log_prob(x, -ladj)

    def log_prob(self, value: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the log-density of `value`, `(*batch, *event_shape)`."""
        if self._validate_args and not torch.compiler.is_compiling():
            self._validate_sample(value)
        (flow,) = self.transforms
        return self._log_prob(*flow.inverse_and_ladj(value))

    def _log_prob(self, x: Tensor, ladj: Tensor) -> Tensor:
        (flow,) = self.transforms
        surplus = tuple(range(len(flow.event_shape) - self.event_dim, 0))
        return log_prob_inside(self.base_dist, x) + (ladj.sum(surplus) if surplus else ladj)


def flow_distribution(
    flow: TransformModule,
    base: "str | dist.TorchDistribution | None" = None,
    *,
    context: Context = None,
    temperature: float = 1.0,
) -> FlowDistribution:
    r"""Return the distribution of `flow(z)` for z from a base distribution.

    $$\log p(x) = \log p_z(z) + \log|\det dz/dx|, \qquad z = \mathrm{flow}^{-1}(x).$$

    Args:
        flow: the flow; the distribution shares its parameters.
        base: `"normal"`, `"logistic"` (NICE, section 3.4), or any Pyro distribution over events of
            the flow's shape. Default: the base of the flow's last fit, at first normal.
        context: `(*batch, context_dim)` for a conditional flow.
        temperature: scale factor of a named base (Glow, section 5).

    Returns:
        A Pyro distribution with the context's batch shape.

    Raises:
        ValueError: if base, context or temperature does not fit the flow.
        TypeError: if `flow` is not a `TransformModule`, or `base` is not a distribution.

    Examples:
        >>> import torch
        >>> from pyroflows import flow_distribution, realnvp
        >>> density = flow_distribution(realnvp(2), temperature=0.7)
        >>> density.sample((5,)).shape
        torch.Size([5, 2])
    """
    if not isinstance(flow, TransformModule):
        raise TypeError(f"`flow` is a {type(flow).__name__}, expected a TransformModule")
    plain = flow
    if context is not None:
        flow = flow.condition(context)
    elif flow.context_dim:
        flow._entry(torch.zeros(flow.event_shape))  # raises the error about the missing context
    if not temperature > 0:
        raise ValueError(f"`temperature` is {temperature}, expected a positive number")
    density = flow.base if base is None else base
    if isinstance(density, str):
        # The distribution validates its values itself; a second validation by the base could not be
        # compiled.
        density = named_base(density, plain, temperature, validate_args=False)
    elif not isinstance(density, torch.distributions.Distribution):
        raise TypeError(f"`base` is {base!r}, expected 'normal', 'logistic' or a distribution")
    elif temperature != 1.0:
        raise ValueError("`temperature` applies to named bases only; scale your own distribution")
    else:
        check_base(density)
    check_shape(density.batch_shape + density.event_shape, flow.base_shape, "base")
    return FlowDistribution(density, [flow])


def named_base(
    name: str, flow: TransformModule, temperature: float = 1.0, validate_args: bool | None = None
) -> dist.TorchDistribution:
    """Return the base distribution of this name on the device and in the dtype of the flow."""
    if name == "custom":
        raise ValueError(
            "`base` is missing: this flow was fitted with a custom base distribution; pass it"
        )
    if name not in BASES:
        raise ValueError(f"`base` is {name!r}, expected one of {sorted(BASES)} or a distribution")
    like = example(flow)
    zeros = torch.zeros(flow.base_shape, dtype=like.dtype, device=like.device)
    scale = torch.full_like(zeros, temperature)
    base = BASES[name](zeros, scale, validate_args=validate_args)
    return base.to_event(len(flow.base_shape))
