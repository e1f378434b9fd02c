"""Laws on the loop of `fit_guide`, with losses that are known beforehand."""

import math

import numpy as np
import pytest

from pyroflows_common.ascent import Ascent, as_settings
from pyroflows_common.schedule import LONGEST_FALL, SLIGHT, STRETCHES, WINDOW, Course

STOP = None  # stands for Ctrl-C


class Scripted(Ascent):
    """Runs with these losses, whose state is the number of steps made."""

    def __init__(self, *runs):
        self.runs, self.begun = runs, 0

    def begin(self):
        self.losses, self.made, self.skipped = self.runs[self.begun], 0, 0
        self.begun += 1

    def climb(self, rates):
        for loss in self.losses[self.made : self.made + len(rates)]:
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

    def trained(self, steps, schedule="auto", progress=False):
        rates = [0.3, 0.2, 0.1][: len(self.runs)]
        return self.best(as_settings(steps, rates, schedule, None, progress, object))


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
    Scripted([3.0] * 40, [2.0] * 40).trained(40, progress=True)
    shown = capsys.readouterr().err
    assert "fit_guide: 100%" in shown
    assert "80/80" in shown
    assert "ELBO -2.00" in shown
    assert shown.count("\n") == 1
    assert "\r" not in shown


def noisy(losses, deviation, seed=0):
    return losses + deviation * np.random.default_rng(seed).standard_normal(len(losses))


QUIET = SLIGHT / 4 * math.sqrt(WINDOW / 2)  # a deviation at which a window tells enough
STEPS = 5000


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("level", [300, 1500])
def test_a_run_that_has_converged_lets_its_learning_rate_fall(level, seed):
    fall = np.maximum(3.0 - 3.0 * np.arange(STEPS) / level, 0.0)
    run = Scripted(noisy(fall, QUIET, seed)).trained(STEPS)
    assert run.stopped == "converged"
    assert run.loss < 0.5
    turn = max(len(run.losses) // 2, len(run.losses) - LONGEST_FALL)
    assert level + WINDOW < turn < level + 6 * WINDOW


def test_a_loss_without_noise_converges_where_it_stands_still():
    run = Scripted(np.maximum(3.0 - 0.01 * np.arange(STEPS), 0.0)).trained(STEPS)
    assert (run.stopped, run.loss) == ("converged", 0.0)
    assert 2 * (300 + WINDOW) <= len(run.losses) < 2 * (300 + 3 * WINDOW)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("slope", "deviation", "schedule"),
    [
        (1.5 * SLIGHT / WINDOW, QUIET, "auto"),  # it still rises
        (0.0, 4 * QUIET, "auto"),  # nobody knows whether it rises
        (0.0, QUIET, "cosine"),
        (0.0, QUIET, None),
        (0.0, QUIET, lambda step: 1.0),
    ],
)
def test_a_run_takes_all_steps_otherwise(slope, deviation, schedule, seed):
    losses = noisy(-slope * np.arange(STEPS), deviation, seed)
    run = Scripted(losses).trained(STEPS, schedule)
    assert (run.stopped, len(run.losses)) == ("steps", STEPS)


@pytest.mark.parametrize("steps", [7, 40, 999, 5000])
@pytest.mark.parametrize("turn", [None, 600, 1300, 4500])
def test_the_learning_rate_falls_to_zero_along_a_cosine(steps, turn):
    course, factors = Course("auto", steps), []
    for part in course:
        factors.extend(part)
        if turn is not None and len(factors) >= turn and not course.converged:
            left = steps - len(factors)
            saved = course.shorten(np.zeros(len(factors)))
            assert (saved > 0) == course.converged == (left > min(len(factors), LONGEST_FALL))
            before = len(factors)
    factors = np.array(factors)
    planned = 0.5 * (1.0 + np.cos(np.pi * np.arange(steps) / steps))
    before = before if course.converged else len(factors)
    np.testing.assert_allclose(factors[:before], planned[:before], atol=1e-12)
    if course.converged:
        rest = len(factors) - before
        assert rest == min(before, LONGEST_FALL) < steps - before
        last = planned[before - 1]
        expected = last * 0.5 * (1.0 + np.cos(np.pi * np.arange(rest) / rest))
        np.testing.assert_allclose(factors[before:], expected, atol=1e-12)
    else:
        assert len(factors) == steps


@pytest.mark.parametrize("steps", [1, 9, 10, 499, 500, 1234, 5000])
def test_stretches_make_up_the_run(steps):
    lengths = [len(part) for part in Course(None, steps)]
    assert sum(lengths) == steps
    assert len(lengths) < 1.1 * STRETCHES
    assert len(set(lengths[:-1])) <= 1
    assert lengths[0] <= lengths[-1] < 2 * lengths[0]


def test_losses_that_are_not_finite_do_not_end_a_run():
    losses = noisy(np.zeros(STEPS), QUIET)
    losses[np.arange(STEPS) % 2 == 0] = math.inf
    run = Scripted(losses).trained(STEPS)
    assert (run.stopped, run.skipped) == ("steps", STEPS // 2)
