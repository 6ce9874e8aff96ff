"""The report. Oracles: numbers made up by hand, networks whose answer is known, a real browser."""

import argparse
import base64
import html.parser
import itertools
import json
import re
import shutil
import statistics

import numpy as np
import pytest
import torch
from conftest import DIGITS
from PIL import Image

import dldr
import models
import report
import reporting.analysis
import reporting.figures
import reporting.plots
import reporting.results
import reporting.tables
import train_pbfgs
import train_psgd
import train_sgd
import training.losses
import training.setup
import utils
from dldr.reading import read_tensors
from dldr.trajectory import load_state_dict
from training.network import copy_into

pytestmark = pytest.mark.slow

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
        file.write_text(re.sub(r'("(randomseed|train_seed)": )1', r"\g<1>2", file.read_text()))
    return root


@pytest.fixture(scope="module")
def made(runs, tmp_path_factory):
    """The report of them, and what main returned."""
    out = tmp_path_factory.mktemp("out") / "a" / "report"
    grid, reporting.analysis.GRID = reporting.analysis.GRID, 5
    names = [str(runs / name) for name in ("one", "two", "noisy")]
    table = report.main([*names, "--out", str(out)])
    reporting.analysis.GRID = grid
    return out, table


@pytest.fixture
def warned(undrawn, capsys, tmp_path):
    """Report without data; the rows of the table, and what was left out."""

    def call(*save_dirs):
        capsys.readouterr()
        table = report.main([*map(str, save_dirs), "--no-data", "--out", str(tmp_path / "out")])
        lines = capsys.readouterr().err.splitlines()
        assert all(line.startswith("report.py: skipped: ") for line in lines), lines
        return table, [line.removeprefix("report.py: skipped: ") for line in lines]

    return call


def row_of(table, method, noise=0.0):
    """The one row of a method at a noise level."""
    (row,) = (row for row in table if (row["title"], row["noise"]) == (method, noise))
    return row


def test_the_numbers_are_those_of_the_metrics(made, runs):
    """Oracle: metrics.jsonl; seconds are counted as README says, by the median epoch."""
    _, table = made
    text = (runs / "one" / "psgd" / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    row = row_of(table, "P-SGD")
    assert row["seeds"] == [1, 2]
    assert row["final"] == [rows[-1]["test_acc"], 52.0]
    assert row["best"] == [max(r["test_acc"] for r in rows), 52.0]
    sampling = (runs / "one" / "metrics.jsonl").read_text().splitlines()
    parts = ([json.loads(line)["seconds"] for line in sampling], [r["seconds"] for r in rows])
    assert row["seconds"][0] == pytest.approx(sum(len(p) * statistics.median(p) for p in parts))
    (cells,) = reporting.tables.results_table([row])
    mean, deviation = statistics.mean(row["final"]), statistics.stdev(row["final"])
    assert cells["final"] == f"{mean:.2f} ± {deviation:.2f}"
    assert "wrong labels" not in cells, "there are none without noise"


def test_compilation_in_a_first_epoch_does_not_count(runs, warned, tmp_path):
    """Oracle: made-up seconds, 6 epochs of 1 s of which the first took 100 s; and 2 of 3 s."""
    run = shutil.copytree(runs / "one", tmp_path / "run")
    for name, seconds in ((".", [100.0, 1, 1, 1, 1, 1]), ("psgd", [3.0, 3])):
        rows = map(json.loads, (run / name / "metrics.jsonl").read_text().splitlines())
        rows = [row | {"seconds": value} for row, value in zip(rows, seconds, strict=True)]
        (run / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table, _ = warned(run)
    assert row_of(table, "SGD")["seconds"] == [6]
    assert row_of(table, "P-SGD")["seconds"] == [12]


def test_top_5_accuracy_is_a_column_where_it_was_measured(runs, warned, tmp_path):
    """Oracle: metrics.jsonl."""
    run = shutil.copytree(runs / "one", tmp_path / "run")
    for file in run.rglob("metrics.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows = [row | {"test_top5": 60 + row["epoch"]} for row in rows]
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    table, _ = warned(run)
    (section,) = reporting.tables.sections(table).values()
    found = {row["method"]: row["top-5"] for row in section["results"]}
    assert (found["SGD"], found["P-SGD"]) == ("66.00", "62.00")
    assert list(section["results"][0])[-4:] == ["final", "top-5", "best", "seconds"]


def test_cost_is_what_it_takes_to_be_as_good_as_sgd_at_its_end(made):
    """Seed 2, made up: SGD ends at 56 % after 6 epochs, nothing in its subspaces gets there."""
    _, table = made
    sgd, psgd = row_of(table, "SGD"), row_of(table, "P-SGD")
    assert sgd["cost"][1] == (6, pytest.approx(sgd["seconds"][1]))
    assert psgd["cost"][1] is None
    (row,) = reporting.tables.cost_table([sgd | {"cost": [(4, 1.0), None, (8, 3.0)]}])
    assert [*row.values()][2:] == [f"2 of {len(sgd['seeds'])}", "6.0 ± 2.8", "2.0 ± 1.4"]


def test_accuracy_on_correct_and_wrong_labels(runs, tmp_path, undrawn):
    """Oracle: a network that always answers 3 is right on just the images labelled 3."""
    shutil.copytree(runs / "noisy", tmp_path / "run")
    state = read_tensors(tmp_path / "run" / "model.th")
    for name in ("linear.weight", "linear.bias"):
        state["state_dict"][name].zero_()
    state["state_dict"]["linear.bias"][3] = 1
    torch.save(state, tmp_path / "run" / "model.th")
    table = report.main([str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    row = row_of(table, "SGD", 0.4)
    arguments = train_sgd.get_options().parse_args([*DIGITS])
    true = utils.read_digits(arguments, True).labels
    given = utils.corrupt_labels(true, 0.4, 10, 1)
    shares = [(given[part] == 3).double().mean() for part in (true == true, given == true)]
    shares.append((given[given != true] == 3).double().mean())
    found = [row[name][0] / 100 for name in ("train", "correct labels", "wrong labels")]
    assert found == pytest.approx([float(share) for share in shares], abs=1e-6)
    assert len(set(found)) == 3


def test_a_pretrained_network_has_a_row(runs, tmp_path, undrawn, monkeypatch):
    """Oracle: --evaluate of its weights; in the landscape it is the point where SGD begins."""
    drawn = {}
    monkeypatch.setattr(reporting.plots, "landscape", lambda paths, **others: drawn.update(paths))
    options = ["--pretrained", str(runs / "one" / "model.th"), "--save-dir", str(tmp_path / "run")]
    train_sgd.main([*DIGITS, "--epochs", "2", "--lr", "0.01", *options])
    table = report.main([str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    tested = train_sgd.main([*DIGITS, "--evaluate", "--save-dir", str(runs / "one")])
    assert [row["title"] for row in table] == ["pretrained", "SGD"]
    assert table[0]["final"] == [tested["test_acc"]]
    assert table[0]["total epochs"] == 0
    assert table[0]["train"][0] > 80
    assert drawn["pretrained"].tolist() == drawn["SGD"][:1].tolist()


def test_what_is_not_finished_says_so(runs, warned, tmp_path):
    run = shutil.copytree(runs / "one", tmp_path / "run")
    config = run / "psgd" / "config.json"
    config.write_text(config.read_text().replace('"epochs": 2', '"epochs": 9'))
    assert "P-SGD, 2 of 9 epochs so far" in [row["title"] for row in warned(run)[0]]


def test_the_loss_on_the_plane_is_the_loss_of_the_networks_in_it(runs):
    """Oracle: the plane of two components of three samples holds the samples themselves."""
    args = training.setup.parse_args(train_sgd.get_options(), DIGITS)
    images = utils.load_data(args).test
    samples = utils.load_samples(runs / "one", 0, 3)
    model = models.build("resnet8", 10)
    basis, _ = utils.pca(samples, 2, model=model)
    copy_into(model, utils.average(samples))
    plane = models.Subspace(model, basis)
    vectors = [
        torch.cat([s[name].flatten() for name, _ in model.named_parameters()]) for s in samples
    ]
    places = np.array([(basis @ (vector - plane.origin)).tolist() for vector in vectors])
    with torch.no_grad():
        found = reporting.analysis.loss_on(plane, next(images.epoch()), places)
    batch, labels = next(images.epoch())
    for sample, loss in zip(samples, found, strict=True):
        network = models.build("resnet8", 10)
        copy_into(network, sample)
        exact = torch.nn.functional.cross_entropy(network.train()(batch), labels)
        assert exact.item() == pytest.approx(loss, rel=1e-4)


def probe_of(run):
    """What measures on a run, without options."""
    trajectory, *others = reporting.results.read_save_dir(run, [])
    options = argparse.Namespace(device="cpu", data_dir=None, arch=None)
    return reporting.analysis.Probe(trajectory, options), [trajectory, *others]


def test_paths_end_where_the_networks_are(runs):
    """Oracle: model.th itself, projected; and the random basis, in which nothing is seen to move.

    The path comes from the coordinates in metrics.jsonl.
    """
    probe, found = probe_of(runs / "one")
    samples = utils.load_samples(runs / "one", 0, 7)
    drawn = reporting.analysis.loss_landscape(probe, range(7), found, 2)
    paths = drawn["paths"]
    names = [name for name, _ in probe.model.named_parameters()]
    basis = utils.pca(samples, 2, names=names)[0].double()

    def vector(state):
        return torch.cat([state[name].flatten() for name in names]).double()

    middle = torch.stack([vector(sample) for sample in samples]).mean(0)
    average = ("weight average (snapshots 3–6)", "average")
    for method, folder in (("SGD", "."), ("P-SGD", "psgd"), ("P-BFGS", "pbfgs"), average):
        end = load_state_dict(runs / "one" / folder / "model.th")
        place = basis @ (vector(end) - middle)
        np.testing.assert_allclose(paths[method][-1], place, rtol=1e-3, atol=1e-3)
    assert len(paths["P-SGD"]) == 3, "the start and two epochs"
    plane = models.Subspace(probe.model, basis.float())  # of the mean, as it was left
    with torch.no_grad():
        place = np.array([[drawn["x"][0], drawn["y"][1]]])
        corner = reporting.analysis.loss_on(plane, next(probe.train.epoch()), place)
    assert drawn["loss"][1, 0] == pytest.approx(corner[0], rel=1e-4)
    assert drawn["loss"][0, 1] != pytest.approx(corner[0], rel=1e-2)
    moved = paths["P-SGD, random basis"]
    assert np.abs(moved - moved[0]).max() < 0.1 * np.abs(paths["P-SGD"] - moved[0]).max()


class Unread(torch.Tensor):
    """A loss that may not leave the device by itself."""

    def __float__(self):
        raise AssertionError("a host sync")

    item = tolist = numpy = cpu = __float__


def test_the_landscape_has_one_host_sync(runs, monkeypatch):
    """Oracle: losses that refuse to be read, but can be stacked."""
    probe, _ = probe_of(runs / "one")
    model = models.Subspace(probe.model, torch.eye(2, 75290))
    plain = training.losses.cross_entropy

    def unread(*arguments):
        loss, output = plain(*arguments)
        return loss.as_subclass(Unread), output

    stack = torch.stack
    monkeypatch.setattr(reporting.analysis, "cross_entropy", unread)
    monkeypatch.setattr(torch, "stack", lambda losses: stack(losses).as_subclass(torch.Tensor))
    with torch.no_grad():
        loss = reporting.analysis.loss_on(model, next(probe.train.epoch()), np.zeros((3, 2)))
    assert loss.shape == (3,)


class Links(html.parser.HTMLParser):
    """All that a page points to, the images it shows, and the terms that it explains."""

    def __init__(self):
        super().__init__()
        self.targets, self.images, self.terms, self.tag = [], [], [], ""

    def handle_starttag(self, tag, attributes):
        attributes, self.tag = dict(attributes), tag
        self.targets += [attributes["href"]] if tag == "a" else []
        self.images += [attributes["src"]] if tag == "img" else []

    def handle_data(self, data):
        self.terms += [data.strip()] if self.tag == "dt" and data.strip() else []


def test_the_page_needs_nothing_but_itself(made):
    out, table = made
    page = (out / "index.html").read_text()
    links = Links()
    links.feed(page)
    assert len(links.images) == 2 + 2 * 4, "noise, k; curves, variance, landscape, steps of each"
    assert all(source.startswith("data:image/svg+xml;base64,") for source in links.images)
    assert not re.search(r"url\(|@import|<script|<link", page)
    saved = json.loads((out / "results.json").read_text())["results"]
    for one, row in zip(saved, table, strict=True):
        assert one["title"] == row["title"]
        assert one["final"] == pytest.approx(row["final"], abs=1e-4)
    shown = re.findall(r"!\[.*?\]\((.*?)\)", (out / "report.md").read_text())
    assert sorted(shown) == sorted(file.name for file in out.glob("*.png"))
    for name in shown:
        with Image.open(out / name) as image:
            assert image.size[0] >= 800
            assert len(image.convert("RGB").getcolors(2**20)) > 10
        drawn = (out / name).with_suffix(".svg").read_bytes()
        assert base64.b64encode(drawn).decode() in page, "the page has what lies beside the PNG"


def test_accuracy_against_k_and_sampled_epochs(sampled, tmp_path):
    """Oracle: the final accuracies that the runs returned; the averages are of the later half."""
    save_dir, own, averages = shutil.copytree(sampled, tmp_path / "run"), {}, {}
    options = [*SUBSPACE, "--save-dir", str(save_dir), "--run"]
    for last in (2, 4, 6):
        sizes = ["--params_end", str(last + 1), "--n_components", "2"]
        own[last] = train_psgd.main([*options, f"psgd_of_{last}", *sizes])["test_acc"]
        average = ["--average", str(last // 2 + 1), str(last + 1), "--run", f"average_of_{last}"]
        average = train_sgd.main([*DIGITS, "--save-dir", str(save_dir), *average])
        averages[last] = average["test_acc"]
    by_k = {2: own[6]}
    for k in (4, 6):
        by_k[k] = train_psgd.main([*options, f"psgd_k{k}", "--n_components", str(k)])["test_acc"]
    train_sgd.main([*DIGITS, "--save-dir", str(save_dir), "--average", "2", "7", "--run", "longer"])
    runs = reporting.results.read([save_dir], [])

    def shown(at, fixed):
        (sweep,) = reporting.figures.sweeps(runs, at, fixed)
        series = sweep.series.items()
        return {name: {x: y for x, (y,) in values.items()} for name, values in series}, sweep.levels

    means, sgd = {"weight average, c = 0": averages}, {"SGD, c = 0": [runs[0].final]}
    by_length = shown(lambda r: len(r.sampled), lambda r: r.k)
    assert by_length == ({"P-SGD, c = 0": own} | means, sgd)
    by_dimension = shown(lambda r: r.k, lambda r: len(r.sampled))
    average = {"weight average, c = 0": [averages[6]]}
    assert by_dimension == ({"P-SGD, c = 0": by_k}, sgd | average)
    report.main([str(save_dir), "--no-data", "--out", str(tmp_path / "out")])
    pictures = {path.name for path in tmp_path.glob("out/*_1_1.png")}
    assert pictures == {"dimensions_1_1.png", "samples_1_1.png"}
    variances = {r.k: r.variance for r in runs if r.kind == "subspace" and len(r.sampled) == 6}
    ratios = dldr.spectrum(utils.load_samples(save_dir, 0, 7))
    shares = {k: 100 * float(ratios[:k].sum()) for k in (2, 4, 6)}
    assert variances == pytest.approx(shares, rel=1e-5)


def test_the_page_explains_itself(made):
    """Every column and every word of the methods' names, and where the method comes from."""
    out, table = made
    page = (out / "index.html").read_text()
    links = Links()
    links.feed(page)
    links.targets.remove("#words")
    assert links.targets == ["https://arxiv.org/abs/2103.11154", "https://github.com/nblt/DLDR"]
    words = {"c", "n", "k", "P-SGD", "P-BFGS", "random basis", "weight average"}
    assert words < {*links.terms}
    explained = {*links.terms, "method"}
    assert set(reporting.tables.sections(table).popitem()[1]["results"][0]) < explained
    first = page.index("</table>")
    assert first < page.index("<summary>") < page.index("<table>", first), "under its table"


def test_deviations_are_told_where_there_are_several_seeds(made, runs, tmp_path):
    out, _ = made
    assert "± standard deviation over the seeds" in (out / "index.html").read_text()
    report.main([str(runs / "one"), "--no-data", "--out", str(tmp_path / "out")])
    for name in ("index.html", "report.md"):
        text = (tmp_path / "out" / name).read_text()
        assert "±" not in text
        assert "bands" not in text


def test_all_machines_that_a_run_was_continued_on_are_named(runs, undrawn, tmp_path):
    run = shutil.copytree(runs / "one", tmp_path / "run")
    config = json.loads((run / "psgd" / "config.json").read_text())
    versions = config["versions"] | {"torch": "a later one"}
    config["sessions"].append(config["sessions"][0] | {"device": "another", "versions": versions})
    (run / "psgd" / "config.json").write_text(json.dumps(config))
    report.main([str(run), "--no-data", "--out", str(tmp_path / "out")])
    named = json.loads((tmp_path / "out" / "results.json").read_text())["machine"]
    assert named["device"] == [config["device"], "another"]
    assert [" torch a later one," in f" {each}" for each in named["versions"]] == [False, True]


# What is left out, with a line


def edit(config, **values):
    """Change a config.json of one session, and its arguments, where they have these keys."""
    content = json.loads(config.read_text())
    (session,) = content["sessions"]
    for part in (content, content["arguments"], session, session["arguments"]):
        part.update({name: value for name, value in values.items() if name in part})
    config.write_text(json.dumps(content))


def test_a_bad_run_costs_a_line(runs, warned, tmp_path):
    whole, _ = warned(runs / "one")
    run = shutil.copytree(runs / "one", tmp_path / "run")
    (run / "psgd" / "metrics.jsonl").write_text('{"epoch": 1, "test_acc": 5')
    (run / "pbfgs" / "config.json").unlink()
    table, lines = warned(run)
    assert [row["title"] for row in table] == [
        row["title"] for row in whole if row["title"] not in ("P-SGD", "P-BFGS")
    ]
    assert len(lines) == 2
    assert lines[0].startswith(f"{run / 'pbfgs'}: ")
    assert lines[1].startswith(f"{run / 'psgd'}: ")


def test_a_bad_save_dir_costs_a_line(runs, warned, refused, tmp_path):
    (tmp_path / "empty").mkdir()
    table, (line,) = warned(tmp_path / "empty", runs / "one")
    assert row_of(table, "SGD")["seeds"] == [1]
    assert line.startswith(f"{tmp_path / 'empty'}: ")
    line = refused(report.main, [tmp_path / "empty", "--out", tmp_path / "none"])
    assert f"nothing to report: {tmp_path / 'empty'}: " in line
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["psgd", "average"])
def test_the_folder_of_a_run_on_samples_is_no_save_dir(name, runs, refused):
    assert f"; give that one: {runs / 'one'}" in refused(report.main, [runs / "one" / name])


def test_a_trajectory_within_another_is_left_out(runs, sampled, warned, tmp_path):
    run = shutil.copytree(runs / "one", tmp_path / "run")
    shutil.copytree(sampled, run / "inner")
    table, (line,) = warned(run)
    assert row_of(table, "SGD")["seeds"] == [1]
    assert line.startswith(f"{run / 'inner'}: a run of train_sgd.py inside of another")


def test_a_trajectory_in_its_first_epoch_is_left_out(runs, warned, tmp_path):
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(runs / "two" / "config.json", begun)
    table, (line,) = warned(runs / "one", begun)
    assert all(row["seeds"] == [1] for row in table)
    assert line == f"{begun}: no epoch is finished yet"


def test_a_copy_is_no_second_seed(runs, warned, tmp_path):
    copy = shutil.copytree(runs / "one", tmp_path / "copy")
    table, (line,) = warned(runs / "one", copy)
    assert all(row["seeds"] == [1] for row in table)
    assert line.startswith(f"{copy}: seed 1 ")
    assert str(runs / "one") in line


def test_a_directory_named_twice_counts_once(runs, warned):
    table, lines = warned(runs / "one", f"{runs / 'one'}/../one")
    assert all(row["seeds"] == [1] for row in table)
    assert not lines


@pytest.mark.parametrize(
    ("files", "name", "value", "whole"),
    [("psgd/config.json", "lr", 0.3, False), ("**/config.json", "image_size", 9, True)],
)
def test_runs_with_other_settings_are_not_averaged(
    files, name, value, whole, runs, warned, tmp_path
):
    run = shutil.copytree(runs / "two", tmp_path / "run")
    for config in run.glob(files):
        edit(config, **{name: value})
    table, (line,) = warned(runs / "one", run)
    assert f"{name} is {value}, but " in line
    assert row_of(table, "P-SGD")["seeds"] == [1]
    assert row_of(table, "P-BFGS")["seeds"] == ([1] if whole else [1, 2])
    names = [row["method"] for row in reporting.tables.results_table(table)]
    assert ("P-SGD, 1 of 2 seeds" in names) == (not whole)


def test_subspaces_of_other_trajectories_are_not_averaged(runs, warned, tmp_path):
    """The rows of SGD differ in their epochs, those of the subspace only in SGD's learning rate."""
    run = shutil.copytree(runs / "two", tmp_path / "run")
    edit(run / "config.json", lr=0.5, epochs=9)
    table, lines = warned(runs / "one", run)
    assert all(row["seeds"] == [1] for row in table if row["title"].startswith("P-"))
    assert all("lr of the trajectory is 0.5, but 0.1" in line for line in lines)


def test_runs_on_samples_that_were_replaced_are_left_out(runs, warned, tmp_path):
    run = shutil.copytree(runs / "one", tmp_path / "run")
    shutil.copy(run / "5.pt", run / "2.pt")
    table, lines = warned(run)
    assert "P-SGD" not in [row["title"] for row in table]
    assert f"{run / 'psgd'}: its snapshots have been replaced since; run it again" in lines
    (run / "2.pt").unlink()
    assert row_of(warned(run)[0], "P-SGD"), "samples take room, and may be removed"


def test_runs_on_samples_of_a_longer_trajectory_are_left_out(runs, warned, tmp_path):
    """train_sgd.py --overwrite with fewer epochs: 4.pt to 6.pt are removed, 0.pt to 3.pt new."""
    run = shutil.copytree(runs / "one", tmp_path / "run")
    train_sgd.main([*DIGITS, "--epochs", "3", "--overwrite", "--save-dir", str(run)])
    table, lines = warned(run)
    assert [row["title"] for row in table] == ["SGD"]
    assert f"{run / 'psgd'}: its snapshots have been replaced since; run it again" in lines


def test_k_chosen_by_variance_is_one_row(runs, warned, tmp_path):
    """Oracle: two seeds, one of whose k is made up."""
    for name in ("one", "two"):
        shutil.copytree(runs / name, tmp_path / name, ignore=shutil.ignore_patterns("p*"))
        seed = ["--randomseed", "1" if name == "one" else "2", "--n_components", "0.9"]
        train_psgd.main([*SUBSPACE, *seed, "--save-dir", str(tmp_path / name)])
    config = tmp_path / "two" / "psgd" / "config.json"
    k = json.loads(config.read_text())["k"]
    edit(config, k=k + 2)
    row = row_of(warned(tmp_path / "one", tmp_path / "two")[0], "P-SGD")
    assert (row["seeds"], row["k"]) == ([1, 2], f"{k}–{k + 2}")


@pytest.mark.parametrize(("directions", "kinds"), [(0, set()), (1, {"variance"})])
def test_samples_without_a_plane(directions, kinds, sampled, capsys, tmp_path, undrawn):
    """Samples that are all the same, or one of two: no landscape, but a report."""
    run = shutil.copytree(sampled, tmp_path / "run")
    for number in range(7):
        shutil.copy(sampled / f"{6 * directions * (number % 2)}.pt", run / f"{number}.pt")
    report.main([str(run), "--out", str(tmp_path / "out")])
    assert {file.stem.split("_")[2] for file in (tmp_path / "out").glob("*.png")} == {
        "curves",
        *kinds,
    }
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{run}: principal components and landscape: " in line


def test_weights_that_cannot_be_read_cost_their_training_accuracy(runs, capsys, tmp_path, undrawn):
    run = shutil.copytree(runs / "one", tmp_path / "run")
    (run / "psgd" / "model.th").write_bytes(b"")
    table = report.main([str(run), "--out", str(tmp_path / "out")])
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{run / 'psgd'}: training accuracy: " in line
    assert row_of(table, "P-SGD")["train"] == [None]
    assert row_of(table, "P-BFGS")["train"] != [None]


@pytest.mark.parametrize(
    "options",
    [
        ["--basis", "random", "--params_end", "1"],
        ["--start", "6", "--params_end", "4"],
        ["--start", "mean"],
        ["--pretrained", "MODEL"],
    ],
)
def test_every_legal_run_can_be_reported(options, runs, capsys, tmp_path, undrawn):
    run = shutil.copytree(runs / "one", tmp_path / "run", ignore=shutil.ignore_patterns("p*"))
    options = [str(runs / "one" / "model.th") if word == "MODEL" else word for word in options]
    train_psgd.main([*SUBSPACE, *options, "--n_components", "2", "--save-dir", str(run)])
    capsys.readouterr()
    table = report.main([str(run), "--out", str(tmp_path / "out")])
    assert capsys.readouterr().err == ""
    (row,) = (row for row in table if row["title"].startswith("P-SGD"))
    assert row["epochs"] == 2
    sampled = 6 if "4" in options or "1" not in options else 0
    assert row["total epochs"] == sampled + 2


def test_what_cannot_be_written_is_refused(runs, refused, tmp_path):
    (tmp_path / "file").write_text("")
    options = [runs / "one", "--no-data", "--out", tmp_path / "file"]
    assert "--out: " in refused(report.main, options)


def test_a_full_disk_is_a_line(sampled, capsys, tmp_path, undrawn):
    """Oracle: /dev/full, which is where the page is written to at first."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "index.html.tmp").symlink_to("/dev/full")
    with pytest.raises(SystemExit) as exit:
        report.main([str(sampled), "--no-data", "--out", str(tmp_path / "out")])
    (line,) = capsys.readouterr().err.splitlines()
    assert exit.value.code == 1
    assert "index.html: could not be written (No space left on device)" in line
    assert "once there is room" in line
    assert not (tmp_path / "out" / "index.html").exists()


def test_a_report_without_images_and_samples(runs, tmp_path, undrawn):
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


def test_the_device_is_asked_for(refused, monkeypatch, runs):
    """Oracle: a made-up accelerator."""
    assert "torch sees no such device here; allowed: auto, cpu" in refused(
        report.main, ["--device", "xpu", runs / "one"]
    )
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    chosen = {name: training.setup.pick_device(name) for name in ("auto", "cpu", "xpu")}
    assert chosen == {"auto": "xpu", "cpu": "cpu", "xpu": "xpu"}
    assert "allowed: auto, cpu, xpu" in refused(report.main, ["--device", "cuda", runs / "one"])


# Figures


def test_curves_begin_where_their_runs_do(runs, tmp_path, monkeypatch, undrawn):
    """Oracle: --evaluate of the first sample; a run on samples begins after the last of them."""
    drawn, draw = {}, reporting.plots.curves

    def spy(curves, metrics, styles, **others):
        drawn.update({curve.name: curve for curve in curves})
        return draw(curves, metrics, styles, **others)

    monkeypatch.setattr(reporting.plots, "curves", spy)
    table = report.main([str(runs / "one"), "--out", str(tmp_path / "out")])
    first = ["--evaluate", "--pretrained", str(runs / "one" / "0.pt")]
    start = train_sgd.main([*DIGITS, *first])["test_acc"]
    for name, epochs in (("SGD", [*range(7)]), ("P-SGD", [6, 7, 8]), ("P-BFGS", [6, 7, 8])):
        assert drawn[name].epochs.tolist() == epochs
        assert drawn[name].metrics["test_acc"][0, 0] == pytest.approx(start)
        assert drawn[name].metrics["test_acc"][0, -1] == row_of(table, name)["final"][0]
        assert drawn[name].seconds[-1] == pytest.approx(row_of(table, name)["seconds"][0])
        assert np.isnan(drawn[name].metrics["train_loss"][0, 0])
    report.main([str(runs / "one"), "--no-data", "--out", str(tmp_path / "out")])
    assert np.isnan(drawn["P-SGD"].metrics["test_acc"][0, 0]), (
        "without data the beginning is not known"
    )


def test_every_run_has_a_style():
    """Oracle: variants of a method share color and marker, and no two runs are drawn alike."""
    variants = ("", ", BN update", ", random basis", ", from mean", ", from snapshot 6", " (named)")
    methods = ("SGD", "P-SGD", "P-BFGS", "P+-BFGS", "Adam", "AdamW", "c = 0", "c = 0.4")
    names = {method + variant: method for method in methods for variant in variants}
    styles = reporting.plots.styles(names)
    assert len({str(style) for style in styles.values()}) == len(methods) * len(variants)
    one, other = styles["P-SGD"], styles["P-SGD, BN update"]
    assert (one["color"], one["marker"]) == (other["color"], other["marker"])
    assert one["linestyle"] != other["linestyle"]
    for one, other in itertools.combinations(methods, 2):
        assert styles[one]["color"] != styles[other]["color"]


def styled(*names):
    """Styles of methods without variants."""
    return reporting.plots.styles({name: name for name in names})


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize(("epochs", "decades"), [(1, 0.1), (2, 1), (7, 2.9), (150, 7)])
@pytest.mark.parametrize(("low", "high"), [(10, 99.9), (97.2, 97.3), (0, 100), (50, 50), (91, 96)])
def test_ticks_are_few_and_do_not_collide(epochs, decades, low, high, narrow):
    """Oracle: where the labels are, as drawn; those of epochs are whole numbers."""
    values = np.linspace(low, high, epochs + 1)[None]
    losses = (low + 1) * np.logspace(-decades, 0, epochs + 1)[None]
    x = np.arange(epochs + 1)
    metrics = {"test_acc": values, "train_loss": losses}
    curve = reporting.plots.Curve("SGD", x, x / 3, metrics)
    figure = reporting.plots.curves([curve], [*metrics], styled("SGD"), narrow)
    figure.canvas.draw()
    labels = [label.get_text() for label in figure.axes[2].get_xticklabels()]
    assert all(re.fullmatch(r"−?\d+", label) for label in labels), labels
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            texts = axis.get_ticklabels() + axis.get_ticklabels(minor=True)
            boxes = [text.get_window_extent() for text in texts if text.get_text()]
            boxes = [box for box in boxes if box.width and axes.bbox.padded(40).overlaps(box)]
            assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert len(figure.axes[0].get_yticklabels()) >= 2


def test_ends_of_paths_can_be_seen():
    """Three paths that end at one point, two of them the same all along."""
    line = np.array([[0.0, 0.0], [1.0, 1.0]])
    paths = {"SGD": line, "P-SGD": line + np.array([[1, 0], [0, 0]]), "P-SGD, BN update": line * 1}
    grid = np.linspace(-1, 1, 3)
    loss = 1 + grid[:, None] ** 2 + grid**2
    figure = reporting.plots.landscape(paths, grid, grid, loss, [0.5, 0.25], styled(*paths))
    axes = figure.axes[0]
    ends = [line for line in axes.lines if len(line.get_xdata()) == 1]
    lengths = [line.get_markersize() for line in ends]
    assert len(ends) == 2
    assert all(line.get_path_effects() for line in ends), "they have an edge"
    assert lengths == sorted(lengths, reverse=True)
    others = [line.get_zorder() for line in axes.lines if len(line.get_xdata()) > 1]
    assert min(line.get_zorder() for line in ends) > max(others)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["SGD = P-SGD, BN update", "P-SGD"]


@pytest.mark.parametrize("accuracy", [0.0, 100.0, 50.0])
def test_any_accuracy_can_be_drawn(accuracy):
    series = {"P-SGD": {2: [accuracy, accuracy], 5: [accuracy]}}
    figure = reporting.plots.against("k", series, styled(*series), scale="log")
    assert reporting.plots.image(figure, "png").startswith(b"\x89PNG")
    assert b"</svg>" in reporting.plots.image(figure, "svg")


@pytest.mark.parametrize("letters", [3, 30, 60])
def test_a_legend_is_not_wider_than_its_figure(letters):
    """Oracle: its extent as matplotlib lays it out; with short names it is lower than long."""
    series = {f"{method} {letters * 'x'}": {1: [50.0]} for method in "ABCDEF"}
    figure = reporting.plots.against("k", series, styled(*series))
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 6
    assert legend.get_window_extent().width < figure.bbox.width
    assert (legend.get_window_extent().height < 0.15 * figure.bbox.height) == (letters < 60)
