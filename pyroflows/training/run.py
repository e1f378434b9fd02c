"""One run of `fit` in PyTorch: its start, its state and its end."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyroflows.inputs import check_finite
from pyroflows.storage.checkpoint import Checkpoint
from pyroflows.support import is_real, support_of
from pyroflows.training.preparation import Preparation, Prepared
from pyroflows.training.sources import Arrays
from pyroflows.training.step import Step
from pyroflows.transform import TransformModule
from pyroflows_common import history
from pyroflows_common.batches import AUGMENT, Part
from pyroflows_common.checks import as_count
from pyroflows_common.history import History
from pyroflows_common.loop import Loop
from pyroflows_common.rows import Batch
from pyroflows_common.support import no_density


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(history.Settings):
    """Arguments of `fit` that are numbers or functions."""

    seed: int
    compile: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        as_count(self.seed, "seed", 0)
        if not (self.optimizer is None or callable(self.optimizer)):
            raise TypeError(
                f"`optimizer` is of type {type(self.optimizer).__name__}, expected a function of "
                "the parameters that returns an optimiser, or None"
            )


class Run(Loop[Tensor, dict[str, Tensor]]):
    """One run of `fit`."""

    settings: Settings

    def __init__(
        self,
        flow: TransformModule,
        parameters: list[nn.Parameter],
        base: dist.TorchDistribution,
        arrays: Arrays,
        settings: Settings,
        train: Part,
        held_out: Part | None,
        checkpoint: Checkpoint | None,
        progress: bool | Callable[[float], str],
    ) -> None:
        super().__init__(settings, train, held_out, checkpoint, progress, settings.seed)
        self.flow, self.parameters = flow, parameters
        self.prepare = Preparation(arrays, settings.augment, parameters[0], settings.seed)
        self.step = Step(
            flow,
            parameters,
            base,
            _optimizer(parameters, settings),
            clip_norm=settings.clip_norm,
            penalty=settings.penalty,
            compile=settings.compile,
        )
        self.tensors = dict([*flow.named_parameters(), *flow.named_buffers()])
        self.modes = [(module, module.training) for module in flow.modules()]
        self.before = self.parameters_now()

    def run(self, base: str) -> History:
        """Train to the end, and give the flow the best parameters.

        After an error or Ctrl-C before the first step, the flow is unchanged.
        """
        try:
            self.train_to_the_end()
        finally:
            _copy(self.before if self.untouched else self.best or {}, self.tensors)
            if not self.untouched:
                self.flow.base = base
            for parameter in self.parameters:
                parameter.grad = None
            for module, mode in self.modes:
                module.training = mode
        return self.history

    def begin(self) -> None:
        """Restore the checkpoint, or initialise the flow from data."""
        super().begin()
        self.flow.train()

    @torch.no_grad()
    def start(self) -> None:
        """Initialise the data-dependent layers."""
        x, context, _ = self.checked(self.feed.first(), AUGMENT, 0)
        if self.settings.standardize and self.flow._standardize(self.parts(x)) is not None:
            raise ValueError(
                "`standardize` is true, but the flow has no Standardization at the data's end"
            )
        self.flow.initialize(x, context)
        for name, tensor in self.tensors.items():
            if self.before[name].isfinite().all() and not tensor.isfinite().all():
                raise ValueError(
                    "`data` does not suit `flow`: layers initialised from it would not be finite"
                )
        support = support_of(self.step.base)
        if not is_real(support) and not self.step.losses(x, context).isfinite().any():
            raise ValueError(no_density(support))

    def checked(self, batch: Batch, *stream: int) -> Prepared:
        """Return a batch for initialisation, checked to be finite."""
        x, context, weights = self.prepare(batch, *stream)
        check_finite(x, self.flow.event_shape, "a batch of `data` after `augment`")
        return x, context, weights

    def learn(self, x: Tensor, context: Tensor | None, weights: Tensor | None) -> None:
        """Take one step; skip it if the loss or its gradient is not finite."""
        loss, good = self.step.gradients(x, context, weights)
        if good:
            if not self.history.validated:
                self.best, self.history.best_step = self.parameters_now(), self.history.made
                self.last = x, context, weights
            factor = self.settings.factor(self.history.step)
            self.step.move(None if self.settings.schedule is None else factor)
        self.record(loss, skipped=not good)

    @torch.no_grad()
    def total_loss(self, x: Tensor, context: Tensor | None, weights: Tensor | None) -> float:
        """Return the weighted sum of the losses of a batch of validation data."""
        self.flow.eval()
        total = float(self.step.losses(x, context, weights).double().sum())
        self.flow.train()
        return total

    @torch.no_grad()
    def is_finite(self, x: Tensor, context: Tensor | None, weights: Tensor | None) -> bool:
        """Return whether the loss of a training batch is finite under the current parameters."""
        self.flow.eval()
        finite = bool(self.step.losses(x, context, weights).mean().isfinite())
        self.flow.train()
        return finite

    def parameters_now(self) -> dict[str, Tensor]:
        """Return a copy of all parameters and buffers."""
        return {name: tensor.detach().clone() for name, tensor in self.tensors.items()}

    def state_now(self) -> dict[str, Any]:
        """Return the tensors of the run, and the state of the random numbers, for a checkpoint."""
        device = self.parameters[0].device
        return {
            "flow": {name: tensor.detach() for name, tensor in self.tensors.items()},
            "best": self.best,
            "optimizer": self.step.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take the tensors of the run, and the state of the random numbers, from a checkpoint."""
        _copy(state["flow"], self.tensors)
        if state["best"] is not None:
            self.best = {name: t.to(self.tensors[name].device) for name, t in state["best"].items()}
        self.step.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        if state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], self.parameters[0].device)


def _optimizer(parameters: list[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    if settings.optimizer is not None:
        return settings.optimizer(parameters)
    # Not the fused Adam: its CPU kernel assumes that gradients have the layout of their parameters.
    return torch.optim.Adam(parameters, lr=settings.learning_rate, foreach=True)


@torch.no_grad()
def _copy(values: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    for name, value in values.items():
        tensors[name].copy_(value)
