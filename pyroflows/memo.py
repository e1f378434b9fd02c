"""What a transform remembers of its last call, and how it tells that this is still right."""

import weakref
from typing import Any

import torch
from torch import Tensor

from pyroflows.partition import Partition


class Memo:
    """What the last call computed for `output`, as long as it lives."""

    __slots__ = (
        "__weakref__", "output", "other", "ladj", "forward", "tensors", "settings", "values",
    )  # fmt: skip

    def __init__(
        self,
        output: Tensor,
        other: Tensor,
        ladj: Tensor,
        forward: bool,
        tensors: list[Tensor],
        settings: list[Any],
    ) -> None:
        memo = weakref.ref(self)

        def clear(_: Any) -> None:
            dead = memo()
            if dead is not None:
                dead.other = dead.ladj = dead.tensors = dead.values = None

        self.output = weakref.ref(output, clear)
        self.other: Any = other
        self.ladj: Any = ladj
        self.forward = forward
        self.tensors: Any = tensors
        self.settings = settings
        self.values: Any = _values([*tensors, other, output])

    def holds(self, output: Tensor, state: tuple[list[Tensor], list[Any]] | None) -> bool:
        """Whether recomputing would give the same numbers and the same gradients."""
        traced = torch.is_grad_enabled() and output.grad_fn is None
        if traced and any(t.requires_grad for t in [*self.tensors, self.other]):
            return False
        if state is None or self.values is None:
            return False
        tensors, settings = state
        if settings != self.settings or len(tensors) != len(self.tensors):
            return False
        if any(new is not old for new, old in zip(tensors, self.tensors, strict=True)):
            return False
        return torch.equal(self.values, _values([*tensors, self.other, output]))


def has_storage(tensor: Tensor) -> bool:
    """Whether a tensor has numbers to compare: those inside torch.func transforms have none."""
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return True


def plain(value: Any) -> Any:
    """Return a setting as something to compare with later, or NotImplemented."""
    if isinstance(value, list | tuple):
        inner = tuple(map(plain, value))
        return NotImplemented if any(v is NotImplemented for v in inner) else inner
    return value if value is None or isinstance(value, _PLAIN) else NotImplemented


_PLAIN = (bool, int, float, str, torch.dtype, torch.device, Partition)


@torch.no_grad()
def _values(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])
