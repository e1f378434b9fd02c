"""Saving and loading: one file for a flow, written and read by the Pyro and the NumPyro wing."""

import functools
import importlib.metadata
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from numpyro_flows.distribution import BASES
from numpyro_flows.flows.builders import glow, nice, realnvp
from numpyro_flows.transform import Conditioned, TransformModule
from numpyro_flows.tree import replace
from pyroflows_common import archive

BUILDERS = {"nice": nice, "realnvp": realnvp, "glow": glow}


def save(flow: TransformModule, path: str | os.PathLike[str]) -> None:
    """Write a flow to one safetensors file, which `load` of either wing reads.

    The file holds all parameters and state, the base, and how the builder was called. Where no
    builder can make the flow again, as with layers put together by hand or with networks and scale
    functions of one's own, `load` needs `like=`. An earlier file is replaced as a whole or, where
    writing fails, stays as it was.

    Args:
        flow: the flow.
        path: the file, by custom with the suffix `.safetensors`.

    Raises:
        ValueError: where the flow cannot be written, or the path is not in a directory.

    Examples:
        >>> import os, tempfile, jax
        >>> from numpyro_flows import load, realnvp, save
        >>> path = os.path.join(tempfile.mkdtemp(), "flow.safetensors")
        >>> save(realnvp(2, key=jax.random.key(0)), path)
        >>> load(path).event_shape
        (2,)
    """
    _check_flow(flow, "flow")
    arrays = _arrays(flow)
    builder, arguments = _call(flow, arrays)
    floats = [array.dtype for array in arrays.values() if array.dtype.kind == "f"]
    about = {
        "library": _library(),
        "builder": builder,
        "arguments": arguments,
        "base": _check_base(flow.base),
        "event_shape": list(flow.event_shape),
        "context_dim": flow.context_dim,
        "dtype": np.result_type(*floats).name if floats else "",
    }
    archive.write(path, about, arrays)


def load(path: str | os.PathLike[str], *, like: TransformModule | None = None) -> TransformModule:
    """Read a flow from a file that `save` of either wing has written. No code from it is run.

    Args:
        path: the file.
        like: a flow that is built as the saved one was, for those that no builder can make again:
            names and shapes of its arrays are compared, but no settings. It stays as it is.

    Returns:
        A new flow in the dtype in which it was saved.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where the file is broken, foreign or newer, or does not fit `like`;
            or where it is in float64 and JAX is not set to it.

    Examples:
        >>> import os, tempfile
        >>> from numpyro_flows import ActNorm, Chain, load, save
        >>> path = os.path.join(tempfile.mkdtemp(), "flow.safetensors")
        >>> save(Chain([ActNorm(2)]), path)
        >>> load(path, like=Chain([ActNorm(2)])).event_shape
        (2,)
    """
    about, arrays = archive.read(path)
    try:
        if like is None:
            flow = _zeros(_built(about["builder"], about["arguments"], arrays), arrays)
            archive.check_values(arrays)
        else:
            flow = _check_like(like, about)
        archive.check_arrays(arrays, _layout(flow))
        for field, own in (("event_shape", flow.event_shape), ("context_dim", flow.context_dim)):
            if archive.plain(about[field]) != own:
                raise ValueError(f"its {field} is {about[field]}, but the flow's {own}")
        base = _check_base(about["base"])
        double = any(array.dtype == np.float64 for array in arrays.values())
        if double and jnp.result_type(float) != np.float64:
            raise ValueError(
                "it holds float64, which JAX would round to float32; call "
                "jax.config.update('jax_enable_x64', True) first"
            )
    except ValueError as error:
        raise ValueError(f"`path` {str(path)!r}: {error}") from error
    state = dict(arrays)
    for name, array in flow.state_dict().items():
        if jnp.issubdtype(array.dtype, jnp.integer):
            state[name] = arrays[name].astype(array.dtype)
    return replace(flow.load_state_dict(state), base=base)


def _arrays(flow: TransformModule) -> dict[str, np.ndarray]:
    """Return the flow's arrays as the file holds them."""
    arrays = {}
    for name, array in flow.state_dict().items():
        dtype = _dtype(array)
        if dtype not in archive.DTYPES:
            raise ValueError(
                f"`flow` has {name} of {dtype}, expected one of {', '.join(archive.DTYPES)}"
            )
        arrays[name] = np.array(array, dtype, order="C")
    return arrays


def _layout(flow: TransformModule) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and dtype of each of the flow's arrays."""
    return {name: (a.shape, _dtype(a)) for name, a in flow.state_dict().items()}


def _dtype(array: Array) -> str:
    """Return the dtype that an array has in the file, where all integers are int64."""
    name = str(array.dtype)
    return "int64" if name in ("int8", "int16", "int32", "uint8") else name


def _call(flow: TransformModule, arrays: Mapping[str, np.ndarray]) -> tuple[str, dict[str, Any]]:
    """Return the builder and its arguments; nothing where they would not make this flow again."""
    if flow.recipe is None:
        return "", {}
    try:
        arguments = json.loads(json.dumps(dict(flow.recipe.arguments)))
        again = _built(flow.recipe.builder, arguments, arrays)
        same = _outline(replace(again, base=flow.base)) == _outline(flow)
    except (TypeError, ValueError):  # an argument is a callable, or the flow was changed by hand
        return "", {}
    return (flow.recipe.builder, arguments) if same else ("", {})


def _built(
    builder: str, arguments: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> TransformModule:
    """Call the builder for shapes alone: no memory is taken and nothing drawn at random."""
    call = archive.check_call(BUILDERS, builder, arguments, arrays)
    try:
        build = functools.partial(BUILDERS[builder], **call)
        return eqx.filter_eval_shape(build, key=jax.random.key(0))
    except Exception as error:
        raise ValueError(f"{builder} does not take its arguments: {error}") from error


def _zeros(flow: TransformModule, arrays: Mapping[str, np.ndarray]) -> TransformModule:
    """Turn shapes into arrays, once it is clear that they are as large as those of the file."""
    leaves, structure = jax.tree.flatten(flow)
    if sum(math.prod(leaf.shape) for leaf in leaves) != sum(a.size for a in arrays.values()):
        raise ValueError("its arguments make a flow of another size than its arrays")
    return jax.tree.unflatten(structure, [jnp.zeros(leaf.shape, leaf.dtype) for leaf in leaves])


def _outline(flow: TransformModule) -> Any:
    """Return all of a flow but its numbers."""
    return jax.tree.structure(flow), [leaf.shape for leaf in jax.tree.leaves(flow)]


def _check_flow(flow: Any, name: str) -> None:
    if not isinstance(flow, TransformModule):
        raise ValueError(f"`{name}` is a {type(flow).__name__}, expected a TransformModule")
    if isinstance(flow, Conditioned):
        raise ValueError(f"`{name}` is given a context: pass the conditional flow itself")


def _check_like(like: TransformModule, about: Mapping[str, Any]) -> TransformModule:
    _check_flow(like, "like")
    saved = {name: archive.plain(value) for name, value in about["arguments"].items()}
    if about["builder"] and like.recipe is not None:
        own = (like.recipe.builder, dict(like.recipe.arguments))
        if own != (about["builder"], saved):
            raise ValueError(
                f"the saved flow was built by {about['builder']} with {saved}, but `like` by "
                f"{own[0]} with {own[1]}"
            )
    return like


def _check_base(base: str) -> str:
    if base not in (*BASES, "custom"):
        raise ValueError(f"its base is {base!r:.80}, expected one of {(*BASES, 'custom')}")
    return base


def _library() -> str:
    try:
        return importlib.metadata.version("pyroflows")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
