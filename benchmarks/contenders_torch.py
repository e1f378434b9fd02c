"""What is timed on PyTorch: the floor, this library and its peers, all doing the same work."""

import torch
from timing import FLOOR, Contender, ImageSettings, Settings, VectorSettings
from torch import Tensor, nn


def contenders(settings: VectorSettings) -> dict[str, Contender]:
    """Build every contender."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    built = {
        FLOOR: floor(settings),
        "pyroflows": pyroflows(settings),
        "pyroflows, torch.compile": pyroflows(settings, compiled=True),
        "Pyro": pyro(settings),
        "zuko": zuko(settings),
        "nflows": nflows(settings),
        "normflows": normflows(settings),
    }
    # zuko switches argument validation off for the whole process as it is imported.
    torch.distributions.Distribution.set_default_validate_args(True)
    return built


def glows(settings: ImageSettings) -> dict[str, Contender]:
    """Build Glow on images as every library that has it does."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    return {
        FLOOR: convolutions(settings),
        "pyroflows": glow(settings),
        "pyroflows, torch.compile": glow(settings, compiled=True),
        "normflows": normflows_glow(settings),
    }


def floor(settings: VectorSettings) -> Contender:
    """The conditioners alone: each sees the two halves of the one before, added."""
    half = settings.dim // 2
    networks = nn.ModuleList(_mlp(half, settings) for _ in range(settings.couplings))
    start = torch.randn(settings.batch, half)

    def chained(a: Tensor) -> Tensor:
        for network in networks:
            shift, scale = network(a).chunk(2, -1)
            a = shift + scale
        return a

    return _networks_alone(chained, networks, start)


def convolutions(settings: ImageSettings) -> Contender:
    """Glow's networks alone: each sees the two halves of the one before, added."""
    levels = nn.ModuleList(
        nn.ModuleList(_convolutions(i, o, settings) for _ in range(settings.steps))
        for i, o in settings.networks()
    )
    c, h, w = settings.shape
    start = torch.randn(settings.batch, 2 * c, h // 2, w // 2)

    def chained(a: Tensor) -> Tensor:
        for level, networks in enumerate(levels):
            if level:
                a = nn.functional.pixel_unshuffle(a, 2)[:, : networks[0][0].in_channels]
            for network in networks:
                shift, scale = network(a).chunk(2, 1)
                a = shift + scale
        return a

    return _networks_alone(chained, levels, start)


def pyroflows(settings: VectorSettings, compiled: bool = False) -> Contender:
    from pyroflows import flow_distribution, realnvp

    flow = realnvp(settings.dim, layers=settings.couplings, hidden=settings.hidden)
    return _ours(flow, flow_distribution(flow), compiled, settings)


def pyro(settings: VectorSettings) -> Contender:
    import pyro.distributions as dist
    from pyro.distributions.transforms import AffineCoupling, Permute
    from pyro.nn import DenseNN

    half = settings.dim // 2
    couplings = nn.ModuleList(
        AffineCoupling(half, DenseNN(half, list(settings.hidden), [half, half]))
        for _ in range(settings.couplings)
    )
    swap = torch.arange(settings.dim).roll(half)
    transforms = [layer for coupling in couplings for layer in (coupling, Permute(swap))]
    base = dist.Normal(torch.zeros(settings.dim), 1.0).to_event(1)
    density = dist.TransformedDistribution(base, transforms)

    def loss(x: Tensor) -> Tensor:
        density.clear_cache()
        return -density.log_prob(x).mean()

    def log_prob(x: Tensor) -> Tensor:
        density.clear_cache()
        return density.log_prob(x)

    def sample() -> Tensor:
        return density.sample((settings.batch,))

    return _works(list(couplings.parameters()), loss, log_prob, sample, settings)


def zuko(settings: VectorSettings) -> Contender:
    from zuko.flows import RealNVP

    flow = RealNVP(
        settings.dim, transforms=settings.couplings, hidden_features=list(settings.hidden)
    )
    return _works(
        list(flow.parameters()),
        lambda x: -flow().log_prob(x).mean(),
        lambda x: flow().log_prob(x),
        lambda: flow().sample((settings.batch,)),
        settings,
    )


def nflows(settings: VectorSettings) -> Contender:
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.transforms import AffineCouplingTransform, CompositeTransform

    mask = torch.ones(settings.dim)
    mask[: settings.dim // 2] = -1
    layers = [
        AffineCouplingTransform(-mask if k % 2 else mask, lambda i, o: _ContextFree(i, settings))
        for k in range(settings.couplings)
    ]
    flow = Flow(CompositeTransform(layers), StandardNormal([settings.dim]))
    return _works(
        list(flow.parameters()),
        lambda x: -flow.log_prob(x).mean(),
        flow.log_prob,
        lambda: flow.sample(settings.batch),
        settings,
    )


def normflows(settings: VectorSettings) -> Contender:
    import normflows as nf

    half = settings.dim // 2
    layers = []
    for _ in range(settings.couplings):
        network = nf.nets.MLP([half, *settings.hidden, settings.dim], init_zeros=True)
        layers += [nf.flows.AffineCouplingBlock(network), nf.flows.Permute(settings.dim, "swap")]
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(settings.dim, False), layers)
    return _works(
        list(flow.parameters()),
        flow.forward_kld,
        flow.log_prob,
        lambda: flow.sample(settings.batch),
        settings,
    )


def glow(settings: ImageSettings, compiled: bool = False) -> Contender:
    from pyroflows import flow_distribution, glow

    flow = glow(
        settings.shape, levels=settings.levels, steps=settings.steps, channels=settings.channels
    )
    return _ours(flow, flow_distribution(flow), compiled, settings)


def normflows_glow(settings: ImageSettings) -> Contender:
    from images_normflows import multiscale_glow

    flow = multiscale_glow(settings.shape, settings.levels, settings.steps, settings.channels)
    flow(torch.randn(settings.batch, *settings.shape))  # its ActNorm starts from a batch
    parameters = [p for p in flow.parameters() if p.requires_grad]
    return _works(
        parameters,
        flow.forward_kld,
        lambda x: flow.log_prob(x, None),
        lambda: flow.sample(settings.batch),
        settings,
    )


def saved_bytes(contender: Contender) -> int:
    """Count the memory that a training step holds for its backward pass, parameters included."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        contender["train"]()
    return sum(storages.values())


def _ours(flow: nn.Module, density, compiled: bool, settings: Settings) -> Contender:
    compile = torch.compile if compiled else (lambda function: function)
    return _works(
        list(flow.parameters()),
        compile(lambda x: -density.log_prob(x).mean()),
        compile(density.log_prob),
        compile(lambda: density.sample((settings.batch,))),
        settings,
    )


def _works(parameters, loss, log_prob, sample, settings: Settings) -> Contender:
    x = torch.randn(settings.batch, *settings.shape)

    def without_gradients(function, *args):
        with torch.no_grad():
            return function(*args)

    return {
        "train": lambda: torch.autograd.grad(loss(x), parameters),
        "log_prob": lambda: without_gradients(log_prob, x),
        "sample": lambda: without_gradients(sample),
    }


class _ContextFree(nn.Module):
    """A conditioner as nflows calls it."""

    def __init__(self, inputs: int, settings: VectorSettings) -> None:
        super().__init__()
        self.network = _mlp(inputs, settings)

    def forward(self, x: Tensor, context: None) -> Tensor:
        return self.network(x)


def _networks_alone(chained, networks: nn.Module, start: Tensor) -> Contender:
    def forward() -> Tensor:
        with torch.no_grad():
            return chained(start)

    parameters = list(networks.parameters())
    return {
        "train": lambda: torch.autograd.grad(chained(start).sum(), parameters),
        "log_prob": forward,
        "sample": forward,
    }


def _convolutions(inputs: int, outputs: int, settings: ImageSettings) -> nn.Sequential:
    width = settings.channels
    return nn.Sequential(
        nn.Conv2d(inputs, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 1),
        nn.ReLU(),
        nn.Conv2d(width, outputs, 3, padding=1),
    )


def _mlp(inputs: int, settings: VectorSettings) -> nn.Sequential:
    widths = [inputs, *settings.hidden, 2 * inputs]
    layers: list[nn.Module] = []
    for i, o in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
