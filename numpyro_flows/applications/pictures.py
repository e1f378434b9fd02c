"""Pictures of densities in the plane."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import Distribution

from numpyro_flows.support import log_prob_inside
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
        >>> import jax
        >>> from numpyro_flows import flow_distribution, plot_density, realnvp
        >>> density = flow_distribution(realnvp(2, key=jax.random.key(0)))
        >>> figure = plot_density(density, jax.random.normal(jax.random.key(1), (100, 2)))
        >>> len(figure.axes)
        1
    """
    if (density.batch_shape, density.event_shape) != ((), (2,)):
        raise ValueError(
            f"`density` has batch shape {density.batch_shape} and event shape "
            f"{density.event_shape}, expected () and (2,)"
        )
    some = density.sample(jax.random.key(0), (1000,))

    def log_prob(points: np.ndarray) -> np.ndarray:
        return np.asarray(log_prob_inside(density, jnp.asarray(points, some.dtype)))

    return draw_density(log_prob, as_numpy(some), data, as_count(size, "size", 2))
