"""DLDR: train a network in the low-dimensional subspace that its own trajectory spans.

    snapshots = [dldr.flatten(network)]                    # θ_0, where training starts
    snapshots.append(dldr.flatten(network))                # after each epoch of ordinary training
    basis, ratios = dldr.pca(snapshots, n_components=40)   # (40, n), (40,)
    dldr.load_vector(snapshots[0], network)                # back to θ_0
    subspace = dldr.Subspace(network, basis)               # θ(z) = θ_0 + Pᵀ z
    optimizer = torch.optim.SGD([subspace.coordinates], lr=1.0, momentum=0.9)

Li et al., "Low Dimensional Trajectory Hypothesis is True: DNNs Can Be Trained in Tiny Subspaces",
TPAMI 2022.
"""

from dldr.landscape import landscape
from dldr.parameters import average, flatten, load_vector, trainable, unflatten
from dldr.pbfgs import PBFGS, frozen_buffers
from dldr.pca import pca, principal_angles, random_walk_spectrum, spectrum
from dldr.subspace import Subspace
from dldr.trajectory import load_trajectory

__all__ = [
    "PBFGS",
    "Subspace",
    "average",
    "flatten",
    "frozen_buffers",
    "landscape",
    "load_trajectory",
    "load_vector",
    "pca",
    "principal_angles",
    "random_walk_spectrum",
    "spectrum",
    "trainable",
    "unflatten",
]
__version__ = "0.1.0"
