"""Memory of a test process: when it has grown too much, and how it is given back."""

import ctypes
import gc
import os
from pathlib import Path

import jax

from tests.wings.numpyro_wing import NumPyroWing

GROWTH = 600_000_000  # bytes
STATM = Path("/proc/self/statm")
PAGE = os.sysconf("SC_PAGE_SIZE")


def resident():
    """Bytes of memory in use; 0 where the system does not tell."""
    return int(STATM.read_text().split()[1]) * PAGE if STATM.exists() else 0


class Keeper:
    """Collects garbage whenever the process has grown by `GROWTH`.

    Where that gives back less than half of it, compiled programs and flows are dropped as well.
    Otherwise Python's collector would look through all programs again and again.
    """

    def __init__(self):
        self.before = resident()
        if self.before:
            gc.disable()

    def check(self):
        if resident() > self.before + GROWTH:
            self.collect()
            if resident() > self.before + GROWTH / 2:
                NumPyroWing.build.cache_clear()
                jax.clear_caches()
                self.collect()
                self.before = resident()

    def collect(self):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # glibc would keep what is freed
