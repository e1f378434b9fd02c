"""Laws on the loop of `fit_guide`, with losses that are known beforehand."""

import math

import numpy as np
import pytest

from pyroflows_common.ascent import Ascent

STOP = None  # stands for Ctrl-C


class Scripted(Ascent):
    """Runs with these losses, whose state is the number of steps made."""

    def __init__(self, *runs):
        self.runs, self.begun = runs, 0

    def begin(self):
        self.losses, self.made, self.skipped = self.runs[self.begun], 0, 0
        self.begun += 1

    def climb(self, rate, length):
        for loss in self.losses[self.made : self.made + length]:
            if loss is STOP:
                raise KeyboardInterrupt
            self.made += 1
            self.skipped += not math.isfinite(loss)
            yield np.array([loss])

    def state_now(self):
        return self.made

    def stands(self, before):
        return False

    def blind(self):
        raise AssertionError  # there is no need to look

    def trained(self, steps):
        return self.best([0.3, 0.2, 0.1][: len(self.runs)], steps, progress=False)


def test_the_best_run_is_returned_as_its_best_stretch_left_it():
    low = [3.0] * 20 + [1.0] * 10 + [2.0] * 10
    run = Scripted([2.0] * 40, low, [4.0] * 40).trained(40)
    assert (run.learning_rate, run.loss, run.state, run.stopped) == (0.2, 1.0, 30, "steps")
    assert run.losses.tolist() == low


@pytest.mark.parametrize("made", [0, 5, 25])
def test_control_c_ends_all_runs(made):
    """What has been learned is kept, without the stretch that was cut off."""
    falling = [*[2.5] * 10, *[2.0] * 15][:made]
    ascent = Scripted([3.0] * 40, [*falling, STOP], [1.0] * 40)
    run = ascent.trained(40)
    assert ascent.begun == 2
    expected = (0.2, 2.0, 20, "interrupted") if made == 25 else (0.3, 3.0, 10, "steps")
    assert (run.learning_rate, run.loss, run.state, run.stopped) == expected
    assert len(run.losses) == (25 if made == 25 else 40)


def test_a_stretch_without_a_finite_loss_ends_its_run():
    ascent = Scripted([*[2.0] * 15, *[math.nan] * 25], [3.0] * 40)
    run = ascent.trained(40)
    assert (ascent.begun, run.loss, run.state, run.stopped) == (2, 2.0, 10, "not finite")
    assert (len(run.losses), run.skipped) == (30, 15)
    with pytest.warns(UserWarning, match="after 30 steps, as of tests: .*of its best stretch"):
        run.warn("of tests")


def test_a_run_without_a_finite_loss_leaves_what_was():
    run = Scripted([math.inf] * 40).trained(40)
    assert (run.loss, run.state, run.skipped, run.stopped) == (math.inf, 0, 10, "not finite")
    with pytest.warns(UserWarning, match="after 10 steps, as of tests: .*what they were"):
        run.warn("of tests")


def test_the_bar_counts_the_steps_of_all_runs(capsys):
    Scripted([3.0] * 40, [2.0] * 40).best([0.3, 0.2], 40, progress=True)
    shown = capsys.readouterr().err
    assert "fit_guide: 100%" in shown
    assert "80/80" in shown
    assert "ELBO -2.00" in shown
    assert shown.count("\n") == 1
    assert "\r" not in shown
