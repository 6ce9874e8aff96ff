"""./run.sh gpu in its small size, and the tables of ./run.sh bench.

Oracles: here the device is the CPU, so its numbers are right; the tables that were recorded.
"""

import itertools
import json
import re
import warnings
from functools import partial
from types import SimpleNamespace

import bench
import bench_step
import checks
import gpu
import pytest
import torch
from common import FAILED, Page
from conftest import ROOT

import train_pbfgs
import train_sgd
import training.losses
import utils

pytestmark = pytest.mark.usefixtures("settings_as_they_were")


def tables(page: str) -> dict[str, list[list[str]]]:
    """The cells of each table, by the section's title."""
    sections = re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    lines = {title: re.findall(r"^\| (.*) \|$", text, re.MULTILINE) for title, text in sections}
    return {title: [line.split(" | ") for line in rows] for title, rows in lines.items()}


def test_the_page_tells_checks_and_measurements(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what it sets would stay set
    assert gpu.main(["--out", str(tmp_path)]) == 0
    page = (tmp_path / "README.md").read_text()
    assert capsys.readouterr().out == page
    assert f"torch {torch.__version__}" in page
    assert "\n0 failed; " in page
    found = tables(page)
    assert {title: len(rows) - 2 for title, rows in found.items()} == {
        "Checks": 2 * 2 + 3 * 2, "Step": 4, "PCA": 1, "Data": 3
    }  # fmt: skip
    assert all(row[-1] == "ok" for title in ("Checks", "PCA") for row in found[title][2:])
    assert [row[2] for row in found["Step"][2:]] == ["bare network", "SGD", "P-SGD", "P-BFGS"]
    for row in found["Step"][2:]:
        median, low, high = map(float, re.split(r" \(|–", row[3].replace(",", "").rstrip(")")))
        assert 0 < low <= median <= high


def test_numbers_of_another_kind_fail(tmp_path, patch):
    """On the device losses are 1 % too large, and a resumed run has lost its momentum."""
    cross_entropy = training.losses.cross_entropy

    def wrong(model, images, labels, half):
        loss, logits = cross_entropy(model, images, labels, half)
        device = images.is_contiguous(memory_format=torch.channels_last)
        return loss * (1.01 if device else 1), logits

    patch("cross_entropy", wrong)
    patch("load_optimizer", lambda *arguments: None)
    rows = list(itertools.islice(checks.training(tmp_path), 2))
    assert [row[0] for row in rows] == [
        "SGD: training loss of epoch 1", "SGD: resumed minus unbroken"
    ]  # fmt: skip
    assert all(row[-1] == FAILED for row in rows), rows


def test_each_host_sync_is_counted(tmp_path, monkeypatch):
    """A CUDA of warnings: one a trial, as it should be, and one a step of SGD too many."""
    warn = partial(warnings.warn, "called a synchronizing CUDA operation")
    for module, name in ((train_sgd, "cross_entropy"), (train_pbfgs.Batch, "evaluate")):
        original = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *given, original=original: warn() or original(*given)
        )
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    monkeypatch.setitem(utils.DATASETS, "CIFAR10", bench.synthetic(gpu.SMALL.images))
    monkeypatch.delitem(checks.METHODS, "P-SGD")
    same = f"--datasets CIFAR10 --arch resnet8 --batch-size {gpu.SMALL.images // 8}"
    sgd, pbfgs = checks.host_syncs(same, tmp_path)
    assert (sgd[3], sgd[-1]) == ("1.0e+00", FAILED)
    assert (pbfgs[3], pbfgs[-1]) == ("0.0e+00", "ok")


def test_fewer_digits_than_said_fail(monkeypatch):
    """The third evaluation, the device's, has the 10 bits of TensorFloat-32."""
    calls, cross_entropy = itertools.count(), training.losses.cross_entropy

    def rounded(model, images, labels, half):
        images = images.half().float() if next(calls) == 2 else images
        return cross_entropy(model, images, labels, half)

    monkeypatch.setattr(checks, "cross_entropy", rounded)
    logits, _ = checks.precision("")
    assert logits[-1] == FAILED, logits


def test_the_digits_experiment_is_compared_with_what_was_recorded(tmp_path, monkeypatch):
    """Oracle: the first page's accuracies; one of them is missed by 2 points."""
    readme = (ROOT / "README.md").read_text()
    head, *lines = [line.split("|")[1:-1] for line in readme.splitlines() if line[:2] == "| "]
    column = [cell.strip() for cell in head].index("digits, c = 0")
    expected = {line[0].strip(): line[column].split()[0] for line in lines if line[column].strip()}
    asked = {}

    def recorded(method, options, directory):
        asked[method] = options
        return [{"test_acc": float(expected[method]) - 2 * (method == "P-SGD")}]

    monkeypatch.setattr(checks, "run", recorded)
    rows = list(checks.digits(tmp_path))
    assert [row[1] for row in rows] == [expected[method] for method in asked]
    missed = [FAILED if method == "P-SGD" else "ok" for method in asked]
    assert [row[-1] for row in rows] == missed
    assert all("--datasets digits" in options for options in asked.values())
    assert "--lr 0.1 --epochs=60" in asked["SGD"]


def test_what_fails_is_a_line_and_the_rest_goes_on(tmp_path, capsys):
    def first():
        yield ["1", "2"]
        raise ValueError("no | such\nthing")

    page = Page(tmp_path, "command")
    page.table("Title", "Note.", ["a", "b"], {"first": first, "second": lambda: [["3", "4"]]})
    rows = tables((tmp_path / "README.md").read_text())["Title"][2:]
    failure = ["first: **failed**, ValueError: no \\| such thing", ""]
    assert rows == [["1", "2"], failure, ["3", "4"]]
    assert page.failed == 1
    assert "Traceback" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("code", [1, 130])
def test_only_ctrl_c_ends_it(code, tmp_path):
    def stops():
        yield []
        raise SystemExit(code)

    page = Page(tmp_path, "command")
    if code == 130:
        with pytest.raises(SystemExit):
            list(page.attempt("case", stops))
    else:
        assert len(list(page.attempt("case", stops))) == 2


def test_the_tables_of_bench_are_those_recorded():
    """By name and columns, and on the page by columns."""
    columns = {}

    class Recorder:
        def table(self, title, note, names, cases):
            columns[title.partition(":")[0].replace(" ", "_")] = names

    for write in bench.TABLES.values():
        write(Recorder())
    files = (ROOT / "benchmarks" / "results").glob("*.json")
    recorded = {file.stem: list(json.loads(file.read_text())["rows"][0]) for file in files}
    assert columns == recorded
    readme = (ROOT / "benchmarks" / "README.md").read_text()
    assert all(f"| {' | '.join(names)} |" in readme for names in columns.values())


def test_a_step_is_compared_with_its_limit(monkeypatch):
    """Oracle: sums of given times, of a warm-up and of rounds with one trial and with three."""
    seconds = {"network": 6, "forward": 2, "product": 1, "projection": 3, "psgd": 20, "pbfgs": 39}
    case = SimpleNamespace(**{name: name for name in seconds}, trials=[9, 1, 3])
    monkeypatch.setattr(bench_step, "timed", seconds.get)
    row = bench_step.compare(case, ["psgd"], 2)
    assert row == ["20,000.0 (20,000.0–20,000.0)", "2.0", "2.00", f"{(39 / 13 + 39 / 19) / 2:.2f}"]
