"""Which figures the report has, of what, and with which captions."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from reporting import analysis, plots
from reporting.page import Figure
from reporting.results import Result, grouped, one_per_name, skipping

# ------------------------------------------------------------------ curves of accuracy and loss


def curves(runs: Sequence[Result]) -> list[plots.Curve]:
    """How each method went, over its seeds, from where it began."""
    drawn = []
    alike = grouped(one_per_name(runs), lambda r: (r.title, len(r.sampled), len(r.rows)))
    for (title, before, done), seeds in alike.items():
        rows = [[{"test_acc": r.start}, *r.rows] for r in seeds]
        epochs = before + seeds[0].epochs + np.arange(-done, 1)
        seconds = np.mean([[r.seconds(i) for i in range(done + 1)] for r in seeds], axis=0)
        metrics = {
            name: np.array([[row.get(name) for row in seed] for seed in rows], float)
            for name in plots.METRICS
        }
        drawn.append(plots.Curve(title, epochs, seconds, metrics))
    return drawn


def curves_figure(
    name: str, caption: str, runs: Sequence[Result], metrics: Sequence[str], styles: plots.Styles
) -> Figure:
    """The figure of two metrics over epochs and seconds."""
    shown, numbers = curves(runs), {}
    for curve in shown:
        numbers |= {f"{curve.name}/epochs": curve.epochs, f"{curve.name}/seconds": curve.seconds}
        numbers |= {f"{curve.name}/{metric}": curve.metrics[metric] for metric in metrics}
    return Figure(name, caption, partial(plots.curves, shown, metrics, styles), numbers)


def not_drawn(runs: Sequence[Result]) -> str:
    """A sentence that names the runs that are in the table only; empty where there are none."""
    drawn = one_per_name(runs)
    others = [run for run in runs if run not in drawn and run.kind != "partial"]
    titles = [run.title if run.run else f"{run.title} with k = {run.k}" for run in others]
    return f" Not drawn: {', '.join(dict.fromkeys(titles))}." if titles else ""


# ------------------------------------------------------------- final accuracy against a setting


class Sweep(NamedTuple):
    """Subspace runs that differ in one setting, and what they are compared with."""

    result: Result  # one of the runs
    series: dict[str, dict[float, list[float]]]  # final accuracies by name and setting, one a seed
    levels: dict[str, list[float]]  # of what has no such setting
    styles: plots.Styles


def finals(runs: Iterable[Result], name: Callable, at: Callable) -> dict[str, dict]:
    """Final test accuracies of finished seeds, by `name` and then by `at` of each result."""
    values: dict = defaultdict(lambda: defaultdict(list))
    for result in [result for result in runs if result.finished]:
        values[name(result)][at(result)].append(result.final)
    return values


def label(result: Result) -> str:
    """A method at a noise level."""
    name = result.method if result.kind == "average" else result.name
    return f"{name}, c = {result.experiment.noise:g}"


def sweeps(runs: Sequence[Result], at: Callable, fixed: Callable) -> Iterator[Sweep]:
    """Subspace runs that differ in `at` only, and have three or more values of it.

    They are compared with ordinary training, and with the average of the later half of the
    snapshots: by how many of these there are, where that differs.
    """
    runs = sorted(runs, key=lambda r: r.experiment.noise)
    alike = grouped(
        [result for result in runs if result.kind == "subspace"],
        lambda r: (r.name, r.epochs, fixed(r), str(r.settings() | {"params_end": None})),
    )
    for chosen in alike.values():
        series = finals(chosen, label, at)
        if max(map(len, series.values()), default=0) < 3:
            continue
        experiments = {result.experiment for result in chosen}
        others = [r for r in runs if r.finished and r.experiment in experiments]
        full = [r for r in others if r.kind == "full"]
        sampled = {at(result): len(result.sampled) for result in chosen}
        averages = [r for r in others if r.is_of_later_half and len(r.sampled) in sampled.values()]
        if len(set(sampled.values())) > 1:
            series |= finals(averages, label, lambda r: len(r.sampled))
            levels = grouped(full, label)
        else:
            levels = grouped([*full, *averages], label)
        levels = {name: [r.final for r in seeds] for name, seeds in levels.items()}
        methods = {label(r): r.method for r in (*full, *averages, *chosen)}
        yield Sweep(chosen[0], dict(series), levels, plots.styles(methods))


def against_figure(
    name: str,
    caption: str,
    setting: str,
    series: Mapping,
    styles: plots.Styles,
    levels: Mapping | None = None,
    scale: str = "linear",
) -> Figure:
    """The figure of final test accuracies against a setting."""
    numbers: dict[str, Any] = {f"{title}/final": values for title, values in (levels or {}).items()}
    for title, values in series.items():
        numbers[f"{title}/{setting}"] = sorted(values)
        numbers[f"{title}/final"] = padded([values[x] for x in sorted(values)])
    draw = partial(plots.against, setting, series, styles, levels, scale)
    return Figure(name, caption, draw, numbers)


def padded(rows: Sequence[Sequence[float]]) -> np.ndarray:
    """Rows of different lengths as a matrix, with NaN where there is no value."""
    matrix = np.full((len(rows), max(map(len, rows))), np.nan)
    for line, row in zip(matrix, rows, strict=True):
        line[: len(row)] = row
    return matrix


def overview(runs: Sequence[Result], styles: plots.Styles, spread: str) -> Iterator[Figure]:
    """Figures over several experiments: accuracy against label noise, k, and sampled epochs."""
    apart = grouped(runs, lambda r: r.experiment._replace(noise=0.0))
    for number, same in enumerate(apart.values(), 1):
        series = finals(one_per_name(same), lambda r: r.title, lambda r: 100 * r.experiment.noise)
        if max(map(len, series.values()), default=0) > 1:
            setting = "corrupted training labels (%)"
            caption = f"Final test accuracy against label noise{spread}."
            yield against_figure(f"noise_{number}", caption, setting, series, styles)
        yield from sweep_figures(same, number, spread)


def sweep_figures(runs: Sequence[Result], number: int, spread: str) -> Iterator[Figure]:
    """Accuracy against k and against sampled epochs, of runs on the same data."""

    def k(result: Result) -> Any:
        return result.k

    def sampled(result: Result) -> int:
        return len(result.sampled)

    for variant, sweep in enumerate(sweeps(runs, k, sampled), 1):
        run = sweep.result
        caption = (
            f"Final test accuracy of {run.name} after {run.epochs} epochs in k dimensions of the "
            f"snapshots of {sampled(run)} epochs{spread}. Lines: ordinary training to its end, and "
            "the average of the later half of the snapshots."
        )
        name = f"dimensions_{number}_{variant}"
        yield against_figure(name, caption, "k", sweep.series, sweep.styles, sweep.levels, "log")
    for variant, sweep in enumerate(sweeps(runs, sampled, k), 1):
        run = sweep.result
        caption = (
            f"Final test accuracy of {run.name} after {run.epochs} epochs in {run.k} dimensions, "
            "and of the average of the later half of the snapshots, by how many epochs were "
            f"sampled{spread}. Line: ordinary training to its end."
        )
        name, setting = f"samples_{number}_{variant}", "sampled epochs"
        yield against_figure(name, caption, setting, sweep.series, sweep.styles, sweep.levels)


# ------------------------------------------------------------------------------ an experiment


def figures_of(
    runs: Sequence[Result],
    measured: analysis.Measured,
    name: str,
    styles: plots.Styles,
    problems: list[str],
) -> Iterator[Figure]:
    """The figures of an experiment, in files with names that begin with `name`."""
    several = len({result.seed for result in runs}) > 1
    means = " Lines are means over the seeds, bands their range." if several else ""
    caption = (
        "Test accuracy and training loss. Runs on snapshots begin where sampling ended, with the "
        f"accuracy of the network they start from.{means}{not_drawn(runs)}"
    )
    metrics = ("test_acc", "train_loss")
    yield curves_figure(f"{name}_curves", caption, runs, metrics, styles)

    probe = measured.probes.get(runs[0].experiment)
    trajectory = probe.trajectory if probe else runs[0].trajectory
    on_it = [r for r in runs if r.trajectory.directory == trajectory.directory]
    gram, numbers = measured.grams.get(trajectory.directory), analysis.shown_snapshots(on_it)
    seed = f" (seed {trajectory.seed})" if several else ""
    if gram and gram.has(numbers):
        with skipping(problems, f"{trajectory.directory}: principal components and landscape"):
            yield variance_figure(f"{name}_variance", gram, numbers, on_it, seed)
            if probe and measured.grid:
                landscape = analysis.loss_landscape(probe, numbers, on_it, measured.grid)
                yield landscape_figure(f"{name}_landscape", probe, landscape, styles, seed)

    searched = [result for result in runs if "trials" in result.rows[-1]]
    if searched:
        caption = f"The line search of P-BFGS, averaged over each epoch.{means}"
        metrics = ("trials", "step_length")
        yield curves_figure(f"{name}_steps", caption, searched, metrics, styles)


def variance_figure(
    name: str, gram: analysis.Gram, numbers: Sequence[int], runs: Sequence[Result], seed: str
) -> Figure:
    """The figure of the principal components of snapshots, beside those of a random walk."""
    trajectory = gram.trajectory(numbers)
    explained, walk = trajectory.shares.numpy(), trajectory.walk.shares.numpy()
    by_pca = [run for run in one_per_name(runs) if run.arguments["basis"] == "pca"]
    used = sorted({run.k for run in by_pca})
    caption = (
        f"Principal components of the snapshots{seed}, and what they would explain if the "
        "trajectory were a random walk with the same step lengths. A trajectory that is not above "
        "the walk is no more concentrated than chance."
    )
    numbers = {"explained": explained, "walk": walk, "k": used}
    return Figure(name, caption, partial(plots.variance, explained, walk, used), numbers)


def landscape_figure(
    name: str, probe: analysis.Probe, landscape: Mapping[str, Any], styles: plots.Styles, seed: str
) -> Figure:
    """The figure of the loss around a trajectory, as `analysis.loss_landscape` returns it."""
    paths, ratios = landscape["paths"], landscape["ratios"]
    caption = (
        f"Training loss of {probe.landscape_images} images around the trajectory{seed}, with the "
        "labels that were trained on, as corrupted; BatchNorm normalizes with the statistics of "
        f"these images. The plane explains {sum(ratios):.1%} of the variance of the snapshots. "
        "Paths outside of it, such as those in other subspaces, are projected onto it."
    )
    numbers = {key: landscape[key] for key in ("x", "y", "loss", "ratios")}
    numbers |= {f"{title}/path": path for title, path in paths.items()}
    return Figure(name, caption, partial(plots.landscape, **landscape, styles=styles), numbers)


def illustrated(
    runs: Sequence[Result],
    tables: Mapping,
    measured: analysis.Measured,
    spread: str,
    problems: list[str],
) -> Iterator[dict]:
    """The sections of the page: figures over all experiments, then tables and figures of each."""
    styles = plots.styles({run.title: run.method for run in one_per_name(runs)})
    yield {"figures": list(overview(runs, styles, spread))}
    for number, (experiment, section) in enumerate(tables.items(), 1):
        alike = [run for run in runs if run.experiment == experiment]
        shown = figures_of(alike, measured, f"experiment_{number}", styles, problems)
        yield section | {"figures": list(shown)}
