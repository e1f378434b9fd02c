"""Small flows for the tests of Pyro and PyTorch."""

import pytest
import torch

from pyroflows import glow, nice, realnvp

FLOWS = {
    "nice": lambda **options: nice(3, layers=2, hidden=(8,), **options),
    "realnvp": lambda **options: realnvp(3, layers=3, hidden=(8,), **options),
    "glow": lambda **options: glow(3, layers=2, hidden=(8,), **options),
}
every_flow = pytest.mark.parametrize("name", FLOWS)
IMAGES = {
    "nice": lambda: nice((1, 2, 2), layers=2, hidden=(8,)),
    "realnvp": lambda: realnvp((1, 2, 4), scales=1, channels=3, blocks=1),
    "glow": lambda: glow((1, 4, 4), levels=2, steps=1, channels=3),
}


def perturbed(flow):
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return flow


def make(name, **options):
    return perturbed(FLOWS[name](**options))
