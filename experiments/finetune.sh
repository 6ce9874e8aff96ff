# fine-tuning the networks of cifar-small, and in a subspace of that
tenth_settings
seeds=${seed:-1 2} noises=${c:-0 0.4}
subspace=(--params_end 11 --n_components 10 --epochs 4 --bn-update)

for seed in $seeds; do
    for c in $noises; do
        trajectory
        run train_sgd.py "${common[@]}" "${sgd[@]}"
        trained=$save_dir/model.th
        trajectory _finetune
        run train_sgd.py "${common[@]}" --pretrained "$trained" --lr 0.01 --epochs=14
        run train_pbfgs.py "${common[@]}" "${subspace[@]}" --batch-size 500
        run train_psgd.py "${common[@]}" "${subspace[@]}" --lr 1
        run train_sgd.py "${common[@]}" --average 1 11
    done
done
