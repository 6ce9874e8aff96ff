# digits with 80 % of the labels corrupted, in the subspace from θ_0 and from the mean
digits_settings
seeds=${seed:-1 2 3 4 5 6 7 8} noises=${c:-0.8}

for seed in $seeds; do
    for c in $noises; do
        chain
        run train_pbfgs.py "${common[@]}" "${pbfgs[@]}" --start mean
        run train_psgd.py "${common[@]}" "${psgd[@]}" --start mean
    done
done
