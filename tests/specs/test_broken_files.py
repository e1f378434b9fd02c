"""Laws of `load` for files that are no flows: they are refused, and harm nobody."""

import pickle
import resource
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from pyroflows_common import archive
from tests.wings import WINGS
from tests.wings.stored import SMALL, same, tampered, used


@pytest.fixture
def path(tmp_path):
    return tmp_path / "flow.safetensors"


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
    archive.write(path, {**about, "event_shape": [3], "context_dim": 0}, empty)
    start = time.process_time()
    with pytest.raises(ValueError, match="larger"):
        wing.package.load(path)
    assert time.process_time() - start < 10
