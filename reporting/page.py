"""Pages of figures and tables that need nothing but themselves, and the files beside them."""

import base64
import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib.figure
import numpy as np

from reporting import plots
from training.files import replacing

KINDS = ("png", "svg", "pdf")


class Figure(NamedTuple):
    """A figure of a page, and the `name` of its files without suffix.

    `draw(narrow=…)` draws it, for a telephone where `narrow` is set; `numbers` are what it shows.
    """

    name: str
    caption: str
    draw: Callable[..., matplotlib.figure.Figure]
    numbers: Mapping[str, Any]


def figure_files(figures: Iterable[Figure]) -> dict[str, bytes]:
    """The files of figures by name: as PNG, SVG and PDF, for narrow pages, and the numbers."""
    files = {}
    for figure in figures:
        wide = figure.draw()
        files |= {f"{figure.name}.{kind}": plots.image(wide, kind) for kind in KINDS}
        files[f"{figure.name}_narrow.svg"] = plots.image(figure.draw(narrow=True), "svg")
        stream = io.BytesIO()
        np.savez(stream, **figure.numbers)
        files[f"{figure.name}.npz"] = stream.getvalue()
    return files


def render(template: str, files: Mapping[str, bytes], **values: Any) -> bytes:
    """A page as HTML: a template in this folder, filled with values and with the SVG files."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True)
    environment.filters["embedded"] = lambda file: base64.b64encode(files[file]).decode()
    return environment.get_template(template).render(values).encode()


def write(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write the files of a page into a directory."""
    for name, content in files.items():
        with replacing(directory / name) as stream:
            stream.write(content)
