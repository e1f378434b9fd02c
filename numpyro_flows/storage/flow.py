"""Saving and loading of flows in files that both wings write and read."""

import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, overload

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from numpyro_flows.distribution import BASES
from numpyro_flows.flows.builders import glow, nice, realnvp
from numpyro_flows.flows.monotone import monotone
from numpyro_flows.layers.constrained import constrained
from numpyro_flows.layers.preconditioner import preconditioned
from numpyro_flows.prior import FlowPrior
from numpyro_flows.transform import Conditioned, TransformModule
from numpyro_flows.tree import replace
from pyroflows_common import archive, priors

BUILDERS = {"nice": nice, "realnvp": realnvp, "glow": glow, "monotone": monotone}
# What adds a layer at the data end, by the name of its argument in the recipe.
ENDS: dict[str, Callable[..., TransformModule]] = {
    "support": constrained,
    "rank": preconditioned,
}


Saved = TypeVar("Saved", TransformModule, FlowPrior)


def save(flow: TransformModule | FlowPrior, path: str | os.PathLike[str]) -> None:
    """Write a flow, or a prior, to a safetensors file, which `load` of either wing reads.

    The file holds all parameters and state, the base, and the call of the builder. If no builder
    can rebuild the flow, because it has layers composed by hand, custom networks or custom scale
    functions, `load` needs `like=`. An existing file is replaced as a whole; if writing fails, it
    is unchanged.

    Args:
        flow: the flow or prior.
        path: path of the file, by convention with the suffix `.safetensors`.

    Raises:
        ValueError: if the flow cannot be written, or the path is not that of a file in a directory.

    Examples:
        >>> import os, tempfile, jax
        >>> from numpyro_flows import load, realnvp, save
        >>> path = os.path.join(tempfile.mkdtemp(), "flow.safetensors")
        >>> save(realnvp(2, key=jax.random.key(0)), path)
        >>> load(path).event_shape
        (2,)
    """
    prior = {}
    if isinstance(flow, FlowPrior):
        prior = {"prior": priors.describe(flow.sites, flow.draws, flow.name)}
        flow = flow.flow
    _check_flow(flow, "flow")
    arrays = _arrays(flow)
    builder, arguments = _call(flow, arrays)
    about = {
        "builder": builder,
        "arguments": arguments,
        "base": archive.check_base(flow.base, BASES),
        "event_shape": list(flow.event_shape),
        "context_dim": flow.context_dim,
        "bfloat16": [k for k, v in flow.state_dict().items() if v.dtype == jnp.bfloat16],
        **prior,
    }
    archive.write(path, about, arrays)


@overload
def load(path: str | os.PathLike[str], *, like: Saved) -> Saved: ...
@overload
def load(path: str | os.PathLike[str], *, like: None = None) -> Any: ...
def load(path: str | os.PathLike[str], *, like: Any = None) -> Any:
    """Read a flow, or a prior, from a file written by `save` of either wing.

    No code from the file is run.

    Args:
        path: path of the file.
        like: a flow, or a prior, of the same structure, needed if no builder can rebuild the saved
            flow. Names and shapes of its arrays are compared, but no settings. It is not changed.

    Returns:
        A new flow or `FlowPrior`, in the dtype of the saved one.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is broken, foreign or of a newer version, or does not fit `like`;
            or if it is in float64 and JAX's float64 is not enabled.

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
        prior = priors.described(about)
        if like is not None:
            priors.check_like(prior, like.sites if isinstance(like, FlowPrior) else None)
            like = like.flow if isinstance(like, FlowPrior) else like
        if like is None:
            flow = _zeros(_built(about["builder"], about["arguments"], arrays), arrays)
            archive.check_values(arrays)
        else:
            _check_flow(like, "like")
            archive.check_like(about, like.recipe)
            flow = like
        own = flow.state_dict()
        archive.check_arrays(arrays, _layout(own))
        archive.check_event(about, flow.event_shape, flow.context_dim)
        base = archive.check_base(about["base"], BASES)
        narrow = archive.bfloats(about)
        double = any(array.dtype == np.float64 for array in arrays.values())
        if double and jnp.result_type(float) != np.float64:
            raise ValueError(
                "it holds float64, which JAX would round to float32; call "
                "jax.config.update('jax_enable_x64', True) first"
            )
    except ValueError as error:
        raise ValueError(f"`path` {str(path)!r}: {error}") from error
    state = dict(arrays)
    for name, array in own.items():
        if jnp.issubdtype(array.dtype, jnp.integer):
            state[name] = arrays[name].astype(array.dtype)
        elif name in narrow:
            state[name] = arrays[name].astype(jnp.bfloat16)
    return _whole(replace(flow.load_state_dict(state), base=base), prior, path)


def _whole(
    flow: TransformModule, prior: priors.Described | None, path: str | os.PathLike[str]
) -> TransformModule | FlowPrior:
    """Return what a file holds: a flow, or a prior of it."""
    try:
        return flow if prior is None else FlowPrior(flow, *prior)
    except ValueError as error:
        raise ValueError(f"`path` {str(path)!r}: {error}") from error


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


def _layout(state: dict[str, Array]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return the shape and dtype of each array of a flow."""
    return {name: (a.shape, _dtype(a)) for name, a in state.items()}


def _dtype(array: Array) -> str:
    """Return the dtype of an array in the file, where all integers are int64."""
    return archive.stored_dtype(str(array.dtype))


def _call(flow: TransformModule, arrays: Mapping[str, np.ndarray]) -> tuple[str, dict[str, Any]]:
    """Return the builder and its arguments, both empty if they would not rebuild the flow."""
    if flow.recipe is None:
        return "", {}
    try:
        arguments = json.loads(json.dumps(dict(flow.recipe.arguments)))
        again = _built(flow.recipe.builder, arguments, arrays)
        same = _outline(replace(again, base=flow.base)) == _outline(flow)
    except (TypeError, ValueError):  # a callable argument, or a flow changed by hand
        return "", {}
    return (flow.recipe.builder, arguments) if same else ("", {})


def _built(
    builder: str, arguments: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> TransformModule:
    """Call the builder for shapes only, which uses no memory and no random numbers."""
    given, added = archive.without_ends(arguments, ENDS, arrays)
    call = archive.check_call(BUILDERS, builder, given, arrays)

    def build(key: Array) -> TransformModule:
        flow = BUILDERS[builder](**call, key=key)
        for name, value in added.items():
            flow = ENDS[name](flow, value)
        return flow

    try:
        return eqx.filter_eval_shape(build, jax.random.key(0))
    except Exception as error:
        raise ValueError(f"{builder} does not take its arguments: {error}") from error


def _zeros(flow: TransformModule, arrays: Mapping[str, np.ndarray]) -> TransformModule:
    """Replace shapes by arrays, after a check that they have the size of the file's arrays."""
    leaves, structure = jax.tree.flatten(flow)
    if sum(math.prod(leaf.shape) for leaf in leaves) != sum(a.size for a in arrays.values()):
        raise ValueError("its arguments make a flow of another size than its arrays")
    return jax.tree.unflatten(structure, [jnp.zeros(leaf.shape, leaf.dtype) for leaf in leaves])


def _outline(flow: TransformModule) -> tuple[object, list[tuple[int, ...]]]:
    """Return the structure of a flow and the shapes of its arrays."""
    return jax.tree.structure(flow), [leaf.shape for leaf in jax.tree.leaves(flow)]


def _check_flow(flow: object, name: str) -> None:
    if not isinstance(flow, TransformModule):
        raise ValueError(f"`{name}` is a {type(flow).__name__}, expected a TransformModule")
    if isinstance(flow, Conditioned):
        raise ValueError(f"`{name}` has its context already: pass the conditional flow itself")
