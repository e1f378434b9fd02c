"""From a batch of the data to what the flow takes."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pyroflows.rng import generator_for
from pyroflows.training.sources import Arrays, as_tensor
from pyroflows_common.rows import Batch


class Preparation:
    """A batch on the flow's device and in its dtype, augmented and checked.

    Args:
        arrays: what the flow takes.
        augment: function of a batch and a `torch.Generator`; None for none.
        like: a tensor of the flow's device and dtype.
        seed: the run's seed.
    """

    def __init__(
        self, arrays: Arrays, augment: Callable[..., Any] | None, like: Tensor, seed: int
    ) -> None:
        self.arrays, self.augment, self.seed = arrays, augment, seed
        self.device, self.dtype = like.device, like.dtype

    def __call__(self, batch: Batch, *stream: int) -> tuple[Tensor, Tensor | None]:
        """Return events and contexts; equal streams have equal random numbers."""
        x, context = batch
        x = self._moved(x, keep=self.arrays.kind(x) != "f")
        if self.augment is not None:
            x = self.augment(x, generator_for((self.seed, *stream), self.device))
            if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
                kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(f"`augment` gave {kind}, expected a floating-point torch.Tensor")
            self.arrays.check_shape(x, "what `augment` gave")
            x = self._moved(x)
        return x, None if context is None else self._moved(context)

    def _moved(self, x: Any, keep: bool = False) -> Tensor:
        x = as_tensor(x)
        dtype = x.dtype if keep else self.dtype
        # The other way round, whoever reads the copy would have to wait for it.
        return x.to(self.device, dtype, non_blocking=self.device.type == "cuda")
