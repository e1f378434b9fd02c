"""What a benchmark has measured: kept in a file beside it, and written into docs/benchmarks.md."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
WINGS = {"numpyro": "NumPyro", "pyro": "Pyro"}

Runs = list[dict[str, Any]]


class Records:
    """Runs of both wings on several targets; a later run of a target takes the earlier one's place.

    Args:
        script: the benchmark's file.
        targets: their names, in the order of the table.
    """

    def __init__(self, script: str, targets: Sequence[str]) -> None:
        self.path, self.targets = Path(script).with_suffix(".json"), list(targets)

    def kept(self) -> Runs:
        """Return all that has been measured."""
        return json.loads(self.path.read_text()) if self.path.exists() else []

    def keep(self, run: dict[str, Any]) -> None:
        """Keep a run."""
        one = run["wing"], run["target"]
        others = [r for r in self.kept() if (r["wing"], r["target"]) != one]
        runs = [*others, run]
        runs.sort(key=lambda r: (r["wing"], self.targets.index(r["target"])))
        self.path.write_text(json.dumps(runs, indent=1) + "\n")

    def write(self, *parts: Callable[[Runs], str]) -> None:
        """Write the runs of each wing into the page, in parts that each say something of them."""
        start, end = (f"<!-- {self.path.stem}: {side} -->" for side in ("start", "end"))
        before, _, rest = PAGE.read_text().partition(start)
        after, shown = rest.partition(end)[2], []
        for wing, title in WINGS.items():
            own = [run for run in self.kept() if run["wing"] == wing]
            if own:
                shown += [f"### {title}", *(part(own) for part in parts)]
        PAGE.write_text(
            f"{before}{start}\n\n" + "\n\n".join(filter(None, shown)) + f"\n\n{end}{after}"
        )


def when(runs: Runs) -> str:
    """Return when and with what runs were made."""
    versions = ", ".join(f"{name} {version}" for name, version in runs[-1]["versions"].items())
    dates = " to ".join(sorted({min(r["date"] for r in runs), max(r["date"] for r in runs)}))
    return f"Measured on {dates} with {versions}"
