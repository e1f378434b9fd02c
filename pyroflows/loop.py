"""The loop of `fit`: steps, validations, checkpoints, and what is left at the end."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyroflows.batches import AUGMENT, AUGMENT_ALL, AUGMENT_VALIDATION, Part, Preparation
from pyroflows.chain import Chain
from pyroflows.checkpoint import Checkpoint
from pyroflows.data import Batch, Batches, Rules, check_finite, rows_at_once
from pyroflows.image import MultiScale
from pyroflows.normalization import Standardization
from pyroflows.pixels import Logit
from pyroflows.settings import History, Settings
from pyroflows.transform import TransformModule

# Steps in a row whose loss or gradient is not finite, after which training gives up.
HOPELESS = 50


class Run:
    """One run of `fit`."""

    def __init__(
        self,
        flow: TransformModule,
        parameters: list[nn.Parameter],
        density: Callable[[Tensor], Tensor],
        rules: Rules,
        settings: Settings,
        train: Part,
        held_out: Part | None,
        checkpoint: Checkpoint | None,
        progress: bool | Callable[[float], str],
    ) -> None:
        self.flow, self.parameters, self.density = flow, parameters, density
        self.settings, self.train, self.held_out = settings, train, held_out
        self.checkpoint, self.progress = checkpoint, bool(progress)
        self.written = progress if callable(progress) else "{:.3f}".format
        self.history = History()
        self.feed = train.feed(settings.batch_size, settings.seed)
        self.prepare = Preparation(rules, settings.augment, parameters[0], settings.seed)
        self.mean_loss = torch.compile(self._mean_loss) if settings.compile else self._mean_loss
        self.optimizer = _optimizer(parameters, settings)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.tensors = dict([*flow.named_parameters(), *flow.named_buffers()])
        norms = [module for module in flow.modules() if hasattr(module, "running_mean")]
        self.running = [buffer for norm in norms for buffer in norm.buffers()]
        self.modes = [(module, module.training) for module in flow.modules()]
        # What is left in the end: the parameters of the best validation or, until there is one,
        # the last whose loss was finite; and the batch that they had it on.
        self.best: dict[str, Tensor] | None = None
        self.last: tuple[Tensor, Tensor | None] | None = None

    def run(self, base: str) -> History:
        """Train to the end, whatever it is, and leave the flow with the best parameters.

        Where it is an error or Ctrl-C before the first step, the flow stays as it was.
        """
        before = self._copied()
        try:
            self._begin(before)
            self.flow.train()
            with self._bar() as self.bar:
                while self.history.stopped is None:
                    self._advance()
        except KeyboardInterrupt:
            self.history.stopped = "interrupted"
            if self.history.made:
                with contextlib.suppress(KeyboardInterrupt):  # pressed again: then without
                    self._validate()
                    self._prove()
        finally:
            if self.history.made or self.history.stopped not in (None, "interrupted"):
                _copy(self.best or {}, self.tensors)
                self.flow.base = base
            else:
                _copy(before, self.tensors)
            for parameter in self.parameters:
                parameter.grad = None
            for module, mode in self.modes:
                module.training = mode
        return self.history

    def _begin(self, before: dict[str, Tensor]) -> None:
        """Go on from the checkpoint, or start from data."""
        saved = None if self.checkpoint is None else self.checkpoint.load()
        if saved is not None:
            self._restore(saved)
            return
        first = self._checked(self.feed.first(), AUGMENT, 0)
        if self.settings.standardize:
            layer, behind = standardization(self.flow)
            layer.standardize(self._encoded(behind, first[0]))
        self.flow.initialize(*first)
        for name, tensor in self.tensors.items():
            if before[name].isfinite().all() and not tensor.isfinite().all():
                raise ValueError(
                    "`data` does not suit `flow`: layers that start from it would not be finite"
                )

    def _checked(self, batch: Batch, *stream: int) -> tuple[Tensor, Tensor | None]:
        """Return a batch that a layer may start from."""
        x, context = self.prepare(batch, *stream)
        check_finite(x, "a batch of `data` after `augment`", x.dtype)
        return x, context

    def _encoded(self, behind: list[TransformModule], first: Tensor) -> Iterator[Tensor]:
        """Yield all rows, or of an iterable the first batch, as some layers have encoded them."""
        if isinstance(self.train.source, Batches):
            parts = iter([first])
        else:
            chunks = self.train.in_order(rows_at_once(self.flow.event_shape))
            parts = (self._checked(part, AUGMENT_ALL, i)[0] for i, part in enumerate(chunks))
        for rows in parts:
            for outer in behind:
                rows = outer.inverse_and_ladj(rows)[0]
                check_finite(rows, f"a batch of `data` behind {type(outer).__name__}", rows.dtype)
            yield rows

    def _advance(self) -> None:
        """Take a step; validate and save where it is time to."""
        history, settings = self.history, self.settings
        batch = self.feed.next()
        if batch is None:
            history.stopped = "data exhausted"
        else:
            self._learn(*self.prepare(batch, AUGMENT, history.step))
            if history.skipped_in_row == HOPELESS:
                history.stopped = "not finite"
            elif history.step == settings.steps:
                history.stopped = "steps"
        if history.stopped and history.skipped == history.step:
            history.stopped = "not finite"
        every = settings.validate_every
        if history.stopped or (history.step % every == 0 if every else self.feed.at_end):
            self._validate()
            if history.stopped or self.checkpoint is not None:
                self._prove()
            if self.checkpoint is not None:
                self.checkpoint.save(self._state())
        self._show()

    @torch.enable_grad()
    def _learn(self, x: Tensor, context: Tensor | None) -> None:
        """Take one step, unless its numbers are not finite: then the flow stays as it is."""
        history, settings = self.history, self.settings
        before = [buffer.clone() for buffer in self.running]
        if self.running:
            with torch.no_grad():
                self.flow._absorb(self.flow._entry(x, context), False)
        loss = objective = self.mean_loss(x, context)
        if settings.penalty:
            objective = loss + settings.penalty * self.flow.scale_penalty()
        gradients = torch.autograd.grad(objective, self.parameters, allow_unused=True)
        given = [gradient for gradient in gradients if gradient is not None]
        norm = torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in given]))
        value, size = torch.stack([loss.detach(), norm]).tolist()
        if math.isfinite(value) and math.isfinite(size):
            if settings.clip_norm is not None and size > settings.clip_norm:
                for gradient in given:
                    gradient.mul_(settings.clip_norm / size)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient
            if not history.validated:
                self.best, history.best_step = self._copied(), history.made
                self.last = x, context
            if settings.schedule is not None:
                factor = settings.factor(history.step)
                for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                    group["lr"] = rate * factor
            self.optimizer.step()
            history.skipped_in_row = 0
        else:
            for buffer, value_before in zip(self.running, before, strict=True):
                buffer.copy_(value_before)
            history.skipped += 1
            history.skipped_in_row += 1
        history.losses.append(value)
        history.step += 1

    def _losses(self, x: Tensor, context: Tensor | None) -> Tensor:
        event, ladj = self.flow._inverse_event(self.flow._entry(x, context))
        return -(self.density(event.whole()) + ladj)

    def _mean_loss(self, x: Tensor, context: Tensor | None) -> Tensor:
        return self._losses(x, context).mean()

    @torch.no_grad()
    def _validate(self) -> None:
        """Take the loss on the held-out data, and keep the parameters where it is the lowest."""
        history = self.history
        if self.held_out is None or history.step in history.validation_steps[-1:]:
            return
        self.flow.eval()
        total, rows = 0.0, 0
        for number, batch in enumerate(self.held_out.in_order(self.settings.batch_size)):
            x, context = self.prepare(batch, AUGMENT_VALIDATION, number)
            total += float(self._losses(x, context).double().sum())
            rows += len(x)
        self.flow.train()
        if not rows:
            raise ValueError("`validation` has no batches")
        history.validation_losses.append(total / rows)
        history.validation_steps.append(history.step)
        history.since_best += 1
        if total / rows < history.best_loss:
            history.best_loss, history.best_step = total / rows, history.made
            history.since_best = 0
            self.best, self.last = self._copied(), None
        if not history.stopped and history.since_best == self.settings.patience:
            history.stopped = "patience"

    @torch.no_grad()
    def _prove(self) -> None:
        """Where nothing is validated: keep the last parameters if their loss is finite."""
        if self.last is None:
            return
        self.flow.eval()
        if self._mean_loss(*self.last).isfinite():
            self.best, self.history.best_step = self._copied(), self.history.made
        self.last = None
        self.flow.train()

    def _copied(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.tensors.items()}

    def _state(self) -> dict[str, Any]:
        device = self.parameters[0].device
        return {
            "history": dataclasses.asdict(self.history),
            "place": [self.feed.epoch, self.feed.position],
            "flow": {name: tensor.detach() for name, tensor in self.tensors.items()},
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        history = History(**state["history"])
        if history.stopped is None:
            self.feed.seek(*state["place"])
        _copy(state["flow"], self.tensors)
        if state["best"] is not None:
            self.best = {name: t.to(self.tensors[name].device) for name, t in state["best"].items()}
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        if state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], self.parameters[0].device)
        self.history = history

    def _bar(self) -> tqdm:
        self.shown = 0.0
        return tqdm(
            total=self.settings.steps,
            initial=self.history.step,
            disable=not self.progress,
            desc="fit",
            unit="step",
        )

    def _show(self) -> None:
        """Move the bar; its text changes ten times a second at most, for that takes time."""
        history = self.history
        self.bar.update(history.step - self.bar.n)
        if self.progress and (history.stopped or time.monotonic() - self.shown > 0.1):
            self.shown = time.monotonic()
            last = history.losses[-20:]
            text = {"loss": self.written(sum(last) / len(last))}
            if history.validation_losses:
                text["validation"] = self.written(history.validation_losses[-1])
            if history.skipped:
                text["skipped"] = str(history.skipped)
            self.bar.set_postfix(text, refresh=False)


def standardization(flow: TransformModule) -> tuple[Standardization, list[TransformModule]]:
    """Return the layer that `standardize` sets and those behind it, or say that there is none."""
    behind: list[TransformModule] = []
    for layer in _from_data(flow):
        if isinstance(layer, Standardization):
            return layer, behind
        behind.append(layer)
        if not isinstance(layer, Logit):
            break
    raise ValueError(
        f"`standardize` is true, but the flow ends in {type(behind[0]).__name__}: append "
        f"Standardization({flow.event_shape})"
    )


def _from_data(flow: TransformModule) -> Iterator[TransformModule]:
    """Go through the layers from the data's end."""
    if isinstance(flow, MultiScale):
        yield from _from_data(flow.levels[-1])
    elif isinstance(flow, Chain):
        for layer in reversed(flow.layers):
            yield from _from_data(layer)
    else:
        yield flow


def _optimizer(parameters: list[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    if settings.optimizer is not None:
        return settings.optimizer(parameters)
    # Not the fused one: its kernel for CPUs takes every gradient to be laid out as its parameter.
    return torch.optim.Adam(parameters, lr=settings.learning_rate, foreach=True)


@torch.no_grad()
def _copy(values: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    for name, value in values.items():
        tensors[name].copy_(value)
