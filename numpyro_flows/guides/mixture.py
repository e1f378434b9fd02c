"""A mixture of flow guides, one for each mode of a posterior."""

import copy
from collections.abc import Mapping, Sequence
from typing import NoReturn

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array

from numpyro_flows.guides.autoflow import AutoFlow, Params
from numpyro_flows.guides.reference import Start
from pyroflows_common.guides import MIXTURE


class AutoFlowMixture(AutoFlow):
    r"""A mixture of guides that have the same flow and different parameters.

    $$q(z) = \sum_k w_k \, q_k(z)$$

    Everything is as in an `AutoFlow`, except that there is no transform, and no `NeuTraReparam`.
    SVI trains the parts and leaves the weights as they are.

    Args:
        guide: a guide that has been set up, as by a call.
        weights: those of the parts, `(K,)`.

    Raises:
        ValueError: where a transform is asked for.
    """

    def __init__(self, guide: AutoFlow, weights: np.ndarray) -> None:
        self.__dict__.update(guide.__dict__)  # all but the parameters is the same
        self.weights = jnp.asarray(weights, guide._init_latent.dtype)
        self.parts = [copy.copy(guide) for _ in weights]
        for k, part in enumerate(self.parts):
            part.prefix = f"{guide.prefix}_{k}"

    def named(self, params: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
        """Return the mixture's parameters, given those of the guide for each part."""
        prefixes = [part.prefix for part in self.parts]
        return {
            name.replace(self.prefix, prefix, 1): value
            for prefix, own in zip(prefixes, params, strict=True)
            for name, value in own.items()
        }

    def _get_posterior(self) -> dist.Distribution:
        return self._mixed([part._get_posterior() for part in self.parts])

    def get_posterior(self, params: Params) -> dist.Distribution:
        """Return the posterior of the unconstrained latent numbers at these parameters."""
        return self._mixed([part.get_posterior(params) for part in self.parts])

    def _mixed(self, parts: list[dist.Distribution]) -> dist.Distribution:
        return dist.MixtureGeneral(dist.Categorical(probs=self.weights), parts)

    def _reference(self, params: Params) -> Start:
        """Return the layer that tells of coordinates without a posterior."""
        return self.parts[0]._reference(params)

    def get_transform(self, params: Params) -> NoReturn:
        """Raise an error: a mixture has no transform."""
        raise ValueError(MIXTURE)
