"""--basis walk. Oracle: the walk's spectrum in closed form."""

import torch

import dldr
from dldr.pca import gram_matrix, step_lengths
from training.subspaces import random_walk


def test_a_random_walk_has_the_steps_of_the_trajectory_and_the_spectrum_of_chance():
    torch.manual_seed(0)
    snapshots = [{"w": torch.randn(40) * scale} for scale in (0.1, 1, 3, 2, 1)]
    lengths = step_lengths(gram_matrix(snapshots, ["w"]))
    between = zip(snapshots[1:], snapshots, strict=False)
    expected = torch.stack([(later["w"] - earlier["w"]).norm() for later, earlier in between])
    torch.testing.assert_close(lengths, expected.double(), rtol=1e-5, atol=0)
    walk = random_walk(lengths, 200_000, seed=1)
    drawn = torch.stack([later - earlier for later, earlier in zip(walk[1:], walk, strict=False)])
    torch.testing.assert_close(drawn.norm(dim=1).double(), lengths, rtol=1e-3, atol=0)
    torch.testing.assert_close(
        dldr.spectrum(walk), dldr.random_walk_spectrum(lengths), rtol=0.02, atol=1e-3
    )
    assert torch.equal(walk[-1], random_walk(lengths, 200_000, seed=1)[-1])
    assert not torch.equal(walk[-1], random_walk(lengths, 200_000, seed=2)[-1])
