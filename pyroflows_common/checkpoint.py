"""The file from which `fit` goes on after it was cut off, and how it is compared with a run."""

import json
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, BinaryIO

from pyroflows_common.archive import replace_file


class Checkpoint(ABC):
    """One file, replaced as a whole whenever it is written; each wing has its own format.

    Args:
        path: where the file is or will be.
        settings: all that the run's numbers depend on. A file written under others is refused.

    Raises:
        ValueError: where the path is not that of a file in a directory.
    """

    format: str  # written into the file, and expected there

    def __init__(self, path: str | os.PathLike[str], settings: dict[str, Any]) -> None:
        self.path = Path(path)
        if self.path.is_dir() or not self.path.absolute().parent.is_dir():
            raise ValueError(f"`checkpoint` is {str(path)!r}, expected a file in a directory")
        self.settings = json.loads(json.dumps(settings, default=describe))

    @abstractmethod
    def _write(self, state: dict[str, Any], file: BinaryIO) -> None:
        """Write a state to an open file."""

    @abstractmethod
    def _read(self) -> dict[str, Any]:
        """Return what the file holds; no code from it is run."""

    def save(self, state: dict[str, Any]) -> None:
        """Write a state: arrays, numbers, strings, and dicts and lists of them."""
        state = {"format": self.format, "settings": self.settings, **state}
        replace_file(self.path, lambda file: self._write(state, file))

    def load(self) -> dict[str, Any] | None:
        """Return the state, or None where there is no file yet.

        Raises:
            ValueError: where the file is not a checkpoint, or is one of another run.
        """
        if not self.path.exists():
            return None
        try:
            state = self._read()
            known = isinstance(state, dict) and state.get("format") == self.format
        except Exception as error:  # broken files fail in as many ways as there are
            raise ValueError(f"`checkpoint` {str(self.path)!r} cannot be read: {error}") from error
        if not known:
            raise ValueError(f"`checkpoint` {str(self.path)!r} is not a checkpoint of `fit`")
        differences = compare(state["settings"], self.settings)
        if differences:
            raise ValueError(
                f"`checkpoint` {str(self.path)!r} is of another run: {'; '.join(differences)}. "
                "Pass another path, or remove the file to start anew"
            )
        return state


def compare(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Return a line for each setting that a checkpoint and this call have differently."""
    differences = []
    for name in sorted(theirs.keys() | ours.keys()):
        there, here = theirs.get(name), ours.get(name)
        if there != here:
            short = max(len(repr(there)), len(repr(here))) < 60
            differences.append(
                f"`{name}` was {there!r} there and is {here!r} here"
                if short
                else f"`{name}` differs"
            )
    return differences


def describe(value: Any) -> Any:
    """Describe a value in the same way in every process."""
    if callable(value):
        named = value if hasattr(value, "__qualname__") else type(value)
        return f"{named.__module__}.{named.__qualname__}"
    return repr(value)
