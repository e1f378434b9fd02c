"""Interleaved timing: every contender in every round, in an order drawn anew."""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

TASKS = ("train", "log_prob", "sample")
FLOOR = "floor"

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

Contender = Mapping[str, Callable[[], object]]  # a callable without arguments for each task


@dataclass(frozen=True)
class Settings:
    """How the work is done: the same for every contender."""

    batch: int
    threads: int = 2
    rounds: int = 100
    clock: str = "wall"
    seed: int = 0


@dataclass(frozen=True)
class VectorSettings(Settings):
    """Affine couplings of vectors."""

    batch: int = 1024
    dim: int = 64
    couplings: int = 8
    hidden: tuple[int, ...] = (128, 128)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of an event."""
        return (self.dim,)


@dataclass(frozen=True)
class ImageSettings(Settings):
    """Glow on images, all of whose steps have networks of equal width."""

    batch: int = 64
    shape: tuple[int, ...] = (1, 28, 28)
    levels: int = 2
    steps: int = 8
    channels: int = 64

    def networks(self) -> list[list[int]]:
        """Return the numbers of channels that each network takes and gives, level by level."""
        inner = [4 * self.shape[0] * 2**level for level in range(self.levels)]
        return [[c // 2, c] for c in inner]


@dataclass(frozen=True)
class Ratio:
    """A contender's time for one task, and as a multiple of the floor's."""

    milliseconds: float  # the shortest
    shortest: float  # shortest over the floor's shortest
    median: float  # median over the rounds of this contender's time over the floor's


def interleaved(contenders: Mapping[str, Contender], settings: Settings) -> dict:
    """Time every task of every contender once a round; return the times by task and name."""
    clock = CLOCKS[settings.clock]
    draw = random.Random(settings.seed)
    times = {task: {name: [] for name in contenders} for task in TASKS}
    for works in contenders.values():
        for task in TASKS:
            for _ in range(3):
                works[task]()
    for _ in range(settings.rounds):
        for task in TASKS:
            for name in draw.sample(list(contenders), len(contenders)):
                start = clock()
                contenders[name][task]()
                times[task][name].append(clock() - start)
    return times


def ratios(times: Mapping[str, Mapping[str, list[float]]]) -> dict[str, dict[str, Ratio]]:
    """Return the ratios to the floor, by name and task."""
    return {
        name: {task: _ratio(times[task][name], times[task][FLOOR]) for task in TASKS}
        for name in times[TASKS[0]]
    }


def noise(times: Mapping[str, Mapping[str, list[float]]]) -> float:
    """Median over shortest time of the floor, the worst task: 1.0 on a machine left alone."""
    floors = [times[task][FLOOR] for task in TASKS]
    return max(statistics.median(floor) / min(floor) for floor in floors)


def _ratio(times: list[float], floor: list[float]) -> Ratio:
    paired = [own / base for own, base in zip(times, floor, strict=True)]
    return Ratio(1e3 * min(times), min(times) / min(floor), statistics.median(paired))
