"""Outlier scores against their formulas, and thresholds against their promise."""

import io
import math
import sys

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from pyroflows_common.outliers import threshold
from tests.specs.registry import case

FLOWS = [
    case("nice", 3),
    case("realnvp", 3, context_dim=2),
    case("realnvp", (1, 4, 4), scales=2, channels=2, blocks=0, logit=0.05),
    case("realnvp", (3, 4, 4), scales=1, channels=2, blocks=0, logit=0.05),
    case("realnvp", (2, 4, 4), scales=1, channels=2, blocks=0, logit=0.05),
]
each_flow = pytest.mark.parametrize("case", FLOWS, ids=str)


def context_of(case, *batch):
    context = case.context(*batch)
    return {} if context is None else {"context": context}


@each_flow
def test_scores_of_densities(wing, case):
    flow, background = wing.build(case), wing.build(case, seed=1)
    x, given = case.points(2, 5), context_of(case, 2, 5)
    own, other = (wing.log_prob(wing.density(f, **given), x) for f in (flow, background))
    options = {**given, "batch_size": 3}
    assert_allclose(wing.apply("outlier_scores", flow, x, **options), -own)
    found = wing.apply("outlier_scores", flow, x, kind="ratio", background=background, **options)
    assert_allclose(found, other - own, atol=1e-9)
    reference, known = case.points(7, seed=3), context_of(case, 7)
    mean = wing.log_prob(wing.density(flow, **known), reference).mean()
    options["reference"] = reference
    if known:
        options["reference"] = (wing.array(reference), wing.array(known["context"]))
    found = wing.apply("outlier_scores", flow, x, kind="typicality", **options)
    assert_allclose(found, abs(own - mean), atol=1e-9)


def shortest(image):
    """Bits of the shorter one of two lossless files that Pillow writes."""
    lengths = []
    for kind in ({"format": "PNG", "optimize": True}, {"format": "WEBP", "lossless": True}):
        file = io.BytesIO()
        Image.fromarray(image).save(file, **kind)
        lengths.append(8 * len(file.getvalue()))
        restored = np.array(Image.open(file).convert(Image.fromarray(image).mode))
        assert_array_equal(restored, image)
    return min(lengths)


@pytest.mark.parametrize(("case", "levels"), [(FLOWS[2], 256), (FLOWS[3], 17), (FLOWS[4], 5)])
def test_scores_by_complexity(wing, case, levels):
    flow, rng = wing.build(case), np.random.default_rng(0)
    pixels = rng.integers(0, levels, (6, *case.shape)).astype(np.uint8)
    pixels[0] = levels - 1
    x = (pixels + rng.random(pixels.shape) * 0.99) / levels
    nats = -wing.log_prob(wing.density(flow), x)
    size = math.prod(case.shape)
    planes = [np.vstack(p) if len(p) != 3 else np.moveaxis(p, 0, -1) for p in pixels]
    bits = np.array([shortest(np.ascontiguousarray(plane)) for plane in planes])
    expected = math.log2(levels) + nats / math.log(2) / size - bits / size
    found = wing.apply("outlier_scores", flow, x, kind="complexity", levels=levels)
    assert_allclose(found, expected)
    whole = pixels / max(levels - 1, 1)  # pixels that were scaled without noise are the same
    again = wing.apply("outlier_scores", flow, whole, kind="complexity", levels=levels)
    other = wing.apply("outlier_scores", flow, whole)
    assert_allclose(
        again, math.log2(levels) + (other / math.log(2) - bits) / size, rtol=1e-6, atol=1e-6
    )


def test_what_has_no_density_scores_infinity(wing):
    flow = wing.new("BijectTo", 2, ((0.0, 1.0),))
    x = np.array([[0.5, 0.5], [0.5, 2.0]], np.float32)
    assert_array_equal(np.isinf(wing.apply("outlier_scores", flow, x)), [False, True])


def test_what_has_no_density_anywhere_is_no_regular_event(wing):
    flow = wing.new("BijectTo", 2, ((0.0, 1.0),))
    x = np.array([[0.5, 0.5], [0.5, 2.0]], np.float32)
    found = wing.apply("outlier_scores", flow, x, kind="ratio", background=flow)
    assert_array_equal(found, [0.0, np.inf])
    with pytest.raises(ValueError, match="`reference` has 1 of 2 rows to which the flow gives no"):
        wing.apply("outlier_scores", flow, x, kind="typicality", reference=x)


def test_one_image_under_several_contexts(wing):
    of_images = case("glow", (1, 4, 4), levels=1, steps=1, channels=3, context_dim=2, logit=0.05)
    flow, x, context = wing.build(of_images), of_images.points(), of_images.context(3)
    found = wing.apply("outlier_scores", flow, x, kind="complexity", context=context)
    each = [
        wing.apply("outlier_scores", flow, x, kind="complexity", context=one) for one in context
    ]
    assert_allclose(found, each)


def test_a_condition_made_before_is_the_context(wing):
    flow, x = wing.build(FLOWS[1]), FLOWS[1].points(5)
    context = FLOWS[1].context(5)
    conditioned = flow.condition(wing.array(context))
    expected = wing.apply("outlier_scores", flow, x, context=context)
    found = wing.apply("outlier_scores", conditioned, x, batch_size=2)
    assert_allclose(found, expected)
    with pytest.raises(ValueError, match="has its context already"):
        wing.apply("outlier_scores", conditioned, x, context=context)


X = np.full((2, 3), 0.5, np.float32)
ERRORS = {
    "unknown": ({"kind": "likely"}, "`kind` is 'likely', expected one of log_density, typicality"),
    "missing": ({"kind": "typicality"}, "`reference` is missing"),
    "needless": ({"reference": X}, "`reference` is given, but is for kind='typicality'"),
    "vectors": ({"kind": "complexity"}, r"is for images \(C, H, W\)"),
    "shape": (
        {"kind": "typicality", "reference": np.ones((5, 2), np.float32)},
        r"`reference` has shape \(5, 2\)",
    ),
    "finite": (
        {"kind": "typicality", "reference": np.full((5, 3), np.nan, np.float32)},
        "`reference` has 5 of 5 rows with NaN or inf",
    ),
    "none": (
        {"kind": "typicality", "reference": np.ones((0, 3), np.float32)}, "`reference` .* no rows"
    ),
    "batch": ({"batch_size": 0}, "`batch_size` is 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(wing, name):
    options, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        wing.apply("outlier_scores", wing.new("Standardization", 3), X, **options)


def test_errors_of_other_flows(wing):
    flow = wing.new("Standardization", 3)
    with pytest.raises(TypeError, match="`background` is a str"):
        wing.apply("outlier_scores", flow, X, kind="ratio", background="x")
    flow, x, context = wing.build(FLOWS[1]), FLOWS[1].points(2), FLOWS[1].context(2)
    options = {"kind": "typicality", "reference": x, "context": context}
    with pytest.raises(ValueError, match="`reference` has no contexts"):
        wing.apply("outlier_scores", flow, x, **options)


def test_errors_of_images(wing):
    flow, x = wing.new("Standardization", (1, 2, 2)), np.full((1, 1, 2, 2), 1.5, np.float32)
    with pytest.raises(ValueError, match="from 1.5 to 1.5, but kind='complexity' is for pixels"):
        wing.apply("outlier_scores", flow, x, kind="complexity")
    with pytest.raises(ValueError, match="`levels` is 300"):
        wing.apply("outlier_scores", flow, x / 2, kind="complexity", levels=300)
    with pytest.raises(ValueError, match=r"`x` has shape \(1, 1, 2, 2\)"):
        wing.apply("outlier_scores", wing.new("Standardization", 3), x)
    other = wing.new("Standardization", 3)
    with pytest.raises(ValueError, match=r"`background` has events of shape \(3,\)"):
        wing.apply("outlier_scores", flow, x / 2, kind="ratio", background=other)


def test_what_is_not_installed_is_named(wing, monkeypatch):
    x, other = np.full((1, 1, 4, 4), 0.5, np.float32), wing.new("Standardization", (1, 4, 4))
    for module in ("PIL", "scipy", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"Pillow, which the extra pyroflows\[applications\] in"):
        wing.apply("outlier_scores", other, x, kind="complexity")
    with pytest.raises(ImportError, match=r"SciPy, which the extra pyroflows\[applications\] inst"):
        wing.apply("corrupt", x, "blur", 0.5)
    with pytest.raises(ImportError, match=r"Matplotlib, which the extra pyroflows\[plot\] inst"):
        wing.package.plot_images(x)


# Thresholds


@pytest.mark.parametrize(("count", "rate"), [(19, 0.05), (40, 0.1), (99, 0.5), (9, 0.1), (7, 0.3)])
def test_at_most_so_many_regular_events_score_above(count, rate):
    """Of exchangeable scores the last is above with probability 1 − k / (n + 1), at most the rate.

    Each score in turn is taken as the new one, which is the probability without chance.
    """
    scores = np.random.default_rng(0).standard_normal(count + 1)
    above = [
        scores[i] > threshold(np.delete(scores, i), false_positive_rate=rate)
        for i in range(count + 1)
    ]
    assert rate - 1 / (count + 1) < np.mean(above) <= rate + 1e-12


def test_a_threshold_takes_the_hosts_arrays(wing):
    assert threshold(wing.array(np.arange(9.0)), false_positive_rate=0.2) == 7.0
    if wing.name == "pyro":  # with a gradient
        scores = wing.array(np.arange(9.0)).requires_grad_()
        assert threshold(scores, false_positive_rate=0.2) == 7.0


@pytest.mark.parametrize(
    ("scores", "rate", "message"),
    [
        ([0.1, 0.2], 0.05, "`scores` has 2 values, but false_positive_rate=0.05 needs at least 19"),
        ([0.1, math.nan], 0.5, "`scores` has 1 of 2 values NaN"),
        ([0.1, 0.2], 1.5, "`false_positive_rate` is 1.5"),
    ],
    ids=str,
)
def test_errors_of_thresholds(scores, rate, message):
    with pytest.raises(ValueError, match=message):
        threshold(scores, false_positive_rate=rate)
