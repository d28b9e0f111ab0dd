"""Style of all figures: the colours of the pages, from `base.css`.

Importing this module loads matplotlib, so only modules that draw import it.
"""

import functools
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files

import matplotlib as mpl
from matplotlib.figure import Figure

_DOTS_PER_INCH = 150


@functools.cache
def colour(name: str) -> str:
    """Return the colour variable `--name` of `base.css` as #rrggbb.

    Raises:
        KeyError: `base.css` has no such colour.
    """
    css = files("memtail.figures").joinpath("base.css").read_text()
    match = re.search(rf"--{name}: (#[0-9a-f]{{6}});", css)
    if match is None:
        raise KeyError(name)
    return match[1]


#: Colours of lines, distinguishable with any colour vision.
COLOURS = (colour("accent"), colour("warm"), "#56b4e9", "#cc79a7", "#e69f00", colour("ink"))
GREY = colour("muted")


@contextmanager
def drawing(width: float, height: float) -> Iterator[Figure]:
    """Create a figure of `width` x `height` inches in the common style, to be drawn inside the context."""
    style = mpl.rc_context(
        {
            "axes.axisbelow": True,
            "axes.edgecolor": colour("line"),
            "axes.grid": True,
            "axes.labelcolor": colour("muted"),
            "axes.prop_cycle": f"cycler(color={list(COLOURS)})",
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlecolor": colour("ink"),
            "axes.titlesize": "medium",
            "figure.constrained_layout.use": True,
            "font.size": 9.5,
            "grid.alpha": 0.5,
            "grid.color": colour("line"),
            "legend.fontsize": 8.5,
            "legend.frameon": False,
            "savefig.facecolor": "white",
            "text.color": colour("ink"),
            "xtick.color": colour("muted"),
            "ytick.color": colour("muted"),
        }
    )
    with style:
        yield Figure(figsize=(width, height))


def encoded(figure: Figure) -> dict[str, bytes]:
    """Encode a figure as files, under the keys "svg" and "png"; equal figures give equal bytes."""
    svg, png = io.BytesIO(), io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "memtail"}):  # ids inside an SVG are derived from a salt, by default a random one
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    figure.savefig(png, format="png", dpi=_DOTS_PER_INCH, metadata={"Software": None})
    return {"svg": svg.getvalue(), "png": png.getvalue()}
