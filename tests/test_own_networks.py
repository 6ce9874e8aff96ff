"""Networks and tasks that are not ours. Oracles: what they reach, and a random plane beside it."""

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
from basis import random_basis

MODULE = """
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


@pytest.mark.parametrize("name", ["small", "patches"])
def test_a_network_of_a_module_goes_through_the_chain(name, module, tmp_path, capsys):
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
        ("few", "gives (2, 9) for two images, not (2, 10) numbers"),
        ("rows", "gives (2, 8, 6, 6) for two images"),
        ("pair", "gives tuple for two images"),
        ("fails", "not for training"),
    ],
)
def test_a_network_that_cannot_be_trained_here_is_refused(name, message, module, tmp_path, refused):
    arch = f"{module}:{name}"
    line = refused(train_sgd.main, [*DIGITS, "--arch", arch, "--save-dir", tmp_path / "run"])
    assert f"--arch {arch}: " in line
    assert message in line
    assert not (tmp_path / "run").exists()


def test_batches_of_one_image_are_refused_though_many_make_a_step(module, tmp_path, refused):
    options = [*DIGITS, "--arch", f"{module}:flat", "--epochs", "2", "--save-dir", str(tmp_path)]
    train_sgd.main(options)
    single = ["--batch-size", "1", "--accumulate", "4", "--n_components", "2", "--params_end", "3"]
    line = refused(train_pbfgs.main, [*options, *single])
    assert "--batch-size 1: a batch of one image" in line
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


def test_a_transformer_learns_a_task_on_tokens_in_its_plane():
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
    planes = {
        "samples": utils.pca(samples, 5)[0],
        "random": random_basis(5, n, 1, torch.float32, "cpu"),
    }
    for name, basis in planes.items():
        network.load_state_dict(utils.unflatten(samples[0], network))
        subspace = models.Subspace(network, basis)
        fit(subspace, [subspace.coordinates], 0.3, 150)
        found[name] = accuracy(subspace)
        network.requires_grad_(True)
    assert found["samples"] > 0.8
    assert found["random"] < 0.5
