# cifar with 2 to 80 dimensions, and with the samples of 20, 40 and 60 epochs
cifar_settings
psgd+=(--epochs 10)

for seed in $seeds; do
    for c in $noises; do
        trajectory
        run train_sgd.py "${common[@]}" "${sgd[@]}"
        run train_sgd.py "${common[@]}" --average $average
        for k in 2 5 10 20 40 80; do
            run train_psgd.py "${common[@]}" "${psgd[@]}" --n_components "$k" --run "psgd_k$k"
        done
        for last in 20 40 60; do
            fewer=(--params_end $((last + 1)) --n_components 20 --run "psgd_of_$last")
            run train_psgd.py "${common[@]}" "${psgd[@]}" "${fewer[@]}"
            half=(--average $((last / 2 + 1)) $((last + 1)) --run "average_of_$last")
            run train_sgd.py "${common[@]}" "${half[@]}"
        done
    done
done
