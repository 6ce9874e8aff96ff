"""The scripts on a stand-in for a GPU; `pytest tests/on_accelerator.py` runs these tests alone.

Oracles: the same command on the CPU, whose numbers are to be equal to the bit, and what the device
was asked for, launch by launch.
"""

import importlib
import inspect
import json
import os
import shutil
import signal
from collections import Counter

import accelerator
import numpy as np
import pytest
import torch
from accelerator import NAME, recorded
from PIL import Image

import dldr
import dldr.parameters
import dldr.pbfgs
import models
import report
import reporting.analysis
import reporting.plots
import train_pbfgs
import train_psgd
import train_sgd
import training.losses
import training.network
import training.setup
import utils
from dldr.pca import orthonormalize

DEVICES = ("cpu", NAME)
SCRIPTS = (train_sgd, train_psgd, train_pbfgs)
COMMON = ["--datasets", "digits", "--arch", "resnet8", "--smalldatasets", "0.05", "-b", "24"]
SUBSPACE = ["--params_end", "4", "--n_components", "2", "--epochs", "2", "--run", "run"]


def call(script, save_dir, device, *options):
    """Run a script and return the directory of the run."""
    common = [*COMMON, "--no-channels-last", "--save-dir", str(save_dir), "--device", device]
    common += ["--epochs", "2"] if script is train_sgd else SUBSPACE
    script.main([*common, *map(str, options)])
    own = "average" if "--average" in options else ""
    return save_dir / (own if script is train_sgd else "run")


def outcome(directory):
    """The rows of a run, but for the time they took, and the bytes of its model.th."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [row | {"seconds": 0} for row in rows], (directory / "model.th").read_bytes()


@pytest.fixture(scope="session")
def trajectory(tmp_path_factory):
    """A save dir with the samples 0 … 3, of the CPU."""
    return call(train_sgd, tmp_path_factory.mktemp("trajectory"), "cpu", "--epochs", "3")


@pytest.fixture
def places(trajectory, tmp_path):
    """A save dir for each device, with these samples."""
    return {device: shutil.copytree(trajectory, tmp_path / device) for device in DEVICES}


CASES = {
    train_sgd: (
        ["--overwrite"],
        ["--overwrite", "--half"],
        ["--overwrite", "--optimizer", "adam"],
        ["--overwrite", "--sample-every", 2],
        ["--average", 1, 4],
    ),
    train_psgd: (
        [],
        ["--half"],
        ["--basis", "random"],
        ["--basis", "schmidt"],
        ["--basis", "FILE"],
        ["--basis-dtype", "bfloat16"],
        ["--start", "mean", "--bn-update"],
        ["--weight-decay", "0.01"],
    ),
    train_pbfgs: (
        [],
        ["--half"],
        ["--basis-dtype", "bfloat16", "--bn-update"],
        ["--weight-decay", "0.01"],
        ["--alpha", "0.1"],
        ["--accumulate", 2, "-b", 12],
    ),
}


@pytest.mark.parametrize(
    ("script", "options"), [(script, options) for script in CASES for options in CASES[script]]
)
def test_the_numbers_are_those_of_the_cpu(script, options, places, tmp_path):
    if "FILE" in options:
        n = utils.flatten(models.build("resnet8", 10)).numel()
        basis = torch.linalg.qr(torch.randn(n, 2, generator=torch.Generator().manual_seed(0))).Q
        np.save(tmp_path / "FILE.npy", basis.T.numpy())
        options = ["--basis", tmp_path / "FILE.npy"]
    with recorded() as events:
        one, other = (call(script, places[device], device, *options) for device in DEVICES)
    assert outcome(one) == outcome(other)
    assert {event.kind for event in events} == {"launch", "copy", "sync"}
    if (one / "basis.npz").exists():
        assert (one / "basis.npz").read_bytes() == (other / "basis.npz").read_bytes()


def test_pca_numbers_on_a_device_without_float64(monkeypatch):
    """As Apple's GPUs are. Oracle: the CPU's."""

    def without_float64(value):
        if isinstance(value, torch.Tensor) and value.dtype == torch.float64:
            raise TypeError("the device has no float64")
        return to_device(value)

    def results(snapshots, device):
        basis, ratios = dldr.pca(snapshots, 3, device=device)
        other, _ = dldr.pca(snapshots.flip(1), 2, device=device)
        orthonormalize(other)
        return basis, ratios, other, dldr.principal_angles(basis, other), dldr.spectrum(snapshots)

    snapshots = torch.randn(5, 60, generator=torch.Generator().manual_seed(0))
    expected = results(snapshots, "cpu")
    to_device = accelerator.to_device
    monkeypatch.setattr(accelerator, "to_device", without_float64)
    pca_module = importlib.import_module("dldr.pca")  # dldr.pca is the function
    monkeypatch.setattr(pca_module, "home_of_float64", lambda device: torch.device("cpu"))
    for one, other in zip(expected, results(snapshots.to(NAME), NAME), strict=True):
        assert torch.equal(one, other.cpu())


def test_files_are_the_same_and_load_without_the_device(trajectory, tmp_path):
    """Also the fingerprint of the samples, which is of their bytes."""
    call(train_sgd, tmp_path, NAME, "--epochs", "3")
    for name in [*(f"{i}.pt" for i in range(4)), "model.th"]:
        assert (tmp_path / name).read_bytes() == (trajectory / name).read_bytes()
    states = torch.load(tmp_path / "checkpoint.pt")["states"]
    momentum = [state["momentum_buffer"] for state in states["optimizer"]["state"].values()]
    assert {v.device.type for v in [*states["model"].values(), *momentum]} == {"cpu"}


@pytest.mark.parametrize("devices", [DEVICES, DEVICES[::-1]])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_resumes_on_the_other_device(script, devices, places, patch):
    """Interrupted in the second of two epochs. Oracle: a run on the CPU without a break."""
    afresh = ["--overwrite"] * (script is train_sgd)
    options = ["--alpha", "0.1"] * (script is train_pbfgs)
    whole = call(script, places["cpu"], "cpu", *afresh, *options)
    cross_entropy, steps = training.losses.cross_entropy, []

    def interrupted(*arguments):
        if torch.is_grad_enabled():  # no trial, no test
            steps.append(1)
            if len(steps) == 5:  # of three an epoch
                os.kill(os.getpid(), signal.SIGINT)
        return cross_entropy(*arguments)

    patch("cross_entropy", interrupted)
    with pytest.raises(SystemExit):
        call(script, places[NAME], devices[0], *afresh, *options)
    broken = call(script, places[NAME], devices[1], "--resume", *options)
    assert len(steps) == 6
    assert outcome(broken) == outcome(whole)


def test_evaluate(trajectory):
    common = [*COMMON, "--no-channels-last", "--save-dir", str(trajectory), "--evaluate"]
    rows = [train_sgd.main([*common, "--device", device]) for device in DEVICES]
    assert rows[0] == rows[1]
    assert "test_acc" in rows[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_streamed_images(workers, tmp_path):
    """Of 72 × 72 pixels, decoded by a process of its own or not."""
    random = np.random.default_rng(0)
    for name in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(3):
            image = Image.fromarray(random.integers(256, size=(80, 72, 3), dtype=np.uint8))
            image.save(tmp_path / "data" / name / f"{number}.png")
    data = ["--data-dir", tmp_path / "data", "--image-size", 72, "-j", workers, "-b", 4]
    options = ["--datasets", "ImageFolder", "--smalldatasets", 1, "--arch", "resnet8", *data]
    one, other = (call(train_sgd, tmp_path / name, name, *options) for name in DEVICES)
    assert outcome(one) == outcome(other)


def test_the_report(places, monkeypatch, tmp_path):
    """Its table and what its figures show; the loss landscape is one transfer."""
    save_dir, shown = places["cpu"], []
    call(train_psgd, save_dir, "cpu")
    monkeypatch.setattr(reporting.plots, "image", lambda figure, kind: b"")
    monkeypatch.setattr(reporting.analysis, "GRID", 5)
    landscape = reporting.plots.landscape
    monkeypatch.setattr(
        reporting.plots, "landscape", lambda **parts: shown.append(parts) or landscape(**parts)
    )
    for device in DEVICES:
        with recorded() as events:
            options = ["--device", device, "--out", str(tmp_path / "out")]
            shown.append(report.main([str(save_dir), *options]))
    half = len(shown) // 2
    assert half == 3, "the table, the landscape and its narrow version"
    assert str(shown[:half]) == str(shown[half:])
    lines, first = inspect.getsourcelines(reporting.analysis.loss_on)
    where = {f"reporting/analysis.py:{number}" for number in range(first, first + len(lines))}
    syncs = sum(event.kind == "sync" and event.line in where for event in events)
    assert syncs == 1


# ---------------------------------------------------------------- what the device is asked for


def costs(script, places, *options):
    """How many launches, copies and syncs a run makes, how many launches each file of the project,
    and its rows. Its basis is read.
    """
    place = places[NAME]
    if script is not train_sgd and not (place / "run").exists():
        shutil.copytree(call(script, places["cpu"], "cpu"), place / "run")
    options = ["--overwrite", "--print-freq", 999, "--save-every", 99, *options]
    with recorded() as events:
        rows, _ = outcome(call(script, place, NAME, *options))
    kinds = Counter(event.kind for event in events)
    files = Counter(event.line.partition(":")[0] for event in events if event.kind == "launch")
    return kinds | files, rows


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_step_waits_for_nothing_but_its_trials(script, places):
    """Two runs of one epoch, of 3 steps and of 6, tell what 3 steps cost."""
    (short, rows), (long, more) = (
        costs(script, places, "--epochs", 1, "-b", size) for size in (24, 12)
    )
    trials = 0
    if script is train_pbfgs:  # the mean is of those rejected
        trials = round(6 * more[0]["trials"] + 6) - round(3 * rows[0]["trials"] + 3)
        assert trials > 3
    assert long["launch"] > short["launch"]
    assert long["copy"] == short["copy"]
    assert long["sync"] - short["sync"] == trials
    if not trials:
        most = {"utils.py": 5, "training/losses.py": 2, "training/metrics.py": 8}  # a step
        more = {file: long[file] - short[file] for file in most}
        assert all(0 < more[file] <= 3 * count for file, count in most.items()), more


def test_batchnorms_counters_cost_no_launch(tmp_path):
    options = [*COMMON, "--device", NAME, "--save-dir", str(tmp_path)]
    args = training.setup.parse_args(train_sgd.get_options(), options)
    data = utils.load_data(args)
    model = training.network.build_model(args, data).train()
    images, _ = next(data.train.epoch())
    with recorded() as events:
        model(images)
    assert sum(event.name == "add" for event in events) == 3  # the residual connections
    counters = [v for name, v in model.state_dict().items() if name.endswith("tracked")]
    assert [int(value) for value in counters] == 7 * [1]


def test_an_epoch_ends_with_five_syncs_at_most(places):
    """Means, loss and norm that are finite, coordinates, and what the test adds up."""
    (short, _), (long, _) = (costs(train_psgd, places, "--epochs", n) for n in (1, 2))
    assert long["sync"] - short["sync"] <= 5
    assert long["copy"] - short["copy"] <= 2  # the order of training and of test images


def test_statistics_are_recomputed_without_a_sync(trajectory):
    model = models.build("resnet8", 10).to(NAME)
    training.network.count_on_host(model)
    batches = [torch.randn(8, 3, 8, 8).to(NAME) for _ in range(3)]
    with recorded() as events:
        training.losses.recompute_statistics(model, batches, False)
    assert {event.kind for event in events} == {"launch"}


def test_pca_is_a_copy_a_block(trajectory):
    """A block is of one parameter, and each is read twice: for the Gram matrix and the basis."""
    samples = utils.load_samples(trajectory, 0, 4)
    names = dldr.parameters.parameter_names(samples[0])
    with recorded() as events:
        utils.pca(samples, 2, names=names, device=NAME)
    assert 0 < sum(event.kind == "copy" for event in events) <= 2 * len(names)


# ------------------------------------------------------------------------- the stand-in itself


def labels_on_the_cpu(patch):
    epoch = utils.TensorLoader.epoch
    patch.setattr(
        utils.TensorLoader, "epoch", lambda *a: ((i, labels.cpu()) for i, labels in epoch(*a))
    )


def pixels_on_the_cpu(patch):
    epoch = utils.TensorLoader.epoch
    patch.setattr(
        utils.TensorLoader, "epoch", lambda *a: ((i.cpu(), labels) for i, labels in epoch(*a))
    )


def matrix_on_the_cpu(patch):
    update = dldr.pbfgs.update_inverse_hessian
    patch.setattr(dldr.pbfgs, "update_inverse_hessian", lambda *a: update(*a).cpu())


def basis_on_the_cpu(patch):
    patch.setattr(models.Subspace, "combine", lambda self, z: z @ self.basis.cpu())


@pytest.mark.parametrize(
    "defect", [labels_on_the_cpu, pixels_on_the_cpu, matrix_on_the_cpu, basis_on_the_cpu]
)
def test_a_mixture_of_devices_is_an_error(defect, places, monkeypatch, capsys):
    defect(monkeypatch)
    call(train_pbfgs, places["cpu"], "cpu")
    with pytest.raises((RuntimeError, SystemExit)) as error:
        call(train_pbfgs, places[NAME], NAME)
    assert "same device" in f"{error.value} {capsys.readouterr().err}"


def test_what_mixes_and_what_does_not():
    """As CUDA has it: numbers on the CPU are taken, and indices there, nothing else."""
    here, there = torch.arange(4.0).to(NAME), torch.arange(4.0)
    for refused in (
        lambda: here + there,
        lambda: there.add_(here),
        lambda: torch.tensor(0.0).add_(here.sum()),
        lambda: there + here.sum(),
        lambda: there[here.long()],
        lambda: torch.cat([here, there]),
        lambda: torch.mm(here[None], there[:, None]),
    ):
        with pytest.raises(RuntimeError):
            refused()
    assert (here + torch.tensor(1.0)).tolist() == [1, 2, 3, 4]
    assert here[torch.tensor([3, 1])].tolist() == [3, 1]


def test_views_share_memory_and_events_are_told():
    with recorded() as events:
        matrix = torch.zeros(2, 3, device=NAME)
        matrix[0].view(3)[1:].add_(1)
        total = float(matrix.sum())
        matrix.t().copy_(torch.ones(3, 2))
    assert total == 2
    assert torch.equal(matrix.cpu(), torch.ones(2, 3))
    assert [(event.kind, event.name) for event in events] == [
        ("launch", "zero_"),
        ("launch", "add"),
        ("launch", "sum"),
        ("sync", "_local_scalar_dense"),
        ("copy", "copy_"),
    ]
    assert {event.line.partition(":")[0] for event in events} == {"tests/on_accelerator.py"}
