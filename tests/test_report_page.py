"""The report: records, the walk beside the variance, the landscape's cost, the page in a browser.

Oracles: config.json as it is written here, dldr on the snapshots themselves, a real browser.
"""

import argparse
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DIGITS
from sklearn.datasets import load_digits

import dldr
import report
import train_psgd
import train_sgd
from reporting import analysis, figures, plots, results, tables

SUBSPACE = [*DIGITS, "--params_end", "7", "--n_components", "3", "--epochs", "2"]


@pytest.fixture(scope="module")
def run(sampled, tmp_path_factory):
    """A trajectory of six epochs, and P-SGD in three subspaces of it."""
    save_dir = shutil.copytree(sampled, tmp_path_factory.mktemp("page") / "run")
    options = [*SUBSPACE, "--save-dir", str(save_dir)]
    for k in ("2", "3", "5"):
        train_psgd.main([*options, "--n_components", k, "--run", f"psgd_k{k}"])
    train_psgd.main([*options, "--basis", "random"])
    train_sgd.main([*DIGITS, "--average", "4", "7", "--save-dir", str(save_dir)])
    return save_dir


@pytest.fixture(scope="module")
def out(run, tmp_path_factory):
    """The report of them."""
    directory = tmp_path_factory.mktemp("page") / "report"
    report.main([str(run), "--grid", "3", "--out", str(directory)])
    return directory


def rewrite(file, **values):
    """Change a config.json, and its arguments, at these names."""
    config = json.loads(file.read_text())
    for part in (config, config["arguments"]):
        part.update({name: value for name, value in values.items() if name in part})
    file.write_text(json.dumps(config | values))


# Records


@pytest.mark.parametrize(
    ("recorded", "method", "name"),
    [
        ({}, "P-SGD", "P-SGD, random basis"),
        ({"optimizer": "Adam"}, "P-Adam", "P-Adam, random basis"),
        ({"method": "lbfgs"}, "lbfgs", "lbfgs, random basis"),
        ({"train_seed": 5}, "P-SGD", "P-SGD, random basis"),
        ({"start": "mean"}, "P-SGD", "P-SGD, random basis, from mean"),
        ({"bn_update": True}, "P-SGD", "P-SGD, random basis, BN update"),
    ],
)
def test_a_run_is_reported_as_what_its_records_say(recorded, method, name, run, tmp_path):
    """Oracle: the records, as a copy of train_psgd.py with another optimizer would write them."""
    copy = shutil.copytree(run, tmp_path / "run")
    rewrite(copy / "psgd_random" / "config.json", **recorded)
    (row,) = (row for row in tables.tabulate(results.read([copy], [])) if name == row["title"])
    expected = {"basis": "random"} | {k: v for k, v in recorded.items() if k in row["variant"]}
    assert (row["kind"], row["method"], row["variant"]) == ("subspace", method, expected)
    assert row["seeds"] == (["1/5"] if "train_seed" in recorded else [1])


def test_names_of_runs_are_records_of_their_own(out):
    """Oracle: --run as it was given above."""
    table = json.loads((out / "results.json").read_text())["results"]
    dimensions = {row["run"]: row["k"] for row in table if row["run"]}
    assert dimensions == {"psgd_k2": 2, "psgd_k3": 3, "psgd_k5": 5}
    (average,) = (row for row in table if row["kind"] == "average")
    assert (average["method"], average["variant"]) == ("weight average", {"snapshots": [4, 6]})


def test_training_that_goes_on_from_a_snapshot_between_epochs(tmp_path):
    """Oracle: --sample-every a third of an epoch, so that 6.pt is of epoch 2."""
    save_dir, further = tmp_path / "run", tmp_path / "further"
    train_sgd.main([*DIGITS, "--epochs", "2", "--sample-every", "2", "--save-dir", str(save_dir)])
    start = ["--pretrained", str(save_dir / "6.pt"), "--start-epoch", "2", "--epochs", "3"]
    train_sgd.main([*DIGITS, *start, "--save-dir", str(further)])
    _, row = tables.tabulate(results.read([save_dir, further], []))
    assert (row["kind"], row["variant"]) == ("continued", {"start": 6})
    assert row["title"] == "SGD, from snapshot 6"
    assert (row["epochs"], row["total epochs"]) == (1, 3)


def test_what_goes_on_from_another_is_measured_alone(tmp_path, monkeypatch):
    """Oracle: the accuracy of the snapshot that it started from, 6.pt, which is its 3.pt."""
    monkeypatch.chdir(tmp_path)
    train_sgd.main([*DIGITS, "--save-dir", "run", "--epochs", "2", "--sample-every", "2"])
    further = ["--pretrained", "run/6.pt", "--start-epoch", "2", "--epochs", "4"]
    train_sgd.main([*DIGITS, "--save-dir", "more", *further, "--sample-every", "4"])
    rewrite(tmp_path / "run/config.json", pretrained="elsewhere.pth")
    start = train_sgd.main([*DIGITS, "--evaluate", "--pretrained", "run/6.pt"])
    device = argparse.Namespace(device="cpu", data_dir=None, arch=None)
    for save_dirs in (["more"], ["more", "run"], ["run", "more"], [tmp_path / "run", "more"]):
        problems = []
        found = results.read(map(Path, save_dirs), problems)
        analysis.measure(found, device, problems)
        assert not problems
        (row,) = (result for result in found if result.kind == "continued")
        assert row.start == start["test_acc"]
        assert row.train[0] is not None
        kinds = [result.kind for result in found if result.kind != "continued"]
        assert kinds == (["pretrained", "full"] if len(save_dirs) > 1 else [])


def test_training_seeds_have_names_of_their_own():
    """Of --randomseed, the trajectory's --train-seed and the run's."""
    names = {(1, 1, 1): 1, (1, None, None): 1, (1, 1, 2): "1/2", (1, 2, 2): "1/2/2"}
    names |= {(1, 2, 1): "1/2/1", (1, 2, 3): "1/2/3"}
    for (seed, trained, own), name in names.items():
        trajectory = {"randomseed": seed, "train_seed": trained}
        assert results.seed_of(trajectory, {"train_seed": own}) == name


def test_figures_and_rows_do_not_mix_what_differs(run, tmp_path):
    """Oracles: a second seed with another k, which is no second curve, or on Adam's trajectory."""
    copy = shutil.copytree(run, tmp_path / "two")
    for file in (copy / "config.json", *copy.glob("*/config.json")):
        rewrite(file, randomseed=2, train_seed=2)
    rewrite(copy / "psgd_random" / "config.json", k=4, n_components=4)
    found = results.read([run, copy], [])
    drawn = [result for result in results.one_per_name(found) if "random" in result.name]
    assert [result.seed for result in drawn] == [1]
    assert "P-SGD, random basis with k = 4" in figures.not_drawn(found)
    rewrite(copy / "config.json", optimizer="adam")
    problems = []
    results.read([run, copy], problems)
    assert any("optimizer of the trajectory is adam, but sgd" in line for line in problems)


def test_numbers_keep_their_digits(run, tmp_path, undrawn):
    copy = shutil.copytree(run, tmp_path / "run")
    rewrite(copy / "psgd_random" / "config.json", lr=3e-5, weight_decay=1e-5)
    report.main([str(copy), "--no-data", "--out", str(tmp_path / "out")])
    held = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    (settings,) = (row["settings"] for row in held if row["title"] == "P-SGD, random basis")
    assert (settings["lr"], settings["weight_decay"]) == (3e-5, 1e-5)


def test_labels_of_a_file_have_their_columns(tmp_path, undrawn):
    """Oracle: labels of which each fifth is wrong."""
    clean = load_digits().target[np.random.default_rng(0).permutation(1797)[:1437]]
    np.save(tmp_path / "human.npy", np.where(np.arange(1437) % 5 == 0, (clean + 1) % 10, clean))
    options = ["--noise", str(tmp_path / "human.npy"), "--save-dir", str(tmp_path / "run")]
    train_sgd.main([*DIGITS, "--epochs", "2", *options])
    (row,) = report.main([str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    (section,) = tables.sections([row]).values()
    assert "labels of human.npy" in section["title"]
    assert "c = 0" not in section["title"]
    assert {"correct labels", "wrong labels"} <= section["results"][0].keys()


def test_a_run_on_other_samples_is_not_of_this_trajectory(run, tmp_path):
    """Oracle: a config.json that names --samples."""
    copy, problems = shutil.copytree(run, tmp_path / "run"), []
    rewrite(copy / "psgd_random" / "config.json", samples=["elsewhere.ckpt"])
    titles = {result.title for result in results.read([copy], problems)}
    assert "P-SGD, random basis" not in titles
    assert problems == [
        f"{copy / 'psgd_random'}: a run on --samples, which are not of this trajectory"
    ]


def test_what_a_run_recorded_is_told(run, tmp_path):
    """Oracle: a session with another learning rate, and a row that says that statistics lag."""
    copy = shutil.copytree(run, tmp_path / "run")
    config = json.loads((copy / "config.json").read_text())
    later = config["sessions"][0] | {
        "from_epoch": 3,
        "changed": {"lr": [0.1, 0.2], "workers": [4, 2]},
    }
    (copy / "config.json").write_text(
        json.dumps(config | {"sessions": [*config["sessions"], later]})
    )
    rows = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    rows[1]["statistics_lag"] = True
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report.main([str(copy), "--no-data", "--out", str(tmp_path / "out")])
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<li>SGD, seed 1: from epoch 3 on: lr 0.1 → 0.2</li>" in page
    assert "SGD, seed 1: BatchNorm&#39;s statistics lag at epoch 2" in page


# The walk


def test_the_walk_is_that_of_the_snapshots_in_use(run):
    """Oracles: dldr.spectrum of these snapshots, and the walk with the lengths of their steps."""
    gram = analysis.Gram(run, range(7))
    for numbers in (range(7), range(1, 6, 2)):
        chosen = [dldr.trajectory.load_samples(run, number, number + 1)[0] for number in numbers]
        trajectory = gram.trajectory(numbers)
        names = dldr.parameters.parameter_names(chosen[0])
        vectors = torch.stack([torch.cat([s[n].flatten() for n in names]) for s in chosen])
        lengths = vectors.double().diff(dim=0).norm(dim=1)
        torch.testing.assert_close(trajectory.shares, dldr.spectrum(chosen))
        torch.testing.assert_close(trajectory.walk.shares, dldr.random_walk_spectrum(lengths))


def test_the_variance_has_its_walk_beside_it(run, out):
    """Oracle: that of the test above, for k components; a random basis has neither."""
    walk = analysis.Gram(run, range(7)).trajectory(range(7)).walk.shares
    table = json.loads((out / "results.json").read_text())["results"]
    for row in [row for row in table if row["kind"] == "subspace" and not row["variant"]]:
        assert row["walk"] == pytest.approx([100 * float(walk[: row["k"]].sum())], abs=1e-3)
        assert row["walk"] != row["variance"]
    (random,) = (row for row in table if row["variant"] == {"basis": "random"})
    assert random["walk"] == random["variance"] == [None]
    numbers = np.load(out / "experiment_1_variance.npz")
    np.testing.assert_allclose(numbers["walk"], walk)


# Figures and their numbers


def test_figures_come_with_their_numbers(run, out):
    """Oracle: metrics.jsonl."""
    numbers = np.load(out / "experiment_1_curves.npz")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert numbers["SGD/epochs"].tolist() == list(range(7))
    assert numbers["SGD/test_acc"][0, 1:].tolist() == [row["test_acc"] for row in rows]
    for file in out.glob("*.png"):
        assert file.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
        assert file.with_suffix(".npz").exists()
    landscape = np.load(out / "experiment_1_landscape.npz")
    assert landscape["loss"].shape == (3, 3)
    assert landscape["SGD/path"].shape == (7, 2)


def test_accuracy_against_k_has_sgd_and_the_average_as_lines(run):
    """Oracle: the last rows of their metrics.jsonl; and the lines in the figure."""
    runs = results.read([run], [])
    (sweep,) = figures.sweeps(runs, lambda r: r.k, lambda r: len(r.sampled))
    finals = {
        name: json.loads((run / folder / "metrics.jsonl").read_text().splitlines()[-1])["test_acc"]
        for name, folder in (("SGD, c = 0", "."), ("weight average, c = 0", "average"))
    }
    assert sweep.levels == {name: [final] for name, final in finals.items()}
    assert [*sweep.series["P-SGD, c = 0"]] == [2, 3, 5]
    drawn = plots.against("k", sweep.series, sweep.styles, sweep.levels, "log")
    heights = {line.get_label(): line.get_ydata()[0] for line in drawn.axes[0].lines}
    assert {name: heights[name] for name in finals} == finals


def test_a_legend_takes_nothing_from_a_narrow_plot():
    """Oracle: the plot's height with one name and with eight, as matplotlib lays it out."""
    heights = []
    for count in (1, 8):
        series = {f"P-SGD, variant {number}": {2: [50.0], 4: [60.0]} for number in range(count)}
        styles = plots.styles(dict.fromkeys(series, "P-SGD"))
        figure = plots.against("k", series, styles, narrow=True)
        figure.draw_without_rendering()
        heights.append(figure.axes[0].get_window_extent().height)
    assert heights[0] == pytest.approx(heights[1], rel=0.05)


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_the_same_figure_is_the_same_file(kind):
    """Oracle: a second drawing of it."""
    styles = plots.styles({"P-SGD": "P-SGD"})
    one, other = (plots.against("k", {"P-SGD": {2: [50.0]}}, styles) for _ in range(2))
    assert plots.image(one, kind) == plots.image(other, kind)


def test_named_runs_are_drawn_or_named(out):
    """Oracle: their names; of three alike the first is drawn."""
    (caption,) = re.findall(r"Not drawn: .*?\.", (out / "report.md").read_text())[:1]
    assert caption == "Not drawn: P-SGD (psgd_k3), P-SGD (psgd_k5)."


@pytest.mark.parametrize(("size", "images"), [(8, 500), (32, 128), (64, 32), (224, 16)])
def test_the_landscape_is_bounded_by_pixels(size, images):
    """Oracle: 2¹⁷ pixels, but from 16 to 500 images, worked out by hand."""
    assert analysis.landscape_images(size, 5000) == images
    assert analysis.landscape_images(size, 10) == 10


@pytest.mark.slow
def test_the_landscape_can_be_left_out(run, tmp_path, capsys):
    """Oracle: the files; and without a terminal its images and points are told as it goes."""
    report.main([str(run), "--no-landscape", "--out", str(tmp_path / "without")])
    assert "loss landscape" not in capsys.readouterr().out
    assert not [*(tmp_path / "without").glob("*landscape*")]
    assert [*(tmp_path / "without").glob("*variance.png")]
    report.main([str(run), "--grid", "2", "--out", str(tmp_path / "with")])
    assert "loss landscape of 500 images: 0 of 4 points" in capsys.readouterr().out


def test_the_color_bar_is_as_tall_as_the_plot():
    """Oracle: the boxes that matplotlib lays out."""
    paths = {"SGD": np.array([[0.0, 0.0], [1.0, 0.2]])}
    x, y = np.linspace(-1, 2, 5), np.linspace(-0.3, 0.5, 5)
    loss = 1 + x**2 + y[:, None] ** 2
    for narrow in (False, True):
        styles = plots.styles({"SGD": "SGD"})
        figure = plots.landscape(paths, x, y, loss, [0.7, 0.2], styles, narrow)
        figure.draw_without_rendering()
        axes, (bar,) = figure.axes[0], figure.axes[0].child_axes
        assert bar.get_window_extent().height == pytest.approx(axes.get_window_extent().height)


# The page


def test_results_come_before_the_words(out):
    page = (out / "index.html").read_text()
    assert max(page.index("<table>"), page.rindex("<figure>")) < page.index('id="words"')
    assert page.index("batch size") < page.index('id="words"'), "a folded table of settings"


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SCRIPT = """<script>onload = () => {
    const seen = {
        images: [...document.images].map(image => ({
            drawn: image.complete && image.naturalWidth > 0,
            narrow: image.currentSrc != image.src,
            left: image.getBoundingClientRect().left,
            right: image.getBoundingClientRect().right})),
        wide: document.documentElement.scrollWidth - innerWidth,
        width: innerWidth,
        background: getComputedStyle(document.body).backgroundColor,
        fetched: performance.getEntriesByType("resource").map(entry => entry.name)
            .filter(name => !name.startsWith("data:"))};
    parent.document.title = JSON.stringify(seen) }</script>"""


@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1200, False)])
def test_a_browser_shows_all_of_it(width, dark, out, tmp_path):
    """Oracle: the browser's account of what it drew where, in a frame as wide as a telephone."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed here")
    page = (out / "index.html").read_text().replace("</head>", SCRIPT + "</head>")
    frame = f'<iframe style="width:{width}px" srcdoc="{html.escape(page)}"></iframe>'
    (tmp_path / "frame.html").write_text(f"<!DOCTYPE html><title></title>{frame}")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"]
    command += ["--no-first-run", "--disable-background-networking", "--disable-component-update"]
    command += ["--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    command += ["--blink-settings=preferredColorScheme=0"] * dark
    command += [(tmp_path / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)[1]
    seen = json.loads(html.unescape(title))
    assert seen["width"] == width
    assert len(seen["images"]) == len([*out.glob("*.png")])
    for image in seen["images"]:
        assert image["drawn"]
        assert image["narrow"] == (width == 390)
        assert 0 <= image["left"] < image["right"] <= width
    assert seen["wide"] <= 0, "tables scroll by themselves"
    assert seen["fetched"] == []
    assert (seen["background"] == "rgb(255, 255, 255)") == (not dark)
