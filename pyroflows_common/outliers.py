"""Outliers: kinds of scores, the code length of images, and thresholds."""

import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from pyroflows_common.checks import as_count, as_numpy, check_rows

# Each kind of score, and the argument without which it means nothing.
KINDS = {"log_density": None, "typicality": "reference", "complexity": None, "ratio": "background"}

# Lossless coders of Pillow, and what makes them so or makes them better.
CODERS = {"PNG": "optimize", "WEBP": "lossless"}


def check_kind(kind: str, given: Mapping[str, Any]) -> None:
    """Check that a kind of score is known, and that it has the argument it needs and no other."""
    if kind not in KINDS:
        raise ValueError(f"`kind` is {kind!r}, expected one of {', '.join(KINDS)}")
    for name, value in given.items():
        if name == KINDS[kind] and value is None:
            raise ValueError(f"`{name}` is missing: kind={kind!r} needs it")
        if name != KINDS[kind] and value is not None:
            owner = next(other for other, needed in KINDS.items() if needed == name)
            raise ValueError(f"`{name}` is given, but is for kind={owner!r}, not for {kind!r}")


def check_flow(flow: Any, kind: type, name: str) -> None:
    """Check that a flow, if there is one, is one."""
    if flow is not None and not isinstance(flow, kind):
        raise TypeError(f"`{name}` is a {type(flow).__name__}, expected a {kind.__name__}")


def check_regular(log_probs: np.ndarray) -> None:
    """Check that the flow gives all reference events a density."""
    check_rows(np.isfinite(log_probs), "`reference`", "to which the flow gives no density")


def check_coded(event_shape: tuple[int, ...], levels: int) -> None:
    """Check that a lossless coder takes events of this shape with so many levels."""
    if len(event_shape) != 3:
        raise ValueError(
            f"kind='complexity' is for images (C, H, W), but the flow's events have shape "
            f"{event_shape}"
        )
    if as_count(levels, "levels", 2) > 256:
        raise ValueError(f"`levels` is {levels!r}, expected 2 to 256")


def code_lengths(x: np.ndarray, levels: int) -> np.ndarray:
    """Return the bits that the better one of two lossless coders, PNG and WebP, needs per image.

    Args:
        x: images `(n, C, H, W)` on the unit interval, such as `dequantize` gives.
        levels: number of possible values of a pixel.
    """
    if not (x.min() >= 0 and x.max() <= 1):
        raise ValueError(
            f"`x` has numbers from {x.min()} to {x.max()}, but kind='complexity' is for pixels on "
            "the unit interval, as `dequantize` gives them"
        )
    pixels = np.minimum(np.floor(x * levels), levels - 1).astype(np.uint8)
    return np.array([_code_length(image) for image in pixels])


def _code_length(image: np.ndarray) -> float:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "kind='complexity' needs Pillow, which the extra pyroflows[applications] installs"
        ) from error
    # Other numbers of channels than one and three become one tall grey image.
    plane = np.moveaxis(image, 0, -1) if len(image) == 3 else image.reshape(-1, image.shape[-1])
    picture, sizes = Image.fromarray(plane), []
    for coder, option in CODERS.items():
        file = io.BytesIO()
        picture.save(file, coder, **{option: True})
        sizes.append(8.0 * file.tell())
    return min(sizes)


def threshold(scores: Any, *, false_positive_rate: float = 0.05) -> float:
    r"""Return the score above which an event counts as an outlier.

    With n scores of regular events that neither flow nor reference has seen, in ascending order,

    $$t = s_{(k)}, \qquad k = \lceil (n + 1) (1 - \alpha) \rceil.$$

    A further regular event scores above t with a probability of at most α, whatever the flow and
    the kind of score (split conformal prediction). Precision and recall depend on the outliers:
    scikit-learn's `classification_report` and `roc_auc_score` take `scores > t` and `scores`.

    Args:
        scores: scores `(n,)` of held-out regular events, from `outlier_scores`.
        false_positive_rate: α, the share of regular events that may be called outliers.

    Returns:
        The threshold t.

    Raises:
        ValueError: if a score is NaN, or if there are too few scores for so small a rate.

    References:
        Vovk, Gammerman and Shafer, "Algorithmic Learning in a Random World" (2005), chapter 2.

    Examples:
        >>> from pyroflows import threshold
        >>> threshold([0.3, 0.1, 0.2, 0.9], false_positive_rate=0.4)
        0.3
    """
    if not 0 < false_positive_rate < 1:
        raise ValueError(
            f"`false_positive_rate` is {false_positive_rate!r}, expected a number between 0 and 1"
        )
    values = np.sort(as_numpy(scores).astype(np.float64).ravel())
    if np.isnan(values).any():
        raise ValueError(f"`scores` has {np.isnan(values).sum()} of {len(values)} values NaN")
    # The small number undoes the rounding of, say, 10 · (1 − 0.1).
    k = math.ceil((len(values) + 1) * (1 - false_positive_rate) - 1e-9)
    if k > len(values):
        least = math.ceil(1 / false_positive_rate - 1e-9) - 1
        raise ValueError(
            f"`scores` has {len(values)} values, but false_positive_rate={false_positive_rate} "
            f"needs at least {least}"
        )
    return float(values[k - 1])
