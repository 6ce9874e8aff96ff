"""Which pictures the report has, of what, and with which captions."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from reporting import analysis, plots
from reporting.results import Result, grouped, noting, plain


class Picture(NamedTuple):
    """A figure with its caption, and the name of its files without suffix."""

    name: str
    caption: str
    figure: Figure


def curves(runs: Sequence[Result]) -> list[plots.Curve]:
    """How each method went, over its seeds, from where it began."""
    found = []
    alike = grouped(plain(runs), lambda r: (r.title, len(r.sampled), len(r.rows)))
    for (title, before, done), seeds in alike.items():
        rows = [[{"test_acc": r.start}, *r.rows] for r in seeds]
        epochs = before + seeds[0].epochs + np.arange(-done, 1)
        seconds = np.mean([[r.seconds(i) for i in range(done + 1)] for r in seeds], axis=0)
        metrics = {
            name: np.array([[row.get(name) for row in own] for own in rows], float)
            for name in plots.METRICS
        }
        found.append(plots.Curve(title, epochs, seconds, metrics))
    return found


def finals(runs: Iterable[Result], name: Callable, at: Callable) -> dict[str, dict]:
    """Final test accuracies of finished seeds, by `name` and then by `at` of each result."""
    found: dict = defaultdict(lambda: defaultdict(list))
    for result in [result for result in runs if result.finished]:
        found[name(result)][at(result)].append(result.final)
    return found


def overview(runs: Sequence[Result], looks: plots.Looks, spread: str) -> Iterator[Picture]:
    """Pictures over several experiments: accuracy against label noise, k, and sampled epochs."""
    apart = grouped(runs, lambda r: r.experiment._replace(noise=0.0))
    for number, same in enumerate(apart.values(), 1):
        series = finals(plain(same), lambda r: r.title, lambda r: 100 * r.experiment.noise)
        if max(map(len, series.values()), default=0) > 1:
            figure = plots.against("corrupted training labels (%)", series, looks)
            caption = f"Final test accuracy against label noise{spread}."
            yield Picture(f"noise_{number}", caption, figure)
        k, sampled = (lambda r: r.k), (lambda r: len(r.sampled))
        caption = "{} epochs of {} in subspaces of k dimensions, of samples of {} epochs"
        for variant, (own, series) in enumerate(sweeps(same, k, sampled), 1):
            figure = plots.against("k", series, plots.looks(series), "log")
            text = caption.format(own.epochs, own.method, sampled(own)) + spread
            yield Picture(f"dimensions_{number}_{variant}", f"{text}.", figure)
        caption = "{} epochs of {} in subspaces of {} dimensions, by how many epochs were "
        caption += "sampled; an average is of the later half"
        for variant, (own, series) in enumerate(sweeps(same, sampled, k), 1):
            figure = plots.against("sampled epochs", series, plots.looks(series))
            text = caption.format(own.epochs, own.method, own.k) + spread
            yield Picture(f"samples_{number}_{variant}", f"{text}.", figure)


def sweeps(runs: Sequence[Result], at: Callable, fixed: Callable) -> Iterator[tuple[Result, dict]]:
    """Subspace runs that differ in `at` only, three or more: one of them, final accuracies.

    Beside them are those of the average of the later half of the samples.
    """
    subspaces = [result for result in runs if result.kind == "subspace"]
    alike = grouped(
        subspaces,
        lambda r: (r.method, r.epochs, fixed(r), str(r.settings() | {"params_end": None})),
    )
    for own in alike.values():
        series = finals(own, lambda r: f"{r.method}, c = {r.experiment.noise:g}", at)
        if max(map(len, series.values()), default=0) > 2:
            lengths = {at(result): len(result.sampled) for result in own}
            for result in [result for result in runs if result.is_of_later_half]:
                name = f"weight average, c = {result.experiment.noise:g}"
                for x in [x for x, length in lengths.items() if length == len(result.sampled)]:
                    series.setdefault(name, {}).setdefault(x, []).append(result.final)
            yield own[0], series


def pictures_of(
    runs: Sequence[Result], probe: analysis.Probe | None, name: str, looks: plots.Looks,
    problems: list[str],
) -> Iterator[Picture]:  # fmt: skip
    """The pictures of an experiment, in files with names that begin with `name`."""
    several = len({result.seed for result in runs}) > 1
    means = " Lines are means over the seeds, bands their range." if several else ""
    caption = "Test accuracy and training loss. Runs on samples begin where sampling ended, with "
    caption += f"the accuracy of the network they start from.{means}"
    figure = plots.curves(curves(runs), ("test_acc", "train_loss"), looks)
    yield Picture(f"{name}_curves", caption, figure)

    trajectory = probe.trajectory if probe else runs[0].trajectory
    own = [r for r in runs if r.trajectory.directory == trajectory.directory]
    seed = f" (seed {trajectory.seed})" if several else ""
    with noting(problems, f"{trajectory.directory}: principal components and landscape"):
        samples = analysis.samples_of(own)
        if len(samples) > 2:
            used = {r.k for r in plain(own) if r.arguments.get("basis") == "pca"}
            figure = plots.variance(analysis.spectrum(samples).numpy(), sorted(used))
            yield Picture(f"{name}_variance", f"Principal components of the samples{seed}.", figure)
        if len(samples) > 2 and probe:
            figure = plots.landscape(**analysis.loss_landscape(probe, samples, own), looks=looks)
            caption = f"Training loss of {analysis.GRID_IMAGES} images around the trajectory{seed}."
            yield Picture(f"{name}_landscape", caption, figure)

    searched = [result for result in runs if "trials" in result.rows[-1]]
    if searched:
        figure = plots.curves(curves(searched), ("trials", "step_length"), looks)
        caption = f"The line search of P-BFGS, averaged over each epoch.{means}"
        yield Picture(f"{name}_steps", caption, figure)


def illustrated(
    runs: Sequence[Result], probes: Mapping, tables: Mapping, spread: str, problems: list[str]
) -> Iterator[dict]:
    """The sections of the page: pictures over all experiments, then tables and pictures of each."""
    looks = plots.looks(run.title for run in plain(runs))
    yield {"pictures": list(overview(runs, looks, spread))}
    for number, (experiment, section) in enumerate(tables.items(), 1):
        own = [run for run in runs if run.experiment == experiment]
        name, probe = f"experiment_{number}", probes.get(experiment)
        yield section | {"pictures": list(pictures_of(own, probe, name, looks, problems))}
