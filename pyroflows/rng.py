"""Random numbers that leave the global ones as they are."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's random numbers, those of every CUDA device in use as well, for a while."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        yield


def generator_for(stream: tuple[int, ...], device: Any) -> torch.Generator:
    """Return a generator whose numbers depend on the stream only."""
    (seed,) = np.random.SeedSequence(stream).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(seed >> np.uint64(1)))
