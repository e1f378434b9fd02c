"""What the adapters share: how a case of the registry becomes a flow with perturbed weights."""

import inspect

import numpy as np


def own_network(n_in, n_out):
    """A conditioner that a user might bring, in NumPy: the wings have it in their own arrays."""
    weight = np.cos(np.arange(n_in * n_out)).reshape(n_in, n_out)
    return lambda x: np.sin(x @ weight)


def of_pixels(network):
    """The network, applied to the channels of every pixel."""
    return lambda x: np.moveaxis(network(np.moveaxis(x, -3, -1)), -1, -3)


def own_scale(r):
    """A scale function that a user might bring."""
    return 0.5 * np.sin(r)


def disturbed(state, seed=0, scale=0.3):
    """Add noise to all floating-point arrays: at their start most layers are the identity."""
    rng = np.random.default_rng(seed)
    noisy = {}
    for name in sorted(state):
        value = state[name]
        if value.dtype.kind == "f" and not name.endswith("signs"):
            noise = scale * rng.standard_normal(value.shape)
            positive = name.endswith("running_var")
            noise = value * np.exp(noise) if positive else value + noise
            if name.endswith("basis"):  # its columns are orthonormal
                noise = np.linalg.qr(noise)[0]
            value = noise.astype(value.dtype)
        noisy[name] = value
    return noisy


class Wing:
    """To be subclassed once a wing."""

    name: str
    package: object

    def __repr__(self):
        return self.name

    def new(self, name, *args, seed=0, **options):
        """Make a layer or a flow by its public name."""
        maker = getattr(self.package, name)
        if options.get("scale") == "own":
            options["scale"] = self.own_scale
        if options.get("network") == "own":
            image = not isinstance(args[0], int)
            make = self.own_convolution if image else self.own_network
            options["network"] = make
            if name.endswith("Coupling"):
                size = args[0][0] if image else args[0]
                options["network"] = make(size // 2, (size - size // 2) * maker.outputs)
        if "key" in inspect.signature(maker).parameters:
            options["key"] = self.key(seed)
        return maker(*args, **options)

    def apply(self, name, *args, seed=0, **options):
        """Call a public function with NumPy's arrays, and return what it gives as one."""
        function = getattr(self.package, name)
        taken = inspect.signature(function).parameters
        if "key" in taken:
            options.setdefault("key", self.key(seed))
        elif "seed" in taken:
            options.setdefault("seed", seed)
        args = [self.array(a) if isinstance(a, np.ndarray) else a for a in args]
        options = {
            name: self.array(a) if isinstance(a, np.ndarray) else a for name, a in options.items()
        }
        return self.numpy(function(*args, **options))

    def build(self, case, seed=0, dtype="float64", noise=0.3):
        """Make the flow of a case, in a dtype, with noise on its weights."""
        flow = self.cast(self._make(case.name, case.size, case.layers, case.options, seed), dtype)
        if noise:
            flow = self.load(flow, disturbed(self.state(flow), seed, noise))
        return flow

    def _make(self, name, size, layers, options, seed):
        if name == "MultiScale":
            return self.new(name, [self._make(n, s, (), o, seed) for n, s, _, o in layers])
        if name in ("Chain", "Stack"):
            inner = [self._make(n, size, (), o, seed + i) for i, (n, o) in enumerate(layers)]
            return self.new(name, inner)
        first = np.roll(range(size), 1).tolist() if name == "Permutation" else size
        return self.new(name, first, seed=seed, **options)

    def given(self, flow, context):
        """The flow, conditioned where there is a context."""
        return flow if context is None else flow.condition(self.array(context))

    def density(self, flow, base=None, context=None, temperature=1.0):
        """The distribution that `flow_distribution` makes."""
        context = None if context is None else self.array(context)
        return self.package.flow_distribution(flow, base, context=context, temperature=temperature)
