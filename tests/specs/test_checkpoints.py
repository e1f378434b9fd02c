"""Laws of checkpoints: a run that was cut off goes on as if it had not been."""

import os
import signal
import subprocess
import sys
import warnings

import pytest
from numpy.testing import assert_array_equal

from tests.wings import WINGS
from tests.wings.training import (
    GAUSSIAN,
    SMALL,
    batches,
    fit,
    noisy,
    same,
    small,
)

interrupt_at = None
taken = []


def interrupting(step):
    """A schedule that presses Ctrl-C, or worse, and notes the steps."""
    taken.append(step)
    if step == interrupt_at:
        raise KeyboardInterrupt
    if os.environ.get("KILL_AT") == str(step):
        os.kill(os.getpid(), signal.SIGKILL)
    return 1.0 / (1 + step)


SOURCES = {
    "rows": lambda: (GAUSSIAN, {}),
    "validated rows": lambda: (GAUSSIAN, {"validation": 0.3}),
    "short epochs": lambda: (GAUSSIAN, {"batch_size": 300, "validate_every": None}),
    "list": lambda: (batches(4), {"validation": SMALL}),
    "iterator": lambda: (iter(batches(20)), {}),
}


def checkpointed(wing, source, path, name="realnvp", **options):
    data, own = SOURCES[source]()
    flow = small(wing, name, **({"batch_norm": True} if name == "realnvp" else {}))
    options = {
        "steps": 17,
        "validate_every": 3,
        "learning_rate": 3e-2,
        "schedule": interrupting,
        "validation": None,
        "batch_size": 64,
        "checkpoint": path,
        **own,
        **options,
    }
    return fit(wing, flow, data, **options)


@pytest.mark.parametrize("source", SOURCES)
def test_resuming_gives_the_same_numbers(wing, source, tmp_path, monkeypatch):
    whole = checkpointed(wing, source, None)
    monkeypatch.setattr(sys.modules[__name__], "interrupt_at", 11)
    cut = checkpointed(wing, source, tmp_path / "run")
    assert cut.stopped == "interrupted"
    monkeypatch.setattr(sys.modules[__name__], "interrupt_at", None)
    resumed = checkpointed(wing, source, tmp_path / "run")
    same(wing, resumed, whole)
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("validate_every", [3, None])
@pytest.mark.parametrize(("cut_at", "goes_on_at"), [(11, 8), (8, 8), (2, 0)])
def test_an_iterable_resumes_at_the_end_of_a_pass(
    wing, cut_at, goes_on_at, validate_every, tmp_path, monkeypatch
):
    """A pass has four steps. One that was cut off is made again, from a file or from the start."""
    path, options = tmp_path / "run", {"validate_every": validate_every}
    whole = checkpointed(wing, "list", None, **options)
    monkeypatch.setattr(sys.modules[__name__], "interrupt_at", cut_at)
    cut = checkpointed(wing, "list", path, **options)
    assert cut.stopped == "interrupted"
    assert len(cut.losses) == cut_at
    assert path.exists() == (goes_on_at > 0)
    monkeypatch.setattr(sys.modules[__name__], "interrupt_at", None)
    taken.clear()
    resumed = checkpointed(wing, "list", path, **options)
    assert taken[0] == goes_on_at
    same(wing, resumed, whole)


def test_augmented_glow_resumes(wing, tmp_path, monkeypatch):
    options = {"name": "glow", "augment": noisy(wing), "standardize": True}
    whole = checkpointed(wing, "validated rows", None, **options)
    monkeypatch.setattr(sys.modules[__name__], "interrupt_at", 10)
    checkpointed(wing, "validated rows", tmp_path / "run", **options)
    monkeypatch.setattr(sys.modules[__name__], "interrupt_at", None)
    same(wing, checkpointed(wing, "validated rows", tmp_path / "run", **options), whole)


def killed_run(name, path):
    """What the killed process does."""
    (wing,) = (wing for wing in WINGS if wing.name == name)
    warnings.simplefilter("ignore")
    checkpointed(wing, "validated rows", path)


def test_kill_nine(wing, tmp_path):
    path = tmp_path / "run"
    call = f"killed_run({wing.name!r}, {str(path)!r})"
    # The set-up of the tests goes first: it settles how programs are compiled, to the last bit.
    code = f"import tests.conftest; from tests.specs.test_checkpoints import killed_run; {call}"
    environment = {**os.environ, "KILL_AT": "11", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.exists()
    same(
        wing, checkpointed(wing, "validated rows", path), checkpointed(wing, "validated rows", None)
    )


def test_a_finished_run_returns_at_once(wing, tmp_path):
    whole = checkpointed(wing, "validated rows", tmp_path / "run")
    written = (tmp_path / "run").stat().st_mtime_ns
    same(wing, checkpointed(wing, "validated rows", tmp_path / "run"), whole)
    assert (tmp_path / "run").stat().st_mtime_ns == written


def test_a_checkpoint_of_another_run(wing, tmp_path, monkeypatch):
    path = tmp_path / "run"
    checkpointed(wing, "rows", path, steps=2)
    for options, word in [
        ({"steps": 3}, "`steps` was 2 there and is 3 here"),
        ({"steps": 2, "learning_rate": 0.5}, "`learning_rate`"),
        ({"steps": 2, "base": "logistic"}, "`base`"),
        ({"steps": 2, "name": "glow"}, "`flow`"),
        ({"steps": 2, "validation": 0.2}, "`validation`"),
        ({"steps": 2, "seed": 3}, "`(seed|key)`"),
    ]:
        with pytest.raises(ValueError, match=word):
            checkpointed(wing, "rows", path, **options)
    with pytest.raises(ValueError, match="`data`"):
        checkpointed(wing, "list", path, steps=2, validation=None)
    other = {**SOURCES, "rows": lambda: (GAUSSIAN[::-1].copy(), {})}
    monkeypatch.setattr(sys.modules[__name__], "SOURCES", other)
    with pytest.raises(ValueError, match="another run: `data` differs"):
        checkpointed(wing, "rows", path, steps=2)


def test_a_file_that_is_no_checkpoint(wing, tmp_path):
    path = tmp_path / "run"
    checkpointed(wing, "rows", path, steps=2)
    content = path.read_bytes()
    before = wing.state(small(wing))
    for broken in (b"", b"hello", content[: len(content) // 2], b"\x80\x04N."):
        path.write_bytes(broken)
        flow = small(wing)
        with pytest.raises(ValueError, match="`checkpoint`"):
            fit(wing, flow, GAUSSIAN, checkpoint=path)
        assert path.read_bytes() == broken
        for name, value in wing.state(flow).items():
            assert_array_equal(value, before[name])
    with pytest.raises(ValueError, match="`checkpoint`"):
        fit(wing, small(wing), GAUSSIAN, checkpoint=tmp_path / "nowhere" / "run")
