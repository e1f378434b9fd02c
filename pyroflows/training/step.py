"""One step of training: the loss of a batch, its gradients, and the optimiser's move."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pyroflows.networks import RunningMoments
from pyroflows.transform import TransformModule


class Step:
    """The steps of one run.

    Args:
        flow: the flow.
        parameters: those of its parameters that are trained.
        density: log-density of the base.
        optimizer: the optimiser of these parameters.
        clip_norm: bound on the norm of the whole gradient; None for none.
        penalty: weight of the flow's `scale_penalty`.
        compile: whether to compile the loss.
    """

    def __init__(
        self,
        flow: TransformModule,
        parameters: list[nn.Parameter],
        density: Callable[[Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float | None,
        penalty: float,
        compile: bool,
    ) -> None:
        self.flow, self.parameters, self.density = flow, parameters, density
        self.optimizer, self.clip_norm, self.penalty = optimizer, clip_norm, penalty
        self.mean_loss = torch.compile(self._mean_loss) if compile else self._mean_loss
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        norms = [module for module in flow.modules() if isinstance(module, RunningMoments)]
        self.running = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]

    def losses(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Return the negative log-likelihood of each row."""
        z, ladj = self.flow.inverse_and_ladj(x, context)
        return -(self.density(z) + ladj)

    def _mean_loss(self, x: Tensor, context: Tensor | None) -> Tensor:
        return self.losses(x, context).mean()

    @torch.enable_grad()
    def gradients(self, x: Tensor, context: Tensor | None) -> tuple[float, bool]:
        """Leave the gradients with the parameters, and return the loss and whether all is finite.

        Where it is not, nothing has changed. Running averages move before the loss is taken.
        """
        before = [buffer.clone() for buffer in self.running]
        if self.running:
            with torch.no_grad():
                self.flow._absorb(self.flow._entry(x, context), context, False)
        loss = objective = self.mean_loss(x, context)
        if self.penalty:
            objective = loss + self.penalty * self.flow.scale_penalty()
        gradients = torch.autograd.grad(objective, self.parameters, allow_unused=True)
        given = [gradient for gradient in gradients if gradient is not None]
        norm = nn.utils.get_total_norm(given)
        value, size = torch.stack([loss.detach(), norm]).tolist()
        good = math.isfinite(value) and math.isfinite(size)
        if good:
            if self.clip_norm is not None and size > self.clip_norm:
                for gradient in given:
                    gradient.mul_(self.clip_norm / size)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient
        else:
            for buffer, value_before in zip(self.running, before, strict=True):
                buffer.copy_(value_before)
        return value, good

    def move(self, factor: float | None) -> None:
        """Let the optimiser move the parameters, at a factor of its learning rates if given."""
        if factor is not None:
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * factor
        self.optimizer.step()
