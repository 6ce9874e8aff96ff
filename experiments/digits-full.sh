# digits with five levels of label noise, and with 2 to 40 dimensions
digits_settings
seeds=${seed:-4 5 6 7 8} noises=${c:-0 0.2 0.4 0.6 0.8} # no setting was chosen on these seeds

for seed in $seeds; do
    for c in $noises; do
        chain
        if [ "$c" != 0 ] && [ "$c" != 0.4 ]; then continue; fi
        for k in 2 5 10 20 40; do
            dimensions=(--params_end 41 --n_components "$k" --run "psgd_k$k")
            run train_psgd.py "${common[@]}" "${psgd[@]}" "${dimensions[@]}"
        done
    done
done
