"""Maximum-likelihood training: `fit`."""

import math
import os
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pyroflows.distribution import named_base
from pyroflows.rng import seeded
from pyroflows.storage.checkpoint import Checkpoint, describe_flow
from pyroflows.training.run import Run, Settings
from pyroflows.training.sources import Arrays
from pyroflows.transform import Conditioned, TransformModule
from pyroflows_common.batches import HELD_OUT, divide
from pyroflows_common.history import FitResult


def fit(
    flow: TransformModule,
    data: Any,
    *,
    context: Any = None,
    base: Any = None,
    steps: int,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    validation: Any = HELD_OUT,
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

    Layers that start from data are initialised on the first batch, and the running averages of
    every `BatchNorm` are moved before each step. Equal seeds give equal numbers; the global
    random numbers are neither used nor touched. Ctrl-C ends training and returns what has been
    learned so far. An error or Ctrl-C before the first step leaves the flow as it was.

    A step whose loss or gradient is not finite is skipped, and 50 of them in a row end training.

    Args:
        flow: the flow; it is trained in place. Parameters that do not require gradients stay.
        data: rows `(n, *event_shape)` as an array or tensor; or a dataset with rows, or any
            iterable of batches, such as a DataLoader, none of which need fit in memory. Rows and
            batches of a conditional flow are pairs (x, context). Batches are converted to the
            flow's dtype and device.
        context: contexts `(n, context_dim)` that go with an array.
        base: `"normal"`, `"logistic"` or a Pyro distribution over events of the flow's shape.
            Default: what the flow was last fitted with, normal at first.
        steps: number of steps at most.
        batch_size: rows in a batch; an iterable makes batches as it likes.
        learning_rate: Adam's step size.
        validation: fraction of the rows to hold out, or data to validate on (as `data`), or None.
            Default: a tenth of the rows; of an iterable of batches nothing is held out. The
            parameters with the lowest loss on this data are restored in the end; without it the
            last ones stay, or the last whose loss was finite.
        patience: number of validations without improvement after which to stop.
        validate_every: steps between validations. Default: an epoch.
        checkpoint: file of the state of training, written at each validation; for an iterable of
            batches at the end of each pass, from which alone it can be resumed. Where the file
            exists, training goes on from there, to the numbers of a run without a break; `steps`
            and the other arguments have to be the same. To train longer than a finished run, call
            `fit` again on its `result.flow`.
        progress: whether to show a bar, or how: a function that writes a loss, for pixels
            `lambda loss: f"{bits_per_dim(-loss, event_shape):.3f} bits/dim"`.
        standardize: whether to set the flow's `Standardization` from the training data, of an
            iterable from its first batch.
        schedule: `"cosine"` (to zero at the last step) or a function of the number of steps done,
            from 0, that gives a factor on the learning rate.
        clip_norm: bound on the norm of the whole gradient.
        penalty: weight of `flow.scale_penalty()` in the loss, for flows with tanh scales; RealNVP
            has 5e-5.
        augment: function of a batch and a `torch.Generator` that gives the batch to train on, such
            as one that adds dequantisation noise. The noise is drawn afresh for each training
            batch, and once and for all for the validation data.
        optimizer: makes another optimiser of the parameters; it brings its own learning rate.
        seed: of the split, the order of the rows, `augment`'s generator and dropout.
        compile: whether to compile the loss by `torch.compile`; the first step is then slow.

    Returns:
        The flow with the history of its training.

    Raises:
        ValueError: where an argument is out of its range, where data, context or base do not suit
            the flow, where data has NaN or inf, or where the checkpoint is of another run. All
            that can be known before training is found before anything is changed.
        TypeError: where data is none of the above, or has whole numbers and there is no `augment`.

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
    name, density = _base(flow, base)
    dtype = str(parameters[0].dtype).removeprefix("torch.")
    arrays = Arrays(flow.event_shape, flow.context_dim, augment is not None, dtype)
    with seeded(seed):
        train, held_out = divide(arrays, data, context, validation, seed)
        if patience is not None and held_out is None:
            raise ValueError("`patience` needs data to validate on: pass `validation`")
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
    warning = history.warning()
    if warning is not None:
        warnings.warn(warning, stacklevel=2)
    return history.result(flow)


def _check_flow(flow: Any, settings: Settings) -> list[nn.Parameter]:
    """Check that a flow can be trained with these settings, and return its parameters."""
    if not isinstance(flow, TransformModule):
        raise TypeError(f"`flow` is a {type(flow).__name__}, expected a TransformModule")
    if isinstance(flow, Conditioned):
        raise ValueError("`flow` has its context already: pass the flow itself, and `context`")
    parameters = [p for p in flow.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("`flow` has no parameters to train")
    if settings.penalty and not any(callable(getattr(m, "penalty", None)) for m in flow.modules()):
        raise ValueError(
            f"`penalty` is {settings.penalty}, but the flow has no tanh scales that it could act on"
        )
    return parameters


def _base(flow: TransformModule, base: Any) -> tuple[str, Callable[[Tensor], Tensor]]:
    """Return the name of the base and its log-density, which is NaN where its argument is."""
    base = flow.base if base is None else base
    if isinstance(base, str):
        # The host's validation would end training at the first event that is not finite.
        return base, named_base(base, flow, validate_args=False).log_prob
    shapes = tuple(getattr(base, "batch_shape", ())), tuple(getattr(base, "event_shape", ()))
    if not hasattr(base, "log_prob") or shapes != ((), flow.base_shape):
        raise ValueError(
            f"`base` is {base!r}, expected 'normal', 'logistic' or a distribution with batch_shape "
            f"() and event_shape {flow.base_shape}"
        )

    def density(z: Tensor) -> Tensor:
        try:
            return base.log_prob(z)
        except ValueError:
            if z.isfinite().all():
                raise
            return z.flatten(1).sum(1) * math.nan

    return "custom", density
