"""The cache of the pages' code: outputs of a session are reused as a whole or run again."""

import importlib
from pathlib import Path

import pytest

BLOCKS = ["x = 2", "print(x + 1)", "x = 5\nprint(x)", "print(x * x)"]


@pytest.fixture
def module(monkeypatch):
    """The cache's module, as a build of the site imports it."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "docs")
    return importlib.import_module("cache")


def outputs(module, folder, blocks, session="tests"):
    """What the blocks print, and how many of them a new process would have run."""
    cache, ran = module.Cache(folder), []
    session = f"{session}-{id(cache)}"  # a new process: nothing has run in it
    codes = [f"import cache as c; c.RAN.append(1)\n{block}" for block in blocks]
    module.RAN = ran
    return [cache.run(code, session=session) for code in codes], len(ran)


def test_what_has_run_is_not_run_again(module, tmp_path):
    expected = ["", "3\n", "5\n", "25\n"]
    assert outputs(module, tmp_path, BLOCKS) == (expected, 4)
    assert outputs(module, tmp_path, BLOCKS) == (expected, 0)


def test_a_changed_block_runs_with_all_before_it_and_all_after_it(module, tmp_path):
    outputs(module, tmp_path, BLOCKS)
    changed = [*BLOCKS[:2], "x = 6\nprint(x)", BLOCKS[3]]
    assert outputs(module, tmp_path, changed) == (["", "3\n", "6\n", "36\n"], 4)
    assert outputs(module, tmp_path, changed) == (["", "3\n", "6\n", "36\n"], 0)
    longer = [*changed, "print(x + 10)"]
    assert outputs(module, tmp_path, longer) == (["", "3\n", "6\n", "36\n", "16\n"], 5)


def test_an_error_is_not_kept(module, tmp_path):
    for _ in range(2):
        with pytest.raises(Exception, match="ValueError: no"):
            module.Cache(tmp_path).run("raise ValueError('no')", session="fails")
    assert not list(tmp_path.iterdir())
