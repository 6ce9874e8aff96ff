# the published experiment: CIFAR-10, samples of 80 epochs, 40 dimensions
datasets=${datasets:-CIFAR10} average="41 81"
sgd=(--lr 0.1 --epochs=150)
subspace=(--params_start 0 --params_end 81 --n_components 40)
pbfgs=(--epochs 20 --batch-size 1024 "${subspace[@]}")
psgd=(--epochs 40 --lr 1 --batch-size 128 "${subspace[@]}")
seeds=${seed:-1} noises=${c:-0}

for seed in $seeds; do
    for c in $noises; do
        chain
    done
done
