"""Laws of `save` and `load`: one file for both wings, and nothing but a sound file is read."""

import copy
import json
import os
import pickle
import resource
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

import numpyro_flows.archive
import pyroflows.archive
from tests.specs.registry import FLOWS, LAYERS, case
from tests.wings import WINGS

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
SMALL = case("glow", 3, layers=2, hidden=(4,))
DTYPES = {"float32": 1e-5, "float64": 1e-12}


@pytest.fixture(params=WINGS, ids=lambda w: f"from_{w}")
def writer(request):
    """The wing that writes a file, where another may read it."""
    return request.param


@pytest.fixture
def path(tmp_path):
    return tmp_path / "flow.safetensors"


def used(wing, case, dtype="float64", base="logistic", seed=0):
    """A flow as training leaves it: weights moved, flags set, with a base of its own."""
    flow = wing.build(case, seed, dtype=dtype)
    state = wing.state(flow)
    state = {k: np.array(True) if k.endswith("initialized") else v for k, v in state.items()}
    return with_base(wing, wing.load(flow, state), base)


def with_base(wing, flow, base):
    if wing.name == "numpyro":
        return numpyro_flows.tree.replace(flow, base=base)
    flow.base = base
    return flow


def same(wing, one, other):
    """Assert that two flows of a wing are the same, to the last bit."""
    ours, theirs = wing.state(one), wing.state(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert_array_equal(value, theirs[name], err_msg=name)
    for attribute in ("base", "event_shape", "context_dim", "recipe"):
        assert getattr(one, attribute) == getattr(other, attribute)
    assert type(one) is type(other)


def about(path):
    return pyroflows.archive.read(path)[0]


def tampered(path, change):
    """Change what a file holds, with a checksum that is right."""
    about, arrays = pyroflows.archive.read(path)
    arrays = dict(arrays)
    change(about, arrays)
    pyroflows.archive.write(path, about, arrays)


# What comes back


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(c, dtype) for c in BUILT for dtype in DTYPES],
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
    for evaluate in (
        lambda w, f: w.log_prob(w.density(f, context=context), points),
        lambda w, f: w.forward(f, case.latents(3, dtype=dtype), context)[0],
    ):
        ours, theirs = evaluate(writer, flow), evaluate(wing, loaded)
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


# Files that are no flows


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


FOREIGN = {
    "empty": b"",
    "text": b"a flow",
    "zeros": bytes(1000),
    "long header": (2**62).to_bytes(8, "little") + b"{}",
    "no metadata": safetensors.numpy.save({"x": np.zeros(3)}),
    "other metadata": safetensors.numpy.save({"x": np.zeros(3)}, {"format": "pt"}),
    "no arrays": safetensors.numpy.save({}, {"pyroflows": "{}"}),
    "no json": safetensors.numpy.save({}, {"pyroflows": "{"}),
    "deep json": safetensors.numpy.save({}, {"pyroflows": '{"a":' + "[" * 10**5}),
    "a list": safetensors.numpy.save({}, {"pyroflows": "[1]"}),
    "a number": safetensors.numpy.save({}, {"pyroflows": "1"}),
    "null": safetensors.numpy.save({}, {"pyroflows": "null"}),
    "no version": safetensors.numpy.save({}, {"pyroflows": '{"builder": "nice"}'}),
    "odd version": safetensors.numpy.save({}, {"pyroflows": '{"version": "one"}'}),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files(wing, path, name):
    path.write_bytes(FOREIGN[name])
    with pytest.raises(ValueError, match="flow.safetensors"):
        wing.package.load(path)


def test_no_code_is_run(wing, path, tmp_path):
    sprung = tmp_path / "sprung"
    data = pickle.dumps(Trap(sprung))
    inside = safetensors.numpy.save({"x": np.frombuffer(data, np.uint8)}, {"pyroflows": "{}"})
    for content in (data, inside):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="flow.safetensors"):
            wing.package.load(path)
    assert not sprung.exists()
    pickle.loads(data)
    assert sprung.exists()


def test_no_file(wing, tmp_path):
    with pytest.raises(FileNotFoundError, match="flow.safetensors"):
        wing.package.load(tmp_path / "flow.safetensors")
    with pytest.raises(ValueError, match="not a file"):
        wing.package.load(tmp_path)


def test_a_newer_format(wing, path):
    wing.package.save(used(wing, SMALL), path)
    tampered(path, lambda about, arrays: about.update(version=2, library="9.9", builder=None))
    with pytest.raises(ValueError, match=r"version 2.*9\.9.*upgrade"):
        wing.package.load(path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A file, and one beside it to write to."""
    path = tmp_path_factory.mktemp("storage") / "sound"
    wing = WINGS[0]
    wing.package.save(used(wing, SMALL, "float32"), path)
    return path, path.with_name("broken")


@settings(max_examples=60)
@given(data=st.data())
def test_flipped_and_cut_bytes(wing, sound, data):
    """A broken file is refused, or what was broken in it says nothing of the flow."""
    path, broken = sound
    content = bytearray(path.read_bytes())
    head = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        top = data.draw(st.sampled_from([8, head, len(content)]))
        at = data.draw(st.integers(0, top - 1))
        content[at] ^= data.draw(st.integers(1, 255))
    if data.draw(st.booleans()):
        cut = sorted(data.draw(st.integers(0, len(content))) for _ in range(2))
        del content[slice(*cut)]
    broken.write_bytes(content)
    try:
        loaded = wing.package.load(broken)
    except ValueError:
        return
    same(wing, wing.package.load(path), loaded)


def test_every_cut_and_every_byte_of_the_numbers(wing, sound):
    path, broken = sound
    content = path.read_bytes()
    head = 8 + int.from_bytes(content[:8], "little")
    variants = [content[:end] for end in range(0, len(content), 41)]
    for at in range(head, len(content), 17):
        variants.append(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    variants += [content + b"\0", content + content]
    for variant in variants:
        broken.write_bytes(variant)
        with pytest.raises(ValueError, match="broken"):
            wing.package.load(broken)


def renamed(about, arrays):
    arrays["other"] = arrays.pop("layers.1.loc")


def pruned(about, arrays):
    for name in [name for name in arrays if name.startswith("layers.0.")]:
        del arrays[name]


def recast(name, dtype):
    return lambda about, arrays: arrays.update({name: arrays[name].astype(dtype)})


def argument(**changes):
    return lambda about, arrays: about["arguments"].update(changes)


def field(**changes):
    return lambda about, arrays: about.update(changes)


LOC, FLAG = "layers.1.loc", "layers.0.layers.0.layers.2.initialized"
INDEX = "layers.0.layers.0.layers.1.permutation"
SIGNS = "layers.0.layers.0.layers.1.signs"
HUGE = 10**9
TAMPERED = {
    "unknown builder": field(builder="flow"),
    "another name of the module": field(builder="_plain"),
    "a dunder": field(builder="__builtins__"),
    "another builder": field(builder="nice"),
    "builder of another type": field(builder=3),
    "no builder": lambda about, arrays: about.pop("builder"),
    "no arguments": lambda about, arrays: about.pop("arguments"),
    "arguments of another type": field(arguments=[1]),
    "unknown argument": argument(command="true"),
    "a key": argument(key=[0, 1]),
    "a network": argument(network="os.system"),
    "a scale": argument(scale=["os.system"]),
    "unknown scale": argument(scale="os.system"),
    "unknown activation": argument(activation="system"),
    "unknown partition": argument(partition="none"),
    "a short partition": argument(partition=[True, False]),
    "a partition of strings": argument(partition=["a", "b", "c"]),
    "a nested partition": argument(partition=[[True], [False], [True]]),
    "layers as text": argument(layers="2"),
    "layers as a fraction": argument(layers=2.0),
    "layers as nothing": argument(layers=None),
    "fewer layers": argument(layers=1),
    "negative layers": argument(layers=-3),
    "a switch as text": argument(robust="no"),
    "init_scale as text": argument(init_scale="1"),
    "negative width": argument(hidden=[-4]),
    "no event shape": lambda about, arrays: about["arguments"].pop("event_shape"),
    "event shape of images": argument(event_shape=[3, 1, 1]),
    "another event shape": field(event_shape=[4]),
    "another context": field(context_dim=2),
    "context as text": field(context_dim="0"),
    "unknown base": field(base="cauchy"),
    "base of another type": field(base=["normal"]),
    "huge layers": argument(layers=HUGE),
    "many layers": argument(layers=30),
    "huge width": argument(hidden=[HUGE]),
    "large width": argument(hidden=[150]),
    "many widths": argument(hidden=[4] * 10**5),
    "huge event": argument(event_shape=HUGE),
    "huge event tuple": argument(event_shape=[HUGE]),
    "huge context": argument(context_dim=HUGE),
    "astronomical": argument(layers=10**300, hidden=[10**300]),
    "renamed": renamed,
    "removed": lambda about, arrays: arrays.pop(LOC),
    "added": lambda about, arrays: arrays.update(more=np.zeros(2)),
    "nothing left": lambda about, arrays: arrays.clear(),
    "little left": pruned,
    "reshaped": lambda about, arrays: arrays.update({LOC: arrays[LOC][:, None]}),
    "shortened": lambda about, arrays: arrays.update({LOC: arrays[LOC][:2]}),
    "floats as integers": recast(LOC, np.int64),
    "complex": recast(LOC, np.complex64),
    "flag as integer": recast(FLAG, np.int64),
    "index as float": recast(INDEX, np.float32),
    "index as bool": recast(INDEX, bool),
    "odd integers": recast(INDEX, np.uint8),
    "no permutation": lambda about, arrays: arrays.update({INDEX: np.array([0, 0, 0])}),
    "negative indices": lambda about, arrays: arrays.update({INDEX: np.array([0, 1, -1])}),
    "no signs": lambda about, arrays: arrays.update({SIGNS: np.array([1, 5, -1])}),
    "levels of vectors": argument(levels=2),
    "huge images": argument(event_shape=[1, HUGE, HUGE]),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_tampered_files(wing, sound, name):
    """Whoever writes a file to do harm can write a checksum, too."""
    path, broken = sound
    broken.write_bytes(path.read_bytes())
    tampered(broken, TAMPERED[name])
    start, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="broken"):
        wing.package.load(broken)
    assert time.process_time() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 300_000  # kB


def test_a_large_file_of_nothing(wing, path):
    """Arrays without numbers take no place in a file: neither may what is built for them."""
    empty = {f"a{i}": np.zeros((0, HUGE), "float32") for i in range(3000)}
    arguments = {"event_shape": 3, "layers": 40, "hidden": [4] * 30}
    about = {"builder": "realnvp", "arguments": arguments, "base": "normal"}
    pyroflows.archive.write(path, {**about, "event_shape": [3], "context_dim": 0}, empty)
    start = time.process_time()
    with pytest.raises(ValueError, match="larger"):
        wing.package.load(path)
    assert time.process_time() - start < 10


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


def test_the_format_is_the_same_in_both_wings():
    ours, theirs = (
        Path(m.__file__).read_text() for m in (pyroflows.archive, numpyro_flows.archive)
    )
    assert ours == theirs


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
    with pytest.raises(ValueError, match="bfloat16"):
        wing.package.save(wing.new("ActNorm", 3).to(torch.bfloat16), path)
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
