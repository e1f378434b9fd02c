"""Saving and loading of flows in files that both wings write and read."""

import copy
import json
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, overload

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from pyroflows.distribution import BASES
from pyroflows.flows.builders import glow, nice, realnvp
from pyroflows.flows.monotone import monotone
from pyroflows.layers.constrained import constrained
from pyroflows.layers.preconditioner import preconditioned
from pyroflows.prior import FlowPrior
from pyroflows.transform import Conditioned, TransformModule
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
        flow: the flow or prior, on any device.
        path: path of the file, by convention with the suffix `.safetensors`.

    Raises:
        ValueError: if the flow cannot be written, or the path is not that of a file in a directory.

    Examples:
        >>> import os, tempfile
        >>> from pyroflows import load, realnvp, save
        >>> path = os.path.join(tempfile.mkdtemp(), "flow.safetensors")
        >>> save(realnvp(2), path)
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
        "bfloat16": [k for k, v in flow.state_dict().items() if v.dtype == torch.bfloat16],
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
        A new flow or `FlowPrior` on the CPU, in the dtype of the saved one.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is broken, foreign or of a newer version, or does not fit `like`.

    Examples:
        >>> import os, tempfile
        >>> from pyroflows import ActNorm, Chain, load, save
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
            flow = _built(about["builder"], about["arguments"], arrays)
            archive.check_values(arrays)
        else:
            _check_flow(like, "like")
            archive.check_like(about, like.recipe)
            flow = like
        archive.check_arrays(arrays, _layout(flow))
        archive.check_event(about, flow.event_shape, flow.context_dim)
        base = archive.check_base(about["base"], BASES)
        dtypes = {name: getattr(torch, array.dtype.name) for name, array in arrays.items()}
        dtypes |= dict.fromkeys(archive.bfloats(about), torch.bfloat16)
    except ValueError as error:
        raise ValueError(f"`path` {str(path)!r}: {error}") from error
    flow = flow.to_empty(device="cpu") if like is None else copy.deepcopy(flow).cpu()
    for name, tensor in flow.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtypes[name])
    flow.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()})
    flow.base = base
    return _whole(flow, prior, path)


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
    for name, tensor in flow.state_dict().items():
        dtype = _dtype(tensor)
        if dtype not in archive.DTYPES:
            raise ValueError(
                f"`flow` has {name} of {dtype}, expected one of {', '.join(archive.DTYPES)}"
            )
        array = tensor.detach().cpu().to(getattr(torch, dtype)).numpy()
        arrays[name] = np.array(array, order="C")
    return arrays


def _layout(flow: TransformModule) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return the shape and dtype of each array of the flow."""
    return {name: (tuple(t.shape), _dtype(t)) for name, t in flow.state_dict().items()}


def _dtype(value: object) -> str:
    """Return the dtype of a tensor in the file, where all integers are int64."""
    if not isinstance(value, Tensor) or is_lazy(value):
        return type(value).__name__
    return archive.stored_dtype(str(value.dtype).removeprefix("torch."))


def _call(flow: TransformModule, arrays: Mapping[str, np.ndarray]) -> tuple[str, dict[str, Any]]:
    """Return the builder and its arguments, both empty if they would not rebuild the flow."""
    if flow.recipe is None:
        return "", {}
    try:
        arguments = json.loads(json.dumps(dict(flow.recipe.arguments)))
        again = _built(flow.recipe.builder, arguments, arrays)
        archive.check_arrays(arrays, _layout(again))
    except (TypeError, ValueError):  # a callable argument, or a flow changed by hand
        return "", {}
    again.base = flow.base
    return (flow.recipe.builder, arguments) if _outline(again) == _outline(flow) else ("", {})


def _built(
    builder: str, arguments: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> TransformModule:
    """Call the builder on the meta device, which uses no memory and no random numbers."""
    given, added = archive.without_ends(arguments, ENDS, arrays)
    call = archive.check_call(BUILDERS, builder, given, arrays)
    try:
        with torch.device("meta"):
            flow = BUILDERS[builder](**call)
            for name, value in added.items():
                flow = ENDS[name](flow, value)
        return flow
    except Exception as error:
        raise ValueError(f"{builder} does not take its arguments: {error}") from error


def _outline(flow: TransformModule) -> list[Any]:
    """Return the settings of all modules of a flow."""
    return [
        (
            name,
            type(module),
            {k: v for k, v in vars(module).items() if k[0] != "_" and k != "training"},
        )
        for name, module in flow.named_modules()
    ]


def _check_flow(flow: object, name: str) -> None:
    if not isinstance(flow, TransformModule):
        raise ValueError(f"`{name}` is a {type(flow).__name__}, expected a TransformModule")
    if isinstance(flow, Conditioned):
        raise ValueError(f"`{name}` has its context already: pass the conditional flow itself")
