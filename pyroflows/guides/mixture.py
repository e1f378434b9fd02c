"""A mixture of flow guides, one for each mode of a posterior."""

from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

import numpy as np
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import constraints

from pyroflows.distribution import FlowDistribution
from pyroflows.guides.autoflow import AutoFlow
from pyroflows.guides.reference import Start
from pyroflows.transform import TransformModule
from pyroflows_common.guides import MIXTURE


class AutoFlowMixture(AutoFlow):
    r"""A mixture of guides that have the same flow and different parameters.

    $$q(z) = \sum_k w_k \, q_k(z)$$

    Everything is as in an `AutoFlow`, except that there is no transform, and no `NeuTraReparam`.
    SVI trains the parts and leaves the weights as they are.

    Args:
        guide: the guide whose model and options are those of the parts.
        transforms: the transform of each part.
        weights: those of the parts, `(K,)`.
        name: name of the mixture in Pyro's parameter store.

    Raises:
        ValueError: where a transform is asked for.
    """

    def __init__(
        self,
        guide: AutoFlow,
        transforms: Sequence[TransformModule],
        weights: np.ndarray,
        *,
        name: str,
    ) -> None:
        super().__init__(guide.model, guide.build, **guide._options(), name=name)
        self._kind = type(guide)
        self._given = [_Parts(transforms, weights)]  # in a list, as the set-up registers it

    def _made(self, wrong: ValueError | None, *args: Any, **kwargs: Any) -> Any:
        (parts,) = self._given
        self._take_name(parts)
        return parts

    def _posterior(self, kind: type[FlowDistribution]) -> dist.TorchDistribution:
        parts, base = self._registered(), self.get_base_dist()
        return Mixture(parts.weights, [kind(base, [transform]) for transform in parts.layers])

    def get_base_dist(self) -> dist.Distribution:
        """Return the distribution of z, that of the parts."""
        return self._kind.get_base_dist(self)

    def _reference(self) -> Start:
        """Return the layer that tells of coordinates without a posterior."""
        return self._modules["transform"].layers[0].layers[-1]

    def get_transform(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise an error: a mixture has no transform."""
        raise ValueError(MIXTURE)


class _Parts(torch.nn.Module):
    """The transforms of a mixture and their weights."""

    weights: Tensor

    def __init__(self, transforms: Sequence[TransformModule], weights: np.ndarray) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(transforms)
        like = next(transforms[0].parameters())
        self.register_buffer("weights", torch.as_tensor(weights).to(like))


class Mixture(dist.TorchDistribution):
    """A mixture of any densities on the same space. Draws have no gradient in the weights.

    Args:
        weights: those of the parts, `(K,)`.
        parts: the densities.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, weights: Float[Tensor, " K"], parts: Sequence[FlowDistribution]) -> None:
        self.weights, self.parts = weights, list(parts)
        super().__init__(parts[0].batch_shape, parts[0].event_shape, validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "Mixture":
        """Return the mixture of expanded parts."""
        return Mixture(self.weights, [part.expand(batch_shape) for part in self.parts])

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw from a random part each."""
        draws = torch.stack([part.rsample(torch.Size(sample_shape)) for part in self.parts])
        chosen = dist.Categorical(self.weights).sample(draws.shape[1:-1])
        return torch.take_along_dim(draws, chosen[None, ..., None], 0)[0]

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of `value`, `(*batch, D)`."""
        densities = torch.stack([part.log_prob(value) for part in self.parts], -1)
        return torch.logsumexp(self.weights.log() + densities, -1)
