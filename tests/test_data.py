"""The data section. Oracles: explicit slicing, counts, torchvision's readers and transforms."""

import hashlib
import multiprocessing
import os
import pickle
import shutil
import signal
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from torchvision import datasets
from torchvision.transforms import v2 as transforms

import training.memory
import training.setup
import utils
from training.options import get_parser
from utils import DATASETS, Split, TensorLoader, corrupt_labels


def arguments(**options):
    """Parsed options with the scripts' defaults."""
    parser = get_parser("sgd", "", "resnet8", 1, 0.0)
    words = []
    for name, value in options.items():
        words += ["--" + name.replace("_", "-"), str(value)]
    return training.setup.parse_args(parser, words)


def random_split(n=20, size=8, seed=0):
    random = np.random.default_rng(seed)
    images = torch.from_numpy(random.integers(256, size=(n, 3, size, size), dtype=np.uint8))
    return Split(images, torch.arange(n) % 10, list("0123456789"))


def test_sizes_have_a_unit_in_which_they_show():
    for size, text in (
        (0, "0.0 bytes"),
        (1023, "1023.0 bytes"),
        (1024, "1.0 KiB"),
        (303_136, "296.0 KiB"),
        (5 * 2**20, "5.0 MiB"),
        (2**30 - 1, "1024.0 MiB"),
        (2**40, "1024.0 GiB"),
    ):
        assert training.memory.size_text(size) == text


# label noise


@given(
    n=st.integers(0, 300),
    fraction=st.floats(0, 1),
    classes=st.integers(1, 100),
    seed=st.integers(0, 2**40),
)
@settings(max_examples=80, deadline=None)
def test_corruption_changes_at_most_its_fraction(n, fraction, classes, seed):
    labels = torch.arange(n) % classes
    before = labels.clone()
    corrupted = corrupt_labels(labels, fraction, classes, seed)
    assert torch.equal(labels, before), "pure"
    assert (corrupted != labels).sum() <= int(fraction * n)
    assert corrupted.dtype == labels.dtype
    assert n == 0 or 0 <= corrupted.min() <= corrupted.max() < classes
    assert torch.equal(corrupted, corrupt_labels(labels, fraction, classes, seed))


def test_corruption_draws_exactly_its_count():
    """With label −1 everywhere, every drawn label shows."""
    for n, fraction in ((1000, 0.4), (1437, 0.2), (7, 0.5), (10, 1.0)):
        drawn = corrupt_labels(torch.full((n,), -1), fraction, 10, 1) >= 0
        assert drawn.sum() == int(fraction * n)


@pytest.mark.parametrize("classes", [10, 100])
def test_corruption_is_uniform_over_all_classes(classes):
    """χ² test of the drawn labels, true one included, and of the places drawn."""
    labels = torch.full((40_000,), -1)
    corrupted = corrupt_labels(labels, 0.5, classes, 3)
    drawn = corrupted[corrupted >= 0]
    assert stats.chisquare(torch.bincount(drawn, minlength=classes)).pvalue > 1e-3
    places = (corrupted >= 0).view(40, 1000).sum(1)
    assert stats.chisquare(places).pvalue > 1e-3


def test_corruption_depends_on_the_seed_but_not_on_the_first_epoch():
    """numpy takes seeds [1] and [1, 0] for one: the noise must not be epoch 0's first images."""
    labels = torch.full((1000,), -1)
    drawn = [
        set(torch.where(corrupt_labels(labels, 0.3, 10, seed) >= 0)[0].tolist()) for seed in (1, 2)
    ]
    assert drawn[0] != drawn[1]
    for epoch in range(3):
        order = utils.rng(1, "epoch", epoch).permutation(1000)[:300]
        assert len(drawn[0] & set(order.tolist())) < 150


# augmentation


def test_mirrored_images_equal_flipping_each():
    """An epoch with flips is the epoch without, each image mirrored or not after its crop."""
    split, dataset = random_split(60), DATASETS["CIFAR10"]
    ((mirrored, _),) = TensorLoader(split, dataset, 60, "cpu", 1).epoch(3)
    random = utils.rng(1, "epoch", 3)
    order, (top, left) = random.permutation(60), random.integers(9, size=(2, 60))
    flips = random.integers(2, size=60)
    padded = torch.nn.functional.pad(split.images, [4] * 4)
    for i, position in enumerate(order):
        image = padded[position].flip(-1) if flips[i] else padded[position]
        image = image[:, top[i] : top[i] + 8, left[i] : left[i] + 8] / 255
        expected = transforms.Normalize(dataset.mean, dataset.std)(image)
        torch.testing.assert_close(mirrored[i], expected)


def test_every_window_of_the_padded_image_and_no_other():
    """What an epoch can show is what torchvision's flip and RandomCrop with padding can."""
    split = random_split(1, size=4)
    dataset = DATASETS["CIFAR10"]._replace(padding=1)
    images = TensorLoader(split, dataset, 1, "cpu", seed=0)
    padded = torch.nn.functional.pad(split.images[0], [1] * 4)
    normalize = transforms.Normalize(dataset.mean, dataset.std)
    possible = []
    for top in range(3):
        for left in range(3):
            window = padded[:, top : top + 4, left : left + 4]
            possible += [normalize(image / 255) for image in (window, window.flip(-1))]
    seen = set()
    for epoch in range(400):
        ((image, _),) = images.epoch(epoch)
        matches = [i for i, p in enumerate(possible) if torch.allclose(image[0], p, atol=1e-6)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert seen == set(range(18))


def test_padding_is_black_before_normalization():
    """The border of a crop is −mean / std, what a black pixel becomes, and not 0."""
    split = Split(torch.full((64, 3, 4, 4), 255, dtype=torch.uint8), torch.zeros(64).long(), ["a"])
    dataset = DATASETS["CIFAR10"]
    ((images, _),) = TensorLoader(split, dataset, 64, "cpu", seed=0).epoch(0)
    black = (0 - torch.tensor(dataset.mean)) / torch.tensor(dataset.std)
    white = (1 - torch.tensor(dataset.mean)) / torch.tensor(dataset.std)
    for channel in range(3):
        values = images[:, channel]
        is_black = torch.isclose(values, black[channel], atol=1e-5)
        assert is_black.any()
        assert torch.isclose(values[~is_black], white[channel], atol=1e-5).all()


def test_flip_and_crop_are_fair():
    """χ² of where 4,000 images were cut, read off pixels that hold their row and column."""
    pixels = torch.zeros(4000, 3, 16, 16, dtype=torch.uint8)
    pixels[:, 0] = 1 + torch.arange(16)[:, None]
    pixels[:, 1] = 1 + torch.arange(16)
    dataset = DATASETS["CIFAR10"]._replace(mean=(0, 0, 0), std=(1 / 255,) * 3)
    images = TensorLoader(Split(pixels, torch.arange(4000), []), dataset, 4000, "cpu", seed=0)
    ((cut, _),) = images.epoch(5)
    row, column, right = cut[:, 0, 8, 8], cut[:, 1, 8, 7], cut[:, 1, 8, 8]
    flipped = right < column
    top, left = row - 9, torch.where(flipped, column - 9, column - 8)
    assert stats.binomtest(int(flipped.sum()), 4000).pvalue > 1e-3
    for offset in (top, left):
        assert set(offset.unique().tolist()) == set(range(-4, 5))
        assert stats.chisquare(torch.bincount((offset + 4).long(), minlength=9)).pvalue > 1e-3
    independent = stats.contingency.crosstab(top.numpy(), left.numpy(), flipped.numpy()).count
    assert stats.chisquare(independent.flatten()).pvalue > 1e-3


def test_an_epoch_is_a_function_of_seed_and_number():
    split = random_split()
    epochs = {
        (seed, number): list(TensorLoader(split, DATASETS["digits"], 7, "cpu", seed).epoch(number))
        for seed in (1, 2)
        for number in (0, 1)
    }
    again = TensorLoader(split, DATASETS["digits"], 7, "cpu", 1)
    list(again.epoch(0))
    for ours, first in zip(again.epoch(1), epochs[1, 1], strict=True):
        assert torch.equal(ours[0], first[0])
        assert torch.equal(ours[1], first[1])
    firsts = [batches[0][1].tolist() for batches in epochs.values()]
    assert len({tuple(first) for first in firsts}) == 4
    for batches in epochs.values():
        assert [len(labels) for _, labels in batches] == [7, 7, 6]
        assert torch.equal(
            torch.cat([labels for _, labels in batches]).sort()[0], split.labels.sort()[0]
        )


@pytest.mark.parametrize(
    ("n", "size", "sizes"),
    [
        (9, 4, [4, 5]),
        (8, 4, [4, 4]),
        (10, 4, [4, 4, 2]),
        (1, 4, [1]),
        (3, 1, [1, 1, 1]),
        (4, 9, [4]),
    ],
)
def test_a_lone_last_image_joins_the_batch_before(n, size, sizes):
    assert utils.batch_sizes(n, size) == sizes
    images = TensorLoader(random_split(n), DATASETS["digits"], size, "cpu", 1)
    assert [len(labels) for _, labels in images.epoch(0)] == sizes


def test_without_seed_images_come_in_order_and_only_normalized():
    split, dataset = random_split(), DATASETS["CIFAR100"]
    batches = list(TensorLoader(split, dataset, 8, "cpu").epoch())
    expected = transforms.Normalize(dataset.mean, dataset.std)(split.images / 255)
    torch.testing.assert_close(torch.cat([images for images, _ in batches]), expected)
    assert torch.equal(torch.cat([labels for _, labels in batches]), split.labels)


# datasets


def test_digits_split_is_fixed_and_whole():
    data = utils.load_data(arguments(datasets="digits"))
    assert (len(data.train), len(data.test), data.num_classes) == (1437, 360, 10)
    raw = datasets_digits()
    ours = torch.cat([data.train.images[:, 0, 1:-1, 1:-1], data.test.images[:, 0]]) // 15
    assert sorted(map(tuple, ours.flatten(1).tolist())) == sorted(map(tuple, raw))
    pixels = data.train.images[:, :, 1:-1, 1:-1] / 255
    assert pixels.mean().item() == pytest.approx(DATASETS["digits"].mean[0], abs=1e-3)
    assert pixels.std().item() == pytest.approx(DATASETS["digits"].std[0], abs=1e-3)


def datasets_digits():
    from sklearn.datasets import load_digits

    return load_digits().data.astype(int).tolist()


def test_corruption_and_subset_of_a_dataset():
    clean = utils.load_data(arguments(datasets="digits")).train
    noisy = utils.load_data(arguments(datasets="digits", corrupt=0.4))
    assert torch.equal(noisy.train.labels, corrupt_labels(clean.labels, 0.4, 10, 1))
    small = utils.load_data(arguments(datasets="digits", smalldatasets=0.1))
    assert len(small.train) == 143
    assert len(small.test) == 360
    assert len(small.train.labels.unique()) == 10, "a random part, not the first"
    other = utils.load_data(arguments(datasets="digits", smalldatasets=0.1, randomseed=2))
    assert not torch.equal(small.train.images, other.train.images)


def write_cifar(root, name, monkeypatch):
    """A CIFAR archive of 20 training and 10 test images, unpacked, in the original's layout."""
    dataset = getattr(datasets, name)
    random = np.random.default_rng(0)
    folder = root / dataset.base_folder
    folder.mkdir(parents=True)
    hundred = name == "CIFAR100"
    key = "fine_labels" if hundred else "labels"
    classes = [str(i) for i in range(100 if hundred else 10)]
    files = {dataset.meta["filename"]: {dataset.meta["key"]: classes}}
    for listed, n in ((dataset.train_list, 4), (dataset.test_list, 10)):
        for file, _ in listed:
            n = 20 if file == "train" else n
            pixels = random.integers(256, size=(n, 3072), dtype=np.uint8)
            files[file] = {"data": pixels, key: random.integers(len(classes), size=n).tolist()}
    sums = {}
    for file, content in files.items():
        (folder / file).write_bytes(pickle.dumps(content))
        sums[file] = hashlib.md5((folder / file).read_bytes()).hexdigest()
    for attribute in ("train_list", "test_list"):
        listed = [[file, sums[file]] for file, _ in getattr(dataset, attribute)]
        monkeypatch.setattr(dataset, attribute, listed)
    monkeypatch.setitem(dataset.meta, "md5", sums[dataset.meta["filename"]])
    return files


@pytest.mark.parametrize(("name", "classes"), [("CIFAR10", 10), ("CIFAR100", 100)])
def test_cifar_is_read_by_torchvision(name, classes, tmp_path, monkeypatch):
    files = write_cifar(tmp_path, name, monkeypatch)
    data = utils.load_data(arguments(datasets=name, data_dir=tmp_path))
    assert (len(data.train), len(data.test), data.num_classes) == (20, 10, classes)
    test = files["test" if classes == 100 else "test_batch"]
    raw = torch.from_numpy(test["data"].reshape(-1, 3, 32, 32))
    assert torch.equal(data.test.images, raw)
    assert data.test.labels.tolist() == test["fine_labels" if classes == 100 else "labels"]
    (images, _), *_ = data.train.epoch(0)
    assert images.shape == (20, 3, 32, 32)


def test_mnist_is_read_by_torchvision(tmp_path):
    random = np.random.default_rng(0)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = {}
    for part, n in (("train", 12), ("t10k", 6)):
        pixels[part] = random.integers(256, size=(n, 28, 28), dtype=np.uint8)
        labels = random.integers(10, size=n, dtype=np.uint8)
        header = struct.pack(">IIII", 0x803, n, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels[part].tobytes())
        header = struct.pack(">II", 0x801, n)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    data = utils.load_data(arguments(datasets="MNIST", data_dir=tmp_path))
    assert (len(data.train), len(data.test), data.num_classes) == (12, 6, 10)
    for channel in range(3):
        assert np.array_equal(data.test.images[:, channel], pixels["t10k"])


@pytest.fixture
def folder(tmp_path):
    """An ImageFolder: two classes of six and two lossless 40 × 36 images."""
    random = np.random.default_rng(0)
    for part, n in (("train", 6), ("test", 2)):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(n):
                pixels = random.integers(256, size=(40, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


def test_small_image_files_are_decoded_once(folder):
    data = utils.load_data(arguments(datasets="ImageFolder", data_dir=folder, image_size=36))
    assert isinstance(data.train, TensorLoader)
    assert (len(data.train), len(data.test), data.num_classes) == (12, 4, 2)
    assert data.test.labels.tolist() == [0, 0, 1, 1]
    first = np.array(Image.open(folder / "test" / "cat" / "0.png"))[2:38]
    assert np.array_equal(data.test.images[0].permute(1, 2, 0), first), "the middle of the image"


def test_val_serves_as_test(folder):
    (folder / "test").rename(folder / "val")
    data = utils.load_data(arguments(datasets="ImageFolder", data_dir=folder))
    assert len(data.test) == 4
    assert data.test.images.shape == (4, 3, 32, 32)


def test_one_class_is_refused(folder):
    for part in ("train", "test"):
        shutil.rmtree(folder / part / "cat")
    with pytest.raises(ValueError, match="one class; allowed: at least two"):
        utils.load_data(arguments(datasets="ImageFolder", data_dir=folder))


@pytest.mark.parametrize("workers", [0, 2])
def test_large_image_files_are_streamed(folder, workers):
    options = {"data_dir": folder, "image_size": 80, "workers": workers, "batch_size": 5}
    data = utils.load_data(arguments(datasets="ImageFolder", **options))
    assert isinstance(data.train, utils.FileLoader)
    batches = list(data.train.epoch(0))
    assert [tuple(images.shape) for images, _ in batches] == [(n, 3, 80, 80) for n in (5, 5, 2)]
    assert batches[0][0].dtype == torch.float32
    labels = torch.cat([labels for _, labels in batches])
    assert labels.bincount().tolist() == [6, 6]
    for other in (0, 1):  # worker processes
        data.train.workers = other
        for ours, first in zip(data.train.epoch(0), batches, strict=True):
            assert torch.equal(ours[0], first[0])
    assert not torch.equal(next(data.train.epoch(1))[0], batches[0][0])
    ((images, labels),) = data.test.epoch()
    assert labels.tolist() == [0, 0, 1, 1]
    oracle = transforms.Compose(
        [
            transforms.PILToTensor(),
            transforms.Resize(91),
            transforms.CenterCrop(80),
            transforms.ToDtype(torch.float32, scale=True),
            transforms.Normalize(*DATASETS["ImageFolder"][1:3]),
        ]
    )
    file = Image.open(folder / "test" / "cat" / "0.png")
    torch.testing.assert_close(images[0], oracle(file))


@pytest.mark.parametrize("size", [32, 80])
def test_own_mean_and_std_without_augmentation(size, folder):
    """Oracle: the test half's way with the training images, normalized by the formula."""
    options = {"datasets": "ImageFolder", "data_dir": folder, "image_size": size, "workers": 0}
    words = ["--mean", "0.5", "0.4", "0.3", "--std", "0.2", "0.1", "0.4"]
    args = arguments(**options)
    plain = get_parser("sgd", "", "resnet8", 1, 0.0).parse_args([*words, "--no-augment"])
    vars(args).update({name: vars(plain)[name] for name in utils.PREPROCESSING})
    shutil.copytree(folder / "train", folder / "test", dirs_exist_ok=True)
    train, test = utils.load_data(args)[:2]
    own = [image for images, _ in train.epoch(3) for image in images]
    unshuffled = [own[i] for i in np.argsort(utils.rng(1, "epoch", 3).permutation(12))]
    expected = [image for images, _ in test.epoch() for image in images]
    files = [file.relative_to(folder / "train") for file in sorted(folder.glob("train/*/*"))]
    all_files = [file.relative_to(folder / "test") for file in sorted(folder.glob("test/*/*"))]
    for image, file in zip(unshuffled, files, strict=True):
        assert torch.equal(image, expected[all_files.index(file)])
    args.mean, args.std = (0.0,) * 3, (1.0,) * 3
    raw = [image for images, _ in utils.load_data(args).test.epoch() for image in images]
    mean, std = torch.tensor([[0.5, 0.4, 0.3], [0.2, 0.1, 0.4]])[:, :, None, None]
    torch.testing.assert_close(torch.stack(expected), (torch.stack(raw) - mean) / std)


@pytest.mark.parametrize("size", [32, 80])
@pytest.mark.parametrize("option", ["no_flip", "no_augment", None])
def test_what_is_drawn_in_training(option, size, folder):
    """Oracle: whether any of many images is mirrored, or cut elsewhere: white is at their left."""
    for file in folder.glob("train/*/*"):
        pixels = np.zeros((size, size, 3), dtype=np.uint8)
        pixels[:, : size // 4] = 255
        Image.fromarray(pixels).save(file)
    options = {"datasets": "ImageFolder", "data_dir": folder, "image_size": size, "workers": 0}
    args = arguments(**options)
    if option:
        setattr(args, option, True)
    loader = utils.load_data(args).train
    images = torch.cat([images for n in range(4) for images, _ in loader.epoch(n)])[:, 0, size // 2]
    left, right = images[:, : size // 2].sum(1), images[:, size // 2 :].sum(1)
    assert (right > left).any() == (option is None)
    assert (len(images.unique(dim=0)) > 1) == (option != "no_augment")


def test_a_signal_to_the_group_leaves_the_workers_to_the_run(folder):
    """A scheduler's goes to all: a worker that died of it would end the run before it is saved."""
    options = {"data_dir": folder, "image_size": 80, "workers": 1, "batch_size": 2}
    batches = utils.load_data(arguments(datasets="ImageFolder", **options)).train.epoch(0)
    before = multiprocessing.active_children()  # an error in an earlier test may have kept some
    next(batches)
    (worker,) = {*multiprocessing.active_children()} - {*before}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(worker.pid, number)
    assert len(list(batches)) == 5


def test_imagenet_is_cut_as_published():
    dataset = DATASETS["ImageNet"]
    split = Split(np.array(["a"]), torch.tensor([0]), ["a"])
    train = utils.FileLoader(split, dataset, 1, "cpu", 0, size=224, workers=0)
    test = utils.FileLoader(split, dataset, 1, "cpu", size=224, workers=0)
    names = [[type(t).__name__ for t in part.transform.transforms] for part in (train, test)]
    assert names[0][1:3] == ["RandomResizedCrop", "RandomHorizontalFlip"]
    assert names[1][1:3] == ["Resize", "CenterCrop"]
    assert test.transform.transforms[1].size == [256]


def test_a_corrupted_label_reaches_the_streamed_images(folder):
    options = {"data_dir": folder, "image_size": 80, "workers": 0, "corrupt": 1.0}
    data = utils.load_data(arguments(datasets="ImageFolder", **options))
    expected = corrupt_labels(torch.tensor([0] * 6 + [1] * 6), 1.0, 2, 1)
    seen = torch.cat([labels for _, labels in data.train.epoch(0)])
    order = utils.rng(1, "epoch", 0).permutation(12)
    assert torch.equal(seen, expected[order])


@pytest.mark.parametrize("image_size", [32, 80])
def test_the_parts_of_several_processes_make_the_batch(image_size, folder, monkeypatch):
    """In memory and streamed; 12 images in batches of 7, for 2 processes."""
    options = {"data_dir": folder, "image_size": image_size, "workers": 0, "batch_size": 7}
    data = utils.load_data(arguments(datasets="ImageFolder", **options))
    whole = list(data.train.epoch(3))
    monkeypatch.setattr(utils, "world_size", lambda: 2)
    parts = []
    for number in range(2):
        monkeypatch.setattr(utils, "rank", lambda number=number: number)
        parts.append(list(data.train.epoch(3)))
    for batch, *pieces in zip(whole, *parts, strict=True):
        assert [len(labels) for _, labels in pieces] == [-(-len(batch[1]) // 2), len(batch[1]) // 2]
        for position in (0, 1):
            joined = torch.cat([piece[position] for piece in pieces])
            assert torch.equal(joined, batch[position])
