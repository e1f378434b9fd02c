"""Paths between latents, and latents of one scale drawn anew."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tests.specs.registry import case

FLOWS = [
    case("realnvp", 3, context_dim=2),
    case("nice", 4),
    case("realnvp", (1, 4, 4), scales=2, channels=2, blocks=0, logit=0.05),
]


@pytest.mark.parametrize("path", ["linear", "arc"])
@pytest.mark.parametrize("case", FLOWS, ids=str)
def test_a_path_is_simple_in_latent_space(wing, case, path):
    flow, context = wing.build(case, noise=0.1), case.context()
    start, end = case.points(2, 1, scale=1.0), case.points(3, seed=1, scale=1.0)
    options = {} if context is None else {"context": context}
    found = wing.apply("interpolate", flow, start, end, 5, path=path, **options)
    assert found.shape == (5, 2, 3, *case.shape)
    assert_allclose(found[0], np.broadcast_to(start, found[0].shape), atol=1e-5)
    assert_allclose(found[-1], np.broadcast_to(end, found[0].shape), atol=1e-5)
    z = wing.inverse(flow, found, context)[0].reshape(5, 2, 3, -1)
    if path == "linear":
        assert_allclose(np.diff(z, axis=0), np.broadcast_to((z[-1] - z[0]) / 4, (4, *z[0].shape)),
                        atol=1e-5)  # fmt: skip
        return
    length = np.linalg.norm(z, axis=-1)
    assert_allclose(length, np.linspace(length[0], length[-1], 5), rtol=1e-5)
    units = z / length[..., None]
    angles = np.arccos((units[1:] * units[:-1]).sum(-1))
    assert_allclose(angles, np.broadcast_to(angles.mean(0), angles.shape), rtol=1e-4)
    total = np.arccos((units[0] * units[-1]).sum(-1))
    assert_allclose(angles.sum(0), total, rtol=1e-5)  # the shorter way round


def test_an_arc_between_ends_in_one_direction_is_a_line(wing):
    flow = wing.new("Standardization", 2)
    ends = np.zeros(2, np.float32), np.ones(2, np.float32)
    for start, end in (ends, ends[::-1], (ends[1], 3 * ends[1]), (ends[1], ends[1])):
        found = wing.apply("interpolate", flow, start, end, 3, path="arc")
        assert_allclose(found, [start, (start + end) / 2, end], atol=1e-6)


SCALES = [
    case("realnvp", (1, 4, 4), scales=2, channels=2, blocks=0, logit=0.05),
    case("glow", (2, 8, 8), levels=3, steps=1, channels=3),
    case("glow", (1, 4, 4), levels=2, steps=1, channels=3, context_dim=2),
]


@pytest.mark.parametrize("case", SCALES, ids=str)
def test_only_the_latents_of_the_given_scales_change(wing, case):
    flow, context = wing.build(case, noise=0.1), case.context(3)
    x = case.points(3)
    options = {} if context is None else {"context": context}

    def latents(x):
        z = wing.array(wing.inverse(flow, x, context)[0])
        return [wing.numpy(part) for part in flow.split_latent(z)]

    before = latents(x)
    for scales in (0, [np.int64(-1)], list(range(len(before)))):
        after = latents(wing.apply("resample", flow, x, scales, **options))
        drawn = {i % len(before) for i in ([scales] if isinstance(scales, int) else scales)}
        for i, (old, new) in enumerate(zip(before, after, strict=True)):
            if i in drawn:
                assert abs(new - old).min() > 1e-6
                assert len(np.unique(new.round(6))) == new.size  # each row has its own
            else:
                assert_allclose(new, old, atol=1e-6)


def test_new_latents_are_of_the_base_and_its_temperature(wing):
    flow = wing.build(SCALES[1], noise=0.1)
    x = SCALES[1].points(400)
    found = wing.apply("resample", flow, x, 2, base="logistic", temperature=0.5, seed=1)
    z = wing.array(wing.inverse(flow, found)[0])
    new = wing.numpy(flow.split_latent(z)[2])
    assert_allclose(new.std(), 0.5 * np.pi / 3**0.5, rtol=0.03)
    assert_allclose(new.mean(), 0.0, atol=0.02)


ERRORS = {
    "path": ("interpolate", {"path": "curve"}, "`path` is 'curve', expected one of arc, linear"),
    "num": ("interpolate", {"num": 1}, "`num` is 1"),
    "nan": ("interpolate", {"end": np.full((1, 4, 4), np.nan)}, "`end` has 1 of 1 rows with NaN"),
    "shape": ("interpolate", {"end": np.ones((1, 4, 2))}, r"`end` has shape \(1, 4, 2\)"),
    "scale": ("resample", {"scales": 2}, r"`scales` is 2, expected .* to 1"),
    "scales": ("resample", {"scales": []}, r"`scales` is \[\]"),
    "context": ("resample", {"scales": 0, "context": np.ones(2)}, "takes none"),
    "temperature": ("resample", {"scales": 0, "temperature": 0.0}, "`temperature` is 0.0"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(wing, name):
    function, options, message = ERRORS[name]
    flow, x = wing.build(SCALES[0]), SCALES[0].points()
    if function == "interpolate":
        options = {"end": x, **options}
    with pytest.raises(ValueError, match=message):
        wing.apply(function, flow, x, **options)


def test_a_flow_of_one_scale_says_so(wing):
    with pytest.raises(ValueError, match=r"events of shape \(3,\), has no scales"):
        wing.apply("resample", wing.new("Standardization", 3), np.ones((2, 3), np.float32), 0)


def test_randomness_is_reproducible(wing):
    flow, x = wing.build(SCALES[0]), SCALES[0].points(2)
    first, again, other = (wing.apply("resample", flow, x, 0, seed=seed) for seed in (0, 0, 1))
    assert_array_equal(first, again)
    assert abs(first - other).max() > 1e-3
