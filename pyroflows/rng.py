"""Random numbers that leave the global generators unchanged."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's generators, including those of all CUDA devices in use, within a context."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        yield


def generator_for(stream: tuple[int, ...], device: torch.device | str) -> torch.Generator:
    """Return a generator whose numbers depend only on the stream."""
    (seed,) = np.random.SeedSequence(stream).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(seed >> np.uint64(1)))
