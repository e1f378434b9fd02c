"""Corrupted images: regular ones, made unusual by degrees."""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Shaped

from numpyro_flows.rng import RandomKey, check_key, seed_of
from pyroflows_common import corruption as common


def corrupt(
    x: Shaped[Array | np.ndarray, "*batch c h w"],
    kind: str,
    strength: float,
    *,
    other: Shaped[Array | np.ndarray, "... c h w"] | None = None,
    levels: int = 256,
    key: RandomKey | None = None,
) -> Shaped[Array, "*batch c h w"]:
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
        key: random key, for `"noise"` and `"pixels"`.

    Returns:
        Images of the shape of `x`, and of its dtype as JAX has it.

    Raises:
        ValueError: if an argument is out of range, if `x` has no shape of images, or if `other`
            does not fit it, is missing for `"morph"` or given for another kind; if `key` is
            missing for a kind that needs it.
        TypeError: if `x` is not an array of whole or real numbers.
        ImportError: if the kind needs SciPy (rotation, shear, blur), and it is not installed.

    Examples:
        >>> import numpy as np
        >>> from numpyro_flows import corrupt
        >>> image = np.array([[[0, 100], [200, 100]]], dtype=np.uint8)
        >>> corrupt(image, "contrast", 0.5).tolist()
        [[[50, 100], [150, 100]]]
    """
    if key is None and kind in common.RANDOM:
        raise ValueError(f"`key` is missing: kind={kind!r} needs it")
    if key is not None:
        check_key(key)
    rng = np.random.default_rng(0 if key is None else seed_of(key))
    images, target = _numpy(x, "x"), None if other is None else _numpy(other, "other")
    return jnp.asarray(common.corrupt(images, kind, strength, target, levels, rng))


def _numpy(x: object, name: str) -> np.ndarray:
    if not hasattr(x, "dtype"):
        raise TypeError(f"`{name}` is a {type(x).__name__}, expected a jax.Array")
    return np.asarray(x)
