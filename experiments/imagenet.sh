# the published experiment on ImageNet: ResNet-18, 120 dimensions
datasets=ImageNet model=${model:-resnet18} average="121 241"
sgd=(--lr 0.1 --epochs=90 --batch-size 256 --sample-every 1000)
subspace=(--params_start 0 --params_end 241 --params_stride 2 --n_components 120 --batch-size 256)
pbfgs=(--epochs 4 "${subspace[@]}")
psgd=(--epochs 4 --lr 1 "${subspace[@]}")
seeds=${seed:-1} noises=${c:-0}

for seed in $seeds; do
    for c in $noises; do
        chain
    done
done
