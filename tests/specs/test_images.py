"""What only images have: latents of several scales, channels, and `fit` on pixels."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from pyroflows_common.levels import glow_depth, realnvp_scales
from tests.reference import images
from tests.specs.registry import case

SCALES = [
    case("realnvp", (2, 8, 4), scales=3, channels=2, blocks=0),
    case("glow", (2, 8, 8), levels=3, steps=1, channels=3),
    case("glow", (3, 2, 2), levels=1, steps=1, channels=3),
]
each_flow = pytest.mark.parametrize("case", SCALES, ids=str)
NORMS = ["ActNorm", "BatchNorm"]


def split(wing, flow, z):
    return [wing.numpy(part) for part in flow.split_latent(wing.array(z))]


def join(wing, flow, parts):
    return wing.numpy(flow.join_latent([wing.array(part) for part in parts]))


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("realnvp", (1, 32, 32), 3),
        ("realnvp", (1, 8, 4), 3),
        ("realnvp", (1, 4, 4), 2),  # the last scale has more than one pixel
        ("realnvp", (1, 2, 2), 1),
        ("realnvp", (1, 3, 5), 1),
        ("glow", (1, 32, 32), 3),
        ("glow", (1, 4, 12), 2),
        ("glow", (1, 2, 4), 1),
    ],
    ids=str,
)
def test_default_numbers_of_scales(name, shape, expected):
    """Three, or as many as the size of the images allows."""
    found = realnvp_scales(shape, None) if name == "realnvp" else glow_depth(shape, None, 5)[0]
    assert found == expected


@each_flow
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
def test_latents_split_and_join(wing, case, batch):
    flow = wing.build(case)
    z = case.latents(*batch)
    parts = split(wing, flow, z)
    assert [part.shape for part in parts] == [(*batch, *shape) for shape in flow.latent_shapes]
    assert sum(np.prod(shape) for shape in flow.latent_shapes) == np.prod(case.shape)
    sides = [shape[1] for shape in flow.latent_shapes]
    assert sides == sorted(sides)  # the coarsest first
    assert_array_equal(join(wing, flow, parts), z)
    with pytest.raises(ValueError, match="`z` has shape"):
        flow.split_latent(wing.array(z[..., 1:]))


@each_flow
def test_resampling_one_scale(wing, case):
    """Other latents of one scale: another image, whose other latents are the old ones."""
    flow = wing.build(case)
    x = case.points(2)
    z = wing.inverse(flow, x)[0]
    for i in range(len(flow.latent_shapes)):
        parts = split(wing, flow, z)
        parts[i] = parts[i][::-1] + 0.1
        image = wing.forward(flow, join(wing, flow, parts))[0]
        assert abs(image - x).max() > 1e-3
        again = split(wing, flow, wing.inverse(flow, image)[0])
        for one, other in zip(again, parts, strict=True):
            assert_allclose(one, other, rtol=1e-8, atol=1e-8)


def test_layers_without_numbers_are_exact(wing):
    """Bit by bit, in float32."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 2, 4, 6)).astype("float32")
    for flow in (
        wing.new("Squeeze", (2, 4, 6)),
        wing.new("Flatten", (2, 4, 6)),
        wing.new("MultiScale", [wing.new("Squeeze", (2, 4, 6))]),
    ):
        z, ladj = wing.inverse(flow, x)
        assert z.dtype == x.dtype
        assert sorted(z.ravel()) == sorted(x.ravel())
        assert not ladj.any()
        assert_array_equal(wing.forward(flow, z)[0], x)


@pytest.mark.parametrize("shape", [(1, 2, 2), (2, 3, 2), (3, 1, 2), (4, 2, 3)])
@pytest.mark.parametrize("swap", [False, True])
def test_partitions(wing, shape, swap):
    x = np.random.default_rng(0).standard_normal((5, *shape))
    board = wing.package.checkerboard(shape, swap=swap)
    mask = images.checkerboard(shape) != swap
    a, b = (wing.numpy(part) for part in board.split(wing.array(x)))
    assert_array_equal(a, x * mask)
    assert_array_equal(b, x * ~mask)
    assert_array_equal(wing.numpy(board.join(wing.array(a), wing.array(b))), x)
    assert_array_equal(wing.numpy(board.only_b(wing.array(x))), x * ~mask)
    assert board.swap.swap == board != board.swap
    assert hash(board.swap.swap) == hash(board)
    assert board != wing.package.checkerboard((*shape[:2], 7))
    if shape[0] == 1:
        return
    halves = wing.package.channels(shape, swap=swap)
    mask = (np.arange(shape[0]) < shape[0] // 2) != swap
    a, b = (wing.numpy(part) for part in halves.split(wing.array(x)))
    assert_array_equal(a, x[:, mask])
    assert_array_equal(b, x[:, ~mask])
    assert halves.sizes == (mask.sum(), (~mask).sum())
    assert_array_equal(wing.numpy(halves.join(wing.array(a), wing.array(b))), x)
    assert halves == wing.package.Partition(mask.tolist(), axis=-3)
    assert halves != wing.package.Partition(mask.tolist())
    odd = wing.package.Partition([i % 2 == 0 for i in range(shape[0])], axis=-3)
    a, b = odd.split(wing.array(x))
    assert_array_equal(wing.numpy(odd.join(a, b)), x)


@pytest.mark.parametrize("name", NORMS)
def test_normalisation_is_by_channel(wing, name):
    x = np.random.default_rng(0).gamma(2.0, size=(30, 3, 4, 2)) * [[[1.0]], [[5.0]], [[0.1]]]
    flow = wing.initialize(wing.build(case(name, (3, 4, 2)), noise=0), x)
    encoded, ladj = wing.inverse(flow, x)
    assert_allclose(encoded.mean((0, 2, 3)), 0.0, atol=1e-8)
    assert_allclose(encoded.var((0, 2, 3)), 1.0, rtol=1e-2 if name == "BatchNorm" else 1e-8)
    if name == "ActNorm":
        assert_allclose(ladj, -8 * np.log(x.std((0, 2, 3))).sum(), rtol=1e-9)


@pytest.mark.parametrize("name", NORMS)
def test_one_image_makes_no_nan(wing, name):
    image = np.zeros((1, 2, 3, 3))
    image[0, 1] = np.arange(9.0).reshape(3, 3)
    flow = wing.initialize(wing.build(case(name, (2, 3, 3)), noise=0), image)
    assert all(np.isfinite(value).all() for value in wing.state(flow).values())
    assert_allclose(wing.inverse(flow, image)[0][0, 0], 0.0, atol=1e-12)
    image[0, 0, 1, 1] = np.nan
    with pytest.raises(ValueError, match="`x` has 1 of 1 rows with NaN.*first is row 0"):
        wing.initialize(wing.build(case(name, (2, 3, 3)), noise=0), image)


@pytest.mark.parametrize(
    "case",
    [
        case("nice", (1, 4, 4), hidden=(16,), logit=0.05),
        case("realnvp", (1, 4, 4), scales=1, channels=4, blocks=0, batch_norm=True, logit=0.05),
        case("glow", (1, 4, 4), levels=2, steps=1, channels=4, logit=0.05, context_dim=2),
    ],
    ids=str,
)
def test_fit_learns_pixels(wing, case):
    """Whole numbers in, noise of one's own, standardised behind the logit; bits go down."""
    rng = np.random.default_rng(0)
    brightness = rng.integers(0, 3, (400, 1, 1, 1)) * 80
    x = (brightness + rng.integers(0, 60, (400, 1, 4, 4))).astype("uint8")
    context = rng.standard_normal((400, 2)).astype("float32") if case.context_dim else None
    flow = wing.build(case, dtype="float32", noise=0)
    options = {"context": wing.array(context)} if case.context_dim else {}
    result = wing.package.fit(
        flow, wing.array(x), steps=60, batch_size=64, learning_rate=1e-2, standardize=True,
        augment=wing.package.dequantize, progress=False, **options,
    )  # fmt: skip
    bits = wing.package.bits_per_dim(-result.losses, case.shape)
    assert np.isfinite(bits).all()
    assert bits[-10:].mean() < min(bits[0], 8.0) - 0.2
    flow = result.flow
    y = (x[:50] + 0.5).astype("float32") / 256
    z, ladj = wing.inverse(flow, y, None if context is None else context[:50])
    assert np.isfinite(ladj).all()
    assert_allclose(
        wing.forward(flow, z, None if context is None else context[:50])[0], y, atol=1e-4
    )


def test_batch_normalisation_within_the_networks(wing, monkeypatch):
    """The network's activations are normalised by running averages, which only `update` moves."""
    flow_case = case("realnvp", (1, 4, 2), scales=1, channels=3, blocks=1, norm="batch")
    x = 3.0 + 2.0 * np.random.default_rng(0).standard_normal((40, 1, 4, 2))
    flow = wing.initialize(wing.build(flow_case, noise=0), x)
    seen = []

    def recorded(h):
        seen.append(h)
        return np.maximum(h, 0.0)

    monkeypatch.setitem(images.ACTIVATIONS, "relu", recorded)
    flow_case.reference(wing.state(flow)).inverse(x)
    assert len(seen) == 4 * 3
    for h in seen:
        assert_allclose(h.mean((0, 2, 3)), 0.0, atol=1e-9)
        assert_allclose(h.var((0, 2, 3)), 1.0, rtol=1e-2)
    before, y = wing.state(flow), 2.0 - x
    for batch in (x, y):
        flow = wing.update(flow, batch)
        after = wing.state(flow)
        for name, value in before.items():
            moves = ".running_" in name and batch is y
            assert np.allclose(value, after[name], rtol=1e-9, atol=1e-9) != moves
    new = wing.state(wing.initialize(wing.build(flow_case, noise=0), y))
    for kind in ("mean", "var"):  # of the coupling that sees the data
        name = f"levels.0.layers.3.network.norms.0.running_{kind}"
        assert_allclose(after[name], 0.9 * before[name] + 0.1 * new[name], rtol=1e-6)
