"""trajectory.py and reporting.trajectories.

Oracles: scikit-learn's exact PCA, scipy's angles, numpy, walks in closed form and drawn.
"""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.decomposition import PCA

import dldr
import trajectory
from dldr.pca import centered, gram_matrix, random_walk_gram, with_names
from dldr.trajectory import load_samples
from reporting import plots, trajectories
from reporting.trajectories import Trajectory


@pytest.fixture
def positions() -> torch.Tensor:
    """Twelve positions (T, n) with steps of different lengths, in float64."""
    torch.manual_seed(0)
    steps = torch.randn(12, 40, dtype=torch.float64) * torch.linspace(0.2, 2, 12)[:, None]
    return steps.cumsum(0)


def of(positions) -> Trajectory:
    """The trajectory of positions (T, n)."""
    return Trajectory(gram_matrix(*with_names(list(positions), None)), positions.shape[1])


def test_components_are_those_of_scikit_learn(positions):
    """Shares, coordinates and counts. Oracle: PCA with the full solver."""
    measured = of(positions)
    exact = PCA(svd_solver="full").fit(positions)
    np.testing.assert_allclose(measured.shares, exact.explained_variance_ratio_[:-1], atol=1e-9)
    expected = exact.transform(positions)[:, :-1]
    np.testing.assert_allclose(measured.coordinates.abs(), np.abs(expected), atol=1e-9)
    summed = exact.explained_variance_ratio_.cumsum()
    for share in (0.5, 0.9, 0.99):
        assert measured.components(share) == np.flatnonzero(summed >= share)[0] + 1
    λ = exact.explained_variance_
    assert measured.dimension == pytest.approx(λ.sum() ** 2 / (λ**2).sum())


def test_distances_and_cosines_are_those_of_the_positions(positions):
    """Oracle: numpy, on the positions themselves."""
    measured, steps = of(positions), np.diff(positions, axis=0)
    lengths = np.linalg.norm(steps, axis=1)
    np.testing.assert_allclose(measured.steps, lengths)
    assert measured.length == pytest.approx(lengths.sum())
    assert measured.distance == pytest.approx(float((positions[-1] - positions[0]).norm()))
    expected = steps @ steps.T / np.outer(lengths, lengths)
    np.testing.assert_allclose(measured.cosines, expected, atol=1e-9)


def test_the_walk_of_equal_steps_has_the_variances_in_closed_form():
    """Oracle: 1 / (2 sin(πj / 2T))² for j = 1 … T − 1, and cosines as coordinates."""
    T = 31
    walk = Trajectory(random_walk_gram(torch.ones(T - 1)), 1)
    values = 1 / (2 * np.sin(np.pi * np.arange(1, T) / (2 * T))) ** 2
    np.testing.assert_allclose(walk.shares, values / values.sum(), atol=1e-12)
    assert walk.distance == pytest.approx((T - 1) ** 0.5)
    cosine = np.cos(np.pi * (np.arange(T) + 0.5) / T)
    first = walk.coordinates[:, 0].numpy()
    assert abs(first @ cosine) == pytest.approx(np.linalg.norm(first) * np.linalg.norm(cosine))


def test_a_drawn_walk_is_as_its_walk():
    """Oracle: a random walk with steps of different lengths in 50,000 dimensions."""
    torch.manual_seed(0)
    lengths = torch.linspace(0.5, 3, 20)
    walk = of((torch.randn(20, 50_000) * lengths[:, None]).cumsum(0))
    np.testing.assert_allclose(walk.shares, walk.walk.shares, rtol=0.05)
    np.testing.assert_allclose(walk.distance, walk.walk.distance, rtol=0.02)


def test_the_verdict_allows_for_chance():
    """Oracle: how positions were drawn: as a walk, as one that turns back, along a line."""

    def verdicts(positions):
        return trajectories.conclusions(of(positions))[1:]

    for seed in range(20):
        torch.manual_seed(seed)
        steps = torch.randn(30, 10_000)
        dimension, distance = verdicts(steps.cumsum(0))
        assert "it is about as concentrated as a walk" in dimension
        assert distance.endswith("about as far as by chance.")
    dimension, distance = verdicts(steps)
    assert "it is less concentrated than a walk" in dimension
    assert distance.endswith("its steps turn back.")
    dimension, distance = verdicts((steps + 0.5).cumsum(0))
    assert "it is more concentrated than a walk" in dimension
    assert distance.endswith("its steps share a direction.")


def test_angles_are_those_of_scipy(positions):
    """Oracle: subspace_angles of scikit-learn's components."""
    torch.manual_seed(1)
    other = positions[:9] + 0.3 * torch.randn(9, 40).cumsum(0)
    gram = gram_matrix(*with_names([*positions, *other], None))
    bases = [PCA(3, svd_solver="full").fit(part).components_.T for part in (positions, other)]
    expected = np.rad2deg(scipy.linalg.subspace_angles(*bases))[::-1]
    np.testing.assert_allclose(trajectories.angles(gram, len(positions), 3), expected, atol=1e-6)
    first = centered(gram[:12, :12])
    np.testing.assert_allclose(first, of(positions).gram, atol=1e-9)


def test_random_angles_are_as_expected():
    """Oracle: the smallest angle between random subspaces, drawn."""
    torch.manual_seed(0)
    angles = dldr.principal_angles(torch.randn(30, 3000), torch.randn(30, 3000)).rad2deg()
    assert float(angles[0]) == pytest.approx(trajectories.random_angle(30, 3000), abs=1.5)


# --------------------------------------------------------------------------------- the script


@pytest.fixture
def saved(tmp_path, monkeypatch) -> list[dict]:
    """Eight snapshots in run/, and with noise in other/; figures are not drawn."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plots, "image", lambda figure, kind: b"")
    torch.manual_seed(0)
    network, states = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5)), []
    for number in range(8):
        for parameter in network.parameters():
            parameter.data += torch.randn_like(parameter)
        states.append({name: value.clone() for name, value in network.state_dict().items()})
        noisy = {f"module.{name}": value + number / 9 for name, value in states[-1].items()}
        for folder, state in (("run", states[-1]), ("other", noisy)):
            Path(folder).mkdir(exist_ok=True)
            torch.save({"net": state, "epoch": number}, f"{folder}/epoch_{number}.pth")
    return states


def vectors(states, part="") -> np.ndarray:
    """The parameters (T, n) in state dicts, less the running statistics."""
    names = [n for n in states[0] if part in n and "running" not in n and "num_" not in n]
    return torch.stack([torch.cat([s[n].flatten() for n in names]) for s in states]).double()


def test_the_page_has_the_numbers(saved, capsys):
    """Also layer by layer. Oracle: the positions of the parameters."""
    numbers = trajectory.main(["run/*.pth", "--by-layer", "--out", "out"])
    expected = trajectories.quantities(of(vectors(saved)))
    assert numbers["quantities"]["trajectory"] == pytest.approx(expected)
    for layer in numbers["layers"]:
        alone = trajectories.quantities(of(vectors(saved, layer["layer"])))
        assert layer["path length"] == pytest.approx(alone["path length"])
        assert layer["effective dimension"] == pytest.approx(alone["effective dimension"])
    assert sum(layer["% of the variance"] for layer in numbers["layers"]) == pytest.approx(100)
    assert json.loads(Path("out/trajectory.json").read_text())["layers"] == numbers["layers"]
    spectrum = np.load("out/spectrum.npz")["trajectory"]
    np.testing.assert_allclose(spectrum, dldr.spectrum(list(vectors(saved))), atol=1e-6)
    page, text = Path("out/index.html").read_text(), capsys.readouterr().out
    for shown in ("effective dimension", "train_psgd.py --samples", "random walk"):
        assert shown in page and shown in text and shown in Path("out/trajectory.md").read_text()


def test_names_and_comparison(saved):
    """Oracle: the positions of the parameters of one layer, and the angle of a span and itself."""
    numbers = trajectory.main(["run", "--names", r"^0\.", "--compare", "other", "--out", "out"])
    expected = trajectories.quantities(of(vectors(saved, "0.")))
    assert numbers["quantities"]["trajectory"] == pytest.approx(expected)
    assert numbers["quantities"]["compared"]["path length"] != expected["path length"]
    assert np.load("out/angles.npz")["angles"].shape == (7,)
    same = trajectory.main(["run", "--compare", "run", "--n_components", "4", "--out", "out"])
    np.testing.assert_allclose(same["angles"], 4 * [0], atol=1e-3)


def test_frozen_parameters_do_not_make_angles_small(saved):
    """Oracle: the sentence about the same files without what is frozen."""
    command = ["run", "--compare", "other", "--n_components", "2", "--out", "out"]
    alone = trajectory.main(command)["sentences"][-1]
    for file in [*Path("run").iterdir(), *Path("other").iterdir()]:
        net = torch.load(file)["net"]
        first = next(iter(net))
        net[first.replace("0.weight", "frozen.weight")] = torch.ones(1000)
        torch.save({"net": net}, file)
    assert trajectory.main(command)["sentences"][-1] == alone
    assert "of the 45 parameters that move" in alone  # 6 × 5 + 5 and 2 × 5


def test_export_is_a_save_dir(saved, refused):
    """Oracle: the snapshots. An extra state that is an object of some class is left out."""
    for number, state in enumerate(saved):
        torch.save(state | {"0._extra_state": io.BytesIO(b"x")}, f"run/epoch_{number}.pth")
    trajectory.main(["run", "--export", "save", "--out", "out"])
    for one, other in zip(load_samples("save", 0, 8), saved, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert "--export: save holds snapshots" in refused(trajectory.main, ["run", "--export", "save"])


def test_layers_that_do_not_move_are_in_the_table(saved):
    """Frozen ones have a size, and nothing else."""
    for number in range(8):
        torch.save({"a.weight": torch.ones(3), "b.weight": torch.randn(3)}, f"{number}.pt")
    frozen, moved = trajectory.main(["*.pt", "--by-layer", "--out", "out"])["layers"]
    assert (frozen["parameters"], frozen["path length"]) == (3, None)
    assert moved["% of the variance"] == pytest.approx(100)


REFUSED = {
    "nothing.pt": "nothing.pt: there is no such file",
    "run/epoch_[01].pth": "2 snapshots; allowed: from 3",
    "same": "the snapshots are all the same",
    "nan": "nan/2.pt holds values that are not finite",
    "run --key model": "no weights under the key model; allowed: net",
    "run --names x": "--names: found in none of 0.weight",
    "run --names (": "--names: '(' is no regular expression",
    "run --out run/epoch_0.pth": "--out run/epoch_0.pth: not a directory",
    "run --export same": "--export: same holds snapshots",
    "run --compare same": "same/0.pt lacks 0.weight",
}


@pytest.mark.parametrize("command", REFUSED)
def test_mistakes_are_one_line(command, saved, refused):
    """And nothing is written."""
    for folder, value in (("same", 1.0), ("nan", float("nan"))):
        Path(folder).mkdir()
        for number in range(4):
            weight = torch.full((3,), 1.0 if number < 2 else value)
            torch.save({"weight": weight}, f"{folder}/{number}.pt")
    before = sorted(Path().rglob("*"))
    assert REFUSED[command] in refused(trajectory.main, command.split())
    assert sorted(Path().rglob("*")) == before


MEASURE = """
import sys, threading, time
import torch
from pathlib import Path
from dldr import load_trajectory
from reporting.trajectories import measure

def memory():
    text = Path("/proc/self/status").read_text()
    return int(text.partition("RssAnon:")[2].split()[0])

def watch():
    while True:
        seen.append(memory())
        time.sleep(0.002)

torch.set_num_threads(1)
sys.modules["dldr.pca"].BLOCK = 2**20
snapshots = load_trajectory(sys.argv[1])
measure(snapshots[:3], list(snapshots[0]), True)  # the libraries' own buffers
seen = [memory()]
threading.Thread(target=watch, daemon=True).start()
measure(snapshots, list(snapshots[0]), True)
print(max(seen) - seen[0])
"""


def test_memory_does_not_grow_with_the_snapshots(tmp_path):
    """Oracle: the memory of a process that is not of files; 20 snapshots of 4 MB are 80 MB."""
    for number in range(20):
        state = {"a": torch.randn(2**19), "b": torch.randn(2**18), "c": torch.randn(2**18)}
        torch.save(state, tmp_path / f"{number}.pt")
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert int(done.stdout) < 30_000, done.stderr  # KiB; a block has 8 MiB
