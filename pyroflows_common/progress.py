"""The progress bar of `fit` and `fit_guide`; where it would fill a log, a few lines."""

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm.asyncio import tqdm_asyncio
from tqdm.auto import tqdm

# Seconds between two lines of a log.
PAUSE = 10.0


def bar(total: int, *, title: str, unit: str = "it", initial: int = 0, shown: bool = True) -> Any:
    """Return a progress bar: tqdm's in a notebook and in a terminal, `Lines` elsewhere.

    Args:
        total: number of steps.
        title: what stands in front of it.
        unit: name of a step.
        initial: number of steps made before.
        shown: whether to show anything.
    """
    if shown and is_log():
        return Lines(total, title=title, unit=unit, initial=initial)
    return tqdm(total=total, initial=initial, disable=not shown, desc=title, unit=unit)


def is_log() -> bool:
    """Return whether standard error keeps what is written, so that nothing can be redrawn."""
    # `tqdm.auto` chose the console's bar, but a notebook without widgets redraws its text.
    console = tqdm is tqdm_asyncio and "ipykernel" not in sys.modules
    return console and not (hasattr(sys.stderr, "isatty") and sys.stderr.isatty())


class Lines:
    """Progress as lines of a log: at most one for each tenth of the steps, and one at the end.

    It has the methods of tqdm that the loops use.

    Args:
        total: number of steps.
        title: what stands in front of each line.
        unit: name of a step.
        initial: number of steps made before.
    """

    def __init__(self, total: int, *, title: str, unit: str, initial: int) -> None:
        self.total, self.n, self.initial = total, initial, initial
        self.title, self.unit, self.postfix = title, unit, ""
        self.start = self.written = time.monotonic()
        self.tenth = self._tenth()

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_: object) -> None:
        self._write()

    def update(self, n: int) -> None:
        """Count steps; write a line if a tenth has passed, and the last line is some time ago.

        Args:
            n: number of steps since the last call.
        """
        self.n += n
        if self.n == self.total or self._tenth() == self.tenth:
            return
        if time.monotonic() - self.written >= PAUSE:
            self._write()

    def set_postfix(self, values: Mapping[str, str], refresh: bool = False) -> None:
        """Set what stands at the end of a line.

        Args:
            values: names and texts.
            refresh: has no effect.
        """
        self.postfix = ", ".join(f"{name}={text}" for name, text in values.items())

    def set_postfix_str(self, text: str) -> None:
        """Set what stands at the end of a line.

        Args:
            text: the text.
        """
        self.postfix = text

    def _tenth(self) -> int:
        return 10 * self.n // self.total

    def _write(self) -> None:
        self.written, self.tenth = time.monotonic(), self._tenth()
        line = tqdm.format_meter(
            self.n,
            self.total,
            self.written - self.start,
            prefix=self.title,
            unit=self.unit,
            postfix=self.postfix,
            initial=self.initial,
            bar_format="{desc}: {percentage:.0f}% {r_bar}",
        )
        print(line, file=sys.stderr, flush=True)
