# Tiny-ImageNet at 32 pixels: ResNet-32, samples of 16 epochs, 12 dimensions; and its baselines
datasets=ImageFolder model=${model:-resnet32} average="9 17"
sgd=(--lr 0.1 --epochs=16 --milestones 150)
subspace=(--params_start 0 --params_end 17 --n_components 12)
pbfgs=(--epochs 5 --batch-size 1024 "${subspace[@]}")
psgd=(--epochs 5 --lr 1 --batch-size 128 "${subspace[@]}")
seeds=${seed:-1} noises=${c:-0}

for seed in $seeds; do
    for c in $noises; do
        chain
        baselines 16 13 5
    done
done
