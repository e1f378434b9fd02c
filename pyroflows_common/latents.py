"""Latents: checks of paths between them and of the scales to draw anew."""

import operator
from collections.abc import Sequence
from typing import Any

PATHS = ("arc", "linear")
# Sine of an angle up to which an arc is a line.
PARALLEL = 1e-4


def check_path(path: str) -> None:
    """Check that a kind of path is known."""
    if path not in PATHS:
        raise ValueError(f"`path` is {path!r}, expected one of {', '.join(PATHS)}")


def as_levels(levels: Any, shapes: Sequence[Any]) -> set[int]:
    """Return the places of some of a flow's scales, counted from the coarsest."""
    given = [levels] if hasattr(levels, "__index__") else list(levels)
    count = len(shapes)
    whole = all(hasattr(i, "__index__") and -count <= operator.index(i) < count for i in given)
    if not given or not whole:
        raise ValueError(
            f"`scales` is {levels!r}, expected one or several of 0 (the coarsest) to {count - 1}"
        )
    return {operator.index(i) % count for i in given}


def one_scale(event_shape: tuple[int, ...]) -> str:
    """Return a message about a flow all of whose latents would be drawn anew."""
    return (
        f"`flow`, on events of shape {event_shape}, has no scales, only multi-scale flows on "
        "images have: draw whole events with flow_distribution(flow).sample"
    )
