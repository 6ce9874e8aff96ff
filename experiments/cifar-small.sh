# a tenth of CIFAR-10, clean and with 40 % of the labels corrupted
tenth_settings
seeds=${seed:-1 2} noises=${c:-0 0.4}

for seed in $seeds; do
    for c in $noises; do
        chain
        baselines 30 26 30
    done
done
