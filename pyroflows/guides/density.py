"""The density of a guide at values of the model's sites that it has not drawn."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pyro.infer.autoguide import AutoContinuous, AutoGuideList, AutoNormal
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to

from pyroflows.guides import importance
from pyroflows.guides.autoflow import AutoFlow
from pyroflows.guides.importance import BLOCK, Matched, Model
from pyroflows.guides.model import latent_sites, mapped
from pyroflows_common.checks import Inputs
from pyroflows_common.sites import check_scored


def free_sites(posterior: Any) -> set[str]:
    """Return the sites on which the model does not depend at all, as guides of flows tell."""
    found = set()
    for part in _parts(posterior):
        if isinstance(part, AutoFlow):
            free = part._unpack_latent(part._reference().free)
            found |= {site["name"] for site, each in free if (each > 0).all()}
    return found


def densities(
    posterior: Any, matched: Matched, model: Model, inputs: Inputs, values: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the log-densities of model and guide at draws from elsewhere.

    Coordinates on which the model does not depend are drawn again, from the measure to which the
    guide's density is relative.
    """
    vectors = dict(_vectors(posterior))
    check_scored(matched.drawn, vectors)
    unpacked = [name for names in vectors.values() for name in names]

    def one(values: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        log_p, trace = importance.log_joint(model, inputs, values)
        supports = {name: trace.nodes[name]["fn"].support for name in unpacked}
        return log_p, {name: biject_to(s).inv(values[name]) for name, s in supports.items()}

    log_p, points = mapped(one, values, chunk_size=BLOCK)
    given = {name: value for name, value in values.items() if name not in unpacked}
    for vector, names in vectors.items():
        shape = matched.drawn.latent[vector]["value"].shape
        parts = [points[name].reshape(len(log_p), -1) for name in names]
        given[vector] = torch.cat(parts, 1).reshape(-1, *shape)
    for part in _parts(posterior):
        if isinstance(part, AutoFlow):
            start, latent = part._reference(), given[_name(part)]
            fresh = start.loc + torch.randn_like(latent)
            given[_name(part)] = torch.where(start.free > 0, fresh, latent)
    return log_p, _scores(matched, inputs, given)


def _scores(matched: Matched, inputs: Inputs, given: dict[str, Tensor]) -> Tensor:
    """Return the log-density of a guide at values of all that it draws."""
    count, nesting = len(next(iter(given.values()))), matched.nesting
    if nesting is not None:
        with contextlib.suppress(Exception):  # below, an error of the guide is raised again
            outer = {
                name: value.reshape(count, *[1] * (nesting - len(fn.batch_shape)), *value.shape[1:])
                for name, value in given.items()
                for fn in [matched.drawn.latent[name]["fn"]]
            }
            return importance.at_once(_Given(outer)(matched.guide), inputs, count, nesting)[1]

    def one(given: dict[str, Tensor]) -> Tensor:
        return importance.log_density(_Given(given)(matched.guide), inputs)

    return mapped(one, given, chunk_size=BLOCK)


class _Given(Messenger):
    """Gives sites of a guide their values."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True


def _parts(posterior: Any) -> Iterator[Any]:
    """Return the guides that draw their sites in unconstrained coordinates."""
    if isinstance(posterior, AutoContinuous | AutoNormal):
        yield posterior
    elif isinstance(posterior, AutoGuideList):
        for part in posterior:
            yield from _parts(part)


def _vectors(posterior: Any) -> Iterator[tuple[str, list[str]]]:
    """Return the auxiliary sites of a guide, and the sites of the model that each one makes."""
    for part in _parts(posterior):
        names = list(latent_sites(part.prototype_trace))
        if isinstance(part, AutoContinuous):
            yield _name(part), names
        else:
            yield from ((f"{name}_unconstrained", [name]) for name in names)


def _name(part: AutoContinuous) -> str:
    return f"_{part._pyro_name}_latent"
