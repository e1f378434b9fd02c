"""Checkpoints of `fit` in PyTorch files."""

import hashlib
import json
from typing import Any, BinaryIO

import torch

from pyroflows.transform import TransformModule
from pyroflows_common import checkpoint
from pyroflows_common.checkpoint import describe


class Checkpoint(checkpoint.Checkpoint):
    """A file of `torch.save`, which each write replaces as a whole."""

    format = "pyroflows fit 1"

    def _write(self, state: dict[str, Any], file: BinaryIO) -> None:
        torch.save(state, file)

    def _read(self) -> dict[str, Any]:
        return torch.load(self.path, map_location="cpu", weights_only=True)


def describe_flow(flow: TransformModule) -> str:
    """Return a digest of the structure of a flow, independent of its parameters."""
    tensors = [*flow.named_parameters(), *flow.named_buffers()]
    parts = [
        None if flow.recipe is None else list(flow.recipe),
        [type(module).__qualname__ for module in flow.modules()],
        [(name, list(t.shape), str(t.dtype), t.requires_grad) for name, t in tensors],
    ]
    return hashlib.sha256(json.dumps(parts, default=describe).encode()).hexdigest()
