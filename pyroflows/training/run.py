"""One run of `fit` in PyTorch: where it starts, its state, and what is left at the end."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pyroflows.storage.checkpoint import Checkpoint
from pyroflows.training.batches import Preparation
from pyroflows.training.sources import Arrays
from pyroflows.training.step import Step
from pyroflows.transform import TransformModule, check_finite
from pyroflows_common import history
from pyroflows_common.batches import AUGMENT, AUGMENT_ALL, Part
from pyroflows_common.checks import as_count
from pyroflows_common.history import History
from pyroflows_common.loop import Loop
from pyroflows_common.rows import Batch, Batches, rows_at_once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(history.Settings):
    """The arguments of `fit` that are numbers and functions."""

    seed: int
    compile: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        as_count(self.seed, "seed", 0)
        if not (self.optimizer is None or callable(self.optimizer)):
            raise TypeError(
                f"`optimizer` is of type {type(self.optimizer).__name__}, expected a function of "
                "the parameters that makes one, or None"
            )


class Run(Loop):
    """One run of `fit`."""

    settings: Settings

    def __init__(
        self,
        flow: TransformModule,
        parameters: list[nn.Parameter],
        density: Callable[[Tensor], Tensor],
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
            density,
            _optimizer(parameters, settings),
            clip_norm=settings.clip_norm,
            penalty=settings.penalty,
            compile=settings.compile,
        )
        self.tensors = dict([*flow.named_parameters(), *flow.named_buffers()])
        self.modes = [(module, module.training) for module in flow.modules()]
        self.before = self.parameters_now()

    def run(self, base: str) -> History:
        """Train to the end, and leave the flow with the best parameters.

        After an error or Ctrl-C before the first step, the flow is as it was.
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
        """Go on from the checkpoint, or start from data."""
        saved = None if self.checkpoint is None else self.checkpoint.load()
        if saved is None:
            self._start()
        else:
            self._restore(saved)
        self.flow.train()

    @torch.no_grad()
    def _start(self) -> None:
        """Let the layers that start from data do so."""
        first = self._checked(self.feed.first(), AUGMENT, 0)
        if self.settings.standardize and self.flow._standardize(self._parts(first[0])) is not None:
            raise ValueError(
                "`standardize` is true, but the flow has no Standardization at the data's end"
            )
        self.flow.initialize(*first)
        for name, tensor in self.tensors.items():
            if self.before[name].isfinite().all() and not tensor.isfinite().all():
                raise ValueError(
                    "`data` does not suit `flow`: layers that start from it would not be finite"
                )

    def _checked(self, batch: Batch, *stream: int) -> tuple[Tensor, Tensor | None]:
        """Return a batch that a layer may start from."""
        x, context = self.prepare(batch, *stream)
        check_finite(x, self.flow.event_shape, "a batch of `data` after `augment`")
        return x, context

    def _parts(self, first: Tensor) -> Iterator[Tensor]:
        """Yield all rows in parts; of an iterable of batches the first one."""
        if isinstance(self.train.source, Batches):
            yield first
        else:
            for i, part in enumerate(self.train.in_order(rows_at_once(self.flow.event_shape))):
                yield self._checked(part, AUGMENT_ALL, i)[0]

    def learn(self, x: Tensor, context: Tensor | None) -> None:
        """Take one step, unless its numbers are not finite: then the flow stays as it is."""
        loss, good = self.step.gradients(x, context)
        if good:
            if not self.history.validated:
                self.best, self.history.best_step = self.parameters_now(), self.history.made
                self.last = x, context
            factor = self.settings.factor(self.history.step)
            self.step.move(None if self.settings.schedule is None else factor)
        self.record(loss, skipped=not good)

    @torch.no_grad()
    def total_loss(self, x: Tensor, context: Tensor | None) -> float:
        """Return the summed loss of a batch of held-out rows."""
        self.flow.eval()
        total = float(self.step.losses(x, context).double().sum())
        self.flow.train()
        return total

    @torch.no_grad()
    def last_is_finite(self) -> bool:
        """Whether the loss on the last batch is finite with the parameters of now."""
        self.flow.eval()
        finite = bool(self.step.losses(*self.last).mean().isfinite())
        self.flow.train()
        return finite

    def parameters_now(self) -> dict[str, Tensor]:
        """Return a copy of all parameters and buffers."""
        return {name: tensor.detach().clone() for name, tensor in self.tensors.items()}

    def save(self) -> None:
        """Write the checkpoint."""
        assert self.checkpoint is not None
        device = self.parameters[0].device
        self.checkpoint.save(
            {
                "history": dataclasses.asdict(self.history),
                "place": [self.feed.epoch, self.feed.position],
                "flow": {name: tensor.detach() for name, tensor in self.tensors.items()},
                "best": self.best,
                "optimizer": self.step.optimizer.state_dict(),
                "random": torch.get_rng_state(),
                "random_cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            }
        )

    def _restore(self, state: dict[str, Any]) -> None:
        history = History(**state["history"])
        if history.stopped is None:
            self.feed.seek(*state["place"])
        _copy(state["flow"], self.tensors)
        if state["best"] is not None:
            self.best = {name: t.to(self.tensors[name].device) for name, t in state["best"].items()}
        self.step.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        if state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], self.parameters[0].device)
        self.history = history


def _optimizer(parameters: list[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    if settings.optimizer is not None:
        return settings.optimizer(parameters)
    # Not the fused one: its kernel for CPUs takes every gradient to be laid out as its parameter.
    return torch.optim.Adam(parameters, lr=settings.learning_rate, foreach=True)


@torch.no_grad()
def _copy(values: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    for name, value in values.items():
        tensors[name].copy_(value)
