"""The layers by their equations.

Each takes a flow's state, a dict of named arrays, and the prefix of its own names in it. Calling
`forward` or `inverse` gives the value and the log-determinant of that direction.
"""

import numpy as np
from scipy import special

ACTIVATIONS = {
    "relu": lambda x: np.where(x > 0, x, 0.0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * special.ndtr(x),
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0.0))),
    "tanh": np.tanh,
}


class Coupling:
    """RealNVP, equation 9, with the binary mask b; NICE, section 3.2, where the scale is absent.

    Network weights are written into matrices over all coordinates, with zeros where b masks them.
    """

    def __init__(
        self, state, prefix, mask, activation="relu", squash=True, scale="tanh", limit=2.0,
        network=None, outputs=2,
    ):  # fmt: skip
        self.state, self.prefix = state, prefix
        self.b = np.asarray(mask, dtype=np.float64)
        self.activation, self.squash, self.outputs = activation, squash, outputs
        self.scale, self.limit, self.network = scale, limit, network

    def given(self, x, context):
        """Return s(b x) and t(b x), zero where b is one."""
        size, seen = len(self.b), self.b == 1
        moved = ~seen
        masked = self.b * x
        if self.squash:
            masked = np.arcsinh(masked)
        if self.network is not None:
            raw = self.network(masked[..., seen])
        else:
            raw = self._dense(masked, seen, context)
        out = np.zeros((*raw.shape[:-1], self.outputs, size))
        out[..., moved] = raw.reshape(*raw.shape[:-1], self.outputs, moved.sum())
        t = out[..., 0, :]
        if self.outputs == 1:
            return np.zeros_like(t), t
        s = np.zeros_like(t)
        s[..., moved] = self._log_scale(out[..., 1, :][..., moved])
        return s, t

    def _dense(self, masked, seen, context):
        names = f"{self.prefix}network.layers."
        depth = sum(key.startswith(names) and key.endswith("weight") for key in self.state)
        activation = ACTIVATIONS[self.activation]
        h = None
        for i in range(depth):
            weight, bias = self.state[f"{names}{i}.weight"], self.state[f"{names}{i}.bias"]
            if i == 0:
                full = np.zeros((len(weight), len(seen)))
                full[:, seen] = weight[:, : seen.sum()]
                h = np.einsum("oi,...i->...o", full, masked) + bias
                of_context = weight[:, seen.sum() :]
                if of_context.size:
                    h = h + np.einsum("oi,...i->...o", of_context, context)
            else:
                h = np.einsum("oi,...i->...o", weight, activation(h)) + bias
        return h

    def _log_scale(self, r):
        if callable(self.scale):
            return self.scale(r)
        limit = self.limit
        if self.scale == "tanh":  # RealNVP, section 4.1: tanh times a learned scale
            factor = self.state[f"{self.prefix}scale.weight"]
            if limit is not None:
                factor = limit * np.tanh(factor / limit)
            return factor * np.tanh(r)
        if self.scale == "sigmoid":  # encoding multiplies by sigmoid(r + 2)
            log_scale = -np.log(special.expit(r + 2))
            if limit is None:
                return log_scale
            middle = -np.log(special.expit(2.0))
            return middle + limit * np.tanh((log_scale - middle) / max(limit, 0.5))
        if self.scale == "clamp":  # 2/pi c arctan(r/c), c one number above zero, another below
            limit = np.inf if limit is None else limit
            c = np.where(r > 0, min(0.1, limit), min(2.0, limit))
            return 2 / np.pi * c * np.arctan(r / c)
        if self.scale == "exp":
            return r
        raise KeyError(self.scale)

    def forward(self, x, context=None):
        s, t = self.given(x, context)
        y = self.b * x + (1 - self.b) * (x * np.exp(s) + t)
        return y, ((1 - self.b) * s).sum(-1)

    def inverse(self, y, context=None):
        s, t = self.given(y, context)
        x = self.b * y + (1 - self.b) * (y - t) / np.exp(s)
        return x, -((1 - self.b) * s).sum(-1)


class Affine:
    """`y = A x + c`: what scaling, ActNorm, BatchNorm, a permutation and Glow's matrix all are."""

    def __init__(self, matrix, offset=0.0):
        self.matrix, self.offset = np.asarray(matrix, dtype=np.float64), offset

    def forward(self, x, context=None):
        y = np.einsum("ij,...j->...i", self.matrix, x) + self.offset
        return y, np.full(y.shape[:-1], np.linalg.slogdet(self.matrix)[1])

    def inverse(self, y, context=None):
        inverse = np.linalg.inv(self.matrix)
        x = np.einsum("ij,...j->...i", inverse, y - self.offset)
        return x, np.full(x.shape[:-1], np.linalg.slogdet(inverse)[1])


def diagonal_scaling(state, prefix):
    """NICE, section 3.3."""
    return Affine(np.diag(np.exp(state[f"{prefix}log_scale"])))


def act_norm(state, prefix):
    """Glow, section 3.1: a scale and a bias for each coordinate."""
    return Affine(np.diag(np.exp(state[f"{prefix}log_scale"])), state[f"{prefix}loc"])


def batch_norm(state, prefix, eps=1e-5):
    """RealNVP, section 3.7, with running averages; base to data undoes the normalisation."""
    deviation = np.sqrt(state[f"{prefix}running_var"] + eps)
    return Affine(np.diag(deviation), state[f"{prefix}running_mean"])


def permutation(state, prefix):
    """`y_j = x_p(j)`: row j of the matrix has its one in column p(j)."""
    return Affine(np.eye(len(state[f"{prefix}permutation"]))[state[f"{prefix}permutation"]])


def invertible_linear(state, prefix, gain=1.0):
    """Glow, equation 10, `W = P L (U + diag(s))`, from data to base."""
    lower, upper = gain * state[f"{prefix}lower"], gain * state[f"{prefix}upper"]
    s = state[f"{prefix}signs"] * np.exp(gain * state[f"{prefix}log_diagonal"])
    p = np.eye(len(s))[state[f"{prefix}permutation"]]
    w = p @ (np.tril(lower, -1) + np.eye(len(s))) @ (np.triu(upper, 1) + np.diag(s))
    return Affine(np.linalg.inv(w))


def lower_triangular(state, prefix, gain=1.0):
    """A shift and a lower-triangular matrix with the exponential of d on its diagonal."""
    lower = gain * np.tril(state[f"{prefix}lower"], -1)
    diagonal = np.exp(gain * state[f"{prefix}log_diagonal"])
    return Affine(lower + np.diag(diagonal), gain * state[f"{prefix}loc"])


def preconditioner(state, prefix):
    """Scales times a symmetric matrix: the identity but for its eigenvectors Q, of values e^λ."""
    q, values = state[f"{prefix}basis"], np.exp(state[f"{prefix}log_values"])
    symmetric = np.eye(len(q)) - q @ q.T + q @ np.diag(values) @ q.T
    return Affine(np.exp(state[f"{prefix}log_scale"])[:, None] * symmetric, state[f"{prefix}loc"])


class Elementwise:
    """A function of each coordinate with its inverse and the derivatives of both."""

    def __init__(self, function, inverse, derivative, ndim):
        self.function, self.undo, self.derivative = function, inverse, derivative
        self.axes = tuple(range(-ndim, 0))

    def forward(self, x, context=None):
        return self.function(x), np.log(self.derivative(x)).sum(self.axes)

    def inverse(self, y, context=None):
        x = self.undo(y)
        return x, -np.log(self.derivative(x)).sum(self.axes)


def sinh_arcsinh(state, prefix, ndim):
    """Jones and Pewsey (2009), equation 2: sinh(δ asinh(x) + ε), on a width of 3.

    Shifted and scaled so that zero, and the slope there, stay.
    """
    epsilon = state[f"{prefix}skewness"]
    delta = np.exp(state.get(f"{prefix}log_weight", 0.0))
    zero, slope = np.sinh(epsilon), delta * np.cosh(epsilon)

    def derivative(x):
        return np.cosh(delta * np.arcsinh(x) + epsilon) * delta / np.sqrt(1 + x**2) / slope

    return Elementwise(
        lambda x: 3 * (np.sinh(delta * np.arcsinh(x / 3) + epsilon) - zero) / slope,
        lambda y: 3 * np.sinh((np.arcsinh(slope * y / 3 + zero) - epsilon) / delta),
        lambda x: derivative(x / 3),
        ndim,
    )


def log_tails(threshold, ndim):
    """The identity within the threshold, a logarithm beyond, and a line 40 further on."""
    t, slope = threshold, np.exp(-40.0)
    end = t + 1 / slope - 1  # where the line begins, at t + 40

    def chosen(x, first, second, *pieces):
        return np.select([np.abs(x) < first, np.abs(x) < second], pieces[:2], pieces[2])

    def function(x):
        size = np.abs(x)
        log, line = t + np.log(1 + np.maximum(size - t, 0)), t + 40 + (size - end) * slope
        return np.sign(x) * chosen(x, t, end, size, log, line)

    def inverse(y):
        size = np.abs(y)
        exp, line = t + np.exp(np.minimum(size - t, 40)) - 1, end + (size - t - 40) / slope
        return np.sign(y) * chosen(y, t, t + 40, size, exp, line)

    def derivative(x):
        return chosen(x, t, end, 1.0, 1 / (1 + np.maximum(np.abs(x) - t, 0)), slope)

    return Elementwise(function, inverse, derivative, ndim)


def intervals(support, ndim):
    """From real numbers to intervals; the ends of each column are numbers or None."""
    low, high = np.array(support, dtype=float).T
    kinds = [np.isnan(low) & np.isnan(high), np.isnan(high), np.isnan(low)]

    def chosen(*of_kinds):
        return np.select(np.broadcast_arrays(*kinds, of_kinds[0])[:3], of_kinds[:3], of_kinds[3])

    def function(x):
        return chosen(x, low + np.exp(x), high - np.exp(x), low + (high - low) * special.expit(x))

    def inverse(y):
        with np.errstate(invalid="ignore"):
            inner = special.logit((y - low) / (high - low))
            return chosen(y, np.log(y - low), np.log(high - y), inner)

    def derivative(x):
        bell = (high - low) * special.expit(x) * special.expit(-x)
        return chosen(np.ones_like(x), np.exp(x), np.exp(x), bell)

    return Elementwise(function, inverse, derivative, ndim)


class Composed:
    """Layers one after the other, the one next to the base first."""

    def __init__(self, layers):
        self.layers = []
        for layer in layers:
            self.layers += layer.layers if isinstance(layer, Composed) else [layer]

    def forward(self, x, context=None):
        total = 0.0
        for layer in self.layers:
            x, ladj = layer.forward(x, context)
            total = total + ladj
        return x, total

    def inverse(self, y, context=None):
        total = 0.0
        for layer in reversed(self.layers):
            y, ladj = layer.inverse(y, context)
            total = total + ladj
        return y, total
