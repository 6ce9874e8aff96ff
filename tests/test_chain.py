"""A subspace run takes from its trajectory what its command leaves open. Oracle: config.json."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import DIGITS
from PIL import Image

import train_pbfgs
import train_psgd
import train_sgd
import training.setup
import training.subspaces
from training.records import SHARED


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """An ImageFolder of two classes of 20 + 4 images of 12 × 12 pixels."""
    directory, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, n in (("train", 20), ("test", 4)):
        for number, name in enumerate(("cat", "dog")):
            (directory / part / name).mkdir(parents=True)
            for image in range(n):
                pixels = random.integers(128, size=(12, 12, 3)) + 127 * number
                Image.fromarray(pixels.astype(np.uint8)).save(
                    directory / part / name / f"{image}.png"
                )
    return directory


def arguments(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())["arguments"]


@pytest.fixture
def save_dir(images, tmp_path):
    """A trajectory of four samples whose options are all other than the defaults."""
    options = ["--datasets", "ImageFolder", "--data-dir", images, "--image-size", "10"]
    options += ["--arch", "resnet8", "--corrupt", "0.3", "--smalldatasets", "0.5"]
    options += ["--randomseed", "7", "--epochs", "3", "--lr", "0.01"]
    options += ["--mean", "0.5", "0.4", "0.3", "--std", "0.2", "0.2", "0.1", "--no-augment"]
    train_sgd.main([str(word) for word in [*options, "--save-dir", tmp_path / "run"]])
    return tmp_path / "run"


def test_what_a_command_leaves_open_is_as_it_was_for_the_samples(save_dir, refused, capsys):
    capsys.readouterr()
    short = ["--save-dir", str(save_dir), "--epochs", "1"]
    train_psgd.main(short)
    first, *_ = capsys.readouterr().out.splitlines()
    for word in ("0, 1, …, 3", "--params_end 4", "--n_components 3", "resnet8 on ImageFolder"):
        assert word in first
    train_pbfgs.main([*short, "--n_components", "2"])
    train_sgd.main(["--save-dir", str(save_dir), "--average", "1", "4"])
    sgd = arguments(save_dir)
    for run in ("psgd", "pbfgs", "average"):
        own = arguments(save_dir / run)
        for name in (*SHARED, "data_dir"):
            assert own[name] == sgd[name], (run, name)
    assert arguments(save_dir / "psgd")["n_components"] == 3
    assert arguments(save_dir / "pbfgs")["n_components"] == 2
    assert json.loads((save_dir / "psgd" / "config.json").read_text())["samples"] == [0, 1, 2, 3]

    train_psgd.main([*short, "--epochs", "2", "--resume"])
    tested = train_psgd.main(["--save-dir", str(save_dir), "--evaluate"])
    last = (save_dir / "psgd" / "metrics.jsonl").read_text().splitlines()[-1]
    assert tested["test_acc"] == json.loads(last)["test_acc"]
    for option, value in (("corrupt", 0.2), ("randomseed", 1), ("arch", "resnet20")):
        line = refused(train_psgd.main, [*short, "--overwrite", f"--{option}", value])
        assert f"--{option}: {value} here, {sgd[option]} in {save_dir}/config.json" in line


@pytest.mark.parametrize(
    ("there", "cases"),
    [
        (
            151,
            {
                "": (51, 40),
                "--params_end 81": (81, 40),
                "--params_end 21": (21, 20),
                "--params_stride 5": (51, 10),
                "--n_components 60 --params_end 61": (61, 60),
            },
        ),
        (41, {"": (41, 40)}),
        (40, {"": (40, 39)}),
        (2, {"": (2, 1)}),
    ],
)
def test_samples_and_directions_are_as_published_where_there_are_as_many(
    there, cases, sampled, tmp_path
):
    for number in range(there):
        os.link(sampled / "6.pt", tmp_path / f"{number}.pt")
    for options, taken in cases.items():
        command = [*DIGITS, "--save-dir", str(tmp_path), *options.split()]
        args = training.setup.parse_args(train_psgd.get_options(), command)
        samples = training.subspaces.load_subspace_samples(args)
        assert (args.params_end, args.n_components) == taken
        assert len(samples) == len(range(0, args.params_end, args.params_stride))


def test_a_network_to_import_is_not_taken_from_a_file(save_dir, refused, tmp_path, monkeypatch):
    """Else a config.json could run code; oracle: a module that leaves a file."""
    (tmp_path / "mine.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    config = json.loads((save_dir / "config.json").read_text())
    config["arguments"]["arch"] = "mine:network"
    (save_dir / "config.json").write_text(json.dumps(config))
    line = refused(train_psgd.main, ["--save-dir", save_dir])
    assert "--arch: has to be given; it is mine:network in" in line
    assert not Path("ran").exists()
