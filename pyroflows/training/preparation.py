"""Preparation of a batch of data for the flow: its dtype, device and augmentation."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from pyroflows.rng import generator_for
from pyroflows.training.sources import Arrays, as_tensor
from pyroflows_common.rows import Batch, HostArray

# Events, and their contexts and weights if any.
Prepared = tuple[
    Float[Tensor, "n ..."], Float[Tensor, "n context_dim"] | None, Float[Tensor, " n"] | None
]


class Preparation:
    """A function that moves batches to a tensor's device and dtype, augments and checks them."""

    def __init__(
        self,
        arrays: Arrays,
        augment: Callable[[Tensor, torch.Generator], Tensor] | None,
        like: Tensor,
        seed: int,
    ) -> None:
        self.arrays, self.augment, self.seed = arrays, augment, seed
        self.device, self.dtype = like.device, like.dtype

    def __call__(self, batch: Batch, *stream: int) -> Prepared:
        """Return events, contexts and weights; the stream determines the random numbers."""
        rows, *rest = batch
        x = self._moved(rows, keep=self.arrays.kind(rows) != "f")
        if self.augment is not None:
            x = self.augment(x, generator_for((self.seed, *stream), self.device))
            if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
                kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(f"`augment` gave {kind}, expected a floating-point torch.Tensor")
            self.arrays.check_shape(x, "what `augment` gave")
            self.arrays.check_support(x, "a batch of `data` after `augment`")
            x = self._moved(x)
        context, weights = (None if part is None else self._moved(part) for part in rest)
        return x, context, weights

    def _moved(self, rows: HostArray, keep: bool = False) -> Tensor:
        x = as_tensor(rows)
        dtype = x.dtype if keep else self.dtype
        # A copy from the device to the CPU must block: the CPU would read it unfinished.
        return x.to(self.device, dtype, non_blocking=self.device.type == "cuda")
