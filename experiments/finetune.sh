# public, well-trained CIFAR-10 ResNets trained on, and in the subspace of that
# They are the files resnet20-….th, … in pretrained_models/ of akamaster/pytorch_resnet_cifar10.
datasets=${datasets:-CIFAR10} options=${options:---half --compile} weights=${weights:-../data/pretrained_models}
subspace=(--params_start 1 --params_end 31 --n_components 29)
psgd=("${subspace[@]}" --batch-size 128 --epochs 2 --lr 0.1)
pbfgs=("${subspace[@]}" --batch-size 256 --epochs 1)

# List the runs of network $1, learning rate $2, seed $3 and label noise $4.
trained_on() {
    model=$1 seed=$3 c=$4
    local files=("$weights/$model"-*.th)
    trajectory "_finetune_lr$2"
    local origin=$save_dir
    run train_sgd.py "${common[@]}" --pretrained "${files[0]}" --lr "$2" --epochs=5 --sample-every 65
    run train_sgd.py "${common[@]}" --average 1 31
    run train_psgd.py "${common[@]}" "${psgd[@]}"
    run train_pbfgs.py "${common[@]}" "${pbfgs[@]}"
    run train_psgd.py "${common[@]}" "${psgd[@]}" --start mean
    run train_pbfgs.py "${common[@]}" "${pbfgs[@]}" --start mean
    run train_pbfgs.py "${common[@]}" "${pbfgs[@]}" --alpha "$2" --run pbfgs_plus
    trajectory "_finetune_lr$2_dropped"
    run train_sgd.py "${common[@]}" --pretrained "$origin/30.pt" --start-epoch 5 --lr "$2" --milestones 5 --epochs 8
}

noises=${c:-0}
for number in ${seed:-1 2 3}; do
    for noise in $noises; do
        trained_on resnet20 0.005 "$number" "$noise"
        trained_on resnet20 0.05 "$number" "$noise"
    done
done
trained_on resnet20 0.02 1 0
trained_on resnet20 0.02 1 0.2
for network in resnet32 resnet44 resnet56; do
    trained_on "$network" 0.005 1 0
done
