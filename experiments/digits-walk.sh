# does the span matter, or its spectrum? P-SGD in the span of a random walk, on digits
digits_settings
seeds=${seed:-4 5 6 7 8} noises=${c:-0 0.4}

for seed in $seeds; do
    for c in $noises; do
        trajectory _walk
        run train_sgd.py "${common[@]}" "${sgd[@]}" --epochs=30
        run train_psgd.py "${common[@]}" "${psgd[@]}"
        run train_psgd.py "${common[@]}" "${psgd[@]}" --basis walk
        run train_psgd.py "${common[@]}" "${psgd[@]}" --basis random
    done
done
