# fine-tuning torchvision's weights on ImageNet, and in subspaces of that
datasets=ImageNet model=${model:-resnet18}
sgd=(--pretrained --lr 0.005 --epochs=15 --batch-size 256 --sample-every 500)
seeds=${seed:-1} noises=${c:-0}

for seed in $seeds; do
    for c in $noises; do
        trajectory _finetune
        run train_sgd.py "${common[@]}" "${sgd[@]}"
        for epochs in 5 10 15; do # of about 10 samples each: 1,281,167 images are 5,005 batches
            subspace=(--params_end $((10 * epochs + 1)) --n_components 30 --batch-size 256 --epochs 4)
            run train_pbfgs.py "${common[@]}" "${subspace[@]}" --run pbfgs_of_$epochs
        done
    done
done
