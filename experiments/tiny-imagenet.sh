# Tiny-ImageNet at 32 pixels: ResNet-32, samples of 30 epochs, 20 dimensions; and its baselines
datasets=ImageFolder model=${model:-resnet32} average="16 31"
sgd=(--lr 0.1 --epochs=30 --milestones 150)
subspace=(--params_start 0 --params_end 31 --n_components 20)
pbfgs=(--epochs 10 --batch-size 1024 "${subspace[@]}")
psgd=(--epochs 10 --lr 1 --batch-size 128 "${subspace[@]}")
seeds=${seed:-1} noises=${c:-0}

for seed in $seeds; do
    for c in $noises; do
        chain
        baselines 30 21 10
    done
done
