"""Label noise and subsets as people have them. Oracles: whole numbers, and noise made by hand."""

import json
import math
import random

import numpy as np
import pytest
import torch
from conftest import DIGITS

import train_psgd
import train_sgd
import utils
from dldr import PBFGS
from dldr.pbfgs import with_same_draws
from training.files import RunFiles
from training.subspaces import random_basis


@pytest.mark.parametrize("n", [1437, 50_000])
def test_a_share_is_exact(n):
    """Oracle: thousandths in whole numbers. Of CIFAR-10's labels, 45 of them lost one."""
    for thousandths in range(1001):
        assert utils.share(thousandths / 1000, n) == thousandths * n // 1000
    labels = torch.zeros(50, dtype=torch.long)
    kept, left = utils.subset(50, 0.58, 1)
    assert (len(kept), len(left)) == (29, 21)
    drawn = utils.corrupt_labels(labels, 0.58, 10**6, 1)  # hardly one stays 0 by chance
    assert int((drawn != labels).sum()) == 29


def test_a_random_basis_is_not_the_initialization():
    """Oracle: chance, a cosine of 1/√n. The stream of the first layer's weights was the same."""
    torch.manual_seed(3)
    initial = torch.nn.Linear(500, 20).weight.detach().flatten()
    row = random_basis(1, 10_000, 3, torch.float32, "cpu")[0]
    assert abs(torch.dot(row, initial) / initial.norm()) < 4 / math.sqrt(10_000)
    assert torch.equal(row, random_basis(1, 10_000, 3, torch.float32, "cpu")[0])


def test_metrics_are_json_whatever_a_test_gives(tmp_path):
    """Oracle: a parser that refuses NaN, which JSON does not have."""
    files = RunFiles.__new__(RunFiles)
    files.directory = tmp_path
    files.save_metrics([{"epoch": 1, "test_loss": math.nan, "test_acc": 10.0, "lr": math.inf}])
    line = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert row == {"epoch": 1, "test_loss": None, "test_acc": 10.0, "lr": None}


@pytest.mark.parametrize(("name", "folder"), [("MNIST", "MNIST/raw"), ("CIFAR100", "cifar-100-p")])
def test_where_a_dataset_is_looked_for_is_said(name, folder, tmp_path, monkeypatch, refused):
    """Oracle: torchvision's own folders. Here there is no network."""
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", None)
    (tmp_path / "data").mkdir()
    options = ["--datasets", name, "--data-dir", tmp_path / "data", "--save-dir", tmp_path / "run"]
    assert f"name the directory that has {folder}" in refused(train_sgd.main, options)


@pytest.mark.parametrize(
    "draw",
    [random.random, np.random.rand, lambda: float(torch.rand(()))],
    ids=["py", "np", "torch"],
)
def test_trials_of_a_step_draw_the_same(draw):
    """Oracle: one draw. Layers are dropped by any of the three."""
    z, draws = torch.nn.Parameter(torch.ones(2)), []

    def evaluate() -> torch.Tensor:
        draws.append(draw())
        return torch.tensor(float(len(draws)))  # never less, so all trials are made

    z.grad = torch.ones(2)
    PBFGS([z]).step(evaluate)
    assert len(draws) > 2
    assert len(set(draws)) == 1
    assert draw() not in draws


def test_trials_draw_from_the_generator_of_their_own_gpu(monkeypatch):
    """Which need not be the current one."""
    asked = []

    class Cuda:
        get_rng_state = staticmethod(lambda device: asked.append(device))
        set_rng_state = staticmethod(lambda state, device: asked.append(device))

    monkeypatch.setattr(torch, "get_device_module", lambda device: Cuda)
    with_same_draws(lambda: torch.zeros(()), torch.device("cuda:1"))()
    assert asked == [torch.device("cuda:1")] * 2


# --------------------------------------------------------------------------------- label noise

CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def test_noise_of_each_kind():
    """Oracle: the rule of each kind, on the labels that the default kind draws at this seed."""
    labels = torch.arange(1000) % 10
    drawn = utils.rng(5, "corrupt").permutation(1000)[:300]
    untouched = np.setdiff1d(np.arange(1000), drawn)

    def become(noise: str) -> np.ndarray:
        new = utils.corrupt_labels(labels, 0.3, 10, 5, noise, utils.similar_classes(CIFAR))
        assert torch.equal(new[untouched], labels[untouched])
        return new[drawn].numpy()

    old = labels[drawn].numpy()
    assert (become("pair") == (old + 1) % 10).all()
    others = become("symmetric-other")
    assert (others != old).all()
    assert {(int(a), int(b)) for a, b in zip(old, others, strict=True)} > {(0, 9), (9, 0), (3, 4)}
    # Patrini et al., 2017: truck to automobile, bird to airplane, deer to horse, cat and dog.
    assert (become("asymmetric") == np.array([0, 1, 0, 5, 7, 3, 6, 7, 8, 1])[old]).all()
    default = utils.corrupt_labels(labels, 0.3, 10, 5)
    assert torch.equal(default[drawn], torch.from_numpy(become("symmetric")))


def digits_labels() -> torch.Tensor:
    """The true training labels."""
    from sklearn.datasets import load_digits

    order = np.random.default_rng(0).permutation(1797)[:1437]
    return torch.from_numpy(load_digits().target[order])


@pytest.fixture
def label_file(tmp_path):
    """Write labels of which each twentieth is wrong, in a form; returns the option and these."""

    def make(form: str) -> tuple[str, torch.Tensor]:
        clean = digits_labels()
        wrong = clean.clone()
        wrong[::20] = (wrong[::20] + 3) % 10
        if form == "npy":
            np.save(tmp_path / "labels.npy", wrong.numpy().astype(np.uint16))
        elif form == "pt":
            torch.save(wrong, tmp_path / "labels.pt")
        else:  # as CIFAR-10N has them
            held = {"clean_label": clean.numpy(), "worse_label": wrong.numpy()}
            torch.save(held, tmp_path / "labels.pt")
        return str(tmp_path / f"labels.{form}"), wrong

    return make


@pytest.mark.parametrize("form", ["npy", "pt", "pt:worse_label"])
def test_labels_from_a_file_reach_all_runs(form, label_file, tmp_path, monkeypatch, capsys):
    """Oracle: the file; 72 of 1,437 labels are wrong in it."""
    noise, wrong = label_file(form)
    monkeypatch.chdir(tmp_path)
    options = [*DIGITS, "--save-dir", "run", "--epochs", "2"]
    train_sgd.main([*options, "--noise", noise.removeprefix(f"{tmp_path}/")])
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["arguments"]["noise"] == noise
    assert config["wrong_labels"] == 72
    assert "72 wrong" in capsys.readouterr().out
    given = train_sgd.get_options().parse_args([*options, "--noise", noise])
    given.channels_last, given.device, given.image_size = False, "cpu", 8
    assert torch.equal(utils.load_data(given).train.labels, wrong)
    given.smalldatasets = 0.3
    kept, _ = utils.subset(1437, 0.3, 1)
    assert torch.equal(utils.load_data(given).train.labels, wrong[kept])
    train_psgd.main([*options, "--n_components", "1"])  # it takes them from the trajectory
    psgd = json.loads((tmp_path / "run/psgd/config.json").read_text())
    assert (psgd["labels"], psgd["wrong_labels"]) == (config["labels"], 72)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (torch.zeros(1436, dtype=torch.long), [], "a whole number from 0 to 9 for each of digits'"),
        (torch.full((1437,), 10), [], "a whole number from 0 to 9 for each of digits'"),
        (torch.zeros(1437), [], "a whole number from 0 to 9"),
        (torch.zeros(1437, 1, dtype=torch.long), [], "a whole number from 0 to 9"),
        (torch.tensor(3), [], "a whole number from 0 to 9"),
        ({"a": torch.zeros(3)}, [], "labels.pt:KEY; it has a"),
        ({"a": digits_labels(), "clean_label": digits_labels().flip(0)}, ["a"], "in this order"),
        ([random.Random(0)], [], "not readable as labels"),
        (digits_labels(), ["--corrupt", "0.2"], "--corrupt: not with the labels of a --noise FILE"),
        (None, [], "there is no such file"),
    ],
)
def test_labels_that_are_not_those_of_the_data_are_refused(
    values, options, message, tmp_path, refused
):
    file = tmp_path / "labels.pt"
    if values is not None:
        torch.save(values, file)
    if len(options) == 1:
        file, options = f"{file}:{options[0]}", []
    line = refused(
        train_sgd.main, [*DIGITS, "--save-dir", tmp_path / "run", "--noise", file, *options]
    )
    assert message in line
    assert "--noise" in line
    assert not (tmp_path / "run").exists()


def test_noise_of_another_kind_is_another_experiment(tmp_path, refused):
    options = [*DIGITS, "--save-dir", str(tmp_path), "--epochs", "1", "--corrupt", "0.1"]
    train_sgd.main([*options, "--noise", "pair"])
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["corrupted_labels"], config["wrong_labels"]) == (143, 143)
    train_psgd.main([*options, "--n_components", "1"])
    psgd = json.loads((tmp_path / "psgd/config.json").read_text())
    assert psgd["arguments"]["noise"] == "pair"
    line = refused(train_psgd.main, [*options, "--noise", "symmetric", "--run", "other"])
    assert "--noise: symmetric here, pair in" in line
    line = refused(train_sgd.main, [*DIGITS, "--save-dir", tmp_path / "a", "--noise", "asymmetric"])
    assert "--noise asymmetric: allowed with the classes of CIFAR-10" in line
