"""What `fit` owes to PyTorch: its loaders, modes, devices, random numbers and compiler."""

import copy
import os
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from pyroflows import DenseNet, fit, flow_distribution, glow, realnvp

# Far enough from the base that a few steps help.
X = 2.0 * torch.randn(96, 2, generator=torch.Generator().manual_seed(0)) + 2.0
QUICK = {"steps": 9, "progress": False, "batch_size": 32, "learning_rate": 1e-2}


def flow(seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return realnvp(2, **{"layers": 2, "hidden": (8,), **options})


def parameters(flow):
    return torch.nn.utils.parameters_to_vector(flow.parameters()).detach().clone()


def same(one, other):
    assert np.array_equal(one.losses, other.losses)
    assert np.array_equal(one.validation_losses, other.validation_losses)
    assert torch.equal(parameters(one.flow), parameters(other.flow))


def working(workers):
    """Options of a DataLoader. JAX, which other tests have loaded, cannot be forked."""
    return {"num_workers": workers, "multiprocessing_context": "forkserver" if workers else None}


MADE = {
    "realnvp": lambda: realnvp(4, layers=2, hidden=(8,)),
    "glow": lambda: glow(4, layers=2, hidden=(8,)),
    "images": lambda: glow((1, 4, 4), levels=2, steps=2, channels=8),
}


@pytest.mark.parametrize("name", MADE)
def test_steps_are_those_of_plain_adam(name):
    """Whatever the memory layout of the gradients, which convolutions choose by themselves."""
    torch.manual_seed(0)
    one = MADE[name]()
    other = copy.deepcopy(one)
    x = torch.randn(96, *one.event_shape)
    ours = fit(one, x, **QUICK)
    theirs = fit(other, x, optimizer=lambda p: torch.optim.Adam(p, 1e-2, foreach=False), **QUICK)
    assert np.allclose(ours.losses, theirs.losses, rtol=1e-3)
    assert torch.allclose(parameters(one), parameters(other), rtol=1e-2, atol=1e-3)


class WithDropout(torch.nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.inner = DenseNet(n_in, n_out, (8,), init_scale=0.1)

    def forward(self, x):
        return self.inner(torch.nn.functional.dropout(x, 0.5, self.training))


def test_training_is_in_place():
    one = flow()
    before = parameters(one)
    result = fit(one, X, **QUICK)
    assert result.flow is one
    assert not torch.equal(before, parameters(one))
    assert all(p.grad is None and p.requires_grad for p in one.parameters())


def test_global_random_numbers_are_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    fit(flow(network=WithDropout), DataLoader(X, batch_size=32, shuffle=True), **QUICK)
    with pytest.raises(ValueError, match="`steps`"):
        fit(flow(), X, steps=0)
    assert torch.equal(torch.rand(4), expected)


def test_dropout_and_loaders_are_reproducible():
    results = []
    for other in (1, 2):
        torch.manual_seed(other)
        loader = DataLoader(X, batch_size=32, shuffle=True)
        results.append(fit(flow(network=WithDropout), loader, validation=X, **QUICK))
    same(*results)
    assert not np.array_equal(*results[0].losses.reshape(3, 3)[:2])


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_shuffling_loader_resumes(tmp_path, workers):
    """At the end of its last pass of three steps, with PyTorch's global random numbers of then."""
    taken = []

    def run(path, cut=None):
        def schedule(step):
            taken.append(step)
            if step == cut:
                raise KeyboardInterrupt
            return 1.0

        loader = DataLoader(X, batch_size=32, shuffle=True, **working(workers))
        options = {**QUICK, "validation": X, "validate_every": 2, "schedule": schedule}
        return fit(flow(network=WithDropout), loader, checkpoint=path, **options)

    whole = run(None)
    assert run(tmp_path / "run", cut=5).stopped == "interrupted"
    assert (tmp_path / "run").exists()
    torch.manual_seed(99)
    taken.clear()
    same(run(tmp_path / "run"), whole)
    assert taken == [3, 4, 5, 6, 7, 8]


@pytest.mark.slow
def test_a_loader_with_lasting_workers():
    lasting = DataLoader(X, batch_size=32, persistent_workers=True, **working(1))
    result = fit(flow(), lasting, **QUICK)
    assert result.stopped == "steps"
    same(result, fit(flow(), DataLoader(X, batch_size=32), **QUICK))


def test_arrays_that_torch_does_not_know():
    plain = fit(flow(), X, standardize=True, **QUICK)
    for x in (X.numpy().astype(np.longdouble), X.numpy()[::-1].copy()[::-1]):
        same(fit(flow(), x, standardize=True, **QUICK), plain)


def test_datasets_of_pairs():
    context = X[:, :1] + 1.0
    rows = TensorDataset(X, context)
    one = fit(flow(context_dim=1), rows, **QUICK)
    same(one, fit(flow(context_dim=1), X, context=context, **QUICK))
    loader = DataLoader(rows, batch_size=32)
    assert len(fit(flow(context_dim=1), loader, validation=rows, **QUICK).validation_losses) == 4


def test_a_stream_of_rows_is_explained():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(X)

    with pytest.raises(ValueError, match="DataLoader"):
        fit(flow(), Stream(), **QUICK)
    assert len(fit(flow(), DataLoader(Stream(), batch_size=32), **QUICK).losses) == 9


def test_modes_are_restored():
    one = flow(network=WithDropout)
    one.eval()
    coupling = next(m for m in one.modules() if isinstance(m, WithDropout))
    coupling.train()
    modes = [m.training for m in one.modules()]
    fit(one, X, **QUICK)
    assert [m.training for m in one.modules()] == modes
    with pytest.raises(ValueError, match="NaN"):
        fit(one, [X, X * torch.nan], **QUICK)
    assert [m.training for m in one.modules()] == modes


def test_validation_is_without_dropout():
    one = flow(network=WithDropout)
    result = fit(one, X, **{**QUICK, "validation": X, "steps": 3})
    one.eval()
    expected = -flow_distribution(one).log_prob(X).mean().item()
    assert result.validation_losses[-1] == pytest.approx(expected, rel=1e-5)


def test_frozen_parameters_stay():
    one = flow()
    first = next(one.parameters())
    first.requires_grad_(False)
    before, rest = first.clone(), parameters(one)
    fit(one, X, **QUICK)
    assert torch.equal(first, before)
    assert not torch.equal(parameters(one), rest)
    for parameter in one.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameters"):
        fit(one, X, **QUICK)


def test_a_fitted_flow_is_copied_and_pickled():
    result = fit(flow(batch_norm=True), X, validation=None, **QUICK)
    for twin in (copy.deepcopy(result.flow), pickle.loads(pickle.dumps(result.flow))):
        same_numbers = flow_distribution(twin).log_prob(X)
        assert torch.equal(same_numbers, flow_distribution(result.flow).log_prob(X))


def test_under_no_grad():
    with torch.no_grad():
        result = fit(flow(), X, **QUICK)
    same(result, fit(flow(), X, **QUICK))


def test_double_precision():
    result = fit(flow().double(), X.numpy(), **QUICK)
    assert parameters(result.flow).dtype == torch.float64
    single = fit(flow(), X, **QUICK)
    assert not np.array_equal(result.losses, single.losses)
    np.testing.assert_allclose(result.losses, single.losses, rtol=1e-5)


def test_an_optimiser_that_is_made_already():
    one = flow()
    made = torch.optim.SGD(one.parameters(), lr=0.1)
    with pytest.raises(
        TypeError, match="^`optimizer` is of type SGD, expected a function of the p"
    ):
        fit(one, X, optimizer=made, **QUICK)


def test_an_error_on_the_way():
    """What has been learned so far stays, with the base that it was learned for."""

    def schedule(step):
        if step == 7:
            raise RuntimeError("on the way")
        return 1.0

    one = flow()
    with pytest.raises(RuntimeError, match="on the way"):
        fit(one, X, base="logistic", schedule=schedule, validate_every=3, **QUICK)
    best = fit(flow(), X, base="logistic", validate_every=3, **{**QUICK, "steps": 6})
    assert best.best_step == 6
    assert torch.equal(parameters(one), parameters(best.flow))
    assert one.base == "logistic"
    assert one.training


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_no_code_from_a_checkpoint_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": "pyroflows fit 1", "settings": Evil()}, "run")
    with pytest.raises(ValueError, match="cannot be read: it is damaged, or `fit` has not"):
        fit(flow(), X, checkpoint="run", **QUICK)
    assert not os.path.exists("executed")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("options", [{}, {"batch_norm": True}, {"context_dim": 1}], ids=str)
def test_compiled(options):
    # Adam would blow up the rounding of gradients that are zero by symmetry.
    given = {**QUICK, "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=1e-2)}
    given["context"] = X[:, :1] if "context_dim" in options else None
    plain = fit(flow(**options), X, **given)
    compiled = fit(flow(**options), X, compile=True, **given)
    np.testing.assert_allclose(compiled.losses, plain.losses, rtol=1e-5)


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    def noisy(x, generator):
        return x + 0.01 * torch.rand(x.shape, generator=generator, device=x.device)

    def run(path, cut=None):
        def schedule(step):
            if step == cut:
                raise KeyboardInterrupt
            return 1.0

        return fit(
            flow(batch_norm=True, network=WithDropout).cuda(),
            X,
            **QUICK,
            augment=noisy,
            standardize=True,
            validate_every=2,
            schedule=schedule,
            checkpoint=path,
        )

    torch.cuda.manual_seed(1)
    state = torch.cuda.get_rng_state()
    whole = run(None)
    assert parameters(whole.flow).is_cuda
    run(tmp_path / "run", cut=5)
    resumed = run(tmp_path / "run")
    np.testing.assert_allclose(resumed.losses, whole.losses, rtol=1e-5)
    assert torch.equal(torch.cuda.get_rng_state(), state)
