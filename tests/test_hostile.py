"""Files that are hostile, broken, or of something else, once a kind.

Oracle: exit code 2, one line on stderr that names the file, no warning, nothing written, no code
run. `Run.epochs` is replaced, so what is let in does not train: it fails the test.
"""

import contextlib
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DIGITS
from PIL import Image
from test_data import write_cifar
from test_options import files
from torchvision import datasets

import models
import report
import reporting.analysis
import reporting.results
import train_pbfgs
import train_psgd
import train_sgd
import training.run
from dldr.reading import read_tensors

SGD, PSGD, PBFGS = train_sgd, train_psgd, train_pbfgs
SAMPLES = ["--params_end", "7", "--n_components", "3"]
HIDDEN = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)


@pytest.fixture(scope="module")
def finished(sampled, tmp_path_factory):
    """A save dir that has runs of all three scripts."""
    ignored = shutil.ignore_patterns("psgd", "pbfgs")
    save_dir = shutil.copytree(sampled, tmp_path_factory.mktemp("hostile") / "run", ignore=ignored)
    for script in (PSGD, PBFGS):
        script.main([*DIGITS, *SAMPLES, "--epochs", "1", "--save-dir", str(save_dir)])
    return save_dir


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    """A copy to break, ./run in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "run")
    return Path("run")


def let_in(*args):
    raise AssertionError("it was let in")


@pytest.fixture
def rejected(tmp_path, refused, monkeypatch, recwarn):
    """Call a script; its one line on stderr, once it is clear that it has done nothing else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training.run.Run, "epochs", let_in)

    def call(script, *options) -> str:
        recwarn.clear()
        before = files(tmp_path)
        line = refused(script.main, options if script is report else [*DIGITS, *options])
        assert files(tmp_path) == before
        shown = [str(w.message) for w in recwarn.list if not issubclass(w.category, HIDDEN)]
        assert shown == [], "each is lines on a terminal"
        return line

    return call


class Exploit:
    """What a pickle would run when it is read by a loader that is not weights-only."""

    def __reduce__(self):
        return Path.touch, (Path("ran"),)


# The files of tensors that are read: the script and the options that read them.
READERS = {
    "run/3.pt": (PSGD, "--overwrite"),
    "run/checkpoint.pt": (SGD, "--resume --epochs 9"),
    "run/pbfgs/checkpoint.pt": (PBFGS, "--resume --epochs 9"),
    "run/psgd/model.th": (PSGD, "--evaluate"),
    "weights.th": (SGD, "--overwrite --pretrained weights.th"),
}


def read_by(file: str) -> tuple:
    """The script that reads a file, and its options."""
    script, options = READERS[file]
    return script, "--save-dir", "run", *(SAMPLES if script is not SGD else []), *options.split()


def old_format(value, file: Path) -> None:
    torch.save(value, file, _use_new_zipfile_serialization=False)


CODE = {
    "a pickle": lambda file: file.write_bytes(pickle.dumps({"state_dict": Exploit()})),
    "an old file": lambda file: old_format({"state_dict": Exploit()}, file),
    "a new file": lambda file: torch.save({"a": torch.zeros(9), "rows": [Exploit()]}, file),
}


@pytest.mark.parametrize("kind", CODE)
def test_code_is_refused_and_does_not_run(kind, run, rejected):
    """Whoever reads it. That it is code is shown by a loader that runs it."""
    for file in READERS:
        whole = Path(file).read_bytes() if Path(file).exists() else b""
        CODE[kind](Path(file))
        assert f"{file}: " in rejected(*read_by(file))
        assert not Path("ran").exists()
        with contextlib.suppress(RuntimeError):
            torch.load(file, weights_only=False)
        Path("ran").unlink()
        Path(file).write_bytes(whole)


def change(file: Path) -> dict:
    """The state dict of another network, wherever a file has one."""
    content = read_tensors(file) if file.exists() else {}
    network = models.build("resnet20", 10).state_dict()
    if "state_dict" not in content:
        return network
    return content | {"state_dict": network, "states": {"model": network}}


BROKEN = {
    "another network": lambda file: torch.save(change(file), file),
    "cut": lambda file: file.write_bytes(Path("run/6.pt").read_bytes()[:-100]),
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("weights"),
    "a number": lambda file: torch.save(3, file),
    "a list": lambda file: torch.save([torch.zeros(3)], file),
}


@pytest.mark.parametrize("file", READERS)
def test_tensors_of_something_else(file, run, rejected):
    for kind, make in BROKEN.items():
        make(Path(file))
        line = rejected(*read_by(file))
        assert f"{file}: " in line, kind
        assert kind != "another network" or "does not fit --arch resnet8" in line


def test_a_directory_or_a_link_to_nothing(run, rejected):
    for file in (Path("run/psgd/model.th"), Path("weights.th")):
        file.unlink(missing_ok=True)
        file.symlink_to("nowhere")
        assert f"{file}: there is no such file" in rejected(*read_by(str(file)))
        file.unlink()
        file.mkdir()
        assert f"{file}: there is no such file" in rejected(*read_by(str(file)))


def test_samples_that_are_not_finite_are_named(run, rejected):
    state = read_tensors(run / "3.pt")
    state["linear.bias"][-1] = float("nan")
    torch.save(state, run / "3.pt")
    line = rejected(PSGD, "--overwrite", "--save-dir", run, *SAMPLES)
    assert "run/3.pt" in line
    assert "not finite" in line


@pytest.mark.parametrize(("one", "other"), [("", "psgd"), ("psgd", "pbfgs")])
def test_a_checkpoint_of_another_script(one, other, run, rejected):
    file = str(run / one / "checkpoint.pt")
    shutil.copy(run / other / "checkpoint.pt", file)
    script, samples = (PSGD, SAMPLES) if one else (SGD, [])
    line = rejected(script, "--resume", "--epochs", "9", "--save-dir", run, *samples)
    assert file in line


# basis.npz, and a basis of the user's own

EXPLOITS = np.array([Exploit(), 1], dtype=object)


def test_a_basis_npz_that_is_code_is_computed_again_and_not_run(run):
    """Oracle: the basis that was in it, and a loader that runs it."""
    file, right = run / "psgd" / "basis.npz", np.load(run / "psgd" / "basis.npz")["basis"]
    source = np.load(file)["computed_from"]
    for content in (
        {"basis": EXPLOITS, "explained_variance_ratio": np.ones(3), "computed_from": source},
        {"basis": right, "explained_variance_ratio": np.ones(3), "computed_from": EXPLOITS},
    ):
        np.savez(file, **content)
        shutil.rmtree(run / "pbfgs")
        PBFGS.main([*DIGITS, *SAMPLES, "--epochs", "1", "--save-dir", str(run)])
        np.testing.assert_array_equal(np.load(run / "pbfgs" / "basis.npz")["basis"], right)
        assert not Path("ran").exists()
    list(np.load(file, allow_pickle=True).values())
    assert Path("ran").exists()


OWN_BASES = {
    "code.npy": lambda file: np.save(file, EXPLOITS),
    "pickle.npz": lambda file: file.write_bytes(pickle.dumps(Exploit())),
    "text.npy": lambda file: file.write_text("no array"),
    "unnamed.npz": lambda file: np.savez(file, np.eye(3, 75290)),
    "complex.npy": lambda file: np.save(file, 1j * np.ones((3, 75290))),
    "vector.npy": lambda file: np.save(file, np.ones(75290)),
    "none.npy": lambda file: np.save(file, np.ones((0, 75290))),
    "nan.npy": lambda file: np.save(file, np.full((3, 75290), np.nan)),
    "twice.npy": lambda file: np.save(file, np.ones((2, 75290))),
}


def test_a_basis_of_one_s_own_that_is_not_one(run, rejected):
    for name, make in OWN_BASES.items():
        make(Path(name))
        line = rejected(PSGD, "--save-dir", run, *SAMPLES, "--basis", name)
        assert f"--basis: {Path(name).absolute()}" in line
        assert not Path("ran").exists()


# config.json and metrics.jsonl

CONFIGS = {
    "torn": b'{"arguments": {"arch": "resn',
    "something else": b'{"arguments": {"color": "red"}}',
    "a list": b"[]",
    "not utf-8": b"\xff\xfe{",
    "too deep": b"[" * 100_000,
}


def test_a_config_that_is_not_one(run, rejected):
    for content in CONFIGS.values():
        (run / "config.json").write_bytes(content)
        line = rejected(PSGD, "--overwrite", "--save-dir", run, *SAMPLES)
        assert "run/config.json: not readable" in line


METRICS = {
    "empty": b"",
    "torn": b'{"epoch": 1, "test_acc": 5',
    "no accuracy": b'{"epoch": 1, "seconds": 1}',
    "not finite": b'{"epoch": 1, "test_acc": NaN, "seconds": 1}',
    "text": b'{"epoch": 1, "test_acc": "good", "seconds": 1}',
}


@pytest.mark.parametrize(
    ("file", "contents"), [("metrics.jsonl", METRICS), ("config.json", CONFIGS)]
)
def test_a_broken_run_is_left_out_of_the_report(file, contents, run):
    """With a line. Oracle: the rest is there; where the trajectory is broken, nothing is."""
    whole = (run / file).read_bytes()
    for kind, content in contents.items():
        problems = []
        (run / "psgd" / file).write_bytes(content)
        methods = {run.method for run in reporting.results.read([run], problems)}
        assert methods == {"SGD", "P-BFGS"}, kind
        assert [problem.partition(": ")[0] for problem in problems] == ["run/psgd"]
        (run / file).write_bytes(content)
        assert reporting.results.read([run], []) == []
        (run / file).write_bytes(whole)


def test_report_runs_no_code(run, undrawn):
    """Oracle: a loader that does."""
    file = run / "psgd" / "basis.npz"
    np.savez(file, **{**np.load(file), "explained_variance_ratio": EXPLOITS})
    report.main([str(run), "--out", "out"])
    assert not Path("ran").exists()
    list(np.load(file, allow_pickle=True).values())
    assert Path("ran").exists()


# Data

FOLDER = ["--datasets", "ImageFolder", "--data-dir", "data", "--save-dir", "new"]


def no_network(*args, **kwargs):
    raise OSError("Name or service not known")


@pytest.fixture
def folder(tmp_path):
    """An ImageFolder, ./data, of two classes of two 8 × 8 images each."""
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for number in range(2):
                image = Image.new("RGB", (8, 8), (100 * number,) * 3)
                image.save(tmp_path / "data" / part / name / f"{number}.png")
    return tmp_path / "data"


IMAGES = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[:40]),
    "text": lambda file: file.write_text("no image"),
    "a bomb": lambda file: Image.new("1", (20000, 10000)).save(file),
    "a link to nothing": lambda file: file.unlink() or file.symlink_to("nowhere"),
}


def test_a_file_that_is_no_image(folder, rejected):
    for make in IMAGES.values():
        make(folder / "test" / "dog" / "1.png")
        line = rejected(SGD, *FOLDER, "--image-size", "8")
        assert "data/test/dog/1.png: not a readable image" in line


@pytest.mark.parametrize("size", ["8", "80"])
def test_classes_that_are_not_in_both_parts(size, folder, rejected):
    """Found without decoding an image, so also where images are streamed."""
    options = [*FOLDER, "--image-size", size]
    for file in (folder / "test" / "dog").iterdir():
        file.unlink()
    assert "Found no valid file for the classes dog" in rejected(SGD, *options)
    shutil.rmtree(folder / "test" / "dog")
    assert "data: in training or test only: dog" in rejected(SGD, *options)
    shutil.rmtree(folder / "test" / "cat")
    assert "any class folder in" in rejected(SGD, *options)
    shutil.rmtree(folder / "train")
    assert "data/train" in rejected(SGD, *options)


def test_a_streamed_file_that_is_no_image(folder, refused, tmp_path, monkeypatch):
    """It is met when it is needed: no epoch is said to be done, and --resume continues."""
    monkeypatch.chdir(tmp_path)
    image = folder / "test" / "dog" / "1.png"
    whole = image.read_bytes()
    image.write_text("no image")
    options = [*DIGITS, *FOLDER, "--image-size", "80", "--workers", "0", "--epochs", "1"]
    assert "data/test/dog/1.png: not a readable image" in refused(SGD.main, options)
    left = {file.name for file in Path("new").iterdir()}
    assert not left & {"metrics.jsonl", "model.th"}
    assert read_tensors(Path("new/checkpoint.pt"))["rows"] == []
    image.write_bytes(whole)
    assert SGD.main([*options, "--resume"])["epoch"] == 1


def write_mnist(directory: Path, **broken: bytes) -> list[str]:
    """MNIST's four files, 12 and 6 images, except for what is broken; the options to read them."""
    raw = directory / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 12), ("t10k", 6)):
        images = struct.pack(">IIII", 0x803, n, 28, 28) + bytes(n * 28 * 28)
        labels = struct.pack(">II", 0x801, n) + bytes(range(n))[:10].ljust(n, b"\0")
        content = {f"{part}_images": images, f"{part}_labels": labels} | broken
        (raw / f"{part}-images-idx3-ubyte").write_bytes(content[f"{part}_images"])
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(content[f"{part}_labels"])
    return ["--datasets", "MNIST", "--data-dir", "data", "--save-dir", "new"]


MNIST = {
    "cut": {"train_images": struct.pack(">IIII", 0x803, 12, 28, 28) + bytes(12 * 28 * 28 - 1)},
    "text": {"train_labels": b"labels, as text"},
    "a label 10": {"train_labels": struct.pack(">II", 0x801, 12) + bytes(11) + b"\x0a"},
    "a label too few": {"train_labels": struct.pack(">II", 0x801, 11) + bytes(11)},
    "20 × 20": {"train_images": struct.pack(">IIII", 0x803, 12, 20, 20) + bytes(4800)},
}


def test_mnist_files_that_are_not(tmp_path, rejected, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    for broken in MNIST.values():
        assert "--data-dir" in rejected(SGD, *write_mnist(tmp_path / "data", **broken))
        shutil.rmtree(tmp_path / "data")


def test_the_files_of_mnist_are_let_in_when_whole(tmp_path, rejected):
    """Else the tests of broken ones would show nothing."""
    with pytest.raises(AssertionError, match="let in"):
        rejected(SGD, *write_mnist(tmp_path / "data"))


def test_code_in_cifar_is_refused_and_does_not_run(rejected, tmp_path, monkeypatch):
    """CIFAR's own files are pickles: torchvision knows them by their MD5."""
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    folder = tmp_path / "data" / datasets.CIFAR10.base_folder
    folder.mkdir(parents=True)
    listed = [*datasets.CIFAR10.train_list, *datasets.CIFAR10.test_list]
    for name in [*(name for name, _ in listed), datasets.CIFAR10.meta["filename"]]:
        (folder / name).write_bytes(pickle.dumps(Exploit()))
    line = rejected(SGD, "--datasets", "CIFAR10", "--data-dir", "data", "--save-dir", "new")
    assert "--datasets CIFAR10: not in --data-dir" in line
    assert not Path("ran").exists()
    pickle.loads((folder / "test_batch").read_bytes())
    assert Path("ran").exists()


def test_a_label_of_cifar_out_of_range(tmp_path, rejected, monkeypatch):
    content = write_cifar(tmp_path / "data", "CIFAR10", monkeypatch)["test_batch"]
    content["labels"][0] = 10
    file = tmp_path / "data" / datasets.CIFAR10.base_folder / "test_batch"
    file.write_bytes(pickle.dumps(content))
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    line = rejected(SGD, "--datasets", "CIFAR10", "--data-dir", "data", "--save-dir", "new")
    assert "--data-dir" in line


def test_weights_that_cannot_be_downloaded(rejected, tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setenv("TORCH_HOME", "/dev/null")
    line = rejected(SGD, "--arch", "resnet18", "--pretrained", "--save-dir", "new")
    assert "--pretrained: " in line
