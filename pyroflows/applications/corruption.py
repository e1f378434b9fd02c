"""Corrupted images: regular ones, made unusual by degrees."""

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from pyroflows_common import corruption as common
from pyroflows_common.checks import as_count


def corrupt(
    x: Shaped[Tensor, "*batch c h w"],
    kind: str,
    strength: float,
    *,
    other: Shaped[Tensor, "... c h w"] | None = None,
    levels: int = 256,
    seed: int = 0,
) -> Shaped[Tensor, "*batch c h w"]:
    """Corrupt images, by a strength s from 0, which changes nothing, to 1.

    | kind | at strength s |
    |---|---|
    | `"noise"` | normal noise of standard deviation s is added |
    | `"pixels"` | a share s of the numbers is drawn anew, uniformly |
    | `"rotation"` | turned by s times a right angle |
    | `"shear"` | rows are shifted by s times their distance from the middle |
    | `"contrast"` | (1 − s) of the image, s of its mean |
    | `"blur"` | normal blur, of standard deviation s / 8 of the shorter side |
    | `"morph"` | (1 − s) of the image, s of one of `other` |

    Strengths are in units of the range of pixels. What leaves the range is cut off, whole numbers
    are rounded, and warped images go on beyond their edge as on it.

    Args:
        x: images `(*batch, C, H, W)`: whole numbers below `levels`, or real ones in [0, 1].
        kind: kind of the corruption.
        strength: s, from 0 to 1.
        other: images to morph into, one for each of `x`, or one for all.
        levels: number of possible values of a pixel of whole numbers.
        seed: seed of `"noise"` and `"pixels"`.

    Returns:
        Images of the shape and dtype of `x`.

    Raises:
        ValueError: if an argument is out of range, if `x` has no shape of images, or if `other`
            does not fit it, is missing for `"morph"` or given for another kind.
        TypeError: if `x` is not a tensor of whole or real numbers.
        ImportError: if the kind needs SciPy (rotation, shear, blur), and it is not installed.

    Examples:
        >>> import torch
        >>> from pyroflows import corrupt
        >>> image = torch.tensor([[[0, 100], [200, 100]]], dtype=torch.uint8)
        >>> corrupt(image, "contrast", 0.5).tolist()
        [[[50, 100], [150, 100]]]
    """
    rng = np.random.default_rng(as_count(seed, "seed", 0))
    images, target = _numpy(x, "x"), None if other is None else _numpy(other, "other")
    y = common.corrupt(images, kind, strength, target, levels, rng)
    return torch.from_numpy(y).to(x.device)


def _numpy(x: Tensor, name: str) -> np.ndarray:
    if not isinstance(x, Tensor):
        raise TypeError(f"`{name}` is a {type(x).__name__}, expected a torch.Tensor")
    return x.detach().cpu().numpy()
