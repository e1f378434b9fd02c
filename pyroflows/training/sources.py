"""PyTorch's and NumPy's arrays as training data."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyroflows_common import rows


class Arrays(rows.Arrays):
    """What a flow takes, and functions of tensors and NumPy arrays."""

    array_maker = "torch.tensor"

    def is_array(self, value: Any) -> bool:
        """Whether a value is a tensor, or something that NumPy takes for an array."""
        return isinstance(value, Tensor) or hasattr(value, "__array__")

    def as_array(self, value: Any) -> Any:
        """Return a tensor or a NumPy array; nothing is copied."""
        return value.detach() if isinstance(value, Tensor) else np.asarray(value)

    def kind(self, x: Any) -> str:
        """Return NumPy's letter for the kind of a dtype, such as f for floats."""
        if not isinstance(x, Tensor):
            return x.dtype.kind
        return "f" if x.dtype.is_floating_point else "c" if x.dtype.is_complex else "i"

    def finite(self, x: Any) -> np.ndarray:
        """Tell for each row whether it is finite as numbers of the flow's dtype."""
        numbers = as_tensor(x).to(getattr(torch, self.dtype))
        return numbers.reshape(len(x), -1).isfinite().all(1).cpu().numpy()

    def take(self, x: Any, index: np.ndarray) -> Tensor:
        """Return the rows of an array at some places."""
        if isinstance(x, Tensor):
            return x[torch.from_numpy(index).to(x.device)]
        return torch.from_numpy(np.asarray(x[index], _dtype(x)))

    def stack(self, rows: Sequence[Any]) -> Tensor:
        """Return rows as one tensor."""
        return torch.stack([as_tensor(row) for row in rows])

    def as_bytes(self, x: Tensor) -> bytes:
        """Return a tensor's numbers as bytes."""
        return x.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def as_tensor(x: Any) -> Tensor:
    """Return a tensor; NumPy's numbers are copied, for they may be read-only."""
    return x if isinstance(x, Tensor) else torch.from_numpy(np.array(x, _dtype(x)))


def _dtype(x: np.ndarray) -> np.dtype:
    """Return an array's dtype as PyTorch knows it: its own byte order, and no long double."""
    return np.dtype(float) if x.dtype == np.longdouble else x.dtype.newbyteorder("=")
