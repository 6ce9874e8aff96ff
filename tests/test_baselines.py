"""Other bases, starts and statistics. Oracles: numpy's QR, torch's mean, one pass by hand."""

import json
from copy import deepcopy as copy_of

import held_out
import numpy as np
import pytest
import torch
from conftest import DIGITS

import models
import report
import reporting.figures
import reporting.plots
import reporting.results
import train_pbfgs
import train_psgd
import train_sgd
import training.losses
import training.setup
import utils
from dldr.trajectory import load_state_dict
from train_pbfgs import PBFGS
from training.subspaces import random_basis

SUBSPACE = [*DIGITS, "--params_end", "7", "--n_components", "5", "--epochs", "2"]


def basis_in(directory) -> np.ndarray:
    """What basis.npz of a run holds."""
    return np.load(directory / "basis.npz")["basis"].astype(np.float64)


def matrix(save_dir, numbers) -> np.ndarray:
    """The samples' parameters, a row each."""
    model = models.build("resnet8", 10)
    rows = []
    for number in numbers:
        model.load_state_dict(torch.load(save_dir / f"{number}.pt"))
        rows.append(utils.flatten(model).double().numpy())
    return np.stack(rows)


def test_schmidt_spans_what_gram_schmidt_of_all_samples_spans(copy):
    train_psgd.main([*SUBSPACE, "--basis", "schmidt", "--save-dir", str(copy)])
    samples = matrix(copy, range(7))
    oracle = np.linalg.qr((samples - samples.mean(0))[:-1].T)[0]  # the last one is not independent
    basis = basis_in(copy / "psgd_schmidt")
    assert len(basis) == 6
    cosines = np.linalg.svd(basis @ oracle)[1]
    np.testing.assert_allclose(cosines, 1, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "pbfgs"])
def test_training_turns_with_the_basis(optimizer, tiny, batch, orthonormal):
    """Why schmidt can be all components of PCA: θ goes the same way in a basis turned by Q."""
    images, labels = batch
    basis = orthonormal(5, utils.flatten(tiny).numel())
    turn = orthonormal(5, 5, seed=3)
    ends = []
    for rows in (basis, turn @ basis):
        subspace = models.Subspace(copy_of(tiny), rows)
        z = subspace.coordinates
        kinds = {"sgd": lambda z: torch.optim.SGD([z], 0.1, 0.9), "pbfgs": lambda z: PBFGS([z])}
        method = kinds[optimizer](z)

        @torch.no_grad()
        def evaluate(subspace=subspace):
            return training.losses.cross_entropy(subspace, images, labels, False)[0]

        for _ in range(5):
            subspace.zero_grad()
            loss, _ = training.losses.cross_entropy(subspace, images, labels, False)
            loss.backward()
            method.step(*([evaluate, loss.detach()] if optimizer == "pbfgs" else []))
        ends.append(subspace.vector().detach())
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-9)


def test_a_random_basis_is_orthonormal_seeded_and_apart_from_the_samples(copy):
    for name, seed in (("one", "1"), ("again", "1")):
        options = ["--basis", "random", "--run", name, "--save-dir", str(copy)]
        train_psgd.main([*SUBSPACE, *options, "--randomseed", seed])
    basis = basis_in(copy / "one")
    np.testing.assert_allclose(basis @ basis.T, np.eye(5), atol=1e-6)
    np.testing.assert_array_equal(basis, basis_in(copy / "again"))
    samples = matrix(copy, range(7))
    centered = samples - samples.mean(0)
    share = np.sum((centered @ basis.T) ** 2) / np.sum(centered**2)
    assert share < 0.01, "five of 75,290 directions"
    other = random_basis(5, 75290, 2, torch.float32, "cpu")
    assert np.abs(basis @ other.double().numpy().T).max() < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_a_saved_basis_is_taken_as_it_is_or_orthonormalized(kind, copy, tmp_path):
    rows = np.random.default_rng(0).normal(size=(3, 75290)).astype(np.float32)
    file = tmp_path / f"mine.{kind}"
    np.save(file, rows) if kind == "npy" else np.savez(file, basis=rows)
    train_pbfgs.main([*SUBSPACE, "--basis", str(file), "--save-dir", str(copy)])
    found = basis_in(copy / "pbfgs_mine")  # orthonormal, as the span of rows that were not
    np.testing.assert_allclose(found @ found.T, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(rows @ found.T @ found, rows, atol=1e-4)
    np.save(file, found) if kind == "npy" else np.savez(file, basis=found)
    train_pbfgs.main([*SUBSPACE, "--basis", str(file), "--save-dir", str(copy), "--run", "again"])
    np.testing.assert_array_equal(basis_in(copy / "again"), found)


@pytest.mark.parametrize(
    ("start", "name"), [("3", "psgd_from_3"), ("mean", "psgd_from_mean"), ("0", "psgd_from_0")]
)
def test_start(start, name, copy):
    """The run's origin: θ(0)."""
    train_psgd.main([*SUBSPACE, "--start", start, "--lr", "0", "--save-dir", str(copy)])
    model = models.build("resnet8", 10)
    model.load_state_dict(load_state_dict(copy / name / "model.th"))
    oracle = matrix(copy, range(7)).mean(0) if start == "mean" else matrix(copy, [int(start)])[0]
    np.testing.assert_allclose(utils.flatten(model), oracle, atol=1e-6)


def test_bn_update_tests_with_statistics_of_the_whole_training_set(copy):
    """At learning rate 0 the network stands still: its first layer's mean, by one pass by hand."""
    options = ["--lr", "0", "--bn-update", "--epochs", "1", "--save-dir", str(copy)]
    row = train_psgd.main([*SUBSPACE, *options])
    state = load_state_dict(copy / "psgd" / "model.th")
    model = models.build("resnet8", 10).train()
    model.load_state_dict(torch.load(copy / "0.pt"))
    args = training.setup.parse_args(train_psgd.get_options(), [*SUBSPACE, *options])
    means = [
        model.conv1(images).mean((0, 2, 3)) for images, _ in utils.load_data(args).train.epoch(0)
    ]
    torch.testing.assert_close(state["bn1.running_mean"], torch.stack(means).mean(0).detach())
    assert state["bn1.num_batches_tracked"] == len(means)
    tested = train_psgd.main([*SUBSPACE, *options, "--evaluate"])
    assert row["test_acc"] == tested["test_acc"]


@pytest.mark.slow
def test_average_is_the_mean_and_a_row_of_the_report(copy, capsys, undrawn):
    command = [*DIGITS, "--average", "3", "7", "--save-dir", str(copy)]
    row = train_sgd.main(command)
    model = models.build("resnet8", 10)
    model.load_state_dict(load_state_dict(copy / "average" / "model.th"))
    np.testing.assert_allclose(utils.flatten(model), matrix(copy, range(3, 7)).mean(0), atol=1e-6)
    again = train_sgd.main([*command, "--overwrite"])
    assert again["test_acc"] == row["test_acc"]
    for options in (["--basis", "random"], ["--start", "mean", "--bn-update"]):
        train_psgd.main([*SUBSPACE, *options, "--save-dir", str(copy)])
    train_pbfgs.main([*SUBSPACE, "--alpha", "0.1", "--save-dir", str(copy)])
    capsys.readouterr()
    rows = report.main([str(copy), "--out", str(copy / "report")])
    table = {row["title"]: row for row in rows}
    assert table.keys() == {
        "SGD",
        "weight average (snapshots 3–6)",
        "P-SGD, random basis",
        "P-SGD, from mean, BN update",
        "P+-BFGS",
    }
    mean, random = table["weight average (snapshots 3–6)"], table["P-SGD, random basis"]
    assert (mean["epochs"], mean["total epochs"]) == (0, 6)
    assert (random["k"], random["epochs"], random["total epochs"]) == (5, 2, 8)


@pytest.mark.slow
def test_baselines_from_a_sample_on_belong_to_its_trajectory(
    copy, tmp_path, capsys, undrawn, monkeypatch
):
    """Oracles: the sample itself, except for its statistics, and the epochs counted."""
    drawn = {}
    monkeypatch.setattr(reporting.plots, "landscape", lambda paths, **others: drawn.update(paths))
    subspace = ["--params_end", "5", "--n_components", "2", "--save-dir", str(copy)]
    train_psgd.main([*SUBSPACE, *subspace])
    options = ["--average", "4", "5", "--run", "last", "--save-dir", str(copy)]
    last = train_sgd.main([*DIGITS, *options])
    network = models.build("resnet8", 10)
    network.load_state_dict(torch.load(copy / "4.pt"))
    state = load_state_dict(copy / "last" / "model.th")
    assert torch.equal(state["conv1.weight"], network.conv1.weight)
    assert not torch.equal(state["bn1.running_mean"], network.bn1.running_mean)
    further = ["--pretrained", str(copy / "4.pt"), "--start-epoch", "4", "--milestones", "4"]
    train_sgd.main([*DIGITS, *further, "--epochs", "7", "--save-dir", str(tmp_path / "further")])
    capsys.readouterr()
    command = [str(copy), str(tmp_path / "further"), "--out", str(copy / "report")]
    table = {row["title"]: row for row in report.main(command)}
    average = "weight average (snapshot 4)"
    assert table.keys() == {"SGD", "SGD at epoch 4", "SGD, from snapshot 4", "P-SGD", average}
    assert drawn["SGD, from snapshot 4"][0].tolist() == drawn["SGD"][4].tolist()
    runs = reporting.results.read([copy, tmp_path / "further"], [])
    spans = {curve.name: tuple(curve.epochs[[0, -1]]) for curve in reporting.figures.curves(runs)}
    assert spans.pop(average)[1] == 4
    assert spans == {"SGD": (0, 6), "P-SGD": (4, 6), "SGD, from snapshot 4": (4, 7)}
    row = table["SGD, from snapshot 4"]
    assert (row["k"], row["epochs"], row["total epochs"]) == ("n", 3, 7)
    assert table[average]["final"] == [last["test_acc"]]
    # Of another noise level it is a trajectory of its own, from pretrained weights, and of another
    # learning rate another one.
    noisy = {rate: str(tmp_path / rate) for rate in ("0.05", "0.1")}
    for rate, directory in noisy.items():
        options = [*further, "--corrupt", "0.4", "--epochs", "5", "--lr", rate]
        train_sgd.main([*DIGITS, *options, "--save-dir", directory])
    rows = report.main([str(copy), *noisy.values(), *command[2:]])
    start = "digits, from pretrained weights at a learning rate of"
    expected = {f"{start} 0.05", f"{start} 0.1"}
    assert {row["data"] for row in rows if row["noise"]} == expected


@pytest.mark.slow
def test_averages_are_chosen_on_images_that_were_left_out(tmp_path, monkeypatch):
    """Oracle: train_sgd.py's average, on the images that differ from all that were trained on."""
    options = [*DIGITS, "--smalldatasets", "0.3", "--save-dir", str(tmp_path)]
    train_sgd.main([*options, "--epochs", "4"])
    monkeypatch.setattr(held_out, "FIRST", (2, 3))
    monkeypatch.setattr(held_out, "LAST", 4)
    _, found = held_out.accuracies(tmp_path)
    train_sgd.main([*options, "--average", "3", "5"])
    network = models.build("resnet8", 10)
    network.load_state_dict(load_state_dict(tmp_path / "average" / "model.th"))
    args = training.setup.parse_args(train_sgd.get_options(), options)
    trained = {image.numpy().tobytes() for image in utils.read_splits(args)[0].images}
    args.smalldatasets = None
    images, labels, _ = utils.read_splits(args)[0]
    left = torch.tensor([image.numpy().tobytes() not in trained for image in images])
    assert 0.6 < left.float().mean() < 0.71
    mean, std = utils.DIGITS["mean"][0], utils.DIGITS["std"][0]
    with torch.no_grad():
        right = network.eval()((images[left] / 255 - mean) / std).argmax(1) == labels[left]
    assert found == pytest.approx(100 * float(right.float().mean()), abs=0.1)


def test_runs_share_a_trajectory(copy):
    for name in ("a", "b"):
        train_psgd.main([*SUBSPACE, "--run", name, "--save-dir", str(copy)])
        assert json.loads((copy / name / "config.json").read_text())["k"] == 5
