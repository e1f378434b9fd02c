"""A guide in Pyro's parameter store: under which names, and with what besides its parameters."""

import itertools

import pyro
from torch import Tensor

from pyroflows.transform import TransformModule


def tensors(name: str, transform: TransformModule) -> dict[str, Tensor]:
    """Return parameters, as Pyro names them, and the rest of the state by names of ours."""
    trained = {key for key, p in transform.named_parameters() if p.requires_grad}
    state = transform.state_dict().items()
    return {f"{name}.{'transform$$$' if k in trained else 'state.'}{k}": v for k, v in state}


def holds(name: str, transform: TransformModule) -> bool:
    """Whether the store holds a guide of this name.

    Raises:
        ValueError: where it is another one, of other shapes or another precision.
    """
    store = pyro.get_param_store()
    prefixes = f"{name}.transform$$$", f"{name}.state."
    held = {key: store[key] for key in store if key.startswith(prefixes)}
    own = {key: _real(value) for key, value in tensors(name, transform).items()}
    kinds, expected = ({k: (v.shape, v.dtype) for k, v in d.items()} for d in (held, own))
    if held and kinds != expected:
        raise ValueError(
            f"Pyro's parameter store holds another guide by the name of {name!r}: give this one a "
            "`name`, or call pyro.clear_param_store()"
        )
    return bool(held)


def register(name: str, transform: TransformModule) -> None:
    """Register a flow's parameters, or take those that the store holds, with all that belongs."""
    trained = ((key, p) for key, p in transform.named_parameters() if p.requires_grad)
    first, parameter = next(trained, ("", None))
    if parameter is None:  # frozen
        return
    store, full = pyro.get_param_store(), f"{name}.transform"
    first = f"{full}$$${first}"
    known = first in store
    if not known or store[first] is not parameter:
        # What no optimiser sees is stored besides.
        for key, value in tensors(name, transform).items():
            if key.startswith(f"{name}.state."):
                if not known:
                    store[key] = _real(value)
                elif key in store:
                    value.copy_(store[key].detach())
    # Pyro would register the parameters by itself, but not take those of the store.
    pyro.module(full, transform, update_module_params=True)


def free_name(name: str) -> str:
    """Return a name that no guide in the store has: this one, or one with a number."""
    store = pyro.get_param_store()
    names = itertools.chain([name], (f"{name}_{count}" for count in itertools.count(1)))
    return next(n for n in names if not any(key.startswith(f"{n}.transform$$$") for key in store))


def _real(value: Tensor) -> Tensor:
    """Return a tensor as the store takes it: of real numbers."""
    return value if value.is_floating_point() else value.double()
