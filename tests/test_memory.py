"""What a run takes of memory. Oracles: counted images, arithmetic."""

import numpy as np
import pytest
from conftest import DIGITS
from PIL import Image

import train_pbfgs
import train_sgd
import training.memory
import training.setup
import utils


@pytest.fixture
def folder(tmp_path):
    """An ImageFolder of two classes, each of four and two images of 8 × 8 pixels."""
    for part, n in (("train", 4), ("test", 2)):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(n):
                pixels = np.full((8, 8, 3), 9 * i, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


def test_a_test_takes_as_many_images_as_their_size_allows(folder):
    for options, size in (
        ("--datasets digits", 500),
        ("--image-size 64", 500),
        ("--image-size 128", 125),  # four times the pixels
        ("--image-size 224 --batch-size 1024", 40),
        ("--image-size 224 --test-batch-size 7", 7),
        ("--image-size 4000", 1),
    ):
        argv = ["--datasets", "ImageFolder", "--data-dir", str(folder), *options.split()]
        args = training.setup.parse_args(train_sgd.get_options(), argv)
        assert utils.load_data(args).test.batch_size == size


def test_statistics_are_recomputed_in_batches_of_the_size_asked_for(copy, patch):
    """Not of all the batches of a step, which would be the largest forward pass there is."""
    sizes, recompute = [], None

    def spy(model, batches, half):
        def counted():
            for images in batches:
                sizes.append(len(images))
                yield images

        recompute(model, counted(), half)

    recompute = train_sgd.recompute_statistics
    patch("recompute_statistics", spy)
    argv = [*DIGITS, "--params_end", "7", "--n_components", "3", "--epochs", "1", "--bn-update"]
    train_pbfgs.main([*argv, "--accumulate", "4", "--batch-size", "100", "--save-dir", str(copy)])
    assert sum(sizes) == 1437
    assert max(sizes) <= 100
    assert len(sizes) == 15
