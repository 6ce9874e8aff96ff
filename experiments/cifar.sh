# the published experiment: CIFAR-10, samples of 80 epochs, 40 dimensions, and its rivals
cifar_settings

for seed in $seeds; do
    for c in $noises; do
        chain
        rivals 80 61 40
    done
done
