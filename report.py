"""3. The report: tables and figures of the runs in one or more save dirs, on one page.

    python report.py save_labelnoise0_resnet20 save_labelnoise0.4_resnet20 --out report

Save dirs of the same network, data, label noise and epochs are taken as seeds of one experiment.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from training.options import Parser, answer_early, between, path


def get_options() -> Parser:
    """The command line."""
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("save_dirs", nargs="+", type=path, metavar="SAVE_DIR")
    add("--out", type=path, metavar="DIR", default="report", help="where all of the report goes")
    add("--data-dir", type=path, metavar="DIR", help="where the dataset is now, if it has moved")
    add("--arch", metavar="NAME", help="package.module:callable, if the runs' network is one")
    add("--device", type=str.lower, default="auto", help="cpu, or an accelerator, which auto takes")
    add("--no-data", action="store_true", help="nothing that needs images: also no landscape")
    grid = between(int, 2, 1000)
    add("--grid", type=grid, metavar="N", help="points a side of the loss landscape (default: 21)")
    add("--no-landscape", action="store_true", help="leave out the loss landscape")
    return parser


if __name__ == "__main__":
    answer_early(get_options())  # the imports take seconds

from reporting import analysis, figures, page, results, tables
from training.errors import InputError, blame, entry_point
from training.setup import pick_device


def markdown_page(sections: Sequence[Mapping[str, Any]], facts: str) -> str:
    """Tables and figures as Markdown."""
    text = ""
    for section in sections:
        if "title" in section:
            text += f"{tables.section_text(section)}\n"
            text += "".join(f"* {message}\n" for message in section["messages"]) + "\n"
        if section.get("settings"):
            text += f"{tables.markdown(section['settings'])}\n"
        for figure in section["figures"]:
            text += f"![{figure.caption}]({figure.name}.png)\n\n{figure.caption}\n\n"
    return f"{text}{facts}\n"


def report_files(
    sections: Sequence[Mapping[str, Any]], table: Sequence[dict], machine: Mapping, spread: str
) -> dict[str, bytes]:
    """The files of the report by name."""
    files = page.figure_files(figure for section in sections for figure in section["figures"])
    values = {"facts": tables.machine_text(machine), "spread": spread, "cost": tables.COST}
    values |= {"sections": sections, "images": analysis.TRAINING_IMAGES}
    exact = json.dumps({"machine": machine, "results": table})
    rounded = json.loads(exact, parse_float=lambda number: float(f"{float(number):.6g}"))
    files["index.html"] = page.render("page.html.jinja", files, **values)
    files["report.md"] = markdown_page(sections, values["facts"]).encode()
    files["results.json"] = f"{json.dumps(rounded)}\n".encode()
    return files


@entry_point
def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Write the report and print its tables; returns what results.json holds of their rows."""
    args = get_options().parse_args(argv)
    args.device = pick_device(args.device)
    problems: list[str] = []
    runs = results.read(args.save_dirs, problems)
    if not runs:
        raise InputError(f"nothing to report: {'; '.join(problems)}")
    with blame("--out"):
        args.out.mkdir(parents=True, exist_ok=True)
    measured = analysis.Measured(0 if args.no_landscape else args.grid or analysis.GRID)
    measured.grams = analysis.read_snapshots(runs, problems)
    if not args.no_data:
        measured.probes = analysis.measure(runs, args, problems)

    table = tables.tabulate(runs)
    several = any(len(row["seeds"]) > 1 for row in table)
    spread = "; mean ± standard deviation over the seeds" if several else ""
    parts = tables.sections(table)
    sections = list(figures.illustrated(runs, parts, measured, spread, problems))
    page.write(args.out, report_files(sections, table, tables.machine(runs), spread))

    for section in sections[1:]:
        print(f"\n{section['title']}\n{tables.markdown(section['results'])}", end="")
    for problem in problems:
        print(f"report.py: skipped: {problem}", file=sys.stderr)
    print(f"\n{args.out / 'index.html'}: this table and figures")
    return table


if __name__ == "__main__":
    main()
