"""./run.sh gpu in its small size, and the tables of ./run.sh bench.

Oracle: the tables that were recorded.
"""

import json
import re
from types import SimpleNamespace

import bench
import bench_step
import gpu
import pytest
import torch
from common import Page
from conftest import ROOT

pytestmark = pytest.mark.usefixtures("settings_as_they_were")


def tables(page: str) -> dict[str, list[list[str]]]:
    """The cells of each table, by the section's title."""
    sections = re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    lines = {title: re.findall(r"^\| (.*) \|$", text, re.MULTILINE) for title, text in sections}
    return {title: [line.split(" | ") for line in rows] for title, rows in lines.items()}


@pytest.mark.slow
def test_the_page_tells_what_was_measured(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path)]) == 0
    page = (tmp_path / "README.md").read_text()
    assert capsys.readouterr().out == page
    assert f"torch {torch.__version__}" in page
    assert "\n0 failed; " in page
    found = tables(page)
    rows = {title: len(lines) - 2 for title, lines in found.items()}
    assert rows == {"Step": 4, "PCA": 1, "Data": 3}
    assert found["PCA"][2][-1] == "ok"
    assert [row[2] for row in found["Step"][2:]] == ["bare network", "SGD", "P-SGD", "P-BFGS"]
    for row in found["Step"][2:]:
        median, low, high = map(float, re.split(r" \(|–", row[3].replace(",", "").rstrip(")")))
        assert 0 < low <= median <= high


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
