"""Laws of the progress of `fit` and `fit_guide`: a bar to look at, a few lines in a log."""

import itertools
import sys

import pytest

from pyroflows_common import progress
from tests.wings.hosts import of_density
from tests.wings.training import SMALL, fit, small


def train(wing, steps=120):
    """A run of `fit` that shows its progress."""
    fit(wing, small(wing), SMALL, steps=steps, progress=True)


@pytest.fixture
def slow(monkeypatch):
    """A clock on which each look takes a minute."""
    clock = itertools.count(step=60.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))


def test_a_log_gets_one_line(wing, capsys):
    train(wing)
    shown = capsys.readouterr().err
    assert "\r" not in shown
    assert shown.count("\n") == 1
    for text in ("fit: 100% | 120/120 [", "step/s, loss=", ", validation="):
        assert text in shown


def test_a_log_of_a_guide_gets_one_line(host, capsys):
    model = of_density(host, lambda xp, x: -(x**2).sum(-1) / 2)
    guide = host.guides.AutoNormal(model)
    host.package.fit_guide(guide, steps=60, learning_rate=[1e-2, 1e-3])
    shown = capsys.readouterr().err
    assert "\r" not in shown
    assert shown.count("\n") == 1
    assert shown.startswith("fit_guide: 100% | 120/120 [")
    assert "ELBO" in shown


@pytest.mark.usefixtures("slow")
def test_a_long_run_writes_a_line_each_tenth(wing, capsys):
    train(wing)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" |")[0] for line in lines] == [
        f"fit: {percent}%" for percent in range(10, 101, 10)
    ]


@pytest.mark.parametrize("place", ["terminal", "notebook"])
def test_a_bar_is_redrawn_where_someone_looks(wing, capsys, monkeypatch, place):
    if place == "terminal":
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    else:
        monkeypatch.setitem(sys.modules, "ipykernel", sys)
    train(wing, steps=3)
    shown = capsys.readouterr().err
    assert "\rfit: 100%|██████████| 3/3 [" in shown


def test_a_run_that_ends_early_says_where(capsys):
    with progress.bar(40, title="fit", initial=20) as shown:
        shown.update(4)
        shown.set_postfix({"loss": "1.5", "skipped": "2"})
    assert capsys.readouterr().err.startswith("fit: 60% | 24/40 [00:00<00:00, ")
