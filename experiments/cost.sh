# digits with samples of 5, 10 and 20 epochs instead of 30
digits_settings
seeds=${seed:-4 5 6 7 8} noises=${c:-0} # no setting was chosen on these seeds

for seed in $seeds; do
    for c in $noises; do
        chain
        for last in 5 10 20; do
            fewer=(--params_end $((last + 1)) --n_components $((last < 20 ? last - 1 : 20)))
            run train_pbfgs.py "${common[@]}" "${pbfgs[@]}" "${fewer[@]}" --run pbfgs_of_$last
            run train_psgd.py "${common[@]}" "${psgd[@]}" "${fewer[@]}" --run psgd_of_$last
        done
    done
done
