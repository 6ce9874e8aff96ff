"""3. The report: tables and pictures of the runs in one or more save dirs, on one page.

    python report.py save_labelnoise0_resnet20 save_labelnoise0.4_resnet20 --out report

Save dirs of the same network, data, label noise and epochs are taken as seeds of one experiment.
"""

import base64
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.options import Parser, answer_early, path


def get_options() -> Parser:
    """The command line."""
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("save_dirs", nargs="+", type=path, metavar="SAVE_DIR")
    # fmt: off
    add("--out", type=path, metavar="DIR", default="report",
        help="directory of index.html, report.md, results.json, pictures")
    add("--data-dir", type=path, metavar="DIR",
        help="where the dataset is, if no longer where the runs had it")
    add("--arch", metavar="NAME",
        help="package.module:callable, if the runs' network is one")
    add("--device", type=str.lower, metavar="DEVICE", default="auto",
        help="cpu, or the accelerator there is, e.g. cuda; auto prefers it")
    add("--no-data", action="store_true",
        help="leave out what needs the images: training accuracy and loss landscape")
    # fmt: on
    return parser


if __name__ == "__main__":
    answer_early(get_options())  # the imports take seconds

import jinja2

from reporting import analysis, pictures, plots, results, tables
from training.errors import InputError, blame, entry_point
from training.files import replacing
from training.setup import pick_device


def page(files: Mapping[str, bytes], **values: Any) -> str:
    """The report as HTML, with the SVG files in it."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "reporting")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True)
    environment.filters["embedded"] = lambda file: base64.b64encode(files[file]).decode()
    return environment.get_template("page.html.jinja").render(values)


def markdown_page(sections: Sequence[Mapping[str, Any]], facts: str) -> str:
    """Tables and pictures as Markdown."""
    text = ""
    for section in sections:
        text += f"{tables.section_text(section)}\n" if "title" in section else ""
        for picture in section["pictures"]:
            text += f"![{picture.caption}]({picture.name}.png)\n\n{picture.caption}\n\n"
    return f"{text}{facts}\n"


@entry_point
def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Write the report and print its tables; returns what results.json holds of their rows."""
    args = get_options().parse_args(argv)
    args.device = pick_device(args.device)
    problems: list[str] = []
    runs, probes = results.read(args.save_dirs, problems), {}
    if not runs:
        raise InputError(f"nothing to report: {'; '.join(problems)}")
    with blame("--out"):
        args.out.mkdir(parents=True, exist_ok=True)
    if not args.no_data:
        probes = analysis.measure(runs, args, problems)

    table, facts = tables.tabulate(runs), tables.machine(runs)
    several = any(len(row["seeds"]) > 1 for row in table)
    spread = "; mean ± standard deviation over the seeds" if several else ""
    sections = list(pictures.illustrated(runs, probes, tables.sections(table), spread, problems))
    files = {
        f"{picture.name}.{kind}": plots.image(picture.figure, kind)
        for section in sections for picture in section["pictures"] for kind in ("png", "svg")
    }  # fmt: skip
    text = tables.machine_text(facts)
    texts = {"spread": spread, "cost": tables.COST, "facts": text}
    html = page(files, sections=sections, images=analysis.TRAINING_IMAGES, **texts)
    exact = json.dumps({"machine": facts, "results": table})
    rounded = json.loads(exact, parse_float=lambda number: round(float(number), 4))
    files["index.html"] = html.encode()
    files["report.md"] = markdown_page(sections, text).encode()
    files["results.json"] = f"{json.dumps(rounded)}\n".encode()
    for name, content in files.items():
        with replacing(args.out / name) as stream:
            stream.write(content)

    for section in sections[1:]:
        print(f"\n{section['title']}\n{tables.markdown(section['results'])}", end="")
    for problem in problems:
        print(f"report.py: skipped: {problem}", file=sys.stderr)
    print(f"\n{args.out / 'index.html'}: this table and pictures")
    return table


if __name__ == "__main__":
    main()
