"""Files that are hostile, broken, or of something else: test_options.py has the plain ones.

Oracle: exit code 2, one line on stderr that names the file, no warning, nothing written, no code
run. `Run.epochs` is replaced, so what is let in does not train: it fails the test.
"""

import contextlib
import io
import json
import pickle
import shutil
import struct
import warnings
from pathlib import Path

import analysis
import engine
import numpy as np
import plots
import pytest
import torch
from conftest import DIGITS
from PIL import Image
from test_data import write_cifar
from test_options import Exploit, files
from torchvision import datasets

import models
import report
import train_pbfgs
import train_psgd
import train_sgd
import utils

SGD, PSGD, PBFGS = train_sgd, train_psgd, train_pbfgs
SAMPLES = ["--params_end", "7", "--n_components", "3"]
HIDDEN = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)
FIRST, STATISTIC = "conv1.weight", "bn1.running_mean"


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
    yield Path("run")
    shutil.rmtree("run")


def let_in(*args):
    raise AssertionError("it was let in")


@pytest.fixture
def rejected(tmp_path, refused, monkeypatch, recwarn):
    """Call a script; its one line on stderr, once it is clear that it has done nothing else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engine.Run, "epochs", let_in)

    def call(script, *options) -> str:
        recwarn.clear()
        before = files(tmp_path)
        line = refused(script.main, options if script is report else [*DIGITS, *options])
        assert files(tmp_path) == before
        shown = [str(w.message) for w in recwarn.list if not issubclass(w.category, HIDDEN)]
        assert shown == [], "each is lines on a terminal"
        return line

    return call


# The files that are read: the script and the options that read them.
READERS = {
    "run/0.pt": (PSGD, "--overwrite"),
    "run/6.pt": (PBFGS, "--overwrite"),
    "run/checkpoint.pt": (SGD, "--resume --epochs 9"),
    "run/psgd/checkpoint.pt": (PSGD, "--resume --epochs 9"),
    "run/pbfgs/checkpoint.pt": (PBFGS, "--resume --epochs 9"),
    "run/model.th": (SGD, "--evaluate"),
    "run/psgd/model.th": (PSGD, "--evaluate"),
    "weights.th": (SGD, "--overwrite --pretrained weights.th"),
    "other.pt": (SGD, "--save-dir new --resume other.pt"),
}


def read_by(file: str) -> tuple:
    """The script that reads a file, and its options."""
    script, options = READERS[file]
    return script, "--save-dir", "run", *(SAMPLES if script is not SGD else []), *options.split()


# Code in files


def old_format(value, file: Path) -> None:
    torch.save(value, file, _use_new_zipfile_serialization=False)


CODE = {
    "a pickle": lambda file: file.write_bytes(pickle.dumps(Exploit(), protocol=2)),
    "an old file": lambda file: old_format({"state_dict": Exploit()}, file),
    "a new file": lambda file: torch.save(Exploit(), file),
    "between tensors": lambda file: torch.save({"a": torch.zeros(9), "rows": [Exploit()]}, file),
}


def test_a_pickled_network_is_told_what_to_save(run, rejected):
    torch.save(models.build("resnet8", 10), "weights.th")
    line = rejected(*read_by("weights.th"))
    assert "weights.th: cannot be read, it holds code" in line
    assert "save the model's state_dict()" in line


@pytest.mark.parametrize("kind", CODE)
@pytest.mark.parametrize("file", READERS)
def test_code_is_refused_and_does_not_run(file, kind, run, rejected):
    """That it is code is shown by a loader that runs it."""
    CODE[kind](Path(file))
    line = rejected(*read_by(file))
    assert f"{file}: cannot be read" in line
    assert not Path("ran").exists()
    with contextlib.suppress(RuntimeError):
        torch.load(file, weights_only=False)
    assert Path("ran").exists()


def change_basis(file: Path, **arrays) -> None:
    """Put arrays in the place of those of a basis.npz; one that is None is left out."""
    content = {**np.load(file), **arrays}
    np.savez(file, **{name: value for name, value in content.items() if value is not None})


EXPLOITS = np.array([Exploit(), 1], dtype=object)
BASIS_CODE = {
    "basis": lambda file: change_basis(file, basis=EXPLOITS),
    "ratios": lambda file: change_basis(file, explained_variance_ratio=EXPLOITS),
    "source": lambda file: change_basis(file, computed_from=EXPLOITS),
    "pickle": lambda file: file.write_bytes(pickle.dumps(Exploit())),
}


def run_code_of(file: Path) -> None:
    """Read all that is in a basis.npz as nobody should."""
    loaded = np.load(file, allow_pickle=True)
    if isinstance(loaded, np.lib.npyio.NpzFile):
        list(loaded.values())


@pytest.mark.parametrize("kind", ["source", "pickle"])
def test_a_basis_of_unknown_source_is_not_used_and_not_run(kind, run, rejected, monkeypatch):
    BASIS_CODE[kind](run / "psgd" / "basis.npz")
    shutil.rmtree(run / "pbfgs")
    with pytest.raises(AssertionError, match="let in"):
        rejected(PBFGS, "--save-dir", run, *SAMPLES)
    assert np.load(run / "pbfgs" / "basis.npz")["basis"].shape == (3, 75290)
    assert not Path("ran").exists()
    run_code_of(run / "psgd" / "basis.npz")
    assert Path("ran").exists()


@pytest.mark.parametrize("kind", ["ratios", "pickle"])
def test_report_runs_no_code(kind, run, monkeypatch):
    BASIS_CODE[kind](run / "psgd" / "basis.npz")
    monkeypatch.setattr(analysis, "GRID", 2)
    report.main([str(run), "--out", "out"])
    assert not Path("ran").exists()
    run_code_of(run / "psgd" / "basis.npz")
    assert Path("ran").exists()


@pytest.fixture
def left_out(run, rejected, capsys, monkeypatch):
    """Report ./run, of which a run, or all of it, has been broken; oracle: the rest is there."""
    monkeypatch.setattr(plots, "image", lambda figure, kind: b"")

    def call(directory: str) -> None:
        if directory == "run":
            assert "nothing to report: run: " in rejected(report, run)
            return
        table = report.main([str(run), "--no-data", "--out", "out"])
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"report.py: skipped: {directory}: ")
        assert {row["method"] for row in table} >= {"SGD", "P-BFGS"}

    return call


def cut_archive(file: Path) -> None:
    np.savez(file, basis=np.eye(3, 75290, dtype=np.float32))
    file.write_bytes(file.read_bytes()[:-100])


def array_header(shape: tuple) -> bytes:
    stream = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue()


# A basis of the user's own, and whether it is code.
OWN_BASES = {
    "code.npy": (lambda file: np.save(file, EXPLOITS), True),
    "code.npz": (lambda file: np.savez(file, basis=EXPLOITS), True),
    "pickle.npz": (lambda file: file.write_bytes(pickle.dumps(Exploit())), True),
    "empty.npy": (lambda file: file.write_bytes(b""), False),
    "cut.npz": (cut_archive, False),
    "unnamed.npz": (lambda file: np.savez(file, np.eye(3, 75290)), False),
    "strings.npy": (lambda file: np.save(file, np.array(["a", "b"])), False),
    "vector.npy": (lambda file: np.save(file, np.ones(75290)), False),
    "transposed.npy": (lambda file: np.save(file, np.eye(75290, 3)), False),
    "nan.npy": (lambda file: np.save(file, np.full((3, 75290), np.nan)), False),
    "directory.npy": (lambda file: file.mkdir(), False),
    "huge.npy": (lambda file: file.write_bytes(array_header((10**7, 10**9))), False),
}


@pytest.mark.parametrize("name", OWN_BASES)
def test_a_basis_of_one_s_own_that_is_not_one(name, run, rejected):
    make, code = OWN_BASES[name]
    make(Path(name))
    line = rejected(PSGD, "--save-dir", run, *SAMPLES, "--basis", name)
    assert "--basis: " in line
    assert name in line
    assert not Path("ran").exists()
    if code:
        run_code_of(Path(name))
        assert Path("ran").exists()


def test_code_in_cifar_is_refused_and_does_not_run(rejected, tmp_path, monkeypatch):
    """CIFAR's own files are pickles: torchvision knows them by their MD5."""
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    folder = tmp_path / "data" / datasets.CIFAR10.base_folder
    folder.mkdir(parents=True)
    listed = [*datasets.CIFAR10.train_list, *datasets.CIFAR10.test_list]
    for name in [*(name for name, _ in listed), datasets.CIFAR10.meta["filename"]]:
        (folder / name).write_bytes(pickle.dumps(Exploit()))
    line = rejected(SGD, "--datasets", "CIFAR10", "--data-dir", "data", "--save-dir", "new")
    assert "--datasets CIFAR10: not in --data-dir data" in line
    assert not Path("ran").exists()
    pickle.loads((folder / "test_batch").read_bytes())
    assert Path("ran").exists()


def no_network(*args, **kwargs):
    raise OSError("Name or service not known")


# Weights

STATE_DICT, FITS, WHOLE = ("holds no state dict", "does not fit --arch resnet8", "cannot be read")
# What is saved in the place of a state dict, and what the line says.
WEIGHTS = {
    "nothing": (lambda state: None, STATE_DICT),
    "a string": (lambda state: "weights", STATE_DICT),
    "a list": (lambda state: list(state.values()), STATE_DICT),
    "a tensor": (lambda state: state[FIRST], STATE_DICT),
    "strings": (lambda state: dict.fromkeys(state, "x"), STATE_DICT),
    "a number in it": (lambda state: state | {FIRST: 1.0}, STATE_DICT),
    "too deep": (lambda state: {"state_dict": {"state_dict": state}}, STATE_DICT),
    "state_dict nothing": (lambda state: {"state_dict": None}, STATE_DICT),
    "state_dict a list": (lambda state: {"state_dict": list(state.values())}, STATE_DICT),
    "an empty dict": (lambda state: {}, FITS),
    "one missing": (lambda state: {k: v for k, v in state.items() if k != FIRST}, FITS),
    "one more": (lambda state: state | {"more": torch.zeros(2)}, "see more"),
    "a scalar": (lambda state: state | {FIRST: torch.tensor(1.0)}, f"see {FIRST}"),
    "transposed": (lambda state: state | {FIRST: state[FIRST].mT.movedim(0, 1)}, f"see {FIRST}"),
    "more classes": (lambda state: models.build("resnet8", 11).state_dict(), "see linear.weight"),
    "another network": (lambda state: models.build("resnet20", 10).state_dict(), FITS),
}
BYTES = {
    "cut to a tenth": lambda content: content[: len(content) // 10],
    "cut in half": lambda content: content[: len(content) // 2],
    "without its start": lambda content: content[1000:],
    "zeros": lambda content: bytes(5000),
    "random": lambda content: np.random.default_rng(0).bytes(5000),
    "another archive": lambda content: Path("run/psgd/basis.npz").read_bytes(),
    "json": lambda content: b"{}",
}
WEIGHTS_FILES = ["run/0.pt", "run/psgd/model.th", "weights.th"]


def save_weights(name: str, file: str, table: dict) -> None:
    """Write what the table has under the name."""
    torch.save(table[name][0](dict(utils.read_tensors(Path("run/3.pt")))), file)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("file", WEIGHTS_FILES)
def test_weights_of_something_else(file, name, run, rejected):
    save_weights(name, file, WEIGHTS)
    line = rejected(*read_by(file))
    assert f"{file}: " in line
    assert WEIGHTS[name][1] in line


@pytest.mark.parametrize("name", BYTES)
@pytest.mark.parametrize("file", [*WEIGHTS_FILES, "run/psgd/checkpoint.pt"])
def test_bytes_of_something_else(file, name, run, rejected):
    Path(file).write_bytes(BYTES[name](Path("run/3.pt").read_bytes()))
    assert f"{file}: {WHOLE}" in rejected(*read_by(file))


@pytest.mark.parametrize("file", ["run/psgd/model.th", "weights.th", "run/psgd/checkpoint.pt"])
def test_a_directory_or_a_link_to_nothing(file, run, rejected):
    Path(file).unlink(missing_ok=True)
    if "checkpoint" not in file:  # there, it is a run that has none yet
        Path(file).symlink_to("nowhere")
        assert f"{file}: there is no such file" in rejected(*read_by(file))
        Path(file).unlink()
    Path(file).mkdir()
    assert f"{file}: there is no such file" in rejected(*read_by(file))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("number", [0, 3, 6])
def test_samples_that_are_not_finite(number, value, run, rejected):
    state = utils.read_tensors(run / f"{number}.pt")
    state["linear.bias"][-1] = value
    torch.save(state, run / f"{number}.pt")
    assert "not finite" in rejected(PSGD, "--overwrite", "--save-dir", run, *SAMPLES)


# Checkpoints


def edit(file: Path, *path, **value) -> None:
    """Set, or without a value delete, what is in a torch or json file under a path of keys."""
    as_json = file.suffix == ".json"
    content = json.loads(file.read_text()) if as_json else utils.read_tensors(file)
    part = content
    for key in path[:-1]:
        part = part[key]
    if value:
        part[path[-1]] = value["to"]
    else:
        del part[path[-1]]
    if as_json:
        file.write_text(json.dumps(content))
    else:
        torch.save(content, file)


@pytest.mark.parametrize("part", ["states", "rows"])
@pytest.mark.parametrize("file", ["run/checkpoint.pt", "run/pbfgs/checkpoint.pt"])
def test_a_checkpoint_that_lacks_a_part(file, part, run, rejected):
    edit(Path(file), part)
    assert f"{file}: not a checkpoint.pt of these scripts" in rejected(*read_by(file))


@pytest.mark.parametrize("name", ["0.pt", "psgd/model.th"])
def test_a_checkpoint_that_is_a_weights_file(name, run, rejected):
    file = "run/psgd/checkpoint.pt"
    shutil.copy(run / name, file)
    assert f"{file}: not a checkpoint.pt of these scripts" in rejected(*read_by(file))


@pytest.mark.parametrize("basis", [None, 3, "x" * 64])
def test_a_checkpoint_of_another_basis(basis, run, rejected):
    edit(run / "psgd" / "checkpoint.pt", "basis", to=basis)
    line = rejected(*read_by("run/psgd/checkpoint.pt"))
    assert "run/psgd/checkpoint.pt was made from other samples" in line


@pytest.mark.parametrize(("one", "other"), [("", "psgd"), ("psgd", ""), ("pbfgs", "")])
def test_a_checkpoint_of_another_script(one, other, run, rejected):
    file = f"run/{one}/checkpoint.pt".replace("//", "/")
    shutil.copy(run / other / "checkpoint.pt", file)
    line = rejected(*read_by(file))
    assert file in line


@pytest.mark.parametrize("value", [None, "resnet8 ", ["resnet8"], {"a": 1}, float("nan"), 10**400])
def test_a_checkpoint_of_other_arguments(value, run, rejected):
    edit(run / "checkpoint.pt", "arguments", "arch", to=value)
    line = rejected(*read_by("run/checkpoint.pt"))
    assert "--arch: resnet8 here, " in line
    assert "run/checkpoint.pt" in line


# config.json and metrics.jsonl

CONFIGS = {
    "null": b"null",
    "a number": b"3",
    "a string": b'"arguments"',
    "a list": b"[]",
    "no arguments": b"{}",
    "arguments null": b'{"arguments": null}',
    "arguments a number": b'{"arguments": 3}',
    "empty": b"",
    "not utf-8": b"\xff\xfe{",
    "torn": b'{"arguments": {"arch": "resn',
    "two": b'{"arguments": {}}{"arguments": {}}',
    "too many digits": b'{"arguments": {"randomseed": 1' + 5000 * b"0" + b"}}",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_is_not_one(name, run, rejected):
    (run / "config.json").write_bytes(CONFIGS[name])
    line = rejected(PSGD, "--overwrite", "--save-dir", run, *SAMPLES)
    assert "run/config.json: not readable" in line


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("corrupt", "0.0"),
        ("corrupt", None),
        ("corrupt", [0]),
        ("corrupt", float("inf")),
        ("corrupt", float("nan")),
        ("randomseed", 10**400),
        ("arch", {"resnet8": 1}),
        ("arch", "resnet8\nresnet8"),
        ("datasets", ["digits"]),
        ("smalldatasets", 0),
    ],
)
def test_a_config_of_other_values(key, value, run, rejected):
    edit(run / "config.json", "arguments", key, to=value)
    line = rejected(PSGD, "--overwrite", "--save-dir", run, *SAMPLES)
    assert f"--{key}: " in line
    assert "run/config.json" in line


METRICS = {
    "empty": "",
    "an empty line": "\n",
    "an empty row": "{}",
    "torn": '{"epoch": 1, "test_acc": 5',
    "no number": '{"epoch": 1, "test_acc": , "seconds": 1}',
    "no accuracy": '{"epoch": 1, "seconds": 1}',
    "no seconds": '{"epoch": 1, "test_acc": 50}',
}


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("directory", ["run", "run/psgd"])
def test_report_of_metrics_that_are_not(directory, name, left_out):
    Path(directory, "metrics.jsonl").write_text(METRICS[name])
    left_out(directory)


REPORTED = {
    "not utf-8": lambda run: (run / "metrics.jsonl").write_bytes(b"\xff"),
    "config empty": lambda run: (run / "config.json").write_text(""),
    "config torn": lambda run: (run / "config.json").write_bytes(CONFIGS["torn"]),
    "no arguments": lambda run: (run / "config.json").write_text("{}"),
    "no datasets": lambda run: edit(run / "config.json", "arguments", "datasets"),
    "corrupt a string": lambda run: edit(run / "config.json", "arguments", "corrupt", to="some"),
    "config null": lambda run: (run / "config.json").write_text("null"),
    "config a list": lambda run: (run / "config.json").write_text("[]"),
    "config too deep": lambda run: (run / "config.json").write_bytes(EDITED_CONFIGS["too deep"]),
    "arguments a list": lambda run: edit(run / "config.json", "arguments", to=[]),
    "corrupt nothing": lambda run: edit(run / "config.json", "arguments", "corrupt", to=None),
    "a row a list": lambda run: (run / "metrics.jsonl").write_text("[]"),
}
PSGD_REPORTED = {
    "no config": lambda run: (run / "config.json").unlink(),
    "no samples": lambda run: edit(run / "config.json", "samples"),
    "other arch": lambda run: edit(run / "config.json", "arguments", "arch", to="vgg11"),
    "a row a number": lambda run: (run / "metrics.jsonl").write_text("3"),
}


@pytest.mark.parametrize("name", REPORTED)
def test_report_of_broken_files(name, left_out):
    REPORTED[name](Path("run"))
    left_out("run")


@pytest.mark.parametrize("name", PSGD_REPORTED)
def test_report_of_broken_files_of_a_run_on_samples(name, left_out):
    PSGD_REPORTED[name](Path("run/psgd"))
    left_out("run/psgd")


# Data

FOLDER = ["--datasets", "ImageFolder", "--data-dir", "data", "--save-dir", "new"]


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


def link_to_nothing(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere")


IMAGES = {
    "text": lambda file: file.write_text("no image"),
    "zeros": lambda file: file.write_bytes(bytes(100)),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:40]),
    "a link to nothing": link_to_nothing,
    "a bomb": lambda file: Image.new("1", (20000, 10000)).save(file),
}


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("part", ["train", "test"])
def test_a_file_that_is_no_image(part, name, folder, rejected):
    IMAGES[name](folder / part / "dog" / "1.png")
    line = rejected(SGD, *FOLDER, "--image-size", "8")
    assert f"--data-dir: data/{part}/dog/1.png: not a readable image" in line


@pytest.mark.parametrize("size", ["8", "80"])
def test_classes_that_are_not_in_both_parts(size, folder, rejected):
    """Found without decoding an image, so also where images are streamed."""
    options = [*FOLDER, "--image-size", size]
    for file in (folder / "test" / "dog").iterdir():
        file.unlink()
    assert "Found no valid file for the classes dog" in rejected(SGD, *options)
    (folder / "test" / "dog" / "notes.txt").write_text("no image")
    assert "Found no valid file for the classes dog" in rejected(SGD, *options)
    shutil.rmtree(folder / "test" / "dog")
    assert "--data-dir data: in training or test only: dog" in rejected(SGD, *options)
    shutil.rmtree(folder / "test" / "cat")
    assert "any class folder in data/test" in rejected(SGD, *options)
    shutil.rmtree(folder / "train")
    (folder / "train").write_text("no directory")
    assert "--data-dir data: has no directory data/train" in rejected(SGD, *options)


def test_a_streamed_file_that_is_no_image(folder, refused, tmp_path, monkeypatch):
    """It is found when it is needed: no epoch is said to be done, and --resume continues."""
    monkeypatch.chdir(tmp_path)
    image = folder / "test" / "dog" / "1.png"
    whole = image.read_bytes()
    image.write_text("no image")
    options = [*DIGITS, *FOLDER, "--image-size", "80", "--workers", "0", "--epochs", "1"]
    assert "data/test/dog/1.png: not a readable image" in refused(SGD.main, options)
    left = {file.name for file in Path("new").iterdir()}
    assert not left & {"metrics.jsonl", "model.th"}
    assert utils.read_tensors(Path("new/checkpoint.pt"))["rows"] == []
    image.write_bytes(whole)
    assert SGD.main([*options, "--resume"])["epoch"] == 1


def write_mnist(directory: Path, **broken: bytes) -> list[str]:
    """MNIST's four files, 12 and 6 images, but for what is broken; the options that read them."""
    raw = directory / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 12), ("t10k", 6)):
        images = struct.pack(">IIII", 0x803, n, 28, 28) + bytes(n * 28 * 28)
        labels = struct.pack(">II", 0x801, n) + bytes(range(n))[:10].ljust(n, b"\0")
        content = {f"{part}_images": images, f"{part}_labels": labels} | broken
        (raw / f"{part}-images-idx3-ubyte").write_bytes(content[f"{part}_images"])
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(content[f"{part}_labels"])
    return ["--datasets", "MNIST", "--data-dir", "data", "--save-dir", "new"]


IMAGES_OF_12 = struct.pack(">IIII", 0x803, 12, 28, 28) + bytes(12 * 28 * 28)
MNIST = {
    "cut": {"train_images": IMAGES_OF_12[:-1]},
    "more": {"train_images": IMAGES_OF_12 + bytes(1)},
    "empty": {"t10k_images": b""},
    "no images": {"train_images": struct.pack(">IIII", 0x803, 0, 28, 28)},
    "text": {"train_labels": b"labels, as text"},
    "a header too large": {"train_images": struct.pack(">IIII", 0x803, 2**32 - 1, 28, 28)},
    "images of one dimension": {"train_images": struct.pack(">II", 0x801, 12) + bytes(12)},
    "labels of three": {"t10k_labels": struct.pack(">IIII", 0x803, 6, 1, 1) + bytes(6)},
}


@pytest.mark.parametrize("name", MNIST)
def test_mnist_files_that_are_not(name, tmp_path, rejected, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    line = rejected(SGD, *write_mnist(tmp_path / "data", **MNIST[name]))
    assert "--datasets MNIST: not in --data-dir data" in line


def test_the_files_of_mnist_are_let_in_when_whole(tmp_path, rejected):
    """Else the tests of broken ones would show nothing."""
    with pytest.raises(AssertionError, match="let in"):
        rejected(SGD, *write_mnist(tmp_path / "data"))


def test_weights_that_cannot_be_downloaded(rejected, tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setenv("TORCH_HOME", "/dev/null")
    line = rejected(SGD, "--arch", "resnet18", "--pretrained", "--save-dir", "new")
    assert "--pretrained: " in line


# What a person has edited, or a disk has changed


def test_a_pickle_of_today_is_one_line(run, rejected):
    """torch warns of pickle protocols above 2, in two lines more."""
    Path("weights.th").write_bytes(pickle.dumps({"state_dict": Exploit()}))
    assert f"weights.th: {WHOLE}" in rejected(*read_by("weights.th"))
    assert not Path("ran").exists()


def quantized(tensor):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


EDITED_WEIGHTS = {
    "numbers as names": lambda state: dict(enumerate(state.values())),
    "complex": lambda state: state | {FIRST: state[FIRST].to(torch.complex64)},
    "whole numbers": lambda state: state | {FIRST: state[FIRST].long()},
    "sparse": lambda state: state | {FIRST: state[FIRST].to_sparse()},
    "without values": lambda state: state | {FIRST: state[FIRST].to("meta")},
    "quantized": lambda state: state | {FIRST: quantized(state[FIRST])},
    "nan in a parameter": lambda state: state | {FIRST: state[FIRST] * float("nan")},
    "inf in a statistic": lambda state: state | {STATISTIC: state[STATISTIC] + float("inf")},
}


@pytest.mark.parametrize("name", EDITED_WEIGHTS)
@pytest.mark.parametrize("file", ["run/0.pt", "weights.th"])
def test_weights_of_another_kind(file, name, run, rejected):
    torch.save(EDITED_WEIGHTS[name](dict(utils.read_tensors(run / "3.pt"))), file)
    assert f"{file}: " in rejected(*read_by(file))


# Where in a checkpoint what is put; where nothing is, the place is deleted.
EDITED_CHECKPOINTS = [
    (["states"], [None]),
    (["states"], [[]]),
    (["states", "model"], []),
    (["states", "model"], [None]),
    (["states", "model", FIRST], ["weights"]),
    (["states", "model", FIRST], [torch.full((16, 3, 3, 3), float("nan"))]),
    (["states", "optimizer"], []),
    (["states", "optimizer"], [None]),
    (["states", "optimizer"], [{}]),
    (["states", "optimizer", "param_groups"], [[]]),
    (["states", "optimizer", "state", 0, "momentum_buffer"], [torch.zeros(2, 2)]),
    (["states", "optimizer", "state", 0, "momentum_buffer"], [torch.full((16, 3, 3, 3), np.nan)]),
    (["states", "optimizer", "state", 0, "momentum_buffer"], ["x"]),
    (["states", "optimizer", "state", 0, "momentum_buffer"], [3]),
    (["states", "optimizer", "state", 0], [[1]]),
    (["progress"], [None]),
    (["progress"], [{"batches": "3"}]),
    (["progress"], [{"batches": 2, "seconds": "long"}]),
    (["progress"], [{"batches": 2, "totals": {"loss": float("nan")}}]),
    (["rows"], [None]),
    (["rows"], [3]),
    (["rows"], [["a", "b"]]),
    (["rows", -1, "epoch"], []),
    (["rows", -1, "epoch"], ["six"]),
    (["arguments"], [None]),
    (["arguments"], [3]),
    (["arguments"], [{}]),
    (["arguments"], [["arch"]]),
    (["arguments", "corrupt"], [torch.zeros(3)]),
]


@pytest.mark.parametrize(
    ("path", "value"),
    EDITED_CHECKPOINTS,
    ids=["/".join(map(str, c[0])) for c in EDITED_CHECKPOINTS],
)
def test_an_edited_checkpoint(path, value, run, rejected):
    """A momentum buffer of another shape makes fused SGD write beyond it: the program crashes."""
    edit(run / "checkpoint.pt", *path, **({"to": value[0]} if value else {}))
    assert "run/checkpoint.pt" in rejected(*read_by("run/checkpoint.pt"))


@pytest.mark.parametrize(("one", "other"), [("psgd", "pbfgs"), ("pbfgs", "psgd")])
def test_a_checkpoint_of_the_other_subspace_script(one, other, run, rejected):
    shutil.copy(run / other / "checkpoint.pt", run / one / "checkpoint.pt")
    file = f"run/{one}/checkpoint.pt"
    assert file in rejected(*read_by(file))


def change_bytes(file: Path) -> None:
    """Change values of the basis behind the back of the archive's checksum."""
    content = bytearray(file.read_bytes())
    content[2000:2100] = bytes(100)
    file.write_bytes(content)


EDITED_BASES = {
    "code in the basis": BASIS_CODE["basis"],
    "code in the ratios": BASIS_CODE["ratios"],
    "no basis": lambda file: change_basis(file, basis=None),
    "strings": lambda file: change_basis(file, basis=np.array(["a", "b"])),
    "other n": lambda file: change_basis(file, basis=np.eye(3, 75289, dtype=np.float32)),
    "other k": lambda file: change_basis(file, basis=np.eye(2, 75290, dtype=np.float32)),
    "one vector": lambda file: change_basis(file, basis=np.ones(75290, dtype=np.float32)),
    "not finite": lambda file: change_basis(file, basis=np.full((3, 75290), np.nan, np.float32)),
    "other bytes": change_bytes,
    "an array": lambda file: file.write_bytes(array_header((2, 3)) + bytes(24)),
}


@pytest.mark.parametrize("name", EDITED_BASES)
def test_a_basis_that_is_not_one_is_computed_again(name, run):
    """It says that it is of these samples, and P-BFGS would take it from P-SGD."""
    right = np.load(run / "psgd" / "basis.npz")["basis"]
    EDITED_BASES[name](run / "psgd" / "basis.npz")
    shutil.rmtree(run / "pbfgs")
    PBFGS.main([*DIGITS, *SAMPLES, "--epochs", "1", "--save-dir", str(run)])
    np.testing.assert_array_equal(np.load(run / "pbfgs" / "basis.npz")["basis"], right)
    assert not Path("ran").exists()


EDITED_CONFIGS = {
    "arguments a list": b'{"arguments": []}',
    "arguments a string": b'{"arguments": "none"}',
    "arguments empty": b'{"arguments": {}}',
    "arguments of something else": b'{"arguments": {"color": "red"}}',
    "too deep": b"[" * 100_000,
}


@pytest.mark.parametrize("name", EDITED_CONFIGS)
def test_a_config_that_tells_nothing(name, run, rejected):
    (run / "config.json").write_bytes(EDITED_CONFIGS[name])
    assert "run/config.json" in rejected(PSGD, "--overwrite", "--save-dir", run, *SAMPLES)


@pytest.mark.parametrize("key", ["arch", "datasets", "randomseed", "smalldatasets"])
def test_a_config_that_lacks_a_key(key, run, rejected):
    edit(run / "config.json", "arguments", key)
    assert "run/config.json" in rejected(PSGD, "--overwrite", "--save-dir", run, *SAMPLES)


def test_a_config_that_is_a_directory(run, rejected):
    (run / "config.json").unlink()
    (run / "config.json").mkdir()
    assert "run/config.json" in rejected(PSGD, "--overwrite", "--save-dir", run, *SAMPLES)


EDITED_ROWS = [("test_acc", "good"), ("test_acc", None), ("test_acc", [1]), ("test_acc", 9**999)]
EDITED_ROWS += [("seconds", "long"), ("epoch", "six")]


@pytest.mark.parametrize(("key", "value"), EDITED_ROWS)
def test_report_of_metrics_of_another_type(key, value, run, left_out):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [json.dumps(row | {key: value}) for row in rows]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    left_out("run")


EDITED_MNIST = {
    "a training label 10": {"train_labels": struct.pack(">II", 0x801, 12) + bytes(11) + b"\x0a"},
    "a test label 255": {"t10k_labels": struct.pack(">II", 0x801, 6) + bytes(5) + b"\xff"},
    "a label too many": {"train_labels": struct.pack(">II", 0x801, 13) + bytes(13)},
    "a label too few": {"train_labels": struct.pack(">II", 0x801, 11) + bytes(11)},
    "images of 20 × 20": {"train_images": struct.pack(">IIII", 0x803, 12, 20, 20) + bytes(4800)},
}


@pytest.mark.parametrize("name", EDITED_MNIST)
def test_mnist_files_that_do_not_fit_each_other(name, tmp_path, rejected):
    line = rejected(SGD, *write_mnist(tmp_path / "data", **EDITED_MNIST[name]))
    assert "--data-dir data" in line


def test_a_label_of_cifar_out_of_range(tmp_path, rejected, monkeypatch):
    content = write_cifar(tmp_path / "data", "CIFAR10", monkeypatch)["test_batch"]
    content["labels"][0] = 10
    file = tmp_path / "data" / datasets.CIFAR10.base_folder / "test_batch"
    file.write_bytes(pickle.dumps(content))
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    line = rejected(SGD, "--datasets", "CIFAR10", "--data-dir", "data", "--save-dir", "new")
    assert "--data-dir data" in line


@pytest.mark.parametrize("number", [0, 3])
def test_samples_that_are_not_finite_are_named(number, run, rejected):
    state = utils.read_tensors(run / f"{number}.pt")
    state["linear.bias"][-1] = float("nan")
    torch.save(state, run / f"{number}.pt")
    line = rejected(PSGD, "--overwrite", "--save-dir", run, *SAMPLES)
    assert f"run/{number}.pt" in line
