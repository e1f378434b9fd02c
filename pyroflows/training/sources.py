"""Training data in tensors and NumPy arrays."""

from collections.abc import Sequence
from typing import TypeGuard

import numpy as np
import torch
from torch import Tensor

from pyroflows.support import inside
from pyroflows_common import rows
from pyroflows_common.rows import HostArray, SupportsArray


class Arrays(rows.Arrays):
    """The input that a flow takes, and functions of tensors and NumPy arrays."""

    array_maker = "torch.tensor"

    def is_array(self, value: object) -> TypeGuard[SupportsArray]:
        """Return whether a value is a tensor, or an object that NumPy converts to an array."""
        return isinstance(value, Tensor) or hasattr(value, "__array__")

    def as_array(self, value: SupportsArray) -> Tensor | np.ndarray:
        """Return a tensor or a NumPy array, without a copy."""
        return value.detach() if isinstance(value, Tensor) else np.asarray(value)

    def kind(self, x: HostArray) -> str:
        """Return NumPy's letter for the kind of the array's dtype, such as f for floats."""
        if not isinstance(x, Tensor):
            return x.dtype.kind
        return "f" if x.dtype.is_floating_point else "c" if x.dtype.is_complex else "i"

    def finite(self, x: HostArray) -> np.ndarray:
        """Return for each row whether it is finite in the flow's dtype."""
        return self._cast(x).reshape(len(x), -1).isfinite().all(1).cpu().numpy()

    def inside(self, x: HostArray) -> np.ndarray:
        """Return for each row whether it lies inside the support in the flow's dtype."""
        return inside(self._cast(x), self.support).cpu().numpy()

    def numbers(self, x: HostArray) -> np.ndarray:
        """Return an array as NumPy's, in double precision."""
        return as_tensor(x).cpu().double().numpy()

    def take(self, x: HostArray, index: np.ndarray) -> Tensor:
        """Return the rows of an array with these indices."""
        if isinstance(x, Tensor):
            return x[torch.from_numpy(index).to(x.device)]
        return torch.from_numpy(np.asarray(x[index], _dtype(x)))

    def stack(self, rows: Sequence[HostArray]) -> Tensor:
        """Return rows as one tensor."""
        return torch.stack([as_tensor(row) for row in rows])

    def as_bytes(self, x: HostArray) -> bytes:
        """Return the numbers of an array as bytes."""
        return as_tensor(x).cpu().contiguous().view(torch.uint8).numpy().tobytes()

    def _cast(self, x: HostArray) -> Tensor:
        return as_tensor(x).to(getattr(torch, self.dtype))


def as_tensor(x: HostArray) -> Tensor:
    """Return a tensor; a NumPy array is copied, because it may be read-only."""
    return x if isinstance(x, Tensor) else torch.from_numpy(np.array(x, _dtype(x)))


def _dtype(x: HostArray) -> np.dtype:
    """Return a dtype that PyTorch supports: native byte order, and no long double."""
    return np.dtype(float) if x.dtype == np.longdouble else x.dtype.newbyteorder("=")
