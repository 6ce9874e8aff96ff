"""The scripts end to end on digits. Oracles: unbroken runs, torch.load, files compared by value."""

import argparse
import contextlib
import copy as copy_module
import fcntl
import json
import os
import pty
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DIGITS
from sklearn.decomposition import PCA
from sklearn.metrics import top_k_accuracy_score
from torch import nn

import models
import report
import train_pbfgs
import train_psgd
import train_sgd
import training.errors
import training.files
import training.losses
import training.network
import training.setup
import training.subspaces
import utils
from dldr.reading import read_tensors
from dldr.trajectory import load_state_dict

ROOT = Path(__file__).parent.parent
SUBSPACE = [*DIGITS, "--params_end", "7", "--n_components", "5"]


def rows(directory: Path) -> list[dict]:
    """The metrics of a run, less the seconds, which no two runs share."""
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k != "seconds"} for row in lines]


def same(one, other) -> bool:
    """Bit-equal state dicts."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


PUBLISHED = """
python -u train_sgd.py --datasets CIFAR10 --lr 0.1 --corrupt 0.2 --arch=resnet20 --epochs=150 \
    --save-dir=save_labelnoise0.2_resnet20
python -u train_pbfgs.py --epochs 20 --datasets CIFAR10 --corrupt 0.2 --params_start 0 \
    --params_end 81 --batch-size 1024 --n_components 40 --arch=resnet20 \
    --save-dir=save_labelnoise0.2_resnet20
python -u train_psgd.py --epochs 40 --datasets CIFAR10 --lr 1 --corrupt 0.2 --params_start 0 \
    --params_end 81 --batch-size 128 --n_components 40 --arch=resnet20 \
    --save-dir=save_labelnoise0.2_resnet20
"""


@pytest.mark.slow
def test_published_commands_run_as_they_are(tmp_path):
    """Word for word but for the data, sizes that two cores can run in a test, and the directory."""
    smaller = {"CIFAR10": "digits", "81": "5", "40": "3", "20": "2", "--epochs=150": "--epochs=4"}
    for command in PUBLISHED.replace("\\\n", "").strip().splitlines():
        words = [smaller.get(word, word) for word in shlex.split(command)]
        words = [sys.executable, words[1], ROOT / words[2], *words[3:]]
        run = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert run.stderr == ""
    save_dir = tmp_path / "save_labelnoise0.2_resnet20"
    names = ["checkpoint.pt", "config.json", "metrics.jsonl", "model.th"]
    samples = [f"{number}.pt" for number in range(5)]
    assert {file.name for file in save_dir.iterdir()} == {*names, *samples, "psgd", "pbfgs"}
    for name in ("psgd", "pbfgs"):
        assert {file.name for file in (save_dir / name).iterdir()} == {*names, "basis.npz"}


def test_a_trajectory_is_the_parameters_of_every_epoch(sampled):
    torch.manual_seed(1)
    start = models.build("resnet8", 10).state_dict()
    assert same(torch.load(sampled / "0.pt", weights_only=True), start)
    last = torch.load(sampled / "6.pt", weights_only=True)
    final = torch.load(sampled / "model.th", weights_only=True)
    assert same(last, final["state_dict"])
    assert set(final) == {"state_dict", "best_prec1", "epoch", "arch"}
    history = rows(sampled)
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5, 6]
    assert final["best_prec1"] == max(row["test_acc"] for row in history)
    config = json.loads((sampled / "config.json").read_text())
    assert (config["n"], config["arch"], config["datasets"]) == (75290, "resnet8", "digits")
    assert config["versions"]["torch"] == torch.__version__


def test_sgd_learns_and_so_do_the_subspaces(copy, capsys, undrawn):
    assert (
        train_sgd.main([*DIGITS, "--epochs", "20", "--save-dir", str(copy), "--resume"])["test_acc"]
        > 90
    )
    options = [*DIGITS, "--params_end", "16", "--n_components", "10", "--save-dir", str(copy)]
    assert train_psgd.main([*options, "--epochs", "10", "--lr", "0.3"])["test_acc"] > 90
    last = train_pbfgs.main([*options, "--epochs", "10"])
    assert last["test_acc"] > 90
    assert last["lr"] is None
    assert last["trials"] >= 0
    assert last["step_length"] > 0
    assert "10 directions" in capsys.readouterr().out
    table = report.main([str(copy), "--out", str(copy / "report")])
    names = ["SGD", "SGD at epoch 15", "P-BFGS", "P-SGD"]
    assert [row["title"] for row in table] == names
    epochs = [(20, 20), (15, 15), (10, 25), (10, 25)]
    assert [(row["epochs"], row["total epochs"]) for row in table] == epochs


def test_basis_is_the_pca_of_the_samples(copy):
    train_psgd.main(
        [
            *SUBSPACE,
            "--epochs",
            "1",
            "--params_stride",
            "2",
            "--n_components",
            "3",
            "--save-dir",
            str(copy),
        ]
    )
    states = [torch.load(copy / f"{i}.pt", weights_only=True) for i in (0, 2, 4, 6)]
    names = [name for name, _ in models.build("resnet8", 10).named_parameters()]
    matrix = np.stack([torch.cat([s[name].flatten() for name in names]).numpy() for s in states])
    oracle = PCA(3, svd_solver="full").fit(matrix.astype(np.float64))
    saved = np.load(copy / "psgd" / "basis.npz")
    np.testing.assert_allclose(saved["basis"], oracle.components_, atol=1e-5)
    ratios = saved["explained_variance_ratio"]
    np.testing.assert_allclose(ratios, oracle.explained_variance_ratio_, rtol=1e-5)


@pytest.mark.parametrize("script", [train_psgd, train_pbfgs])
def test_a_subspace_run_starts_at_its_first_sample_and_stays_in_its_subspace(script, copy):
    script.main(
        [
            *SUBSPACE,
            "--params_start",
            "2",
            "--n_components",
            "3",
            "--epochs",
            "2",
            "--save-dir",
            str(copy),
        ]
    )
    directory = copy / script.__name__.removeprefix("train_")
    names = [name for name, _ in models.build("resnet8", 10).named_parameters()]
    ends = [copy / "2.pt", directory / "model.th"]
    start, end = (load_state_dict(file) for file in ends)
    moved = torch.cat([(end[name] - start[name]).flatten() for name in names]).double()
    basis = torch.from_numpy(np.load(directory / "basis.npz")["basis"]).double()
    assert moved.norm() > 0.1
    assert (moved - moved @ basis.T @ basis).norm() < 1e-5 * moved.norm()
    saved = torch.load(directory / "checkpoint.pt", weights_only=True)
    z = saved["states"]["model"]["coordinates"].double()
    torch.testing.assert_close(moved @ basis.T, z, rtol=1e-4, atol=1e-5)
    path = [row["coordinates"] for row in saved["rows"]]
    assert path[-1] == z.tolist() != path[0]


def test_fraction_of_variance_picks_k(copy):
    train_psgd.main([*SUBSPACE, "--n_components", "0.9", "--epochs", "1", "--save-dir", str(copy)])
    ratios = np.load(copy / "psgd" / "basis.npz")["explained_variance_ratio"]
    assert ratios.sum() > 0.9 >= ratios[:-1].sum()


OPTIONS = {
    "sgd": (train_sgd, DIGITS),
    "adam": (train_sgd, [*DIGITS, "--optimizer", "adam"]),
    "adamw": (train_sgd, [*DIGITS, "--optimizer", "adamw"]),
    "half": (train_sgd, [*DIGITS, "--half"]),
    "psgd": (train_psgd, SUBSPACE),
    "pbfgs": (train_pbfgs, SUBSPACE),
    "pbfgs+": (train_pbfgs, [*SUBSPACE, "--alpha", "0.02", "--accumulate", "2", "--half"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_a_resumed_run_equals_an_unbroken_one(name, sampled, tmp_path, capsys):
    script, options = OPTIONS[name]
    ends, histories, samples = [], [], []
    for kind, stops in (("unbroken", ["4"]), ("resumed", ["1", "3", "4"])):
        save_dir = tmp_path / kind
        if script is train_sgd:
            directory = save_dir
        else:
            shutil.copytree(sampled, save_dir)
            directory = save_dir / script.__name__.removeprefix("train_")
        for stop in stops:
            script.main([*options, "--epochs", stop, "--save-dir", str(save_dir), "--resume"])
        ends.append(torch.load(directory / "model.th", weights_only=True)["state_dict"])
        histories.append(rows(directory))
        samples.append([load_state_dict(save_dir / f"{i}.pt") for i in range(5)])
    assert histories[0] == histories[1]
    assert len(histories[0]) == 4
    assert same(*ends)
    assert all(same(one, other) for one, other in zip(*samples, strict=True))
    assert "3 epochs are done" in capsys.readouterr().out


def test_resume_takes_a_path_and_a_finished_run_is_left_alone(copy, tmp_path, capsys):
    elsewhere = str(shutil.copy(copy / "checkpoint.pt", tmp_path / "elsewhere.pt"))
    fresh = tmp_path / "fresh"
    last = train_sgd.main(
        [*DIGITS, "--epochs", "6", "--save-dir", str(fresh), "--resume", elsewhere]
    )
    assert last["epoch"] == 6
    assert not (fresh / "0.pt").exists()
    before = (copy / "metrics.jsonl").stat().st_mtime_ns
    assert train_sgd.main([*DIGITS, "--epochs", "6", "--save-dir", str(copy), "--resume"]) == last
    assert (copy / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_subspace_run_resumes_elsewhere(sampled, tmp_path):
    """--resume PATH in a fresh copy of the trajectory: all files are there, the end is the same."""
    ends = []
    for name, options in (("one", []), ("two", ["--resume", str(tmp_path / "half.pt")])):
        run = shutil.copytree(sampled, tmp_path / name)
        base = [*SUBSPACE, "--save-dir", str(run), "--save-every", "1"]
        if name == "one":
            train_psgd.main([*base, "--epochs", "1"])
            shutil.copy(run / "psgd" / "checkpoint.pt", tmp_path / "half.pt")
            options = ["--resume"]
        train_psgd.main([*base, *options, "--epochs", "2"])
        assert (run / "psgd" / "basis.npz").exists()
        ends.append(load_state_dict(run / "psgd" / "model.th"))
    assert same(*ends)


def test_overwrite_removes_the_earlier_run(copy):
    train_sgd.main([*DIGITS, "--epochs", "2", "--save-dir", str(copy), "--overwrite"])
    assert sorted(file.name for file in copy.glob("[0-9]*.pt")) == ["0.pt", "1.pt", "2.pt"]
    assert len(rows(copy)) == 2


def test_milestones_and_start_epoch_set_the_learning_rate(tmp_path):
    train_sgd.main(
        [
            *DIGITS,
            "--epochs",
            "5",
            "--milestones",
            "3",
            "4",
            "--save-dir",
            str(tmp_path),
            "--start-epoch",
            "2",
        ]
    )
    assert [row["lr"] for row in rows(tmp_path)] == pytest.approx([0.1, 0.01, 0.001])
    assert [row["epoch"] for row in rows(tmp_path)] == [3, 4, 5]
    assert {file.name for file in tmp_path.glob("[0-9]*.pt")} == {"2.pt", "3.pt", "4.pt", "5.pt"}


@pytest.mark.parametrize("script", [train_sgd, train_psgd])
def test_cosine_is_torch_s(script, sampled, tmp_path, capsys):
    """Oracle: CosineAnnealingLR; the epoch lines show what metrics.jsonl has."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.2)
    oracle, expected = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5), []
    for _ in range(5):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        oracle.step()
    save_dir = tmp_path / "run" if script is train_sgd else shutil.copytree(sampled, tmp_path / "a")
    short = ["--schedule", "cosine", "--smalldatasets", "0.1"][: 4 if script is train_sgd else 2]
    script.main([*DIGITS, *short, "--lr", "0.2", "--epochs", "5", "--save-dir", str(save_dir)])
    lines = rows(save_dir if script is train_sgd else save_dir / "psgd")
    assert [row["lr"] for row in lines] == pytest.approx(expected)
    shown = re.findall(r"^epoch .* lr (\S+)", capsys.readouterr().out, re.MULTILINE)
    assert [float(lr) for lr in shown] == pytest.approx(expected, rel=1e-2)


def test_milestones_that_are_never_reached_are_told(tmp_path, capsys):
    short = [*DIGITS, "--smalldatasets", "0.1", "--epochs", "2", "--overwrite", "--save-dir"]
    for options, warned in (
        ("", True),
        ("--milestones 2 9", True),
        ("--milestones 1 2", False),
        ("--milestones", False),
        ("--schedule cosine", False),
    ):
        train_sgd.main([*short, str(tmp_path), *options.split()])
        assert ("the learning rate stays 0.1" in capsys.readouterr().out) == warned


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_optimizers_are_torch_s(name):
    """Oracle: torch.optim, on the same gradients."""
    model = torch.nn.Linear(3, 2)
    args = training.setup.parse_args(
        train_sgd.get_options(), ["--optimizer", name.lower(), "--wd", "0.1"]
    )
    args.lr = 0.01
    momentum = {"momentum": 0.9} if name == "SGD" else {}
    twin = copy_module.deepcopy(model)
    own = train_sgd.make_optimizer(args, list(model.parameters()))
    oracle = getattr(torch.optim, name)(twin.parameters(), 0.01, weight_decay=0.1, **momentum)
    for module, optimizer in ((model, own), (twin, oracle)):
        for _ in range(3):
            optimizer.zero_grad()
            module(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize(
    ("optimizer", "datasets", "lr", "milestones"),
    [
        ("sgd", "CIFAR10", 0.1, [100, 150]),
        ("adam", "CIFAR100", 0.001, [150]),
        ("adamw", "digits", 0.001, [100, 150]),
        ("sgd", "ImageNet", 0.1, [30, 60, 90]),
    ],
)
def test_published_schedules(optimizer, datasets, lr, milestones, patch, tmp_path):
    """What the options leave open is decided as published, before any data is read."""
    seen = {}

    def stop(args):
        seen.update(vars(args))
        raise KeyboardInterrupt

    patch("load_data", stop)
    with pytest.raises(KeyboardInterrupt):
        argv = ["--optimizer", optimizer, "--datasets", datasets, "--save-dir", str(tmp_path)]
        train_sgd.main(argv)
    assert seen["lr"] == lr
    assert seen["milestones"][:3] == milestones
    assert (seen["epochs"], seen["batch_size"], seen["weight_decay"]) == (200, 128, 1e-4)


def test_published_defaults_of_the_subspace_scripts():
    for script in (train_psgd, train_pbfgs):
        args = training.setup.parse_args(script.get_options(), [])
        assert (args.arch, args.epochs, args.batch_size) == ("resnet32", 100, 128)
        assert args.params_start == 0  # test_chain.py has what depends on the samples
        assert (args.weight_decay, args.save_every, args.randomseed) == (0, 10, 1)
    args = training.setup.parse_args(train_psgd.get_options(), [])
    assert (args.lr, args.momentum, args.milestones) == (1, 0.9, [30, 50])
    args = training.setup.parse_args(train_pbfgs.get_options(), [])
    assert (args.alpha, args.gamma, args.accumulate) == (0, 0.9, 1)


def test_evaluate_tests_what_was_trained_and_writes_nothing(copy):
    average = ["--average", "2", "4", "--run", "last"]
    train_sgd.main([*DIGITS, *average, "--save-dir", str(copy)])
    train_psgd.main([*SUBSPACE, "--epochs", "2", "--save-dir", str(copy)])
    before = sorted((file, file.stat().st_mtime_ns) for file in copy.rglob("*"))
    for script, directory, options in (
        (train_sgd, copy, []),
        (train_sgd, copy / "last", average),
        (train_psgd, copy / "psgd", []),
    ):
        last = rows(directory)[-1]
        own = script.main([*DIGITS, *options, "--evaluate", "--save-dir", str(copy)])
        assert own == {name: last[name] for name in ("test_loss", "test_acc")}
    weights = str(copy / "psgd" / "model.th")
    for option in ("--pretrained", "--resume"):
        named = train_sgd.main([*DIGITS, "-e", option, weights, "--save-dir", str(copy)])
        assert named == own
    assert before == sorted((file, file.stat().st_mtime_ns) for file in copy.rglob("*"))


def test_pretrained_weights_are_the_start(copy, tmp_path):
    """A public checkpoint: DataParallel's names, under state_dict."""
    state = torch.load(copy / "4.pt", weights_only=True)
    public = tmp_path / "public.th"
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in state.items()}, "best_prec1": 9}, public
    )
    fresh = tmp_path / "fresh"
    train_sgd.main(
        [*DIGITS, "--epochs", "1", "--save-dir", str(fresh), "--pretrained", str(public)]
    )
    assert same(load_state_dict(fresh / "0.pt"), state)
    train_psgd.main(
        [
            *SUBSPACE,
            "--epochs",
            "1",
            "--lr",
            "0",
            "--save-dir",
            str(copy),
            "--pretrained",
            str(public),
        ]
    )
    end = load_state_dict(copy / "psgd" / "model.th")
    assert torch.equal(end["conv1.weight"], state["conv1.weight"])


def test_weights_of_old_torch_lack_counters_which_are_taken_as_0(copy, tmp_path):
    """Oracle: the same weights with counters."""
    state = torch.load(copy / "4.pt", weights_only=True)
    old = {name: value for name, value in state.items() if "num_batches_tracked" not in name}
    assert len(old) < len(state)
    torch.save({"state_dict": old}, tmp_path / "old.th")
    results = [
        train_sgd.main([*DIGITS, "--evaluate", option, str(file)])
        for option, file in (
            ("--resume", copy / "4.pt"),
            ("--resume", tmp_path / "old.th"),
            ("--pretrained", tmp_path / "old.th"),
        )
    ]
    assert results[0] == results[1] == results[2]
    options = ["--pretrained", str(tmp_path / "old.th"), "--save-dir", str(tmp_path / "fresh")]
    train_sgd.main([*DIGITS, "--epochs", "1", *options])
    start = load_state_dict(tmp_path / "fresh" / "0.pt")
    counters = {name: torch.tensor(0) for name in state.keys() - old.keys()}
    assert same(start, state | counters)


def test_torchvision_weights_without_a_path(tmp_path, monkeypatch, capsys, refused):
    """The download is replaced by what torchvision would deliver; the classifier stays our own."""
    torch.manual_seed(9)
    delivered = models.build("shufflenet_v2_x0_5", 1000).state_dict()
    weights = type(models.torchvision.models.ShuffleNet_V2_X0_5_Weights.DEFAULT)
    monkeypatch.setattr(weights, "get_state_dict", lambda *args, **kwargs: delivered)
    options = ["--datasets", "digits", "--smalldatasets", "0.02", "--epochs", "1", "--pretrained"]
    options += ["--save-dir", str(tmp_path), "--arch"]
    train_sgd.main([*options, "shufflenet_v2_x0_5"])
    first = load_state_dict(tmp_path / "0.pt")
    different = [name for name in first if not torch.equal(first[name], delivered[name])]
    assert different == ["fc.weight", "fc.bias"]
    assert "left as initialized: fc.bias, fc.weight" in capsys.readouterr().out
    options[-2] = str(tmp_path / "new")
    line = refused(train_sgd.main, [*options, "resnet18"])
    assert "--pretrained: torchvision's weights do not fit this resnet18; name" in line


def test_half_computes_in_bfloat16_and_keeps_float32(batch):
    kinds = []
    model = models.build("resnet8", 10)
    hook = model.conv1.register_forward_hook(lambda *call: kinds.append(call[-1].dtype))
    images, labels = batch[0].float(), batch[1]
    loss, _ = training.losses.cross_entropy(model, images, labels, half=True)
    hook.remove()
    assert kinds == [torch.bfloat16]
    assert loss.dtype == torch.float32
    full, _ = training.losses.cross_entropy(model, images, labels, half=False)
    assert loss.item() == pytest.approx(full.item(), rel=0.02)
    loss.backward()
    assert model.conv1.weight.grad.dtype == torch.float32


def test_half_leaves_the_compared_losses_to_float32(sampled, monkeypatch):
    """Both losses of the Armijo condition equal those of the network run in float32."""
    model = models.build("resnet8", 10)
    training.network.copy_into(model, load_state_dict(sampled / "6.pt"))
    subspace = models.Subspace(model, torch.nn.functional.normalize(torch.randn(1, 75290)))
    args = argparse.Namespace(batch_size=64, half=True, weight_decay=0.0)
    images, labels = torch.randn(64, 3, 8, 8), torch.randint(10, (64,))
    compared = []

    class Spy(train_pbfgs.PBFGS):
        def step(self, evaluate, loss):
            compared.extend([loss, evaluate()])
            return super().step(evaluate, loss)

    run = argparse.Namespace(args=args, weight=1.0)
    batch = train_pbfgs.Batch(run, subspace.train(), images, labels)
    with train_pbfgs.frozen_buffers(model), torch.no_grad():
        full, _ = training.losses.cross_entropy(subspace, images, labels, half=False)
    _, _, start = batch.backward()
    Spy([subspace.coordinates]).step(batch.evaluate, start)
    assert compared == [full, full]


def test_options_of_pbfgs_reach_the_training(copy, patch):
    """--alpha leaves the subspace, --half runs bfloat16, --accumulate makes fewer steps."""
    options = [*SUBSPACE, "--epochs", "1", "--save-dir", str(copy), "--overwrite"]
    names = [name for name, _ in models.build("resnet8", 10).named_parameters()]

    def outside() -> float:
        start, end = (load_state_dict(copy / name) for name in ("0.pt", "pbfgs/model.th"))
        moved = torch.cat([(end[name] - start[name]).flatten() for name in names])
        basis = torch.from_numpy(np.load(copy / "pbfgs" / "basis.npz")["basis"])
        return float((moved - moved @ basis.T @ basis).norm() / moved.norm())

    calls = []
    real = training.losses.cross_entropy

    def spy(model, images, labels, half):
        if torch.is_grad_enabled():
            calls.append((len(images), half))
        return real(model, images, labels, half)

    patch("cross_entropy", spy)
    train_pbfgs.main(options)
    assert outside() < 1e-4
    assert calls == [(256, False)] * 5 + [(157, False)]
    calls.clear()
    train_pbfgs.main([*options, "--alpha", "0.1", "--half", "--accumulate", "4"])
    assert outside() > 0.01
    assert [half for _, half in calls] == [True] * 6
    assert torch.load(copy / "pbfgs" / "checkpoint.pt", weights_only=True)["states"]["residual"]


def test_training_loss_is_reported_without_the_penalty(copy):
    """Where nothing has moved yet, --weight-decay does not show in the loss."""
    options = [*SUBSPACE, "--epochs", "1", "--save-dir", str(copy), "--overwrite"]
    psgd = [train_psgd.main([*options, "--lr", "0", "--wd", wd])["train_loss"] for wd in "05"]
    assert psgd[0] == psgd[1]
    whole = [*options, "--batch-size", "2000"]
    pbfgs = [train_pbfgs.main([*whole, "--wd", wd])["train_loss"] for wd in "05"]
    assert pbfgs[0] == pbfgs[1]


def test_imagenet_has_30_trials(monkeypatch, tmp_path):
    """As published; seen where the optimizer is made, after a loading that is stubbed out."""
    linear = torch.nn.Linear(2, 2)
    found = training.subspaces.Basis(torch.eye(6)[:2], torch.ones(2), "")
    results = {"load_subspace_samples": [], "build_model": linear, "find_basis": found}
    for name, result in (results | {"load_start": None}).items():
        monkeypatch.setattr(train_pbfgs, name, lambda *args, result=result: result)

    class StopError(Exception):
        pass

    def stop(self, data, model, optimizer, basis):
        raise StopError(optimizer.defaults["max_trials"])

    monkeypatch.setattr(training.run.Run, "load_data", lambda run: None)
    monkeypatch.setattr(training.run.Run, "start", stop)
    (tmp_path / "0.pt").touch()
    for datasets, trials in (("ImageNet", "30"), ("CIFAR10", "20")):
        argv = ["--datasets", datasets, "--params_end", "1", "--save-dir", str(tmp_path)]
        with pytest.raises(StopError, match=trials):
            train_pbfgs.main(argv)


def test_networks_with_a_version_load(tmp_path):
    """torchvision's MNASNet refuses a plain state dict; ours are copied in."""
    file = tmp_path / "0.pt"
    torch.manual_seed(0)
    training.files.save(file, models.build("mnasnet0_5", 10).state_dict())
    model = models.build("mnasnet0_5", 10)
    training.network.load_weights(model, file, "mnasnet0_5")
    assert same(model.state_dict(), load_state_dict(file))


def test_a_machine_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    train_sgd.main([*DIGITS, "--epochs", "1", "--save-dir", str(tmp_path / "run")])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["commit"] is None


def test_report_counts_what_was_sampled(copy, undrawn):
    samples = ["--params_end", "6", "--params_stride", "3", "--n_components", "0.5"]
    train_psgd.main([*SUBSPACE, *samples, "--epochs", "2", "--save-dir", str(copy)])
    table = report.main([str(copy), "--out", str(copy / "report")])
    assert [[row[name] for name in ("title", "k", "epochs", "total epochs")] for row in table] == [
        ["SGD", "n", 6, 6],
        ["SGD at epoch 3", "n", 3, 3],
        ["P-SGD", 1, 2, 5],
    ]


@pytest.mark.slow
def test_label_noise_is_the_same_in_all_three_scripts(tmp_path, patch):
    seen = []
    load = utils.load_data

    def spy(args):
        data = load(args)
        seen.append(data.train.labels)
        return data

    patch("load_data", spy)
    noise = ["--corrupt", "0.5", "--randomseed", "3", "--save-dir", str(tmp_path), "--epochs", "2"]
    for script in (train_sgd, train_psgd, train_pbfgs):
        extra = [] if script is train_sgd else ["--params_end", "3", "--n_components", "2"]
        script.main([*DIGITS, *noise, *extra])
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def test_nothing_but_finished_files_is_left(tmp_path, monkeypatch):
    """A write that fails leaves the old file and no temporary one, and ends in a line."""
    file = tmp_path / "0.pt"
    training.files.save(file, {"weight": torch.zeros(1)})

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(training.errors.InputError, match=r"could not be written \(disk full\)"):
        training.files.save(file, {"weight": torch.ones(1)})
    assert list(tmp_path.iterdir()) == [file]
    assert load_state_dict(file)["weight"] == 0


@pytest.mark.slow
def test_a_basis_is_computed_once_and_again_when_anything_changes(copy, patch, capsys):
    """Oracle: whether utils.pca is called, and the basis it gives."""
    calls = []
    pca = utils.pca
    patch("pca", lambda *a, **k: calls.append(1) or pca(*a, **k))

    def run(script, *options: str) -> int:
        calls.clear()
        script.main([*SUBSPACE, "--epochs", "1", "--overwrite", "--save-dir", str(copy), *options])
        return len(calls)

    assert run(train_psgd) == 1
    first = np.load(copy / "psgd" / "basis.npz")["basis"]
    assert run(train_psgd, "--lr", "0.1") == 0
    assert "psgd/basis.npz" in capsys.readouterr().out
    assert run(train_pbfgs) == 0, "the other script's basis serves"
    np.testing.assert_array_equal(np.load(copy / "pbfgs" / "basis.npz")["basis"], first)

    assert run(train_psgd, "--n_components", "4") == 1
    assert len(np.load(copy / "psgd" / "basis.npz")["basis"]) == 4
    assert run(train_psgd) == 0, "pbfgs still has it"
    (copy / "pbfgs" / "basis.npz").unlink()
    assert run(train_psgd, "--basis-dtype", "bfloat16") == 1
    assert np.load(copy / "psgd" / "basis.npz")["basis"].dtype == np.uint16
    assert run(train_psgd, "--params_end", "6", "--n_components", "3") == 1
    assert run(train_psgd) == 1
    (copy / "psgd" / "basis.npz").write_bytes(b"cut off")
    assert run(train_psgd) == 1
    state = torch.load(copy / "3.pt")
    state["linear.bias"] += 1
    torch.save(state, copy / "3.pt")
    assert run(train_psgd) == 1


@pytest.mark.slow
@pytest.mark.parametrize("script", [train_psgd, train_pbfgs])
def test_a_bfloat16_basis_trains(script, copy):
    """Chance is 10 %. P-BFGS moves the origin, too."""
    options = ["--epochs", "4", "--basis-dtype", "bfloat16", "--save-dir", str(copy)]
    if script is train_pbfgs:
        options += ["--alpha", "0.01"]
    assert script.main([*SUBSPACE, *options])["test_acc"] > 50


class Short(nn.Module):
    """A linear network whose parameters are bfloat16."""

    def __init__(self, classes):
        super().__init__()
        self.layer = nn.Linear(192, classes).bfloat16()

    def forward(self, images):
        return self.layer(images.flatten(1).bfloat16()).float()


def test_a_network_in_bfloat16_trains(tmp_path, monkeypatch):
    """Its samples span a subspace, and the coordinates are float32: small steps add up."""
    monkeypatch.setattr(models, "build", lambda arch, classes, image_size: Short(classes))
    base = [*DIGITS, "--save-dir", str(tmp_path)]
    train_sgd.main([*base, "--epochs", "4", "--lr", "0.01"])
    for script in (train_psgd, train_pbfgs):
        script.main([*base, "--params_end", "5", "--n_components", "3", "--epochs", "3"])
        saved = read_tensors(tmp_path / script.__name__[6:] / "checkpoint.pt")
        assert saved["states"]["model"]["coordinates"].dtype == torch.float32
        assert saved["state_dict"]["layer.weight"].dtype == torch.bfloat16
        assert saved["rows"][-1]["train_loss"] < saved["rows"][0]["train_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_sees_bars_and_a_file_rows(terminal, tmp_path):
    """Oracle: a real terminal (pty) of 100 columns, and a real file."""
    command = [sys.executable, ROOT / "train_sgd.py", *DIGITS, "--epochs", "2"]
    command += ["--print-freq", "2", "--save-dir", tmp_path / "run"]
    main, terminal_end = pty.openpty()
    fcntl.ioctl(terminal_end, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    with (tmp_path / "file").open("wb") as file:
        out = terminal_end if terminal else file
        with subprocess.Popen(command, stdout=out, stderr=out) as process:
            os.close(terminal_end)
            shown = b""
            with contextlib.suppress(OSError):  # EIO is how a terminal says that it is closed
                while part := os.read(main, 2**16):
                    shown += part
    os.close(main)
    assert process.returncode == 0
    text = (shown or (tmp_path / "file").read_bytes()).decode()
    rows = re.findall(r"epoch   [12]/2  train loss .* s\r?\n", text)
    assert len(rows) == 2
    bars = re.findall(r"epoch [12]: .*\|.*<.*batch/s, accuracy=\d.* %, loss=\d", text)
    assert bool(bars) == terminal == bool(re.search(r"run: +50%.*1/2 .*epoch", text))
    assert ("\r" in text) == terminal


@pytest.mark.slow
def test_samples_are_taken_every_so_many_steps(tmp_path, undrawn):
    """Oracle: a run that keeps every step, 6 of which are an epoch of digits at 256 a batch."""
    for every in (1, 4, 6, None):
        options = ["--epochs", "2", "--save-dir", str(tmp_path / str(every))]
        options += ["--sample-every", str(every)] if every else []
        train_sgd.main([*DIGITS, *options])
    for every, last in ((4, 3), (6, 2), (None, 2)):
        samples = utils.load_samples(tmp_path / str(every), 0, last + 1)
        assert not (tmp_path / str(every) / f"{last + 1}.pt").exists()
        for number, sample in enumerate(samples):
            step = load_state_dict(tmp_path / "1" / f"{(every or 6) * number}.pt")
            assert same(dict(sample), step)
    config = json.loads((tmp_path / "4" / "config.json").read_text())
    assert config["sample_epochs"] == pytest.approx([0, 4 / 6, 8 / 6, 2], abs=1e-6)
    subspace = ["--params_end", "3", "--n_components", "2", "--epochs", "1"]
    train_psgd.main([*DIGITS, *subspace, "--save-dir", str(tmp_path / "4")])
    rows = report.main([str(tmp_path / "4"), "--out", str(tmp_path / "out")])
    assert [row["total epochs"] for row in rows] == [2, 3], "the last sample took part of epoch 2"


def test_a_run_that_samples_by_steps_resumes_in_the_middle_of_an_epoch(tmp_path, patch):
    options = [*DIGITS, "--epochs", "2", "--sample-every", "4", "--save-dir"]
    train_sgd.main([*options, str(tmp_path / "whole")])
    plain, calls = training.losses.cross_entropy, iter(range(10**6))

    def interrupting(*arguments):
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*arguments)

    patch("cross_entropy", interrupting)
    with pytest.raises(SystemExit):
        train_sgd.main([*options, str(tmp_path / "broken")])
    patch("cross_entropy", plain)
    assert not (tmp_path / "broken" / "1.pt").exists()
    train_sgd.main([*options, str(tmp_path / "broken"), "--resume"])
    whole, broken = (utils.load_samples(tmp_path / name, 0, 4) for name in ("whole", "broken"))
    assert all(same(dict(one), dict(other)) for one, other in zip(whole, broken, strict=True))


def test_top_5_from_a_hundred_classes_on():
    """Oracle: scikit-learn's top_k_accuracy_score."""
    torch.manual_seed(0)
    scores, labels = torch.randn(60, 100), torch.randint(100, (60,))
    scores[torch.arange(30), labels[:30]] += 2

    class Ready(torch.nn.Module):
        def forward(self, images):
            return scores[images[:, 0, 0, 0].long()]

    def numbers():
        yield torch.arange(60.0).view(60, 1, 1, 1), labels

    row = training.losses.evaluate(Ready(), numbers(), False)
    for name, k in (("test_acc", 1), ("test_top5", 5)):
        exact = top_k_accuracy_score(labels, scores.double(), k=k, labels=range(100))
        assert row[name] == pytest.approx(100 * exact)
    scores = scores[:, :10]
    labels = labels % 10
    assert "test_top5" not in training.losses.evaluate(Ready(), numbers(), False)
