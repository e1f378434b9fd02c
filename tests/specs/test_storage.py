"""Laws of `save` and `load`: one file for both wings, and all of a flow comes back."""

import copy
import json
import os

import numpy as np
import pytest
import safetensors.numpy
from numpy.testing import assert_array_equal

import numpyro_flows.tree
from pyroflows_common import archive
from tests.specs.registry import FLOWS, LAYERS, case
from tests.wings import WINGS
from tests.wings.stored import SMALL, about, same, used, with_base

BY_HAND = ("Chain", "Stack", "BatchNorm", "Permutation", "InvertibleLinear")
MADE_BY_HAND = [
    *(c for c in LAYERS if c.name in BY_HAND or "own" in c.options.values()),
    *(c for c in FLOWS if "own" in c.options.values()),
]
BUILT = [
    *(c for c in FLOWS if "own" not in c.options.values()),
    case("realnvp", 4, layers=2, batch_norm=True, robust=False, scale="sigmoid", context_dim=1),
    case("nice", 3, layers=2, hidden=()),
]
GLOW = next(c for c in FLOWS if c.name == "glow" and c.shape == (1, 4, 4))
# A flow of each kind: all arrays are stored alike.
DOUBLE = [SMALL, *BUILT[-2:], GLOW]
# Processors round differently, and an instance norm over few pixels magnifies that.
DTYPES = {"float32": 1e-4, "float64": 1e-12}


@pytest.fixture(params=WINGS, ids=lambda w: f"from_{w}")
def writer(request):
    """The wing that writes a file, where another may read it."""
    return request.param


@pytest.fixture
def path(tmp_path):
    return tmp_path / "flow.safetensors"


# What comes back


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((c, "float32") for c in BUILT), *((c, "float64") for c in DOUBLE)],
    ids=str,
)
def test_both_wings_read_the_same_flow(writer, wing, case, dtype, path):
    flow = used(writer, case, dtype)
    writer.package.save(flow, path)
    loaded = wing.package.load(path)
    if wing is writer:
        same(wing, flow, loaded)
    assert loaded.recipe == flow.recipe
    assert (loaded.base, loaded.event_shape) == ("logistic", case.shape)
    points, context = case.points(3, dtype=dtype), case.context(3, dtype=dtype)
    # The base's name is part of a flow's structure: for this one, JAX has the programs already, and
    # those of both directions at three points.
    flow, loaded = with_base(writer, flow, "normal"), with_base(wing, loaded, "normal")
    latents = case.latents(3, dtype=dtype)
    for evaluate in (
        lambda w, f: w.inverse(f, points, context),
        lambda w, f: w.forward(f, latents, context),
    ):
        for ours, theirs in zip(evaluate(writer, flow), evaluate(wing, loaded), strict=True):
            assert theirs.dtype == dtype
            tolerance = 0.0 if wing is writer else DTYPES[dtype] * abs(ours).max()
            assert abs(ours - theirs).max() <= tolerance
    assert about(path)["dtype"] == dtype


@pytest.mark.parametrize("case", BUILT, ids=str)
def test_both_wings_write_the_same_bytes(case, path):
    ours, theirs = WINGS
    ours.package.save(used(ours, case, "float32"), path)
    data = path.read_bytes()
    theirs.package.save(theirs.package.load(path), path)
    assert path.read_bytes() == data
    ours.package.save(ours.package.load(path), path)
    assert path.read_bytes() == data


@pytest.mark.parametrize("case", MADE_BY_HAND, ids=str)
def test_flows_that_no_builder_can_make(writer, wing, case, path):
    flow = used(writer, case)
    writer.package.save(flow, path)
    with pytest.raises(ValueError, match="like="):
        wing.package.load(path)
    like = wing.build(case, seed=3, dtype="float32")
    before = wing.state(like)
    loaded = wing.package.load(path, like=like)
    assert loaded is not like
    assert loaded.base == "logistic"
    expected = writer.state(flow)
    for name, value in wing.state(loaded).items():
        assert_array_equal(value, expected[name], err_msg=name)
        if value.dtype.kind == "f":
            assert value.dtype == np.float64
    for name, value in wing.state(like).items():
        assert value.dtype == before[name].dtype
        assert_array_equal(value, before[name])
    assert like.base == "normal"
    if wing is writer:
        same(wing, with_base(wing, flow, "logistic"), with_recipe(wing, loaded, flow.recipe))


def with_recipe(wing, flow, recipe):
    """The flow with another's recipe: those with callables in them are equal only to themselves."""
    assert (flow.recipe is None) == (recipe is None)
    if wing.name == "numpyro":
        return numpyro_flows.tree.replace(flow, recipe=recipe)
    flow.recipe = recipe
    return flow


@pytest.mark.parametrize(
    "arguments",
    [
        {"event_shape": (4,), "hidden": [], "init_scale": np.float32(0.1)},
        {"event_shape": [4], "hidden": (), "partition": np.array([True, False, True, True])},
        {"event_shape": 4, "partition": [np.True_, np.False_, np.True_, True], "layers": 1},
    ],
    ids=str,
)
def test_arguments_that_are_numpy(writer, wing, arguments, path):
    arguments = dict(arguments)
    flow = writer.new("realnvp", arguments.pop("event_shape"), **arguments)
    writer.package.save(flow, path)
    assert about(path)["builder"] == "realnvp"
    assert wing.package.load(path).recipe == flow.recipe


def test_a_flow_changed_by_hand(wing, path):
    """Its builder would make another flow: so the file does not name it."""
    flow = wing.new("nice", 3, layers=2, hidden=(4,))
    norm = wing.new("ActNorm", 3)
    if wing.name == "numpyro":
        flow = numpyro_flows.tree.replace(flow, layers=(*flow.layers, norm))
    else:
        flow.layers.append(norm)
    wing.package.save(flow, path)
    assert about(path)["builder"] == ""
    same(wing, flow, wing.package.load(path, like=flow))


@pytest.mark.parametrize(
    ("inner", "setting", "value"),
    [("layers.0", "squash", False), ("layers.0.scale", "limit", 0.5), ("layers.1", "eps", 0.5)],
)
def test_a_setting_changed_by_hand(wing, path, inner, setting, value):
    flow = wing.new("realnvp", 3, layers=1, hidden=(4,), batch_norm=True)
    flow = wing.with_setting(flow, inner, setting, value)
    wing.package.save(flow, path)
    assert about(path)["builder"] == ""
    same(wing, flow, wing.package.load(path, like=flow))


@pytest.mark.parametrize(
    "case", [SMALL, case("realnvp", 3, layers=2, batch_norm=True)], ids=["glow", "realnvp"]
)
def test_the_flag_of_initialization_travels(writer, wing, case, path):
    untouched = writer.build(case)
    writer.package.save(untouched, path)
    points = case.points(50, scale=3.0)
    loaded = wing.package.load(path)
    before = wing.state(loaded)
    moved = wing.state(wing.initialize(loaded, points))
    assert any((before[name] != moved[name]).any() for name in before)

    flow = writer.initialize(writer.build(case), case.points(50, scale=2.0))
    writer.package.save(flow, path)
    loaded = wing.package.load(path)
    before = wing.state(loaded)
    after = wing.state(wing.initialize(loaded, points))
    flags = [name for name in before if name.endswith("initialized")]
    assert flags
    for name in before:
        assert_array_equal(before[name], after[name], err_msg=name)
        assert name not in flags or before[name]


def test_a_base_of_the_users_own(writer, wing, path):
    writer.package.save(used(writer, SMALL, base="custom"), path)
    loaded = wing.package.load(path)
    assert loaded.base == "custom"
    with pytest.raises(ValueError, match="base"):
        wing.density(loaded)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_precisions(writer, wing, dtype, path):
    writer.package.save(used(writer, SMALL, dtype), path)
    kinds = {v.dtype.name for v in wing.state(wing.package.load(path)).values()}
    assert kinds <= {dtype, "bool", "int64" if wing.name == "pyro" else "int32"}


def test_bfloat16(writer, wing, path, tmp_path):
    """A loaded flow is written as it was: in numbers that float32 holds exactly."""
    writer.package.save(writer.cast(used(writer, SMALL), "bfloat16"), path)
    loaded = wing.package.load(path)
    kinds = {str(value.dtype).removeprefix("torch.") for value in loaded.state_dict().values()}
    assert "bfloat16" in kinds <= {"bfloat16", "bool", "int32", "int64"}
    wing.package.save(loaded, tmp_path / "again")
    (first, arrays), (again, others) = map(archive.read, (path, tmp_path / "again"))
    assert first == again
    for name, array in arrays.items():
        assert_array_equal(array, others[name])


def test_numbers_that_are_not_finite(writer, wing, path):
    flow = used(writer, SMALL)
    name = "layers.1.loc"
    state = {**writer.state(flow), name: np.array([np.nan, np.inf, -np.inf])}
    writer.package.save(writer.load(flow, state), path)
    assert_array_equal(wing.state(wing.package.load(path))[name], state[name])


def test_a_loaded_flow_is_trained_on(writer, wing, path):
    writer.package.save(used(writer, SMALL), path)
    loaded = wing.package.load(path)
    gradients = wing.gradients(loaded, SMALL.points(4))
    assert any(abs(value).max() > 0 for name, value in gradients.items() if name != "x")


# Writing


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt], ids=lambda e: e.__name__)
def test_a_failed_write_changes_nothing(wing, path, monkeypatch, failing, error):
    old = used(wing, SMALL)
    wing.package.save(old, path)
    data = path.read_bytes()

    def fail(*_):
        raise error("no")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, fail)
        with pytest.raises(error, match="no"):
            wing.package.save(used(wing, SMALL, seed=1), path)
        with pytest.raises(error, match="no"):
            wing.package.save(old, path.with_name("new"))
    assert path.read_bytes() == data
    assert os.listdir(path.parent) == [path.name]


def test_a_file_is_replaced(wing, path):
    for seed in range(2):
        flow = used(wing, SMALL, seed=seed)
        wing.package.save(flow, str(path))
        same(wing, flow, wing.package.load(str(path)))
    assert os.listdir(path.parent) == [path.name]


def test_a_link_stays_a_link(wing, path, tmp_path):
    (tmp_path / "link").symlink_to(path)
    wing.package.save(used(wing, SMALL), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert path.is_file()


def test_the_users_mask_of_permissions(wing, path):
    before = os.umask(0o027)
    try:
        wing.package.save(used(wing, SMALL), path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


def test_paths_that_cannot_be_written(wing, tmp_path):
    for bad in (tmp_path, tmp_path / "none" / "flow"):
        with pytest.raises(ValueError, match="expected a file in a directory"):
            wing.package.save(used(wing, SMALL), bad)


def test_what_cannot_be_saved(wing, path):
    conditional = wing.new("nice", 3, layers=1, context_dim=2)
    conditioned = wing.given(conditional, np.zeros(2))
    with pytest.raises(ValueError, match="`flow`.*conditional flow"):
        wing.package.save(conditioned, path)
    with pytest.raises(ValueError, match="`flow` is a dict"):
        wing.package.save({}, path)
    with pytest.raises(ValueError, match="base"):
        wing.package.save(used(wing, SMALL, base="cauchy"), path)
    assert not path.exists()
    wing.package.save(conditional, path)
    with pytest.raises(ValueError, match="`like`.*conditional flow"):
        wing.package.load(path, like=conditioned)


# like=


def test_like_for_a_file_with_a_builder(writer, wing, path):
    flow = used(writer, SMALL)
    writer.package.save(flow, path)
    like = wing.build(SMALL, seed=1)
    same(wing, wing.package.load(path), wing.package.load(path, like=like))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (case("glow", 3, layers=2, hidden=(4,), activation="tanh"), "activation"),
        (case("glow", 3, layers=1, hidden=(4,)), "layers"),
        (case("realnvp", 3), "realnvp"),
        (case("ActNorm", 3), "missing"),
    ],
    ids=str,
)
def test_like_that_is_not_alike(wing, path, other, message):
    wing.package.save(used(wing, SMALL), path)
    with pytest.raises(ValueError, match=message):
        wing.package.load(path, like=wing.build(other))
    with pytest.raises(ValueError, match="`like` is a str"):
        wing.package.load(path, like="nice")


def test_like_of_another_size(wing, path):
    wing.package.save(used(wing, case("ActNorm", 3)), path)
    with pytest.raises(ValueError, match="shape"):
        wing.package.load(path, like=wing.new("ActNorm", 4))
    with pytest.raises(ValueError, match="missing"):
        wing.package.load(path, like=wing.new("DiagonalScaling", 3))


# The format


def test_what_a_file_says(writer, path):
    flow = used(writer, case("realnvp", 3, layers=2, partition=(True, False, True)), "float32")
    writer.package.save(flow, path)
    with safetensors.safe_open(path, framework="numpy") as file:
        (text,) = file.metadata().values()
        assert set(file.keys()) == set(writer.state(flow))
    said = json.loads(text)
    assert len(said.pop("checksum")) == 64
    assert said.pop("library")
    assert said == {
        "version": 1,
        "builder": "realnvp",
        "arguments": json.loads(json.dumps(dict(flow.recipe.arguments))),
        "base": "logistic",
        "event_shape": [3],
        "context_dim": 0,
        "dtype": "float32",
    }


# What only one host can get wrong


def test_torch_draws_no_random_numbers(path):
    import torch

    wing = WINGS[0]
    flow = used(wing, SMALL)
    before = torch.get_rng_state()
    wing.package.save(flow, path)
    wing.package.load(path)
    assert torch.equal(before, torch.get_rng_state())


def test_torch_tensors_of_all_kinds(path):
    """Not contiguous, expanded, shared, frozen, with gradients, in double default precision."""
    import torch

    wing = WINGS[0]
    flow = used(wing, SMALL)
    expected = wing.state(flow)
    wing.gradients(flow, SMALL.points(3))
    first = flow.layers[0].layers[0].layers[0].network.layers[0]
    first.weight.data = first.weight.data.t().contiguous().t()
    flow.layers[1].loc = torch.zeros(1, dtype=torch.float64).expand(3)
    flow.layers[1].log_scale = flow.layers[1].loc
    expected["layers.1.loc"] = expected["layers.1.log_scale"] = np.zeros(3)
    torch.set_default_dtype(torch.float64)
    try:
        wing.package.save(flow.requires_grad_(False), path)
        loaded = wing.package.load(path)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, value in wing.state(loaded).items():
        assert_array_equal(value, expected[name])
    assert all(p.requires_grad and p.is_contiguous() for p in loaded.parameters())
    assert loaded.training


def test_torch_layers_that_share_a_network(path):
    """They share it after loading, too, whatever the dtype."""
    import torch

    package = WINGS[0].package
    network = torch.nn.Linear(2, 2)
    layers = [package.AdditiveCoupling(4, network=network) for _ in range(2)]
    flow = package.Chain(layers).double()
    package.save(flow, path)
    loaded = package.load(path, like=copy.deepcopy(flow).float())
    assert loaded.layers[0].network is loaded.layers[1].network
    assert len(list(loaded.parameters())) == 2
    assert next(loaded.parameters()).dtype == torch.float64


def test_torch_dtypes_that_are_refused(path):
    import torch

    wing = WINGS[0]
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        wing.package.save(wing.new("ActNorm", 3).to(torch.float8_e4m3fn), path)
    lazy = wing.package.AdditiveCoupling(4, network=torch.nn.LazyLinear(2))
    with pytest.raises(ValueError, match="Uninitialized"):
        wing.package.save(lazy, path)


@pytest.mark.gpu
def test_torch_flows_on_a_gpu(path):
    wing = WINGS[0]
    flow = used(wing, SMALL)
    expected = wing.state(flow)
    wing.package.save(flow.cuda(), path)
    for loaded in (wing.package.load(path), wing.package.load(path, like=flow)):
        assert {t.device.type for t in loaded.state_dict().values()} == {"cpu"}
        for name, value in wing.state(loaded).items():
            assert_array_equal(value, expected[name])


def test_jax_does_not_round_float64(path):
    import jax

    pyro, wing = WINGS
    pyro.package.save(used(pyro, SMALL, "float64"), path)
    single = path.with_name("single")
    pyro.package.save(used(pyro, SMALL, "float32"), single)
    jax.config.update("jax_enable_x64", False)
    try:
        with pytest.raises(ValueError, match="jax_enable_x64"):
            wing.package.load(path)
        loaded = wing.package.load(single)
    finally:
        jax.config.update("jax_enable_x64", True)
    assert {v.dtype.name for v in wing.state(loaded).values()} == {"float32", "int32", "bool"}
