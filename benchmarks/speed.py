"""Speed of both wings beside their conditioners alone and beside other libraries.

`make bench`, or `python benchmarks/speed.py`, prints the tables and writes them into
docs/benchmarks.md. That page says what is measured, and how to read it.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import multiprocessing
import os
import platform
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from timing import (
    CLOCKS,
    FLOOR,
    TASKS,
    ImageSettings,
    Ratio,
    Settings,
    VectorSettings,
    interleaved,
    noise,
    ratios,
)

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
START, END = "<!-- measured: start -->", "<!-- measured: end -->"

# The most that a task may take, as a multiple of the floor.
BARS = {
    "pyroflows": {"train": 1.30, "log_prob": 1.30, "sample": 1.30},
    "pyroflows, torch.compile": {"train": 1.05, "log_prob": 1.10, "sample": 1.10},
    "numpyro_flows": {"train": 1.15, "log_prob": 1.10, "sample": 1.10},
}
GLOW_BARS = {"pyroflows": {"train": 1.30}, "numpyro_flows": {"train": 1.30}}
COMPILE_BAR, GLOW_COMPILE_BAR = 1.2, 1.3
DEPTHS, GLOW_DEPTHS = (8, 16, 32, 64), (4, 32)
QUIET = 1.15  # noise above which the figures say more about the machine than about the code

PACKAGES = {
    "torch": "torch",
    "pyro-ppl": "pyro",
    "zuko": "zuko",
    "nflows": "nflows",
    "normflows": "normflows",
    "jax": "jax",
    "numpyro": "numpyro",
    "equinox": "equinox",
    "flowjax": "flowjax",
}


def main() -> None:
    """Measure, print and write."""
    options = arguments()
    require_packages()
    rounds = options.rounds or (15 if options.quick else 100)
    given = {"threads": options.threads, "clock": options.clock}
    settings = VectorSettings(rounds=rounds, **given)
    glow = ImageSettings(rounds=max(3, rounds // 4), **given)
    depths = DEPTHS[:2] if options.quick else DEPTHS
    compiled = {depth: compile_time(depth, settings) for depth in depths}
    glow_compiled = {depth: compile_time(depth, glow) for depth in GLOW_DEPTHS}
    sections = [
        machine(settings, glow),
        *(wing_section(name, in_fresh_process(measure, name, settings)) for name in WINGS),
        compile_section("in NumPyro", "couplings", compiled, COMPILE_BAR),
        *(
            wing_section(f"Glow, {name}", in_fresh_process(measure, name, glow), GLOW_BARS)
            for name in WINGS
        ),
        compile_section("of Glow in NumPyro", "steps per level", glow_compiled, GLOW_COMPILE_BAR),
    ]
    report = "\n\n".join(sections)
    print(report)
    if options.output:
        write(report, options.output)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time both wings beside their peers.")
    parser.add_argument("--quick", action="store_true", help="few rounds, for a first look")
    parser.add_argument("--rounds", type=int, help="how often each contender runs (100)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (2)")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: processor time, with --threads 1, where others use the machine",
    )
    parser.add_argument("--output", type=Path, default=PAGE, help="page that takes the tables")
    parser.add_argument(
        "--no-output", dest="output", action="store_const", const=None, help="only print"
    )
    return parser.parse_args()


def require_packages() -> None:
    missing = [name for name, module in PACKAGES.items() if not importlib.util.find_spec(module)]
    if missing:
        raise SystemExit(
            f"The benchmark needs {', '.join(missing)}: pip install 'pyroflows[all,bench]', "
            "or `make bench`, which does so"
        )


# Measuring. Each backend has a process of its own, so that their threads do not meet.


def measure_torch(settings: Settings) -> tuple[dict, float, dict[str, int]]:
    """Time what runs on PyTorch."""
    import contenders_torch as library

    images = isinstance(settings, ImageSettings)
    contenders = (library.glows if images else library.contenders)(settings)
    memory = {
        name: library.saved_bytes(works)
        for name, works in contenders.items()
        if "compile" not in name
    }
    times = interleaved(contenders, settings)
    return ratios(times), noise(times), memory


def measure_jax(settings: Settings) -> tuple[dict, float, dict[str, int]]:
    """Time what runs on JAX."""
    import contenders_jax as library

    images = isinstance(settings, ImageSettings)
    contenders = (library.glows if images else library.contenders)(settings)
    times = interleaved(contenders, settings)
    return ratios(times), noise(times), {}


WINGS = {"PyTorch": measure_torch, "JAX": measure_jax}


def measure(name: str, settings: Settings) -> tuple[dict, float, dict[str, int]]:
    return WINGS[name](settings)


def compile_time(depth: int, settings: Settings) -> float:
    """Return the shortest of three times, in seconds, to trace and compile a training step."""
    return min(in_fresh_process(compile_once, depth, settings) for _ in range(3))


def compile_once(depth: int, settings: Settings) -> float:
    import contenders_jax

    return contenders_jax.compile_seconds(depth, settings)


def in_fresh_process(function: Callable, *args: Any) -> Any:
    """Call a function in a new process that may use as many cores as there are threads."""
    threads = args[-1].threads
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=use_cores, initargs=(threads,)) as pool:
        return pool.submit(function, *args).result()


def use_cores(threads: int) -> None:
    """Restrict this process to some cores: JAX has no other setting for its threads."""
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


# Reporting


def machine(settings: Settings, glow: Settings) -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    clock = "" if settings.clock == "wall" else ", processor time"
    return (
        f"{datetime.date.today()}; {processor()}, {os.cpu_count()} cores, "
        f"{settings.threads} of them used{clock}; Python {platform.python_version()}; {versions}. "
        f"{settings.rounds} rounds, {glow.rounds} for Glow."
    )


def processor() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def wing_section(name: str, measured: tuple[dict, float, dict[str, int]], bars=BARS) -> str:
    results, unrest, memory = measured
    verdict = "quiet" if unrest < QUIET else "busy: compare the shortest times, and with caution"
    titles = ["", "training step", "`log_prob`", "`sample`"]
    rows = [[who, *(cell(works[task]) for task in TASKS)] for who, works in results.items()]
    if memory:
        titles.append("held for backward")
        rows = [
            [*row, f"{memory[row[0]] / 2**20:.0f} MiB" if row[0] in memory else ""] for row in rows
        ]
    verdicts = [
        [who, task, f"{results[who][task].shortest:.2f}", f"{bar:.2f}", answer(met)]
        for who in results
        for task, bar in bars.get(who, {}).items()
        for met in [results[who][task].shortest <= bar]
    ]
    floor = ", ".join(f"{results[FLOOR][task].milliseconds:.1f} ms" for task in TASKS)
    return "\n\n".join(
        [
            f"### {name}",
            table(titles, rows),
            f"The floor takes {floor}. Its median is {unrest:.2f} times its shortest. "
            f"The machine was {verdict}.",
            table(["", "task", "measured", "bar", "met"], verdicts),
        ]
    )


def compile_section(title: str, unit: str, seconds: dict[int, float], bar: float) -> str:
    first, last = min(seconds), max(seconds)
    growth = seconds[last] / seconds[first]
    rows = [[str(depth), f"{value:.2f} s"] for depth, value in seconds.items()]
    return "\n\n".join(
        [
            f"### Compile time {title}",
            table([unit, "tracing and compiling"], rows),
            f"{last} {unit} take {growth:.2f} times as long as {first}; "
            f"bar {bar:.2f}, met: {answer(growth <= bar)}.",
        ]
    )


def cell(ratio: Ratio) -> str:
    return f"{ratio.shortest:.2f} ({ratio.median:.2f})"


def answer(met: bool) -> str:
    return "yes" if met else "no"


def table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Lay out a Markdown table."""
    titles = list(titles)
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(report: str, page: Path) -> None:
    """Put the report between the page's markers."""
    text = page.read_text()
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise SystemExit(f"{page.name} has no markers {START} … {END}")
    page.write_text(f"{before}{START}\n\n{report}\n\n{END}{after}")


if __name__ == "__main__":
    main()
