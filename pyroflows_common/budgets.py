"""Budgets that a deep flow's layers share, which keep it invertible in float32: see `robust`."""

# Bound on the sum of a flow's log-scales along one path through its couplings.
LOG_SCALE_BUDGET = 4.0
# The bound for images, which have no outliers, but pixels that hardly vary.
IMAGE_BUDGET = 16.0
# The bound for guides: posteriors like funnels need a wide one.
GUIDE_BUDGET = 24.0
# Number of consecutive matrices that train stably at the full learning rate.
MATRICES = 16
# The number for wide matrices, and the width up to which it holds: Adam moves every entry at once,
# so that its steps add up over the width, too.
WIDE_MATRICES, WIDTH = 8, 48


def shared_gain(depth: int, width: int) -> float:
    """Return the gain that keeps `depth` consecutive matrices of a width stable in training."""
    wide = min(1.0, WIDE_MATRICES / depth) * (WIDTH / width) ** 1.5
    return min(1.0, MATRICES / depth, wide)
