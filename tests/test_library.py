"""dldr in a stranger's project. Oracles: the plain network, scipy, scikit-learn, closed forms."""

import copy
import io
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from torch import nn
from torch.func import functional_call, hessian
from torch.utils.checkpoint import checkpoint

import dldr

ROOT = Path(__file__).parent.parent


class Net(nn.Module):
    """A convolution and BatchNorm in a block that may be checkpointed, and a recurrent layer."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh())
        self.recurrent = nn.LSTM(4, 5, batch_first=True)
        self.head = nn.Linear(5, 3)
        self.reentrant = reentrant

    def forward(self, images):
        hidden = self.stem(images)
        if self.reentrant is None:
            hidden = self.block(hidden)
        else:
            hidden = checkpoint(self.block, hidden, use_reentrant=self.reentrant)
        return self.head(self.recurrent(hidden.flatten(2).mT)[0][:, -1])

    def embed(self):
        """Something that is not the forward pass."""
        return self.head.weight.sum()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(reentrant=None, k=3, dtype=torch.float32):
    """A subspace of Net, away from its origin."""
    torch.manual_seed(1)
    network = Net(reentrant)
    n = dldr.flatten(network).numel()
    basis = torch.linalg.qr(torch.randn(n, k))[0].T.contiguous()
    subspace = dldr.Subspace(network, basis.to(dtype))
    subspace.coordinates.data = torch.linspace(-0.5, 0.7, k)
    return subspace


def batch():
    torch.manual_seed(2)
    return torch.randn(6, 3, 4, 4), torch.randint(3, (6,))


def gradient(subspace):
    images, labels = batch()
    subspace.coordinates.grad = None
    F.cross_entropy(subspace(images), labels).backward()
    return subspace.coordinates.grad


def expected_gradient():
    """∂L/∂z by torch.func.functional_call on the plain network, without a Subspace."""
    subspace = make()
    z = subspace.coordinates.detach().requires_grad_()
    network, (images, labels) = Net(), batch()
    network.load_state_dict(subspace.model.state_dict())
    theta = dldr.flatten(network) + z @ subspace.basis
    parts = theta.split([p.numel() for p in network.parameters()])
    named = zip(network.named_parameters(), parts, strict=True)
    values = {name: part.view(p.shape) for (name, p), part in named}
    F.cross_entropy(functional_call(network, values, (images,)), labels).backward()
    return z.grad


def test_the_gradient_is_that_of_the_plain_network():
    """Oracle: torch.func.functional_call, equal to the bit; recurrent layers included."""
    assert torch.equal(gradient(make()), expected_gradient())


def test_a_checkpointed_block_sees_theta_in_the_backward_pass():
    """Oracle: the plain network without checkpointing."""
    assert torch.equal(gradient(make(reentrant=False)), expected_gradient())


def test_reentrant_checkpointing_is_refused():
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        gradient(make(reentrant=True))


def saved_whole(subspace):
    stream = io.BytesIO()
    torch.save(subspace, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


def averaged(subspace):
    model = torch.optim.swa_utils.AveragedModel(subspace)
    model.update_parameters(subspace)
    return model


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s)), saved_whole, averaged],
    ids=["deepcopy", "pickle", "torch.save", "AveragedModel"],
)
def test_a_copy_made_after_a_forward_pass_is_the_same_network(copied):
    subspace = make()
    gradient(subspace)
    other = copied(subspace).eval()
    images, _ = batch()
    assert torch.equal(other(images), subspace.eval()(images))


def test_a_copy_of_a_network_that_copies_itself_is_a_subspace():
    """A traced network has a __deepcopy__ of its own."""
    subspace = dldr.Subspace(torch.fx.symbolic_trace(nn.Linear(3, 2)), torch.eye(2, 8))
    other, inputs = copy.deepcopy(subspace), torch.randn(4, 3)
    other.coordinates.data += 1
    assert type(other) is dldr.Subspace
    assert not torch.equal(other(inputs), subspace(inputs))


def test_a_second_subspace_of_a_network_begins_at_its_parameters():
    """Oracle: the plain network. The first one has moved all parameters, the second has some."""
    network, inputs = nn.Sequential(nn.Linear(3, 4), nn.LSTM(4, 2)), torch.randn(5, 3)
    plain = copy.deepcopy(network)
    first = dldr.Subspace(network, torch.ones(1, dldr.flatten(network).numel()))
    first.coordinates.data += 1
    first(inputs)
    network[1].requires_grad_(True)
    second = dldr.Subspace(network, torch.eye(2, dldr.flatten(network).numel()))
    assert torch.equal(second(inputs)[0], plain(inputs)[0])


def test_a_compiled_subspace_has_the_same_gradient():
    """Oracle: the subspace that is not compiled; the whole forward pass is one graph."""
    torch.compiler.reset()  # what other tests compiled counts towards torch's limit
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    basis = torch.linalg.qr(torch.randn(43, 3))[0].T.contiguous()
    subspace, inputs = dldr.Subspace(network, basis), torch.randn(6, 4)
    subspace(inputs).square().sum().backward()
    expected = subspace.coordinates.grad.clone()
    compiled = torch.compile(copy.deepcopy(subspace), backend="aot_eager", fullgraph=True)
    compiled.coordinates.grad = None
    for _ in range(2):  # the second pass finds θ(z) in place
        compiled.coordinates.grad = None
        compiled(inputs).square().sum().backward()
    torch.testing.assert_close(compiled.coordinates.grad, expected)


def test_attributes_that_a_subspace_lacks_are_those_of_the_network_at_theta():
    subspace = make()
    subspace.coordinates.data += 1
    torch.testing.assert_close(subspace.embed(), subspace.export()["head.weight"].sum())
    assert subspace.reentrant is None
    with pytest.raises(AttributeError, match="'generate'"):
        subspace.generate()


def test_a_state_dict_gives_the_same_network_or_an_error():
    subspace, images = make().eval(), batch()[0]
    other = make().eval()
    other.coordinates.data.zero_()
    other.load_state_dict(subspace.state_dict())
    assert torch.equal(other(images), subspace(images))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    other.basis = other.basis.roll(1, dims=1)
    with pytest.raises(ValueError, match="another basis"):
        other.load_state_dict(make().state_dict())
    for name in ("coordinates", "model.stem.weight"):
        assert torch.equal(other.state_dict()[name], before[name]), "nothing is loaded"


def test_a_state_dict_tells_bases_apart_at_k_1():
    """Of 300 random bases none is taken for another, but the sum of a sketch, as it was, is."""
    network = nn.Linear(50, 9)
    bases = torch.randn(300, 1, 459)
    subspaces = [dldr.Subspace(network, basis / basis.norm()) for basis in bases]
    sketches = [subspace.get_extra_state() for subspace in subspaces]
    for sketch in sketches[1:]:
        with pytest.raises(ValueError, match="another basis"):
            subspaces[0].set_extra_state(sketch)
    subspaces[0].set_extra_state(sketches[0])
    subspaces[0].set_extra_state(sketches[0].sum(1))


@pytest.mark.parametrize("convert", ["bfloat16", "half"])
def test_coordinates_stay_in_float32(convert):
    subspace = make()
    z = subspace.coordinates.detach().clone()
    getattr(subspace, convert)()
    assert torch.equal(subspace.coordinates, z)
    assert subspace.origin.dtype == torch.float32
    assert subspace.basis.dtype == torch.float32
    assert subspace.model.head.weight.dtype == getattr(torch, convert)


def test_repr_shows_k_and_n():
    assert f"k=3, n={dldr.flatten(Net()).numel()}" in repr(make())


def test_the_graph_is_looked_at_when_the_coordinates_train():
    """With z frozen there is no graph to look at, and what follows is looked at all the same."""
    subspace = dldr.Subspace(nn.Linear(3, 2), torch.eye(2, 8))
    subspace.coordinates.requires_grad_(False)
    inputs = torch.randn(4, 3, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        subspace(inputs)
    subspace.coordinates.requires_grad_()
    subspace.model.register_forward_hook(lambda layer, args, output: 2 * args[0])
    with pytest.warns(UserWarning, match="does not depend on weight, bias"):
        subspace(inputs)


def test_a_parameter_read_from_elsewhere_is_named():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.weights = [self.second.weight]

        def forward(self, inputs):
            return F.linear(self.first(inputs), self.weights[0])

    subspace = dldr.Subspace(Listed(), torch.eye(2, 40))
    with pytest.warns(UserWarning, match=r"does not depend on second.weight, second.bias"):
        subspace(torch.ones(1, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        subspace(torch.ones(1, 4))  # once
        gradient(make())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_hessian_in_the_coordinates(dtype):
    """Oracle: P H Pᵀ with the network's own Hessian H, by torch.func."""
    network = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    basis = torch.linalg.qr(torch.randn(14, 3, dtype=torch.float64))[0].T.to(dtype)
    inputs = torch.randn(5, 3, dtype=torch.float64)
    plain = copy.deepcopy(network)

    def loss(theta):
        values = dldr.unflatten(theta, plain) if not theta.requires_grad else None
        parts = theta.split([p.numel() for p in plain.parameters()])
        named = zip(plain.named_parameters(), parts, strict=True)
        values = {name: part.view(p.shape) for (name, p), part in named}
        return functional_call(plain, values, (inputs,)).square().sum()

    subspace = dldr.Subspace(network, basis)

    def restricted(z):
        return functional_call(subspace, {"coordinates": z}, (inputs,)).square().sum()

    full = hessian(loss)(dldr.flatten(plain))
    wide = subspace.basis.double()
    torch.testing.assert_close(
        hessian(restricted)(subspace.coordinates.detach()), wide @ full @ wide.T
    )


def test_release_gives_the_network_back():
    subspace, images = make().eval(), batch()[0]
    subspace.model.stem.bias.requires_grad_(False)
    expected = subspace(images)
    network = subspace.release()
    assert type(network) is Net
    assert all(p.requires_grad for p in network.parameters())
    torch.testing.assert_close(network(images), expected)
    network(images).sum().backward()
    assert network.stem.weight.grad is not None


def test_frozen_parameters_stay_frozen_after_release():
    network = Net()
    network.stem.requires_grad_(False)
    basis = torch.eye(2, dldr.flatten(network).numel())
    network = dldr.Subspace(network, basis).release()
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in network.named_parameters() if "stem" not in name}


def test_a_network_that_merges_its_weights_in_eval_is_refused():
    class Merging(nn.Linear):  # as LoRA layers of loralib do
        def train(self, mode=True):
            self.weight.data += -1 if mode else 1
            return super().train(mode)

    network = nn.Sequential(Merging(2, 2))
    before = network[0].weight.clone()
    with pytest.raises(ValueError, match=r"0.weight changes with train\(\) and eval\(\)"):
        dldr.Subspace(network, torch.eye(1, 6))
    torch.testing.assert_close(network[0].weight, before)


def test_an_extra_state_that_is_no_tensor_is_exported():
    class Counting(nn.Linear):
        def get_extra_state(self):
            return {"calls": 3}

        def set_extra_state(self, state):
            assert state == {"calls": 3}

    subspace = dldr.Subspace(Counting(2, 2), torch.eye(1, 6))
    Counting(2, 2).load_state_dict(subspace.export())


def test_state_dicts_that_are_copies_are_exported():
    """Oracle: the forward pass."""

    def hook(module, state, prefix, metadata):
        for name in list(state):
            state[name] = state[name].clone()

    network, inputs = nn.Linear(3, 2), torch.randn(4, 3)
    network._register_state_dict_hook(hook)
    subspace = dldr.Subspace(network, torch.eye(2, 8))
    subspace.coordinates.data += 1
    plain = nn.Linear(3, 2)
    plain.load_state_dict(subspace.export())
    assert torch.equal(plain(inputs), subspace(inputs))


def test_a_scripted_network_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="scripted"):
        dldr.Subspace(network, torch.eye(1, 6))
    dldr.load_vector(torch.arange(6.0), network)
    assert torch.equal(dldr.flatten(network), torch.arange(6.0))


# ------------------------------------------------------------------------------- P-BFGS


class Traces(nn.Module):
    """Leaves a trace of each forward pass: in a buffer set anew, in a frozen teacher."""

    def __init__(self):
        super().__init__()
        self.layer, self.teacher = nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("ones", torch.ones(1).expand(3))
        self.register_buffer("first", None)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, inputs):
        self.mean = 0.9 * self.mean + 0.1 * inputs.mean(0).detach()
        self.count += 1
        self.first = inputs if self.first is None and self.count > 1 else self.first
        self.teacher.weight.data.mul_(0.9).add_(self.layer.weight.detach(), alpha=0.1)
        return self.norm(self.layer(inputs - self.mean) + self.teacher(inputs))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_trial_leaves_no_trace(wrapped):
    """Oracle: the network as it was, to the bit."""
    network = Traces()
    model = (
        dldr.Subspace(network, torch.eye(2, dldr.flatten(network).numel())) if wrapped else network
    )
    model(torch.randn(4, 3))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    buffer = network.mean
    with dldr.frozen_buffers(network):
        model(torch.randn(4, 3))
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert network.mean is buffer
    assert network.first is None


def test_all_trials_of_a_step_draw_the_same_dropout():
    """Oracle: a seed in the closure; without one a loss is compared with another network's."""

    def trials(seeded):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        subspace = dldr.Subspace(network, torch.linalg.qr(torch.randn(81, 4))[0].T)
        optimizer = dldr.PBFGS([subspace.coordinates])
        inputs, rejected = torch.randn(32, 8), []
        for step in range(20):

            def evaluate(seed=step):
                if seeded:
                    torch.manual_seed(seed)
                with torch.no_grad(), dldr.frozen_buffers(subspace):
                    return (subspace(inputs) - 1).square().mean()

            torch.manual_seed(step)
            optimizer.zero_grad()
            state = torch.get_rng_state()
            (subspace(inputs) - 1).square().mean().backward()
            torch.set_rng_state(state)
            rejected.append(optimizer.step(evaluate))
        return rejected

    assert trials(seeded=False) == trials(seeded=True)


# ------------------------------------------------------------------------------- snapshots


def test_an_average_keeps_what_has_no_mean():
    """Oracle: numpy in complex128; whole numbers and booleans are those of the last snapshot."""
    snapshots = [
        {
            "complex": torch.tensor([1 + 2j * i]),
            "count": torch.tensor(2**60 + i),
            "on": torch.tensor(i > 0),
            "_extra_state": {"calls": i},
        }
        for i in range(3)
    ]
    mean = dldr.average(snapshots)
    assert mean["complex"].tolist() == [1 + 2j]
    assert mean["count"] == 2**60 + 2
    assert mean["on"]
    assert mean["_extra_state"] == {"calls": 2}


def states(count=5):
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    found = []
    for _ in range(count):
        for parameter in network.parameters():
            parameter.data += torch.randn(parameter.shape)
        found.append({name: value.clone() for name, value in network.state_dict().items()})
    return network, found


def test_the_order_of_a_file_does_not_matter():
    """Oracle: the vectors that `flatten` makes."""
    network, snapshots = states()
    vectors = []
    for snapshot in snapshots:
        network.load_state_dict(snapshot)
        vectors.append(dldr.flatten(network))
    by_name = [dict(sorted(snapshot.items(), reverse=True)) for snapshot in snapshots]
    expected, _ = dldr.pca(vectors, 3)
    for choice in ({"model": network}, {"names": list(dldr.trainable(network))}):
        assert torch.equal(dldr.pca(by_name, 3, **choice)[0], expected)
    with pytest.raises(ValueError, match="model="):
        dldr.pca(by_name, 3)


def test_names_that_a_snapshot_lacks_are_named():
    network, snapshots = states()
    snapshots[2] = {f"base.{name}": value for name, value in snapshots[2].items()}
    with pytest.raises(ValueError, match=r"snapshot 2 lacks 0.weight and 5 more; it holds base.0"):
        dldr.pca(snapshots, 2, model=network)


def test_snapshots_that_are_not_copies_are_noticed():
    network = nn.Linear(3, 2)
    snapshots = [network.state_dict() for _ in range(3)]
    with pytest.raises(ValueError, match="snapshot 1 and snapshot 0 share their memory"):
        dldr.pca(snapshots, 1, model=network)


def test_the_spectrum_is_that_of_the_exact_pca():
    """Oracle: scikit-learn's full solver."""
    vectors = torch.randn(9, 50, dtype=torch.float64).cumsum(0)
    expected = PCA(svd_solver="full").fit(vectors.numpy()).explained_variance_ratio_[:8]
    vectors.requires_grad_()  # as those of torch.nn.utils.parameters_to_vector
    np.testing.assert_allclose(dldr.spectrum(vectors), expected, rtol=1e-6)


def test_the_spectrum_of_a_random_walk():
    """Oracles: the cosine transform's eigenvalues (steps of equal length), and a walk drawn."""
    t = np.arange(1, 81)
    closed = 1 / (2 - 2 * np.cos(np.pi * t / 81))
    equal = dldr.random_walk_spectrum(torch.ones(80))
    np.testing.assert_allclose(equal, closed / closed.sum(), rtol=1e-9)
    steps = torch.linspace(3, 1, 20, dtype=torch.float64)
    drawn = torch.randn(20, 200_000, dtype=torch.float64) * steps[:, None]
    walk = torch.cat([torch.zeros(1, 200_000, dtype=torch.float64), drawn.cumsum(0)])
    torch.testing.assert_close(
        dldr.spectrum(walk), dldr.random_walk_spectrum(steps), rtol=0.05, atol=1e-4
    )


def test_principal_angles():
    """Oracle: scipy.linalg.subspace_angles."""
    one, other = torch.randn(3, 20, dtype=torch.float64), torch.randn(4, 20, dtype=torch.float64)
    other[0] = one[1] + 1e-3 * other[0]
    expected = np.sort(scipy.linalg.subspace_angles(one.T.numpy(), other.T.numpy()))
    np.testing.assert_allclose(dldr.principal_angles(one, other), expected, atol=1e-7)


def test_a_landscape_is_the_loss_of_the_network_at_each_point():
    """Oracle: load_vector at each point."""
    subspace, (images, labels) = make().eval(), batch()
    points = torch.randn(4, 3)
    z = subspace.coordinates.detach().clone()
    losses = dldr.landscape(lambda: F.cross_entropy(subspace(images), labels), subspace, points)
    assert torch.equal(subspace.coordinates, z)
    network = copy.deepcopy(subspace).release()
    for point, loss in zip(points, losses, strict=True):
        dldr.load_vector(subspace.origin + point @ subspace.basis, network)
        torch.testing.assert_close(loss, F.cross_entropy(network(images), labels))
    with pytest.raises(ValueError, match=r"\(P, 3\)"):
        dldr.landscape(lambda: None, subspace, torch.zeros(3))


# ------------------------------------------------------------------------------- the package


def test_the_library_stands_alone():
    """It imports nothing of the scripts, no argparse and no torchvision of its own accord."""
    code = "import sys, torch; old = {*sys.modules}; import dldr; print(*{*sys.modules} - old)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "dldr" in loaded
    assert not loaded & {"training", "reporting", "models", "utils", "argparse", "torchvision"}


def test_the_scripts_hand_on_the_same_objects():
    import models
    import train_pbfgs
    import utils

    assert utils.flatten is dldr.flatten
    assert utils.unflatten is dldr.unflatten
    assert utils.pca is dldr.pca
    assert models.Subspace is dldr.Subspace
    assert train_pbfgs.PBFGS is dldr.PBFGS
