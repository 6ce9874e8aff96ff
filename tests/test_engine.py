"""The options of the engine. Oracles: a run without them, torch's account of its settings."""

import shutil

import pytest
import torch
from conftest import DIGITS
from test_data import random_split

import train_pbfgs
import train_psgd
import train_sgd
import training.losses
import training.setup
import utils
from dldr.trajectory import load_state_dict

pytestmark = pytest.mark.usefixtures("settings_as_they_were")

SUBSPACE = [*DIGITS, "--params_end", "7", "--n_components", "5"]


def weights(save_dir, name="model.th"):
    """The exported network as one vector."""
    state = load_state_dict(save_dir / name)
    return torch.cat([value.double().reshape(-1) for value in state.values()])


def test_channels_last_is_how_the_same_images_lie(batch):
    batches = []
    for layout in (torch.contiguous_format, torch.channels_last):
        data = utils.TensorLoader(
            random_split(), utils.DATASETS["digits"], 7, "cpu", 1, layout=layout
        )
        batches.append([images for images, _ in data.epoch(0)])
        assert all(images.is_contiguous(memory_format=layout) for images in batches[-1])
    assert all(torch.equal(*pair) for pair in zip(*batches, strict=True))


@pytest.mark.parametrize(
    ("given", "device", "decided"),
    [
        ([], "cpu", True),
        ([], "cuda", False),
        (["--channels-last"], "cuda", True),
        (["--no-channels-last"], "cpu", False),
    ],
)
def test_channels_last_is_for_the_cpu_unless_told(given, device, decided, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    assert training.setup.parse_args(train_sgd.get_options(), given).channels_last is decided


def test_channels_last_reaches_the_network(tmp_path, patch):
    seen = []
    cross_entropy = training.losses.cross_entropy

    def spy(model, images, labels, half):
        seen.append(images.is_contiguous(memory_format=torch.channels_last))
        return cross_entropy(model, images, labels, half)

    patch("cross_entropy", spy)
    for switch in ("--channels-last", "--no-channels-last"):
        run = [*DIGITS, "--epochs", "1", "--save-dir", str(tmp_path / switch), switch]
        train_sgd.main(run)
        assert set(seen) == {switch == "--channels-last"}
        seen.clear()


@pytest.mark.slow
@pytest.mark.parametrize("script", [train_sgd, train_psgd, train_pbfgs])
def test_compile_compiles_what_is_trained_and_changes_nothing(
    script, sampled, tmp_path, monkeypatch
):
    """Traced as by the usual backend, but run as traced: without half a minute."""
    compiled, graphs = [], []

    def backend(graph, inputs):
        graphs.append(inputs)
        return graph

    def traced(module, **settings):
        compiled.append(type(module).__name__)
        call = torch.compile(module._call_impl, backend=backend, **settings)
        module._compiled_call_impl = call

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    torch._dynamo.utils.counters.clear()
    for switch in ([], ["--compile"]):
        save_dir = shutil.copytree(sampled, tmp_path / f"run{len(switch)}")
        options = DIGITS if script is train_sgd else [*SUBSPACE, "--bn-update"]
        run = [*options, "--epochs", "2", "--overwrite", "--save-dir", str(save_dir), *switch]
        script.main(run)
    assert compiled == ["ResNet" if script is train_sgd else "Subspace"]
    name = {train_sgd: "", train_psgd: "psgd", train_pbfgs: "pbfgs"}[script]
    one, other = (weights(tmp_path / f"run{number}" / name) for number in range(2))
    assert torch.equal(one, other)
    assert not torch._dynamo.utils.counters["graph_break"]
    # One for each size of a batch, as many as torch keeps.
    assert 2 < len(graphs) <= torch._dynamo.config.recompile_limit
    assert not any(isinstance(value, torch.SymInt) for inputs in graphs for value in inputs)


def test_compile_needs_a_compiler_on_the_cpu(refused, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "--compile" in refused(train_sgd.main, ["--compile", "--device", "cpu"])


def test_settings_are_those_of_the_last_options(monkeypatch):
    def settings():
        backends = torch.backends
        return (
            torch.are_deterministic_algorithms_enabled(),
            backends.cudnn.benchmark,
            backends.cudnn.allow_tf32,
            backends.cuda.matmul.allow_tf32,
        )

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    training.setup.parse_args(
        train_sgd.get_options(), ["--deterministic", "--tf32", "--threads", "1"]
    )
    assert settings() == (True, False, True, True)
    assert torch.get_num_threads() == 1
    training.setup.parse_args(train_sgd.get_options(), [])
    assert settings() == (False, True, False, False)


def test_deterministic_runs_are_bit_equal(tmp_path):
    for name in ("one", "other"):
        run = [*DIGITS, "--epochs", "2", "--deterministic", "--save-dir", str(tmp_path / name)]
        train_sgd.main(run)
    assert torch.equal(weights(tmp_path / "one"), weights(tmp_path / "other"))
