"""Networks of other people (strangers.py): nothing is silently wrong, and few stop."""

import json
from pathlib import Path

import pytest
import strangers
import torch
from conftest import DIGITS

import dldr
import train_pbfgs
import train_psgd
import train_sgd
from training.losses import recompute_statistics
from training.network import copy_into, full_state

FEW = [*DIGITS, "--epochs", "2", "--smalldatasets", "0.4", "--lr", "0.02"]


def options(name: str, save_dir: Path, *more: str) -> list[str]:
    """The options for a short training of one of the strangers."""
    return [*FEW, "--arch", f"strangers:{name}", "--save-dir", str(save_dir), *more]


def subspace(name: str, save_dir: Path, *more: str) -> list[str]:
    """The options for training it in a subspace."""
    return options(name, save_dir, "--n_components", "2", *more)


def without_lr(options: list[str]) -> list[str]:
    """P-BFGS has no learning rate."""
    at = options.index("--lr")
    return options[:at] + options[at + 2 :]


def saved(directory: Path) -> dict:
    return torch.load(directory / "checkpoint.pt")


def assert_same_runs(one: Path, other: Path) -> None:
    """Two runs end in the same states, to the bit."""
    states, others = (saved(directory)["states"] for directory in (one, other))
    assert states["model"].keys() == others["model"].keys()
    for name, value in states["model"].items():
        same = (
            torch.equal(value, others["model"][name])
            if torch.is_tensor(value)
            else (value == others["model"][name])
        )
        assert same, name
    keys = ("train_loss", "test_loss", "test_acc")
    rows = [[[row[key] for key in keys] for row in saved(d)["rows"]] for d in (one, other)]
    assert rows[0] == rows[1]


def test_layers_that_gather_no_statistics_keep_theirs(tmp_path):
    """Oracle: the network that is averaged, alone."""
    last = train_sgd.main(options("Frozen", tmp_path))
    row = train_sgd.main(options("Frozen", tmp_path, "--average", "2", "3"))
    assert row["test_loss"] == last["test_loss"]
    train_psgd.main(subspace("Frozen", tmp_path, "--bn-update", "--start", "2"))
    assert (
        torch.load(tmp_path / "psgd_from_2/model.th")["state_dict"]["bn.running_mean"] == 0.3
    ).all()


def test_statistics_are_those_of_torch(batch):
    """Oracle: torch.optim.swa_utils.update_bn."""
    images = batch[0].float().split(4)
    ours, torchs = strangers.Small(), strangers.Small()
    torchs.load_state_dict(ours.state_dict())
    recompute_statistics(ours, images, False)
    torch.optim.swa_utils.update_bn(images, torchs)
    for name, value in torchs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_statistics_are_recomputed_in_the_precision_they_are_used_in(batch):
    """Oracle: one batch in bfloat16, whose statistics a momentum of 1 would keep."""
    network, images = strangers.Small(), batch[0].float()
    recompute_statistics(network, [images], True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mean = network.conv(images).float().mean((0, 2, 3))
    torch.testing.assert_close(network.bn.running_mean, mean, rtol=1e-5, atol=1e-6)


SCRIPTS = [(train_sgd, ""), (train_psgd, "psgd"), (train_pbfgs, "pbfgs")]
STATES = ["ByHand", "Counting", "Dropping"]  # in buffers, an extra state, random numbers


@pytest.mark.parametrize(
    ("script", "run", "name"),
    [(*script, name) for name in STATES for script in SCRIPTS]
    + [(train_sgd, "", name) for name in ("Shifting", "Normed")],
)
def test_a_resumed_run_is_the_unbroken_one(script, run, name, tmp_path):
    """Oracle: the unbroken run."""
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    for directory in (unbroken, resumed) if run else ():
        train_sgd.main(options(name, directory))
    make = subspace if run else options
    for directory, epochs, more in (unbroken, 2, []), (resumed, 1, []), (resumed, 2, ["--resume"]):
        given = [*make(name, directory), *more, "--epochs", str(epochs)]
        script.main(without_lr(given) if run == "pbfgs" else given)
    assert_same_runs(unbroken / run, resumed / run)


def test_a_trial_batch_leaves_no_trace(tmp_path):
    """Oracle: the network as the factory makes it. ActNorm would take its scale from zeros."""
    train_sgd.main(options("Shifting", tmp_path))
    torch.manual_seed(1)
    for name, value in strangers.Shifting().state_dict().items():
        assert torch.equal(torch.load(tmp_path / "0.pt")[name], value), name
    assert 0 < torch.load(tmp_path / "1.pt")["layer.scale"] < 10


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Merging", "head.weight changes with train() and eval(), as weights that LoRA"),
        ("Opaque", "_extra_state holds a Random; get_extra_state() may return tensors, numbers"),
        ("runtime", "RuntimeError: no weights here (strangers.py, line "),
        ("key", "KeyError: 'depth' (strangers.py, line "),
        ("missing", "No module named 'a_package_that_is_not_there' (strangers.py, line "),
        ("expanded", "head.bias is an expanded view"),
        ("Nothing", "has no attribute 'Nothing'"),
    ],
)
def test_what_cannot_be_right_is_refused_in_a_line(name, message, tmp_path, refused):
    line = refused(train_sgd.main, options(name, tmp_path / "run"))
    assert message in line
    assert "--arch" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models:Theirs", "/models/__init__.py belongs to these scripts and comes before others"),
        ("models.theirs:Net", "/models/__init__.py belongs to these scripts and comes before"),
        ("asking:helper", "/utils.py belongs to these scripts and comes before others that are"),
        ("broken:Net", "NameError: name 'undefined' is not defined (broken.py, line 2)"),
        ("nowhere:Net", "PYTHONPATH says where modules are"),
    ],
)
def test_whose_module_is_imported(text, message, tmp_path, monkeypatch, refused):
    """People's repositories have a models/ and a utils.py, too."""
    (tmp_path / "asking.py").write_text("from utils import a_helper_of_theirs\n")
    (tmp_path / "broken.py").write_text("\nundefined\n")
    monkeypatch.syspath_prepend(tmp_path)
    given = options("Small", tmp_path / "run")
    assert message in refused(train_sgd.main, [*given, "--arch", text])


@pytest.mark.parametrize("more", [[], ["--optimizer", "adam"], ["--momentum", "0"]])
@pytest.mark.parametrize("name", ["Late", "Sparse", "Dropping"])
def test_gradients_may_come_late_or_be_sparse(name, more, tmp_path):
    """Oracle: the same steps of torch's optimizer that is not fused, on dense gradients."""
    train_sgd.main(options(name, tmp_path / "ours", *more))
    real = torch.optim.SGD, torch.optim.Adam
    with pytest.MonkeyPatch.context() as patch:
        for kind, original in zip(("SGD", "Adam"), real, strict=True):
            patch.setattr(torch.optim, kind, unfused(original))
        train_sgd.main(options(name, tmp_path / "oracle", *more))
    ours, oracle = (torch.load(tmp_path / run / "2.pt") for run in ("ours", "oracle"))
    for key, value in oracle.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=1e-4)


def unfused(kind: type) -> object:
    """An optimizer of the kind, whatever its settings say, one parameter at a time."""
    return lambda parameters, *args, **settings: kind(
        parameters, *args, **settings | {"fused": False, "foreach": False}
    )


@pytest.mark.parametrize("script", [train_psgd, train_pbfgs])
def test_a_subspace_of_embeddings_with_sparse_gradients(script, tmp_path):
    train_sgd.main(options("Sparse", tmp_path))
    given = subspace("Sparse", tmp_path)
    row = script.main(given if script is train_psgd else without_lr(given))
    assert row["train_loss"] < 2.4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Beginning", "if its first batch sets parameters, take a later snapshot: --params_start"),
        (
            "Reentrant",
            "use_reentrant=True does not work in a Subspace; allowed: use_reentrant=False",
        ),
        ("scripted", "scripted networks keep their parameters to themselves"),
    ],
)
@pytest.mark.parametrize("script", [train_psgd, train_pbfgs])
def test_what_cannot_be_in_a_subspace_is_refused_in_a_line(
    script, name, message, tmp_path, refused
):
    train_sgd.main(options(name, tmp_path))
    given = subspace(name, tmp_path)
    line = refused(script.main, given if script is train_psgd else without_lr(given))
    assert f"--arch strangers:{name}: not in a subspace, " in line
    assert message in line
    assert not list(tmp_path.glob("p*"))
    if name == "Beginning":
        train_psgd.main([*given, "--params_start", "1", "--n_components", "1"])


def test_view_after_a_convolution(tmp_path, capsys):
    """Oracle: the run with contiguous images. Said once a run; --channels-last, too."""
    one, two = tmp_path / "one", tmp_path / "two"
    train_sgd.main(options("Viewing", two, "--no-channels-last"))
    capsys.readouterr()
    train_sgd.main(options("Viewing", one, "--channels-last"))
    assert "strangers:Viewing: cannot take images in channels_last" in capsys.readouterr().out
    assert_same_runs(one, two)
    assert json.loads((one / "config.json").read_text())["arguments"]["channels_last"] is False
    train_psgd.main(subspace("Viewing", one))
    train_sgd.main(options("Viewing", one, "--average", "1", "3"))
    train_sgd.main(options("Viewing", one, "--evaluate"))


def test_random_numbers_in_evaluation_are_the_same_each_time(tmp_path):
    """Oracle: the last row of metrics."""
    row = train_sgd.main(options("Noisy", tmp_path))
    assert train_sgd.main(options("Noisy", tmp_path, "--evaluate"))["test_loss"] == row["test_loss"]


@pytest.mark.parametrize("name", ["Wrapped", "parallel"])
def test_module_as_a_name_of_the_network(name, tmp_path):
    """Oracle: the network's own names, and its last row."""
    row = train_sgd.main(options(name, tmp_path))
    names = getattr(strangers, name)().state_dict().keys()
    assert torch.load(tmp_path / "1.pt").keys() == names
    train_psgd.main(subspace(name, tmp_path, "--bn-update"))
    assert train_sgd.main(options(name, tmp_path, "--evaluate"))["test_loss"] == row["test_loss"]
    train_sgd.main(options(name, tmp_path, "--average", "1", "3"))
    assert saved(tmp_path / "average")["state_dict"].keys() == names


def test_weights_of_a_wrapped_network_fit_the_network_and_the_other_way(tmp_path):
    """Oracle: the same weights under the network's names."""
    network = strangers.Small()
    for name, prefix in (("Small", "module."), ("parallel", "")):
        state = {prefix + key: value for key, value in network.state_dict().items()}
        torch.save(state, tmp_path / "weights.pt")
        run = tmp_path / name
        train_sgd.main(options(name, run, "--pretrained", str(tmp_path / "weights.pt")))
        first = torch.load(run / "0.pt")
        assert torch.equal(first[next(iter(first))], network.conv.weight)


def test_a_scripted_network_as_a_vector():
    """Oracle: the vector that was written."""
    network = strangers.scripted()
    vector = torch.randn(len(dldr.flatten(network)))
    dldr.load_vector(vector, network)
    assert torch.equal(dldr.flatten(network), vector)


def test_a_classifier_for_other_classes_is_left_as_initialized(tmp_path, capsys, refused):
    """Oracle: the initialization, and the weights in the file for the rest."""
    state = strangers.Small(7).state_dict()
    torch.save(state, tmp_path / "weights.pt")
    weights = ["--pretrained", str(tmp_path / "weights.pt")]
    train_sgd.main(options("Small", tmp_path / "run", *weights))
    assert "left as initialized: head.weight, head.bias" in capsys.readouterr().out
    first = torch.load(tmp_path / "run/0.pt")
    torch.manual_seed(1)
    for name, value in strangers.Small().state_dict().items():
        assert torch.equal(first[name], value if "head" in name else state[name]), name
    train_sgd.main(options("Small", tmp_path / "other", "--overwrite"))
    torch.save(state, tmp_path / "other/model.th")
    assert "head" in refused(train_sgd.main, options("Small", tmp_path / "other", "--evaluate"))


def test_snapshots_without_counters(tmp_path):
    """Oracle: the same snapshots with them; torch < 0.4.1 had none."""
    rows = []
    for counters in (True, False):
        save_dir = tmp_path / str(counters)
        train_sgd.main(options("Small", save_dir))
        for number in range(3) if not counters else ():
            state = torch.load(save_dir / f"{number}.pt")
            del state["bn.num_batches_tracked"]
            torch.save(state, save_dir / f"{number}.pt")
        rows.append(
            [
                train_psgd.main(subspace("Small", save_dir, "--start", "mean"))["test_loss"],
                train_sgd.main(options("Small", save_dir, "--average", "1", "3"))["test_loss"],
            ]
        )
    assert rows[0] == rows[1]


def test_a_negative_variance_is_refused(tmp_path, refused):
    train_sgd.main(options("Small", tmp_path))
    state = torch.load(tmp_path / "1.pt")
    state["bn.running_var"][3] = -0.1
    torch.save(state, tmp_path / "1.pt")
    line = refused(train_psgd.main, subspace("Small", tmp_path))
    assert f"{tmp_path / '1.pt'}: bn.running_var is negative" in line


def test_a_state_is_written_with_what_a_state_dict_leaves_out():
    """Oracle: the buffers as they were; an expanded one is constant, a late one is made."""
    network, fresh = strangers.Shifting(), strangers.Shifting()
    for each in (network, fresh):
        each.register_buffer("constant", torch.zeros(1).expand(5), persistent=False)
    network(torch.randn(4, 3, 8, 8))
    copy_into(fresh, full_state(network))
    state = full_state(fresh)
    assert state["layer.begun"]
    assert torch.equal(state["layer.late"], torch.ones(3))
    for name, value in full_state(network).items():
        assert torch.equal(state[name], value), name
