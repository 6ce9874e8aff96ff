"""Properties for arbitrary input. Oracles: plain loops, scikit-learn, and what must not matter."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from torch import nn

import utils
from utils import Split, TensorLoader

quick = settings(max_examples=100, deadline=None)


# flatten and unflatten


@st.composite
def networks(draw) -> nn.Module:
    """A few layers of several kinds, some nested, some without a bias, in float32 or float64."""
    channels = draw(st.lists(st.integers(1, 4), min_size=2, max_size=5))
    layers = []
    for number, (a, b) in enumerate(itertools.pairwise(channels)):
        kind = draw(st.sampled_from(["linear", "conv", "norm", "embedding", "block", "none"]))
        bias = draw(st.booleans())
        layers.append(
            {
                "linear": lambda a=a, b=b, bias=bias: nn.Linear(a, b, bias=bias),
                "conv": lambda a=a, b=b, bias=bias: nn.Conv2d(a, b, (1, 3), bias=bias),
                "norm": lambda a=a: nn.BatchNorm1d(a),
                "embedding": lambda a=a, b=b: nn.Embedding(a, b),
                "block": lambda a=a, b=b: nn.Sequential(
                    nn.Linear(a, b), nn.ReLU(), nn.Linear(b, a)
                ),
                "none": nn.Flatten,
            }[kind if number else "linear"]()
        )
    network = nn.Sequential(*layers)
    return network.double() if draw(st.booleans()) else network


@given(network=networks(), seed=st.integers(0, 99))
@quick
def test_a_vector_and_its_parts_are_the_same_numbers(network, seed):
    """Round trips both ways, and a name's part is where counting to it says."""
    torch.manual_seed(seed)
    vector = torch.randn_like(utils.flatten(network))
    parts = utils.unflatten(vector, network)
    start = 0
    for name, parameter in network.named_parameters():
        assert parts[name].shape == parameter.shape
        assert (
            parts[name].reshape(-1).tolist() == vector[start : start + parameter.numel()].tolist()
        )
        start += parameter.numel()
    assert start == len(vector)
    assert network.load_state_dict(parts, strict=False).unexpected_keys == []
    again = utils.flatten(network)
    assert torch.equal(again, vector)
    assert again.dtype == vector.dtype == next(network.parameters()).dtype


@given(network=networks(), difference=st.sampled_from([-1, 1]), dims=st.integers(0, 2))
@quick
def test_a_vector_of_another_shape_is_refused(network, difference, dims):
    n = sum(parameter.numel() for parameter in network.parameters())
    shape = {0: (), 1: (n + difference,), 2: (1, n)}[dims]
    with pytest.raises(ValueError, match=f"for {n} parameters"):
        utils.unflatten(torch.zeros(shape), network)


# label noise


@given(
    labels=st.lists(st.integers(0, 9), min_size=1, max_size=200),
    few=st.floats(0, 1),
    more=st.floats(0, 1),
    seed=st.integers(0, 2**31 - 1),
)
@quick
def test_what_is_drawn_depends_on_the_seed_alone(labels, few, more, seed):
    """Not on the labels there were; and what is drawn for a fraction is drawn for a larger one."""
    few, more = sorted((few, more))
    labels = torch.tensor(labels)
    unknown = torch.full_like(labels, -1)
    drawn = utils.corrupt_labels(unknown, few, 10, seed)
    expected = torch.where(drawn >= 0, drawn, labels)
    assert torch.equal(utils.corrupt_labels(labels, few, 10, seed), expected)
    drawn_more = utils.corrupt_labels(unknown, more, 10, seed)
    assert torch.equal(drawn[drawn >= 0], drawn_more[drawn >= 0])
    for type_ in (torch.uint8, torch.int32):
        corrupted = utils.corrupt_labels(labels.to(type_), few, 10, seed)
        assert corrupted.dtype == type_
        assert torch.equal(corrupted.long(), expected)


# PCA


def samples_of(t: int, n: int, seed: int, fall: float = 0.5) -> np.ndarray:
    """T samples (T, n) about a mean of 0, each singular value `fall` times the one before."""
    random = np.random.default_rng(seed)
    k = min(t - 1, n)
    left = random.normal(size=(t, k))
    left = np.linalg.qr(left - left.mean(0))[0]
    right = np.linalg.qr(random.normal(size=(n, k)))[0].T
    return left * fall ** np.arange(k) @ right


shapes = {"t": st.integers(3, 10), "n": st.integers(2, 60), "seed": st.integers(0, 2**31 - 1)}


@given(**shapes, scale=st.sampled_from([1e-6, 1.0, 1e6]), data=st.data())
@quick
def test_pca_is_scikit_learn_s_full_pca(t, n, seed, scale, data):
    samples = scale * samples_of(t, n, seed)
    k = data.draw(st.integers(1, min(t - 1, n)))
    oracle = PCA(k, svd_solver="full").fit(samples)
    basis, ratios = utils.pca(samples, k)
    np.testing.assert_allclose(basis, oracle.components_, atol=1e-6)
    np.testing.assert_allclose(ratios, oracle.explained_variance_ratio_, atol=1e-12)
    fraction = data.draw(st.floats(0.01, 0.99))
    shares = PCA(svd_solver="full").fit(samples).explained_variance_ratio_.cumsum()
    assume(np.abs(shares - fraction).min() > 1e-9)
    expected = PCA(fraction, svd_solver="full").fit(samples).n_components_
    assert len(utils.pca(samples, fraction)[0]) == expected


@given(**shapes, shift=st.floats(-1e3, 1e3), scale=st.floats(1e-3, 1e3))
@quick
def test_where_the_samples_are_and_in_which_order_does_not_matter(t, n, seed, shift, scale):
    samples = samples_of(t, n, seed)
    k = min(t - 1, n, 4)
    basis, ratios = utils.pca(samples, k)
    random = np.random.default_rng(seed)
    moved = scale * samples[random.permutation(t)] + shift * random.normal(size=n)
    moved_basis, moved_ratios = utils.pca(moved, k)
    torch.testing.assert_close(moved_basis, basis, atol=1e-6, rtol=0)
    torch.testing.assert_close(moved_ratios, ratios, atol=1e-6, rtol=0)


@given(**shapes, fall=st.floats(0.02, 0.9), dtype=st.sampled_from([torch.float32, torch.float64]))
@quick
def test_rows_are_orthonormal_however_fast_the_variance_falls(t, n, seed, fall, dtype):
    """And all components together explain all of it, in descending order."""
    samples = torch.from_numpy(samples_of(t, n, seed, fall)).to(dtype)
    k = min(t - 1, n, 1 + int(math.log(1e-6) / math.log(fall)))
    basis, ratios = utils.pca(samples, k)
    assert basis.dtype == ratios.dtype == dtype
    error = (basis.double() @ basis.double().T - torch.eye(k)).abs().max()
    assert error < 1e-6
    assert (ratios.diff() <= 0).all()
    assert ratios.sum() <= 1 + 1e-6
    assert k < min(t - 1, n) or ratios.sum() > 1 - 1e-6


# batches and augmentation


@given(n=st.integers(0, 300), size=st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_batches_are_full_but_for_the_last(n, size):
    """Oracle: dealing out the images one by one; then a lone one joins its neighbour."""
    batches = []
    for image in range(n):
        if image % size == 0:
            batches.append(0)
        batches[-1] += 1
    if len(batches) > 1 and batches[-1] == 1 and size > 1:
        batches[-2:] = [size + 1]
    assert utils.batch_sizes(n, size) == batches


@given(
    n=st.integers(1, 12),
    size=st.integers(1, 6),
    padding=st.integers(0, 3),
    flip=st.booleans(),
    batch=st.integers(1, 13),
    seed=st.none() | st.integers(0, 99),
    number=st.integers(0, 5),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
)
@quick
def test_an_epoch_shows_every_image_once_cut_and_mirrored(
    n, size, padding, flip, batch, seed, number, layout
):
    """Oracle: all that padding, cutting and mirroring can make of an image, one by one."""
    random = np.random.default_rng(n)
    pixels = random.integers(256, size=(n, 3, size, size), dtype=np.uint8)
    split = Split(torch.from_numpy(pixels), torch.arange(n), [])
    dataset = utils.DATASETS["CIFAR100"]._replace(padding=padding, flip=flip)
    batches = list(TensorLoader(split, dataset, batch, "cpu", seed, layout=layout).epoch(number))
    assert [len(labels) for _, labels in batches] == utils.batch_sizes(n, batch)
    assert all(images.is_contiguous(memory_format=layout) for images, _ in batches)
    labels = torch.cat([labels for _, labels in batches])
    assert sorted(labels.tolist()) == list(range(n))
    mean, std = (np.array(values)[:, None, None] for values in (dataset.mean, dataset.std))
    shown = torch.cat([images for images, _ in batches]).numpy()
    for image, label in zip(shown * std + mean, labels, strict=True):
        image = np.rint(255 * image)
        padded = np.pad(pixels[label], [(0, 0), (padding, padding), (padding, padding)])
        offsets = range(2 * padding + 1) if seed is not None else [padding]
        possible = [
            padded[:, top : top + size, left : left + size] for top in offsets for left in offsets
        ]
        if flip and seed is not None:
            possible += [window[:, :, ::-1] for window in possible]
        assert any(np.array_equal(image, window) for window in possible)
    if seed is None:
        assert labels.tolist() == list(range(n))
