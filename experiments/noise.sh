# digits with 80 % of the labels corrupted: P-BFGS from θ_0 and from the mean
digits_settings
seeds=${seed:-1 2 3 4 5} noises=${c:-0.8}

for seed in $seeds; do
    for c in $noises; do
        trajectory
        run train_sgd.py "${common[@]}" "${sgd[@]}"
        run train_sgd.py "${common[@]}" --average $average
        run train_pbfgs.py "${common[@]}" "${pbfgs[@]}"
        run train_pbfgs.py "${common[@]}" "${pbfgs[@]}" --start mean
        run train_psgd.py "${common[@]}" "${psgd[@]}"
    done
done
