"""How figures look: in the colours of the pages that they are on, `base.css`. Importing this takes a moment; only what draws does."""

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
    """A colour of `base.css`, by its name there without the dashes, as #rrggbb."""
    css = files("memtail.figures").joinpath("base.css").read_text()
    found = re.search(rf"--{name}: (#[0-9a-f]{{6}});", css)
    assert found, name
    return found[1]


#: For lines: two of the pages' own, and others that people with any colour vision tell from them and from one another.
COLOURS = (colour("accent"), colour("warm"), "#56b4e9", "#cc79a7", "#e69f00", colour("ink"))
GREY = colour("muted")


@contextmanager
def drawing(width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches, in the style of all, to be filled, and saved by `encoded`, in the context."""
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
            # names within an SVG follow from a salt, which is random if it is not given
            "svg.hashsalt": "memtail",
        }
    )
    with style:
        yield Figure(figsize=(width, height))


def encoded(figure: Figure) -> dict[str, bytes]:
    """A figure as a file of SVG and one of PNG, by these names in lower case; equal figures give equal bytes."""
    svg, png = io.BytesIO(), io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    figure.savefig(png, format="png", dpi=_DOTS_PER_INCH, metadata={"Software": None})
    return {"svg": svg.getvalue(), "png": png.getvalue()}
