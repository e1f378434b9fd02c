"""The file format that both wings share: one safetensors file of named arrays and JSON."""

import hashlib
import importlib.metadata
import json
import math
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, BinaryIO, Union, get_args, get_origin, get_type_hints

import numpy as np
import safetensors.numpy

from pyroflows_common.checks import as_event_shape
from pyroflows_common.recipe import Recipe

# The JSON is a single entry of the metadata: safetensors does not fix the order of several.
KEY = "pyroflows"
VERSION = 1
DTYPES = ("float16", "float32", "float64", "int64", "bool")
FIELDS = {
    "builder": str,
    "arguments": dict,
    "base": str,
    "event_shape": list,
    "context_dim": int,
}


def write(
    path: str | os.PathLike[str], about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> None:
    """Write a file; if that fails, an existing file is unchanged."""
    target = Path(os.path.realpath(path))
    if target.is_dir() or not target.parent.is_dir():
        raise ValueError(f"`path` is {str(path)!r}, expected a file in a directory")
    floats = [array.dtype for array in arrays.values() if array.dtype.kind == "f"]
    dtype = np.result_type(*floats).name if floats else ""
    about = {"version": VERSION, "library": library(), "dtype": dtype, **about}
    if not about.get("bfloat16"):  # few files have such arrays
        about.pop("bfloat16", None)
    about["checksum"] = checksum(about, arrays)
    data = safetensors.numpy.save(dict(arrays), {KEY: json.dumps(about, sort_keys=True)})
    replace_file(target, lambda file: file.write(data))


def replace_file(target: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Replace a file by what a function writes; if that fails, an existing file is unchanged."""
    # A rename is atomic: a process killed here leaves either the old file or the new one.
    unfinished = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open(unfinished, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the JSON and the arrays of a file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is broken, foreign or of a newer version.
    """
    name = f"`path` {str(path)!r}"
    if not os.path.exists(path):
        raise FileNotFoundError(f"{name} does not exist")
    if not os.path.isfile(path):
        raise ValueError(f"{name} is not a file")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            about = json.loads((file.metadata() or {}).get(KEY, "{}"))
            arrays = {key: np.array(file.get_tensor(key)) for key in file.keys()} if about else {}
        noted = about.pop("checksum", None)
        found = checksum(about, arrays)
        newer = about.get("version", 0) > VERSION
    except OSError:
        raise
    except Exception as error:  # a broken file can raise anything
        raise ValueError(f"{name} is broken or not from `save`: {error!r:.200}") from error
    if not about:
        raise ValueError(f"{name} is a safetensors file, but was not written by `save`")
    if newer:
        raise ValueError(
            f"{name} has format version {about['version']}, from pyroflows {about.get('library')}, "
            f"but this installation reads up to version {VERSION}: upgrade pyroflows"
        )
    if noted != found:
        raise ValueError(f"{name} is broken: its content does not match its checksum")
    for field, kind in FIELDS.items():
        if not isinstance(about.get(field), kind):
            raise ValueError(f"{name} is broken: its {field} is {about.get(field)!r:.80}")
    return about, arrays


def checksum(about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """Return a digest of the content of a file."""
    layout = {name: [array.dtype.name, *array.shape] for name, array in arrays.items()}
    digest = hashlib.sha256(json.dumps([about, layout], sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def library() -> str:
    """Return the version of the installed library."""
    try:
        return importlib.metadata.version("pyroflows")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def stored_dtype(name: str) -> str:
    """Return the dtype that a file holds for an array of this dtype.

    All integers are int64. NumPy has no bfloat16: float32 holds its numbers exactly.
    """
    if name in ("int8", "int16", "int32", "uint8"):
        return "int64"
    return "float32" if name == "bfloat16" else name


def without_ends(
    arguments: Mapping[str, Any], ends: Iterable[str], arrays: Mapping[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a builder's arguments, and those of layers that were added at the data end."""
    added = {name: plain(arguments[name]) for name in ends if name in arguments}
    if "rank" in added:  # of a matrix, which has to be among the arrays
        shapes = [array.shape for name, array in arrays.items() if name.endswith("basis")]
        size = math.prod(as_event_shape(plain(arguments.get("event_shape"))))
        if (size, added["rank"]) not in shapes:
            raise ValueError(f"its rank is {added['rank']!r:.80}, but its arrays are {shapes}")
    return {name: value for name, value in arguments.items() if name not in ends}, added


def bfloats(about: Mapping[str, Any]) -> list[str]:
    """Return the names of the arrays of a file that were bfloat16."""
    names = about.get("bfloat16", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"its bfloat16 is {names!r:.80}, expected names of arrays")
    return names


def check_call(
    builders: Mapping[str, Callable[..., Any]],
    builder: str,
    arguments: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Check that a file's call of a builder is valid, and in proportion to the file's arrays.

    A checksum protects from accidents, but not from a file that was written to do harm: the flow
    that is built must never be far larger than the file.

    Args:
        builders: builders of the wing by name.
        builder: name in the file.
        arguments: arguments in the file, as JSON holds them.
        arrays: arrays of the file.

    Returns:
        The arguments as the builder takes them.
    """
    if not builder:
        raise ValueError("no builder can rebuild this flow: pass a flow of its structure, like=…")
    if builder not in builders:
        raise ValueError(f"its builder is {builder!r:.80}, expected one of {tuple(builders)}")
    kinds = argument_kinds(builders[builder])
    call = {name: plain(value) for name, value in arguments.items()}
    sizes: list[int] = []
    for name, value in call.items():
        inner = value if isinstance(value, tuple) else ()
        if not isinstance(value, kinds.get(name, ())) or not _are_integers(inner):
            raise ValueError(f"{builder} does not take {name:.80}={value!r:.80}")
        sizes += inner or ([value] if isinstance(value, int) else [])
    # Each layer has a network, which has two arrays for each of its own layers.
    depths = [call.get(name) or 1 for name in ("layers", "levels", "steps", "scales", "blocks")]
    matrices = math.prod(depths) * (len(call.get("hidden", ())) + 1)
    shape = call.get("event_shape")
    if builder == "nice" and isinstance(shape, tuple):  # treats images as vectors
        sizes.append(math.prod(shape))
    total = sum(array.size for array in arrays.values())
    if 2 * matrices > len(arrays) or max(sizes, default=0) > total:
        raise ValueError(f"the arguments of {builder} ask for a larger flow than the file holds")
    return call


def argument_kinds(build: Callable[..., Any]) -> dict[str, tuple[type, ...]]:
    """Return the types that a file may hold for each argument of a builder, from its signature.

    A file holds a sequence as a tuple of integers or booleans, and never a function, a network or a
    key.
    """
    return {name: tuple(_kinds(hint)) for name, hint in get_type_hints(build).items()}


def _kinds(hint: Any) -> Iterator[type]:
    if get_origin(hint) in (Union, UnionType):
        for inner in get_args(hint):
            yield from _kinds(inner)
    elif get_origin(hint) is Sequence:
        yield tuple
    elif hint is float:
        yield from (float, int)
    elif hint is bool:
        yield from (bool, int)
    elif hint in (int, str, NoneType):
        yield hint


def _are_integers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int) for value in values)


def check_like(about: Mapping[str, Any], recipe: Recipe | None) -> None:
    """Check that a flow with this recipe, if any, was built as the flow in the file."""
    saved = {name: plain(value) for name, value in about["arguments"].items()}
    if about["builder"] and recipe is not None:
        own = dict(recipe.arguments)
        if (recipe.builder, own) != (about["builder"], saved):
            raise ValueError(
                f"the saved flow was built by {about['builder']} with {saved}, but `like` by "
                f"{recipe.builder} with {own}"
            )


def check_event(about: Mapping[str, Any], event_shape: tuple[int, ...], context_dim: int) -> None:
    """Check that a file's event shape and size of the context are those of a flow."""
    for field, own in (("event_shape", event_shape), ("context_dim", context_dim)):
        if plain(about[field]) != own:
            raise ValueError(f"its {field} is {about[field]}, but the flow's {own}")


def check_base(base: str, bases: Iterable[str]) -> str:
    """Check that a base has one of the known names, or is a custom one, and return it."""
    names = (*bases, "custom")
    if base not in names:
        raise ValueError(f"its base is {base!r:.80}, expected one of {names}")
    return base


def check_arrays(
    arrays: Mapping[str, np.ndarray], own: Mapping[str, tuple[tuple[int, ...], str]]
) -> None:
    """Check that arrays have the names, shapes and kinds of number of a flow's arrays."""
    missing, unexpected = sorted(own.keys() - arrays.keys()), sorted(arrays.keys() - own.keys())
    if missing or unexpected:
        raise ValueError(
            f"its arrays do not fit the flow: missing {missing[:5]}, unexpected {unexpected[:5]}"
        )
    for name, (shape, dtype) in own.items():
        found = arrays[name]
        same = found.dtype.name == dtype or found.dtype.name[:5] == dtype[:5] == "float"
        if found.shape != tuple(shape) or not same or found.dtype.name not in DTYPES:
            raise ValueError(
                f"its array {name} has shape {found.shape} and dtype {found.dtype}, but the "
                f"flow's has {tuple(shape)} and {dtype}"
            )


def check_values(arrays: Mapping[str, np.ndarray]) -> None:
    """Check that the state of layers has possible values."""
    for name, array in arrays.items():
        kind = name.rpartition(".")[2]
        if (
            (kind == "permutation" and sorted(array.tolist()) != list(range(array.size)))
            or (kind == "signs" and not np.isin(array, (-1, 1)).all())
            or (kind == "running_var" and not (array >= 0).all())
        ):
            raise ValueError(f"its array {name} has values that no {kind} can have")


def plain(value: object) -> Any:
    """Return a list of JSON as the tuple that it was."""
    return tuple(map(plain, value)) if isinstance(value, list) else value
