"""One step of training: the loss of a batch, its gradient, and the update of the parameters."""

import math

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor, nn

from pyroflows.networks import RunningMoments
from pyroflows.support import log_prob_inside
from pyroflows.transform import TransformModule


class Step:
    """The steps of one run, whose loss is compiled on demand."""

    def __init__(
        self,
        flow: TransformModule,
        parameters: list[nn.Parameter],
        base: dist.TorchDistribution,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float | None,
        penalty: float,
        compile: bool,
    ) -> None:
        self.flow, self.parameters, self.base = flow, parameters, base
        self.optimizer, self.clip_norm, self.penalty = optimizer, clip_norm, penalty
        self.mean_loss = torch.compile(self._mean_loss) if compile else self._mean_loss
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        norms = [module for module in flow.modules() if isinstance(module, RunningMoments)]
        self.running = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]

    def losses(
        self,
        x: Float[Tensor, "n ..."],
        context: Float[Tensor, "n context_dim"] | None,
        weights: Float[Tensor, " n"] | None = None,
    ) -> Float[Tensor, " n"]:
        """Return the negative log-likelihood of each row, times its weight."""
        z, ladj = self.flow.inverse_and_ladj(x, context)
        losses = -(log_prob_inside(self.base, z) + ladj)
        return losses if weights is None else weights * losses

    def _mean_loss(self, x: Tensor, context: Tensor | None, weights: Tensor | None) -> Tensor:
        return self.losses(x, context, weights).mean()

    @torch.enable_grad()
    def gradients(
        self, x: Tensor, context: Tensor | None, weights: Tensor | None
    ) -> tuple[float, bool]:
        """Set the gradients of the parameters; return the loss, and whether it and they are finite.

        If they are not finite, nothing changes. Running averages move before the loss is computed.
        """
        before = [buffer.clone() for buffer in self.running]
        if self.running:
            with torch.no_grad():
                self.flow._absorb(*self.flow._entry(x, context), False)
        loss = objective = self.mean_loss(x, context, weights)
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
        """Update the parameters, with the learning rates times a factor, if any."""
        if factor is not None:
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * factor
        self.optimizer.step()
