"""utils.pca and load_samples. Oracles: scikit-learn's full-SVD PCA, and the definition."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

import training.files
import utils
from models import build
from training.subspaces import Basis, computed_from, load_basis, save_basis


def walk(samples: int = 20, n: int = 300, dtype: type = np.float64) -> np.ndarray:
    """A random walk whose steps shrink, as a training trajectory's do."""
    steps = (
        np.random.default_rng(0).normal(size=(samples, n)) * np.geomspace(1, 0.01, samples)[:, None]
    )
    return np.cumsum(steps, axis=0).astype(dtype)


@pytest.mark.parametrize("block", [20, 7 * 20, 2**24])
def test_equals_scikit_learn(block, monkeypatch):
    monkeypatch.setitem(
        utils.pca.__globals__, "BLOCK", block
    )  # one column, 7, and all of them at a time
    for k in (1, 5, 19):
        oracle = PCA(k, svd_solver="full").fit(walk())
        basis, ratios = utils.pca(walk(), k)
        np.testing.assert_allclose(basis, oracle.components_, atol=1e-8)
        np.testing.assert_allclose(ratios, oracle.explained_variance_ratio_, atol=1e-12)


def test_fraction_of_the_variance_as_in_scikit_learn():
    for fraction in (0.3, 0.9, 0.99, 0.9999):
        oracle = PCA(fraction, svd_solver="full").fit(walk())
        basis, ratios = utils.pca(walk(), fraction)
        assert len(basis) == len(ratios) == oracle.n_components_
        assert ratios.sum() > fraction


def test_more_samples_than_parameters():
    samples = walk(50, 6)
    oracle = PCA(6, svd_solver="full").fit(samples)
    np.testing.assert_allclose(utils.pca(samples, 6)[0], oracle.components_, atol=1e-8)


def test_float32_samples_give_an_orthonormal_float32_basis():
    """Singular values over six decades, where one pass over the Gram matrix is 8e-6 off."""
    random = np.random.default_rng(1)
    left = np.linalg.qr(random.normal(size=(30, 30)))[0]
    right = np.linalg.qr(random.normal(size=(5000, 30)))[0].T
    samples = (left * np.geomspace(1, 1e-6, 30) @ right).astype(np.float32)
    basis, _ = utils.pca(samples, 29)
    assert basis.dtype == torch.float32
    error = (basis.double() @ basis.double().T - torch.eye(29)).abs().max()
    assert error < 1e-6


def test_vectors_matrices_and_state_dicts_agree():
    models = []
    for seed in range(4):
        torch.manual_seed(seed)
        models.append(build("resnet8", 10))
    vectors = [utils.flatten(model) for model in models]
    states = [model.state_dict() for model in models]
    names = [name for name, _ in models[0].named_parameters()]
    expected = utils.pca(torch.stack(vectors), 3)
    for samples, options in (
        (vectors, {}),
        (states, {"model": models[0]}),
        (states, {"names": names}),
    ):
        for ours, oracle in zip(utils.pca(samples, 3, **options), expected, strict=True):
            torch.testing.assert_close(ours, oracle)


@given(
    samples=st.integers(3, 12), n=st.integers(2, 40), k=st.integers(1, 11), seed=st.integers(0, 99)
)
@settings(max_examples=60, deadline=None)
def test_rows_are_orthonormal_and_ordered(samples, n, k, seed):
    k = min(k, samples - 1, n)
    data = np.random.default_rng(seed).normal(size=(samples, n))
    basis, ratios = utils.pca(data, k)
    torch.testing.assert_close(basis @ basis.T, torch.eye(k, dtype=torch.float64))
    assert (ratios.diff() <= 0).all()
    assert 0 < ratios.sum() <= 1 + 1e-12
    largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()


def test_what_the_samples_do_not_allow_is_refused():
    for samples, k, message in (
        (walk(5), 5, "at most 4"),
        (walk(5, 3), 4, "at most 3"),
        (walk(1), 0.5, "at most 0"),
        (walk(5), 0, "at most 4"),
        (np.ones((5, 30)), 1, "span only 0"),
        (np.repeat(walk(3), 2, axis=0), 3, "span only 2"),
        ([torch.ones(10), torch.zeros(12), torch.ones(10)], 1, "differ in their shapes"),
        ([torch.ones(10), torch.zeros(1), torch.ones(10)], 1, "differ in their shapes"),
        (np.where(np.arange(300) == 7, np.nan, walk(5)), 2, "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            utils.pca(samples, k)


def test_the_basis_has_the_widest_type_of_the_samples():
    """Oracle: the same samples as vectors in that type."""
    states = [{"a": torch.randn(4).bfloat16(), "b": torch.randn(30)} for _ in range(5)]
    expected, _ = utils.pca([torch.cat([state["a"], state["b"]]) for state in states], 3)
    assert expected.dtype == torch.float32
    for names in (["a", "b"], ["b", "a"]):
        basis, _ = utils.pca(states, 3, names=names)
        assert torch.equal(basis, expected if names[0] == "a" else expected.roll(30, dims=1))


def test_whole_numbers_are_samples_too():
    numbers = (100 * walk(6)).astype(int)
    for ours, oracle in zip(
        utils.pca(numbers, 3), utils.pca(numbers.astype(float), 3), strict=True
    ):
        assert torch.equal(ours, oracle)


def test_load_samples_reads_the_named_ones(tmp_path):
    for number in range(5):
        training.files.save(tmp_path / f"{number}.pt", {"weight": torch.tensor([float(number)])})
    loaded = utils.load_samples(tmp_path, 1, 5, 2)
    assert [float(state["weight"]) for state in loaded] == [1, 3]


@pytest.mark.parametrize("block", [3 * 100, 2**24])
def test_samples_on_disk_give_what_they_give_in_memory(block, tmp_path, monkeypatch):
    """Blocks that end inside and between tensors, another memory format, a view of a storage."""
    monkeypatch.setitem(utils.pca.__globals__, "BLOCK", block)
    torch.manual_seed(0)
    network, states = build("resnet8", 10), []
    for number in range(3):
        state = dict(build("resnet8", 10).state_dict())
        name = "layer1.0.conv1.weight"
        state[name] = state[name].to(memory_format=torch.channels_last)
        state["linear.bias"] = torch.randn(25)[3:23:2]
        training.files.save(tmp_path / f"{number}.pt", state)
        states.append(state)
    samples = utils.load_samples(tmp_path, 0, 3)
    for sample, state in zip(samples, states, strict=True):
        assert list(sample) == list(state)
        for name, value in state.items():
            assert torch.equal(sample[name], value)
            assert sample[name].dtype == value.dtype
    bases = (utils.pca(each, 2, model=network) for each in (samples, states))
    for ours, oracle in zip(*bases, strict=True):
        assert torch.equal(ours, oracle)


def test_load_samples_names_what_is_missing_and_what_is_there(tmp_path):
    for number in range(4):
        training.files.save(tmp_path / f"{number}.pt", {"weight": torch.zeros(1)})
    with pytest.raises(FileNotFoundError, match=r"lacks the snapshots 4, 5; there are 0, 1, …, 3"):
        utils.load_samples(tmp_path, 0, 6)


def test_load_samples_drops_the_prefix_of_dataparallel(tmp_path):
    model = torch.nn.Linear(2, 2)
    torch.save(torch.nn.DataParallel(model).state_dict(), tmp_path / "0.pt")
    assert list(utils.load_samples(tmp_path, 0, 1)[0]) == ["weight", "bias"]


def test_load_samples_reads_files_of_old_torch(tmp_path):
    """What the published code's torch 1.4 wrote is no zip file, and cannot be mapped."""
    state = {"weight": torch.arange(3.0)}
    torch.save(state, tmp_path / "0.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(utils.load_samples(tmp_path, 0, 1)[0]["weight"], state["weight"])


def test_a_shorter_type_is_rounding():
    exact, ratios = utils.pca(walk(dtype=np.float32), 5)
    basis, same_ratios = utils.pca(walk(dtype=np.float32), 5, dtype=torch.bfloat16)
    assert torch.equal(same_ratios, ratios)
    # Rounded from float64 at once, so at most half a unit of bfloat16's 8 bits away.
    torch.testing.assert_close(basis.float(), exact, rtol=2**-8, atol=0)
    assert basis.dtype == torch.bfloat16


@pytest.fixture
def saved(tmp_path):
    """Two samples on disk, and what changes one of them."""
    torch.manual_seed(0)
    states = [{"a": torch.randn(3, 2), "b": torch.randn(5)} for _ in range(2)]
    files = [tmp_path / f"{number}.pt" for number in range(2)]

    def write() -> list[Path]:
        for file, state in zip(files, states, strict=True):
            training.files.save(file, state)
        return files

    return states, write


@pytest.mark.parametrize("zip_archive", [True, False])
def test_a_fingerprint_tells_contents_order_and_options(saved, zip_archive, monkeypatch):
    """Oracle: what was changed; the same contents, written again, are the same."""
    torch_save = torch.save
    monkeypatch.setattr(
        torch, "save", lambda *a: torch_save(*a, _use_new_zipfile_serialization=zip_archive)
    )
    states, write = saved
    first = training.files.fingerprint(write(), 40, "float32")
    assert training.files.fingerprint(write(), 40, "float32") == first
    assert training.files.fingerprint(write()[::-1], 40, "float32") != first
    assert training.files.fingerprint(write()[:1], 40, "float32") != first
    assert training.files.fingerprint(write(), 41, "float32") != first
    assert training.files.fingerprint(write(), 40.0, "float32") != first
    states[1]["b"][4] += 1e-6
    assert training.files.fingerprint(write(), 40, "float32") != first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_basis_is_the_same_bits(dtype, tmp_path):
    basis, ratios = utils.pca(walk(dtype=np.float32), 5, dtype=dtype)
    parameters = {"weight": torch.zeros(20, 14), "bias": torch.zeros(20)}
    save_basis(tmp_path / "basis.npz", Basis(basis, ratios, "source"), parameters)
    loaded = load_basis(tmp_path / "basis.npz", 300)
    assert loaded.source == computed_from(tmp_path / "basis.npz") == "source"
    assert torch.equal(loaded.vectors, basis)
    assert loaded.vectors.dtype == dtype
    assert torch.equal(loaded.ratios, ratios)


@pytest.mark.parametrize("content", [None, b"", b"no archive", "other arrays"])
def test_a_file_that_is_no_basis_was_computed_from_nothing(content, tmp_path):
    file = tmp_path / "basis.npz"
    if content == "other arrays":
        np.savez(file, basis=np.eye(2))
    elif content is not None:
        file.write_bytes(content)
    assert computed_from(file) is None
