"""load_trajectory: files of many tools, read without running what they hold.

Oracles: the state dicts that were saved, the side effects of code, and torch.load and safetensors.
"""

import argparse
import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import dldr
from dldr.reading import InertPickle
from dldr.trajectory import load_samples
from training.files import fingerprint


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Each test is in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def same(one, other) -> bool:
    """Whether two state dicts hold equal tensors under the same names, in any order."""
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def read(source, **options):
    """The only snapshot of a source."""
    (snapshot,) = dldr.load_trajectory(source, **options)
    return snapshot


LAYOUTS = {
    "a state dict": lambda net: net.state_dict(),
    "other objects beside it": lambda net: {
        "state_dict": net.state_dict(),
        "args": argparse.Namespace(lr=0.1),
        "file": Path("x"),
        "best": np.float64(1),
        "seen": {1, 2},
    },
    "an optimizer beside it": lambda net: {
        "model": net.state_dict(),
        "optimizer": trained(net).state_dict(),
        "scores": {"best": torch.tensor(0.5), "file": "x"},
    },
    "a module": lambda net: net,
    "a module at a key": lambda net: {"epoch": 1, "net": net, "ema": None},
    "DataParallel": nn.DataParallel,
    "compiled and wrapped": lambda net: {
        f"_orig_mod.module.{name}": value for name, value in net.state_dict().items()
    },
    "FSDP": lambda net: {
        name.replace(".", "._fsdp_wrapped_module."): value
        for name, value in net.state_dict().items()
    },
}


def trained(net: nn.Module) -> torch.optim.Optimizer:
    """An Adam that holds state."""
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_found_wherever_they_are(net, layout, as_zip):
    """Oracle: the network's state dict."""
    value = LAYOUTS[layout](net)
    torch.save(value, "1.pt", _use_new_zipfile_serialization=as_zip)
    assert same(read("1.pt"), net.state_dict())
    assert read("1.pt").file == Path("1.pt")


class Code:
    """Runs when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def nested() -> Code:
    """Code in a storage, as pickle writes it."""
    stream = io.BytesIO()
    torch.save(Code(os.system, "touch ran"), stream, _use_new_zipfile_serialization=False)
    return Code(torch.storage._load_from_bytes, stream.getvalue())


CODE = {
    "os.system": lambda: Code(os.system, "touch ran"),
    "eval": lambda: Code(eval, "open('ran', 'w')"),
    "nested in a storage": nested,
}


@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize("code", CODE)
def test_no_code_is_run(code, as_zip):
    """Oracle: the file that the code would make, and does when it is unpickled by pickle."""
    value = {"weight": torch.ones(2), "code": CODE[code]()}
    torch.save(value, "1.pt", _use_new_zipfile_serialization=as_zip)
    assert same(read("1.pt"), {"weight": torch.ones(2)})
    Path("1.pkl").write_bytes(pickle.dumps(value["code"]))
    with pytest.raises(ValueError, match=r"1\.pkl: a pickle, but not of torch\.save"):
        dldr.load_trajectory("1.pkl")
    assert not Path("ran").exists()
    pickle.loads(Path("1.pkl").read_bytes())
    assert Path("ran").exists()


def test_files_cannot_change_the_functions_they_call():
    """What a pickle builds on a function of torch would be in effect for all that follows.

    Oracle: the function's defaults, and that pickle would change them.
    """
    # (None, {"__defaults__": ("poison",)}) is set on the function.
    start, build = b"\x80\x02ctorch._utils\n", b"N}U\x0c__defaults__U\x06poison\x85s\x86b."
    code = start + b"_rebuild_tensor_v2\n" + build
    before = torch._utils._rebuild_tensor_v2.__defaults__
    InertPickle.load(io.BytesIO(code))
    assert torch._utils._rebuild_tensor_v2.__defaults__ is before
    try:
        pickle.loads(code)
        assert torch._utils._rebuild_tensor_v2.__defaults__ == ("poison",)
    finally:
        torch._utils._rebuild_tensor_v2.__defaults__ = before


def truncated(net):
    torch.save(net, "1.pt")
    Path("1.pt").write_bytes(Path("1.pt").read_bytes()[:900])


def arrays(save):
    with Path("1.pt").open("wb") as stream:
        save(stream, np.ones(3))


def tar(net):
    Path("part").write_text("x")
    with tarfile.open("1.pt", "w") as archive:
        archive.add("part")


FOREIGN = {
    "empty": lambda net: Path("1.pt").touch(),
    "a Git LFS pointer": lambda net: Path("1.pt").write_text("version https://git-lfs.github.com"),
    "an HTML page": lambda net: Path("1.pt").write_text("\n<!DOCTYPE html>"),
    "truncated": truncated,
    "TorchScript": lambda net: torch.jit.script(net).save("1.pt"),
    "a zip archive": lambda net: arrays(np.savez),
    "a NumPy array": lambda net: arrays(np.save),
    "a tar archive": tar,
    "not a file of torch.save or safetensors": lambda net: Path("1.pt").write_text("text"),
    "holds the state of an optimizer, no weights": lambda net: torch.save(
        trained(net).state_dict(), "1.pt"
    ),
    "holds no weights; it holds lr, epoch": lambda net: torch.save({"lr": 1, "epoch": 2}, "1.pt"),
    "weight is a tensor of a kind that is not read": lambda net: torch.save(
        {"weight": torch.eye(2).to_sparse(), "bias": torch.ones(2)}, "1.pt"
    ),
}


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("what", FOREIGN)
def test_says_what_a_file_is(net, what):
    """One line that names the file and what it is in place of weights."""
    FOREIGN[what](net)
    with pytest.raises(ValueError, match=rf"^1\.pt: {what}[^\n]*$"):
        dldr.load_trajectory("1.pt")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_values_are_read_when_they_are_used(suffix):
    """Oracle: what is in the file by then."""
    {"pt": torch.save, "safetensors": save_file}[suffix]({"w": torch.ones(1000)}, f"1.{suffix}")
    snapshot = read(f"1.{suffix}")
    content = Path(f"1.{suffix}").read_bytes()
    with Path(f"1.{suffix}").open("r+b") as stream:
        stream.write(content.replace(torch.ones(1000).numpy().tobytes(), bytes(4000)))
    assert not snapshot["w"].any()


# ------------------------------------------------------------------------------- names, keys


def test_a_key_or_the_network_chooses_of_several(net):
    """Oracle: the state dict at the key, and the only one with the network's shapes."""
    other = {name: value + 1 for name, value in net.state_dict().items()}
    larger = nn.Linear(5, 5).state_dict()
    value = {"model": net.state_dict(), "callbacks": {"EMA": {"shadow": other}}, "head": larger}
    torch.save(value, "1.pt")
    with pytest.raises(ValueError, match=r"allowed as key: model, callbacks\.EMA\.shadow, head$"):
        read("1.pt")
    with pytest.raises(ValueError, match=r"under the key emma; allowed: model"):
        read("1.pt", key="emma")
    with pytest.raises(ValueError, match=r"fit the network; allowed as key: model, callbacks"):
        read("1.pt", model=net)
    assert same(read("1.pt", key="callbacks.EMA.shadow"), other)
    del value["callbacks"]
    torch.save(value, "1.pt")
    assert same(read("1.pt", model=net), net.state_dict())


def test_one_network_that_is_there_twice_is_taken_once(net):
    """As in checkpoint.pt: as its state dict, and with the buffers that this leaves out."""
    more = net.state_dict() | {"0.mask": torch.ones(3)}
    torch.save({"state_dict": net.state_dict(), "states": {"model": more}}, "1.pt")
    assert same(read("1.pt", model=net), net.state_dict())


@pytest.mark.parametrize("prefix", ["", "model.", "module.model._orig_mod.", "a.b."])
def test_prefixes_are_dropped_by_name_or_to_fit_the_network(net, prefix):
    """Oracle: the network's state dict."""
    value = {f"{prefix}{name}": value for name, value in net.state_dict().items()}
    torch.save(value, "1.pt")
    assert same(read("1.pt", model=net), net.state_dict())
    named = prefix.removeprefix("module.").replace("_orig_mod.", "")
    assert same(read("1.pt", prefix=named), net.state_dict())
    with pytest.raises(ValueError, match=r"no name begins with x\.; allowed as prefix: "):
        read("1.pt", prefix="x.")


def test_a_network_that_is_in_a_file_twice_needs_a_prefix(net):
    """Oracle: the teacher's weights."""
    student = {f"student.{name}": value for name, value in net.state_dict().items()}
    teacher = {f"teacher.{name}": value + 1 for name, value in net.state_dict().items()}
    torch.save(student | teacher, "1.pt")
    with pytest.raises(ValueError, match=r"allowed as prefix: student\., teacher\.$"):
        read("1.pt", model=net)
    snapshot = read("1.pt", prefix="teacher.", model=net)
    assert same(snapshot, {name: value + 1 for name, value in net.state_dict().items()})
    torch.save(net.state_dict() | teacher, "1.pt")
    assert torch.equal(read("1.pt", model=net)["0.weight"], net[0].weight)


class Wrapper(nn.Module):
    """`module.` is the beginning of all its parameters' names, and it has another of their ends."""

    def __init__(self, net: nn.Module, more: bool) -> None:
        super().__init__()
        self.module = net
        if more:
            self.add_module("0", nn.Linear(3, 4))


@pytest.mark.parametrize("more", [True, False])
def test_module_may_be_a_real_name(net, more):
    """Oracle: the wrapper's own state dict."""
    wrapper = Wrapper(net, more)
    torch.save(wrapper.state_dict(), "1.pt")
    assert same(read("1.pt", model=wrapper), wrapper.state_dict())


def test_tied_weights_are_needed_once(net):
    """safetensors has one name of a tied weight. Oracle: the network's state dict."""
    net[2].weight = nn.Parameter(torch.ones(2, 4))
    net.add_module("tied", nn.Linear(4, 2))
    net.tied.weight = net[2].weight
    state = net.state_dict()
    for name in ("2.weight", "tied.weight"):
        save_file({n: value for n, value in state.items() if n != name}, "1.safetensors")
        assert same(read("1.safetensors", model=net), state)


def test_a_misfit_is_named(net):
    """One line with the first parameter that is not there, or of another shape."""
    torch.save(nn.Linear(3, 4).state_dict(), "1.pt")
    with pytest.raises(ValueError, match=r"1\.pt: does not fit.*lacks 0\.weight; it holds weight"):
        read("1.pt", model=net)
    torch.save(net.state_dict() | {"0.weight": torch.ones(9, 3)}, "1.pt")
    with pytest.raises(ValueError, match=r"0\.weight is \(9, 3\), \(4, 3\) in the network"):
        read("1.pt", model=net)


# ------------------------------------------------------------------------------ files, order


def write(*names: str) -> list[str]:
    """Save a snapshot under each name."""
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        torch.save({"weight": torch.ones(2)}, name)
    return list(names)


def files(source) -> list[str]:
    """The files of a trajectory."""
    return [str(snapshot.file) for snapshot in dldr.load_trajectory(source)]


def test_the_order_is_that_of_the_numbers(folder):
    """Oracle: the epochs in the names. A shell has sorted a list as text."""
    names = write(
        "run/epoch=0-step=9.ckpt", "run/epoch=2-step=30.ckpt", "run/epoch=10-step=99.ckpt"
    )
    for source in ("run", "run/*.ckpt", folder / "run", sorted(names), [sorted(names)]):
        assert [Path(file).name for file in files(source)] == [Path(name).name for name in names]


def test_other_names_are_left_out_with_a_warning():
    """Lightning's last.ckpt is a copy. Oracle: the names."""
    names = write("1.ckpt", "2.ckpt", "last.ckpt", "best-1.ckpt")
    for source in (".", "*.ckpt", names):
        with pytest.warns(UserWarning, match=r"unlike 1\.ckpt in the name: best-1.ckpt, last|last"):
            assert files(source) == ["1.ckpt", "2.ckpt"]


def test_a_list_without_numbers_is_taken_as_it_is():
    """Oracle: the list. A folder has no order."""
    names = write("start.pt", "middle.pt", "end.pt")
    assert files(names) == names
    with pytest.raises(ValueError, match=r"in which order\? end\.pt \(1\), middle\.pt \(1\)"):
        files(".")


def test_two_kinds_of_names_are_not_mixed():
    """A network and its optimizer, say."""
    write("model_1.pt", "model_2.pt", "other_1.pt", "other_2.pt")
    with pytest.raises(ValueError, match=r"model_#\.pt \(2\), other_#\.pt \(2\); list"):
        files(".")
    assert files("model_*") == ["model_1.pt", "model_2.pt"]


def test_folders_of_hugging_face(net):
    """Whole and in shards, in a folder that holds the last one, too. Oracle: the state dicts."""
    state = net.state_dict()
    for number in (5, 10):
        Path(f"run/checkpoint-{number}").mkdir(parents=True)
        torch.save(trained(net).state_dict(), f"run/checkpoint-{number}/optimizer.pt")
    save_file(state, "run/model.safetensors")
    save_file(state, "run/checkpoint-5/model.safetensors")
    shards = {name: f"shard-{number % 2}.bin" for number, name in enumerate(state)}
    for shard in set(shards.values()):
        part = {name: state[name] for name in state if shards[name] == shard}
        torch.save(part, f"run/checkpoint-10/{shard}")
    index = json.dumps({"metadata": {}, "weight_map": shards})
    Path("run/checkpoint-10/pytorch_model.bin.index.json").write_text(index)
    for source in ("run", "run/checkpoint-*", ["run/checkpoint-10", "run/checkpoint-5"]):
        one, other = dldr.load_trajectory(source)
        assert (one.file.name, other.file.name) == ("checkpoint-5", "checkpoint-10")
        assert same(one, state) and same(other, state)
    assert [part.name for part in other.parts] == ["shard-0.bin", "shard-1.bin"]


def test_says_what_is_there_instead(folder):
    """One line for nothing, a folder of something else, and a broken index."""
    with pytest.raises(ValueError, match=r"^x/\*\.pt: there is no such file$"):
        files("x/*.pt")
    with pytest.raises(ValueError, match=r"^no files$"):
        files([])
    Path("run").mkdir()
    Path("run/log.txt").touch()
    with pytest.raises(ValueError, match=r"^run: no \.pt, .* in it; it holds log\.txt$"):
        files("run")
    Path("run/model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match=r"index\.json: no index of files"):
        files("run")


def test_the_names_that_samples_have_are_told():
    """The names that were looked for, and those that are there."""
    write("000.pt", "epoch_1.pth")
    line = r"none that are called 0\.pt, 1\.pt, …, but 000\.pt, epoch_1\.pth$"
    with pytest.raises(FileNotFoundError, match=line):
        load_samples(".", 0, 2)


def test_snapshots_in_another_order_span_the_same(net):
    """safetensors sorts names. Oracle: PCA of the same network's vectors."""
    vectors = []
    for number in range(4):
        vectors.append(dldr.flatten(net))
        save_file(net.state_dict(), f"{number}.safetensors")
        trained(net)
    basis, _ = dldr.pca(dldr.load_trajectory("."), 2, model=net)
    expected, _ = dldr.pca(vectors, 2)
    assert torch.equal(basis, expected)


# ------------------------------------------------------------------------------ fingerprints

WRITERS = {
    "checksums": lambda state: torch.save(state, "1.pt"),
    "no checksums": lambda state: without_checksums(state),
    "old": lambda state: torch.save(state, "1.pt", _use_new_zipfile_serialization=False),
    "safetensors": lambda state: save_file(state, "1.pt"),
}


def without_checksums(state):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, "1.pt")
    finally:
        torch.serialization.set_crc32_options(True)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_fingerprint_tells_contents(kind):
    """Of files of any kind. Oracle: whether the contents are the same."""
    state, digests = {"weight": torch.ones(3), "none": torch.ones(0)}, []
    for value in (1.0, 1.0, 1.0001):
        WRITERS[kind](state | {"bias": torch.tensor([value])})
        digests.append(fingerprint([Path("1.pt")]))
    assert digests[0] == digests[1] != digests[2]


# ------------------------------------------------------------------- what real libraries wrote

HERE = Path(__file__).parent / "files"
TOOLS = {
    "lightning": ("lightning", {}),
    "timm": ("timm", {"key": "state_dict"}),
    "timm, ema": ("timm", {"key": "state_dict_ema"}),
    "transformers": ("transformers", {}),
    "shards": ("shards", {}),
    "peft": ("peft", {}),
}


@pytest.mark.filterwarnings("ignore:left out")
@pytest.mark.parametrize("tool", TOOLS)
def test_files_of_other_tools(tool):
    """Oracle: what each tool's own loader read from them, see files/make.py."""
    folder, options = TOOLS[tool]
    expected = np.load(HERE / "expected.npz")
    snapshots = dldr.load_trajectory(HERE / folder, **options)
    assert len(snapshots) == 2
    for snapshot in snapshots:
        names = expected[f"{tool}/{snapshot.file.name}/names"]
        assert sorted(snapshot) == list(names)
        values = torch.cat([snapshot[name].double().flatten() for name in names])
        assert np.array_equal(values, expected[f"{tool}/{snapshot.file.name}/values"])


def test_the_tools_names_become_the_network_s():
    """Lightning's prefix is that of an attribute. Oracle: the network's names."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match=r"left out.*last\.ckpt"):
        snapshots = dldr.load_trajectory(HERE / "lightning", model=net)
    assert [list(snapshot) for snapshot in snapshots] == [list(net.state_dict())] * 2
    with pytest.raises(ValueError, match="allowed as key: state_dict, state_dict_ema"):
        dldr.load_trajectory(HERE / "timm", model=net)
