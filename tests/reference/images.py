"""What images add, by the papers' equations: written with loops over pixels, not with reshapes."""

import numpy as np

from tests.reference.layers import ACTIVATIONS, Affine, Coupling


def convolution(x, weight, bias):
    """`y[o, h, w] = Σ weight[o, i, a, b] x[i, h + a − r, w + b − r] + bias[o]`, zero outside."""
    *_, height, width = x.shape
    size = weight.shape[-1]
    r = size // 2
    y = np.zeros((*x.shape[:-3], len(weight), height, width)) + bias[:, None, None]
    for h in range(height):
        for w in range(width):
            for a in range(size):
                for b in range(size):
                    i, j = h + a - r, w + b - r
                    if 0 <= i < height and 0 <= j < width:
                        y[..., h, w] += np.einsum("oi,...i->...o", weight[:, :, a, b], x[..., i, j])
    return y


def conv_net(state, prefix, activation="relu"):
    """Glow, section 3.3 and its code: convolutions, and `exp(3 log_scale)` at the end."""
    names = f"{prefix}network.layers."
    depth = sum(key.startswith(names) and key.endswith("weight") for key in state)

    def network(x):
        for i in range(depth):
            if i:
                x = ACTIVATIONS[activation](x)
            x = convolution(x, state[f"{names}{i}.weight"], state[f"{names}{i}.bias"])
        return x * np.exp(3 * state[f"{prefix}network.log_scale"])

    return network


def res_net(state, prefix, activation="relu", norm=None):
    """RealNVP, section 4.1: residual blocks, with weight normalisation."""
    names = f"{prefix}network."
    blocks = len({k.split(".")[-3] for k in state if k.startswith(f"{names}blocks.")})

    def conv(x, name):
        v, gain = state[f"{names}{name}.weight"], state[f"{names}{name}.gain"]
        length = np.sqrt((v**2).sum((1, 2, 3), keepdims=True))
        return convolution(x, gain * v / length, state[f"{names}{name}.bias"])

    def activated(x, i):
        if norm is not None:
            mean, variance = x.mean((-1, -2), keepdims=True), x.var((-1, -2), keepdims=True)
            if norm == "batch":
                averages = (state[f"{names}norms.{i}.running_{kind}"] for kind in ("mean", "var"))
                mean, variance = averages
            x = (x - mean) / np.sqrt(variance + 1e-5)
        return ACTIVATIONS[activation](x)

    def network(x):
        x = conv(x, "first")
        for i in range(blocks):
            y = conv(activated(x, 2 * i), f"blocks.{i}.0")
            x = x + conv(activated(y, 2 * i + 1), f"blocks.{i}.1")
        return conv(activated(x, 2 * blocks), "last")

    return network


def checkerboard(shape):
    """RealNVP, figure 3: one where row and column add up to an even number."""
    _, height, width = shape
    rows, columns = np.indices((height, width))
    return np.broadcast_to((rows + columns) % 2 == 0, shape)


def channels(shape, kept=None):
    """One for the channels that are left as they are: by default the first half."""
    kept = np.arange(shape[0]) < shape[0] // 2 if kept is None else np.asarray(kept, dtype=bool)
    return np.broadcast_to(kept[:, None, None], shape)


class ImageCoupling(Coupling):
    """RealNVP, equation 9, with a binary mask b over all pixels and channels."""

    def __init__(self, state, prefix, mask, network, by_channel, **options):
        super().__init__(state, prefix, mask, network=network, **options)
        self.by_channel = by_channel

    def given(self, x, context):
        masked = np.arcsinh(self.b * x) if self.squash else self.b * x
        seen = masked
        if self.by_channel:  # the network is given the channels that it sees, and no others
            kept = self.b[:, 0, 0] == 1
            seen = masked[..., kept, :, :]
        if context is not None:
            plane = np.broadcast_to(
                context[..., None, None], (*seen.shape[:-3], context.shape[-1], *seen.shape[-2:])
            )
            seen = np.concatenate([seen, plane], axis=-3)
        raw = self.network(seen)
        shift = raw if self.outputs == 1 else raw[..., : raw.shape[-3] // 2, :, :]
        t, s = np.zeros_like(x), np.zeros_like(x)
        moved = ~kept if self.by_channel else np.ones(x.shape[-3], dtype=bool)
        t[..., moved, :, :] = shift
        if self.outputs == 2:
            s[..., moved, :, :] = self._log_scale(raw[..., raw.shape[-3] // 2 :, :, :])
        return s * (1 - self.b), t * (1 - self.b)

    def forward(self, x, context=None):
        s, t = self.given(x, context)
        return self.b * x + (1 - self.b) * (x * np.exp(s) + t), s.sum((-1, -2, -3))

    def inverse(self, y, context=None):
        s, t = self.given(y, context)
        return self.b * y + (1 - self.b) * (y - t) / np.exp(s), -s.sum((-1, -2, -3))


class Pointwise:
    """`y = x · exp(log_scale) + loc`, numbers broadcast over pixels."""

    def __init__(self, log_scale, loc, shape):
        self.log_scale = np.broadcast_to(np.asarray(log_scale, dtype=np.float64), shape)
        self.loc = np.broadcast_to(np.asarray(loc, dtype=np.float64), shape)

    def forward(self, x, context=None):
        y = x * np.exp(self.log_scale) + self.loc
        return y, np.full(x.shape[:-3], self.log_scale.sum())

    def inverse(self, y, context=None):
        x = (y - self.loc) / np.exp(self.log_scale)
        return x, np.full(y.shape[:-3], -self.log_scale.sum())


class Conv1x1:
    """Glow, equations 9 and 10: one matrix for the channels of every pixel."""

    def __init__(self, matrix):
        self.matrix = Affine(matrix)

    def forward(self, x, context=None):
        return self._each(self.matrix.forward, x)

    def inverse(self, y, context=None):
        return self._each(self.matrix.inverse, y)

    def _each(self, function, x):
        y, total = np.zeros_like(x), 0.0
        for h in range(x.shape[-2]):
            for w in range(x.shape[-1]):
                y[..., h, w], ladj = function(x[..., h, w])
                total = total + ladj
        return y, total


class Squeeze:
    """RealNVP, figure 3: 2 × 2 × C to 1 × 1 × 4C, from data to base."""

    def __init__(self, shape):
        self.shape = shape

    def _places(self):
        c, height, width = self.shape
        for k in range(c):
            for h in range(height):
                for w in range(width):
                    place = (h % 2) * 2 + w % 2
                    yield (k, h, w), (place * c + k, h // 2, w // 2)

    def inverse(self, y, context=None):
        c, height, width = self.shape
        x = np.zeros((*y.shape[:-3], 4 * c, height // 2, width // 2))
        for data, base in self._places():
            x[(..., *base)] = y[(..., *data)]
        return x, np.zeros(y.shape[:-3])

    def forward(self, x, context=None):
        y = np.zeros((*x.shape[:-3], *self.shape))
        for data, base in self._places():
            y[(..., *data)] = x[(..., *base)]
        return y, np.zeros(x.shape[:-3])


class Flatten:
    """Row-major order, channel by channel."""

    def __init__(self, shape):
        self.shape = shape

    def inverse(self, y, context=None):
        batch = y.shape[: y.ndim - len(self.shape)]
        return y.reshape(*batch, -1), np.zeros(batch)

    def forward(self, x, context=None):
        return x.reshape(*x.shape[:-1], *self.shape), np.zeros(x.shape[:-1])


class MultiScale:
    """RealNVP, equations 13 to 16, with levels from the coarsest to the finest.

    Each level is `(layer, shape)`, the shape on its base's side.
    """

    def __init__(self, levels):
        self.levels = levels

    def inverse(self, y, context=None):
        total, parts = 0.0, []
        for i, (layer, shape) in enumerate(reversed(self.levels)):
            h, ladj = layer.inverse(y, context)
            total = total + ladj
            half = 0 if i == len(self.levels) - 1 else shape[0] // 2
            done, y = (h[..., half:, :, :], h[..., :half, :, :])
            parts.insert(0, done.reshape(*done.shape[:-3], -1))
        return np.concatenate(parts, -1), total

    def forward(self, x, context=None):
        total, passed = 0.0, None
        for layer, (c, height, width) in self.levels:
            own = c if passed is None else c - passed.shape[-3]
            size = own * height * width
            part, x = x[..., :size], x[..., size:]
            part = part.reshape(*part.shape[:-1], own, height, width)
            h = part if passed is None else np.concatenate([passed, part], -3)
            passed, ladj = layer.forward(h, context)
            total = total + ladj
        return passed, total


class Logit:
    """RealNVP, section 4.1: `logit(alpha + (1 - 2 alpha) y)` from data to base."""

    def __init__(self, alpha, rank):
        self.alpha, self.dims = alpha, tuple(range(-rank, 0))

    def inverse(self, y, context=None):
        p = self.alpha + (1 - 2 * self.alpha) * y
        slope = (1 - 2 * self.alpha) / (p * (1 - p))
        return np.log(p / (1 - p)), np.log(slope).sum(self.dims)

    def forward(self, x, context=None):
        p = 1 / (1 + np.exp(-x))
        y = (p - self.alpha) / (1 - 2 * self.alpha)
        return y, -self.inverse(y)[1]
