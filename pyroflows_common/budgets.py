"""Budgets that a deep flow's layers share, which keep it invertible in float32: see `robust`."""

# Bound on the sum of a flow's log-scales along one path through its couplings.
LOG_SCALE_BUDGET = 4.0
# The bound for images, which have no outliers, but pixels that hardly vary.
IMAGE_BUDGET = 16.0
# The bound for guides: posteriors like funnels need a wide one.
GUIDE_BUDGET = 24.0
# Number of consecutive matrices that train stably at the full learning rate.
MATRICES = 16


def shared_gain(depth: int) -> float:
    """Return the gain that keeps the training of `depth` consecutive matrices stable."""
    return min(1.0, MATRICES / depth)
