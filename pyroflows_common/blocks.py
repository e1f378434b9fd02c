"""Blocks of coordinates that a new matrix rotates."""

import itertools

import numpy as np

# The triangular factors of a rotation grow with the square root of its size, and amplify each
# other's steps in training. Those of a rotation of eight coordinates have norms of about 2.5.
BLOCK = 8


def rotated_blocks(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return blocks of nearly equal size, at most `BLOCK`, and an order that interleaves them.

    Matrices that rotate the blocks and then reorder the coordinates mix all of them in a few
    layers, as the stages of a fast Fourier transform do.

    Args:
        size: number of coordinates, D.

    Returns:
        Which pairs of coordinates share a block, `(D, D)`, and the order, `(D,)`.
    """
    parts = np.array_split(np.arange(size), -(-size // BLOCK))
    block = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    columns = itertools.zip_longest(*parts)
    order = [i for column in columns for i in column if i is not None]
    return block[:, None] == block, np.array(order)
