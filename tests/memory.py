"""Memory of a test process: how much it holds, and how to give it back."""

import ctypes
import gc
from pathlib import Path

MANY = 1_200_000_000  # bytes
STATM = Path("/proc/self/statm")
PAGE = 4096


def resident():
    """Bytes of memory in use; 0 where the system does not tell."""
    return int(STATM.read_text().split()[1]) * PAGE if STATM.exists() else 0


def give_back():
    """Free what is no longer reachable, and return it to the system: glibc would keep it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
