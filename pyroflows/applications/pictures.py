"""Pictures of densities in the plane."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pyro.distributions import Distribution

from pyroflows.rng import seeded
from pyroflows.support import log_prob_inside
from pyroflows_common.checks import as_count, as_numpy
from pyroflows_common.pictures import draw_density

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_density(density: Distribution, data: Any = None, *, size: int = 150) -> "Figure":
    """Draw a density in the plane, with data on it.

    Args:
        density: a distribution over events of shape `(2,)`, such as that of a flow.
        data: data `(n, 2)`, about which the picture lies. Default: it lies about draws.
        size: number of points on a side at which the density is evaluated.

    Returns:
        A Matplotlib figure.

    Raises:
        ValueError: if the shapes do not fit.
        ImportError: if Matplotlib is not installed.

    Examples:
        >>> import torch
        >>> from pyroflows import flow_distribution, plot_density, realnvp
        >>> figure = plot_density(flow_distribution(realnvp(2)), torch.randn(100, 2))
        >>> len(figure.axes)
        1
    """
    if (tuple(density.batch_shape), tuple(density.event_shape)) != ((), (2,)):
        raise ValueError(
            f"`density` has batch shape {tuple(density.batch_shape)} and event shape "
            f"{tuple(density.event_shape)}, expected () and (2,)"
        )
    with torch.no_grad(), seeded(0):
        some = density.sample(torch.Size((1000,)))

        def log_prob(points: np.ndarray) -> np.ndarray:
            return log_prob_inside(density, torch.from_numpy(points).to(some)).cpu().numpy()

        return draw_density(log_prob, as_numpy(some), data, as_count(size, "size", 2))
