"""Networks and tasks that are not ours. Oracles: what they reach, and a random subspace."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import DIGITS
from torch import nn

import models
import report
import train_pbfgs
import train_psgd
import train_sgd
import utils
from dldr.trajectory import load_state_dict
from training.subspaces import random_basis

MODULE = """
import torch
from torch import nn

def small(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, num_classes)
    )

def patches(num_classes):
    import timm
    return timm.create_model("vit_tiny_patch16_224", img_size=8, patch_size=2, depth=2,
                             num_classes=num_classes)

def flat(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(192, num_classes), nn.BatchNorm1d(num_classes))

def few(num_classes):
    return small(num_classes - 1)

def rows(num_classes):
    return small(num_classes)[:-2]

def tuned(num_classes):
    network = small(num_classes)
    network[0].requires_grad_(False)
    return network

def lazy(num_classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))

def frozen(num_classes):
    return small(num_classes).requires_grad_(False)

def none(num_classes):
    return nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(num_classes))

class spectrum(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(192, num_classes, dtype=torch.complex64))

    def forward(self, images):
        return (images.flatten(1).to(torch.complex64) @ self.weight).abs()

class pair(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.network = small(num_classes)

    def forward(self, images):
        output = self.network(images)
        return (output, output) if self.training else output

class fails(pair):
    def forward(self, images):
        assert not self.training, "not for training"
        return self.network(images)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module called mine that can be imported, as with PYTHONPATH."""
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return "mine"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small", "patches"])
def test_a_network_of_a_module_goes_through_the_chain(name, module, tmp_path, capsys, undrawn):
    if name == "patches":
        pytest.importorskip("timm")
    save_dir = str(tmp_path / "run")
    options = [*DIGITS, "--arch", f"{module}:{name}", "--save-dir", save_dir, "--epochs", "5"]
    train_sgd.main([*options, "--optimizer", "adam"])
    subspace = [*options, "--params_end", "6", "--n_components", "4"]
    least = 50 if name == "small" else 10  # some thirty steps are few for a transformer
    assert train_psgd.main([*subspace, "--lr", "0.1"])["test_acc"] > least
    assert train_pbfgs.main(subspace)["test_acc"] > least
    out = ["--out", str(tmp_path / "out")]
    assert report.main([save_dir, *out])[0]["train"] == [None]
    assert "its network is mine:" in capsys.readouterr().err
    assert len(report.main([save_dir, *out, "--no-data"])) == 3
    if name == "small":
        rows = report.main([save_dir, *out, "--arch", f"{module}:{name}"])
        assert rows[0]["train"][0] > least


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("few", "gives (2, 9) for two images of 8 × 8, not (2, 10) numbers"),
        ("rows", "gives (2, 8, 6, 6) for two images"),
        ("pair", "gives tuple for two images"),
        ("fails", "not for training"),
        ("lazy", "1.weight is lazy; give its module a size"),
        ("frozen", "has no parameters to train"),
        ("none", "has no parameters to train"),
        ("spectrum", "weight is complex; allowed: real numbers"),
    ],
)
def test_a_network_that_cannot_be_trained_here_is_refused(name, message, module, tmp_path, refused):
    arch = f"{module}:{name}"
    line = refused(train_sgd.main, [*DIGITS, "--arch", arch, "--save-dir", tmp_path / "run"])
    assert f"--arch {arch}: " in line
    assert message in line
    assert not (tmp_path / "run").exists()


def test_n_counts_what_is_trained(module, tmp_path):
    """Oracle: the sizes of the layers; the first one is frozen."""
    options = [*DIGITS, "--arch", f"{module}:tuned", "--save-dir", str(tmp_path), "--epochs", "1"]
    train_sgd.main(options)
    train_psgd.main(options)
    for name in ("config.json", "psgd/config.json"):
        assert json.loads((tmp_path / name).read_text())["n"] == 2 * 8 + 288 * 10 + 10


def test_batches_of_one_image_are_refused_though_many_make_a_step(module, tmp_path, refused):
    options = [*DIGITS, "--arch", f"{module}:flat", "--epochs", "2", "--save-dir", str(tmp_path)]
    train_sgd.main(options)
    single = ["--batch-size", "1", "--accumulate", "4", "--n_components", "2", "--params_end", "3"]
    line = refused(train_pbfgs.main, [*options, *single])
    assert "cannot take a batch of one image, --batch-size 1: " in line
    assert train_pbfgs.main([*options, *single[2:]])["epoch"] == 2


class Reader(nn.Module):
    """A small transformer that says how a row of tokens is to be labelled."""

    def __init__(self, tokens: int = 8, length: int = 12, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.position = nn.Parameter(0.1 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(width, tokens)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embedding(tokens) + self.position).mean(1))


@pytest.mark.slow
def test_a_transformer_learns_a_task_on_tokens_in_its_subspace():
    """The label of a row of tokens is its commonest token; chance is one in eight."""
    torch.manual_seed(0)
    common = torch.randint(8, (1000, 1))
    rows = torch.where(torch.rand(1000, 12) < 0.4, common, torch.randint(8, (1000, 12)))
    train, test = rows[:800], rows[800:]
    labels = common[:, 0]

    def fit(module, parameters, lr, steps):
        optimizer = torch.optim.Adam(parameters, lr)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(module(train), labels[:800]).backward()
            optimizer.step()

    def accuracy(module):
        with torch.no_grad():
            return (module(test).argmax(1) == labels[800:]).float().mean()

    network = Reader()
    samples = [utils.flatten(network)]
    for _ in range(15):
        fit(network, network.parameters(), 0.01, 10)
        samples.append(utils.flatten(network))
    found, n = {}, len(samples[0])
    bases = {
        "samples": utils.pca(samples, 5)[0],
        "random": random_basis(5, n, 1, torch.float32, "cpu"),
    }
    for name, basis in bases.items():
        utils.load_vector(samples[0], network)
        subspace = models.Subspace(network, basis)
        fit(subspace, [subspace.coordinates], 0.3, 150)
        found[name] = accuracy(subspace)
        network.requires_grad_(True)
    assert found["samples"] > 0.8
    assert found["random"] < 0.5


class Tied(nn.Module):
    """Weights used twice, before a layer with some of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.last.weight = self.first.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.last(self.middle(self.first(inputs).tanh()).tanh())


class Indexed(nn.Linear):
    """A buffer of integers, as Swin's relative_position_index."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.register_buffer("order", torch.arange(8).flip(0))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs[:, self.order])


def partly_frozen() -> nn.Module:
    network = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    network[0].requires_grad_(False)
    return network


OWN = {
    "batchnorm": lambda: nn.Sequential(nn.Linear(8, 9), nn.BatchNorm1d(9), nn.Linear(9, 8)),
    "tied": Tied,
    "integers": Indexed,
    "spectral": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)),
    "frozen": partly_frozen,
}


@pytest.mark.parametrize("name", OWN)
def test_one_loop_works_for_any_module(name, tmp_path):
    """Oracles: the samples, the vectors' PCA, and what the network gives in the subspace."""
    torch.manual_seed(0)
    network, inputs = OWN[name](), torch.randn(64, 8)
    target = inputs.roll(1, 1).sin()

    def fit(module, parameters, steps):
        optimizer = torch.optim.SGD(parameters, 0.1, 0.9)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = F.mse_loss(module(inputs), target)
            loss.backward()
            optimizer.step()
        return loss

    samples, states = [], []
    for _ in range(6):
        samples.append(utils.flatten(network))
        torch.save(network.state_dict(), tmp_path / f"{len(states)}.pt")
        states.append(load_state_dict(tmp_path / f"{len(states)}.pt"))
        end = fit(network, [p for p in network.parameters() if p.requires_grad], 3)
    basis, ratios = utils.pca(samples, 4)
    for options in ({"model": network}, {"names": utils.trainable(network)}):
        for own, oracle in zip(utils.pca(states, 4, **options), (basis, ratios), strict=True):
            torch.testing.assert_close(own, oracle)

    utils.load_vector(samples[0], network)
    assert torch.equal(utils.flatten(network), samples[0])
    start = F.mse_loss(network(inputs), target)
    subspace = models.Subspace(network, basis)
    assert fit(subspace, [subspace.coordinates], 60) < (start + end) / 2
    trained = subspace.eval()(inputs)
    network.load_state_dict(subspace.export())
    torch.testing.assert_close(network.eval()(inputs), trained)
