"""Sizes of multi-scale flows: the number of times that images are halved, and the depth."""

from pyroflows_common.checks import as_count

# Couplings in each of RealNVP's scales, on a checkerboard and on channels, and in the last scale.
CHECKERBOARDS, CHANNELS, LAST_CHECKERBOARDS = 3, 3, 4


def realnvp_scales(shape: tuple[int, ...], scales: int | None) -> int:
    """Return the number of scales of RealNVP: the given one, or up to 3 as the size allows."""
    if scales is None:
        halved = halvings(shape) - (shape[1] == shape[2] == 2 ** halvings(shape))
        scales = 1 + max(0, min(2, halved))  # a single pixel fails at the checkerboard
    check_size(shape, scales, scales - 1, "scales")
    return scales


def realnvp_depth(scales: int) -> int:
    """Return the number of couplings of RealNVP on images."""
    return (scales - 1) * (CHECKERBOARDS + CHANNELS) + LAST_CHECKERBOARDS


def glow_depth(shape: tuple[int, ...], levels: int | None, steps: int) -> tuple[int, int]:
    """Return the number of levels of Glow, given or up to 3, and of the steps in all of them."""
    if levels is None:
        levels = max(1, min(3, halvings(shape)))
    check_size(shape, levels, levels, "levels")
    return levels, levels * as_count(steps, "steps")


def halvings(shape: tuple[int, ...]) -> int:
    """Return how many times height and width can be halved."""
    _, h, w = shape
    return min((n & -n).bit_length() - 1 for n in (h, w))


def check_size(shape: tuple[int, ...], count: int, halved: int, name: str) -> None:
    """Check that images can be halved `halved` times; the error names the next size that can."""
    as_count(count, name)
    c, *sides = shape
    if halved > halvings(shape):
        factor = 2**halved
        good = tuple(-(-side // factor) * factor for side in sides)
        raise ValueError(
            f"`event_shape` is {shape}, but {name}={count} needs a height and width that are "
            f"multiples of {factor}: pad the images, to {(c, *good)} for example, or take fewer"
        )
