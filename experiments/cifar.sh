# the published experiment: CIFAR-10, samples of 80 epochs, 40 dimensions, and its baselines
cifar_settings

for seed in $seeds; do
    for c in $noises; do
        chain
        baselines 80 61 40
    done
done
