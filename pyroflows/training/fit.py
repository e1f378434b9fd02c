"""`fit`: maximum-likelihood training; `pyroflows_common/loop.py` is its loop over batches."""

import os
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyroflows.distribution import named_base
from pyroflows.layers.constrained import constrained
from pyroflows.rng import seeded
from pyroflows.storage.checkpoint import Checkpoint, describe_flow
from pyroflows.support import check_base, is_real, support_of
from pyroflows.training.run import Run, Settings
from pyroflows.training.sources import Arrays
from pyroflows.transform import Conditioned, TransformModule
from pyroflows_common.batches import HELD_OUT, divide
from pyroflows_common.history import FitResult
from pyroflows_common.rows import Data, SupportsArray


def fit(
    flow: TransformModule,
    data: Data,
    *,
    context: SupportsArray | None = None,
    weights: SupportsArray | None = None,
    base: "str | dist.TorchDistribution | None" = None,
    support: Any = None,
    steps: int,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    validation: Data | float | None = HELD_OUT,
    patience: int | None = None,
    validate_every: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | Callable[[float], str] = True,
    standardize: bool = False,
    schedule: str | Callable[[int], float] | None = None,
    clip_norm: float | None = None,
    penalty: float = 0.0,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer] | None = None,
    seed: int = 0,
    compile: bool = False,
) -> FitResult:
    r"""Train a flow by maximum likelihood.

    $$\mathrm{loss} = -\frac1n \sum_{i=1}^n
    \bigl( \log p_z(z_i) + \log|\det dz_i/dx_i| \bigr), \qquad
    z_i = \mathrm{flow}^{-1}(x_i).$$

    Data-dependent layers are initialised from the first batch, and the running averages of each
    `BatchNorm` move before each step. Runs with the same seed are identical; the global random
    number generators are neither used nor changed. Ctrl-C ends training and returns the flow
    learned so far. After an error or Ctrl-C before the first step, the flow is unchanged.

    A step is skipped if its loss or gradient is not finite; 50 skipped steps in a row end training.

    Args:
        flow: the flow, which is trained in place, except for parameters that do not require
            gradients.
        data: rows `(n, *event_shape)` in an array or tensor, a dataset of rows, or an iterable of
            batches such as a DataLoader. Datasets and iterables need not fit in memory; those for
            a conditional flow yield pairs (x, context). Batches are converted to the dtype and
            device of the flow.
        context: contexts `(n, context_dim)` of the rows of an array, on a scale of about one:
            `standardize` leaves them as they are.
        weights: weights `(n,)` of the rows of an array, from 0 on, such as importance or survey
            weights. A row of weight 2 counts as two rows, in the losses and in `standardize`, but
            only the ratios of the weights matter. Layers that start from the first batch (ActNorm,
            batch normalisation) do not use them.
        base: `"normal"`, `"logistic"` or a Pyro distribution over events of the flow's shape.
            Default: the base of the flow's last fit, at first normal.
        support: support of the data, as `BijectTo` takes it: a constraint of Pyro such as
            `positive`, `interval(a, b)` or `simplex`, or a sequence with one for each column. The
            result's flow maps onto it: a `Chain` of `flow` and a `BijectTo`. For a simplex of K
            numbers, `flow` is one of K − 1. Default: all real numbers.
        steps: maximum number of steps.
        batch_size: number of rows in a batch; an iterable of batches ignores it.
        learning_rate: step size of Adam.
        validation: fraction of the rows to hold out, or None, or data to validate on, as `data` or
            `(x, context, weights)`.
            Default: a tenth of the rows, and nothing for an iterable of batches. The first
            validation is of the start. The result has the parameters with the lowest validation
            loss; without validation it has the last parameters with a finite loss.
        patience: number of validations without improvement after which training stops.
        validate_every: number of steps between validations. Default: an epoch.
        checkpoint: file of the state of training, written at each validation, or at the end of
            each pass over an iterable of batches. If the file exists, training resumes from it and
            gives the numbers of an uninterrupted run; `steps` and the other arguments must be the
            same. To train a finished flow further, call `fit` on its `result.flow`.
        progress: whether to show a bar, or a function that formats the loss in it; for pixels
            `lambda loss: f"{bits_per_dim(-loss, event_shape):.3f} bits/dim"`. Where standard error
            is no terminal, the bar is a few lines.
        standardize: whether to set the flow's `Standardization` from the training data, or from
            the first batch of an iterable.
        schedule: `"cosine"` (zero at the last step), or a function that maps the number of steps
            made so far to a factor on the learning rate.
        clip_norm: maximum norm of the whole gradient.
        penalty: weight of `flow.scale_penalty()` in the loss, for flows with tanh scales; 5e-5 in
            the RealNVP paper.
        augment: function that maps a batch and a `torch.Generator` to the batch to train on, such
            as one that adds dequantisation noise. Each training batch gets new noise; the
            validation data get the same noise in each validation.
        optimizer: function that makes another optimiser, with its own learning rate, from the
            parameters.
        seed: seed of the held-out rows, the order of the rows, `augment` and dropout.
        compile: whether to compile the loss with `torch.compile`, which makes the first step slow.

    Returns:
        The trained flow and the history of its training.

    Raises:
        ValueError: if an argument is out of range, if data, context or base do not suit the flow,
            if the data has NaN or inf, or if the checkpoint is of another run. Everything that can
            be checked before training is checked before anything changes.
        TypeError: if the data is none of the above, or has whole numbers and `augment` is None.

    Examples:
        >>> import torch
        >>> from pyroflows import fit, flow_distribution, realnvp
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(1000, 2) * torch.tensor([1.0, 5.0]) + 3.0
        >>> result = fit(realnvp(2), x, steps=30, standardize=True, progress=False)
        >>> result.stopped, len(result.losses)
        ('steps', 30)
        >>> flow_distribution(result.flow).log_prob(x).mean() > -4.5
        tensor(True)
    """
    settings = Settings.among(locals())
    parameters = _check_flow(flow, settings)
    flow = flow if support is None else constrained(flow, support)
    name, density = _base(flow, base)
    dtype = str(parameters[0].dtype).removeprefix("torch.")
    inside = None if is_real(flow.codomain) else flow.codomain
    arrays = Arrays(flow.event_shape, flow.context_dim, augment is not None, dtype, inside)
    with seeded(seed):
        train, held_out = divide(arrays, data, context, weights, validation, seed)
        saved = None
        if checkpoint is not None:
            about: dict[str, Any] = {
                "flow": describe_flow(flow),
                "base": name,
                "data": train.describe(),
                "validation": None if held_out is None else held_out.describe(),
            }
            saved = Checkpoint(checkpoint, {**settings.describe(), **about})
        run = Run(flow, parameters, density, arrays, settings, train, held_out, saved, progress)
        history = run.run(name)
    bounded = not is_real(support_of(density))
    for warning in (train.warning(), history.warning(bounded)):
        if warning is not None:
            warnings.warn(warning, stacklevel=2)
    return history.result(flow)


def _check_flow(flow: object, settings: Settings) -> list[nn.Parameter]:
    """Check that the settings can train the flow, and return its trainable parameters."""
    if not isinstance(flow, TransformModule):
        raise TypeError(f"`flow` is a {type(flow).__name__}, expected a TransformModule")
    if isinstance(flow, Conditioned):
        raise ValueError("`flow` has its context already: pass the flow itself, and `context`")
    parameters = [p for p in flow.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("`flow` has no parameters to train")
    if settings.penalty and not any(callable(getattr(m, "penalty", None)) for m in flow.modules()):
        raise ValueError(
            f"`penalty` is {settings.penalty}, but the flow has no tanh scales to penalise"
        )
    return parameters


def _base(
    flow: TransformModule, base: "str | dist.TorchDistribution | None"
) -> tuple[str, dist.TorchDistribution]:
    """Return the name of the base and its distribution."""
    base = flow.base if base is None else base
    if isinstance(base, str):
        # The host's validation would end training at the first non-finite event.
        return base, named_base(base, flow, validate_args=False)
    known = isinstance(base, torch.distributions.Distribution)
    if not known or (tuple(base.batch_shape), tuple(base.event_shape)) != ((), flow.base_shape):
        raise ValueError(
            f"`base` is {base!r}, expected 'normal', 'logistic' or a distribution with batch_shape "
            f"() and event_shape {flow.base_shape}"
        )
    check_base(base)
    return "custom", base
