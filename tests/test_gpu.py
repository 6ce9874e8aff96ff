"""Whether training on a GPU is what it is on the CPU; `./run.sh gpu` runs these tests alone.

Oracles: the CPU in float64, runs on the CPU, an unbroken run, the recorded accuracies, and what
CUDA itself says of host syncs. All other tests are on the CPU, so torch sees no GPU in them.
"""

import json
import statistics
import subprocess
import warnings

import pytest
import torch
from bench import synthetic
from common import METHODS, RANDOM, ROOT, place, run, steps_of

import train_sgd
from dldr.trajectory import load_state_dict
from training.losses import cross_entropy
from training.network import build_model
from training.setup import parse_args
from utils import DATASETS, load_data

NO_GPU = "torch sees no CUDA; where there is one: pytest -n 0 -m gpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("settings_as_they_were"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU),
]

DIGITS = "--datasets digits --arch resnet8 --batch-size 256 --smalldatasets 0.5 --deterministic"
SUBSPACE = f"{DIGITS} --params_end 7 --n_components 5"
OPTIONS = {
    "SGD": f"{DIGITS} --lr 0.05 --sample-every 1",
    "P-SGD": f"{SUBSPACE} --lr 0.3",
    "P-BFGS": SUBSPACE,
}
# Relative errors allowed to logits and gradient. ReLUs that rounding switches on or off make the
# gradient jump, while the logits are continuous: in TensorFloat-32 theirs would be above 1e-4.
ALLOWED = {
    "": (1e-4, 0.01),
    "--channels-last": (1e-4, 0.01),
    "--compile": (1e-4, 0.01),
    "--tf32": (0.01, 0.1),
    "--half": (0.05, 0.3),
    "--half --channels-last": (0.05, 0.3),
    "--half --compile": (0.05, 0.3),
}


@pytest.mark.parametrize("options", ALLOWED)
def test_logits_and_gradient_of_a_batch(options):
    """Against the CPU's in float64."""
    results = []
    for device in ("cpu", f"auto {options}"):
        argv = f"--datasets digits --arch resnet8 --device {device}".split()
        args = parse_args(train_sgd.get_options(), argv)
        data = load_data(args)
        model, (images, labels) = build_model(args, data).train(), next(data.train.epoch())
        if not results:
            model, images = model.double(), images.double()
        if args.compile:
            model.compile()
        loss, logits = cross_entropy(model, images, labels, args.half)
        loss.backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        results.append([logits.detach().cpu().double(), gradient.cpu().double()])
    for exact, found, allowed in zip(*results, ALLOWED[options], strict=True):
        assert (found - exact).norm() <= allowed * exact.norm()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Runs of two epochs of all methods on the CPU; the later ones train in their subspaces."""
    directory = tmp_path_factory.mktemp("cpu")
    for method, options in OPTIONS.items():
        on_cpu = f"{options} --epochs 2 --device cpu --no-channels-last"
        run(method, on_cpu, place(method, directory))
    return directory


@pytest.mark.parametrize("method", OPTIONS)
def test_the_loss_of_an_epoch_is_the_cpu_s(method, directory):
    """Three steps from the same weights, in the basis that the CPU has computed."""
    own = run(method, f"{OPTIONS[method]} --epochs 1", place(method, directory, "-gpu"))
    file = place(method, directory) / "metrics.jsonl"
    cpu = json.loads(file.read_text().splitlines()[0])
    allowed = 1e-2 if method == "P-BFGS" else 1e-3  # rounding can decide a trial
    assert own[0]["train_loss"] == pytest.approx(cpu["train_loss"], rel=allowed)


@pytest.mark.parametrize("method", OPTIONS)
def test_a_resumed_run_is_an_unbroken_one_to_the_bit(method, directory):
    unbroken, resumed = (place(method, directory, part) for part in ("-whole", "-resumed"))
    run(method, f"{OPTIONS[method]} --epochs 2", unbroken)
    for more in ("--epochs 1", "--epochs 2 --resume"):
        run(method, f"{OPTIONS[method]} {more}", resumed)
    one, other = (load_state_dict(path / "model.th") for path in (unbroken, resumed))
    assert all(torch.equal(one[name], value) for name, value in other.items())


@pytest.mark.slow
def test_the_digits_experiment_reaches_the_recorded_accuracies(tmp_path):
    """`c=0 ./run.sh digits` with seed 1, against the CPU's means over five seeds."""
    shell = '. experiments/common.sh; digits_settings; echo "${sgd[@]}"'
    shell += '; echo "${psgd[@]}"; echo "${pbfgs[@]}"'
    done = subprocess.run(
        ["bash", "-c", shell], cwd=ROOT, check=True, capture_output=True, text=True
    )
    recorded = json.loads((ROOT / "experiments" / "digits-full.json").read_text())["results"]
    finals = {line["title"]: line["final"] for line in recorded if line["noise"] == 0}
    for method, options in zip(METHODS, done.stdout.splitlines(), strict=True):
        rows = run(method, f"--datasets digits --arch resnet20 {options}", place(method, tmp_path))
        cpu = statistics.mean(finals[method if method == "SGD" else f"{method}, BN update"])
        assert rows[-1]["test_acc"] == pytest.approx(cpu, abs=1.5), method


@pytest.mark.parametrize("method", METHODS)
def test_a_step_waits_for_nothing_but_its_trials(method, tmp_path, monkeypatch):
    monkeypatch.setitem(DATASETS, "CIFAR10", synthetic(1024))
    options = "--datasets CIFAR10 --arch resnet8 --batch-size 128 --epochs 1"
    options += f" {RANDOM}" if method != "SGD" else ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            steps = steps_of(method, options, place(method, tmp_path), caught)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for trials, events in steps:
        syncs = sum("called a synchronizing" in str(event.message) for event in events)
        assert syncs <= trials
