"""Recipes: the call of a builder, recorded on the flow for `save` and `load`."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from pyroflows_common.checks import as_event_shape
from pyroflows_common.partition import Partition


class Recipe(NamedTuple):
    """The call of a builder, from which `load` rebuilds the flow."""

    builder: str
    arguments: tuple[tuple[str, Any], ...]


def builder(
    network: type,
    note: Callable[[Any, Recipe], Any],
    *,
    vectors: Sequence[str] = (),
    images: Sequence[str] = (),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that makes a builder record its call on the flow, for `save` and `load`.

    Args:
        network: the host's base class of networks.
        note: function that puts a recipe on a flow and returns the flow.
        vectors: names of the arguments for vectors only.
        images: names of the arguments for images only.
    """

    def decorate(build: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(build)
        keyed = "key" in signature.parameters

        @functools.wraps(build)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            try:
                call = signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{build.__name__}: {error}") from None
            image = len(as_event_shape(call.arguments["event_shape"])) == 3
            useless = vectors if image else images
            for name in useless:
                if name in call.arguments:
                    kind, shape = ("vectors", "images")[not image], call.arguments["event_shape"]
                    others = ", ".join(f"`{other}`" for other in (images if image else vectors))
                    raise ValueError(
                        f"`{name}` is for {kind}, but `event_shape` is {shape}: use {others}"
                    )
            call.apply_defaults()
            given = {k: v for k, v in call.arguments.items() if k not in useless and k != "key"}
            arguments = {name: _plain(value) for name, value in given.items()}
            if isinstance(arguments["network"], network):
                kind = type(arguments["network"]).__name__
                raise TypeError(
                    f"`network` is a {kind}, expected a function that returns a network, given the "
                    f"numbers of inputs and outputs{' and a random key' if keyed else ''}"
                )
            flow = build(**arguments, **({"key": call.arguments["key"]} if keyed else {}))
            if _is_plain(tuple(arguments.values())):
                return note(flow, Recipe(build.__name__, tuple(arguments.items())))
            return flow

        return recorded

    return decorate


def _plain(value: Any) -> Any:
    """Return a partition or sequence as a tuple, which can be compared and written to a file."""
    value = value.mask if isinstance(value, Partition) else value
    value = value.tolist() if hasattr(value, "tolist") else value
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


def _is_plain(value: object) -> bool:
    """Return whether a value can be written to a file, unlike a custom network or function."""
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
