"""Maximum-likelihood training: `fit`."""

import os
import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import optax
from jax import Array

from numpyro_flows.distribution import named_base
from numpyro_flows.rng import seed_of
from numpyro_flows.storage.checkpoint import Checkpoint, describe_flow
from numpyro_flows.training.run import Run, Settings
from numpyro_flows.training.sources import Arrays
from numpyro_flows.transform import Conditioned, TransformModule
from numpyro_flows.tree import trainable
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
    augment: Callable[[Array, Array], Array] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    key: Array | None = None,
) -> FitResult:
    r"""Train a flow by maximum likelihood.

    $$\mathrm{loss} = -\frac1n \sum_{i=1}^n
    \bigl( \log p_z(z_i) + \log|\det dz_i/dx_i| \bigr), \qquad
    z_i = \mathrm{flow}^{-1}(x_i).$$

    Layers that start from data are initialised on the first batch, and the running averages of
    every `BatchNorm` are moved before each step. Equal keys give equal numbers. A step is one
    compiled function, which runs with equally built flows share. Ctrl-C ends training and returns
    what has been learned so far; before the first step, the flow as it was.

    A step whose loss or gradient is not finite is skipped, and 50 of them in a row end training.

    Args:
        flow: the flow; it stays as it is.
        data: rows `(n, *event_shape)` as an array; or a dataset with rows, or any iterable of
            batches, such as a DataLoader, none of which need fit in memory. Rows and batches of a
            conditional flow are pairs (x, context). Batches are converted to the flow's dtype. A
            JAX array stays on its device; of a NumPy array, batches are sent there one by one.
        context: contexts `(n, context_dim)` that go with an array.
        base: `"normal"`, `"logistic"` or a NumPyro distribution over events of the flow's shape.
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
        augment: function of a batch and a key that gives the batch to train on, such as one that
            adds dequantisation noise; it is compiled. The noise is drawn afresh for each training
            batch, and once and for all for the validation data.
        optimizer: another optimiser; it brings its own learning rate.
        key: of the split, the order of the rows and `augment`. Default: `jax.random.key(0)`.

    Returns:
        The new flow with the history of its training.

    Raises:
        ValueError: where an argument is out of its range, where data, context or base do not suit
            the flow, where data has NaN or inf, or where the checkpoint is of another run. All
            that can be known before training is found before any work is done.
        TypeError: where data is none of the above, or has whole numbers and there is no `augment`.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_flows import fit, flow_distribution, realnvp
        >>> x = jax.random.normal(jax.random.key(0), (1000, 2)) * jnp.array([1.0, 5.0]) + 3.0
        >>> flow = realnvp(2, key=jax.random.key(1))
        >>> result = fit(flow, x, steps=30, standardize=True, progress=False)
        >>> result.stopped, len(result.losses)
        ('steps', 30)
        >>> bool(flow_distribution(result.flow).log_prob(x).mean() > -4.5)
        True
    """
    key = jax.random.key(0) if key is None else key
    settings = Settings.among(locals())
    dtype = _check_flow(flow, settings)
    name, density = _base(flow, base)
    arrays = Arrays(flow.event_shape, flow.context_dim, augment is not None, dtype)
    train, held_out = divide(arrays, data, context, validation, seed_of(key))
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
    run = Run(flow, density, arrays, settings, train, held_out, saved, progress)
    history = run.run(name)
    warning = history.warning()
    if warning is not None:
        warnings.warn(warning, stacklevel=2)
    return history.result(run.flow)


def _check_flow(flow: Any, settings: Settings) -> str:
    """Check that a flow can be trained with these settings, and return its dtype's name."""
    if not isinstance(flow, TransformModule):
        raise TypeError(f"`flow` is a {type(flow).__name__}, expected a TransformModule")
    if isinstance(flow, Conditioned):
        raise ValueError("`flow` has its context already: pass the flow itself, and `context`")
    parameters = jax.tree.leaves(eqx.filter(flow, trainable(flow)))
    if not parameters:
        raise ValueError("`flow` has no parameters to train")
    if settings.penalty and not any(map(_has_penalty, jax.tree.leaves(flow, is_leaf=_has_penalty))):
        raise ValueError(
            f"`penalty` is {settings.penalty}, but the flow has no tanh scales that it could act on"
        )
    return str(parameters[0].dtype)


def _has_penalty(node: Any) -> bool:
    return callable(getattr(node, "penalty", None))


def _base(flow: TransformModule, base: Any) -> tuple[str, Any]:
    """Return the name of the base and the distribution."""
    base = flow.base if base is None else base
    if isinstance(base, str):
        return base, named_base(base, flow)
    shapes = tuple(getattr(base, "batch_shape", ())), tuple(getattr(base, "event_shape", ()))
    if not hasattr(base, "log_prob") or shapes != ((), flow.base_shape):
        raise ValueError(
            f"`base` is {base!r}, expected 'normal', 'logistic' or a distribution with batch_shape "
            f"() and event_shape {flow.base_shape}"
        )
    return "custom", base
