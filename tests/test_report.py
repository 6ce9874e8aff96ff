"""The report. Oracles: numbers made up by hand, networks whose answer is known, a real browser."""

import html.parser
import json
import re
import shutil
import statistics
import subprocess

import numpy as np
import pytest
import torch
from conftest import DIGITS
from PIL import Image

import checkpoint
import cli
import models
import pictures
import report
import train_pbfgs
import train_psgd
import train_sgd
import utils

SUBSPACE = [*DIGITS, "--params_end", "7", "--n_components", "4", "--epochs", "2"]


@pytest.fixture(scope="module")
def runs(sampled, tmp_path_factory):
    """Two seeds (the second one's numbers made up) and another noise level, with all methods."""
    root = tmp_path_factory.mktemp("runs")
    noisy = ["--corrupt", "0.4", "--save-dir", str(root / "noisy")]
    train_sgd.main([*DIGITS, "--epochs", "6", *noisy])
    shutil.copytree(sampled, root / "one")
    for options in (noisy, ["--save-dir", str(root / "one")]):
        train_psgd.main([*SUBSPACE, *options])
        train_pbfgs.main([*SUBSPACE, *options])
        train_psgd.main([*SUBSPACE, *options, "--basis", "random"])
        train_sgd.main([*DIGITS, "--average", "3", "7", *options])
        for k in ("2", "3", "6"):
            train_psgd.main([*SUBSPACE, *options, "--n_components", k, "--run", f"psgd_k{k}"])
    shutil.copytree(root / "one", root / "two")
    for file in root.glob("two/**/metrics.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        lines = [json.dumps(row | {"test_acc": 50.0 + row["epoch"]}) + "\n" for row in rows]
        file.write_text("".join(lines))
    for file in root.glob("two/**/config.json"):
        file.write_text(file.read_text().replace('"randomseed": 1', '"randomseed": 2'))
    return root


@pytest.fixture(scope="module")
def made(runs, tmp_path_factory):
    """The report of them, and what main returned."""
    out = tmp_path_factory.mktemp("out") / "a" / "report"
    grid, report.GRID = report.GRID, 5
    names = [str(runs / name) for name in ("one", "two", "noisy")]
    lines = report.main([*names, "--out", str(out)])
    report.GRID = grid
    return out, lines


def row_of(lines, method, noise=0.0, k=None):
    """The one line of a method at a noise level."""
    (row,) = (
        line
        for line in lines
        if (line["method"], line["noise"]) == (method, noise) and k in (None, line["k"])
    )
    return row


def test_the_numbers_are_those_of_the_metrics(made, runs):
    _, lines = made
    text = (runs / "one" / "psgd" / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    row = row_of(lines, "P-SGD")
    assert row["seeds"] == [1, 2]
    assert row["final"] == [rows[-1]["test_acc"], 52.0]
    assert row["best"] == [max(r["test_acc"] for r in rows), 52.0]
    sampling = (runs / "one" / "metrics.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["seconds"] for line in sampling] + [r["seconds"] for r in rows]
    assert row["seconds"][0] == pytest.approx(sum(seconds))
    columns, table = report.results_table([row])
    mean, deviation = statistics.mean(row["final"]), statistics.stdev(row["final"])
    assert table[0][columns.index("final")] == f"{mean:.2f} ± {deviation:.2f}"
    assert "false labels" not in columns, "there are none without noise"


def test_cost_is_what_it_takes_to_be_as_good_as_sgd_at_its_end(made):
    """Seed 2, made up: SGD ends at 56 % after 6 epochs, nothing in its planes gets there."""
    _, lines = made
    sgd, psgd = row_of(lines, "SGD"), row_of(lines, "P-SGD")
    assert sgd["to SGD's final"][1] == (6, pytest.approx(sgd["seconds"][1]))
    assert psgd["to SGD's final"][1] is None
    (row,) = report.cost_table([sgd | {"to SGD's final": [(4, 1.0), None, (8, 3.0)]}])[1]
    assert row[2:] == [f"2 of {len(sgd['seeds'])}", "6.0 ± 2.8", "2.0 ± 1.4"]


def test_accuracy_on_true_and_false_labels(runs, tmp_path):
    """Oracle: a network that always answers 3 is right on just the images labelled 3."""
    shutil.copytree(runs / "noisy", tmp_path / "run")
    state = utils.read_tensors(tmp_path / "run" / "model.th")
    for name in ("linear.weight", "linear.bias"):
        state["state_dict"][name].zero_()
    state["state_dict"]["linear.bias"][3] = 1
    torch.save(state, tmp_path / "run" / "model.th")
    lines = report.main([str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    row = row_of(lines, "SGD", 0.4)
    arguments = train_sgd.get_options().parse_args([*DIGITS])
    true = utils.read_digits(arguments, True).labels
    given = utils.corrupt_labels(true, 0.4, 10, 1)
    shares = [(given[part] == 3).double().mean() for part in (true == true, given == true)]
    shares.append((given[given != true] == 3).double().mean())
    found = [row[name][0] / 100 for name in ("train", "true labels", "false labels")]
    assert found == pytest.approx([float(share) for share in shares], abs=1e-6)
    assert len(set(found)) == 3


def test_a_network_trained_further_has_a_line_from_before(runs, tmp_path):
    options = ["--pretrained", str(runs / "one" / "model.th"), "--save-dir", str(tmp_path / "run")]
    train_sgd.main([*DIGITS, "--epochs", "1", "--lr", "0", *options])
    lines = report.main([str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    tested = train_sgd.main([*DIGITS, "--evaluate", "--save-dir", str(runs / "one")])
    assert [line["method"] for line in lines] == ["before", "SGD"]
    assert lines[0]["final"] == [tested["test_acc"]]
    assert lines[0]["in all"] == 0


def test_what_is_not_finished_says_so(runs, tmp_path):
    shutil.copytree(runs / "one", tmp_path / "run")
    config = tmp_path / "run" / "psgd" / "config.json"
    config.write_text(config.read_text().replace('"epochs": 2', '"epochs": 9'))
    lines = report.main([str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--no-data"])
    assert "P-SGD, 2 of 9 epochs so far" in [line["method"] for line in lines]


def test_the_loss_on_the_plane_is_the_loss_of_the_networks_in_it(runs):
    """Oracle: the plane of two components of three samples holds the samples themselves."""
    args = cli.parse_args(train_sgd.get_options(), DIGITS)
    images = utils.load_data(args).test
    samples = utils.load_samples(runs / "one", 0, 3)
    model = models.build("resnet8", 10)
    basis, _ = utils.pca(samples, 2)
    checkpoint.copy_into(model, utils.average(samples))
    plane = models.Subspace(model, basis)
    vectors = [
        torch.cat([s[name].flatten() for name, _ in model.named_parameters()]) for s in samples
    ]
    places = [(basis @ (vector - plane.origin)).tolist() for vector in vectors]
    with torch.no_grad():
        found = report.loss_on(plane, images, places)
    batch, labels = next(images.epoch())
    for sample, loss in zip(samples, found, strict=True):
        network = models.build("resnet8", 10)
        checkpoint.copy_into(network, sample)
        exact = torch.nn.functional.cross_entropy(network.train()(batch), labels)
        assert exact.item() == pytest.approx(loss, rel=1e-4)


def test_paths_end_where_the_networks_are(runs, monkeypatch):
    """Oracle: model.th itself, projected; and the random plane, in which nothing is seen to move.

    The path comes from the coordinates in metrics.jsonl.
    """
    drawn = {}

    def spy(paths, x, y, loss, ratios):
        drawn.update(paths, corners=(x, y, loss))
        return b""

    monkeypatch.setattr(pictures, "landscape", spy)
    monkeypatch.setattr(report, "GRID", 2)
    lines = report.lines_of(runs / "one")
    laboratory = report.Laboratory(lines[0], None, None)
    samples = utils.load_samples(runs / "one", 0, 7)
    report.landscape(laboratory, samples, [line for line in lines if "basis" in line.arguments])
    names = [name for name, _ in laboratory.model.named_parameters()]
    basis = utils.pca(samples, 2, names=names)[0].double()

    def vector(state):
        return torch.cat([state[name].flatten() for name in names]).double()

    middle = torch.stack([vector(sample) for sample in samples]).mean(0)
    for method, folder in (("SGD", "."), ("P-SGD", "psgd"), ("P-BFGS", "pbfgs")):
        end = utils.load_state_dict(runs / "one" / folder / "model.th")
        place = basis @ (vector(end) - middle)
        np.testing.assert_allclose(drawn[method][-1], place, rtol=1e-3, atol=1e-3)
    assert len(drawn["P-SGD"]) == 3, "the start and two epochs"
    x, y, loss = drawn["corners"]
    plane = models.Subspace(laboratory.model, basis.float())  # of the mean, as it was left
    with torch.no_grad():
        corner = report.loss_on(plane, laboratory.images, [(x[0], y[1])])
    assert loss[1, 0] == pytest.approx(corner[0], rel=1e-4)
    assert loss[0, 1] != pytest.approx(corner[0], rel=1e-2)
    moved = drawn["P-SGD, random basis"]
    assert np.abs(moved - moved[0]).max() < 0.1 * np.abs(drawn["P-SGD"] - moved[0]).max()


class Links(html.parser.HTMLParser):
    """All that a page points to, and the images it shows."""

    def __init__(self):
        super().__init__()
        self.targets, self.images = [], 0

    def handle_starttag(self, tag, attributes):
        self.images += tag == "img"
        self.targets += [value for name, value in attributes if name in ("src", "href")]


def test_the_page_needs_nothing_but_itself(made):
    out, lines = made
    page = (out / "index.html").read_text()
    links = Links()
    links.feed(page)
    assert links.images == 2 + 2 * 4, "noise, k; curves, variance, landscape, steps of each"
    assert all(target.startswith("data:image/png;base64,") for target in links.targets)
    assert "url(" not in page
    assert "@import" not in page
    saved = json.loads((out / "results.json").read_text())["lines"]
    for line, row in zip(saved, lines, strict=True):
        assert line["method"] == row["method"]
        assert line["final"] == pytest.approx(row["final"], abs=1e-4)
    shown = re.findall(r"!\[.*?\]\((.*?)\)", (out / "report.md").read_text())
    assert sorted(shown) == sorted(file.name for file in out.glob("*.png"))
    for name in shown:
        with Image.open(out / name) as image:
            assert image.size[0] >= 800
            assert len(image.convert("RGB").getcolors(2**20)) > 10


def test_a_browser_shows_it(made, tmp_path):
    """Oracle: the browser's own account of the images it decoded and of what it fetched."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(names)} is installed here")
    out, _ = made
    script = """<script>onload = () => { document.title = JSON.stringify({
        images: [...document.images].map(image => image.complete && image.naturalWidth),
        rows: document.querySelectorAll("tr").length,
        wide: document.documentElement.scrollWidth > innerWidth,
        fetched: performance.getEntriesByType("resource").map(entry => entry.name)
            .filter(name => !name.startsWith("data:")) }) }</script>"""
    page = tmp_path / "page.html"
    page.write_text((out / "index.html").read_text().replace("</head>", script + "</head>"))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,800"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = html.unescape(re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)[1])
    seen = json.loads(title)
    assert len(seen["images"]) == 10
    assert min(seen["images"]) >= 800
    assert seen["rows"] > 30
    assert seen["fetched"] == []
    assert not seen["wide"], "tables scroll by themselves"


@pytest.mark.parametrize(
    ("files", "name", "value", "other"),
    [("psgd/config.json", "lr", "1.0", "0.3"), ("**/config.json", "image_size", "8", "9")],
)
def test_runs_with_other_settings_are_not_taken_for_seeds(
    files, name, value, other, runs, refused, tmp_path
):
    shutil.copytree(runs / "one", tmp_path / "run")
    for config in (tmp_path / "run").glob(files):
        changed = config.read_text().replace(f'"{name}": {value},', f'"{name}": {other},')
        config.write_text(changed)
    options = [runs / "one", tmp_path / "run", "--no-data", "--out", tmp_path / "out"]
    line = refused(report.main, options)
    assert f"{name} is {value} and {other}" in line
    assert not (tmp_path / "out").exists()


def test_runs_on_samples_that_were_replaced_are_refused(runs, refused, tmp_path):
    run = shutil.copytree(runs / "one", tmp_path / "run")
    shutil.copy(run / "5.pt", run / "2.pt")
    line = refused(report.main, [run, "--no-data", "--out", tmp_path / "out"])
    assert "of samples that have been replaced" in line
    (run / "2.pt").unlink()
    assert report.main([str(run), "--no-data", "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(
    "options",
    [
        ["--basis", "random", "--params_end", "1"],
        ["--start", "6", "--params_end", "4"],
        ["--start", "mean"],
        ["--shard-basis"],
        ["--pretrained", "MODEL"],
    ],
)
def test_every_legal_run_can_be_reported(options, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "GRID", 2)
    shutil.copytree(runs / "one", tmp_path / "run", ignore=shutil.ignore_patterns("p*"))
    options = [str(runs / "one" / "model.th") if word == "MODEL" else word for word in options]
    train_psgd.main(
        [*SUBSPACE, *options, "--n_components", "2", "--save-dir", str(tmp_path / "run")]
    )
    rows = report.main([str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    (row,) = (row for row in rows if row["method"].startswith("P-SGD"))
    assert row["epochs"] == 2
    sampled = 6 if "4" in options or "1" not in options else 0
    assert row["in all"] == sampled + 2


def test_a_directory_named_twice_counts_once(runs, tmp_path):
    options = ["--no-data", "--out", str(tmp_path / "out")]
    lines = report.main([str(runs / "one"), f"{runs / 'one'}/../one", *options])
    assert all(line["seeds"] == [1] for line in lines)


def test_refused_reports_leave_nothing(runs, refused, tmp_path):
    shutil.copytree(runs / "one", tmp_path / "run")
    (tmp_path / "run" / "psgd" / "model.th").write_bytes(b"")
    options = [tmp_path / "run", "--out", tmp_path / "out"]
    assert "model.th: not a whole file" in refused(report.main, options)
    (tmp_path / "file").write_text("")
    options = [runs / "one", "--no-data", "--out", tmp_path / "file"]
    assert "--out: " in refused(report.main, options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]


def test_a_report_without_images_and_samples(runs, tmp_path):
    """What is asked to be left out, and what has been removed."""
    for name in ("one", "noisy"):
        shutil.copytree(runs / name, tmp_path / name)
    names = [str(tmp_path / name) for name in ("one", "noisy")]
    report.main([*names, "--out", str(tmp_path / "out"), "--no-data"])
    kinds = {file.stem.split("_")[2] for file in (tmp_path / "out").glob("exp*.png")}
    assert kinds == {"curves", "variance", "steps"}
    for file in tmp_path.glob("one/*.pt"):
        if file.stem.isdecimal():
            file.unlink()
    report.main([names[0], "--out", str(tmp_path / "other")])
    kinds = {file.stem.split("_")[2] for file in (tmp_path / "other").glob("exp*.png")}
    assert kinds == {"curves", "steps"}


@pytest.mark.parametrize("accuracy", [0.0, 100.0, 50.0])
def test_any_accuracy_can_be_drawn(accuracy):
    png = pictures.against("k", {"P-SGD": {2: [accuracy, accuracy], 5: [accuracy]}}, log=True)
    assert png.startswith(b"\x89PNG")
