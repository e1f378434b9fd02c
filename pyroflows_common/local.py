"""Local sites of a model: their plate, and the row of numbers that each of its indices has."""

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from pyroflows_common.laplace import Gaussian, Model, Responses, followed, responses

# Draws of each row that integrate it out, in pairs.
TRIED = 8
# Quadrature counts where it differs from their mean by no more than so many standard errors, and
# this.
SURE, EQUAL = 10.0, 0.3
# Rounds of the flow that all rows share.
ROUNDS = 2
# Width of the middle of the skewed variables.
SKEWED = 3.0
# Gain of what is learned of rows. A step of Adam moves all of it by the learning rate, however
# little there is to learn, and thousands of rows tell small differences.
GAIN = 0.1
# Most that the logarithm of a row's scale follows the global sites.
FURTHEST = 3.0

BLOCKED = (
    "the guide sees a part of the model's sites only: a guide with local sites, which lie in a "
    "plate that takes a subsample, needs the whole model"
)
NO_GLOBAL = (
    "all latent sites are local: expected one outside of the plate, such as the location and the "
    "scale from which the local ones are drawn"
)
DISCRETE = (
    "a guide with local sites cannot leave discrete sites to be summed out: sum them out in the "
    "model, such as by a mixture distribution"
)
UNKNOWN_ROWS = (
    "the data do not follow the indices of plate {plate!r}, which takes {taken} of {size} rows: "
    "index the data by the plate's indices in the model, or give the guide an `encoder`"
)
DEPENDENT = (
    "the rows of plate {plate!r} are not independent of each other, given the global sites: "
    "{reason}. Local sites have to act within their own row: leave the plate out of `local`, or "
    "let it take all rows"
)
OUTSIDE = "a site outside of the plate depends on them"
NEIGHBOURS = "the density of a row depends on the sites of another"
NO_LOCAL = (
    "`encoder` is given, but the model has no local sites: expected latent sites in a plate that "
    "takes a subsample, or in one that `local` names"
)
OTHER_SIZE = (
    "plate {plate!r} has {found} rows, but the guide has learned {size}: draw the sites of new "
    "rows from the model, given the global ones, or use a guide with an `encoder`"
)
FORGOTTEN = (
    "the guide has local sites, and a guide that is copied or saved forgets the model, which tells "
    "the rows: make a new guide"
)
UNORDERED = (
    "the plate takes all rows in another order, and `features` is a function: whether it follows "
    "that order is unknown; give the features of all rows as an array"
)
MASKED = (
    "local site {name!r} lies under a mask: rows that are masked would have no posterior. Mask the "
    "data only"
)
SHAPED = (
    "the support of local site {name!r} has a bound for each row, which a guide of other rows does "
    "not know: give the site one support for all rows, such as a fraction of the bound"
)
TRACED = (
    "a guide with local sites cannot be set up inside of jit: call it, or SVI.init, outside first"
)
LOCAL_MODES = (
    "the guide has local sites, for which modes are not told apart: expected a guide without"
)
LOCAL_SAMPLES = (
    "the guide has local sites, for which draws of the posterior are not bridged: leave `samples` "
    "out"
)
LOCAL_NEUTRA = (
    "the guide has local sites, which have no coordinates in its flow: expected a guide whose "
    "sites are all global"
)
LOCAL_DRAWS = "the guide has local sites, which are not trained on `draws`: leave `draws` out"


class Site(NamedTuple):
    """A continuous latent site, as one run of a model shows it.

    Args:
        name: its name.
        shape: of its unconstrained value.
        event_dim: number of dimensions of that which are no plates.
        plates: the dimension of each plate around it, counted from the last.
    """

    name: str
    shape: tuple[int, ...]
    event_dim: int
    plates: Mapping[str, int]


class Layout(NamedTuple):
    """The local sites of a model, as a row of d numbers for each index of a plate.

    Args:
        plate: name of the plate.
        dim: its dimension, counted from the last.
        size: its number of rows, N.
        taken: how many of them a run of the model takes, n.
        shapes: shape of one row of each site, without constraints.
        axes: the plate's axis in each site, counted from the last.
    """

    plate: str
    dim: int
    size: int
    taken: int
    shapes: dict[str, tuple[int, ...]]
    axes: dict[str, int]

    @property
    def columns(self) -> dict[str, slice]:
        """The columns of each site in a row."""
        ends = [0, *itertools.accumulate(math.prod(shape) for shape in self.shapes.values())]
        return dict(zip(self.shapes, map(slice, ends[:-1], ends[1:]), strict=True))

    @property
    def width(self) -> int:
        """Number of local numbers of a row, d."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def layout_of(
    sites: Iterable[Site], plates: Mapping[str, tuple[int, int]], local: str | None
) -> Layout | None:
    """Return the layout of a model's local sites, or None if it has none.

    Args:
        sites: all latent sites.
        plates: size of each plate, and how many of its rows are taken.
        local: name of a plate whose sites are local, too.
    """
    sites = list(sites)
    held = {plate for site in sites for plate in site.plates}
    if local is not None and local not in held:
        raise ValueError(
            f"`local` is {local!r}, expected the name of a plate with latent sites: {sorted(held)}"
        )
    found = sorted(p for p in held if p == local or plates[p][0] != plates[p][1])
    if not found:
        return None
    if len(found) > 1:
        raise ValueError(
            f"the plates {found} have local sites: expected one plate, which may hold others that "
            "take all of their rows"
        )
    (plate,) = found
    inside = [site for site in sites if plate in site.plates]
    if len(inside) == len(sites):
        raise ValueError(NO_GLOBAL)
    axes = {site.name: site.plates[plate] - site.event_dim for site in inside}
    shapes = {}
    for site in inside:
        axis = len(site.shape) + axes[site.name]
        shapes[site.name] = (*site.shape[:axis], *site.shape[axis + 1 :])
    dims = {site.plates[plate] for site in inside}
    if len(dims) > 1:
        raise ValueError(f"plate {plate!r} has the dimensions {sorted(dims)}, expected one")
    return Layout(plate, dims.pop(), *plates[plate], shapes, axes)


def check_encoder(local: Any, encoder: Any, features: Any) -> None:
    """Check the options of a guide that concern its local sites."""
    if not isinstance(local, str | None):
        raise TypeError(f"`local` is a {type(local).__name__}, expected the name of a plate")
    if encoder is not None and not callable(encoder):
        raise TypeError(f"`encoder` is a {type(encoder).__name__}, expected a network")
    if (encoder is None) != (features is None):
        given, missing = ("encoder", "features") if features is None else ("features", "encoder")
        raise ValueError(f"`{given}` is given without `{missing}`, expected both or neither")


def check_features(shape: tuple[int, ...], taken: int, size: int) -> bool:
    """Return whether features are those of all rows, and have to be indexed.

    Args:
        shape: theirs.
        taken: number of rows that are taken.
        size: number of all rows.
    """
    if not shape or shape[0] not in (taken, size):
        raise ValueError(
            f"`features` has shape {shape}, expected a row for each of the {taken} rows that are "
            f"taken, or for all {size}"
        )
    return shape[0] == size


class Starts(NamedTuple):
    """Where rows start: their Gaussians, and what the flow sees of each.

    The arrays are of NumPy, or of a host. Those of all N rows begin with N; a single start for all
    rows has no such dimension.

    Args:
        loc: `(*N, d)`.
        factor: `(*N, d, d)`, lower-triangular.
        skewness: `(*N, d)`.
        slope: `(*N, d, g)`, change of the mode with each global number, in units of the factor.
        log_slope: `(*N, d, g)`, change of the logarithm of the scale.
        seen: `(*N, e)`, standardised locations, log-scales and skewness, for the flow to see.
    """

    loc: Any
    factor: Any
    skewness: Any
    slope: Any
    log_slope: Any
    seen: Any

    @classmethod
    def of_rows(cls, rows: Responses) -> "Starts":
        """Return the starts of rows with these Gaussians."""
        scales = np.log(np.diagonal(rows.factor, axis1=-2, axis2=-1))
        seen = np.concatenate([rows.loc, scales, rows.skewness], -1)
        deviation = seen.std(0)
        seen = (seen - seen.mean(0)) / np.where(deviation > 1e-6, deviation, 1.0)
        # With these, the skewed variables have the rows' means and covariances.
        mean, width = _moments_of_skewed(rows.skewness)
        factor = rows.factor / width[..., None, :]
        loc = rows.loc - (factor * mean[..., None, :]).sum(-1)
        slope = rows.slope * width[..., None]
        return cls(loc, factor, rows.skewness, slope, rows.log_slope, seen)

    @classmethod
    def of_all(cls, loc: np.ndarray, scale: np.ndarray) -> "Starts":
        """Return one start, `(d,)`, for all rows."""
        none = np.zeros((len(loc), 0))
        zeros = np.zeros(len(loc))
        return cls(loc, np.diag(scale), zeros, none, none, np.zeros(0))

    @classmethod
    def same(cls, loc: np.ndarray, scale: np.ndarray, rows: int, size: int) -> "Starts":
        """Return the same start for each row, which follows none of the `size` global numbers."""
        none = np.zeros((len(loc), followed(rows, len(loc), size)))
        one = cls(loc, np.diag(scale), np.zeros(len(loc)), none, none, np.zeros(3 * len(loc)))
        return cls(*(np.repeat(part[None], rows, 0) for part in one))

    @classmethod
    def pooled(cls, rows: Responses) -> "Starts":
        """Return one start for all rows, as wide as they lie apart."""
        variances = np.square(rows.factor).sum(-1)
        return cls.of_all(rows.loc.mean(0), np.sqrt(rows.loc.var(0) + variances.mean(0)))

    @classmethod
    def searched(
        cls,
        model: Model,
        gaussian: Gaussian,
        z: np.ndarray,
        rows: tuple[int, int],
        pool: bool,
        follow: bool,
    ) -> tuple["Starts", np.ndarray]:
        """Return the starts of all rows, or one for all, and the control of their densities.

        Args:
            model: the densities.
            gaussian: that of the global numbers.
            z: `(d,)`, where each row sets out from.
            rows: how many there are, and how many a block has.
            pool: whether to return one start.
            follow: whether rows can be chosen; otherwise there is one block.
        """
        size, taken = rows
        found = responses(model, size if follow else taken, taken, gaussian, z)
        starts = cls.pooled(found) if pool else cls.of_rows(found)
        return starts, control(
            found.height if follow else no_heights(size, len(z), len(gaussian.loc))
        )

    def packed(self) -> np.ndarray:
        """Return all numbers of a row side by side, and a one.

        Weight decay shrinks the one as it shrinks the others, and `unpacked` divides by it.
        """
        lead = self.loc.shape[:-1]
        parts = [part.reshape(*lead, -1) for part in self]
        return np.concatenate([*parts, np.ones((*lead, 1))], -1)


def control(height: np.ndarray) -> np.ndarray:
    """Return what the log-densities of rows are above those of the mean row, and a one.

    A sum over all rows is zero. A guide that counts this with the rows that are taken gives its
    bound less noise: what they differ from the others cancels with that in the model.

    Args:
        height: `(N, 1 + g)`, log-density of each row without its local numbers, and its change with
            each global number.
    """
    sound = np.isfinite(height).all(1, keepdims=True)
    height = np.where(sound, height, 0.0)
    mean = height.sum(0) / max(sound.sum(), 1)
    return np.concatenate([np.where(sound, height - mean, 0.0), np.ones_like(height[:, :1])], 1)


def no_heights(rows: int, width: int, size: int) -> np.ndarray:
    """Return the heights of rows of which nothing is known."""
    return np.zeros((rows, 1 + followed(rows, width, size)))


def unpacked(packed: Any, width: int, slopes: int) -> Starts:
    """Return the starts of rows, `(*N, ...)`, from their numbers side by side.

    Args:
        packed: `(*N, numbers)`, of a host.
        width: d.
        slopes: g.
    """
    lead = packed.shape[:-1]
    numbers = packed[..., :-1] / packed[..., -1:]
    shapes = ((width,), (width, width), (width,), (width, slopes), (width, slopes))
    ends = [0, *itertools.accumulate(math.prod(shape) for shape in shapes)]
    parts = (numbers[..., a:b] for a, b in itertools.pairwise(ends))
    whole = (part.reshape(*lead, *shape) for part, shape in zip(parts, shapes, strict=True))
    loc, factor, skewness, slope, log_slope = whole
    return Starts(loc, factor, skewness, slope, log_slope, numbers[..., ends[-1] :])


def _moments_of_skewed(skewness: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of `skewed` normal variables."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    weights = weights / weights.sum()
    values = nodes + SKEWED * skewness[..., None] * (np.sqrt(1 + (nodes / SKEWED) ** 2) - 1)
    mean = values @ weights
    return mean, np.sqrt(np.square(values - mean[..., None]) @ weights)


def masks(width: int) -> list[list[bool]]:
    """Return the parts of a row that each coupling of a round leaves: none, and halves."""
    first = [k < (width + 1) // 2 for k in range(width)]
    halves = [first, [not kept for kept in first]] if width > 1 else []
    return [[False] * width, *halves]
