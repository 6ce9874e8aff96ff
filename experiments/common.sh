# What the experiments share. An experiment lists its runs, and run.sh has them all run.

runs=() save_dirs=() small='' options=${options-}

# Set $save_dir, with $1 at its end, and the options that all scripts take there.
trajectory() {
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

# List a run: a script and its options.
run() { runs+=("$(printf '%q ' "$save_dir" "$@")"); }

# List the three scripts with the experiment's settings, a random subspace and a weight average.
chain() {
    trajectory
    run train_sgd.py "${common[@]}" "${sgd[@]}"
    run train_pbfgs.py "${common[@]}" "${pbfgs[@]}"
    run train_psgd.py "${common[@]}" "${psgd[@]}"
    run train_psgd.py "${common[@]}" "${psgd[@]}" --basis random
    run train_sgd.py "${common[@]}" --average $average
}

# List the baselines on the samples up to $1: averages from sample $2 on and of the last alone, both
# methods from the mean, trainable weight averaging, and ordinary SGD at a tenth of the learning rate,
# for $3 epochs more.
baselines() {
    local last=$1 first=$2 more=$3 origin=$save_dir
    run train_sgd.py "${common[@]}" --average "$first" $((last + 1)) --run "average_from_$first"
    run train_sgd.py "${common[@]}" --average "$last" $((last + 1)) --run "average_from_$last"
    run train_psgd.py "${common[@]}" "${psgd[@]}" --start mean
    run train_pbfgs.py "${common[@]}" "${pbfgs[@]}" --start mean
    run train_psgd.py "${common[@]}" "${psgd[@]}" --basis schmidt --start mean --weight-decay 1e-5 \
        --epochs 10 --run twa
    trajectory "_from_$last"
    run train_sgd.py "${common[@]}" "${sgd[@]}" --pretrained "$origin/$last.pt" \
        --start-epoch "$last" --milestones "$last" --epochs $((last + more))
}

# Settings for digits, chosen on the seeds 1 to 3.
digits_settings() {
    datasets=digits average="16 31"
    sgd=(--lr 0.1 --epochs=60 --milestones 40 50)
    subspace=(--n_components 20 --params_end 31 --batch-size 128 --bn-update)
    pbfgs=(--epochs 20 "${subspace[@]}")
    psgd=(--epochs 30 --lr 0.3 --milestones 15 25 "${subspace[@]}")
}

# Settings for CIFAR-10, as published.
cifar_settings() {
    datasets=${datasets:-CIFAR10} average="41 81"
    sgd=(--lr 0.1 --epochs=150)
    subspace=(--params_start 0 --params_end 81 --n_components 40)
    pbfgs=(--epochs 20 --batch-size 1024 "${subspace[@]}")
    psgd=(--epochs 40 --lr 1 --batch-size 128 "${subspace[@]}")
    seeds=${seed:-1} noises=${c:-0}
}

# Settings for a tenth of CIFAR-10.
tenth_settings() {
    datasets=${datasets:-CIFAR10} small=0.1 options=${options:---half --compile} average="16 31"
    sgd=(--lr 0.1 --epochs=60 --milestones 40 50)
    subspace=(--n_components 20 --params_end 31 --bn-update)
    pbfgs=(--epochs 20 --batch-size 500 "${subspace[@]}")
    psgd=(--epochs 30 --lr 1 --milestones 15 25 --batch-size 128 "${subspace[@]}")
}

# Show the command $3 … after the words $1, run it, and append what it prints to log.txt in directory
# $2, once there is one: options that are refused leave nothing behind. On a terminal errors are only
# seen there, as is the progress bar: each line takes its place.
logged() {
    local line unlogged='' clear=''
    if [ -t 1 ] && [ -t 2 ]; then clear=$'\r\033[K'; fi
    {
        echo "$1 $python -u ${*:3}"
        if [ -t 2 ]; then "$python" -u "${@:3}"; else "$python" -u "${@:3}" 2>&1; fi
    } | {
        trap '' HUP INT TERM # the script ends in its own time, and its last line is to be seen
        while IFS= read -r line || [ -n "$line" ]; do
            printf '%s\n' "$clear$line" 2>/dev/null || true # the terminal may have been closed
            unlogged+=$line$'\n'
            if [ -d "$2" ] && printf '%s' "$unlogged" 2>/dev/null >>"$2/log.txt"; then unlogged=; fi
        done
    }
}

# Run what experiment $1 has listed, then its report. If that was done and nothing in the save dirs has
# changed since, show the report again.
run_all() {
    local report=report/$1 number=0 commands newer command
    local finished=$report/finished.txt
    commands=$(printf '%s\n' "${runs[@]}")
    if [ "$(cat "$finished" 2>/dev/null)" = "$commands" ] &&
        newer=$(find "${save_dirs[@]}" -newer "$finished" 2>/dev/null) && [ -z "$newer" ]; then
        echo "run.sh: all ${#runs[@]} runs of $1 are finished"
        cat "$report/log.txt"
        return
    fi
    for command in "${runs[@]}"; do
        number=$((number + 1))
        export TQDM_BAR_FORMAT="[$number/${#runs[@]}] {l_bar}{bar}{r_bar}"
        eval "logged '[$number/${#runs[@]}]' $command"
    done
    export TQDM_BAR_FORMAT='[report] {l_bar}{bar}{r_bar}'
    mkdir -p "$report"
    rm -f "$report/log.txt"
    logged "[report]" "$report" report.py --out="$report" "${save_dirs[@]}"
    echo "$commands" >"$finished"
}
