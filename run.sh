#!/usr/bin/env bash
# The chain: sample a trajectory by SGD, then train in the subspace it spans, by P-BFGS and P-SGD.
set -euo pipefail
cd "$(dirname "$0")"

# On the CPU, glibc gives large blocks back to the system and takes fresh pages for the next ones, at
# every step. Keeping them costs memory, and saves a third of a large batch's time (benchmarks/README.md).
export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_-4294967296}
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_-4294967296}

usage='usage: ./run.sh [digits|cifar|digits-full|cifar-small|finetune|cost|imagenet|finetune-imagenet|test|bench|lint]'
usage+='   settings: model=resnet32 c=0.4 seed=2 ./run.sh cifar'

# Does interpreter $1 have what the requirements files $2 … ask for?
has() {
    "$1" - "${@:2}" 2>/dev/null <<'PYTHON'
import re, sys
from importlib.metadata import version

numbers = lambda text: ([int(part) for part in re.findall(r"\d+", text)] + [0, 0])[:3]
assert sys.version_info >= (3, 10)
for file in sys.argv[1:]:
    for line in open(file):
        name, floor = line.split(">=")
        assert numbers(version(name)) >= numbers(floor)
PYTHON
}

# Set $python to an interpreter with the requirements files $@: the current one, or .venv's.
prepare() {
    for python in python3 python .venv/bin/python; do
        if has "$python" "$@"; then return; fi
    done
    if [ ! -x .venv/bin/python ]; then
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
            { echo "run.sh: needs Python 3.10 or newer; python3 is $(python3 --version)" >&2; exit 2; }
        echo "run.sh: making .venv"
        python3 -m venv .venv
    fi
    python=.venv/bin/python
    echo "run.sh: installing what $* ask for into .venv (torch is large; this takes some minutes)"
    "$python" -m pip install --quiet --disable-pip-version-check "${@/#/--requirement=}"
}

# Show a command, run it, and append what it prints to the log in the save dir, once there is one:
# options that are refused leave nothing behind.
run() {
    local line unlogged=
    { echo "+ $python -u $*"; "$python" -u "$@" 2>&1; } | {
        trap '' INT TERM # the script ends in its own time, and its last line is to be seen
        while IFS= read -r line || [ -n "$line" ]; do
            printf '%s\n' "$line"
            unlogged+=$line$'\n'
            if [ -d "$save_dir" ] && printf '%s' "$unlogged" 2>/dev/null >>"$save_dir/log.txt"; then
                unlogged=
            fi
        done
    }
}

# Set $save_dir, with $1 at its end, and the options that all scripts take there.
settle() {
    model=${model:-resnet20}
    save_dir=save_labelnoise${c}_$model${small:+_$small}
    if [ "$datasets" != CIFAR10 ]; then save_dir+=_$datasets; fi
    if [ "$seed" != 1 ]; then save_dir+=_seed$seed; fi
    save_dir+=${1-}
    common=(--datasets "$datasets" --corrupt "$c" --arch="$model" --randomseed "$seed"
        --save-dir="$save_dir" --resume ${data_dir:+--data-dir="$data_dir"}
        ${small:+--smalldatasets "$small"} $options)
    save_dirs+=("$save_dir")
}

# The three scripts with a target's settings, and what they have to be better than; each goes on
# where an interrupted chain stopped.
chain() {
    settle
    run train_sgd.py "${common[@]}" "${sgd[@]}"
    run train_pbfgs.py "${common[@]}" "${pbfgs[@]}"
    run train_psgd.py "${common[@]}" "${psgd[@]}"
    run train_psgd.py "${common[@]}" "${psgd[@]}" --basis random
    run train_sgd.py "${common[@]}" --average $average
}

# Run $3 for each of the seeds and the label noises of the settings, else for those of $1 and of $2.
over() {
    local seeds=${seed:-$1} noises=${c:-$2}
    for seed in $seeds; do
        for c in $noises; do "$3"; done
    done
}

# The settings of the targets on digits; they were chosen on the seeds 1 to 3.
on_digits() {
    datasets=digits average="16 31"
    sgd=(--lr 0.1 --epochs=60 --milestones 40 50)
    subspace=(--n_components 20 --params_end 31 --batch-size 128 --bn-update)
    pbfgs=(--epochs 20 "${subspace[@]}")
    psgd=(--epochs 30 --lr 0.3 --milestones 15 25 "${subspace[@]}")
}

target_digits() {
    on_digits
    over 1 "0 0.4" chain
}

# Noise levels, and numbers of dimensions, over seeds that no setting was chosen on.
target_digits-full() {
    on_digits
    over "4 5 6 7 8" "0 0.2 0.4 0.6 0.8" chain_and_dimensions
}

chain_and_dimensions() {
    chain
    case $c in 0 | 0.4) ;; *) return ;; esac
    for k in 2 5 10 20 40; do
        run train_psgd.py "${common[@]}" "${psgd[@]}" --params_end 41 --n_components $k --run psgd_k$k
    done
}

# How few epochs can be sampled: beside the 30 of digits-full, 5, 10 and 20.
target_cost() {
    on_digits
    over "4 5 6 7 8" 0 chain_and_shorter
}

chain_and_shorter() {
    chain
    for last in 5 10 20; do
        plane=(--params_end $((last + 1)) --n_components $((last < 20 ? last - 1 : 20)))
        run train_pbfgs.py "${common[@]}" "${pbfgs[@]}" "${plane[@]}" --run pbfgs_of_$last
        run train_psgd.py "${common[@]}" "${psgd[@]}" "${plane[@]}" --run psgd_of_$last
    done
}

# The published experiment.
target_cifar() {
    datasets=${datasets:-CIFAR10} average="41 81"
    sgd=(--lr 0.1 --epochs=150)
    subspace=(--params_start 0 --params_end 81 --n_components 40)
    pbfgs=(--epochs 20 --batch-size 1024 "${subspace[@]}")
    psgd=(--epochs 40 --lr 1 --batch-size 128 "${subspace[@]}")
    over 1 0 chain
}

# The settings of the targets on a tenth of CIFAR-10.
on_a_tenth() {
    datasets=${datasets:-CIFAR10} small=0.1 options=${options:---half --compile} average="16 31"
    sgd=(--lr 0.1 --epochs=60 --milestones 40 50)
    subspace=(--n_components 20 --params_end 31 --bn-update)
    pbfgs=(--epochs 20 --batch-size 500 "${subspace[@]}")
    psgd=(--epochs 30 --lr 1 --milestones 15 25 --batch-size 128 "${subspace[@]}")
}

target_cifar-small() {
    on_a_tenth
    over "1 2" "0 0.4" chain
}

# A trained network trained further, and in the plane of the first epochs of that.
target_finetune() {
    on_a_tenth
    over "1 2" "0 0.4" further
}

further() {
    settle
    run train_sgd.py "${common[@]}" "${sgd[@]}"
    trained=$save_dir/model.th
    settle _finetune
    run train_sgd.py "${common[@]}" --pretrained "$trained" --lr 0.01 --epochs=14
    subspace=(--params_end 11 --n_components 10 --epochs 4 --bn-update)
    run train_pbfgs.py "${common[@]}" "${subspace[@]}" --batch-size 500
    run train_psgd.py "${common[@]}" "${subspace[@]}" --lr 1
    run train_sgd.py "${common[@]}" --average 1 11
}

# data_dir is the directory with train/ and val/.
target_imagenet() {
    datasets=ImageNet model=${model:-resnet18} average="121 241"
    sgd=(--lr 0.1 --epochs=90 --batch-size 256 --sample-every 1000)
    subspace=(--params_start 0 --params_end 241 --params_stride 2 --n_components 120 --batch-size 256)
    pbfgs=(--epochs 4 "${subspace[@]}")
    psgd=(--epochs 4 --lr 1 "${subspace[@]}")
    over 1 0 chain
}

# torchvision's weights trained further: samples of the first 5, 10, 15 epochs.
target_finetune-imagenet() {
    datasets=ImageNet model=${model:-resnet18}
    over 1 0 further_on_imagenet
}

further_on_imagenet() {
    settle _finetune
    run train_sgd.py "${common[@]}" --pretrained --lr 0.005 --epochs=15 --batch-size 256 --sample-every 500
    for epochs in 5 10 15; do # of about 10 samples each: 1,281,167 images are 5,005 batches
        subspace=(--params_end $((10 * epochs + 1)) --n_components 30 --batch-size 256 --epochs 4)
        run train_pbfgs.py "${common[@]}" "${subspace[@]}" --run pbfgs_of_$epochs
    done
}

target=${1-} options=${options-} small= save_dirs=()
if [ $# -gt 1 ] && [ "$target" != test ]; then echo "run.sh: $usage" >&2; exit 2; fi
if [ -z "$target" ]; then
    prepare requirements.txt
    cuda=$("$python" -c 'import torch; print(torch.cuda.is_available())')
    if [ "$cuda" = True ]; then target=cifar; else target=digits; fi
    echo "run.sh: CUDA is $([ "$cuda" = True ] && echo here || echo not here), so this runs $target; $usage"
fi

case $target in
test)
    prepare requirements.txt tests/requirements.txt
    "$python" -m pytest "${@:2}"
    ;;
bench)
    prepare requirements.txt
    for name in data pca step engine chain; do PYTHONPATH=. "$python" "benchmarks/bench_$name.py"; done
    ;;
lint)
    prepare requirements.txt tests/requirements.txt
    "$python" -m ruff check .
    "$python" -m ruff format --check .
    ;;
*)
    if ! declare -F "target_$target" >/dev/null; then
        echo "run.sh: there is no target '$target'; $usage" >&2
        exit 2
    fi
    prepare requirements.txt
    "target_$target"
    run report.py "${save_dirs[@]}"
    ;;
esac
