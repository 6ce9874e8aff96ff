"""Any trajectory, also of other people's training, beside a random walk with the same steps.

    python trajectory.py 'lightning_logs/version_0/checkpoints/*.ckpt' --out trajectory

FILES are files of snapshots, folders of them, or quoted globs. No network is needed.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from training.options import Parser, answer_early, path, positive


def pattern(text: str) -> re.Pattern:
    """An argparse type: a regular expression."""
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error


def get_options() -> Parser:
    """The command line."""
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "files",
        nargs="+",
        metavar="FILES",
        help="snapshots: files, folders or globs, in the order of the numbers in their names",
    )
    add(
        "--compare",
        nargs="+",
        metavar="FILES",
        help="another trajectory of the same network: the principal angles between their spans",
    )
    add(
        "--n_components",
        "--n-components",
        type=positive,
        metavar="K",
        default=40,
        help="components whose span is compared, at most one less than the snapshots",
    )
    add(
        "--names",
        type=pattern,
        metavar="REGEX",
        help="only parameters in whose names this regular expression is found",
    )
    add("--by-layer", action="store_true", help="also a table of all layers")
    add("--key", metavar="KEY", help="where in the files the weights are, such as ema")
    add("--prefix", metavar="PREFIX", help="what names begin with, such as model.")
    add(
        "--export",
        type=path,
        metavar="DIR",
        help="write the snapshots as 0.pt, 1.pt, …, for the other scripts' --save-dir",
    )
    add(
        "--out",
        type=path,
        metavar="DIR",
        default="trajectory",
        help="directory of index.html, trajectory.md, trajectory.json, and figures",
    )
    return parser


if __name__ == "__main__":
    answer_early(get_options())  # the imports take seconds

import torch
from torch import Tensor

from dldr.parameters import parameter_names
from dldr.pca import centered, spanned
from dldr.reading import Inert
from dldr.trajectory import Snapshot, load_trajectory
from reporting import page, tables
from reporting.trajectories import (
    DECISIVE,
    WORDS,
    Trajectory,
    angles,
    angles_sentence,
    as_text,
    conclusions,
    layer_of,
    layer_quantities,
    measure,
    next_steps,
    overview,
    quantities,
)
from reporting.trajectory_figures import angles_figure, figures_of
from training.errors import InputError, blame, entry_point, warnings_told
from training.files import save


def load(args: argparse.Namespace, files: Sequence[str]) -> list[Snapshot]:
    """The snapshots in files; what is left out of them is told."""
    with blame(), warnings_told():
        return load_trajectory(files, key=args.key, prefix=args.prefix or "")


def choose_names(args: argparse.Namespace, snapshot: Snapshot) -> list[str]:
    """The parameters that --names names; InputError where there are none."""
    names = parameter_names(snapshot)
    chosen = [name for name in names if re.search(args.names or "", name)]
    if not chosen:
        raise InputError(f"--names: found in none of {', '.join(names[:5])}, …")
    return chosen


def count_moving(trajectories: Iterable[Sequence[Snapshot]], names: Iterable[str]) -> int:
    """The number of parameters in tensors that change from start to end of a trajectory."""
    ends = [(snapshots[0], snapshots[-1]) for snapshots in trajectories if snapshots]
    return sum(
        ends[0][0][name].numel()
        for name in names
        if not all(torch.equal(start[name], end[name]) for start, end in ends)
    )


def check_directories(args: argparse.Namespace) -> None:
    """InputError, before anything is read, where what is to be written cannot be."""
    for option, directory in (("--out", args.out), ("--export", args.export)):
        if directory and directory.exists() and not directory.is_dir():
            raise InputError(f"{option} {directory}: not a directory")
    if args.export and any(args.export.glob("*.pt")):
        raise InputError(f"--export: {args.export} holds snapshots; allowed: a new directory")


def export(snapshots: Sequence[Snapshot], directory: Path) -> None:
    """Write the snapshots as N.pt."""
    with blame("--export"):
        directory.mkdir(parents=True, exist_ok=True)
    for number, snapshot in enumerate(snapshots):
        # What code in the files would make of an extra state is not known.
        plain = {name: v for name, v in snapshot.items() if not isinstance(v, Inert)}
        save(directory / f"{number}.pt", plain)


def describe(
    args: argparse.Namespace,
    grams: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    first: int,
    moving: int,
) -> tuple[dict[str, Any], list[page.Figure]]:
    """The numbers, and the figures, of the `first` snapshots in the Gram matrices, and of others.

    `moving` is the number of parameters that move, which are not frozen.

    Raises ValueError for trajectories that are too short, or do not move.
    """
    gram, n = sum(grams.values()), sum(sizes.values())
    trajectory = Trajectory(centered(gram[:first, :first]), n)
    figures = list(figures_of(trajectory))
    columns = {"trajectory": quantities(trajectory), "random walk": quantities(trajectory.walk)}
    numbers = {"quantities": columns, "sentences": conclusions(trajectory)}
    k = min(args.n_components, spanned(trajectory.axes[0]))
    if args.compare:
        other = Trajectory(centered(gram[first:, first:]), n)
        columns |= {"compared": quantities(other), "walk of that": quantities(other.walk)}
        between = angles(gram, first, min(k, spanned(other.axes[0])))
        figures.append(angles_figure(between, moving))
        numbers["sentences"].append(angles_sentence(between, moving))
        numbers["angles"] = between.tolist()
    if args.by_layer:
        layers = {layer: centered(gram[:first, :first]) for layer, gram in grams.items()}
        numbers["layers"] = list(layer_quantities(layers, sizes))
    numbers["commands"] = next_steps([*args.files, *(["--key", args.key] if args.key else [])], k)
    return numbers, figures


def page_files(
    numbers: Mapping[str, Any], figures: Sequence[page.Figure], source: str
) -> dict[str, bytes]:
    """The files of the page by name."""
    table, layers = overview(numbers["quantities"]), as_text(numbers.get("layers", []))
    markdown = f"{source}\n\n{tables.markdown(table)}\n{told(numbers)}\n"
    markdown += f"\n{tables.markdown(layers)}\n" if layers else ""
    for figure in figures:
        markdown += f"\n![{figure.caption}]({figure.name}.png)\n\n{figure.caption}\n"
    files = page.figure_files(figures)
    values = dict(numbers, layers=layers) | {"table": table, "source": source, "words": WORDS}
    values |= {"decisive": DECISIVE, "figures": figures}
    files["index.html"] = page.render("trajectory.html.jinja", files, **values)
    files["trajectory.md"] = markdown.encode()
    files["trajectory.json"] = f"{json.dumps({'source': source, **numbers}, indent=1)}\n".encode()
    return files


def told(numbers: Mapping[str, Any]) -> str:
    """Sentences and commands as Markdown."""
    sentences = "".join(f"* {sentence}\n" for sentence in numbers["sentences"])
    return f"{sentences}\n{DECISIVE}\n\n" + "\n".join(f"    {c}" for c in numbers["commands"])


@entry_point
def main(argv: Sequence[str] | None = None) -> dict:
    """Write the page and print its tables; returns what trajectory.json holds."""
    args = get_options().parse_args(argv)
    check_directories(args)
    snapshots = load(args, args.files)
    compared = load(args, args.compare) if args.compare else []
    names, sizes = choose_names(args, snapshots[0]), Counter()
    for name in names:
        sizes[layer_of(name)] += snapshots[0][name].numel()
    with blame():
        grams = measure([*snapshots, *compared], names, args.by_layer)
        moving = count_moving([snapshots, compared], names)
        numbers, figures = describe(args, grams, sizes, len(snapshots), moving)
    if args.export:
        export(snapshots, args.export)
    with blame("--out"):
        args.out.mkdir(parents=True, exist_ok=True)
    source = f"{len(snapshots)} snapshots, {snapshots[0].file} … {snapshots[-1].file}"
    files = page_files(numbers, figures, source)
    page.write(args.out, files)
    print(files["trajectory.md"].decode().partition("\n![")[0])
    print(f"{args.out / 'index.html'}: this with figures")
    return numbers


if __name__ == "__main__":
    main()
