# 8 × 8 digits, clean and with 40 % of the labels corrupted (4 minutes)
digits_settings
seeds=${seed:-1} noises=${c:-0 0.4}

for seed in $seeds; do
    for c in $noises; do
        chain
    done
done
