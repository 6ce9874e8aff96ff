#!/usr/bin/env bash
# Run an experiment, the tests, the benchmarks or the linter, in a Python with what they require.
set -euo pipefail
cd "$(dirname "$0")"

# On the CPU, glibc gives large blocks back to the system and takes fresh pages for the next ones, at
# every step. Keeping them costs memory, and saves a third of a large batch's time (benchmarks/README.md).
export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_-4294967296}
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_-4294967296}

# The experiments, each with the first line of its file.
experiments() {
    for file in experiments/*.sh; do
        if [ "$file" = experiments/common.sh ]; then continue; fi
        printf '  %-18s %s\n' "$(basename "$file" .sh)" "$(sed 's/^# //;q' "$file")"
    done | LC_ALL=C sort
}

usage() {
    cat <<TEXT
usage: [SETTING=VALUE ...] ./run.sh [EXPERIMENT]
       ./run.sh test [PYTEST OPTION ...] | bench | gpu | lint

experiments (default: cifar where there is CUDA, else digits):
$(experiments)

settings, in front of the command: model=resnet32 c=0.4 seed="1 2" ./run.sh cifar
  c                  fraction of the training labels to corrupt, or several
  seed               random seed, or several
  model              network: resnet20 (imagenet and finetune-imagenet: resnet18, tiny-imagenet: resnet32;
                     finetune has its own)
  datasets           cifar*, finetune: CIFAR10, or CIFAR100, ImageFolder
  data_dir           where the images are, or are downloaded to: ../data
  weights            finetune: where the trained networks are: ../data/pretrained_models
  options            more options for all scripts, as in options="--threads 1"
                     (cifar-small and finetune have: --half --compile, which these replace)

Each experiment is a file, experiments/NAME.sh. An interrupted one resumes when it is called again;
it ends with a table, and a page with pictures in report/NAME. bench measures times and memory, lint
checks the code. gpu compares a GPU's numbers with the CPU's (tests/test_gpu.py) and measures its speed,
in ten minutes; its page is report/gpu/README.md.
TEXT
}

refuse() {
    echo "run.sh: $*" >&2
    exit 2
}

is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; }

# Has Python $1 what $2 … ask for? That is pip's answer, without network and its user's settings.
# With --report it answers for a Python that the system manages (PEP 668), too.
has() {
    is_recent "$1" && PIP_CONFIG_FILE=/dev/null "$1" -m pip --isolated install \
        --dry-run --report /dev/null --no-index --no-deps "${@:2}"
} &>/dev/null

# Set $python to one with what the requirements files $@ ask for: the current one, or .venv's.
prepare() {
    local requirements=("${@/#/--requirement=}")
    for python in python3 python .venv/bin/python; do
        if has "$python" "${requirements[@]}"; then return; fi
    done
    if [ ! -x .venv/bin/python ]; then
        is_recent python3 || refuse "needs Python 3.10 or newer; python3 is $(python3 --version 2>&1)"
        echo "run.sh: making .venv"
        python3 -m venv .venv
    fi
    echo "run.sh: installing what $* ask for into .venv (torch is large; this takes some minutes)"
    # A .venv of uv's has no pip, and that of Ubuntu 22.04 no --dry-run.
    "$python" -m pip --version &>/dev/null || "$python" -m ensurepip >/dev/null
    "$python" -m pip install --quiet --disable-pip-version-check 'pip>=22.2' "${requirements[@]}"
}

target=${1-}
if [ $# -gt 1 ] && [ "$target" != test ]; then refuse "takes one experiment; ./run.sh --help"; fi
case $target in
-h | --help) usage ;;
test)
    prepare requirements.txt tests/requirements.txt
    "$python" -m pytest "${@:2}"
    ;;
bench)
    prepare requirements.txt
    PYTHONPATH=. "$python" benchmarks/bench.py
    ;;
gpu)
    prepare requirements.txt tests/requirements.txt
    code=0
    "$python" -m pytest --numprocesses 0 -m gpu || code=$?
    PYTHONPATH=. "$python" benchmarks/gpu.py
    exit "$code"
    ;;
lint)
    prepare requirements.txt tests/requirements.txt
    "$python" -m ruff check .
    "$python" -m ruff format --check .
    ;;
*)
    if [[ -n $target && (! -f experiments/$target.sh || $target == common || $target == */*) ]]; then
        names=$(experiments | awk '{ printf "%s, ", $1 }')
        refuse "there is no experiment '$target'; allowed: ${names}test, bench, gpu, lint, --help"
    fi
    prepare requirements.txt
    if [ -z "$target" ]; then
        cuda=$("$python" -c 'import torch; print(torch.cuda.is_available())')
        if [ "$cuda" = True ]; then target=cifar; else target=digits; fi
        echo "run.sh: CUDA available: $cuda, so this runs $target; others: ./run.sh --help"
    fi
    . experiments/common.sh
    . "experiments/$target.sh"
    run_all "$target"
    ;;
esac
