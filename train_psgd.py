"""2. P-SGD: SGD on the coordinates in the subspace that the sampled trajectory spans.

python train_psgd.py --arch resnet20 --params_end 81 --epochs 40 --save-dir save
"""

from collections.abc import Sequence

from training.options import (
    Parser,
    add_optimizer_options,
    add_subspace_options,
    answer_early,
    get_parser,
)

# Adam's was the best of 0.03, 0.1, 0.3 and 1 on digits.
LEARNING_RATES = {"sgd": 1.0, "adam": 0.3, "adamw": 0.3}


def get_options() -> Parser:
    """The command line."""
    parser = get_parser("psgd", __doc__.splitlines()[0], "resnet32", epochs=100, weight_decay=0.0)
    add_optimizer_options(parser, LEARNING_RATES, {"": [30, 50]}, "30 50")
    add_subspace_options(parser)
    return parser


if __name__ == "__main__":
    answer_early(get_options())  # importing torch takes seconds

from dldr import Subspace
from training.distributed import data_parallel
from training.errors import entry_point
from training.network import build_model
from training.run import Run, evaluate_only, make_optimizer, set_lr
from training.setup import parse_args
from training.subspaces import find_basis, load_start, load_subspace_samples


@entry_point
def main(argv: Sequence[str] | None = None) -> dict:
    """Train in the subspace of --save-dir's samples; returns the last metrics row."""
    args = parse_args(get_options(), argv)
    if args.evaluate:
        return evaluate_only(args)
    samples = load_subspace_samples(args)
    with Run(args) as run:
        data = run.load_data()
        model = build_model(args, data)
        load_start(args, samples, model)
        basis = find_basis(args, samples, model)
        subspace = Subspace(model, basis.vectors.to(args.device))
        optimizer = make_optimizer(args, [subspace.coordinates])
        network = data_parallel(subspace)

        run.start(data, subspace, optimizer, basis)
        for epoch in run.epochs():
            set_lr(optimizer, args, epoch)
            for images, labels in run.batches():
                optimizer.zero_grad()
                run.loss(network, images, labels).backward()
                optimizer.step()
                run.end_step()
            run.end_epoch()
    return run.rows[-1]


if __name__ == "__main__":
    main()
