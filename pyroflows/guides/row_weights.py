"""Importance weights of a guide with local sites: those of its global sites, and of each row."""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pyroflows.distribution import FlowDistribution
from pyroflows.guides import importance
from pyroflows.guides.autoflow import AutoFlow
from pyroflows.guides.importance import Matched, Model
from pyroflows.guides.local import Taken, log_normal
from pyroflows.guides.rows import Rows
from pyroflows_common.checks import Inputs
from pyroflows_common.laplace import quadrature
from pyroflows_common.local import EQUAL, SURE, TRIED
from pyroflows_common.sites import Draws

# Most numbers of rows that are evaluated at once.
NUMBERS = 2**22


class Weighed(NamedTuple):
    """Draws of a guide with their log-densities.

    Args:
        values: those of each latent site.
        log_q: `(draws,)`, log-density in the guide; with local sites, of the global ones.
        log_p: `(draws,)`, in the model; with local sites, these are integrated out.
        joint: `(draws,)`, log ratio of all sites; None without local ones.
    """

    values: dict[str, Tensor]
    log_q: Tensor
    log_p: Tensor
    joint: Tensor | None


def sample(posterior: Any, matched: Matched, model: Model, inputs: Inputs, draws: int) -> Weighed:
    """Draw from a guide, with the log-densities of each draw in guide and model.

    With local sites, these are integrated out of the model row by row, by quadrature or importance
    sampling, and each row is drawn again by its weights.
    """
    if has_rows(posterior):
        return _with_rows(posterior, model, inputs, draws)
    values, log_q = importance.sample(matched, inputs, draws)
    return Weighed(values, log_q, importance.log_joints(model, inputs, values), None)


def draw(posterior: Any, model: Model, inputs: Inputs, draws: int) -> Draws[Tensor]:
    """Draw from a guide or a density, and evaluate the model at each draw."""
    matched = importance.match(posterior, model, inputs)
    if not has_rows(posterior):
        values, log_q = importance.sample(matched, inputs, draws)
        return importance.evaluate(matched, model, inputs, values, log_q)
    found = _with_rows(posterior, model, inputs, draws)
    drawn = importance.evaluate(matched, model, inputs, found.values, found.log_q)
    # The ratio is that of the global sites, but the density of the draws is that of all sites.
    ratio = found.log_p.double() - found.log_q.double()
    return drawn._replace(log_q=drawn.log_p.double() - ratio, joint=found.joint)


def has_rows(posterior: Any) -> bool:
    """Return whether a guide has local sites."""
    return isinstance(posterior, AutoFlow) and posterior._groups is not None


def log_mean(ratios: Float[Tensor, "K *batch N"]) -> tuple[Tensor, Tensor]:
    """Return the logarithm of the mean of each row's ratios, and its standard error.

    The mean is without its bias of first order.

    The ratios come in pairs of opposite noise.
    """
    top = ratios.amax(0)
    shares = (ratios - top.where(top.isfinite(), 0.0)).exp()
    pairs = shares.reshape(2, -1, *top.shape).mean(0)
    mean = pairs.mean(0)
    variance = pairs.var(0) / (len(pairs) * mean**2)
    return top + mean.log() + 0.5 * variance, variance.sqrt()


def _with_rows(posterior: Any, model: Model, inputs: Inputs, draws: int) -> Weighed:
    groups, transform = posterior._groups, posterior.get_transform()
    size, _ = groups.taken(model, inputs)
    layout = groups.layout._replace(size=size, taken=size)
    rows = Rows(model, inputs, layout, posterior._locs())
    local, density = transform.rows, posterior._posterior(FlowDistribution)
    index = torch.arange(size, device=local.start.device)
    taken = local.taken(index, groups.features_of(index, size, inputs))
    rule = None
    if groups.encoding is None and local.is_searched():
        rule = quadrature(local.width)  # without noise, where the rows are not far from their start

    def ratios(noise: Tensor, x: Tensor, white: Tensor, taken: Taken) -> tuple[Tensor, ...]:
        """Return density of the global sites, ratios of the rows and the rows, `(K, S, N)` each."""
        count, lead = len(noise), noise.shape[:2]
        white = white.expand(count, *white.shape)
        w, inner = taken.inner(noise, white)
        z, outer = taken.outer(w)
        many = x.repeat(count, 1), z.flatten(0, 1), index.expand(count * len(x), -1)
        whole, each = rows.densities(*many)
        found = each.reshape(*lead, -1) + inner + outer - log_normal(noise)
        return whole[: len(x)], found.where(found.isfinite(), -math.inf), z

    def some(count: int) -> tuple[Any, ...]:
        x = density.sample((count,))
        white, log_q = transform.layers[-1].inv(x), density.log_prob(x)
        half = torch.randn(TRIED // 2, count, size, local.width).to(x)
        whole, tried, z = ratios(torch.cat([half, -half]), x, white, taken)
        marginal, error = log_mean(tried)
        if rule is not None:
            nodes, log_weights = (torch.as_tensor(a).to(x) for a in rule)
            placed = nodes[:, None, None].expand(-1, count, size, -1)
            at_nodes = ratios(placed, x, white, taken.at_start())[1]
            smooth = (at_nodes + log_weights[:, None, None]).logsumexp(0)
            marginal = smooth.where((smooth - marginal).abs() < SURE * error + EQUAL, marginal)
        chosen = (tried - torch.log(-torch.log(torch.rand_like(tried)))).argmax(0)
        z = z.gather(0, chosen[None, ..., None].expand(1, *z.shape[1:]))[0]
        values = {**posterior._constrained(x), **groups.constrained(z)}
        log_p = whole + marginal.sum(-1)
        return values, log_q, log_p, whole + tried[0].sum(-1) - log_q

    nodes = 0 if rule is None else len(rule[0])
    block = min(max(NUMBERS // ((TRIED + nodes) * size * local.width), 1), importance.BLOCK)
    parts = [some(min(block, draws - start)) for start in range(0, draws, block)]
    values = {name: torch.cat([part[0][name] for part in parts]) for name in parts[0][0]}
    return Weighed(values, *(torch.cat(part) for part in list(zip(*parts, strict=True))[1:]))
